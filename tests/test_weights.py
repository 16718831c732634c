"""Weight files: every form gives transformers' tokens; what is damaged or hostile is refused by name, at no cost."""

import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import VisionEncoderDecoderModel

from tests.parity.models import Case, build, greedy, pictures, save
from trocr_fast.config import CheckpointConfig
from trocr_fast.errors import CheckpointError
from trocr_fast.model import Model
from trocr_fast.verify import repair_sinusoidal_positions
from trocr_fast.weights import EMBEDDING, HEAD, current_name, expected_shapes, load_weights

CPU = torch.device("cpu")
CASES = {
    "A": Case("A"),  # tied
    "B": Case("B"),  # untied, sinusoidal
    "C": Case("C", encoder="deit", qkv_bias=True, bridge="proj"),  # untied, distillation token, a projection between
}
SEEDS = {"A": 0, "B": 4, "C": 3}  # such that the pictures give different texts
LAYER_NORM = "encoder.layernorm.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Family -> folder as transformers writes it."""
    return {name: save(build(case, SEEDS[name]), tmp_path_factory.mktemp(name)) for name, case in CASES.items()}


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of family A to be damaged."""
    return shutil.copytree(saved["A"], tmp_path / "A")


def stored(folder):
    return load_file(folder / "model.safetensors")


def load(folder, dtype=torch.float32):
    return load_weights(folder, CheckpointConfig.from_folder(folder), dtype)


def refusal(folder, dtype=torch.float32):
    with pytest.raises(CheckpointError) as caught:
        load(folder, dtype)
    return str(caught.value)


def replace_weights(folder, **files):
    """The folder with other weight files; `__` in an argument's name stands for a dot."""
    for old in [*folder.glob("*.safetensors*"), *folder.glob("*.bin*")]:
        old.unlink()
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif path.suffix == ".json":
            path.write_text(json.dumps(content))
        elif path.suffix == ".safetensors":
            save_file({n: t.contiguous().clone() for n, t in content.items()}, path)
        else:
            torch.save(content, path)
    return folder


def assert_equals_transformers(folder):
    """Greedy tokens of both, from the same folder and pixels."""
    reference = VisionEncoderDecoderModel.from_pretrained(folder, dtype=torch.float32).eval()
    repair_sinusoidal_positions(reference)
    pixels = pictures(reference, 6, seed=9)
    expected = reference.generate(pixels, max_length=12).tolist()
    assert len({tuple(row) for row in expected}) > 2
    model = Model.load(folder, CPU, torch.float32)
    assert [found.tokens for found in greedy(model, pixels, 12)] == expected


# --- forms that load


def two_halves(tensors):
    """Shard name -> tensors, and the index, for any suffix."""
    names = sorted(tensors)
    halves = [names[::2], names[1::2]]

    def split(pattern):
        shards = {pattern.format(i + 1): {n: tensors[n] for n in half} for i, half in enumerate(halves)}
        index = {"metadata": {}, "weight_map": {n: shard for shard, inside in shards.items() for n in inside}}
        return shards, index

    return split


def as_safetensors(folder, tensors):
    replace_weights(folder, model__safetensors=tensors)


def as_sharded_safetensors(folder, tensors):
    shards, index = two_halves(tensors)("model-0000{}-of-00002__safetensors")
    index["weight_map"] = {n: s.replace("__", ".") for n, s in index["weight_map"].items()}
    replace_weights(folder, model__safetensors__index__json=index, **shards)


def as_bin(folder, tensors):
    replace_weights(folder, pytorch_model__bin=tensors)


def as_sharded_bin(folder, tensors):
    shards, index = two_halves(tensors)("pytorch_model-0000{}-of-00002__bin")
    index["weight_map"] = {n: s.replace("__", ".") for n, s in index["weight_map"].items()}
    replace_weights(folder, pytorch_model__bin__index__json=index, **shards)


def as_old_bin(folder, tensors):
    replace_weights(folder)
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def as_bin_of_parameters(folder, tensors):
    replace_weights(folder, pytorch_model__bin={n: torch.nn.Parameter(t) for n, t in tensors.items()})


def as_bin_of_views(folder, tensors):
    """Not contiguous, as after a transposition."""
    as_bin(folder, {n: t.t().clone().t() if t.dim() == 2 else t for n, t in tensors.items()})


FORMS = [
    *(as_safetensors, as_sharded_safetensors, as_bin, as_sharded_bin),
    *(as_old_bin, as_bin_of_parameters, as_bin_of_views),
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_tensors_and_tokens(folder, form):
    before = load(folder)
    form(folder, stored(folder))
    after = load(folder)
    assert after.keys() == before.keys() == expected_shapes(CheckpointConfig.from_folder(folder)).keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) and tensor.dtype == torch.float32 and not tensor.requires_grad, name
    assert_equals_transformers(folder)


@pytest.mark.parametrize("family", CASES)
def test_names_of_files_and_names_in_memory(saved, tmp_path, family):
    folder = shutil.copytree(saved[family], tmp_path / "copy")
    before = load(folder)
    assert "encoder.encoder.layer.0.attention.attention.query.weight" in stored(folder)  # the older names
    assert_equals_transformers(folder)

    memory = VisionEncoderDecoderModel.from_pretrained(folder).state_dict()
    assert "encoder.layers.0.attention.q_proj.weight" in memory
    as_bin(folder, memory)
    after = load(folder)
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in after)
    assert_equals_transformers(folder)


def test_every_older_name_is_translated(saved):
    for family, folder in saved.items():
        expected = expected_shapes(CheckpointConfig.from_folder(folder))
        found = {current_name(name) for name in stored(folder) if ".pooler." not in name}
        assert expected.keys() - found <= {HEAD}, family  # a tied head is not written
        assert found <= expected.keys(), family


def test_the_first_form_of_transformers_order_is_taken(folder):
    tensors = stored(folder)
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    assert torch.equal(load(folder)[LAYER_NORM], tensors[LAYER_NORM])


@pytest.mark.parametrize("extra", ["no pooler", "pooler", "marker", "old table", "mask token", "version", "ids"])
def test_tensors_without_a_part_in_reading(saved, tmp_path, extra):
    folder = shutil.copytree(saved["B"], tmp_path / "copy")
    before, tensors = load(folder), stored(folder)
    for name in [name for name in tensors if "pooler" in name]:
        del tensors[name]
    positions = "decoder.model.decoder.embed_positions"
    tensors |= {
        "no pooler": {},
        "pooler": {"encoder.pooler.dense.weight": torch.ones(24, 24), "encoder.pooler.dense.bias": torch.ones(24)},
        "marker": {f"{positions}._float_tensor": torch.zeros(1)},
        "old table": {f"{positions}.weights": torch.zeros(66, 32)},
        "mask token": {"encoder.embeddings.mask_token": torch.zeros(1, 1, 24)},
        "version": {"decoder.model.decoder.version": torch.tensor([3.0])},
        "ids": {"encoder.embeddings.position_ids": torch.arange(17)[None]},  # not a float, and not looked at
    }[extra]
    as_safetensors(folder, tensors)
    after = load(folder)
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in after)
    assert_equals_transformers(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", [as_safetensors, as_bin])
def test_other_precisions_are_loaded_as_asked(folder, form, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in stored(folder).items()}
    form(folder, tensors)
    for asked in (torch.float32, torch.bfloat16):
        loaded = load(folder, asked)
        assert {tensor.dtype for tensor in loaded.values()} == {asked}
        assert torch.equal(loaded[LAYER_NORM], tensors[LAYER_NORM].to(asked))
    assert_equals_transformers(folder)


# --- the two ends of the decoder: one tensor or two


def tie(folder, tied):
    config = json.loads((folder / "config.json").read_text())
    config["decoder"]["tie_word_embeddings"] = tied
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("family", ["A", "B"])  # without and with scale_embedding
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("content", ["both, different", "both, equal", "embedding only", "head only"])
def test_heads_and_embeddings(saved, tmp_path, family, tied, content):
    folder = shutil.copytree(saved[family], tmp_path / "copy")
    tie(folder, tied)
    tensors = stored(folder)
    embedding = tensors[EMBEDDING]
    tensors[HEAD] = embedding.clone() if content != "both, different" else embedding.flip(0).roll(5, 1)
    if content.endswith("only"):
        del tensors[HEAD if content == "embedding only" else EMBEDDING]
    as_safetensors(folder, tensors)
    if content.endswith("only") and not tied:  # transformers would make one up
        assert f"'{HEAD if content == 'embedding only' else EMBEDDING}'" in refusal(folder)
        return
    weights = load(folder)
    assert (weights[HEAD] is weights[EMBEDDING]) == (content != "both, different")
    assert_equals_transformers(folder)


# --- refusals


def test_missing_tensors_are_listed(folder):
    tensors = stored(folder)
    del tensors[LAYER_NORM], tensors[EMBEDDING]
    as_safetensors(folder, tensors)
    message = refusal(folder)
    assert str(folder) in message and "config.json" in message
    assert f"tensor '{LAYER_NORM}': expected shape [24], found none" in message
    assert f"tensor '{EMBEDDING}': expected shape [14, 32], found none" in message


def test_a_long_list_is_cut(folder):
    as_safetensors(folder, {LAYER_NORM: torch.ones(24)})
    message = refusal(folder)
    assert len(message.splitlines()) == 22 and message.splitlines()[-1].endswith("more")


@pytest.mark.parametrize("form", [as_safetensors, as_sharded_bin])
def test_extra_tensors_are_refused(folder, form):
    form(folder, stored(folder) | {"encoder.encoder.layer.2.output.dense.bias": torch.ones(24), "x": torch.ones(2, 3)})
    message = refusal(folder)
    assert "tensor 'encoder.encoder.layer.2.output.dense.bias': expected no such tensor" in message
    assert "tensor 'x': expected no such tensor by config.json, found shape [2, 3]" in message


@pytest.mark.parametrize("form", [as_safetensors, as_bin])
@pytest.mark.parametrize("shape", [(23,), (24, 1), (), (0,)])
def test_wrong_shapes(folder, form, shape):
    form(folder, stored(folder) | {LAYER_NORM: torch.ones(shape)})
    message = refusal(folder)
    assert f"tensor '{LAYER_NORM}': expected shape [24] by config.json, found {list(shape)}" in message


@pytest.mark.parametrize(
    ("form", "dtype", "name"),
    [
        *((as_safetensors, *pair) for pair in ((torch.int64, "I64"), (torch.uint8, "U8"), (torch.bool, "BOOL"))),
        (as_safetensors, torch.float8_e4m3fn, "F8_E4M3"),
        *((as_bin, *pair) for pair in ((torch.int8, "int8"), (torch.complex64, "complex64"))),
    ],
)
def test_dtypes_that_are_no_plain_floats(folder, form, dtype, name):
    form(folder, stored(folder) | {LAYER_NORM: torch.ones(24).to(dtype)})
    message = refusal(folder)
    assert f"tensor '{LAYER_NORM}': expected float64, float32, float16 or bfloat16, found {name}" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("form", [as_safetensors, as_bin])
def test_values_that_are_no_numbers(folder, form, value):
    tensors = stored(folder)
    tensors[EMBEDDING][13, 31] = value
    form(folder, tensors)
    message = refusal(folder)
    assert f"tensor '{EMBEDDING}': expected values that are finite in float32, found NaN or infinity" in message
    assert str(folder) in message


def test_values_too_large_for_the_precision_asked_for(folder):
    tensors = stored(folder)
    tensors[EMBEDDING][0, 0] = 1e5
    as_safetensors(folder, tensors)
    assert load(folder)[EMBEDDING][0, 0] == 1e5
    assert f"tensor '{EMBEDDING}': expected values that are finite in float16" in refusal(folder, torch.float16)


def test_one_tensor_under_both_names(folder):
    old, new = "encoder.encoder.layer.0.output.dense.bias", "encoder.layers.0.mlp.fc2.bias"
    as_safetensors(folder, stored(folder) | {new: torch.zeros(24)})
    message = refusal(folder)
    assert f"'{old}'" in message and f"'{new}'" in message and "expected one tensor" in message


def test_one_tensor_in_two_shards(folder):
    as_sharded_safetensors(folder, stored(folder))
    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    name = min(shards[0])
    save_file(shards[1] | {name: shards[0][name]}, folder / "model-00002-of-00002.safetensors")
    assert f"'{name}': expected one tensor" in refusal(folder)


def test_no_weights(folder):
    message = refusal(replace_weights(folder))
    assert f"{folder}: expected a weight file (model.safetensors, " in message and "found none" in message
    (folder / "model.safetensors").mkdir()
    assert "model.safetensors: expected a safetensors file" in refusal(folder)


# --- damaged files


def is_refused_or_equal(folder, before, kind):
    """A damaged file is refused with its name, unless the damage is where nothing is stored."""
    try:
        after = load(folder)
    except CheckpointError as error:
        assert str(folder) in str(error) and "expected" in str(error) and "found" in str(error)
        return True
    assert kind == "flipped" and after.keys() == before.keys()  # a flipped bit inside a value shows nowhere
    return False


@pytest.mark.parametrize("form", [as_safetensors, as_bin, as_old_bin])
def test_truncated_files(folder, form):
    before = load(folder)
    form(folder, stored(folder))
    (path,) = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    whole = path.read_bytes()
    cuts = {0, 1, 7, 8, 9, 100, len(whole) - 1, *(len(whole) * tenth // 10 for tenth in range(1, 10))}
    for cut in cuts:
        path.write_bytes(whole[:cut])
        assert is_refused_or_equal(folder, before, "truncated"), cut


@pytest.mark.parametrize("name", ["model__safetensors", "pytorch_model__bin"])
def test_random_bytes(folder, name):
    before = load(folder)
    for seed in range(40):
        noise = random.Random(seed).randbytes(seed * 13)
        for start in (
            b"",
            b"\x80\x02",
            b"PK\x03\x04",
            b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
        ):  # pickle, zip, old torch
            replace_weights(folder, **{name: start + noise})
            assert is_refused_or_equal(folder, before, "random")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", [as_safetensors, as_bin, as_old_bin])
def test_flipped_bytes(folder, form):
    """Of the header, or of the pickle: whatever they turn into, nothing but CheckpointError comes out."""
    before = load(folder)
    form(folder, stored(folder))
    (path,) = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    whole, chance = path.read_bytes(), random.Random(1)
    reach = {as_safetensors: 8 + struct.unpack("<Q", whole[:8])[0], as_bin: 12_000, as_old_bin: 9_000}[form]
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(chance.choice([1, 3])):
            damaged[chance.randrange(reach)] = chance.randrange(256)
        path.write_bytes(damaged)
        refused += is_refused_or_equal(folder, before, "flipped")
    assert refused > 50


def safetensors_bytes(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**8) + b"{}",
        struct.pack("<Q", 2**64 - 1),
        safetensors_bytes(b"not json"),
        safetensors_bytes(b"\xff\xfe"),
        safetensors_bytes([]),
        safetensors_bytes({LAYER_NORM: entry([24], 0, 96), "x": entry([24], 48, 144)}, bytes(144)),  # overlap
        safetensors_bytes({LAYER_NORM: entry([24], 0, 96), "x": entry([24], 0, 96)}, bytes(96)),  # the same bytes
        safetensors_bytes({LAYER_NORM: entry([24], 4, 100)}, bytes(100)),  # a hole
        safetensors_bytes({LAYER_NORM: entry([24], 96, 0)}, bytes(96)),
        safetensors_bytes({LAYER_NORM: entry([24], 0, 2**63)}, bytes(96)),
        safetensors_bytes({LAYER_NORM: entry([2**40, 2**40], 0, 96)}, bytes(96)),
        safetensors_bytes({LAYER_NORM: entry([10**9], 0, 96)}, bytes(96)),
        safetensors_bytes({LAYER_NORM: entry([-24], 0, 96)}, bytes(96)),
        safetensors_bytes({LAYER_NORM: entry([24], 0, 96, "F31")}, bytes(96)),
        safetensors_bytes({LAYER_NORM: entry([24], 0, 96)}, bytes(200)),  # more bytes than named
        safetensors_bytes(b"[" * 100_000),
    ],
    ids=str,
)
def test_safetensors_headers_that_lie(folder, content):
    message = refusal(replace_weights(folder, model__safetensors=content))
    assert message.startswith(f"{folder / 'model.safetensors'}: expected a safetensors file, found a damaged one")
    with pytest.raises(SafetensorError):
        load_file(folder / "model.safetensors")


def test_a_pickle_is_not_run(folder, tmp_path):
    trace = tmp_path / "trace"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {trace}",)

    evil = stored(folder) | {"x": Evil()}
    for zipped in (True, False):
        replace_weights(folder)
        torch.save(evil, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        message = refusal(folder)
        assert f"{folder / 'pytorch_model.bin'}: expected a PyTorch file that holds tensors only, found" in message
        assert len(message.splitlines()) == 1
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    refusal(folder)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Evil()))
    assert trace.exists()  # it would have done it


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([torch.ones(24)], "list"),
        (torch.ones(24), "Tensor"),
        ({"model": {LAYER_NORM: torch.ones(24)}}, "dict at 'model'"),
        ({3: torch.ones(24)}, "Tensor at 3"),
    ],
)
def test_bin_files_of_something_else(folder, content, found):
    message = refusal(replace_weights(folder, pytorch_model__bin=content))
    assert message == f"{folder / 'pytorch_model.bin'}: expected tensors by name, found {found}"


def test_a_bin_file_that_was_zipped_anew(folder):
    as_bin(folder, stored(folder))
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(folder / "new", "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    (folder / "new").replace(path)
    assert "expected a PyTorch file" in refusal(folder)  # mapped, compressed bytes must not pass for values


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(1).expand(24),
        torch.ones(24, device="meta"),
        torch.ones(24).to_sparse(),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    ],
    ids=["repeated", "without data", "sparse", "nested"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_whose_values_are_not_all_in_the_file(folder, tensor):
    as_bin(folder, stored(folder) | {LAYER_NORM: tensor})
    message = refusal(folder)
    assert f"tensor '{LAYER_NORM}': expected a dense tensor with each of its values in the file" in message


# --- shard indices


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\0b", "x" * 5000, 3, None, []],
)
def test_shards_anywhere_but_beside_the_index(folder, name):
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    (folder / "sub").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "sub" / "x.safetensors")
    replace_weights(folder, model__safetensors__index__json={"weight_map": {LAYER_NORM: name}})
    message = refusal(folder)
    index = folder / "model.safetensors.index.json"
    assert message.startswith(f"{index}: field 'weight_map': expected ") and message.endswith(f", found {name!r}")


@pytest.mark.parametrize("form", [as_sharded_safetensors, as_sharded_bin])
def test_a_missing_shard(folder, form):
    form(folder, stored(folder))
    shard = max([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    shard.unlink()
    message = refusal(folder)
    assert f"expected names of files beside it, found '{shard.name}'" in message and "index.json" in message


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": null}', b"\xff", b"[" * 100_000]
)
@pytest.mark.parametrize("name", ["model__safetensors__index__json", "pytorch_model__bin__index__json"])
def test_an_index_that_is_none(folder, name, content):
    message = refusal(replace_weights(folder, **{name: content}))
    assert str(folder / name.replace("__", ".")) in message and "expected" in message and "found" in message


def test_an_empty_index_lacks_everything(folder):
    assert "found none" in refusal(replace_weights(folder, model__safetensors__index__json={"weight_map": {}}))


def test_shards_may_be_links(folder, tmp_path):
    """As the hub's cache keeps them."""
    as_sharded_safetensors(folder, stored(folder))
    for shard in folder.glob("*.safetensors"):
        shard.rename(tmp_path / shard.name)
        shard.symlink_to(tmp_path / shard.name)
    load(folder)


# --- nothing is allocated before the check

HUGE = {
    "decoder.vocab_size": 10**9,
    "decoder.d_model": 2**30,
    "decoder.max_position_embeddings": 2**16,
    "decoder.decoder_layers": 1000,
    "encoder.num_hidden_layers": 1000,
    "encoder.hidden_size": 3 * 2**28,
    "encoder.intermediate_size": 2**31 - 1,
    "encoder.image_size": 2**31 - 1,
}
MEASURE = """
import json, resource, sys
from pathlib import Path
import torch
from trocr_fast.errors import CheckpointError
from trocr_fast.model import Model

def try_to_load(folder):
    try:
        Model.load(Path(folder), torch.device("cpu"), torch.float32)
        return "loaded"
    except CheckpointError as error:
        return str(error)

torch.set_num_threads(1)
good, *bad = sys.argv[1:]
assert try_to_load(good) == "loaded"
in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**26, resource.RLIM_INFINITY))
print(json.dumps([try_to_load(folder) for folder in bad]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory by Linux's means")
def test_nothing_is_allocated_for_a_config_that_lies(saved, tmp_path):
    """Checked with 64 MB left to allocate."""
    folders, expected = [], []
    for name, value in HUGE.items():
        folder = shutil.copytree(saved["A"], tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        section, field = name.split(".")
        config[section][field] = value
        if name == "encoder.hidden_size":
            config["decoder"]["cross_attention_hidden_size"] = value
        (folder / "config.json").write_text(json.dumps(config))
        folders.append(folder)
        expected.append("the weights disagree with config.json")
    # and one whose file plays along: a billion rows that are one stored number
    folder = shutil.copytree(folders[0], tmp_path / "repeated")
    as_bin(folder, stored(folder) | {EMBEDDING: torch.zeros(1).expand(10**9, 32)})
    folders.append(folder)
    expected.append(f"tensor '{EMBEDDING}': expected a dense tensor")

    command = [sys.executable, "-c", MEASURE, str(saved["A"]), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for message, part in zip(json.loads(done.stdout), expected, strict=True):
        assert part in message, message
