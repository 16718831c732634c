"""What is installed, what a checkpoint is, and what will run where."""

import platform
from collections.abc import Iterator

import torch

from trocr_fast import __version__, _csrc, ops
from trocr_fast.trocr import TrOCR


def describe(ocr: TrOCR) -> Iterator[tuple[str, str]]:
    """Name and value of everything worth knowing before a run."""
    yield "trocr_fast", __version__
    yield "python", platform.python_version()
    yield "torch", torch.__version__
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    yield "CUDA devices", ", ".join(names) or "none"
    yield "built for", {"cpu": "CPU only", "cuda": "CPU and CUDA"}[_csrc.BUILD]
    yield "CPU threads", str(torch.get_num_threads())

    model, config = ocr.model, ocr.model.config
    encoder, decoder = config.encoder, config.decoder
    yield "checkpoint", str(ocr.folder)
    yield "family", config.family
    yield (
        "encoder",
        f"{encoder.num_layers} layers, width {encoder.hidden_size}, {encoder.num_heads} heads, pictures "
        f"{encoder.image_size[0]}x{encoder.image_size[1]} (height x width) in patches "
        f"{encoder.patch_size[0]}x{encoder.patch_size[1]}, {encoder.num_tokens} tokens",
    )
    yield (
        "decoder",
        f"{decoder.num_layers} layers, width {decoder.d_model}, {decoder.num_heads} heads, "
        f"vocabulary {decoder.vocab_size}, at most {decoder.max_position_embeddings} positions",
    )
    yield "parameters", f"{model.num_parameters / 1e6:.2f} M"
    yield "runs on", f"{model.device}, {str(model.dtype).removeprefix('torch.')}"
    chosen = {name: ops.backend(name, model.device, model.dtype) for name in ops.OPERATIONS}
    for backend in ops.BACKENDS:
        names = [name for name, choice in chosen.items() if choice == backend]
        if names:
            yield f"computed by {backend}", ", ".join(names) if len(names) < len(chosen) else "everything"
    yield "cross memory", f"{model.cross_memory}, {model.slots(1).num_bytes / 1e6:.3g} MB a line"
    per_token = 2 * decoder.num_layers * decoder.d_model * model.decoder.embedding.element_size()
    yield "self-attention cache", f"{per_token / 1e3:.3g} kB a token"
    generation = config.generation
    yield "reads until", f"the end token {list(generation.eos_token_ids)}, or {config.read_max_length} tokens"
    if generation.other:
        yield "not followed by read", f"{dict(generation.other)}"
