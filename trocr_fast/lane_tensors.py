"""What a search knows of the lines of a decode batch: tensors with an entry for each lane."""

import torch
from torch import Tensor


class LaneTensors:
    """Tensors by name, [lanes, ...]; some have a column for each token of a line as their last dimension.

    Args:
        num_lanes: lines at most.
        line: what is known of a new line, by name; of those `by_token` the first columns.
        by_token: names of the tensors that grow with the lines. What lies behind a line's length means nothing.
    """

    def __init__(self, num_lanes: int, line: dict[str, Tensor], by_token: tuple[str, ...]) -> None:
        self._line, self._by_token = line, by_token
        self._tensors = {name: tensor.expand(num_lanes, *tensor.shape).clone() for name, tensor in line.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def admit(self, lane: int) -> None:
        """A new line in a lane."""
        self.put(lane, self._line)

    def move(self, source: int, target: int) -> None:
        """The line in a lane goes to another one."""
        for tensor in self._tensors.values():
            tensor[target] = tensor[source]

    def take(self, lane: int) -> dict[str, Tensor]:
        """All that is known of the line in a lane."""
        return {name: tensor[lane].clone() for name, tensor in self._tensors.items()}

    def put(self, lane: int, line: dict[str, Tensor]) -> None:
        """A line that was taken comes back, into any lane."""
        for name, tensor in self._tensors.items():
            if name in self._by_token:  # there may be more columns by now
                tensor[lane, ..., : line[name].shape[-1]] = line[name]
            else:
                tensor[lane] = line[name]

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
