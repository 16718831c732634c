"""Pixels -> hidden states: the ViT or DeiT encoder."""

from dataclasses import dataclass

import torch
from torch import Tensor

from trocr_fast import ops
from trocr_fast.config import EncoderConfig

# A thread on a CPU, of what pictures that go through the layers together leave between two products: more would fall
# out of its caches (docs/decisions.md).
CACHED_BYTES = 12 << 20


@dataclass(frozen=True)
class _Layer:
    norm_before: tuple[Tensor, Tensor]  # weight, bias: [width]
    qkv: tuple[Tensor, Tensor | None]  # [3 * width, width], [3 * width]
    out: tuple[Tensor, Tensor]  # [width, width], [width]
    norm_after: tuple[Tensor, Tensor]
    fc1: tuple[Tensor, Tensor]  # [intermediate, width], [intermediate]
    fc2: tuple[Tensor, Tensor]  # [width, intermediate], [width]


class Encoder:
    """A pre-LayerNorm vision transformer, as `ViTModel` and `DeiTModel` of transformers compute it.

    Args:
        config: its sizes.
        weights: tensors by their names in the checkpoint (`trocr_fast.weights`), all of one dtype and device.
    """

    def __init__(self, config: EncoderConfig, weights: dict[str, Tensor]) -> None:
        self.config = config

        def pair(name: str) -> tuple[Tensor, Tensor]:
            return weights[f"encoder.{name}.weight"], weights[f"encoder.{name}.bias"]

        def product(name: str) -> tuple[Tensor, Tensor]:
            weight, bias = pair(name)
            return ops.packed(weight), bias.contiguous()

        # The convolution's kernel is as large as its stride, so it is a product of patches with a matrix.
        projection, patch_bias = pair("embeddings.patch_embeddings.projection")
        self.patch_bias = patch_bias.contiguous()
        self.patch_weight = ops.packed(projection.flatten(1))  # [width, channels * height * width of a patch]

        prefix = [weights["encoder.embeddings.cls_token"]]
        if config.kind == "deit":
            prefix.append(weights["encoder.embeddings.distillation_token"])
        self.prefix = torch.cat(prefix, dim=1)  # [1, 1 or 2, width]
        self.positions = weights["encoder.embeddings.position_embeddings"]  # [1, tokens, width]

        self.layers = []
        for index in range(config.num_layers):
            layer = f"layers.{index}"
            names = [f"encoder.{layer}.attention.{x}_proj" for x in "qkv"]
            qkv_weight = torch.cat([weights[f"{name}.weight"] for name in names])
            qkv_bias = torch.cat([weights[f"{name}.bias"] for name in names]) if config.qkv_bias else None
            self.layers.append(
                _Layer(
                    norm_before=pair(f"{layer}.layernorm_before"),
                    qkv=(ops.packed(qkv_weight), qkv_bias),
                    out=product(f"{layer}.attention.o_proj"),
                    norm_after=pair(f"{layer}.layernorm_after"),
                    fc1=product(f"{layer}.mlp.fc1"),
                    fc2=product(f"{layer}.mlp.fc2"),
                )
            )
        self.final_norm = pair("layernorm")

    def check_shape(self, pixels: Tensor) -> None:
        """That pixels are [batch, channels, H, W] of the config's sizes.

        Raises:
            ValueError: they are not.
        """
        expected = (self.config.num_channels, *self.config.image_size)
        if pixels.dim() != 4 or pixels.shape[1:] != expected:
            raise ValueError(
                f"pixel_values: expected shape [batch, {', '.join(map(str, expected))}] (channels, height, width), "
                f"got {list(pixels.shape)}"
            )

    def __call__(self, pixels: Tensor, table: Tensor | None = None) -> Tensor:
        """Encode pictures.

        Args:
            pixels: [batch, channels, H, W] of the config's `image_size`: floating-point and normalised, or uint8.
            table: for uint8 pixels: fp32 [channels, 256], the normalised value of each of the 256 values.

        Returns:
            [batch, num_tokens, hidden_size] in the weights' dtype.

        Raises:
            ValueError: pixels of another shape, or uint8 without a table.
        """
        self.check_shape(pixels)
        at_once = self.most_at_once(len(pixels))
        if len(pixels) <= at_once:
            return self._encode(pixels, table)
        parts = pixels.tensor_split(-(-len(pixels) // at_once))  # as even as can be
        return torch.cat([self._encode(part, table) for part in parts])

    def most_at_once(self, num_pictures: int) -> int:
        """How many of so many pictures go through the layers together: on a GPU all."""
        if self.positions.device.type != "cpu":
            return num_pictures
        width = max(self.config.intermediate_size, 3 * self.config.hidden_size)
        num_bytes = self.positions.shape[1] * width * self.positions.element_size()  # of the widest, one picture's
        return max(1, CACHED_BYTES * torch.get_num_threads() // num_bytes)

    def _encode(self, pixels: Tensor, table: Tensor | None) -> Tensor:
        config = self.config
        if pixels.is_floating_point():
            patches = ops.cut_patches(pixels.to(self.patch_weight.dtype), config.patch_size)
        elif pixels.dtype == torch.uint8 and table is not None:
            patches = ops.pixels_to_patches(pixels, table, config.patch_size, self.patch_weight)
        else:
            raise ValueError(f"pixel_values: expected floating-point, or uint8 and its table, got {pixels.dtype}")
        x = ops.linear(patches, self.patch_weight, self.patch_bias)  # [batch, patches, hidden_size]
        x = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], dim=1)  # [batch, tokens, width]
        x = x + self.positions

        eps = config.layer_norm_eps
        normed = ops.layernorm(x, *self.layers[0].norm_before, eps)
        for index, layer in enumerate(self.layers):
            attended = ops.encoder_attention(ops.linear(normed, *layer.qkv), config.num_heads)
            x, normed = ops.add_layernorm(ops.linear(attended, *layer.out), x, *layer.norm_after, eps)
            hidden = ops.linear(normed, *layer.fc1, activation=config.activation)
            next_norm = self.final_norm if index + 1 == len(self.layers) else self.layers[index + 1].norm_before
            x, normed = ops.add_layernorm(ops.linear(hidden, *layer.fc2), x, *next_norm, eps)
        return normed
