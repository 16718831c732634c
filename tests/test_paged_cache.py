"""The paged cache as the engine uses it: PagedKV with and without native device code, StepBuffers, growing."""

import numpy as np
import pytest
import torch

from trocr_fast import _csrc, paged_cache
from trocr_fast.paged_cache import OutOfBlocks, PagedKV, StepBuffers

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LAYERS, HEADS, HEAD_DIM = 3, 2, 5


def make(device: str = "cpu", block_size: int = 4, num_blocks: int = 40) -> PagedKV:
    kv = PagedKV(LAYERS, HEADS, HEAD_DIM, num_blocks, 64, torch.float32, torch.device(device), block_size)
    kv._padded.fill_(float("nan"))
    return kv


@pytest.fixture(params=[True, False], ids=["native", "torch"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether csrc moves the bytes or, as on a GPU with the build for CPUs, PyTorch."""
    if not request.param:
        monkeypatch.setattr(paged_cache, "has_native", lambda device: False)
    elif "cuda" in request.node.name and _csrc.BUILD == "cpu":
        pytest.skip("needs the extension built with nvcc (TROCR_FAST_CUDA=1)")
    return request.param


def fill(kv: PagedKV, sequences: np.ndarray, num_tokens: int, seed: int) -> torch.Tensor:
    """Append random tokens; what was written, [sequences, layers, 2, tokens, heads, head_dim]."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(sequences), LAYERS, 2, num_tokens, HEADS, HEAD_DIM, generator=generator)
    values = values.to(kv.memory.device)
    slots = torch.from_numpy(kv.reserve(sequences, num_tokens)).to(kv.memory.device)
    for layer in range(LAYERS):
        k, v = (values[:, layer, side].reshape(-1, HEADS, HEAD_DIM) for side in (0, 1))
        kv.write(layer, k, v, slots)
    return values


def read(kv: PagedKV, sequences: np.ndarray, num_keys: int) -> torch.Tensor:
    """Everything of all layers, [sequences, layers, 2, keys, heads, head_dim]."""
    buffers = StepBuffers(len(sequences), kv.cache.max_blocks, kv.memory.device)
    buffers.fill(kv.cache, sequences, np.full(len(sequences), -1))
    out = kv.memory.new_full((len(sequences), LAYERS, 2, HEADS, num_keys, HEAD_DIM), float("nan"))
    for layer in range(LAYERS):
        k, v = (out.new_full((len(sequences), HEADS, num_keys, HEAD_DIM), float("nan")) for _ in range(2))
        kv.gather(layer, buffers.block_tables, buffers.context_lens, k, v)
        out[:, layer, 0], out[:, layer, 1] = k, v
    return out.transpose(3, 4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_shared_beginnings_and_own_endings(device: str, native: bool, block_size: int) -> None:
    kv = make(device, block_size)
    parent = kv.cache.add()
    begun = fill(kv, np.array([parent]), 6, seed=1)
    pair = np.array([parent, kv.cache.fork(parent)])
    ended = fill(kv, pair, 3, seed=2)
    found = read(kv, pair, 11)
    torch.testing.assert_close(found[:, :, :, :6], begun.expand(2, -1, -1, -1, -1, -1), rtol=0, atol=0)
    torch.testing.assert_close(found[:, :, :, 6:9], ended, rtol=0, atol=0)
    assert (found[:, :, :, 9:] == 0).all()  # after a row's end
    kv.cache.check_integrity()


@pytest.mark.parametrize("device", DEVICES)
def test_a_padding_slot_writes_nothing(device: str, native: bool) -> None:
    kv = make(device)
    k = torch.ones(2, HEADS, HEAD_DIM, device=device)
    kv.write(1, k, k, torch.tensor([-1, 7], device=device))
    assert (~kv.memory.isnan()).sum() == 2 * HEADS * HEAD_DIM
    assert (kv.memory[1, 1, :, 3] == 1).all()


@pytest.mark.parametrize("device", DEVICES)
def test_swapped_sequences_come_back_with_the_same_bytes_and_still_share(device: str, native: bool) -> None:
    kv = make(device, block_size=4)
    other = kv.cache.add()
    kept = fill(kv, np.array([other]), 5, seed=3)
    parent = kv.cache.add()
    fill(kv, np.array([parent]), 8, seed=4)
    pair = np.array([parent, kv.cache.fork(parent)])
    fill(kv, pair, 2, seed=5)
    before, used = read(kv, pair, 10), kv.cache.num_used

    swapped = kv.swap_out(pair)
    assert len(swapped.host) == 4  # two shared blocks, and one of each sequence
    assert kv.cache.num_used == used - 4
    free = [block for block in range(kv.cache.num_blocks) if block not in kv.cache.table(other)]
    kv.memory[free] = float("nan")
    back = kv.swap_in(swapped)
    assert kv.cache.num_used == used
    torch.testing.assert_close(read(kv, back, 10), before, rtol=0, atol=0)
    torch.testing.assert_close(read(kv, np.array([other]), 5), kept, rtol=0, atol=0)
    with pytest.raises(ValueError, match=f"sequence {parent}: expected one of the 3 live sequences"):
        kv.cache.length(parent)


def test_out_of_blocks_changes_nothing_and_growing_helps() -> None:
    kv = make(block_size=4, num_blocks=4)
    sequences = np.array([kv.cache.add(), kv.cache.add()])
    held = fill(kv, sequences, 7, seed=6)
    with pytest.raises(OutOfBlocks, match="2 sequences need 2 blocks, 0 of 4 are free"):
        kv.reserve(sequences, 2)
    torch.testing.assert_close(read(kv, sequences, 7), held, rtol=0, atol=0)
    kv.grow(6)
    assert kv.memory.shape[0] == 6
    more = fill(kv, sequences, 2, seed=7)
    torch.testing.assert_close(read(kv, sequences, 9), torch.cat([held, more], dim=3), rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_step_buffers_stay_where_they_are_and_hold_the_last_step(device: str) -> None:
    kv = make(device, block_size=2)
    buffers = StepBuffers(5, kv.cache.max_blocks, torch.device(device))
    places = [tensor.data_ptr() for tensor in (buffers.slot_mapping, buffers.context_lens, buffers.block_tables)]
    sequences = np.array([kv.cache.add() for _ in range(4)])
    for step in range(9):  # more than the ring is deep
        sequences = sequences[:3] if step == 6 else sequences
        slots = kv.reserve(sequences)
        buffers.fill(kv.cache, sequences, slots)
        rows = len(sequences)
        assert buffers.slot_mapping.tolist() == [*slots.tolist(), *[-1] * (5 - rows)]
        assert buffers.context_lens.tolist() == [step + 1] * rows + [0] * (5 - rows)
        for row, sequence in enumerate(sequences):
            table = kv.cache.table(sequence)
            assert buffers.block_tables[row, : len(table)].tolist() == table.tolist()
    now = [tensor.data_ptr() for tensor in (buffers.slot_mapping, buffers.context_lens, buffers.block_tables)]
    assert now == places


@pytest.mark.gpu
def test_a_host_that_runs_ahead_does_not_overwrite_what_is_being_copied() -> None:
    cache = _csrc.PagedCache(64, 1, 64)
    sequences = np.array([cache.add()])
    buffers = StepBuffers(1, 64, torch.device("cuda"), depth=2)
    torch.cuda._sleep(200_000_000)  # the stream is busy for a tenth of a second
    seen, expected = [], []
    for _ in range(10):
        slots = cache.reserve(sequences)[0]
        buffers.fill(cache, sequences, slots)
        seen.append(torch.cat([buffers.slot_mapping.clone(), buffers.context_lens.long().clone()]))
        expected.append([int(slots[0]), cache.length(sequences[0])])
    assert [pair.tolist() for pair in seen] == expected


def test_what_cannot_be_allocated_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    kv = make(block_size=4, num_blocks=4)
    sequences = np.array([kv.cache.add()])
    held = fill(kv, sequences, 7, seed=8)

    def no_memory(*args: object, **kwargs: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch, "empty", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        kv.grow(8)
    with pytest.raises(torch.OutOfMemoryError):
        kv.swap_out(sequences)
    monkeypatch.undo()
    assert kv.cache.num_blocks == kv.memory.shape[0] == 4
    torch.testing.assert_close(read(kv, sequences, 7), held, rtol=0, atol=0)
    with pytest.raises(ValueError, match="num_blocks: expected at least 4, got 3"):
        kv.grow(3)


def test_sequences_of_another_cache_are_refused_whole() -> None:
    kv, other = make(block_size=4), PagedKV(LAYERS, HEADS, 7, 8, 64, torch.float32, torch.device("cpu"), 4)
    sequence = other.cache.add()
    other.reserve(np.array([sequence]), 5)
    swapped = other.swap_out(np.array([sequence]))
    with pytest.raises(ValueError, match=r"swapped: expected \[2, 3, 2, 4, 2, 5\].*got \[2, 3, 2, 4, 2, 7\]"):
        kv.swap_in(swapped)
    assert kv.cache.num_used == kv.cache.num_sequences == 0


@pytest.mark.parametrize("name", ["num_layers", "num_heads", "head_dim"])
def test_empty_sizes_are_named(name: str) -> None:
    sizes = {"num_layers": 1, "num_heads": 1, "head_dim": 4, name: 0}
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        PagedKV(**sizes, num_blocks=4, max_tokens=4, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block_size", [1, 4])
def test_beams_permuted_on_the_device_and_replayed_on_the_host_a_step_late(device: str, block_size: int) -> None:
    if device == "cuda" and _csrc.BUILD == "cpu":
        pytest.skip("needs the extension built with nvcc (TROCR_FAST_CUDA=1)")
    # The host launches a step before it knows the parents that the step before has chosen: it reserves room for every
    # row, the device puts its table in the parents' order, and the host does the same to its own when it hears of them.
    lines, beams, steps = 5, 4, 12
    rows, max_blocks = lines * beams, 2 * steps
    rng = np.random.default_rng(0)
    cache = _csrc.PagedCache(4 * rows * steps, block_size, max_blocks)
    firsts = [cache.add() for _ in range(lines)]
    sequences = np.array([beam for first in firsts for beam in [first, *(cache.fork(first) for _ in range(beams - 1))]])
    table = torch.full((rows, max_blocks), -1, dtype=torch.int32, device=device)
    spare = table.clone()
    history: list[list[int]] = [[] for _ in range(rows)]  # the slots that each beam really consists of
    parents = None
    for step in range(steps):
        # a block a token, as late beams need; the other slots of larger blocks stay empty here
        slots = cache.reserve(sequences, block_size)[0].reshape(rows, block_size)
        blocks = torch.from_numpy(slots[:, 0] // block_size).int().to(device)
        table[:, step] = blocks
        if parents is not None:
            prefix = torch.full((rows,), step, dtype=torch.int32, device=device)
            stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
            _csrc.permute_tables(table, spare, torch.from_numpy(parents).to(device), prefix, stream)
            table, spare = spare, table
            history = [list(history[parent]) for parent in parents]
            cache.permute(sequences, parents, block_size)  # a step late: `step` is already reserved
        for row, block in enumerate(blocks.tolist()):
            history[row].append(block)
        cache.check_integrity()
        assert table[:, : step + 1].tolist() == history
        assert [cache.table(sequence).tolist() for sequence in sequences] == history
        parents = np.repeat(np.arange(lines) * beams, beams) + rng.integers(0, beams, rows)
    assert cache.num_used < rows * steps  # beams that no other beam went on from were freed
