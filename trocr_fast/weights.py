"""Weight files of a checkpoint -> tensors by one set of names, checked against the config before any is loaded.

Names are those of transformers 5 in memory (`encoder.layers.0.attention.q_proj.weight`); the older names of all
published files are translated on the way in.
"""

import os
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from trocr_fast.config import Architecture, CheckpointConfig
from trocr_fast.errors import CheckpointError
from trocr_fast.json_fields import Fields, read_json

# One file, or a JSON index of shards, in the order in which they are looked for.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

_FLOATING = ("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16")

# (before transformers 5, now), applied in this order; the longer suffix of `output.dense` comes first.
_RENAMES = (
    (re.compile(r"^encoder\.encoder\.layer\."), "encoder.layers."),
    (re.compile(r"\.attention\.attention\.query\."), ".attention.q_proj."),
    (re.compile(r"\.attention\.attention\.key\."), ".attention.k_proj."),
    (re.compile(r"\.attention\.attention\.value\."), ".attention.v_proj."),
    (re.compile(r"\.attention\.output\.dense\."), ".attention.o_proj."),
    (re.compile(r"\.intermediate\.dense\."), ".mlp.fc1."),
    (re.compile(r"\.output\.dense\."), ".mlp.fc2."),
)

# In some files, without any part in reading: the pooler, a marker of old sinusoidal tables, a stored position table
# that is computed here, and what ViT keeps for its pretraining.
_UNUSED = re.compile(
    r"^encoder\.pooler\.|^encoder\.embeddings\.mask_token$|\.embed_positions\.(_float_tensor|weights)$"
    r"|^decoder\.model\.decoder\.version$|\.position_ids$"
)

EMBEDDING = "decoder.model.decoder.embed_tokens.weight"
HEAD = "decoder.output_projection.weight"


@dataclass(frozen=True)
class StoredTensor:
    """What a file's header says of one tensor, and how to read it."""

    file: Path
    name: str  # as written in the file
    shape: tuple[int, ...]
    dtype: str  # in the words of the file's format: "F32" or "float32"
    read: Callable[[], torch.Tensor]


def load_weights(
    folder: Path, config: CheckpointConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """All tensors that `config` needs, in `dtype` on `device`.

    With a tied head, `HEAD` and `EMBEDDING` are one tensor. As in transformers 5, a file that holds both with
    different values is not tied, whatever the config says.

    Raises:
        CheckpointError: no or unreadable weight files, missing, unexpected or doubled tensors, a shape or dtype that
            disagrees with the config, NaN or infinite values. Lists file, tensor, expected and found.
    """
    stored = _by_current_name(folder)
    expected = expected_shapes(config)
    _check(stored, expected, config.decoder.tie_word_embeddings, folder)

    weights = {}
    for name in expected:
        if name in stored:
            # A copy: what is read may be mapped, and a file that is replaced must not change a model that runs.
            weights[name] = stored[name].read().to(device=device, dtype=dtype, copy=True)
            if not torch.isfinite(weights[name]).all():  # a finite value can be beyond a narrower dtype
                raise CheckpointError(
                    f"{stored[name].file}: tensor '{stored[name].name}': expected values that are finite in "
                    f"{str(dtype).removeprefix('torch.')}, found NaN or infinity"
                )
    if HEAD not in weights or (EMBEDDING in weights and torch.equal(weights[HEAD], weights[EMBEDDING])):
        weights[HEAD] = weights[EMBEDDING]
    weights.setdefault(EMBEDDING, weights[HEAD])
    return weights


def expected_shapes(config: Architecture) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a checkpoint of this config holds; linear weights are [out, in]."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, width: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (out, width)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    encoder = config.encoder
    width = encoder.hidden_size
    shapes["encoder.embeddings.cls_token"] = (1, 1, width)
    if encoder.kind == "deit":
        shapes["encoder.embeddings.distillation_token"] = (1, 1, width)
    shapes["encoder.embeddings.position_embeddings"] = (1, encoder.num_tokens, width)
    patches = "encoder.embeddings.patch_embeddings.projection"
    shapes[f"{patches}.weight"] = (width, encoder.num_channels, *encoder.patch_size)
    shapes[f"{patches}.bias"] = (width,)
    for layer in range(encoder.num_layers):
        prefix = f"encoder.layers.{layer}"
        norm(f"{prefix}.layernorm_before", width)
        for projection in ("q_proj", "k_proj", "v_proj"):
            linear(f"{prefix}.attention.{projection}", width, width, encoder.qkv_bias)
        linear(f"{prefix}.attention.o_proj", width, width)
        norm(f"{prefix}.layernorm_after", width)
        linear(f"{prefix}.mlp.fc1", encoder.intermediate_size, width)
        linear(f"{prefix}.mlp.fc2", width, encoder.intermediate_size)
    norm("encoder.layernorm", width)

    decoder = config.decoder
    width = decoder.d_model
    if config.enc_to_dec_proj:
        linear("enc_to_dec_proj", width, encoder.hidden_size)
    shapes[EMBEDDING] = (decoder.vocab_size, width)
    if decoder.learned_positions:
        # fairseq's habit, kept by TrOCR: the first two rows are never used
        shapes["decoder.model.decoder.embed_positions.weight"] = (decoder.max_position_embeddings + 2, width)
    if decoder.layernorm_embedding:
        norm("decoder.model.decoder.layernorm_embedding", width)
    for layer in range(decoder.num_layers):
        prefix = f"decoder.model.decoder.layers.{layer}"
        for attention, key_width in (("self_attn", width), ("encoder_attn", decoder.cross_width)):
            linear(f"{prefix}.{attention}.q_proj", width, width)
            linear(f"{prefix}.{attention}.k_proj", width, key_width)
            linear(f"{prefix}.{attention}.v_proj", width, key_width)
            linear(f"{prefix}.{attention}.out_proj", width, width)
            norm(f"{prefix}.{attention}_layer_norm", width)
        linear(f"{prefix}.fc1", decoder.ffn_dim, width)
        linear(f"{prefix}.fc2", width, decoder.ffn_dim)
        norm(f"{prefix}.final_layer_norm", width)
    shapes[HEAD] = (decoder.vocab_size, width)
    return shapes


def current_name(name: str) -> str:
    """The name that transformers 5 uses in memory for a tensor's name in any file."""
    for old, new in _RENAMES:
        name = old.sub(new, name)
    return name


def is_unused(name: str) -> bool:
    """Whether a tensor, by its current name, has no part in reading."""
    return _UNUSED.search(name) is not None


def _by_current_name(folder: Path) -> dict[str, StoredTensor]:
    stored: dict[str, StoredTensor] = {}
    for tensor in _stored_tensors(folder):
        name = current_name(tensor.name)
        if is_unused(name):
            continue
        if name in stored:
            raise CheckpointError(
                f"{tensor.file}: tensor '{tensor.name}': expected one tensor for {name}, found also "
                f"'{stored[name].name}' in {stored[name].file.name}"
            )
        stored[name] = tensor
    return stored


def _check(stored: dict[str, StoredTensor], expected: dict[str, tuple[int, ...]], tied: bool, folder: Path) -> None:
    problems = []
    for name, shape in expected.items():
        tensor = stored.get(name)
        if tensor is None:
            other = {HEAD: EMBEDDING, EMBEDDING: HEAD}.get(name)
            if not (tied and other in stored):
                problems.append(f"tensor '{name}': expected shape {list(shape)}, found none")
        elif tensor.shape != shape:
            problems.append(
                f"{tensor.file.name}: tensor '{tensor.name}': expected shape {list(shape)} by config.json, "
                f"found {list(tensor.shape)}"
            )
        elif tensor.dtype not in _FLOATING:
            problems.append(
                f"{tensor.file.name}: tensor '{tensor.name}': expected float64, float32, float16 or bfloat16, "
                f"found {tensor.dtype}"
            )
    for name in stored.keys() - expected.keys():
        tensor = stored[name]
        problems.append(
            f"{tensor.file.name}: tensor '{tensor.name}': expected no such tensor by config.json, "
            f"found shape {list(tensor.shape)}"
        )
    if problems:
        shown = sorted(problems)[:20]
        more = f"\n  and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
        raise CheckpointError(f"{folder}: the weights disagree with config.json:\n  " + "\n  ".join(shown) + more)


def _stored_tensors(folder: Path) -> Iterator[StoredTensor]:
    for file_name in WEIGHT_FILES:
        path = folder / file_name
        if path.exists():
            break
    else:
        raise CheckpointError(f"{folder}: expected a weight file ({', '.join(WEIGHT_FILES)}), found none")
    read_header = _safetensors_header if "safetensors" in path.name else _pickle_header
    files = _shards(path) if path.suffix == ".json" else [path]
    for file in files:
        yield from read_header(file)


def _shards(index: Path) -> list[Path]:
    fields = Fields(read_json(index), str(index))
    shards: dict[str, Path] = {}
    for name in fields.section("weight_map").values.values():
        # A shard lies beside its index; anything else would let a checkpoint point at other files of this machine.
        if not isinstance(name, str) or Path(name).name != name:
            raise fields.error("weight_map", "plain file names", name)
        if name not in shards and not os.path.isfile(index.parent / name):  # unlike Path's, takes any name
            raise fields.error("weight_map", "names of files beside it", name)
        shards[name] = index.parent / name
    return list(shards.values())


def _safetensors_header(path: Path) -> Iterator[StoredTensor]:
    try:
        # The library checks that offsets, shapes and dtypes of the header agree with the file's size.
        file = safe_open(path, framework="pt")
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            stored = file.get_slice(name)

            def read(name: str = name) -> torch.Tensor:
                return file.get_tensor(name)

            yield StoredTensor(path, name, tuple(stored.get_shape()), stored.get_dtype(), read)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: expected a safetensors file, found a damaged one ({error})") from None


def _pickle_header(path: Path) -> Iterator[StoredTensor]:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(record.compress_type for record in archive.infolist()):
                    # PyTorch never writes this, and would map the compressed bytes as if they were the values.
                    raise ValueError("compressed records")
        try:
            # Mapped, so that no more than the header is read before the shapes are checked.
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            tensors = torch.load(path, map_location="cpu", weights_only=True)  # a file from before PyTorch 1.6
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path}: expected a PyTorch file that holds tensors only, found a damaged or unsafe one ({reason})"
        ) from None
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path}: expected tensors by name, found {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{path}: expected tensors by name, found {type(tensor).__name__} at {name!r}")
        if not _is_whole(tensor):
            raise CheckpointError(
                f"{path}: tensor '{name}': expected a dense tensor with each of its values in the file, found another"
            )
        dtype = str(tensor.dtype).removeprefix("torch.")
        yield StoredTensor(path, name, tuple(tensor.shape), dtype, tensor.detach)


def _is_whole(tensor: torch.Tensor) -> bool:
    """Not sparse, nested or without data, nor a view that repeats a few stored values up to any size."""
    dense = tensor.layout is torch.strided and not tensor.is_nested and tensor.device.type == "cpu"
    return dense and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.itemsize
