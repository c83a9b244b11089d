"""Packing: how full sequences are, how even their tiles, and documents a second.

Reading and measuring samples is left out: lengths come from traces like three
kinds of data.  An image tile has 128 tokens, texts have log-normal lengths.
Fill is the share of a sequence's tokens that are real.  Rivals get the same
documents: TRL packs the whole trace at once; a buffer that is emptied each time
it is full has as many documents as ours, and best fit decreasing, too.

Imbalance is the largest number of tiles of eight ranks over their mean, in the
mean of the steps: the others wait for that rank's vision tower.
"""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_left, insort
from functools import cache, partial
from pathlib import Path

import numpy as np

from megablip.config import DataConfig
from megablip.data.lanes import LanePlanner
from megablip.data.order import SourceOrder
from megablip.data.pack import PackingBuffer
from megablip.records import PlannedDocument, SampleAddress
from tools.bench.core import Rival, Row, median_seconds
from tools.bench.rivals import call, venv

SEQUENCE_LENGTH, MAX_TILES, TOKENS_PER_TILE, BUFFER = 4096, 32, 128, 256
SAMPLES, RANKS = 20_000, 8

# Tiles of an image or a page and their shares; median and sigma of the text's length in tokens.
TRACES = {
    "captions": ([1], None, 34, 0.5),
    "interleaved": ([1, 2, 3, 4, 5, 6], None, 650, 0.6),
    "instruct": ([1, 5, 10], [0.4, 0.4, 0.2], 330, 0.6),
}


def rows() -> list[Row]:
    packing = {name: partial(pack_all, documents_of(name)) for name in TRACES}
    lanes = {f"lane_{name}": partial(plan_some, planner_of(name)) for name in TRACES}
    seconds = median_seconds(packing | lanes)
    rows = []
    for name, trl in zip(TRACES, trl_fills(), strict=True):
        documents = documents_of(name)
        fill, flushed = fill_of(pack_all(documents)), fill_of(flush_all(documents))
        rows += [
            Row(f"{name}_fill", fill, "", "higher", goal=0.99),
            Row(f"{name}_empty_trl", 1 - fill, "", "lower", goal=1, rival=Rival("TRL bfd", 1 - trl)),
            Row(f"{name}_empty_flush", 1 - fill, "", "lower", goal=3, rival=Rival("flush all", 1 - flushed)),
            Row(f"{name}_rate", len(documents) / seconds[name], "docs/s", "higher", goal=200_000),
            Row(f"{name}_lane_rate", SAMPLES / seconds[f"lane_{name}"], "docs/s", "higher", goal=50_000),
        ]
    tiles = tiles_by_rank("interleaved")
    rows.append(Row("imbalance_1", imbalance(tiles, 1), "", "lower", goal=1.25))
    rows.append(Row("imbalance_4", imbalance(tiles, 4), "", "lower", goal=1.10))
    return rows


@cache
def documents_of(name: str, seed: int = 0) -> list[PlannedDocument]:
    choices, shares, median_text, sigma = TRACES[name]
    rng = np.random.default_rng(seed)
    tiles = rng.choice(choices, SAMPLES, p=shares)
    tokens = tiles * TOKENS_PER_TILE + rng.lognormal(np.log(median_text), sigma, SAMPLES).astype(int)
    costs = zip(np.minimum(tokens, SEQUENCE_LENGTH).tolist(), tiles.tolist(), strict=True)
    return [PlannedDocument(SampleAddress(0, 0, number), *cost) for number, cost in enumerate(costs)]


def pack_all(documents: list[PlannedDocument]) -> list[tuple[PlannedDocument, ...]]:
    """Sequences of a trace, without the last ones, for which the buffer was not full."""
    buffer, sequences = PackingBuffer(SEQUENCE_LENGTH, MAX_TILES, BUFFER), []
    for document in documents:
        if len(buffer) == BUFFER:
            sequences.append(buffer.take())
        buffer.add(document)
    return sequences


def flush_all(documents: list[PlannedDocument]) -> list[list[PlannedDocument]]:
    """Best fit decreasing over one full buffer after another, none carried over."""
    sequences = []
    for start in range(0, len(documents), BUFFER):
        opened: list[tuple[int, int]] = []  # (tokens left, number of the sequence), by what is left
        for document in sorted(documents[start : start + BUFFER], key=lambda document: -document.tokens):
            place = bisect_left(opened, (document.tokens, 0))
            if place < len(opened):
                left, number = opened.pop(place)
            else:
                left, number = SEQUENCE_LENGTH, len(sequences)
                sequences.append([])
            sequences[number].append(document)
            insort(opened, (left - document.tokens, number))
    return sequences


def fill_of(sequences: list) -> float:
    tokens = sum(document.tokens for sequence in sequences for document in sequence)
    return tokens / (len(sequences) * SEQUENCE_LENGTH)


def trl_fills() -> list[float]:
    """TRL's fill of each trace."""
    python = venv("trl", ["torch==2.13.0", "trl", "datasets"])
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{name}.npy" for name in TRACES]
        for file, name in zip(files, TRACES, strict=True):
            np.save(file, [document.tokens for document in documents_of(name)])
        side = Path(__file__).with_name("trl_side.py")
        return json.loads(call([str(python), str(side), str(SEQUENCE_LENGTH), *map(str, files)]).splitlines()[-1])


def tiles_by_rank(name: str) -> np.ndarray:
    """int[ranks, steps], tiles of each rank's sequence, each rank with documents of its own."""
    ranks = [
        [sum(document.tiles for document in sequence) for sequence in pack_all(documents_of(name, seed))]
        for seed in range(RANKS)
    ]
    steps = min(map(len, ranks))
    return np.array([rank[:steps] for rank in ranks])


def imbalance(tiles: np.ndarray, sequences_per_step: int) -> float:
    steps = tiles.shape[1] // sequences_per_step
    sums = tiles[:, : steps * sequences_per_step].reshape(RANKS, steps, sequences_per_step).sum(axis=2)
    return float((sums.max(axis=0) / sums.mean(axis=0)).mean())


def planner_of(name: str) -> LanePlanner:
    """A whole lane: order, mixture, packing and state."""
    costs = [(document.tokens, document.tiles) for document in documents_of(name)]
    source = {"name": "trace", "shards": "none", "schema": "interleaved", "weight": 1}
    budgets = {"sequence_length": SEQUENCE_LENGTH, "max_tiles": MAX_TILES}
    data = DataConfig(sources=[source], **budgets, packing_buffer=BUFFER)
    order = SourceOrder("trace", np.array([SAMPLES]), lanes=1, seed=0)
    return LanePlanner(0, data, 0, 1, [order], lambda address: costs[address.sample])


def plan_some(planner: LanePlanner) -> None:
    left = SAMPLES
    while left > 0:
        left -= len(planner.next_sequence().documents)
