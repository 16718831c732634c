"""Encoder, cross memory and decoder of one checkpoint, put together."""

from pathlib import Path

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
        self.num_parameters = sum({tensor.data_ptr(): tensor.numel() for tensor in weights.values()}.values())
        self.encoder = Encoder(config.encoder, weights)
        self.projection = (
            (ops.packed(weights["enc_to_dec_proj.weight"]), weights["enc_to_dec_proj.bias"].contiguous())
            if config.enc_to_dec_proj
            else None
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

    def slots(self, num_slots: int) -> CrossMemory:
        """Empty cross memory for so many pictures."""
        num_keys = self.encoder.config.num_tokens
        return make_cross_memory(self.cross_memory, self.decoder.cross_weights, num_slots, num_keys)

    @torch.inference_mode()
    def states(self, pixels: Tensor, table: Tensor | None = None) -> Tensor:
        """Pixels [batch, channels, H, W], as `Encoder` takes them -> what decoding looks at [batch, tokens, width]."""
        if table is not None:
            table = table.to(self.device)
        return self.project(self.encoder(pixels.to(self.device), table))

    def project(self, encoded: Tensor) -> Tensor:
        """The encoder's output [batch, tokens, encoder width] -> what decoding looks at [batch, tokens, width]."""
        return encoded if self.projection is None else ops.linear(encoded, *self.projection)

    @torch.inference_mode()
    def encode(self, pixels: Tensor, table: Tensor | None = None) -> Lines:
        """The cross memory of pictures [batch, channels, H, W] that are decoded together, in their order."""
        return self.lines(self.states(pixels, table))

    @torch.inference_mode()
    def lines(self, states: Tensor) -> Lines:
        """The cross memory of `states`, with any number of tokens."""
        num_lines, num_keys, _ = states.shape
        memory = make_cross_memory(self.cross_memory, self.decoder.cross_weights, num_lines, num_keys)
        memory.write(torch.arange(num_lines, device=self.device), states)
        return Lines(memory, num_lines)


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
