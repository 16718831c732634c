"""Attention over the blocks on a CPU, against softmax(q K^T) V in fp64 over the tokens that went in."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trocr_fast import cpp_ops, torch_ops
from trocr_fast._csrc import KVMemory
from trocr_fast.paged_cache import PagedKV, PagedStep

# num_blocks, num_layers, block_size, num_heads, head_dim: the real heads, and odd ones
SIZES = [(97, 2, 1, 16, 64), (23, 2, 2, 3, 5), (9, 1, 16, 1, 1), (40, 1, 1, 8, 32), (17, 3, 4, 2, 19)]


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("scale", [1.0, 60.0])  # of scores that no exp can hold
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_attend_equals_dense_attention_in_fp64(size: tuple[int, ...], scale: float) -> None:
    num_blocks, num_layers, block_size, num_heads, head_dim = size
    memory = torch.full((num_blocks, num_layers, 2, block_size, num_heads, head_dim), torch.nan)
    most = (num_blocks // 5) * block_size
    lengths = torch.tensor([most, 0, 1, max(1, most - 1), min(2, most)])
    width = num_blocks // 5
    tables = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1))[: 5 * width].view(5, width).int()
    held = random(5, most, 2, num_heads, head_dim)  # by row and token
    layer = num_layers - 1
    slots = torch.full((5,), -1)
    for row, length in enumerate(lengths.tolist()):
        for token in range(length):
            block, offset = int(tables[row, token // block_size]), token % block_size
            if token < length - 1:
                memory[block, layer, :, offset] = held[row, token]
            else:
                slots[row] = block * block_size + offset
        tables[row, -(-length // block_size) :] = 2**30  # never looked at
    # chunks of what one projection gave
    fused = random(5, 3, num_heads, head_dim, seed=2)
    for row, length in enumerate(lengths.tolist()):
        if length:
            fused[row, 1:] = held[row, length - 1]
    fused[:, 0] *= scale
    q, k, v = fused.unbind(1)

    before, out = memory.clone(), torch.full((5, num_heads * head_dim), torch.nan)
    KVMemory(memory).attend(layer, q, k, v, tables, lengths.int(), slots, out)
    for row, length in enumerate(lengths.tolist()):
        keys, values = held[row, :length].double().permute(1, 2, 0, 3)  # [heads, tokens, head_dim] each
        probabilities = torch.einsum("hd,htd->ht", q[row].double(), keys).softmax(-1)
        expected = torch.einsum("ht,htd->hd", probabilities, values).flatten()
        torch.testing.assert_close(out[row].double(), expected, rtol=1e-4, atol=1e-4 if scale == 1 else 1e-3)
        if length:
            block, offset = divmod(int(slots[row]), block_size)
            assert torch.equal(memory[block, layer, :, offset], torch.stack([k[row], v[row]]))
            before[block, layer, :, offset] = memory[block, layer, :, offset]
    assert torch.equal(memory.nan_to_num(7e7), before.nan_to_num(7e7))  # nothing else has changed


def test_it_is_what_attention_by_gathering_gives() -> None:
    """With which half precision goes on."""
    kv = PagedKV(2, 4, 8, 60, 99, torch.float32, torch.device("cpu"))
    kv.memory.copy_(random(60, 2, 2, 1, 4, 8))
    tables, lengths = torch.arange(60).view(6, 10).int(), torch.tensor([10, 1, 0, 7, 9, 2], dtype=torch.int32)
    slots = tables.gather(1, (lengths.long() - 1).clamp(min=0).unsqueeze(1)).squeeze(1).long()
    slots = slots.masked_fill(lengths == 0, -1)
    step = PagedStep(kv, slots, lengths, tables, 10, torch.zeros(6, dtype=torch.int64))
    q, k, v = random(6, 3, 4, 8, seed=3).unbind(1)
    found = cpp_ops.paged_attention(q, k, v, 1, step)
    content = kv.memory.clone()
    expected = torch_ops.paged_attention(q, k, v, 1, step)
    is_there = (lengths > 0).unsqueeze(1)
    torch.testing.assert_close(found, expected * is_there, rtol=1e-5, atol=1e-5)
    assert torch.equal(kv.memory, content)


def arguments() -> dict[str, Tensor]:
    q, k, v = random(3, 3, 2, 4).unbind(1)
    return {
        "q": q,
        "k": k,
        "v": v,
        "block_tables": torch.arange(6, dtype=torch.int32).view(3, 2),
        "context_lens": torch.tensor([2, 1, 0], dtype=torch.int32),
        "slot_mapping": torch.tensor([1, 2, -1]),
        "out": torch.zeros(3, 8),
    }


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda x: x[:2], r"q: expected shape \[3, 2, 4\], got \[2, 2, 4\]"),
        ("q", lambda x: x.half(), "q: expected"),
        ("k", lambda x: x[..., :3], r"k: expected shape \[3, 2, 4\]"),
        ("v", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "v: expected contiguous"),
        ("context_lens", lambda x: x[:2], r"block_tables: expected shape \[2"),
        ("context_lens", lambda x: x + 1, "context_lens: expected at most 2, got 3"),
        ("block_tables", lambda x: x + 5, "block: expected 0 to 5, got 6"),
        ("slot_mapping", lambda x: x + 4, "slot_mapping: expected -1 to 5, got 6"),
        ("slot_mapping", lambda x: x[:2], r"k: expected shape \[2"),
        ("out", lambda x: x[:, :7], r"out: expected shape \[3, 8\]"),
        ("out", lambda x: x.double(), "out: expected"),
    ],
)
def test_a_refused_call_says_why_and_writes_nothing(
    name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    memory = random(6, 1, 2, 1, 2, 4)
    before, given = memory.clone(), arguments()
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=message):
        KVMemory(memory).attend(0, **given)
    assert torch.equal(memory, before)
    assert not given["out"].any()


def test_half_precision_and_unknown_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="memory: expected float32 on the CPU, got values of 2 bytes"):
        KVMemory(random(6, 1, 2, 1, 2, 4).half()).attend(0, **arguments())
    with pytest.raises(ValueError, match="layer: expected 0 to 0, got 1"):
        KVMemory(random(6, 1, 2, 1, 2, 4)).attend(1, **arguments())


def test_no_rows() -> None:
    empty = {name: tensor[:0] for name, tensor in arguments().items()}
    KVMemory(random(6, 1, 2, 1, 2, 4)).attend(0, **empty)
