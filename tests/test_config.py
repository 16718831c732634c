"""config.json and generation_config.json: families, defaults, transformers' precedence, and every refusal by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import DeiTConfig, GenerationConfig, TrOCRConfig, VisionEncoderDecoderModel, ViTConfig

from tests.parity.models import Case, build, pictures, save
from trocr_fast.config import MAX_LAYERS, MAX_POSITIONS, NEUTRAL_GENERATION, CheckpointConfig
from trocr_fast.errors import CheckpointError
from trocr_fast.json_fields import MAX_DIMENSION
from trocr_fast.model import Model
from trocr_fast.trocr import TrOCR

PUBLISHED = Path(__file__).parent / "checkpoints"
ABSENT = object()  # as a value: the field is not there


def write(folder, config=None, generation=None):
    """A folder with these two files; generation None: no generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def minimal(kind="vit", **decoder):
    """No more than the three model types and the token to start from."""
    return {
        "model_type": "vision-encoder-decoder",
        "decoder_start_token_id": 2,
        "encoder": {"model_type": kind},
        "decoder": {"model_type": "trocr", **decoder},
    }


def edited(values, name, value):
    """A copy of nested JSON in which the field of a dotted name is replaced or, with ABSENT, removed."""
    copy = json.loads(json.dumps(values))
    *sections, last = name.split(".")
    inner = copy
    for section in sections:
        inner = inner[section]
    inner.pop(last, None)
    if value is not ABSENT:
        inner[last] = value
    return copy


# --- families and defaults


@pytest.mark.parametrize(
    ("name", "encoder", "decoder", "num_tokens", "family"),
    [
        (
            "base-handwritten",
            ("vit", 768, 12, 12, 3072, "gelu", False),
            (1024, 12, 16, 4096, "gelu", 50265, 512, True, True, False, True, 768),
            577,
            "vit encoder, learned positions, gelu, tied head",
        ),
        (
            "large-printed",
            ("vit", 1024, 24, 16, 4096, "gelu", False),
            (1024, 12, 16, 4096, "relu", 50265, 1024, False, False, True, False, 1024),
            577,
            "vit encoder, sinusoidal positions, relu, untied head",
        ),
        (
            "small-printed",
            ("deit", 384, 12, 6, 1536, "gelu", True),
            (256, 6, 8, 1024, "relu", 64044, 512, True, True, True, False, 384),
            578,
            "deit encoder, learned positions, relu, untied head",
        ),
    ],
)
def test_published_configurations(name, encoder, decoder, num_tokens, family):
    config = CheckpointConfig.from_folder(PUBLISHED / name)
    e, d, g = config.encoder, config.decoder, config.generation
    found = (e.kind, e.hidden_size, e.num_layers, e.num_heads, e.intermediate_size, e.activation, e.qkv_bias)
    assert found == encoder
    assert (e.image_size, e.patch_size, e.num_channels, e.layer_norm_eps) == ((384, 384), (16, 16), 3, 1e-12)
    assert e.num_tokens == num_tokens
    found = (d.d_model, d.num_layers, d.num_heads, d.ffn_dim, d.activation, d.vocab_size, d.max_position_embeddings)
    found += (d.learned_positions, d.layernorm_embedding, d.scale_embedding, d.tie_word_embeddings, d.cross_width)
    assert found == decoder
    assert d.pad_token_id == 1 and not config.enc_to_dec_proj and config.family == family
    assert (g.decoder_start_token_id, g.eos_token_ids, g.pad_token_id, g.use_cache) == (2, (2,), 1, False)
    assert (g.max_length, g.max_new_tokens, g.other) == (None, None, {})
    assert config.read_max_length == d.max_position_embeddings + 1


@pytest.mark.parametrize(("kind", "stock"), [("vit", ViTConfig()), ("deit", DeiTConfig())])
def test_missing_fields_take_the_defaults_of_transformers(tmp_path, kind, stock):
    config = CheckpointConfig.from_folder(write(tmp_path, minimal(kind)))
    ours = config.encoder
    assert ours.kind == stock.model_type
    assert ours.num_layers == stock.num_hidden_layers and ours.num_heads == stock.num_attention_heads
    assert ours.activation == stock.hidden_act
    assert ours.image_size == (stock.image_size,) * 2 and ours.patch_size == (stock.patch_size,) * 2
    for name in ("hidden_size", "intermediate_size", "layer_norm_eps", "num_channels", "qkv_bias"):
        assert getattr(ours, name) == getattr(stock, name), name

    ours, trocr = config.decoder, TrOCRConfig()
    assert ours.num_layers == trocr.decoder_layers and ours.num_heads == trocr.decoder_attention_heads
    assert ours.ffn_dim == trocr.decoder_ffn_dim and ours.activation == trocr.activation_function
    assert ours.learned_positions == trocr.use_learned_position_embeddings
    for name in ("d_model", "vocab_size", "max_position_embeddings", "layernorm_embedding", "scale_embedding"):
        assert getattr(ours, name) == getattr(trocr, name), name
    assert ours.tie_word_embeddings == trocr.tie_word_embeddings and ours.pad_token_id == trocr.pad_token_id
    assert trocr.cross_attention_hidden_size is None and config.enc_to_dec_proj and ours.cross_width == ours.d_model


@pytest.mark.parametrize(
    "decoder",
    [
        {"hidden_size": 96, "num_attention_heads": 6, "num_hidden_layers": 3},
        # both names: one must win, and transformers knows which
        {"d_model": 96, "hidden_size": 48, "decoder_attention_heads": 6, "num_attention_heads": 3},
        {"hidden_size": 48, "d_model": 96, "num_hidden_layers": 2, "decoder_layers": 3},
    ],
)
def test_aliases_of_the_decoder(tmp_path, decoder):
    ours = CheckpointConfig.from_folder(write(tmp_path, minimal(**decoder))).decoder
    stock = TrOCRConfig.from_dict(decoder)
    found = (ours.d_model, ours.num_heads, ours.num_layers)
    assert found == (stock.d_model, stock.decoder_attention_heads, stock.decoder_layers)


def test_the_flag_at_the_top_does_not_tie_the_head(tmp_path):
    for tied in (True, False):
        config = minimal(tie_word_embeddings=tied) | {"tie_word_embeddings": not tied}
        assert CheckpointConfig.from_folder(write(tmp_path, config)).decoder.tie_word_embeddings is tied


def test_rectangles_and_remainders(tmp_path):
    config = minimal()
    config["encoder"] |= {"image_size": [18, 35], "patch_size": [4, 8]}
    encoder = CheckpointConfig.from_folder(write(tmp_path, config)).encoder
    assert (encoder.num_patches, encoder.num_tokens) == (4 * 4, 4 * 4 + 1)


def test_equal_widths_need_no_projection(tmp_path):
    config = CheckpointConfig.from_folder(write(tmp_path, minimal(d_model=768)))
    assert not config.enc_to_dec_proj and config.decoder.cross_width == 768


# --- generation: what transformers 5 really does with the same files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny checkpoint as transformers writes it, and pictures for it."""
    model = build(Case(), seed=3)
    return save(model, tmp_path_factory.mktemp("saved")), pictures(model, 5, seed=3)


def clean(config):
    """config.json as transformers wrote it, without anything that generation could take from it."""
    names = GenerationConfig().to_dict().keys()
    for section in (config, config["decoder"], config["encoder"]):
        for name in names & section.keys():
            del section[name]
    return config


SHIPPED = {"_from_model_config": True, "bos_token_id": 0, "decoder_start_token_id": 2, "eos_token_id": 9}
TUNED = {"decoder_start_token_id": 0, "eos_token_id": 9, "pad_token_id": 1, "max_length": 12}

# (config.json's top level, its decoder section, generation_config.json or None)
FILES = {
    "shipped": ({}, {}, SHIPPED),
    "no file, top level": (TUNED, {}, None),
    "no file, decoder": ({}, TUNED, None),
    "no file, top level over decoder": ({"decoder_start_token_id": 3, "max_length": 7}, TUNED, None),
    "no file, null at the top": ({"decoder_start_token_id": None, "max_length": None}, TUNED, None),
    "no file, bos only": ({}, {"bos_token_id": 4}, None),
    "no file, start from the top, pad from the decoder": ({"bos_token_id": 4}, {"pad_token_id": 6}, None),
    "no file, cache": ({"use_cache": True}, TUNED | {"use_cache": False}, None),
    "flagged file over top level": (TUNED, {}, SHIPPED),
    "flagged file over decoder": ({}, TUNED, SHIPPED),
    "file over top level": (TUNED, {}, {"decoder_start_token_id": 5, "eos_token_id": 9, "pad_token_id": 8}),
    "file does not inherit eos": (TUNED, TUNED, {"decoder_start_token_id": 5}),
    "bos for start": ({}, {}, {"bos_token_id": 3, "eos_token_id": 9}),
    "null start": ({}, {}, {"decoder_start_token_id": None, "bos_token_id": 3}),
    "two ends": ({}, {}, {"decoder_start_token_id": 2, "eos_token_id": [9, 4], "pad_token_id": 1}),
    "two ends, no pad": ({}, {}, {"decoder_start_token_id": 2, "eos_token_id": [9, 4]}),
    "one end, no pad": ({}, {}, {"decoder_start_token_id": 2, "eos_token_id": 9}),
    "pad 0": ({}, {}, {"decoder_start_token_id": 2, "eos_token_id": 9, "pad_token_id": 0}),
    "no end, no pad": ({}, {}, {"decoder_start_token_id": 2}),
    "max_length 2": ({}, {}, {"decoder_start_token_id": 2, "max_length": 2}),
    "max_length 20": ({}, {}, {"decoder_start_token_id": 2, "max_length": 20}),
    "max_length 21": ({}, {}, {"decoder_start_token_id": 2, "max_length": 21}),
    "max_new_tokens 1": ({}, {}, {"decoder_start_token_id": 2, "max_new_tokens": 1}),
    "max_new_tokens wins": ({}, {}, {"decoder_start_token_id": 2, "max_new_tokens": 30, "max_length": 4}),
    "no cache": ({}, {}, {"decoder_start_token_id": 2, "use_cache": False}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("files", FILES.values(), ids=FILES)
def test_generation_resolves_as_in_transformers(saved, tmp_path, files):
    source, pixels = saved
    top, decoder, generation = files
    shutil.copy(source / "model.safetensors", tmp_path)
    config = clean(json.loads((source / "config.json").read_text()))
    config["decoder"] |= decoder
    write(tmp_path, config | top, generation)
    reference = VisionEncoderDecoderModel.from_pretrained(tmp_path)
    stock = reference.generation_config
    ours = TrOCR(tmp_path, Model.load(tmp_path, torch.device("cpu"), torch.float32), None, None)

    found = ours.model.config.generation
    start = stock.bos_token_id if stock.decoder_start_token_id is None else stock.decoder_start_token_id
    eos = stock.eos_token_id
    assert found.decoder_start_token_id == start
    assert found.eos_token_ids == (() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,))
    assert (found.max_length, found.max_new_tokens) == (stock.max_length, stock.max_new_tokens)
    assert found.use_cache == (True if stock.use_cache is None else stock.use_cache)
    assert found.other == {}
    # the token that fills up, the start and the length show in what is generated, with the files' limits and with ours
    for limits in ({}, {"max_length": 9}, {"max_new_tokens": 9}, {"max_new_tokens": 3, "max_length": 30}):
        assert torch.equal(ours.generate(pixels, **limits), reference.generate(pixels, **limits)), limits
    assert ours.generate(pixels)[:, 0].tolist() == [start] * len(pixels)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("generation", [{"decoder_start_token_id": 2, "max_length": 1}, {"eos_token_id": 9}])
def test_files_that_leave_transformers_without_a_token_are_refused_too(saved, tmp_path, generation):
    source, pixels = saved
    shutil.copy(source / "model.safetensors", tmp_path)
    write(tmp_path, clean(json.loads((source / "config.json").read_text())), generation)
    with pytest.raises(ValueError):
        VisionEncoderDecoderModel.from_pretrained(tmp_path).generate(pixels)
    with pytest.raises(ValueError, match=r"decoder_start_token_id|max_length"):
        TrOCR(tmp_path, Model.load(tmp_path, torch.device("cpu"), torch.float32), None, None).generate(pixels)


@pytest.mark.parametrize(
    ("generation", "total"),
    [
        ({}, 513),
        ({"max_length": 20}, 513),  # a default that old versions wrote, no choice
        ({"max_length": 64}, 64),
        ({"max_length": 1}, 2),
        ({"max_length": 4096}, 513),
        ({"max_new_tokens": 20}, 21),
        ({"max_new_tokens": 20, "max_length": 64}, 21),
        ({"max_new_tokens": 4096}, 513),
    ],
)
def test_length_of_reading(tmp_path, generation, total):
    folder = write(tmp_path, minimal(), {"decoder_start_token_id": 2} | generation)
    assert CheckpointConfig.from_folder(folder).read_max_length == total


def test_other_settings_are_kept_if_they_change_tokens(tmp_path):
    neutral = {"num_beams": 1, "length_penalty": 2.0, "early_stopping": True, "temperature": 0.7, "top_k": 5}
    search = {"num_beams": 4, "no_repeat_ngram_size": 3, "do_sample": True, "suppress_tokens": [1]}
    start = {"decoder_start_token_id": 2}

    def other(config, generation):
        return CheckpointConfig.from_folder(write(tmp_path, config, generation)).generation.other

    assert other(minimal(), start | neutral) == {}
    assert other(minimal(), start | neutral | search) == search
    assert other(minimal() | search, None) == other(minimal(**search), None) == search
    assert other(minimal() | search, start) == {}  # the file beside it is alone, as in transformers 5


def test_every_setting_of_transformers_is_known():
    """A setting that a later transformers adds is either harmless to greedy search or must be refused."""
    harmless = {
        *("max_length", "max_new_tokens", "use_cache", "decoder_start_token_id", "bos_token_id", "eos_token_id"),
        "pad_token_id",  # understood
        *("early_stopping", "length_penalty"),  # of beams
        *(
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "top_h",
            "typical_p",
            "epsilon_cutoff",
            "eta_cutoff",
        ),  # of sampling
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        *("cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile"),
        *("continuous_batching_config", "low_memory", "prefill_chunk_size"),
        # of an assistant model, which only a caller can give
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "max_matching_ngram_size"),
        "transformers_version",
    }
    names = {name for name in GenerationConfig().to_dict() if not name.startswith("_")}
    assert names - NEUTRAL_GENERATION.keys() - harmless == set()


# --- refusals


def refusal(folder):
    with pytest.raises(CheckpointError) as caught:
        CheckpointConfig.from_folder(folder)
    return str(caught.value)


BAD_DIMENSIONS = ["12", 12.0, -1, 0, True, [], {}, float("nan"), 10**12]
DIMENSIONS = [
    *(f"encoder.{n}" for n in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")),
    *(f"encoder.{n}" for n in ("image_size", "patch_size", "num_channels")),
    *(f"decoder.{n}" for n in ("d_model", "decoder_layers", "decoder_attention_heads", "decoder_ffn_dim")),
    *(f"decoder.{n}" for n in ("vocab_size", "max_position_embeddings", "cross_attention_hidden_size")),
]


@pytest.mark.parametrize("name", DIMENSIONS)
@pytest.mark.parametrize("value", BAD_DIMENSIONS, ids=repr)
def test_bad_dimensions(tmp_path, name, value):
    message = refusal(write(tmp_path, edited(minimal(), name, value)))
    assert message.startswith(f"{tmp_path / 'config.json'}: field '{name}': expected ")
    assert message.endswith(f", found {value!r}")


@pytest.mark.parametrize("name", ["encoder.image_size", "encoder.patch_size"])
@pytest.mark.parametrize("value", [[16], [16, 16, 16], [16, 0], [16, "16"], [True, 16], [16, 10**12], [None, 16]])
def test_bad_heights_and_widths(tmp_path, name, value):
    message = refusal(write(tmp_path, edited(minimal(), name, value)))
    assert f"field '{name}': expected a whole number" in message and "found" in message


FLAGS = ["encoder.qkv_bias"] + [
    f"decoder.{n}"
    for n in ("use_learned_position_embeddings", "layernorm_embedding", "scale_embedding", "tie_word_embeddings")
]


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", ["true", 1, 0.0, []], ids=repr)
def test_bad_flags(tmp_path, name, value):
    message = refusal(write(tmp_path, edited(minimal(), name, value)))
    assert message == f"{tmp_path / 'config.json'}: field '{name}': expected true or false, found {value!r}"


NOTHING_ELSE = "(nothing else is supported)"
TOKENS = f"a token from 0 to vocab_size - 1 = {50265 - 1}"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(("encoder.model_type", v, f"'vit' or 'deit' {NOTHING_ELSE}") for v in ("swin", "dinov2", "beit", 3, [], {})),
        *(
            ("decoder.model_type", v, f"'trocr' {NOTHING_ELSE}")
            for v in ("bert", "gpt2", "roberta", "TrOCR", ["trocr"])
        ),
        ("model_type", "encoder-decoder", f"'vision-encoder-decoder' {NOTHING_ELSE}"),
        ("model_type", "donut", f"'vision-encoder-decoder' {NOTHING_ELSE}"),
        ("encoder", "vit", "an object"),
        ("decoder", ["trocr"], "an object"),
        ("auto_map", {"AutoModel": "evil.Model"}, "no code of the checkpoint's own"),
        ("encoder.hidden_act", "mish", f"'gelu' or 'gelu_new' or 'relu' or 'silu' or 'swish' {NOTHING_ELSE}"),
        ("decoder.activation_function", ["gelu"], NOTHING_ELSE),
        ("encoder.num_attention_heads", 7, "a divisor of the width, 768"),
        ("decoder.decoder_attention_heads", 24, "a divisor of the width, 1024"),
        ("encoder.head_dim", 32, "hidden_size / num_attention_heads = 64"),
        ("encoder.head_dim", 64.0, "a whole number"),
        ("encoder.patch_size", [225, 225], "at most image_size = [224, 224]"),
        ("encoder.patch_size", [16, 225], "at most image_size = [224, 224]"),
        ("encoder.num_channels", 1, "3 (pictures are read as RGB)"),
        *(
            ("encoder.layer_norm_eps", v, "a number from 0 to 1")
            for v in (float("nan"), float("inf"), -1e-5, 1, "1e-5")
        ),
        ("encoder.num_hidden_layers", MAX_LAYERS + 1, f"a whole number from 1 to {MAX_LAYERS}"),
        ("decoder.decoder_layers", MAX_LAYERS + 1, f"a whole number from 1 to {MAX_LAYERS}"),
        ("decoder.vocab_size", MAX_DIMENSION + 1, f"a whole number from 1 to {MAX_DIMENSION}"),
        ("decoder.max_position_embeddings", MAX_POSITIONS + 1, f"a whole number from 1 to {MAX_POSITIONS}"),
        ("decoder.cross_attention_hidden_size", 1024, "null or encoder.hidden_size = 768"),
        ("decoder.cross_attention_hidden_size", 768.0, "a whole number"),
        ("decoder.pad_token_id", 50265, TOKENS),
        ("decoder.pad_token_id", -1, TOKENS),
        ("decoder.pad_token_id", 1.0, TOKENS),
    ],
    ids=str,
)
def test_refusals(tmp_path, name, value, expected):
    message = refusal(write(tmp_path, edited(minimal(), name, value)))
    assert message.startswith(f"{tmp_path / 'config.json'}: field '{name}': expected ")
    assert expected in message and message.endswith(f", found {value!r}")


@pytest.mark.parametrize("name", ["model_type", "encoder", "decoder", "encoder.model_type", "decoder.model_type"])
@pytest.mark.parametrize("value", [ABSENT, None])
def test_what_a_checkpoint_cannot_do_without(tmp_path, name, value):
    message = refusal(write(tmp_path, edited(minimal(), name, value)))
    assert f"field '{name}': expected " in message and message.endswith(", found None")


def test_sinusoids_need_a_pad_token_and_a_width(tmp_path):
    sinusoidal = minimal(use_learned_position_embeddings=False)
    assert "field 'decoder.pad_token_id'" in refusal(write(tmp_path, edited(sinusoidal, "decoder.pad_token_id", None)))
    narrow = sinusoidal["decoder"] | {"d_model": 2, "decoder_attention_heads": 1}
    assert "field 'decoder.d_model': expected at least 4" in refusal(write(tmp_path, sinusoidal | {"decoder": narrow}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("decoder_start_token_id", value) for value in (-1, 50265, "2", 2.0, True, [2], 10**12)),
        *(("eos_token_id", value) for value in (-1, 50265, "2", 2.0, {})),
        *(("pad_token_id", value) for value in (-1, 50265, "1", [1])),
        *(("max_length", value) for value in (0, -1, "20", 20.0, [20], 10**12)),
        *(("max_new_tokens", value) for value in (0, -1, "20", True)),
        *(("use_cache", value) for value in ("false", 0)),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_bad_generation_settings(tmp_path, file, name, value):
    settings = {"decoder_start_token_id": 2, name: value}
    own_file = file == "generation_config.json"
    message = refusal(write(tmp_path, minimal() | ({} if own_file else settings), settings if own_file else None))
    assert message.startswith(f"{tmp_path / file}: field '{name}': expected ") and f", found {value!r}" in message


def test_the_field_that_the_start_came_from_is_named(tmp_path):
    assert "field 'bos_token_id'" in refusal(write(tmp_path, minimal(), {"bos_token_id": 50265}))
    assert "field 'decoder_start_token_id'" in refusal(write(tmp_path, minimal(), {}))


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe{}", b"[]", b'"vit"', b"null", b"[" * 100_000, b'{"vocab_size": ' + b"9" * 5000 + b"}"],
)
def test_files_that_hold_no_json_object(tmp_path, file, content):
    write(tmp_path, minimal(), {"decoder_start_token_id": 2})
    (tmp_path / file).write_bytes(content)
    message = refusal(tmp_path)
    assert str(tmp_path / file) in message and "expected a JSON" in message and "found" in message


def test_no_file_or_a_folder_of_that_name(tmp_path):
    message = refusal(tmp_path)
    assert str(tmp_path) in message and "expected a file config.json, found none" in message
    (tmp_path / "config.json").mkdir()
    assert "config.json: expected a JSON file" in refusal(tmp_path)
