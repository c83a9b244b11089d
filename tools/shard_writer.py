"""Writing shards together with their indexes."""

from __future__ import annotations

import webdataset

from megablip.data.index import build_index, open_shard


class IndexedShardWriter(webdataset.ShardWriter):
    """webdataset's writer; each shard has its index beside it as soon as it is complete.

    Args:
        pattern: path of the shards, with a place for their number: `train/ocr-%06d.tar`.
        samples_per_shard: most samples of a shard.
    """

    def __init__(self, pattern: str, samples_per_shard: int):
        # A fixed time makes the same samples the same bytes.
        super().__init__(pattern, maxcount=samples_per_shard, verbose=0, mtime=0, post=_index)


def _index(path: str) -> None:
    with open_shard(path) as file:
        build_index(path, file).close()
