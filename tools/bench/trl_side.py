"""TRL's packing of documents of given lengths; runs in TRL's own environment.

    python trl_side.py SEQUENCE_LENGTH LENGTHS.npy ...

Prints a JSON list: of each file the share of tokens that are real.
"""

import json
import sys

import numpy as np
import pyarrow as pa
from datasets import Dataset
from trl import pack_dataset


def fill(lengths: np.ndarray, sequence_length: int) -> float:
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    ids = pa.ListArray.from_arrays(offsets, pa.array(np.zeros(lengths.sum(), np.int32)))
    packed = pack_dataset(
        Dataset(pa.table({"input_ids": ids})),
        sequence_length,
        strategy="bfd",
        map_kwargs={"batch_size": len(lengths)},  # all at once: fuller than by its default of 1000
    )
    return int(lengths.sum()) / (len(packed) * sequence_length)


if __name__ == "__main__":
    print(json.dumps([fill(np.load(path), int(sys.argv[1])) for path in sys.argv[2:]]))
