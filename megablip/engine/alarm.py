"""An alarm for ranks that enter different modules.

Under ZeRO-3 each module that owns parameters gathers them, so a rank that
skips one makes other collective calls than the rest: at best a time-out that
names nobody, at worst a crash.  Here hooks that run before DeepSpeed's own
write down which modules a rank enters, forward and backward; a thread
compares the ranks' lists through the store.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from megablip.engine.topology import Topology
from megablip.errors import RankMismatchError

_AGREED = "alarm/agreed"
_UNITS = "q"  # entries travel as 64-bit integers


class CollectiveAlarm:
    """Writes down the modules that this rank enters, until `stop`.

    An entry is twice the module's number, plus one if it is entered backward;
    the start of step s is -(s + 1).

    Args:
        module: whose modules are watched; DeepSpeed has its hooks already, and these run before them.
        report: called by `poll` on the first rank, with the error, when lists differ.
    """

    def __init__(self, module: nn.Module, topology: Topology, report: Callable[[RankMismatchError], Any]):
        self._topology, self._report = topology, report
        self._entries: list[int] = []
        self._offset = 0  # entries before these, which all ranks agreed on
        self._published = -1
        self._compared = 0
        self._step_of_compared = 0
        self.stopped = False  # no entry is added any more
        self._names: list[str] = []
        self._handles = []
        for name, part in module.named_modules():
            if any(True for _ in part.parameters(recurse=False)):
                number = len(self._names)
                self._names.append(name or type(part).__name__)
                self._handles.append(part.register_forward_pre_hook(self._on_forward(number), prepend=True))
                self._handles.append(part.register_forward_hook(self._on_output(number)))

    def mark_step(self, step: int) -> None:
        self._entries.append(-(step + 1))

    def stop(self) -> None:
        """Take the hooks away; what was entered is still compared."""
        for handle in self._handles:
            handle.remove()
        self.stopped = True

    def poll(self, store: Any) -> None:
        """Publish this rank's list and, on the first rank, compare all; in the side channel's thread."""
        if self.stopped and not self._entries:
            return
        length = self._offset + len(self._entries)
        if length != self._published:
            content = array(_UNITS, [self._offset, *self._entries[: length - self._offset]])
            store.set(self._key(self._topology.rank), content.tobytes().hex())
            self._published = length
        if self._topology.is_first:
            self._compare(store)
        if store.check([_AGREED]):
            agreed = int(store.get(_AGREED))
            del self._entries[: agreed - self._offset]
            self._offset = max(agreed, self._offset)

    def _compare(self, store: Any) -> None:
        keys = [self._key(rank) for rank in range(self._topology.world)]
        if not store.check(keys):
            return
        lists = []
        for text in store.multi_get(keys):
            content = array(_UNITS)
            content.frombytes(bytes.fromhex(text.decode()))
            lists.append(content[1 + self._compared - content[0] :])
        common = min(map(len, lists))
        for place in range(common):
            entries = [entered[place] for entered in lists]
            if len(set(entries)) > 1:
                self._report(self._error(entries))
                return
            if entries[0] < 0:
                self._step_of_compared = -entries[0] - 1
        if common:
            self._compared += common
            store.set(_AGREED, str(self._compared))

    def _error(self, entries: list[int]) -> RankMismatchError:
        ranks: dict[int, list[int]] = {}
        for rank, entry in enumerate(entries):
            ranks.setdefault(entry, []).append(rank)
        who = [f"{self._describe(entry)} on rank {', '.join(map(str, owners))}" for entry, owners in ranks.items()]
        return RankMismatchError(
            "ranks enter different modules: " + "; ".join(who),
            where=f"step {self._step_of_compared}",
            remedy="each rank must call the same modules in the same order, whatever its batch holds: let a dummy "
            "input with weight zero take the place of a skipped call",
        )

    def _describe(self, entry: int) -> str:
        if entry < 0:
            return f"the start of step {-entry - 1}"
        return f"{self._names[entry // 2]} ({'backward' if entry % 2 else 'forward'})"

    def _on_forward(self, number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._entries.append(2 * number)

        return hook

    def _on_output(self, number: int) -> Callable[..., None]:
        # A hook on the output's gradient runs before anything that DeepSpeed
        # does for the module's backward, and leaves the graph as it is.
        def on_gradient(gradient: torch.Tensor) -> None:
            self._entries.append(2 * number + 1)

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple | list) else [output]
            for part in parts:
                if isinstance(part, torch.Tensor) and part.requires_grad:
                    part.register_hook(on_gradient)
                    return

        return hook

    @staticmethod
    def _key(rank: int) -> str:
        return f"alarm/{rank}"
