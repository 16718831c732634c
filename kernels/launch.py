"""What all launchers share: arguments checked by name, and a launch as a value.

`launches` of a kernel checks its arguments, allocates its outputs and makes `Launch`es; the launcher runs these and
returns the outputs. Running needs a GPU (or the interpreter); looking at a launch needs neither, so that
`bench/compile.py` can compile a kernel for the very arguments that a model gives it, from tensors of the device "meta"
that hold nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # that every kernel takes


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: a function under `triton.jit`.
        grid: programs along x, y and z.
        arguments: by the kernel's parameter names: tensors, numbers, or None.
        constants: its `tl.constexpr` parameters.
        num_warps, num_stages: Triton's launch options.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3

    def run(self) -> None:
        """Enqueue it on the current stream of its tensors' device; an empty grid is no launch."""
        if not all(self.grid):
            return
        # Triton launches on the current device, wherever the tensors are
        with torch.cuda.device_of(next(value for value in self.arguments.values() if isinstance(value, Tensor))):
            self.kernel[self.grid](
                **self.arguments, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages
            )


def run(launches: Sequence[Launch]) -> dict[str, Any]:
    """Enqueue them in order; returns the arguments of the last one, among which the outputs are."""
    for launch in launches:
        launch.run()
    return launches[-1].arguments


@dataclass(frozen=True)
class Work:
    """What a launch cannot do without: the bytes it must move through memory and its floating-point operations."""

    num_bytes: int
    flops: int


class Random:
    """Draws arguments for tests and benchmarks; on the device "meta" they hold nothing."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, shape: Sequence[int], mean: float = 0.0, scale: float = 1.0) -> Tensor:
        """Normally distributed values of this shape."""
        if self.device == "meta":
            return torch.empty(tuple(shape), dtype=self.dtype, device="meta")
        # drawn on the CPU: the same values for every device
        values = torch.randn(tuple(shape), generator=self.generator) * scale + mean
        return values.to(self.device, self.dtype)


def require(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | None],
    like: Tensor | None = None,
    dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    contiguous_from: int | None = 0,
) -> None:
    """Check one argument of a launcher.

    Args:
        shape: None stands for any size.
        like: a tensor whose dtype (unless `dtype` is given) and device it must have.
        dtype: the dtype, or those that are allowed.
        contiguous_from: the dimension from which on the memory must be contiguous; None for any strides.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    fits = tensor.dim() == len(shape) and all(
        want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(tensor.shape)}")
    if dtype is None and like is not None:
        dtype = like.dtype
    allowed = (dtype,) if isinstance(dtype, torch.dtype) else dtype
    if allowed is not None and tensor.dtype not in allowed:
        wanted = " or ".join(str(one).removeprefix("torch.") for one in allowed)
        raise ValueError(f"{name}: expected {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name}: expected on {like.device}, got on {tensor.device}")
    if contiguous_from is None or tensor.numel() == 0:
        return
    expected = 1
    for dim in range(tensor.dim() - 1, contiguous_from - 1, -1):
        if tensor.shape[dim] != 1 and tensor.stride(dim) != expected:
            where = "" if contiguous_from == 0 else f" from dimension {contiguous_from} on"
            raise ValueError(f"{name}: expected contiguous memory{where}, got strides {list(tensor.stride())}")
        expected *= tensor.shape[dim]


def output(
    name: str, given: Tensor | None, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """The tensor that a launcher writes: `given`, checked, or a new one.

    Raises:
        ValueError: as `require`.
    """
    if given is None:
        return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device)
    require(name, given, shape, like, dtype or like.dtype)
    return given


def power_of_two(size: int) -> int:
    """The next power of two, which Triton's ranges must have."""
    return triton.next_power_of_2(size)
