"""Which implementation computes an operation, and how that is chosen."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from trocr_fast import _csrc, cpp_ops, ops, torch_ops, triton_ops
from trocr_fast.errors import UsageError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_implementations_have_what_is_said_of_them() -> None:
    modules = {"torch": torch_ops, "cpp": cpp_ops, "triton": triton_ops}
    for backend, operations in ops.BACKENDS.items():
        for name in operations:
            assert callable(getattr(modules[backend], name)), (backend, name)


def test_who_computes_what_on_a_cpu_and_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(device: torch.device, dtype: torch.dtype, backend: str) -> set[str]:
        return {name for name in ops.OPERATIONS if ops.backend(name, device, dtype) == backend}

    attention = {"encoder_attention", "paged_attention", "latent_cross_attention"}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        in_cpp = chosen(CPU, dtype, "cpp")
        assert chosen(CPU, dtype, "torch") == set(ops.OPERATIONS) - in_cpp
        assert chosen(CUDA, dtype, "torch") == ops.LEFT_TO_PYTORCH[dtype]
        assert chosen(CUDA, dtype, "triton") == set(ops.OPERATIONS) - ops.LEFT_TO_PYTORCH[dtype]
        for lanes in (4, 8, 16):
            monkeypatch.setattr(_csrc, "LANES", lanes)
            in_fp32 = attention if lanes > 4 else {"paged_attention"}
            assert chosen(CPU, dtype, "cpp") == (in_fp32 if dtype == torch.float32 else set())
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
        assert ops.backend("encoder_attention", CPU, torch.float32) == "torch"
        with ops.use("all=cpp"):
            assert ops.backend("encoder_attention", CPU, torch.bfloat16) == "cpp"
            assert ops.backend("linear", CPU, torch.float32) == "torch"
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
        ("linear=cpp", "linear: expected one of torch, triton, got 'cpp'"),
        ("paged_attention=mkl", "paged_attention: expected one of torch, cpp, triton, got 'mkl'"),
        ("all=fast", "all: expected one of torch, cpp, triton, got 'fast'"),
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


def test_attention_of_the_encoder_and_over_its_states_is_the_same_in_cpp() -> None:
    qkv = torch.randn(3, 50, 3 * 2 * 24)
    q, states, weights = torch.randn(6, 2, 24), torch.randn(3, 70, 40), torch.randn(2, 2, 24, 40)
    found = {}
    for backend in ("torch", "cpp"):
        with ops.use(f"encoder_attention={backend}, latent_cross_attention={backend}"):
            found[backend] = ops.encoder_attention(qkv, 2), ops.latent_cross_attention(q, states, *weights)
    torch.testing.assert_close(found["cpp"], found["torch"], rtol=1e-4, atol=1e-4)


def test_cpp_refuses_what_it_cannot_compute() -> None:
    with (
        ops.use("encoder_attention=cpp"),
        pytest.raises(UsageError, match=r"encoder_attention: C\+\+ computes in float32 on a CPU; got torch.float16"),
    ):
        ops.encoder_attention(torch.zeros(1, 5, 12).half(), 2)


@pytest.mark.parametrize("activation", [None, *torch_ops.ACTIVATIONS])
@pytest.mark.parametrize("shape", [(1, 7, 5), (3, 33, 1), (17, 64, 200), (1, 128, 65)])
def test_packed_weights_give_the_same_products(shape: tuple[int, int, int], activation: str | None) -> None:
    rows, width, out = shape
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (torch.randn(s, generator=generator) for s in ((2, rows, width), (out, width), (out,)))
    packed = ops.packed(weight)
    assert packed.is_mkldnn and packed.shape == weight.shape
    for some in (bias, None):
        expected = torch_ops.linear(x.double(), weight.double(), None if some is None else some.double(), activation)
        found = ops.linear(x, packed, some, activation)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    token, log_prob = ops.greedy_token(x[0], packed)
    logits = F.linear(x[0].double(), weight.double())
    assert token.tolist() == logits.argmax(-1).tolist()
    torch.testing.assert_close(log_prob.double(), logits.log_softmax(-1).amax(-1), rtol=1e-5, atol=1e-5)


def test_weights_stay_plain_where_nothing_is_won_or_triton_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(8, 8)
    for size, is_packed in ((ops.PACKED_FROM - 1, False), (ops.PACKED_FROM, True)):
        assert ops.packed(torch.zeros(1, size), few_rows=True).is_mkldnn is is_packed
        assert ops.packed(torch.zeros(1, size)).is_mkldnn
    assert ops.packed(weight.half()).is_mkldnn is ops.packed(weight.bfloat16()).is_mkldnn is False
    for operation in ops.PRODUCTS:
        with ops.use(f"{operation}=triton"):
            assert ops.packed(weight) is weight
    with monkeypatch.context() as other:  # a PyTorch that has lost what it never promised
        other.setattr(torch_ops, "PACKING", (*torch_ops.PACKING, "_no_such_operation"))
        assert ops.packed(weight) is weight
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert ops.packed(weight) is weight
