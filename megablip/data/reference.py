"""What the reference model says of preference pairs, computed once and kept beside their shards.

    SHARD.reference.jsonl
        {"version": 1, "headers": "<fingerprint of the shard>", "base": {...}, "rule": {...}}
        {"key": "...", "ids": "<digest>", "chosen": -81.25, "rejected": -97.5}      one line a pair

`base` is what the reference is: hashes of its weights and tokenizer, its sampler.
`rule` is how a pair becomes ids and pixels, and which pairs fit a sequence.  Scores
of another base or another rule are refused, as are those of a shard that changed
since; `ids` tells that a pair is still the one that was scored.

tools/reference_scores.py writes these files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megablip.config import Config
from megablip.data.cache import is_url
from megablip.data.index import open_shard, valid_head
from megablip.data.shards import expand_shards
from megablip.errors import ShardError
from megablip.records import MicroBatch, VisualLayout

VERSION = 1
_MAKE = "make them with `python -m tools.reference_scores RECIPE`"


@dataclass(frozen=True, slots=True)
class PairScore:
    """Log-probabilities of a pair's answers, summed over their labels, and the digest of the pair's ids."""

    ids: str
    chosen: float
    rejected: float


def scores_path(shard: str) -> str:
    return f"{shard}.reference.jsonl"


def ids_digest(input_ids: np.ndarray) -> str:
    """Of the ids of a pair, chosen before rejected, int[n]."""
    return hashlib.blake2b(np.ascontiguousarray(input_ids, "<i4").tobytes(), digest_size=8).hexdigest()


def made_from(config: Config, base: dict[str, str], layout: VisualLayout) -> dict[str, Any]:
    """What scores depend on beside the shard; equal for those that a run may use.

    Args:
        base: as of checkpoint.export.base_of.
    """
    data = config.data
    rule = {
        "sequence_length": data.sequence_length,
        "max_tiles": data.max_tiles,
        "dct_scaling": data.dct_scaling,
        "precision": config.engine.precision,
        "layout": asdict(layout),
    }
    # As JSON has it, for tuples come back as lists.
    return json.loads(json.dumps({"base": base, "rule": rule}))


def write_scores(shard: str, made: dict[str, Any], scores: dict[str, PairScore]) -> None:
    """The file beside a shard, whole or not at all.

    Args:
        made: `made_from`.
        scores: by key.
    """
    head = {"version": VERSION, "headers": _headers(shard), **made}
    lines = [head, *({"key": key, **asdict(score)} for key, score in scores.items())]
    temporary = f"{scores_path(shard)}.tmp"
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)
    os.replace(temporary, scores_path(shard))


def read_scores(shard: str, made: dict[str, Any]) -> dict[str, PairScore]:
    """The scores beside a shard, by key.

    Args:
        made: what they must have been made from.

    Raises:
        ShardError: none there, or damaged; or those of another base, another rule or another shard.
    """
    path = scores_path(shard)
    if is_url(shard):
        raise ShardError(
            "scores of the reference can't lie beside a remote shard",
            where=shard,
            remedy="copy the shards to a disk, or leave out preference.stored_reference",
        )
    try:
        with open(path, encoding="utf-8") as stream:
            head = json.loads(stream.readline())
            changes = _changes(head, made, _headers(shard))
            rows = [] if changes else [json.loads(line) for line in stream]
        scores = {row["key"]: PairScore(str(row["ids"]), float(row["chosen"]), float(row["rejected"])) for row in rows}
    except FileNotFoundError:
        raise ShardError("the shard has no scores of the reference beside it", where=shard, remedy=_MAKE) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ShardError(
            f"the reference's scores can't be read: {type(error).__name__}: {error}",
            where=path,
            remedy=f"delete the file and {_MAKE}",
        ) from None
    if changes:
        raise ShardError(
            "the reference's scores are not those of this run: " + "; ".join(changes),
            where=path,
            remedy=f"delete the file and {_MAKE}",
        )
    return scores


def _changes(head: dict[str, Any], made: dict[str, Any], headers: str) -> list[str]:
    if head["version"] != VERSION:
        return [f"they are of version {head['version']}"]
    found = ["the shard has changed"] if head["headers"] != headers else []
    for part, name in (("base", "another base"), ("rule", "another packing rule")):
        before, now = dict(head[part]), made[part]
        differ = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
        found += [f"made by {name}, which differs in {', '.join(differ)}"] if differ else []
    return found


def _headers(shard: str) -> str:
    """Fingerprint of a shard by its index; empty if that is of another shard."""
    with open_shard(shard) as file:
        head = valid_head(shard, file)
    return head.headers if head else ""


class StoredReference:
    """The scores of all pairs of a run.

    Raises:
        ShardError: as `read_scores`; or a key that two shards of a source have.
    """

    def __init__(self, config: Config, base: dict[str, str], layout: VisualLayout):
        made = made_from(config, base, layout)
        self._names = [source.name for source in config.data.sources]
        self._scores = [_joined(source.name, expand_shards(source.shards), made) for source in config.data.sources]

    def log_probs(self, micro_batch: MicroBatch) -> np.ndarray:
        """float64[D], of each document of a pair; 0 of others.

        Raises:
            ShardError: a pair has no score, or is not the one that was scored.
        """
        found = np.zeros(len(micro_batch.doc_lens))
        # On a GPU this waits for its stream.
        ids, pair, source = (
            tensor.cpu().numpy() for tensor in (micro_batch.input_ids, micro_batch.pair, micro_batch.source)
        )
        starts = np.cumsum([0, *micro_batch.doc_lens])
        for chosen in np.flatnonzero(pair >= 0)[::2].tolist():  # the rejected answer comes right after it
            key, name = micro_batch.keys[chosen], self._names[source[chosen]]
            score = self._scores[source[chosen]].get(key)
            if score is None or score.ids != ids_digest(ids[starts[chosen] : starts[chosen + 2]]):
                raise ShardError(
                    "the pair has no score of the reference" if score is None else "the pair is not the one scored",
                    where=f"source {name}, key {key}",
                    remedy=f"shards, system prompt or chat template changed: delete the old scores and {_MAKE}",
                )
            found[chosen : chosen + 2] = score.chosen, score.rejected
        return found


def _joined(name: str, shards: Iterable[str], made: dict[str, Any]) -> dict[str, PairScore]:
    joined: dict[str, PairScore] = {}
    for shard in shards:
        scores = read_scores(shard, made)
        if twice := next((key for key in scores if key in joined), None):
            raise ShardError(
                f"two samples of source {name} have the key {twice}, by which scores are found",
                where=shard,
                remedy="give samples distinct keys, or leave out preference.stored_reference",
            )
        joined |= scores
    return joined
