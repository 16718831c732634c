"""What a search knows of the lines of a decode batch: tensors with an entry for each lane."""

import torch
from torch import Tensor

from trocr_fast.host_copy import to_device


class LaneTensors:
    """Tensors by name, [lanes, ...]; some have a column for each token of a line as their last dimension.

    Args:
        num_lanes: lines at most.
        line: what is known of a new line, by name; of those `by_token` the first columns.
        by_token: names of the tensors that grow with the lines. What lies behind a line's length means nothing.
    """

    def __init__(self, num_lanes: int, line: dict[str, Tensor], by_token: tuple[str, ...]) -> None:
        self._line, self._by_token = line, by_token
        self._device = next(iter(line.values())).device
        self._tensors = {name: tensor.expand(num_lanes, *tensor.shape).clone() for name, tensor in line.items()}
        self.version = 0  # changes when a tensor moves in memory

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def admit(self, lanes: list[int], own: dict[str, list[int]]) -> None:
        """New lines in some lanes.

        Args:
            own: by name, what is different in each of them; names that are not known here are left out.
        """
        places = to_device(lanes, self._device)
        self.put(places, self._line)
        for name in own.keys() & self._tensors.keys():
            tensor = self._tensors[name]
            tensor[places] = to_device(own[name], self._device, tensor.dtype)

    def gather(self, names: tuple[str, ...], lanes: list[int]) -> dict[str, Tensor]:
        """Some tensors, of some lanes only."""
        places = to_device(lanes, self._device)
        return {name: self._tensors[name][places] for name in names}

    def move(self, source: int, target: int) -> None:
        """The line in a lane goes to another one."""
        for tensor in self._tensors.values():
            tensor[target] = tensor[source]

    def take(self, lane: int) -> dict[str, Tensor]:
        """All that is known of the line in a lane."""
        return {name: tensor[lane].clone() for name, tensor in self._tensors.items()}

    def put(self, lanes: int | Tensor, line: dict[str, Tensor]) -> None:
        """A line that was taken comes back, into any lane, or the same into several, int64 [lanes]."""
        for name, tensor in self._tensors.items():
            if name in self._by_token:  # there may be more columns by now
                tensor[lanes, ..., : line[name].shape[-1]] = line[name]
            else:
                tensor[lanes] = line[name]

    def update(self, new: dict[str, Tensor], alive: Tensor) -> None:
        """Of the first lanes, those that are alive, bool [lanes], get new values."""
        for name, values in new.items():
            old = self._tensors[name][: len(alive)]
            torch.where(alive.view(-1, *[1] * (old.dim() - 1)), values, old, out=old)

    def make_room(self, columns: int) -> None:
        """Have at least so many columns."""
        for name in self._by_token:
            tensor = self._tensors[name]
            if tensor.shape[-1] < columns:
                wider = tensor.new_zeros((*tensor.shape[:-1], max(columns, 2 * tensor.shape[-1])))
                wider[..., : tensor.shape[-1]] = tensor
                self._tensors[name] = wider
                self.version += 1
