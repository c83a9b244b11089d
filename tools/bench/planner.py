"""Planning: how fast a lane plans, and how full its sequences are.

Measuring a sample (reading and tokenizing it) is left out: lengths come from a
table.  Each image is one tile of 128 tokens, texts have log-normal lengths; the
means, about 160 and 1,230 tokens, are those of captions and of interleaved web
pages.  The tile budget is what a sequence can hold at most, so tokens alone decide.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from megablip.config import DataConfig
from megablip.data.order import SourceOrder
from megablip.data.pack import LanePlanner
from tools.bench.core import Row, median_seconds

SEQUENCE_LENGTH, TOKENS_PER_TILE, BUFFER = 4096, 128, 256
SAMPLES, SEQUENCES_A_CALL = 50_000, 400

# Most images of a document; median and sigma of its text's length in tokens.
TRACES = {"interleaved": (6, 650, 0.6), "captions": (1, 32, 0.5)}


def rows() -> list[Row]:
    planners = {name: make_planner(*trace) for name, trace in TRACES.items()}
    counts = {name: np.zeros(3, np.int64) for name in TRACES}  # sequences, documents, tokens

    def plan(name: str) -> None:
        for _ in range(SEQUENCES_A_CALL):  # keeping none: a growing heap would slow the garbage collector
            documents = planners[name].next_sequence().documents
            counts[name] += (1, len(documents), sum(document.tokens for document in documents))

    seconds = median_seconds({name: partial(plan, name) for name in TRACES})
    rows = []
    for name in TRACES:
        sequences, documents, tokens = counts[name].tolist()
        rate = documents / sequences * SEQUENCES_A_CALL / seconds[name]
        rows.append(Row(f"{name}_rate", rate, "documents/s", "higher", goal=50_000))
        rows.append(Row(f"{name}_fill", tokens / (sequences * SEQUENCE_LENGTH), "", "higher", goal=0.99))
    return rows


def make_planner(most_images: int, median_text: float, sigma: float) -> LanePlanner:
    rng = np.random.default_rng(0)
    tiles = rng.integers(1, most_images + 1, SAMPLES)
    tokens = tiles * TOKENS_PER_TILE + rng.lognormal(np.log(median_text), sigma, SAMPLES).astype(int)
    costs = list(zip(np.minimum(tokens, SEQUENCE_LENGTH).tolist(), tiles.tolist(), strict=True))
    source = {"name": "trace", "shards": "none", "schema": "interleaved", "weight": 1}
    budgets = {"sequence_length": SEQUENCE_LENGTH, "max_tiles": SEQUENCE_LENGTH // TOKENS_PER_TILE}
    data = DataConfig(sources=[source], **budgets, packing_buffer=BUFFER)
    order = SourceOrder("trace", np.array([SAMPLES]), lanes=1, seed=0)
    return LanePlanner(0, data, 0, [order], lambda address: costs[address.sample])
