"""Reference models of transformers with random weights, small enough to try many and lively enough to mean something.

The variance of the weights is large: with transformers' own 0.02 every picture would give the same tokens and a test of
equality would hold for a decoder that never looks at the picture.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DeiTConfig,
    TrOCRConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

from trocr_fast.engine import decode_batch
from trocr_fast.model import Model
from trocr_fast.search import Hypothesis, SearchSettings
from trocr_fast.verify import repair_sinusoidal_positions

MAX_LENGTH = 41
NUM_PICTURES = 40
VOCAB_SIZE = 14  # small, so that the end token comes up often
FAMILIES: dict[str, dict[str, Any]] = {
    "A": {"activation_function": "gelu"},
    "B": {
        "activation_function": "relu",
        "use_learned_position_embeddings": False,
        "layernorm_embedding": False,
        "scale_embedding": True,
        "tie_word_embeddings": False,
    },
    "C": {"activation_function": "relu", "scale_embedding": True, "tie_word_embeddings": False},
}


@dataclass(frozen=True)
class Case:
    """One architecture; what is not named is the family's."""

    family: str = "A"
    encoder: str = "vit"
    image_size: Any = 16  # int or [height, width]
    patch_size: Any = 4
    encoder_width: int = 24
    encoder_heads: int = 3
    encoder_activation: str = "gelu"
    qkv_bias: bool = False
    width: int = 32
    heads: int = 4
    bridge: str = "direct"  # "direct": cross-attention takes the encoder's width; "proj": enc_to_dec_proj
    decoder: dict[str, Any] = field(default_factory=dict)  # TrOCRConfig fields over the family's
    start: int = 2
    pad: int = 1
    eos: Any = None  # None: whichever token makes the outputs lively
    use_cache: bool = True

    def __str__(self) -> str:
        default = Case()
        parts = [f"{n}={v}" for n, v in vars(self).items() if v != getattr(default, n) or n == "family"]
        return ",".join(parts).replace("'", "").replace(" ", "")


def build(case: Case, seed: int) -> VisionEncoderDecoderModel:
    """A reference in fp32, ready to generate."""
    torch.manual_seed(seed)
    encoder_class = {"vit": ViTConfig, "deit": DeiTConfig}[case.encoder]
    encoder = encoder_class(
        hidden_size=case.encoder_width,
        num_hidden_layers=2,
        num_attention_heads=case.encoder_heads,
        intermediate_size=40,
        hidden_act=case.encoder_activation,
        image_size=case.image_size,
        patch_size=case.patch_size,
        qkv_bias=case.qkv_bias,
        initializer_range=0.5,
    )
    fields = {
        "vocab_size": VOCAB_SIZE,
        "d_model": case.width,
        "decoder_layers": 2,
        "decoder_attention_heads": case.heads,
        "decoder_ffn_dim": 56,
        "max_position_embeddings": 64,
        "init_std": 0.25,
        "cross_attention_hidden_size": None if case.bridge == "proj" else case.encoder_width,
        "decoder_start_token_id": case.start,
        "pad_token_id": case.pad,
        "use_cache": case.use_cache,
        "is_decoder": True,
        **FAMILIES[case.family],
        **case.decoder,
    }
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, TrOCRConfig(**fields))
    return finish(VisionEncoderDecoderModel(config), case.start, case.pad, case.use_cache)


def finish(model: VisionEncoderDecoderModel, start: int, pad: int, use_cache: bool) -> VisionEncoderDecoderModel:
    """Give biases and norms, which start at 0 and 1, values that can be got wrong; set generation defaults."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or ("token" in name and "embed_tokens" not in name):
                parameter.normal_(0, 0.2)
            elif parameter.dim() == 1:
                parameter.normal_(1, 0.2)
            elif "position_embeddings" in name or "embed_positions" in name:
                parameter.normal_(0, 0.8)
    generation = model.generation_config
    generation.decoder_start_token_id, generation.pad_token_id = start, pad
    generation.eos_token_id = None
    generation.use_cache = use_cache
    repair_sinusoidal_positions(model)
    return model.eval()


def save(model: VisionEncoderDecoderModel, folder: Path) -> Path:
    """As a user would have it: the checkpoint folder that transformers writes."""
    model.save_pretrained(folder)
    return folder


def pictures(model: VisionEncoderDecoderModel, num_pictures: int, seed: int) -> Tensor:
    """Normalised noise, fp32 [num_pictures, 3, H, W]."""
    size = model.config.encoder.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.randn(num_pictures, 3, height, width, generator=torch.Generator().manual_seed(seed))


def cut(row: list[int], eos: Any) -> list[int]:
    """A generated row without what fills it up after its end token."""
    ends = eos if isinstance(eos, list) else [eos]
    for index, token in enumerate(row[1:], start=1):
        if token in ends:
            return row[: index + 1]
    return row


def greedy(model: Model, pixels: Tensor, max_length: int) -> list[Hypothesis]:
    """What this project's greedy search finds on pictures that are decoded together."""
    return decode_batch(model, pixels, SearchSettings.greedy(model.config.generation, max_length))


def is_lively(rows: list[list[int]], eos: Any) -> bool:
    """At least half of the rows distinct, at least 8 lengths, at least a fifth ended by the end token."""
    ends = eos if isinstance(eos, list) else [eos]
    distinct = len({tuple(row) for row in rows})
    lengths = len({len(row) for row in rows})
    ended = sum(row[-1] in ends and len(row) > 1 for row in rows)
    return 2 * distinct >= len(rows) and lengths >= 8 and 5 * ended >= len(rows)


def lively_reference(case: Case) -> tuple[VisionEncoderDecoderModel, Tensor, Any]:
    """The first seed, and end token if the case leaves it open, whose reference output is worth comparing with."""
    for seed in range(60):
        model = build(case, seed)
        pixels = pictures(model, NUM_PICTURES, seed)
        endless = model.generate(pixels, max_length=MAX_LENGTH).tolist()
        for eos in [token for token in range(VOCAB_SIZE) if token != case.pad] if case.eos is None else [case.eos]:
            if is_lively([cut(row, eos) for row in endless], eos):
                model.generation_config.eos_token_id = eos
                return model, pixels, eos
    raise AssertionError(f"{case}: no seed gives varied outputs")
