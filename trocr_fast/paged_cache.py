"""Self-attention keys and values of many sequences, in blocks that they can join, leave and share without copies.

Who owns which block is decided by `csrc/paged_cache.h`, bytes are moved by `csrc/kv_memory.h`; the memory itself is a
torch tensor, so that it shows in torch's own statistics. Here the two are put together.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from trocr_fast import _csrc
from trocr_fast._csrc import OutOfBlocks

__all__ = ["BLOCK_SIZE", "OutOfBlocks", "PagedKV", "PagedStep", "StepBuffers", "Swapped"]

# A line has some eleven tokens: in larger blocks most of it would lie in a part-filled one, which every beam step would
# have to copy (docs/decisions.md).
BLOCK_SIZE = 1


@dataclass(frozen=True)
class Swapped:
    """Sequences whose blocks were moved to host memory, in the order in which they come back."""

    detached: _csrc.Detached
    host: Tensor  # [blocks, layers, 2, block_size, heads, head_dim], pinned if they came from a GPU


def has_native(device: torch.device) -> bool:
    """Whether csrc moves bytes there; else PyTorch's indexing does, as on a GPU with the build for CPUs."""
    return device.type == "cpu" or _csrc.BUILD == "cuda"


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one: torch exports tensors of no other."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def stream_of(device: torch.device) -> int:
    """The device's current stream as csrc takes it."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


_LOCK = Lock()
# Host memory that a GPU may still read or write, whatever became of the cache that swapped.
_LEAVING: list[tuple[torch.cuda.Event, Tensor]] = []


class PagedKV:
    """Blocks of keys and values, and the sequences that hold them.

    Args:
        num_layers, num_heads, head_dim: of the decoder.
        num_blocks: blocks to begin with.
        max_tokens: of one sequence.
        dtype: float32, float16 or bfloat16.
        block_size: tokens a block, a power of two from 1 to 64.

    Raises:
        ValueError: any of the sizes, named.

    Used by one thread at a time. Work on a GPU is enqueued on the device's current stream.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        num_blocks: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        for name, size in (("num_layers", num_layers), ("num_heads", num_heads), ("head_dim", head_dim)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.cache = _csrc.PagedCache(num_blocks, block_size, -(-max_tokens // max(block_size, 1)))
        # Blocks first, so that a block is copied or swapped in one piece (csrc/kv_memory.h).
        self._block_shape = (num_layers, 2, block_size, num_heads, head_dim)
        self._bind(self._allocate(num_blocks, dtype, device))

    def _allocate(self, num_blocks: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        # Without csrc a padding slot is written, too: to a block of its own, behind all others.
        padding = 0 if has_native(device) else 1
        return torch.empty((num_blocks + padding, *self._block_shape), dtype=dtype, device=device)

    def _bind(self, memory: Tensor) -> None:
        self._padded = memory
        self.memory = memory[: self.cache.num_blocks]  # [blocks, layers, 2, block_size, heads, head_dim]
        self._native = None
        if has_native(memory.device):
            with on_device(self._padded.device):
                self._native = _csrc.KVMemory(self.memory)

    def grow(self, num_blocks: int) -> None:
        """Have `num_blocks` blocks, the present ones with their content among them.

        The memory moves: what was recorded as a CUDA graph points to the old one (`Lanes.version`).

        Raises:
            ValueError: fewer than now.
        """
        if num_blocks < self.cache.num_blocks:
            raise ValueError(f"num_blocks: expected at least {self.cache.num_blocks}, got {num_blocks}")
        memory = self._allocate(num_blocks, self.memory.dtype, self.memory.device)
        memory[: self.memory.shape[0]] = self.memory
        self.cache.grow(num_blocks)  # last: it cannot fail where allocating did not
        self._bind(memory)

    def reserve(self, sequences: np.ndarray, num_tokens: int | np.ndarray = 1) -> np.ndarray:
        """Room for more tokens of each sequence, for all or for none.

        Args:
            sequences: int64 [sequences], each once.
            num_tokens: of each, or int64 [sequences].

        Returns:
            int64 slot of every new token, sequence by sequence. Blocks that were shared and part-filled are copied.

        Raises:
            OutOfBlocks: nothing has changed.
            ValueError: an unknown sequence, or one that would outgrow `max_tokens`; nothing has changed.
        """
        slot_mapping, copies = self.cache.reserve(sequences, num_tokens)
        if len(copies):
            self.copy_blocks(torch.from_numpy(copies))
        return slot_mapping

    def copy_blocks(self, pairs: Tensor) -> None:
        """Copy whole blocks; pairs int32 [pairs, (source, destination)], on the host.

        On a GPU this takes a little memory for the pairs; blocks of one token are never copied.
        """
        if self.memory.device.type == "cuda":  # from pinned memory, so that the host does not wait for the stream
            pairs = pairs.pin_memory().to(self.memory.device, non_blocking=True)
        if self._native:
            with on_device(self._padded.device):
                self._native.copy_blocks(pairs, stream_of(self.memory.device))
        else:
            self.memory[pairs[:, 1].long()] = self.memory[pairs[:, 0].long()]

    def write(self, layer: int, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        """Store keys and values of new tokens.

        Args:
            k, v: [tokens, heads, head_dim]; the first stride is free.
            slot_mapping: int64 [tokens]; -1 writes nothing.

        Raises:
            ValueError: a wrong shape, dtype, stride or device, by name; on a CPU also a slot outside the memory.
        """
        if self._native:
            with on_device(self._padded.device):
                self._native.write(layer, k, v, slot_mapping, stream_of(self.memory.device))
            return
        block_size = self._block_shape[2]
        slots = torch.where(slot_mapping < 0, self.cache.num_blocks * block_size, slot_mapping)
        block, offset = slots // block_size, slots % block_size
        self._padded[block, layer, 0, offset] = k
        self._padded[block, layer, 1, offset] = v

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        slot_mapping: Tensor,
    ) -> Tensor:
        """`write` new tokens, then attend over those of each row, the new one among them; in fp32 on a CPU.

        Args:
            q, k, v: fp32 [rows, heads, head_dim], q scaled; the first stride is free.
            block_tables: int32 [rows, max_blocks].
            context_lens: int32 [rows], tokens of each row.
            slot_mapping: int64 [rows]; -1 writes nothing.

        Returns:
            [rows, heads * head_dim]; zeros for a row of length 0.

        Raises:
            ValueError: as for `write`.
        """
        assert self._native
        out = q.new_empty((q.shape[0], q.shape[1] * q.shape[2]))
        self._native.attend(layer, q, k, v, block_tables, context_lens, slot_mapping, out)
        return out

    def gather(self, layer: int, block_tables: Tensor, context_lens: Tensor, k: Tensor, v: Tensor) -> None:
        """Keys and values of rows side by side, zeros after a row's end.

        Args:
            block_tables: int32 [rows, max_blocks].
            context_lens: int32 [rows], tokens of each row.
            k, v: [rows, heads, keys, head_dim], written.

        Raises:
            ValueError: as for `write`.
        """
        if self._native:
            with on_device(self._padded.device):
                self._native.gather(layer, block_tables, context_lens, k, v, stream_of(self.memory.device))
            return
        tokens = torch.arange(k.shape[2], device=k.device)
        beyond = tokens >= context_lens.unsqueeze(1)  # [rows, keys]
        block_size = self._block_shape[2]
        columns = (tokens // block_size).clamp(max=block_tables.shape[1] - 1)
        blocks = block_tables[:, columns].long().masked_fill(beyond, 0)
        for side, out in ((0, k), (1, v)):
            values = self.memory[blocks, layer, side, tokens % block_size]  # [rows, keys, heads, head_dim]
            out.copy_(values.masked_fill(beyond[..., None, None], 0).transpose(1, 2))

    def swap_out(self, sequences: np.ndarray) -> Swapped:
        """Move sequences to host memory and free their blocks; what they share among each other stays shared.

        On a GPU the copy is only enqueued: host memory holds the bytes once the stream got there.

        Raises:
            ValueError: an unknown sequence; nothing has changed.
        """
        num_blocks = len({block for sequence in sequences for block in self.cache.table(sequence).tolist()})
        on_gpu = self.memory.device.type == "cuda"
        # before anything changes: pinned memory is what there may be none of
        host = torch.empty((num_blocks, *self._block_shape), dtype=self.memory.dtype, pin_memory=on_gpu)
        detached, blocks = self.cache.detach(sequences)
        if self._native:
            with on_device(self._padded.device):
                self._native.swap_out(blocks, host, stream_of(self.memory.device))
            self._keep(host)
        else:
            host.copy_(self.memory[torch.from_numpy(blocks).long().to(self.memory.device)], non_blocking=True)
        return Swapped(detached, host)

    def swap_in(self, swapped: Swapped) -> np.ndarray:
        """Bring sequences back with the same bytes; their new ids, int64 [sequences].

        Raises:
            OutOfBlocks, ValueError: too few free blocks; sequences of another cache. Nothing has changed.
        """
        expected = (swapped.detached.num_blocks, *self._block_shape)
        if tuple(swapped.host.shape) != expected or swapped.host.dtype != self.memory.dtype:
            raise ValueError(
                f"swapped: expected {list(expected)} {self.memory.dtype}, "
                f"got {list(swapped.host.shape)} {swapped.host.dtype}"
            )
        sequences, blocks = self.cache.attach(swapped.detached)
        if self._native:
            with on_device(self._padded.device):
                self._native.swap_in(blocks, swapped.host, stream_of(self.memory.device))
            self._keep(swapped.host)
        else:
            target = torch.from_numpy(blocks).long().to(self.memory.device)
            self.memory[target] = swapped.host.to(self.memory.device, non_blocking=True)
        return sequences

    def _keep(self, host: Tensor) -> None:
        """Hold pinned memory until the stream is done with it: torch does not know of copies that it did not make."""
        if self.memory.device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.memory.device))
            with _LOCK:
                _LEAVING[:] = [(other, kept) for other, kept in _LEAVING if not other.query()] + [(event, host)]


@dataclass(frozen=True)
class PagedStep:
    """Where the tokens of a decode step go in the cache, and what their rows look at."""

    cache: PagedKV
    slot_mapping: Tensor  # int64 [rows], of the new tokens; -1 stores nothing
    context_lens: Tensor  # int32 [rows], the new token counted; 0: a row that is not there
    block_tables: Tensor  # int32 [rows, max_blocks]
    longest: int  # of context_lens, known without asking the device
    num_counted: Tensor  # int64 [rows], the tokens of each row that are no pad token, the new one not yet among them


class StepBuffers:
    """What a decode step reads of the cache, in device buffers that stay where they are.

    A step's tables, lengths and slots are filled on the host and go to the device in one copy, which a captured graph
    can follow. The host side is a ring of pinned buffers; one is used again only when its copy has been made, so that
    the host may be steps ahead and yet never waits in the usual case.

    Args:
        max_rows, max_blocks: of the largest step; a row's table may be as long.
        depth: host buffers of the ring.
    """

    def __init__(self, max_rows: int, max_blocks: int, device: torch.device, depth: int = 3) -> None:
        self._max_rows, self._max_blocks = max_rows, max_blocks
        num_bytes = max_rows * (8 + 4 + 4 * max_blocks)
        self._device_bytes = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.slot_mapping, self.context_lens, self.block_tables = self._views(self._device_bytes)
        self._on_gpu = device.type == "cuda"
        self._ring = [self._device_bytes]  # on a CPU, what the step reads is filled in place
        if self._on_gpu:
            self._ring = [torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(depth)]
            self._copied = [torch.cuda.Event() for _ in range(depth)]  # one that was never recorded has happened
        self._ring_views = [tuple(view.numpy() for view in self._views(buffer)) for buffer in self._ring]
        self._step = 0
        self._permuted = torch.zeros_like(self.block_tables)

    def _views(self, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slots int64 [rows], lengths int32 [rows] and tables int32 [rows, blocks], widest first to be aligned."""
        rows = self._max_rows
        slots, lengths, tables = buffer.split([8 * rows, 4 * rows, 4 * rows * self._max_blocks])
        return slots.view(torch.int64), lengths.view(torch.int32), tables.view(torch.int32).view(rows, self._max_blocks)

    def fill(self, cache: _csrc.PagedCache, sequences: Sequence[int] | np.ndarray, slot_mapping: np.ndarray) -> None:
        """Set the buffers for a step of these rows; rows behind them get length 0 and slot -1.

        Args:
            sequences: int64 [rows].
            slot_mapping: int64 [rows], of the token that the step appends.
        """
        place = self._step % len(self._ring)
        self._step += 1
        if self._on_gpu:
            self._copied[place].synchronize()
        slots, lengths, tables = self._ring_views[place]
        rows = len(sequences)
        cache.fill_tables(sequences, tables, lengths)
        slots[:rows] = slot_mapping
        slots[rows:], lengths[rows:] = -1, 0
        if self._on_gpu:
            self._device_bytes.copy_(self._ring[place], non_blocking=True)
            self._copied[place].record(torch.cuda.current_stream(self._device_bytes.device))

    def permute(self, parents: Tensor) -> Tensor:
        """Block tables of the first rows, each its parent's but for the token that the step appends.

        With blocks of one token.

        Args:
            parents: int64 [rows], on the device.

        Returns:
            int32 [rows, blocks]; the same memory at every call.
        """
        rows = len(parents)
        source, target = self.block_tables[:rows], self._permuted[:rows]
        prefix = self.context_lens[:rows] - 1
        if has_native(source.device):
            with on_device(source.device):
                _csrc.permute_tables(source, target, parents, prefix, stream_of(source.device))
        else:
            is_prefix = torch.arange(source.shape[1], device=source.device) < prefix.unsqueeze(1)
            torch.where(is_prefix, source[parents], source, out=target)
        return target
