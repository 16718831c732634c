"""Which implementation computes an operation, and how that is chosen."""

import os
import subprocess
import sys

import pytest
import torch

from trocr_fast import ops, torch_ops, triton_ops
from trocr_fast.errors import UsageError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_both_implementations_have_every_operation() -> None:
    for name in ops.OPERATIONS:
        assert callable(getattr(torch_ops, name)) and callable(getattr(triton_ops, name)), name


def test_pytorch_on_a_cpu_and_triton_on_a_gpu() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert {ops.backend(name, CPU, dtype) for name in ops.OPERATIONS} == {"torch"}
        on_gpu = {name: ops.backend(name, CUDA, dtype) for name in ops.OPERATIONS}
        assert {name for name, backend in on_gpu.items() if backend == "torch"} == ops.LEFT_TO_PYTORCH[dtype]
    assert ops.backend("paged_attention", CUDA, torch.float64) == "torch"  # of which the kernels know nothing


def test_choosing_otherwise() -> None:
    with ops.use("add_layernorm=triton"):
        assert ops.backend("add_layernorm", CPU, torch.float32) == "triton"
        assert ops.backend("linear", CPU, torch.float32) == "torch"
        with ops.use("all=triton, linear=torch"):
            found = {name: ops.backend(name, CPU, torch.float32) for name in ops.OPERATIONS}
            assert found.pop("linear") == "torch" and set(found.values()) == {"triton"}
        assert ops.backend("greedy_token", CPU, torch.float32) == "torch"
    with ops.use("all=torch"):
        assert ops.backend("encoder_attention", CUDA, torch.bfloat16) == "torch"
    assert ops.backend("add_layernorm", CPU, torch.float32) == "torch"


def test_linear_layers_of_few_rows_are_an_operation_of_their_own() -> None:
    x, weight = torch.randn(2, 3, 8), torch.randn(5, 8)  # 6 rows
    expected = torch_ops.linear(x, weight, None, None)
    for text in ("skinny_linear=triton", "linear=triton"):
        with ops.use(text):
            out = ops.linear(x, weight)
            assert out.shape == (2, 3, 5)
            torch.testing.assert_close(out, expected)
            many = ops.linear(x.repeat(7, 1, 1), weight, activation="relu")  # 42
            torch.testing.assert_close(many, expected.relu().repeat(7, 1, 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attention=torch", "operation: expected one of pixels_to_patches, .* or all, got 'attention'"),
        ("linear=cuda", "linear: expected one of torch, triton, got 'cuda'"),
        ("linear", "linear: expected one of torch, triton, got ''"),
    ],
)
def test_what_does_not_exist_is_named(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message), ops.use(text):
        pass


def test_the_environment_chooses_for_a_whole_process() -> None:
    program = (
        "import torch; from trocr_fast import ops; cpu = torch.device('cpu');"
        "print(ops.backend('linear', cpu, torch.float32), ops.backend('greedy_token', cpu, torch.float32))"
    )
    environment = {**os.environ, "TROCR_FAST_OPS": "linear=triton"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["triton", "torch"]
