"""A step's global batch, rebuilt from the checkpoint before it; no file of the run is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from rich.progress import track

from megablip.checkpoint.commit import Checkpoint, committed, config_of, open_checkpoint
from megablip.config import Config, load_config
from megablip.data.images import empty_tiles
from megablip.data.loader import setup_of
from megablip.data.samples import SampleReader, decode, plan
from megablip.errors import CheckpointError, ConfigError
from megablip.model.layout import read_layout
from megablip.records import DIGESTS, IGNORE_LABEL, PackedSequence, VisualLayout


@dataclass(frozen=True)
class Sample:
    """A document of the batch. `shard` and `offset` (bytes) say where its sample lies."""

    source: str
    key: str
    shard: str
    offset: int
    tokens: int
    labels: int
    tiles: int


@dataclass(frozen=True)
class ReplayedSequence:
    packed: PackedSequence
    samples: list[Sample]  # one for each of its documents


@dataclass(frozen=True)
class ReplayedStep:
    """The global batch of a step, in its order.

    Attributes:
        step: from 1 on, as metrics.jsonl counts.
        config: that the step was trained with.
        checkpoint: the newest one before the step; None: the run had just begun.
    """

    step: int
    config: Config
    checkpoint: Checkpoint | None
    layout: VisualLayout
    sequences: list[ReplayedSequence]

    @property
    def digest(self) -> str:
        """As `data_digest` in metrics.jsonl."""
        return f"{sum(sequence.packed.digest for sequence in self.sequences) % DIGESTS:016x}"

    @property
    def steps_before(self) -> int:
        """Steps that the weights before this one are ahead of the checkpoint."""
        return self.step - 1 - (self.checkpoint.step if self.checkpoint else 0)


def rebuild(run_dir: Path, step: int, say: Callable[[str], None]) -> ReplayedStep:
    """The global batch of a step of a run.

    Raises:
        ConfigError: no such run, or a step below 1.
        CheckpointError, ShardError, PackingError: lane states, shards or tokenizer are not those of the run.
    """
    if step < 1:
        raise ConfigError("steps are counted from 1", where=f"--step {step}", remedy="as metrics.jsonl does")
    checkpoint, config = _checkpoint_before(run_dir, step, say), _config_of(run_dir, step)
    begin = checkpoint.step if checkpoint else 0
    layout = read_layout(config.model)
    setup = setup_of(
        config,
        config.model.path,
        layout,
        range(config.batch.lanes),
        checkpoint.lane_states() if checkpoint else None,
        begin,
    )
    reader = SampleReader(setup)
    planned = plan(setup, reader)
    per_step = config.batch.lanes * config.batch.sequences_per_lane
    for _ in track(range(begin, step - 1), f"planning from step {begin}", transient=True, disable=begin == step - 1):
        for _ in islice(planned, per_step):
            pass
    sequences = [_decoded(reader, layout, *item) for item in islice(planned, per_step)]
    return ReplayedStep(step, config, checkpoint, layout, sequences)


def _decoded(reader: SampleReader, layout: VisualLayout, planned, skipped) -> ReplayedSequence:
    tiles = sum(document.tiles for document in planned.documents)
    out = empty_tiles(tiles, layout.tile_size)
    packed = decode(reader, layout, planned, (), out)
    return ReplayedSequence(packed, list(_samples(reader, layout, planned, packed)))


def _samples(reader: SampleReader, layout: VisualLayout, planned, packed: PackedSequence) -> Iterator[Sample]:
    failed = {(skip.source, skip.shard, skip.key, skip.offset) for skip in packed.skipped}
    ends = np.cumsum(packed.doc_lens)
    first_tokens = packed.visual_positions[layout.spans(packed.grids)[0]]  # of each image
    number = 0
    for piece in planned.documents:
        source = reader.sources[piece.address.source]
        shard, key, offset = source.where(piece.address.shard, piece.address.sample)
        if (source.name, shard, key, offset) in failed:
            continue
        # A preference pair is two documents of one sample.
        for _ in range(2 if packed.pair[number] >= 0 else 1):
            start, end = ends[number] - packed.doc_lens[number], ends[number]
            grids = packed.grids[(first_tokens >= start) & (first_tokens < end)]
            yield Sample(
                source=source.name,
                key=packed.keys[number],
                shard=shard,
                offset=offset,
                tokens=int(packed.doc_lens[number]),
                labels=int((packed.labels[start:end] != IGNORE_LABEL).sum()),
                tiles=int((1 + grids.prod(axis=1)).sum()),
            )
            number += 1


def _checkpoint_before(run_dir: Path, step: int, say: Callable[[str], None]) -> Checkpoint | None:
    for folder in reversed(committed(run_dir / "checkpoints")):
        if _step_of(folder) < step:
            try:
                return open_checkpoint(folder)
            except CheckpointError as error:
                say(f"{folder.name} is passed over: {error.what}")
    return None


def _config_of(run_dir: Path, step: int) -> Config:
    """The recipe as it was at a step: a run may go on with another one, as far as that is allowed."""
    for folder in committed(run_dir / "checkpoints"):
        if _step_of(folder) >= step:
            with suppress(CheckpointError):
                return config_of(folder)
    return load_config(run_dir / "config.yaml")


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))
