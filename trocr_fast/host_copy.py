"""Tensors on their way to the host, or from there; the host does not wait for them before it needs them."""

import torch
from torch import Tensor


class HostCopy:
    """Copies of tensors as they are now, or will be when the device's current stream gets here."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._ready: torch.cuda.Event | None = None
        self._tensors = {}
        for name, tensor in tensors.items():
            on_gpu = tensor.device.type == "cuda"
            # Pinned, or the host would wait for the stream. torch reuses it only after the copy.
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
            self._tensors[name] = host.copy_(tensor, non_blocking=on_gpu)
            if on_gpu:
                self._ready = torch.cuda.Event()
                self._ready.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> dict[str, Tensor]:
        """The copies, on the host."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._tensors


def to_device(values: list[int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers as a tensor, without waiting for what the device does at the moment."""
    on_gpu = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=on_gpu).to(device, non_blocking=on_gpu)
