"""Writing shards together with their indexes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import webdataset

from megablip.data.index import build_index, open_shard
from megablip.errors import ConfigError
from tools.folders import complete_folder

SAMPLES_PER_SHARD = 1000


class IndexedShardWriter(webdataset.ShardWriter):
    """webdataset's writer; each shard has its index beside it as soon as it is complete.

    Args:
        pattern: path of the shards, with a place for their number: `train/ocr-%06d.tar`.
        samples_per_shard: most samples of a shard.
        first: number of the first shard.
    """

    def __init__(self, pattern: str, samples_per_shard: int, first: int = 0):
        # A fixed time makes the same samples the same bytes.
        super().__init__(pattern, maxcount=samples_per_shard, start_shard=first, verbose=0, mtime=0, post=_index)


def _index(path: str) -> None:
    with open_shard(path) as file:
        build_index(path, file).close()


def write_counted(out: Path, samples: Iterable[dict[str, Any]], counts: Counter[str]) -> str:
    """Fill the folder `out` with shards and counts.json; it appears (or replaces an earlier one) when it is complete.

    Args:
        samples: members of each, as webdataset's writer takes them.
        counts: what `samples` counts while it is read.

    Returns:
        A line that tells what there is.

    Raises:
        ConfigError: `out` holds something else, or there is no sample.
    """
    with complete_folder(out, mark="counts.json") as folder:
        writer = IndexedShardWriter(f"{folder}/{out.name}-%06d.tar", SAMPLES_PER_SHARD)
        try:
            for sample in samples:
                writer.write(sample)
            if not writer.total:
                raise ConfigError(
                    "there is no sample to write", where=counts_line(out, counts), remedy="check what it is made of"
                )
        except BaseException:
            writer.tarstream.close()  # without an index: the folder is not kept
            raise
        writer.close()
        (folder / "counts.json").write_text(json.dumps(counts, indent=1))
    return counts_line(out, counts)


def counts_line(out: Path, counts: Counter[str]) -> str:
    """A line that tells what there is."""
    return f"{out}: " + ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
