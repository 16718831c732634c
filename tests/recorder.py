"""Records and replays work on a CPU the way a CUDA graph does on a GPU.

Calls are recorded with their arguments, numbers by value and tensors by address; a replay makes the same calls on the
same memory and puts results where they were. So what is fixed by mistake, or read from a tensor that has moved, gives
wrong tokens here as it would there. As under a capture, recording itself changes nothing, and what would wait for the
device is an error.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trocr_fast import _csrc

# What these give depends on values of tensors, so the host has to wait for them.
WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
BY_ARGUMENTS = {"aten::index", "aten::repeat_interleave"}  # which wait for some arguments only


class Recorder(TorchDispatchMode):
    """A recorder as `trocr_fast.recording` has them."""

    num_recorded = num_replayed = 0  # of all recorders

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[Callable[[], object]]
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]]  # by address; with what they held
        self._from_host: list[Tensor]  # not there yet

    def __call__(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self._calls, self._before, self._from_host = [], {}, []
        try:
            with pytest.MonkeyPatch.context() as patch, self:
                # not PyTorch's, so they are not seen
                for name in ("write", "gather", "attend"):
                    patch.setattr(_csrc.KVMemory, name, self._noting(getattr(_csrc.KVMemory, name)))
                for name in ("permute_tables", "encoder_attention", "latent_cross_attention"):
                    patch.setattr(_csrc, name, self._noting(getattr(_csrc, name)))
                result = work()
        finally:
            for storage, content in self._before.values():
                storage.copy_(content)
            calls, self._calls, self._before, self._from_host = self._calls, [], {}, []
        Recorder.num_recorded += 1

        def replay() -> None:
            for call in calls:
                call()
            Recorder.num_replayed += 1

        return replay, result

    def _noting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What csrc writes needs no undoing: the replay writes it again before it is read."""

        def noted(*arguments: Any) -> Any:
            self._calls.append(lambda: function(*arguments))
            return function(*arguments)

        return noted

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name
        from_host = any(any(one is other for other in self._from_host) for one in tensors((args, kwargs)))
        assert not from_host or name == "aten::fill_", f"{name} of a tensor from the host"  # fill_ takes its number
        assert name in BY_ARGUMENTS or WAITS.isdisjoint(function.tags), f"{name} waits for the device"
        if name in ("aten::index", "aten::index_put_"):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), f"{name} with a mask"
        if name == "aten::repeat_interleave":
            assert kwargs.get("output_size") is not None, f"{name} without output_size"
        given = list(zip(function._schema.arguments, args, strict=False))
        given += [(one, kwargs[one.name]) for one in function._schema.arguments if one.name in kwargs]
        written = [value for one, value in given if one.alias_info is not None and one.alias_info.is_write]
        for tensor in tensors(written):
            storage = tensor.untyped_storage()
            self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = function(*args, **kwargs)
        if name == "aten::lift_fresh":
            self._from_host.append(result)
        addresses = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
        new = [one.untyped_storage().data_ptr() not in addresses for one in tensors(result)]

        def again() -> None:
            found = function(*args, **kwargs)
            for is_new, target, source in zip(new, tensors(result), tensors(found), strict=True):
                if is_new:
                    target.copy_(source)

        if any(new) or written:  # else it is a view
            self._calls.append(again)
        return result


def tensors(tree: Any) -> Iterable[Tensor]:
    """Those of nested arguments, without weights in a layout that only oneDNN knows, which nobody writes."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and not leaf.is_mkldnn]
