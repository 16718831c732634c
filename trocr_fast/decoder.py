"""One token for every row: the TrOCR decoder and its positions."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trocr_fast import ops
from trocr_fast.config import DecoderConfig
from trocr_fast.cross_memory import CrossWeights, Lines
from trocr_fast.paged_cache import PagedStep
from trocr_fast.weights import EMBEDDING, HEAD

LAYER_NORM_EPS = 1e-5  # not configurable in TrOCR


@dataclass(frozen=True)
class _Layer:
    qkv: tuple[Tensor, Tensor]  # [3 * width, width], [3 * width]
    self_out: tuple[Tensor, Tensor]  # [width, width], [width]
    self_norm: tuple[Tensor, Tensor]  # weight, bias: [width]
    cross_q: tuple[Tensor, Tensor]
    cross_out: tuple[Tensor, Tensor]
    cross_norm: tuple[Tensor, Tensor]
    fc1: tuple[Tensor, Tensor]  # [ffn, width], [ffn]
    fc2: tuple[Tensor, Tensor]  # [width, ffn], [width]
    final_norm: tuple[Tensor, Tensor]


class Positions(Protocol):
    """What is added to a token's embedding for its place in its row."""

    limit: int | None  # tokens of a row that can be fed

    def __call__(self, tokens: Tensor, step: PagedStep) -> Tensor:
        """Of tokens, int64 [rows], fed at a step of these rows: [rows, width]."""
        ...


def check_length(longest: int, positions: Positions) -> None:
    """Raise ValueError if the longest row of a step, the new token counted, is longer than the position table."""
    if positions.limit is not None and longest > positions.limit:
        raise ValueError(
            f"expected rows of at most {positions.limit} tokens (decoder.max_position_embeddings), "
            f"got one token more; pass a smaller max_new_tokens or max_length"
        )


class LearnedPositions:
    """A table indexed by a token's place in its row; the first token takes row 2 (fairseq's habit)."""

    def __init__(self, table: Tensor) -> None:
        self._table = table  # [max_position_embeddings + 2, width]
        self.limit: int | None = table.shape[0] - 2

    def __call__(self, tokens: Tensor, step: PagedStep) -> Tensor:
        return self._table[step.context_lens + 1]


class SinusoidalPositions:
    """Fixed sines and cosines; a pad token has the zero vector (fairseq's `SinusoidalPositionalEmbedding`).

    transformers counts differently with and without its cache: without it, only the tokens that are no pad token count
    towards a position; with it, all earlier tokens do. The two differ once a pad token was fed.
    """

    def __init__(self, config: DecoderConfig, dtype: torch.dtype, device: torch.device, count_pads: bool) -> None:
        if config.pad_token_id is None:
            raise ValueError("pad_token_id: sinusoidal positions need one, got None")
        self._pad = config.pad_token_id
        self._width = config.d_model
        self._dtype, self._device = dtype, device
        self._count_pads = count_pads
        # Without its cache, transformers makes the table longer when a row outgrows it; with it, it cannot.
        self.limit = config.max_position_embeddings if count_pads else None
        self._table = self._rows(64)

    def _rows(self, num_rows: int) -> Tensor:
        half = self._width // 2
        frequencies = torch.exp(torch.arange(half).float() * -(math.log(10000) / (half - 1)))
        angles = torch.arange(num_rows).float().unsqueeze(1) * frequencies  # [rows, half]
        table = torch.cat([angles.sin(), angles.cos()], dim=1)
        if self._width % 2:
            table = torch.cat([table, torch.zeros(num_rows, 1)], dim=1)
        if self._pad < num_rows:
            table[self._pad] = 0
        return table.to(self._dtype).to(self._device)

    def __call__(self, tokens: Tensor, step: PagedStep) -> Tensor:
        while self._table.shape[0] < step.longest + self._pad + 1:
            self._table = self._rows(2 * self._table.shape[0])
        is_token = tokens != self._pad
        position = step.context_lens if self._count_pads else step.num_counted
        return self._table[position * is_token + self._pad]


class Decoder:
    """A post-LayerNorm decoder, as `TrOCRForCausalLM` of transformers computes it, one token a row and call.

    Args:
        config: its sizes and flags.
        weights: tensors by their names in the checkpoint (`trocr_fast.weights`), all of one dtype and device.
    """

    def __init__(self, config: DecoderConfig, weights: dict[str, Tensor]) -> None:
        self.config = config
        self.embedding = weights[EMBEDDING]  # [vocab_size, width]
        self.head = ops.packed(weights[HEAD], few_rows=True)  # [vocab_size, width]
        self.embed_scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
        self.q_scale = config.head_dim**-0.5
        root = "decoder.model.decoder"

        def pair(name: str) -> tuple[Tensor, Tensor]:
            return weights[f"{root}.{name}.weight"], weights[f"{root}.{name}.bias"]

        def product(name: str, activated: bool = False) -> tuple[Tensor, Tensor]:
            weight, bias = pair(name)
            return ops.packed(weight, few_rows=not activated), bias.contiguous()

        self._learned = weights[f"{root}.embed_positions.weight"] if config.learned_positions else None
        self._embedding_norm = pair("layernorm_embedding") if config.layernorm_embedding else None

        self.layers = []
        for index in range(config.num_layers):
            layer = f"layers.{index}"
            q, k, v = (pair(f"{layer}.self_attn.{x}_proj") for x in "qkv")
            self.layers.append(
                _Layer(
                    qkv=(ops.packed(torch.cat([q[0], k[0], v[0]]), few_rows=True), torch.cat([q[1], k[1], v[1]])),
                    self_out=product(f"{layer}.self_attn.out_proj"),
                    self_norm=pair(f"{layer}.self_attn_layer_norm"),
                    cross_q=product(f"{layer}.encoder_attn.q_proj"),
                    cross_out=product(f"{layer}.encoder_attn.out_proj"),
                    cross_norm=pair(f"{layer}.encoder_attn_layer_norm"),
                    fc1=product(f"{layer}.fc1", activated=True),  # packed, it saves a call more: the activation's
                    fc2=product(f"{layer}.fc2"),
                    final_norm=pair(f"{layer}.final_layer_norm"),
                )
            )

        cross = [pair(f"layers.{i}.encoder_attn.{x}_proj") for i in range(config.num_layers) for x in "kv"]
        weight, bias = (torch.stack(tensors).unflatten(0, (-1, 2)) for tensors in zip(*cross, strict=True))
        self.cross_weights = CrossWeights(weight, bias, config.num_heads)

    def positions(self, count_pads: bool) -> Positions:
        """The position rule; `count_pads` is what transformers does with its cache, and matters to sinusoids only."""
        if self._learned is not None:
            return LearnedPositions(self._learned)
        return SinusoidalPositions(self.config, self.embedding.dtype, self.embedding.device, count_pads)

    def step(self, tokens: Tensor, step: PagedStep, lines: Lines, positions: Positions) -> Tensor:
        """Feed one token a row.

        Args:
            tokens: int64 [rows].
            step: of these rows; its cache grows by their keys and values, `num_counted` by those that are no pad token.
            lines: of these rows.
            positions: as given by `positions`; no row is longer than their limit (`check_length`).

        Returns:
            [rows, width], from which `logits` or `greedy_token` come.
        """
        config = self.config
        by_head = (tokens.shape[0], config.num_heads, config.head_dim)
        is_counted = step.context_lens > 0
        if config.pad_token_id is not None:
            is_counted &= tokens != config.pad_token_id
        step.num_counted.add_(is_counted)

        x = self.embedding[tokens] * self.embed_scale  # [rows, width]
        x = x + positions(tokens, step)
        if self._embedding_norm is not None:
            x = ops.layernorm(x, *self._embedding_norm, LAYER_NORM_EPS)

        for index, layer in enumerate(self.layers):
            q, k, v = ops.linear(x, *layer.qkv).chunk(3, dim=-1)
            q = (q * self.q_scale).view(by_head)
            attended = ops.paged_attention(q, k.view(by_head), v.view(by_head), index, step)
            _, x = ops.add_layernorm(ops.linear(attended, *layer.self_out), x, *layer.self_norm, LAYER_NORM_EPS)

            q = ops.linear(x, *layer.cross_q) * self.q_scale
            attended = lines.attend(index, q.view(by_head))
            _, x = ops.add_layernorm(ops.linear(attended, *layer.cross_out), x, *layer.cross_norm, LAYER_NORM_EPS)

            hidden = ops.linear(x, *layer.fc1, activation=config.activation)
            _, x = ops.add_layernorm(ops.linear(hidden, *layer.fc2), x, *layer.final_norm, LAYER_NORM_EPS)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """[rows, vocab_size] of the next token; x [rows, width] from `step`."""
        return ops.linear(x, self.head)

    def greedy_token(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The best next token, int64 [rows], and its log-probability, fp32 [rows]; x [rows, width] from `step`."""
        return ops.greedy_token(x, self.head)
