"""Run benchmarks: `python -m tools.bench NAME`, or `all` of them.

Prints the machine, a table and, as its last line, one JSON object; ends with 0
if every row reached its goal, else with 1.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from tools.bench.core import Row, run

# Each is a module of this package whose `rows()` measures.
BENCHES = {
    "step": "forward and backward of a packed micro-batch, beside transformers, packed and padded",
    "vision": "vision tower and sampler at full size, beside transformers' SigLIP and a plain sampler",
    "loss": "the loss head at Phi-3-mini's size, beside all logits and cross entropy: time and peak memory",
    "attention": "forward and backward of packed documents, beside SDPA with the block-diagonal mask",
    "stages": "DPO beside TRL's; fine-tuning and DPO on packed against padded batches",
    "cli": "time until help and until the error of a recipe",
    "reader": "reading samples out of shards, beside webdataset and tarfile",
    "packing": "packing documents: how full sequences are, how even their tiles, how fast",
    "order": "the order of a billion samples: time and memory, even coverage, a lane's state",
    "loader": "decoding, and images a second from shards to micro-batches, beside webdataset and Megatron-Energon",
    "engine": "a run at the demo's size: loop overhead, time to the first step; what a save holds up",
    "convert": "DeepSpeed's files to weights and to a state to go on from, beside DeepSpeed's own tools",
}


def rows_of(name: str) -> list[Row]:
    return importlib.import_module(f"tools.bench.{name}").rows()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m tools.bench",
        description=__doc__,
        epilog="\n".join(["benches:", *(f"  {name:10}{what}" for name, what in BENCHES.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=[*BENCHES, "all"], metavar="NAME", help="a bench below, or all")
    name = parser.parse_args(arguments).name
    import torch  # here: it takes seconds, and help needs none of it

    torch.set_num_threads(1)  # as a rank of the demo; and a busy neighbour disturbs one thread less than several
    return run({bench: lambda bench=bench: rows_of(bench) for bench in (BENCHES if name == "all" else [name])})


if __name__ == "__main__":
    sys.exit(main())
