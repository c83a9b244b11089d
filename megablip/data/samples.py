"""Samples by address: read, converted, encoded; what planning and decoding share."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import Progress

from megablip.config import CHAT_SCHEMAS, DataConfig, SourceConfig
from megablip.data.cache import ShardCache, is_url
from megablip.data.collate import lay_out
from megablip.data.encode import Encoder, cut_piece, segments_of
from megablip.data.images import JPEG_START
from megablip.data.index import count_samples
from megablip.data.lanes import LanePlanner
from megablip.data.members import MAX_IMAGE_BYTES
from megablip.data.order import ShardOrder, SourceOrder
from megablip.data.schemas import SCHEMAS
from megablip.data.shards import HeadRule, ShardSource, expand_shards
from megablip.errors import MegablipError, PackingError, SampleError
from megablip.records import (
    DecodedDocument,
    Document,
    EncodedDocument,
    PackedSequence,
    PlannedDocument,
    PlannedSequence,
    SampleAddress,
    Skip,
    VisualLayout,
)

READ_AHEAD_BYTES = 16 << 20  # of images that are read and not decoded yet, by a decode worker
HELD_BYTES = 64 << 20  # of documents that are cut, held while their pieces are asked for


@dataclass(frozen=True)
class Setup:
    """What planning and decoding need to know of a run."""

    data: DataConfig
    lanes: int
    sequences_per_lane: int
    seed: int
    epochs: int | None  # of a stage that is counted in them
    allow_source_changes: bool
    tokenizer_path: str
    layout: VisualLayout
    shards: list[list[str]]  # of each source
    lane_states: dict[int, np.ndarray | None]  # of the lanes to plan, in order


def _is_jpeg(head: bytes, size: int) -> bool:
    """Whether the head of a member is enough to measure it: a JPEG's size in pixels is nearly always there."""
    return head.startswith(JPEG_START) and size <= MAX_IMAGE_BYTES  # what is larger is refused for its length


def open_sources(data: DataConfig, shards: list[list[str]]) -> list[ShardSource]:
    """The sources of a recipe; remote shards go through the node's cache."""
    folder = data.cache_dir or Path(tempfile.gettempdir()) / f"megablip-shards-{os.getuid()}"
    cache = ShardCache(folder, data.cache_bytes)
    return [ShardSource(source.name, paths, cache=cache) for source, paths in zip(data.sources, shards, strict=True)]


def index_sources(data: DataConfig) -> None:
    """Index the local shards that have no index yet, so that no rank has to: finds those that can't be used.

    Raises:
        ShardError: a source without shards, or one with a shard that can't be used.
    """
    with Progress(transient=True) as progress:
        for source in data.sources:
            paths = [path for path in expand_shards(source.shards) if not is_url(path)]
            if source.order == "samples":
                count_samples(paths, len(os.sched_getaffinity(0)), progress)


class SampleReader:
    """Samples by address, through schema and encoder."""

    def __init__(self, setup: Setup):
        self.sources = open_sources(setup.data, setup.shards)
        self._configs = setup.data.sources
        self._held: dict[SampleAddress, list[EncodedDocument]] = {}  # the one used last is the last
        self.encoder = Encoder(setup.tokenizer_path, setup.layout, dct_scaling=setup.data.dct_scaling)
        if any(config.schema_name in CHAT_SCHEMAS for config in self._configs):
            self.encoder.require_chat()

    def encoded(self, address: SampleAddress) -> list[EncodedDocument]:
        """The sample's one document, or the two of a preference pair.

        Raises:
            SampleError: it can't be used.
        """
        return [self.encoder.encode(document) for document in self._documents(address)]

    def measure(self, address: SampleAddress) -> tuple[int, int]:
        """(tokens, tiles) of a sample, from its text and the headers of its images.

        Raises:
            SampleError: it can't be used.
        """
        try:
            documents = self._documents(address, _is_jpeg)
            costs = [self.encoder.measure(document) for document in documents]
        except SampleError:  # perhaps for want of what comes after the heads
            costs = [self.encoder.measure(document) for document in self._documents(address)]
        return sum(tokens for tokens, _ in costs), sum(tiles for _, tiles in costs)

    def segments(self, address: SampleAddress) -> list[tuple[int, int]]:
        """(tokens, tiles) of each part that a long document may be cut into; none for a preference pair."""
        documents = self.encoded(address)
        return segments_of(documents[0]) if len(documents) == 1 else []

    def piece(self, planned: PlannedDocument) -> list[EncodedDocument]:
        """The planned documents.

        Raises:
            SampleError: the sample can't be used.
            PackingError: it is not what was planned.
        """
        is_cut = bool(planned.start or not planned.last)
        documents = self._encoded_once(planned.address) if is_cut else self.encoded(planned.address)
        total = sum(len(document.input_ids) for document in documents)
        end = planned.start + planned.tokens
        fits = total == end if planned.last else total > end
        if fits and is_cut:
            documents = [cut_piece(documents[0], planned.start, planned.tokens)]
        if not fits or sum(document.tiles for document in documents) != planned.tiles:
            raise PackingError(
                f"planned with {planned.tiles} tiles and to end at token {end}, "
                f"but it has {sum(document.tiles for document in documents)} tiles and {total} tokens",
                where=f"source {documents[0].source}, key {documents[0].key}",
                remedy="the tokenizer, the layout or the shard changed since: undo that, or start a new run",
            )
        return documents

    def _encoded_once(self, address: SampleAddress) -> list[EncodedDocument]:
        """As `encoded`, for a sample whose pieces come one after another, those of a few samples in turn."""
        self._held[address] = documents = self._held.pop(address, None) or self.encoded(address)
        while sum(map(_size_bytes, self._held.values())) > HELD_BYTES:
            del self._held[next(iter(self._held))]
        return documents

    def _documents(self, address: SampleAddress, is_enough: HeadRule | None = None) -> tuple[Document, ...]:
        config: SourceConfig = self._configs[address.source]
        key, members = self.sources[address.source].read(address.shard, address.sample, is_enough)
        return SCHEMAS[config.schema_name](members, config, key)

    def skip(self, address: SampleAddress, error: SampleError) -> Skip:
        """The quarantine's record of a sample that could not be used."""
        source = self.sources[address.source]
        shard, key, offset = source.where(address.shard, address.sample)
        return Skip(source.name, shard, key, offset, str(error))

    def damage_after(self, address: SampleAddress) -> list[Skip]:
        """The quarantine's records of what is damaged between a sample and the next one of its shard.

        Told with that sample, a damaged place is told once an epoch, at a step that no number of ranks changes.
        """
        source, shard, sample = self.sources[address.source], address.shard, address.sample
        damages = source.damage(shard)
        if not damages:
            return []
        path, _, start = source.where(shard, sample)
        start = start if sample else 0
        end = source.where(shard, sample + 1)[2] if sample + 1 < source.count(shard) else math.inf
        return [
            Skip(source.name, path, "", damage.offset, f"the shard is damaged: {damage}")
            for damage in damages
            if start <= damage.offset < end
        ]


def _size_bytes(documents: list[EncodedDocument]) -> int:
    ids = sum(document.input_ids.nbytes + document.labels.nbytes for document in documents)
    return ids + sum(len(image.data) for document in documents for image in document.images)


def plan(setup: Setup, reader: SampleReader) -> Iterator[tuple[PlannedSequence, tuple[Skip, ...]]]:
    """The sequences of the lanes, index-major and without end, each with what was skipped on the way to it.

    Raises:
        SampleError, ShardError: as LanePlanner.next_sequence; `skipped` is what was skipped on the way there.
    """
    skipped: list[Skip] = []

    def on_skip(address: SampleAddress, error: SampleError) -> None:
        skipped.append(reader.skip(address, error))

    class Measure:
        """Also tells of damage beside the samples that it measures."""

        segments = staticmethod(reader.segments)

        def __call__(self, address: SampleAddress) -> tuple[int, int]:
            skipped.extend(reader.damage_after(address))
            return reader.measure(address)

    orders = [_order(setup, config, source) for config, source in zip(setup.data.sources, reader.sources, strict=True)]
    planners = [
        LanePlanner(
            lane, setup.data, setup.seed, setup.sequences_per_lane, orders, Measure(), on_skip, state,
            epochs=setup.epochs, allow_source_changes=setup.allow_source_changes,
        )
        for lane, state in setup.lane_states.items()
    ]  # fmt: skip
    for planner in planners:
        if planner.lane == 0 and planner.source_changes:  # the same for all lanes
            print("sources changed: " + "; ".join(planner.source_changes), flush=True)
    while True:
        for _ in range(setup.sequences_per_lane):
            for planner in planners:
                try:
                    planned = planner.next_sequence()
                except MegablipError as error:
                    error.skipped = tuple(skipped)
                    raise
                yield planned, tuple(skipped)
                skipped.clear()


def untouched_states(setup: Setup, step: int) -> dict[int, np.ndarray]:
    """The states of the lanes of a run that stands at `step` and has drawn none of its data yet.

    Raises:
        ShardError: a shard can't be used.
    """
    sources = open_sources(setup.data, setup.shards)
    orders = [_order(setup, config, source) for config, source in zip(setup.data.sources, sources, strict=True)]
    states = {}
    for lane in setup.lane_states:
        planner = LanePlanner(
            lane, setup.data, setup.seed, setup.sequences_per_lane, orders, measure=None, epochs=setup.epochs
        )
        planner.index = step * setup.sequences_per_lane
        states[lane] = planner.state
    return states


def _order(setup: Setup, config: SourceConfig, source: ShardSource) -> SourceOrder | ShardOrder:
    if config.order == "shards":
        return ShardOrder(source.name, len(source.paths), source.count, setup.lanes, setup.seed, source.names)
    return SourceOrder(source.name, source.counts, setup.lanes, setup.seed, source.names + source.headers)


def decode(
    reader: SampleReader, layout: VisualLayout, planned: PlannedSequence, skipped: tuple[Skip, ...], out: np.ndarray
) -> PackedSequence:
    """Turn a planned sequence into a packed one.

    Args:
        out: uint8[at least the planned tiles, 3, S, S]; the sequence's tiles are its front.
    """
    documents: list[DecodedDocument] = []
    encoder, tile = reader.encoder, 0
    for group in _read_ahead(reader, planned.documents):
        cut = []
        for piece, encoded in group:
            done, end = [], tile
            try:
                if isinstance(encoded, SampleError):
                    raise encoded
                for document in encoded:
                    start, end = end, end + document.tiles
                    masks = encoder.cut_images(document, out[start:end])
                    done.append((document, piece.address.source, out[start:end], masks))
            except SampleError as error:
                skipped += (reader.skip(piece.address, error),)
            else:
                cut += done
                tile = end
        documents += [encoder.with_pixels(*done) for done in cut]
    return lay_out(planned, documents, skipped, out[:tile], layout)


_Read = tuple[PlannedDocument, list[EncodedDocument] | SampleError]


def _read_ahead(reader: SampleReader, pieces: Sequence[PlannedDocument]) -> Iterator[list[_Read]]:
    """The pieces, many at a time, with their documents, or why there are none.

    Decoding an image drives all else from the core's caches, so what surrounds it is
    much faster many times in a row than once for each image.
    """
    ahead: list[_Read] = []
    size = 0
    for piece in pieces:
        try:
            documents = reader.piece(piece)
            size += sum(len(image.data) for document in documents for image in document.images)
            ahead.append((piece, documents))
        except SampleError as error:
            ahead.append((piece, error))
        if size > READ_AHEAD_BYTES:
            yield ahead
            ahead, size = [], 0
    yield ahead
