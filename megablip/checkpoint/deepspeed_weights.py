"""The weights of a DeepSpeed checkpoint, as a source of tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megablip.checkpoint.deepspeed_state import Fragment, TrainingState
from megablip.records import MASTER


class DeepSpeedWeights:
    """Masters, frozen parameters and buffers by the names of the model's state dict; a TensorSource."""

    def __init__(self, state: TrainingState):
        self.where = state.folder
        self.shapes: dict[str, tuple[int, ...]] = dict(state.shapes)
        self.buffers = set(state.buffers)
        self.aliases: set[str] = set()
        """Second names of tied parameters."""
        self._fragments: dict[str, list[Fragment]] = {name: [] for name in state.shapes}
        for fragment in state.fragments():
            self._fragments[fragment.name].append(fragment)
        for name, (shape, fragments) in state.frozen.items():
            self.shapes[name], self._fragments[name] = shape, fragments
        for name, buffer in state.buffers.items():
            self.shapes[name] = buffer.shape
            self._fragments[name] = [Fragment(name, 0, buffer.numel, {MASTER: (buffer, 0)})]
        for alias, name in state.shared.items():
            if name in self._fragments:
                self.shapes[alias], self._fragments[alias] = self.shapes[name], self._fragments[name]
                self.aliases.add(alias)
        for fragments in self._fragments.values():
            fragments.sort(key=lambda fragment: fragment.start)
        self.dtypes = {
            name: fragments[0].places[MASTER][0].dtype if fragments else torch.float32
            for name, fragments in self._fragments.items()
        }

    def pieces(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """First element and values of each stored stretch of a tensor, in order."""
        for fragment in self._fragments[name]:
            yield fragment.start, fragment.values(MASTER)

    def elements(self, name: str, start: int, end: int) -> torch.Tensor:
        """The elements [start, end) of a flattened tensor, in its own dtype."""
        found = [
            values[max(start - first, 0) : end - first]
            for first, values in self.pieces(name)
            if first < end and start < first + len(values)
        ]
        return found[0] if len(found) == 1 else torch.cat([torch.empty(0, dtype=self.dtypes[name]), *found])
