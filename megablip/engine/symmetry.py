"""What ranks tell each other before each step.

A rank that is about to make other collective calls than the rest would hang
them all; comparing a small signature first turns that into an error that
names the rank.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

from megablip.engine.topology import Topology
from megablip.errors import RankMismatchError


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one rank knows before a step; all integers, to travel as one tensor.

    `step` and `micro_batches` must agree on all ranks; the rest is summed.
    """

    step: int
    micro_batches: int
    tokens: int
    documents: int
    valid_labels: int
    samples_done: int  # since the start of the run, by this rank's lanes
    stop: int  # 1 if this rank was asked to stop
    failed: int  # 1 if this rank could not get its data


_MUST_AGREE = ("step", "micro_batches")


def exchange(report: StepReport, topology: Topology) -> StepReport:
    """The sum of all ranks' reports, by the one control collective of a step.

    Raises:
        RankMismatchError: ranks are at different steps, or would make
            different numbers of forward calls.
    """
    import torch
    import torch.distributed as dist

    # Each rank fills its own row of zeros, so the sum is the gathered table.
    table = torch.zeros(topology.world, len(fields(StepReport)), dtype=torch.int64, device=topology.device)
    table[topology.rank] = torch.tensor(astuple(report), dtype=torch.int64)
    dist.all_reduce(table)
    reports = [StepReport(*row) for row in table.tolist()]
    for name in _MUST_AGREE:
        values = [getattr(other, name) for other in reports]
        if len(set(values)) > 1:
            raise RankMismatchError(
                f"ranks disagree on {name}: {dict(enumerate(values))}",
                where=f"rank {topology.rank}, step {report.step}",
                remedy="start all ranks from the same checkpoint and recipe; if they were, this is a bug",
            )
    summed = {f.name: sum(getattr(other, f.name) for other in reports) for f in fields(StepReport)}
    return StepReport(**summed | {name: getattr(report, name) for name in _MUST_AGREE})
