"""What the tests of all kernels share: where they run, over what, and how close to its reference a kernel must be."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from trocr_fast.kernels.launch import DTYPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def over(small: Sequence[Any], real: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrises a test by `shape` and `dtype`: the small shapes in fp32 and fp16, and on a GPU everything.

    The interpreter is too slow for real shapes, and gets the arithmetic of bf16 wrong.
    """
    return pytest.mark.parametrize(
        ("shape", "dtype"),
        [
            *(pytest.param(shape, dtype, id=f"{shape}-{dtype}") for shape in small for dtype in DTYPES[:2]),
            *(
                pytest.param(shape, dtype, id=f"gpu-{shape}-{dtype}", marks=pytest.mark.gpu)
                for shape in [*small, *real]
                for dtype in DTYPES
            ),
        ],
    )


def assert_refused(
    launcher: Callable[..., Any], arguments: Sequence[Any], index: int, change: Callable[[Any], Any], name: str
) -> None:
    """With this argument changed the launcher raises, and says so of `name`."""
    wrong = [change(value) if place == index else value for place, value in enumerate(arguments)]
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        launcher(*wrong)


def double(value: Any) -> Any:
    """Floating-point tensors in fp64, everything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def assert_close(ours: Sequence[Tensor], reference: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Each output within twice the error that the reference makes with the same arguments in their own dtype.

    The truth is the reference in fp64. An output that was never written is NaN and fails.
    """
    truth, theirs = (as_tuple(reference(*values)) for values in (map(double, arguments), arguments))
    assert len(ours) == len(truth)
    for index, (got, expected, same) in enumerate(zip(ours, truth, theirs, strict=True)):
        assert got.shape == expected.shape, f"output {index}: expected {expected.shape}, got {got.shape}"
        if not got.is_floating_point():
            assert torch.equal(got, expected.to(got.dtype)), f"output {index} differs"
            continue
        difference = (got.double() - expected).abs()
        worst = int(difference.nan_to_num(torch.inf).argmax()) if got.numel() else 0
        error = difference.flatten()[worst].item() if got.numel() else 0.0
        size = expected.abs().max().item() if got.numel() else 0.0
        allowed = 2 * (same.double() - expected).abs().max().item() + 1e-6 * max(size, 1.0) if got.numel() else 0.0
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), got.shape)) if got.numel() else ()
        assert error <= allowed, (
            f"output {index} at {place}: error {error:.3g}, allowed {allowed:.3g} ({error / allowed:.1f} times)"
        )


def as_tuple(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def poisoned(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Outputs like these, full of NaN (or, for integers, of the least value)."""
    return tuple(torch.full_like(t, torch.nan if t.is_floating_point() else torch.iinfo(t.dtype).min) for t in tensors)
