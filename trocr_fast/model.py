"""Encoder, cross memory and decoder of one checkpoint, put together."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trocr_fast import ops
from trocr_fast.config import Architecture, CheckpointConfig
from trocr_fast.cross_memory import CrossMemory, Lines, choose_kind, make_cross_memory
from trocr_fast.decoder import Decoder
from trocr_fast.encoder import Encoder
from trocr_fast.weights import HEAD, load_weights


class Network:
    """What is computed, with its weights.

    Args:
        config: of encoder and decoder.
        weights: tensors by their names in `trocr_fast.weights`, all of one dtype and device.
        cross_memory: "kv", "latent", or "auto" for the kind that measured faster (`trocr_fast.cross_memory`).
    """

    def __init__(self, config: Architecture, weights: dict[str, Tensor], cross_memory: str = "auto") -> None:
        if cross_memory == "auto":
            cross_memory = choose_kind(config.decoder, config.encoder.num_tokens, weights[HEAD].device)
        self.cross_memory = cross_memory
        self.encoder = Encoder(config.encoder, weights)
        self.projection = (
            (weights["enc_to_dec_proj.weight"], weights["enc_to_dec_proj.bias"]) if config.enc_to_dec_proj else None
        )
        self.decoder = Decoder(config.decoder, weights)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are held and the products computed in."""
        return self.decoder.embedding.dtype

    def parameters(self) -> Iterator[Tensor]:
        """All weights as they are held; a tied head comes twice."""
        yield from _tensors(vars(self.encoder))
        yield from _tensors(vars(self.decoder))
        yield from self.projection or ()

    def slots(self, num_slots: int) -> CrossMemory:
        """Empty cross memory for so many pictures."""
        num_keys = self.encoder.config.num_tokens
        return make_cross_memory(self.cross_memory, self.decoder.cross_weights, num_slots, num_keys)

    @torch.inference_mode()
    def states(self, pixels: Tensor, table: Tensor | None = None) -> Tensor:
        """Pixels [batch, channels, H, W], as `Encoder` takes them -> what decoding looks at [batch, tokens, width]."""
        if table is not None:
            table = table.to(self.device)
        states = self.encoder(pixels.to(self.device), table)
        return states if self.projection is None else ops.linear(states, *self.projection)

    @torch.inference_mode()
    def encode(self, pixels: Tensor, table: Tensor | None = None) -> Lines:
        """The cross memory of pictures [batch, channels, H, W] that are decoded together, in their order."""
        memory = self.slots(len(pixels))
        memory.write(torch.arange(len(pixels), device=self.device), self.states(pixels, table))
        return Lines(memory, len(pixels))


class Model(Network):
    """A loaded checkpoint.

    Args:
        config: of the checkpoint.
        weights, cross_memory: as of `Network`.
    """

    def __init__(self, config: CheckpointConfig, weights: dict[str, Tensor], cross_memory: str = "auto") -> None:
        super().__init__(config, weights, cross_memory)
        self.config = config

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype, cross_memory: str = "auto") -> "Model":
        """Read config and weights of a checkpoint folder.

        Raises:
            CheckpointError: see `CheckpointConfig.from_folder` and `load_weights`.
        """
        config = CheckpointConfig.from_folder(folder)
        return cls(config, load_weights(folder, config, dtype, device), cross_memory)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a nest of dictionaries, sequences and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _tensors([getattr(value, field.name) for field in fields(value)])
