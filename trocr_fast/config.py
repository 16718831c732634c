"""config.json and generation_config.json of a checkpoint folder -> frozen dataclasses.

The three decoder families of TrOCR are told apart by their flags, never by a checkpoint's name. What cannot be
run is refused by name. Missing fields take the defaults of transformers' `ViTConfig`, `DeiTConfig` and `TrOCRConfig`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trocr_fast.json_fields import MAX_DIMENSION, Fields, read_json

# Names in transformers' ACT2FN that this engine computes, and the operation that computes them.
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_new", "relu": "relu", "silu": "silu", "swish": "silu"}

# The expected tensors are listed layer by layer before the weight files are looked at.
MAX_LAYERS = 1000

# Sinusoidal positions have no tensor to be held against; a row that never ends is decoded this far.
MAX_POSITIONS = 2**16


@dataclass(frozen=True)
class EncoderConfig:
    """A ViT or DeiT encoder: pixels [batch, num_channels, H, W] -> hidden states [batch, num_tokens, hidden_size]."""

    kind: str  # "vit" or "deit"
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    activation: str
    layer_norm_eps: float
    image_size: tuple[int, int]  # (height, width) in pixels
    patch_size: tuple[int, int]  # (height, width) in pixels
    num_channels: int
    qkv_bias: bool

    @property
    def num_patches(self) -> int:
        """Patches of one picture, row by row; a remainder at the right or bottom edge is not seen."""
        return (self.image_size[0] // self.patch_size[0]) * (self.image_size[1] // self.patch_size[1])

    @property
    def num_prefix_tokens(self) -> int:
        """CLS, and for DeiT the distillation token."""
        return 2 if self.kind == "deit" else 1

    @property
    def num_tokens(self) -> int:
        """Length of the encoder's output."""
        return self.num_patches + self.num_prefix_tokens


@dataclass(frozen=True)
class DecoderConfig:
    """A `TrOCRForCausalLM` decoder."""

    d_model: int
    num_layers: int
    num_heads: int
    ffn_dim: int
    activation: str
    vocab_size: int
    max_position_embeddings: int
    learned_positions: bool
    layernorm_embedding: bool
    scale_embedding: bool
    tie_word_embeddings: bool
    cross_width: int  # width of the encoder states that cross-attention sees, after enc_to_dec_proj
    pad_token_id: int | None  # the token that sinusoidal positions do not count

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.num_heads


# What transformers 5 assumes where neither the checkpoint nor the caller says anything. A field of the
# generation configuration that differs from these and is not in `GenerationDefaults` changes the tokens.
NEUTRAL_GENERATION: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "do_sample": (False,),
    "num_return_sequences": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "remove_invalid_values": (False,),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": (),
    "renormalize_logits": (False,),
    "guidance_scale": (1, 1.0),
    "stop_strings": (),
    "max_time": (),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "watermarking_config": (),
    "prompt_lookup_num_tokens": (),
    "token_healing": (False,),
    "assistant_early_exit": (),
    "speculation_type": (),
    "use_mtp": (False,),
}
# Those that matter to some searches only.
NEUTRAL_FOR_BEAMS: dict[str, tuple[Any, ...]] = {"length_penalty": (1.0,), "early_stopping": (False,)}
NEUTRAL_FOR_SAMPLING: dict[str, tuple[Any, ...]] = {
    "temperature": (1.0,),
    "top_k": (50,),
    "top_p": (1.0,),
    "min_p": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
}


@dataclass(frozen=True)
class GenerationDefaults:
    """What the files say of generating, as transformers 5 resolves it."""

    decoder_start_token_id: int
    eos_token_ids: tuple[int, ...]  # empty: rows only end at the length limit
    pad_token_id: int | None  # what finished rows are filled with
    max_length: int | None  # start token counted
    max_new_tokens: int | None  # start token not counted; wins over max_length
    use_cache: bool  # chooses the position rule of sinusoidal decoders
    other: Mapping[str, Any]  # settings that would change the tokens and that greedy search does not know
    of_beams: Mapping[str, Any]  # the same, once there are beams
    of_sampling: Mapping[str, Any]  # the same, once tokens are sampled


@dataclass(frozen=True)
class Architecture:
    """What is computed: an encoder, a decoder and what stands between them."""

    encoder: EncoderConfig
    decoder: DecoderConfig
    enc_to_dec_proj: bool  # a linear layer stands between encoder and decoder

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> "Architecture":
        """Check the values of a config.json.

        Args:
            source: where they come from, for messages.

        Raises:
            CheckpointError: a field has a wrong type or value, or this is not a ViT or DeiT encoder with a TrOCR
                decoder.
        """
        fields = Fields(values, source)
        if "auto_map" in values:
            raise fields.error("auto_map", "no code of the checkpoint's own to run", values["auto_map"])
        fields.choice("model_type", ("vision-encoder-decoder",))
        encoder_fields, decoder_fields = fields.section("encoder"), fields.section("decoder")
        encoder = _encoder_config(encoder_fields)
        return cls(encoder, *_decoder_config(decoder_fields, encoder))


@dataclass(frozen=True)
class CheckpointConfig(Architecture):
    """Everything of a checkpoint but its weights, pictures and text."""

    generation: GenerationDefaults

    @property
    def read_max_length(self) -> int:
        """Total length, start token counted, at which reading gives a line up as truncated.

        The checkpoint's own limit if it names one, else as far as its positions reach. A `max_length` of 20 is no
        choice of its maker: versions of transformers before 4.25 wrote their default into every config.json.
        """
        reach = self.decoder.max_position_embeddings + 1  # the last token is produced, but never fed back
        if self.generation.max_new_tokens is not None:
            return min(self.generation.max_new_tokens + 1, reach)
        if self.generation.max_length not in (None, 20):
            return min(max(self.generation.max_length, 2), reach)
        return reach

    @property
    def family(self) -> str:
        """A short description of the architecture, from its flags."""
        decoder = self.decoder
        positions = "learned" if decoder.learned_positions else "sinusoidal"
        head = "tied" if decoder.tie_word_embeddings else "untied"
        return f"{self.encoder.kind} encoder, {positions} positions, {decoder.activation}, {head} head"

    @classmethod
    def from_folder(cls, folder: Path) -> "CheckpointConfig":
        """Read `config.json` and, if there is one, `generation_config.json`.

        Raises:
            CheckpointError: a file is missing or is not JSON, a field has a wrong type or value, or the
                architecture is not a ViT or DeiT encoder with a TrOCR decoder.
        """
        values = read_json(folder / "config.json")
        architecture = Architecture.from_dict(values, str(folder / "config.json"))
        generation = _generation_defaults(folder, values, values["decoder"], architecture.decoder.vocab_size)
        return cls(architecture.encoder, architecture.decoder, architecture.enc_to_dec_proj, generation)


def _activation(fields: Fields, name: str) -> str:
    value = fields.get(name, "gelu")
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise fields.error(name, " or ".join(map(repr, ACTIVATIONS)) + " (nothing else is supported)", value)
    return ACTIVATIONS[value]


def _heads(fields: Fields, name: str, num_heads: int, width: int) -> int:
    if width % num_heads:
        raise fields.error(name, f"a divisor of the width, {width}", num_heads)
    return num_heads


def _epsilon(fields: Fields) -> float:
    value = fields.get("layer_norm_eps", 1e-12)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise fields.error("layer_norm_eps", "a number from 0 to 1", value)
    return float(value)


def _encoder_config(fields: Fields) -> EncoderConfig:
    kind = fields.choice("model_type", ("vit", "deit"))
    hidden_size = fields.dimension("hidden_size", 768)
    num_heads = _heads(fields, "num_attention_heads", fields.dimension("num_attention_heads", 12), hidden_size)
    head_dim = hidden_size // num_heads
    if fields.dimension("head_dim", head_dim) != head_dim:
        raise fields.error("head_dim", f"hidden_size / num_attention_heads = {head_dim}", fields.values["head_dim"])
    image_size, patch_size = fields.height_width("image_size", 224), fields.height_width("patch_size", 16)
    if patch_size[0] > image_size[0] or patch_size[1] > image_size[1]:
        raise fields.error("patch_size", f"at most image_size = {list(image_size)}", list(patch_size))
    num_channels = fields.dimension("num_channels", 3)
    if num_channels != 3:
        raise fields.error("num_channels", "3 (pictures are read as RGB)", num_channels)
    return EncoderConfig(
        kind=kind,
        hidden_size=hidden_size,
        num_layers=fields.dimension("num_hidden_layers", 12, MAX_LAYERS),
        num_heads=num_heads,
        intermediate_size=fields.dimension("intermediate_size", 3072),
        activation=_activation(fields, "hidden_act"),
        layer_norm_eps=_epsilon(fields),
        image_size=image_size,
        patch_size=patch_size,
        num_channels=num_channels,
        qkv_bias=fields.flag("qkv_bias", True),
    )


def _decoder_config(fields: Fields, encoder: EncoderConfig) -> tuple[DecoderConfig, bool]:
    fields.choice("model_type", ("trocr",))

    def aliased(name: str, alias: str, default: int, maximum: int = MAX_DIMENSION) -> int:
        # TrOCRConfig takes either name for the same attribute, and sets those of the alias last.
        return fields.dimension(alias if alias in fields.values else name, default, maximum)

    d_model = aliased("d_model", "hidden_size", 1024)
    num_heads = _heads(
        fields, "decoder_attention_heads", aliased("decoder_attention_heads", "num_attention_heads", 16), d_model
    )

    enc_to_dec_proj, cross_width = False, encoder.hidden_size
    if fields.get("cross_attention_hidden_size") is None:
        enc_to_dec_proj, cross_width = cross_width != d_model, d_model
    elif fields.dimension("cross_attention_hidden_size", None) != cross_width:
        expected, found = f"null or encoder.hidden_size = {cross_width}", fields.get("cross_attention_hidden_size")
        raise fields.error("cross_attention_hidden_size", expected, found)

    vocab_size = fields.dimension("vocab_size", 50265)
    learned_positions = fields.flag("use_learned_position_embeddings", True)
    pad_token_id = fields.values.get("pad_token_id", 1)
    if pad_token_id is not None or not learned_positions:
        fields.token("pad_token_id", pad_token_id, vocab_size)
    if not learned_positions and d_model < 4:
        raise fields.error("d_model", "at least 4 for sinusoidal positions", d_model)

    config = DecoderConfig(
        d_model=d_model,
        num_layers=aliased("decoder_layers", "num_hidden_layers", 12, MAX_LAYERS),
        num_heads=num_heads,
        ffn_dim=fields.dimension("decoder_ffn_dim", 4096),
        activation=_activation(fields, "activation_function"),
        vocab_size=vocab_size,
        max_position_embeddings=fields.dimension("max_position_embeddings", 512, MAX_POSITIONS),
        learned_positions=learned_positions,
        layernorm_embedding=fields.flag("layernorm_embedding", True),
        scale_embedding=fields.flag("scale_embedding", False),
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        cross_width=cross_width,
        pad_token_id=pad_token_id,
    )
    return config, enc_to_dec_proj


def _generation_defaults(
    folder: Path, config: dict[str, Any], decoder: dict[str, Any], vocab_size: int
) -> GenerationDefaults:
    """The precedence of transformers 5: generation_config.json alone, if it is there; else config.json, its top
    level first and its `decoder` section where the top level is silent."""
    path = folder / "generation_config.json"
    if path.exists():
        values = read_json(path)
    else:
        path = folder / "config.json"
        values = {**decoder, **{name: value for name, value in config.items() if value is not None}}
    fields = Fields(values, str(path))

    own = values.get("decoder_start_token_id") is not None or values.get("bos_token_id") is None
    start_field = "decoder_start_token_id" if own else "bos_token_id"
    start = fields.token(start_field, values.get(start_field), vocab_size)

    eos = values.get("eos_token_id")
    eos_token_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    for token in eos_token_ids:
        fields.token("eos_token_id", token, vocab_size)

    pad = values.get("pad_token_id")
    if pad is None and eos_token_ids:
        pad = eos_token_ids[0]
    if pad is not None:
        fields.token("pad_token_id", pad, vocab_size)

    limits = {}
    for name in ("max_length", "max_new_tokens"):
        limits[name] = None if values.get(name) is None else fields.dimension(name, None)

    use_cache = values.get("use_cache")
    other, of_beams, of_sampling = (
        {
            name: values[name]
            for name, same in neutral.items()
            if values.get(name) is not None and values[name] not in same
        }
        for neutral in (NEUTRAL_GENERATION, NEUTRAL_FOR_BEAMS, NEUTRAL_FOR_SAMPLING)
    )
    return GenerationDefaults(
        decoder_start_token_id=start,
        eos_token_ids=eos_token_ids,
        pad_token_id=pad,
        max_length=limits["max_length"],
        max_new_tokens=limits["max_new_tokens"],
        use_cache=True if use_cache is None else fields.flag("use_cache", True),
        other=other,
        of_beams=of_beams,
        of_sampling=of_sampling,
    )
