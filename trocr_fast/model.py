"""Encoder, cross memory and decoder of one checkpoint, put together: pixels -> token ids."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trocr_fast import ops
from trocr_fast.config import CheckpointConfig
from trocr_fast.cross_memory import CrossMemory, choose_kind, make_cross_memory
from trocr_fast.decoder import Decoder, DecodeState
from trocr_fast.encoder import Encoder
from trocr_fast.search import Hypothesis, greedy_search
from trocr_fast.weights import load_weights


class Model:
    """A loaded checkpoint.

    Args:
        config: of the checkpoint.
        weights: by `trocr_fast.weights.load_weights`, all of one dtype and device.
        cross_memory: "kv" or "latent" (`trocr_fast.cross_memory`).
    """

    def __init__(self, config: CheckpointConfig, weights: dict[str, Tensor], cross_memory: str) -> None:
        self.config = config
        self.cross_memory = cross_memory
        self.encoder = Encoder(config.encoder, weights)
        self.projection = (
            (weights["enc_to_dec_proj.weight"], weights["enc_to_dec_proj.bias"]) if config.enc_to_dec_proj else None
        )
        self.decoder = Decoder(config.decoder, weights)

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype, cross_memory: str = "auto") -> "Model":
        """Read config and weights of a checkpoint folder; `cross_memory` "auto" takes the kind that measured faster.

        Raises:
            CheckpointError: see `CheckpointConfig.from_folder` and `load_weights`.
        """
        config = CheckpointConfig.from_folder(folder)
        if cross_memory == "auto":
            cross_memory = choose_kind(config.decoder, config.encoder.num_tokens, device)
        return cls(config, load_weights(folder, config, dtype, device), cross_memory)

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

    @torch.inference_mode()
    def encode(self, pixels: Tensor, table: Tensor | None = None) -> CrossMemory:
        """Pixels [batch, channels, H, W], as `Encoder` takes them, -> cross memory of as many rows."""
        if table is not None:
            table = table.to(self.device)
        states = self.encoder(pixels.to(self.device), table)  # [batch, tokens, hidden_size]
        if self.projection is not None:
            states = ops.linear(states, *self.projection)  # [batch, tokens, d_model]
        return make_cross_memory(self.cross_memory, states, self.decoder.cross_weights)

    @torch.inference_mode()
    def greedy(
        self, pixels: Tensor, max_length: int, use_cache: bool | None = None, table: Tensor | None = None
    ) -> list[Hypothesis]:
        """Decode pictures greedily.

        Args:
            pixels: [batch, channels, H, W], floating-point and normalised, or uint8 with `table`.
            max_length: total length at which a row is cut, the start token counted.
            use_cache: which of transformers' two position rules a sinusoidal decoder follows; by default the
                checkpoint's. It never changes how much is computed.
            table: fp32 [channels, 256], the normalised value of each of the 256 values of a pixel.

        Returns:
            One hypothesis a picture.
        """
        generation = self.config.generation
        positions = self.decoder.positions(generation.use_cache if use_cache is None else use_cache)

        def step(tokens: Tensor, state: DecodeState, memory: CrossMemory) -> tuple[Tensor, Tensor]:
            return self.decoder.greedy_token(self.decoder.step(tokens, state, memory, positions))

        if len(pixels) == 0:
            return []
        return greedy_search(
            step,
            self.decoder.start(len(pixels), max_length),
            self.encode(pixels, table),
            len(pixels),
            generation.decoder_start_token_id,
            generation.eos_token_ids,
            max_length,
            self.device,
        )


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
