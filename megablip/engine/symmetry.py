"""What ranks tell each other before each step.

A rank that is about to make other collective calls than the rest would hang
them all; comparing a small report first turns that into an error that names
the rank.  Whatever else ranks must agree on at a step edge travels with it,
so that a step needs one control collective and no more.
"""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass, fields
from functools import cached_property
from importlib import metadata
from typing import Any, NoReturn

from megablip.data.loader import StepBatch
from megablip.engine.topology import Topology
from megablip.errors import MegablipError, RankMismatchError
from megablip.records import DIGESTS, MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one rank knows before a step; all integers, to travel as one tensor.

    The fields of MUST_AGREE are equal on all ranks; of the others a total is of use.
    """

    step: int
    micro_batches: int
    setup: int = 0  # `signature` of what this rank was started with
    calls: int = 0  # `signature` of the forwards that this rank is about to make
    skipped_steps: int = 0  # of this attempt, because loss or gradient was not finite
    tokens: int = 0
    documents: int = 0
    valid_labels: int = 0
    pairs: int = 0  # of a chosen and a rejected answer
    samples_done: int = 0  # since the start of the run, by this rank's lanes
    data_digest: int = 0  # of this rank's share; the total is taken modulo DIGESTS
    tiles: int = 0
    stop: int = 0  # 1 if this rank was asked to stop
    failed: int = 0  # 1 if this rank could not get its data
    save_due: int = 0  # 1 if this rank's clock asks for a checkpoint
    save_written: int = 0  # 1 if this rank has ended writing its part of the checkpoint in flight
    save_committed: int = 0  # 1 if this rank has ended committing it
    save_failed: int = 0  # 1 if what it ended so failed
    # Of the step before this one:
    nonfinite: int = 0  # micro-batches of this rank whose loss was not finite
    wants_keys: int = 0  # 1 if this rank wants that step's sample keys written down
    local_us: int = 0  # spent in parts without collectives
    data_wait_us: int = 0


MUST_AGREE = {
    "step": "start all ranks from the same checkpoint",
    "micro_batches": "give all ranks the same recipe",
    "setup": "give all ranks the same recipe, the same model folder and the same versions of megablip, torch, "
    "deepspeed and transformers",
    "calls": "each micro-batch needs a tile on every rank, if only a dummy: this is a fault of megablip, report it",
    "skipped_steps": "ranks must skip the same steps: this is a fault of the ZeRO strategy, report it",
}
"""Fields that must be equal on all ranks, and what to do where they aren't."""


@dataclass(frozen=True)
class StepReports:
    """The reports of all ranks."""

    by_rank: list[StepReport]

    @cached_property
    def total(self) -> StepReport:
        """Sums over ranks; what must agree is not summed."""
        values = {f.name: self.of(f.name) for f in fields(StepReport)}
        total = {name: of[0] if name in MUST_AGREE else sum(of) for name, of in values.items()}
        return StepReport(**total | {"data_digest": total["data_digest"] % DIGESTS})

    def of(self, name: str) -> list[int]:
        """A field of each rank, in rank order."""
        return [getattr(report, name) for report in self.by_rank]


def exchange(report: StepReport, topology: Topology) -> StepReports:
    """All ranks' reports, by the one control collective of a step.

    Raises:
        RankMismatchError: ranks differ in what must agree; names them.
    """
    import torch
    import torch.distributed as dist

    # Each rank fills its own row of zeros, so the sum is the gathered table.
    table = torch.zeros(topology.world, len(fields(StepReport)), dtype=torch.int64, device=topology.device)
    table[topology.rank] = torch.tensor(astuple(report), dtype=torch.int64)
    dist.all_reduce(table)
    names = [f.name for f in fields(StepReport)]
    reports = StepReports([StepReport(**dict(zip(names, row, strict=True))) for row in table.tolist()])
    if any(reports.of("failed")):
        return reports  # that rank has nothing to compare, and its error says more
    for name, remedy in MUST_AGREE.items():
        values = reports.of(name)
        if len(set(values)) > 1:
            raise RankMismatchError(
                f"ranks disagree on {name}: {_who_has_what(values)}",
                where=f"rank {topology.rank}, step {report.step}",
                remedy=remedy,
            )
    return reports


def report_of(batch: StepBatch | None, **fields: int) -> StepReport:
    """This rank's report on its share of the next step; None if it could not get it."""
    if batch is None:
        return StepReport(failed=1, **fields)
    return StepReport(
        calls=calls_signature(batch.micro_batches),
        tokens=batch.tokens,
        documents=batch.documents,
        valid_labels=batch.valid_labels,
        pairs=sum(micro_batch.pairs for micro_batch in batch.micro_batches),
        samples_done=batch.samples_done,
        data_digest=batch.data_digest,
        tiles=sum(len(micro_batch.tiles) for micro_batch in batch.micro_batches),
        **fields,
    )


def raise_failure(failure: MegablipError | None, topology: Topology) -> NoReturn:
    """End all ranks with what kept some from getting their data (a collective)."""
    texts = topology.gather(failure and f"{type(failure).__name__}: {failure}")
    if failure:
        raise failure
    rank, text = next((rank, text) for rank, text in enumerate(texts) if text)
    raise RankMismatchError(f"rank {rank} could not get its data: {text}")


def signature(*facts: Any) -> int:
    """63 bits that differ where facts do; facts are compared by their text."""
    return int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:8]) >> 1


def setup_signature(*facts: Any) -> int:
    """Of facts and of the versions that compute with them."""
    return signature(*facts, *map(_version, ("megablip", "torch", "deepspeed", "transformers")))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # megablip run from a checkout
        return "not installed"


def calls_signature(micro_batches: list[MicroBatch]) -> int:
    """Of what decides which modules a step enters: the sampler is called where there is a tile."""
    return signature([len(micro_batch.tiles) > 0 for micro_batch in micro_batches])


def _who_has_what(values: list[int]) -> str:
    """The ranks of each value, those of the rarest first: they are likely at fault."""
    ranks: dict[int, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    parts = []
    for value, owners in sorted(ranks.items(), key=lambda item: len(item[1])):
        some = ", ".join(map(str, owners[:8])) + (f" and {len(owners) - 8} more" if len(owners) > 8 else "")
        parts.append(f"{value} on rank{'s' if len(owners) > 1 else ''} {some}")
    return "; ".join(parts)
