"""The bytes behind the blocks, against indexing in plain torch; on CUDA against the CPU's bytes as well."""

import gc
import threading
from collections.abc import Callable

import pytest
import torch

from trocr_fast import _csrc
from trocr_fast._csrc import KVMemory, permute_tables

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# num_blocks, num_layers, block_size, num_heads, head_dim: the real heads, and odd ones
SIZES = [(7, 2, 1, 16, 64), (9, 3, 2, 3, 5), (5, 1, 4, 1, 1), (6, 2, 8, 2, 7), (11, 2, 16, 4, 32), (3, 2, 64, 5, 12)]


def on_stream(device: str) -> int:
    return torch.cuda.current_stream().cuda_stream if device == "cuda" else 0


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, where NaN of the same bits are equal too."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def empty_memory(size: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    return torch.full((*size[:2], 2, *size[2:]), torch.nan, dtype=dtype, device=device)


def slots_in(memory: torch.Tensor, layer: int, side: int) -> torch.Tensor:
    """A copy of all slots of a layer's keys (0) or values (1): [num_slots, num_heads, head_dim]."""
    return memory[:, layer, side].flatten(0, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_write_equals_indexing(size: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    num_blocks, num_layers, block_size, num_heads, head_dim = size
    memory = empty_memory(size, dtype, device)
    expected = empty_memory(size, dtype)
    bound = KVMemory(memory)
    num_slots = num_blocks * block_size
    for layer in range(num_layers):
        num_tokens = max(1, num_slots // 2)
        slots = torch.randperm(num_slots, generator=torch.Generator().manual_seed(layer))[:num_tokens]
        slots[num_tokens // 2] = -1
        # chunks of what one projection gave: a token's k, v and something else lie side by side
        fused = random(num_tokens, 3, num_heads, head_dim, dtype=dtype, seed=layer)
        k, v, _ = fused.to(device).unbind(1)
        bound.write(layer, k, v, slots.to(device), on_stream(device))
        for side in (0, 1):
            flat = slots_in(expected, layer, side)
            flat[slots[slots >= 0]] = fused[slots >= 0, side]
            expected[:, layer, side] = flat.unflatten(0, (num_blocks, block_size))
    assert same_bytes(memory, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gather_of_shuffled_blocks_equals_indexing(size: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    num_blocks, num_layers, block_size, num_heads, head_dim = size
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    memory = random(num_blocks, num_layers, 2, block_size, num_heads, head_dim, dtype=dtype)
    # Rows of different lengths over three quarters of the blocks; what is free is NaN and so is what nobody wrote.
    held = order[: max(1, 3 * num_blocks // 4)]
    memory[order[len(held) :].long()] = torch.nan
    most = len(held) * block_size
    lengths = torch.tensor([most, 0, 1, most - 1, block_size], dtype=torch.int32)
    tables = torch.full((5, len(held) + 2), 2**31 - 1, dtype=torch.int32)  # past a row's end nothing is read
    for row, length in enumerate(lengths.tolist()):
        blocks = -(-length // block_size)
        tables[row, :blocks] = held.roll(row)[:blocks]
    for num_keys in {most + 3, max(1, most // 2)}:  # longer and shorter than the rows
        for layer in range(num_layers):
            got = [torch.full((5, num_heads, num_keys, head_dim), torch.nan, dtype=dtype, device=device) for _ in "kv"]
            bound = KVMemory(memory.to(device))
            bound.gather(layer, tables.to(device), lengths.to(device), *got, on_stream(device))
            for side in (0, 1):
                expected = torch.zeros(5, num_heads, num_keys, head_dim, dtype=dtype)
                for row, length in enumerate(lengths.tolist()):
                    cut = min(length, num_keys)
                    tokens = memory[held.roll(row).long(), layer, side].flatten(0, 1)[:cut]
                    expected[row, :, :cut] = tokens.transpose(0, 1)
                assert same_bytes(got[side], expected), f"layer {layer}, side {side}, num_keys {num_keys}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_copy_blocks_equals_indexing(size: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    memory = random(*size[:2], 2, *size[2:], dtype=dtype)
    order = torch.randperm(size[0], generator=torch.Generator().manual_seed(2))
    pairs = order[: size[0] // 2 * 2].view(-1, 2)
    expected = memory.clone()
    expected[pairs[:, 1]] = memory[pairs[:, 0]]
    ours = memory.to(device, copy=True)
    KVMemory(ours).copy_blocks(pairs.to(device, torch.int32), on_stream(device))
    assert same_bytes(ours, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_swap_round_trip(size: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    memory = random(*size[:2], 2, *size[2:], dtype=dtype)
    ours = memory.to(device, copy=True)
    bound = KVMemory(ours)
    # neighbours that go in one piece, and others
    out = torch.tensor([0, 1, size[0] - 1])
    back = torch.tensor([size[0] - 1, 1, 0])
    host = torch.full((3, *ours.shape[1:]), torch.nan, dtype=dtype, pin_memory=device == "cuda")
    bound.swap_out(out, host, on_stream(device))
    if device == "cuda":
        torch.cuda.current_stream().synchronize()
    assert same_bytes(host, memory[out])
    ours.fill_(torch.nan)
    bound.swap_in(back.tolist(), host, on_stream(device))
    expected = torch.full_like(memory, torch.nan)
    expected[back] = memory[out]
    assert same_bytes(ours, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("num_rows", "stride"), [(1, 1), (5, 3), (64, 17), (3, 257)])
def test_permute_tables_equals_indexing(num_rows: int, stride: int, device: str) -> None:
    draw = torch.Generator().manual_seed(num_rows)
    source = torch.randint(-9, 1000, (num_rows, stride), generator=draw, dtype=torch.int32)
    parents = torch.randint(0, num_rows, (num_rows,), generator=draw)
    prefix = torch.randint(0, stride + 1, (num_rows,), generator=draw, dtype=torch.int32)
    prefix[-1] = stride + 7  # more than there is: all of the parent's row
    destination = torch.full_like(source, -77).to(device)
    permute_tables(source.to(device), destination, parents.to(device), prefix.to(device), on_stream(device))
    from_parent = torch.arange(stride) < prefix[:, None]
    assert torch.equal(destination.cpu(), torch.where(from_parent, source[parents], source))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_cuda_leaves_the_bytes_of_the_cpu(size: tuple[int, ...], dtype: torch.dtype) -> None:
    num_blocks, num_layers, block_size, num_heads, head_dim = size
    start = random(num_blocks, num_layers, 2, block_size, num_heads, head_dim, dtype=dtype)
    fused = random(block_size + 2, 2 * num_heads * head_dim + 1, dtype=dtype, seed=1)  # tokens begin at odd places
    results = []
    for device in ("cpu", "cuda"):
        memory, stream = start.to(device, copy=True), on_stream(device)
        bound = KVMemory(memory)
        k, v, _ = fused.to(device).split([num_heads * head_dim, num_heads * head_dim, 1], dim=1)
        slots = torch.arange(block_size + 2, device=device) - 1
        for layer in range(num_layers):
            k3, v3 = k.unflatten(1, (num_heads, head_dim)), v.unflatten(1, (num_heads, head_dim))
            bound.write(layer, k3, v3, slots, stream)
        bound.copy_blocks(torch.tensor([[0, 2]], dtype=torch.int32, device=device), stream)
        outputs = [torch.full((2, num_heads, 2 * block_size + 1, head_dim), torch.nan, dtype=dtype) for _ in "kv"]
        outputs = [output.to(device) for output in outputs]
        tables = torch.tensor([[2, 1], [0, 0]], dtype=torch.int32, device=device)
        lengths = torch.tensor([2 * block_size, 1], dtype=torch.int32, device=device)
        bound.gather(num_layers - 1, tables, lengths, *outputs, stream)
        results.append([memory.cpu(), *(output.cpu() for output in outputs)])
    for on_cpu, on_cuda in zip(*results, strict=True):
        assert same_bytes(on_cpu, on_cuda)


@pytest.mark.gpu
def test_on_cuda_an_index_outside_writes_nothing_and_gives_zeros() -> None:
    memory = random(4, 2, 2, 2, 3, 4, device="cuda")
    before, bound, stream = memory.clone(), KVMemory(memory), on_stream("cuda")
    tokens = torch.full((4, 3, 4), torch.nan, device="cuda")
    bound.write(0, tokens, tokens, torch.tensor([-1, -2, 8, 2**62], device="cuda"), stream)
    pairs = torch.tensor([[-1, 0], [0, -1], [4, 1], [1, 4]], dtype=torch.int32, device="cuda")
    bound.copy_blocks(pairs, stream)
    assert same_bytes(memory, before)
    k, v = (torch.full((3, 3, 2, 4), torch.nan, device="cuda") for _ in "kv")
    tables = torch.tensor([[-1], [4], [0]], dtype=torch.int32, device="cuda")
    bound.gather(0, tables, torch.tensor([2, 2, -5], dtype=torch.int32, device="cuda"), k, v, stream)
    assert not k.any() and not v.any()
    source = torch.arange(6, dtype=torch.int32, device="cuda").view(3, 2)
    destination = torch.full_like(source, -7)
    prefix = torch.full((3,), 2, dtype=torch.int32, device="cuda")
    permute_tables(source, destination, torch.tensor([-1, 3, 0], device="cuda"), prefix, stream)
    assert destination.tolist() == [[-7, -7], [-7, -7], [0, 1]]


def test_keys_and_values_of_a_token_go_to_their_places() -> None:
    memory = torch.zeros(3, 2, 2, 2, 1, 2)
    k, v = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 4.0]]])
    KVMemory(memory).write(1, k, v, torch.tensor([5]))
    expected = torch.zeros(3, 2, 2, 2, 1, 2)
    expected[2, 1, 0, 1, 0], expected[2, 1, 1, 1, 0] = k[0, 0], v[0, 0]  # block 2, layer 1, offset 1
    assert torch.equal(memory, expected)


def test_keys_and_values_have_strides_of_their_own() -> None:
    memory = torch.zeros(4, 1, 2, 1, 1, 2)
    k, v = random(8, 1, 2)[::2], random(4, 1, 2, seed=1)
    bound = KVMemory(memory)
    for left, right in [(k, v), (v, k), (k[:1].expand(4, 1, 2), v)]:
        bound.write(0, left, right, torch.arange(4))
        assert same_bytes(memory[:, 0, 0, 0], left) and same_bytes(memory[:, 0, 1, 0], right)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_to_do(device: str) -> None:
    memory = random(4, 2, 2, 2, 3, 4, device=device)
    before, bound, stream = memory.clone(), KVMemory(memory), on_stream(device)
    none = torch.empty(0, dtype=torch.int32, device=device)
    tokens = torch.empty(0, 3, 4, device=device)
    bound.write(0, tokens, tokens, none.long(), stream)
    bound.copy_blocks(none.view(0, 2), stream)
    bound.gather(0, none.view(0, 5), none, *[torch.empty(0, 3, 7, 4, device=device)] * 2, stream)
    bound.gather(0, none.view(0, 5), none, *[torch.empty(0, 3, 0, 4, device=device)] * 2, stream)
    host = torch.empty(0, 2, 2, 2, 3, 4)
    bound.swap_out([], host, stream)
    bound.swap_in([], host, stream)
    permute_tables(none.view(0, 3), none.view(0, 3).clone(), none.long(), none, stream)
    assert same_bytes(memory, before)
    # no table and no token: all zeros
    k, v = (torch.full((2, 3, 5, 4), torch.nan, device=device) for _ in "kv")
    bound.gather(0, none.new_empty(2, 0), none.new_zeros(2), k, v, stream)
    assert not k.any() and not v.any()


# Errors. The memory is [4, 2, 2, 2, 3, 4]: 4 blocks of 2 tokens, 2 layers, 3 heads of 4.


def tokens_of(count: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(count, 3, 4, dtype=dtype)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def write(bound: KVMemory, layer: int = 0, **changed: torch.Tensor) -> None:
    arguments = {"k": tokens_of(), "v": tokens_of(), "slot_mapping": torch.tensor([0, 1])}
    bound.write(layer, **{**arguments, **changed})


def gather(bound: KVMemory, layer: int = 0, **changed: torch.Tensor) -> None:
    arguments = {"block_tables": int32(0, 1).view(1, 2), "context_lens": int32(3)}
    arguments |= {"k": torch.ones(1, 3, 5, 4), "v": torch.ones(1, 3, 5, 4)}
    bound.gather(layer, **{**arguments, **changed})


CASES: list[tuple[Callable[[KVMemory], object], str]] = [
    (lambda m: write(m, layer=2), "layer: expected 0 to 1, got 2"),
    (lambda m: write(m, layer=-1), "layer: expected 0 to 1, got -1"),
    (lambda m: write(m, k=tokens_of(dtype=torch.float16)), "k: expected dtype float32, got float16"),
    (lambda m: write(m, v=tokens_of(dtype=torch.bfloat16)), "v: expected dtype float32, got bfloat16"),
    (lambda m: write(m, v=tokens_of(dtype=torch.bool)), "v: expected dtype float32, got type code 6"),
    (lambda m: write(m, v=tokens_of(dtype=torch.complex64)), "v: expected dtype float32, got type code 5"),
    (lambda m: write(m, k=tokens_of(3)), r"k: expected shape \[2, 3, 4\], got \[3, 3, 4\]"),
    (lambda m: write(m, v=torch.ones(2, 12)), r"v: expected shape \[2, 3, 4\], got \[2, 12\]"),
    (lambda m: write(m, v=torch.ones(())), r"v: expected shape \[2, 3, 4\], got \[\]"),
    (
        lambda m: write(m, k=torch.ones(2, 4, 3).transpose(1, 2)),
        r"k: expected contiguous memory from dimension 1 on, got strides \[12, 1, 3\]",
    ),
    (
        lambda m: write(m, v=torch.ones(2, 3, 8)[..., ::2]),
        r"v: expected contiguous memory from dimension 1 on, got strides \[24, 8, 2\]",
    ),
    (lambda m: write(m, slot_mapping=torch.tensor([0, 8])), "slot_mapping: expected -1 to 7, got 8"),
    (lambda m: write(m, slot_mapping=torch.tensor([0, -2])), "slot_mapping: expected -1 to 7, got -2"),
    (lambda m: write(m, slot_mapping=torch.tensor([0, 2**62])), "slot_mapping: expected -1 to 7, got 46116860184"),
    (lambda m: write(m, slot_mapping=int32(0, 1)), "slot_mapping: expected dtype int64, got int32"),
    (lambda m: write(m, slot_mapping=torch.tensor([[0, 1]])), r"slot_mapping: expected shape \[any\], got \[1, 2\]"),
    (lambda m: write(m, slot_mapping=torch.tensor(0)), r"slot_mapping: expected shape \[any\], got \[\]"),
    (
        lambda m: write(m, slot_mapping=torch.tensor([0, 9, 1])[::2]),
        r"slot_mapping: expected contiguous memory, got strides \[2\]",
    ),
    (lambda m: write(m, k=[1.0]), "k: expected a tensor, got list"),
    (lambda m: m.copy_blocks(int32(0, 1)), r"pairs: expected shape \[any, 2\], got \[2\]"),
    (lambda m: m.copy_blocks(int32(0, 1, 2).view(1, 3)), r"pairs: expected shape \[any, 2\], got \[1, 3\]"),
    (lambda m: m.copy_blocks(torch.tensor([[0, 1]])), "pairs: expected dtype int32, got int64"),
    (lambda m: m.copy_blocks(int32(0, 1, 2, 4).view(2, 2)), "block: expected 0 to 3, got 4"),
    (lambda m: m.copy_blocks(int32(0, 1, -1, 2).view(2, 2)), "block: expected 0 to 3, got -1"),
    (
        lambda m: m.copy_blocks(int32(0, 2, 1, 3).view(2, 2).t()),
        r"pairs: expected contiguous memory, got strides \[1, 2\]",
    ),
    (lambda m: gather(m, layer=2), "layer: expected 0 to 1, got 2"),
    (lambda m: gather(m, block_tables=int32(0, 4).view(1, 2)), "block: expected 0 to 3, got 4"),
    (lambda m: gather(m, block_tables=int32(0, -1).view(1, 2)), "block: expected 0 to 3, got -1"),
    (lambda m: gather(m, context_lens=int32(5)), "context_lens: expected at most 4, got 5"),
    (lambda m: gather(m, context_lens=torch.tensor([3])), "context_lens: expected dtype int32, got int64"),
    (lambda m: gather(m, context_lens=int32(3).view(())), r"context_lens: expected shape \[any\], got \[\]"),
    (lambda m: gather(m, block_tables=int32(3).view(())), r"block_tables: expected shape \[1, any\], got \[\]"),
    (lambda m: gather(m, block_tables=torch.tensor([[0, 1]])), "block_tables: expected dtype int32, got int64"),
    (
        lambda m: gather(m, block_tables=torch.zeros(1, 4, dtype=torch.int32)[:, ::2]),
        r"block_tables: expected contiguous memory, got strides \[4, 2\]",
    ),
    (
        lambda m: gather(m, block_tables=torch.zeros(2, 2, dtype=torch.int32)),
        r"block_tables: expected shape \[1, any\], got \[2, 2\]",
    ),
    (lambda m: gather(m, k=torch.ones(1, 3, 5, 3)), r"k: expected shape \[1, 3, any, 4\], got \[1, 3, 5, 3\]"),
    (lambda m: gather(m, v=torch.ones(1, 3, 6, 4)), r"v: expected shape \[1, 3, 5, 4\], got \[1, 3, 6, 4\]"),
    (lambda m: gather(m, v=torch.ones(1, 3, 5, 4).half()), "v: expected dtype float32, got float16"),
    (
        lambda m: gather(m, k=torch.ones(1, 5, 3, 4).transpose(1, 2)),
        r"k: expected contiguous memory, got strides \[60, 4, 12, 1\]",
    ),
    (lambda m: m.swap_out([0, 4], torch.ones(2, 2, 2, 2, 3, 4)), "blocks: expected 0 to 3, got 4"),
    (lambda m: m.swap_in([0, -1], torch.ones(2, 2, 2, 2, 3, 4)), "blocks: expected 0 to 3, got -1"),
    (lambda m: m.swap_in([0.5], torch.ones(1, 2, 2, 2, 3, 4)), "blocks: expected integers, got float64"),
    (
        lambda m: m.swap_in([0], torch.ones(2, 2, 2, 2, 3, 4)),
        r"host: expected shape \[1, 2, 2, 2, 3, 4\], got \[2, 2, 2, 2, 3, 4\]",
    ),
    (lambda m: m.swap_in([0], torch.ones(1, 2, 2, 2, 3, 4).half()), "host: expected dtype float32, got float16"),
    (
        lambda m: m.swap_in([0], torch.ones(1, 2, 2, 2, 4, 3).transpose(4, 5)),
        r"host: expected contiguous memory, got strides \[96, 48, 24, 12, 1, 3\]",
    ),
]


@pytest.mark.parametrize(("call", "message"), CASES, ids=[message[:40] for _, message in CASES])
def test_a_refused_call_says_why_and_writes_nothing(call: Callable[[KVMemory], object], message: str) -> None:
    memory = random(4, 2, 2, 2, 3, 4)
    before = memory.clone()
    with pytest.raises(ValueError, match=message):
        call(KVMemory(memory))
    assert same_bytes(memory, before)


def test_a_refused_gather_writes_nothing() -> None:
    k, v = torch.ones(2, 3, 5, 4), torch.ones(2, 3, 5, 4)
    tables = int32(0, 1, 0, 4).view(2, 2)
    with pytest.raises(ValueError, match="block: expected 0 to 3, got 4"):
        KVMemory(random(4, 2, 2, 2, 3, 4)).gather(0, tables, int32(3, 3), k, v)
    assert torch.equal(k, torch.ones_like(k)) and torch.equal(v, torch.ones_like(v))


@pytest.mark.parametrize(
    "bad", [torch.ones(2, 3, 4, requires_grad=True), torch.ones(2, 3, 4, dtype=torch.cfloat).conj()]
)
def test_refuses_what_dlpack_refuses(bad: torch.Tensor) -> None:
    with pytest.raises(BufferError):
        write(KVMemory(random(4, 2, 2, 2, 3, 4)), k=bad)


@pytest.mark.gpu
def test_refuses_another_device() -> None:
    memory = random(4, 2, 2, 2, 3, 4)
    with pytest.raises(ValueError, match="k: expected on cpu as memory, got cuda:0"):
        write(KVMemory(memory), k=tokens_of().cuda())
    with pytest.raises(ValueError, match="slot_mapping: expected on cuda:0 as memory, got cpu"):
        write(KVMemory(memory.cuda()))
    with pytest.raises(ValueError, match="host: expected host memory, got cuda:0"):
        KVMemory(memory.cuda()).swap_out([0], torch.ones(1, 2, 2, 2, 3, 4, device="cuda"))


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (
            torch.ones(4, 2, 3, 2, 3, 4),
            r"memory: expected shape \[any, any, 2, any, any, any\], got \[4, 2, 3, 2, 3, 4\]",
        ),
        (torch.ones(4, 2, 2, 2, 12), r"memory: expected shape .* got \[4, 2, 2, 2, 12\]"),
        (torch.ones(4, 2, 2, 2, 3, 4).double(), "memory: expected dtype .* got type code 2 of 64 bits"),
        (torch.ones(4, 2, 2, 2, 3, 4).int(), "memory: expected dtype .* got type code 0 of 32 bits"),
        (torch.ones(4, 2, 2, 2, 4, 3).transpose(4, 5), r"memory: expected contiguous memory, got strides"),
        (
            torch.ones(1, 2, 2, 2, 3, 4).expand(4, -1, -1, -1, -1, -1),
            r"memory: expected contiguous memory, got strides \[0,",
        ),
        (torch.ones(0, 2, 2, 2, 3, 4), "memory: expected no empty dimension"),
        (torch.ones(4, 2, 2, 2, 3, 0), "memory: expected no empty dimension"),
        (7, "memory: expected a tensor, got int"),
    ],
)
def test_refuses_a_memory(memory: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVMemory(memory)


def permute(**changed: torch.Tensor) -> None:
    arguments = {"source": torch.zeros(2, 3, dtype=torch.int32), "destination": torch.ones(2, 3, dtype=torch.int32)}
    arguments |= {"parents": torch.tensor([0, 1]), "prefix_blocks": int32(3, 3)}
    arguments |= changed
    before = arguments["destination"].clone()
    try:
        permute_tables(**arguments)
    finally:
        assert torch.equal(arguments["destination"], before)


# Two places in one memory that overlap.
WHOLE = torch.zeros(3, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"parents": torch.tensor([0, 2])}, "parents: expected 0 to 1, got 2"),
        ({"parents": torch.tensor([0, -1])}, "parents: expected 0 to 1, got -1"),
        ({"parents": int32(0, 1)}, "parents: expected dtype int64, got int32"),
        ({"parents": torch.tensor([0])}, r"parents: expected shape \[2\], got \[1\]"),
        ({"prefix_blocks": torch.tensor([0, 1])}, "prefix_blocks: expected dtype int32, got int64"),
        ({"prefix_blocks": int32(0, 1, 2)}, r"prefix_blocks: expected shape \[2\], got \[3\]"),
        ({"source": torch.zeros(2, 3)}, "source: expected dtype int32, got float32"),
        ({"source": torch.zeros(6, dtype=torch.int32)}, r"source: expected shape \[any, any\], got \[6\]"),
        ({"source": torch.zeros(3, 2, dtype=torch.int32).t()}, "source: expected contiguous memory, got strides"),
        ({"destination": torch.zeros(2, 2, dtype=torch.int32)}, r"destination: expected shape \[2, 3\], got \[2, 2\]"),
        ({"source": WHOLE[:2], "destination": WHOLE[:2]}, "destination: expected another memory than source"),
        ({"source": WHOLE[:2], "destination": WHOLE[1:]}, "destination: expected another memory than source"),
        ({"source": WHOLE[1:], "destination": WHOLE[:2]}, "destination: expected another memory than source"),
    ],
)
def test_permute_tables_refuses(changed: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        permute(**changed)


# Whose memory it is, and threads.


@pytest.mark.parametrize("device", DEVICES)
def test_the_memory_lives_as_long_as_it_is_bound(device: str) -> None:
    tensor = random(64, 2, 2, 16, 16, 64, device=device)  # 16 MB: what is freed goes back and would be used again
    expected = tensor[3:4].to("cpu", copy=True)
    storage = tensor.untyped_storage()._weak_ref()
    bound = KVMemory(tensor)
    del tensor
    gc.collect()
    assert not torch.UntypedStorage._expired(storage)
    others = [torch.full((64, 2, 2, 16, 16, 64), torch.nan, device=device) for _ in range(3)]
    host = torch.zeros_like(expected)
    bound.swap_out([3], host, on_stream(device))
    if device == "cuda":
        torch.cuda.synchronize()
    assert same_bytes(host, expected)
    del bound, others
    gc.collect()
    assert torch.UntypedStorage._expired(storage)
    torch.UntypedStorage._free_weak_ref(storage)


def test_arguments_are_given_back_also_by_a_call_that_fails() -> None:
    bound = KVMemory(random(4, 2, 2, 2, 3, 4))
    storages = []
    for layer in (0, 5):
        k = tokens_of()
        storages.append(k.untyped_storage()._weak_ref())
        if layer == 5:
            with pytest.raises(ValueError, match="layer"):
                write(bound, layer, k=k)
            with pytest.raises(ValueError, match="v: expected shape"):
                write(bound, 0, k=k, v=torch.ones(3))
        else:
            write(bound, layer, k=k)
        del k
    gc.collect()
    for storage in storages:
        assert torch.UntypedStorage._expired(storage)
        torch.UntypedStorage._free_weak_ref(storage)


def test_a_memory_that_is_refused_is_given_back() -> None:
    tensor = torch.ones(4, 2, 3, 2, 3, 4)
    storage = tensor.untyped_storage()._weak_ref()
    with pytest.raises(ValueError, match="memory: expected shape"):
        KVMemory(tensor)
    del tensor
    gc.collect()
    assert torch.UntypedStorage._expired(storage)
    torch.UntypedStorage._free_weak_ref(storage)


def test_threads_move_bytes_at_once() -> None:
    """Two big memories at once: each gets its own bytes."""
    size = (16, 2, 2, 16, 16, 64)  # 4 MB
    memories = [torch.zeros(size) for _ in range(2)]
    failures: list[str] = []

    def work(number: int) -> None:
        bound = KVMemory(memories[number])
        slots = torch.arange(256)
        for turn in range(20):
            k, v = (torch.full((256, 16, 64), float(number * 1000 + turn * 10 + side)) for side in (0, 1))
            for layer in (0, 1):
                bound.write(layer, k, v, slots)
            expected = torch.stack([k[:1], v[:1]])[None, None].expand_as(memories[number])
            if not torch.equal(memories[number], expected):
                failures.append(f"memory {number}, turn {turn}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_this_build_says_what_it_is() -> None:
    assert _csrc.BUILD in ("cpu", "cuda")
