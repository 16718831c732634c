"""What all launchers share."""

import re
from collections.abc import Callable

import pytest
import torch
import triton

from tests.kernels.compare import DEVICE
from trocr_fast.kernels import add_layernorm, linear_persistent
from trocr_fast.kernels.launch import Launch, output, require, run


class Kernel:
    """Takes launches and notes their grids and stages."""

    def __init__(self) -> None:
        self.seen: list[tuple] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda **options: self.seen.append((grid, options["num_stages"]))


def test_run_is_in_order_and_returns_the_last_arguments() -> None:
    kernel = Kernel()
    arguments = {"x_ptr": torch.empty(1, device=DEVICE)}
    # an empty grid is no launch
    launches = [Launch(kernel, (number,), dict(arguments), num_stages=4) for number in (3, 0, 2)]
    assert run(launches) is launches[2].arguments
    assert kernel.seen == [((3,), 4), ((2,), 4)]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_where_its_tensors_are() -> None:
    arguments = add_layernorm.inputs((3, 64), torch.float32, "cuda:1")
    ours = add_layernorm.add_layernorm(*arguments)
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(ours, add_layernorm.reference(*arguments))


def test_a_launch_brings_the_memory_of_its_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    allocators: list[Callable[..., torch.Tensor]] = []
    monkeypatch.setattr(triton, "set_allocator", allocators.append)
    (launch,) = linear_persistent.launches(*linear_persistent.inputs((3, 8, 8, None), torch.float32, DEVICE))
    assert not allocators
    launch.run()
    assert allocators[0](384, 128, None).nbytes == 384


@pytest.mark.parametrize("tensor", [torch.empty(4, 16)[:0, :8], torch.empty(5, 3).T[:, :0]], ids=["rows", "columns"])
def test_empty_memory_is_contiguous(tensor: torch.Tensor) -> None:
    require("x", tensor, (None, None))


def test_what_is_expected_and_what_came() -> None:
    x = torch.empty(2, 3, 4)
    for arguments, message in (
        ({"shape": (2, None)}, "x: expected shape [2, any], got [2, 3, 4]"),
        ({"shape": (2, 3, 5)}, "x: expected shape [2, 3, 5], got [2, 3, 4]"),
        ({"shape": x.shape, "dtype": (torch.half, torch.bfloat16)}, "x: expected float16 or bfloat16, got float32"),
        ({"shape": x.shape, "like": x.half()}, "x: expected float16, got float32"),
        ({"shape": x.shape, "like": x.to("meta")}, "x: expected on meta, got on cpu"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            require("x", x, **arguments)
    with pytest.raises(ValueError, match=r"^x: expected contiguous memory, got strides \[12, 1, 4\]$"):
        require("x", x.transpose(1, 2), (2, 4, 3))
    require("x", x[:, :2], (2, 2, 4), contiguous_from=1)
    with pytest.raises(ValueError, match=r"^x: expected contiguous memory from dimension 1 on"):
        require("x", x[:, :, :2], (2, 3, 2), contiguous_from=1)


def test_output_is_the_one_given_or_a_new_one() -> None:
    like = torch.empty(2, dtype=torch.half)
    assert output("out", like, (2,), like) is like
    made = output("out", None, (3, 4), like, torch.int64)
    assert made.shape == (3, 4) and made.dtype == torch.int64
    with pytest.raises(ValueError, match=r"^out: expected int64, got float16"):
        output("out", like, (2,), like, torch.int64)
