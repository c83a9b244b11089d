"""Whether a recipe could start: what its paths hold, and whether its numbers fit together.

Nothing here takes torch, so that each node of a job can look before it does.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path
from types import SimpleNamespace

from safetensors import SafetensorError, safe_open

from megablip.config import Config, SourceConfig
from megablip.data.cache import ShardCache, is_url
from megablip.data.index import open_shard, valid_head
from megablip.data.loader import micro_batches_per_step
from megablip.data.shards import expand_shards
from megablip.data.tar import BLOCK_BYTES
from megablip.doctor.finding import Finding, attempted
from megablip.engine.ds_config import complete_ds_config
from megablip.engine.topology import Topology
from megablip.errors import ConfigError
from megablip.model.layout import check_tokenizer, read_layout

STATE_BYTES = 12  # of a trained parameter in a checkpoint: fp32 master and Adam's two moments
LOOKED_AT = 64  # shards of a source, evenly chosen
MIN_FREE_BYTES = 1 << 30  # for logs, beside checkpoints


def check_recipe(config: Config, nodes: int = 1, on_gpu: bool = False) -> list[Finding]:
    """All that can be told from one machine.

    Args:
        nodes: that the run is to have, each with `engine.ranks` ranks.
        on_gpu: whether they have GPUs.
    """
    return [
        *check_batch(config, nodes, on_gpu),
        *check_paths(config),
        *check_tokens(config),
        *check_space(config),
    ]


def check_paths(config: Config) -> list[Finding]:
    """What each node must see: model, shards, and a run directory that can be written."""
    found = attempted("model", lambda: _model(config), "the run can't start")
    for source in [*config.data.sources, *config.held_out.sources]:
        found += attempted(f"shards of {source.name}", lambda source=source: _shards(source, config))
    return found + attempted("run directory", lambda: _writable(Path(config.run_dir)), "nothing could be saved")


def _model(config: Config) -> Iterator[Finding]:
    read_layout(config.model)
    shapes = weight_shapes(Path(config.model.path))
    yield Finding("model", f"{len(shapes)} tensors, {sum(map(prod, shapes.values())):,} values in {config.model.path}")


def _shards(source: SourceConfig, config: Config) -> Iterator[Finding]:
    subject, paths = f"shards of {source.name}", expand_shards(source.shards)
    chosen = paths[:: -(-len(paths) // LOOKED_AT)]
    without_index = []
    for path in [path for path in chosen if not is_url(path)]:
        with open_shard(path) as file:
            if len(file.read(BLOCK_BYTES)) < BLOCK_BYTES:
                yield Finding(subject, f"{path} is cut short", ok=False, remedy="copy it again")
            elif source.order == "samples" and valid_head(path, file) is None:
                without_index.append(path)
    remote = [path for path in paths if is_url(path)]
    if remote:
        ShardCache(config.data.cache_dir or "", config.data.cache_bytes).size(remote[0])
    found = f"{len(paths)} shards" + (f", {len(chosen)} looked at" if len(chosen) < len(paths) else "")
    if without_index:
        yield Finding(
            subject,
            f"{found}; {len(without_index)} have no valid index, such as {without_index[0]}",
            means="the start indexes them first: it reads them once from end to end",
            remedy="python -m tools.shards index SHARDS, before the job",
            warns=True,
        )
    else:
        yield Finding(subject, found + (", readable and indexed" if source.order == "samples" else ", readable"))


def _writable(folder: Path) -> Iterator[Finding]:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".writable.{os.uname().nodename}.{os.getpid()}"
    try:
        probe.write_bytes(b"x")
    finally:
        probe.unlink(missing_ok=True)
    yield Finding("run directory", f"{folder} can be written")


def check_tokens(config: Config) -> list[Finding]:
    """Whether tokenizer and model belong together."""

    def check() -> Iterator[Finding]:
        check_tokenizer(config.model)
        yield Finding("tokenizer", "its ids are the model's")

    return attempted("tokenizer", check, "ids would mean other rows of the embeddings")


def check_batch(config: Config, nodes: int, on_gpu: bool) -> list[Finding]:
    """Whether lanes, ranks, nodes and DeepSpeed's groups fit together."""
    return attempted("batch", lambda: _batch(config, nodes, on_gpu), "ranks would have no data, or no place")


def _batch(config: Config, nodes: int, on_gpu: bool) -> Iterator[Finding]:
    lanes, ranks = config.batch.lanes, config.engine.ranks
    world = nodes * ranks
    if world > lanes:
        fitting = lanes // ranks
        raise ConfigError(
            f"{nodes} nodes with {ranks} ranks are {world} ranks, and there are {lanes} lanes",
            where="batch.lanes",
            remedy=f"use {fitting} nodes" if fitting else f"use fewer ranks a node: engine.ranks={lanes}",
        )
    micro_batches = micro_batches_per_step(config, world)
    place = Topology(0, world, 0, SimpleNamespace(type="cuda" if on_gpu else "cpu"), ranks_per_node=ranks)
    complete_ds_config(config.engine, config.optimizer.clip_norm, micro_batches, place)
    found = f"{lanes} lanes on {world} ranks ({nodes} nodes), {micro_batches} micro-batches a step"
    # What all ranks could hold, and what there is.
    room = world * micro_batches * config.batch.micro_batch_sequences
    idle = 1 - lanes * config.batch.sequences_per_lane / room
    if idle < 0.01:
        yield Finding("batch", f"{found}, all of them full")
    else:
        divisors = [count for count in range(1, lanes // ranks + 1) if lanes % (count * ranks) == 0]
        near = min(divisors, key=lambda count: abs(count - nodes), default=None)
        remedy = "choose batch.micro_batch_sequences that divides the sequences of a rank"
        if near and near != nodes:
            remedy = f"{near} nodes divide {lanes} lanes"
        yield Finding(
            "batch",
            f"{found}; {idle:.0%} of their places stay empty",
            means="results are right, but ranks wait for those with more to do",
            remedy=remedy,
            warns=True,
        )


def check_space(config: Config) -> list[Finding]:
    """Whether the run directory's disk holds the checkpoints that are kept, and one that is being written."""
    return attempted("disk", lambda: _space(config), "a checkpoint could not be written")


def _space(config: Config) -> Iterator[Finding]:
    run_dir = Path(config.run_dir)
    existing = run_dir
    while not existing.exists():
        existing = existing.parent
    held = sum(path.stat().st_size for path in run_dir.glob("checkpoints/step_*/*") if path.is_file())
    one = STATE_BYTES * trained_values(config)
    needed = max((config.checkpoint.keep + 1) * one - held, 0) + MIN_FREE_BYTES
    free = shutil.disk_usage(existing).free
    found = (
        f"{gib(free)} free for {run_dir}; {config.checkpoint.keep} checkpoints of {gib(one)} and one that is "
        f"being written need {gib(needed)} more"
    )
    yield Finding(
        "disk",
        found,
        ok=free >= needed,
        means="" if free >= needed else "a save fails later, and the run goes on without one; quotas are not seen here",
        remedy="" if free >= needed else "free some space, keep fewer (checkpoint.keep), or choose another run_dir",
    )


def trained_values(config: Config) -> int:
    """How many parameters a checkpoint of a run holds, from the headers of its model's weights."""
    shapes = weight_shapes(Path(config.model.path))
    lora = config.model.lora
    if lora is None:
        # A trained tower's pooling head stays frozen.
        frozen = "vision_tower.head." if config.model.train_tower else "vision_tower."
        return sum(prod(shape) for name, shape in shapes.items() if not name.startswith(frozen))
    also = {
        "sampler": r"sampler\.",
        "embeddings": r"decoder\..*embed\w*\.weight$",
        "head": r"decoder\.\w*(head|embed_out)\.",
    }
    count = 0
    for name, shape in shapes.items():
        block = re.match(r"decoder\..*\.(?:layers|h|blocks)\.\d+\.(?:.*\.)?(\w+)\.weight$", name)
        if block and len(shape) == 2 and (not lora.targets or block[1] in lora.targets):
            count += lora.rank * sum(shape)
        elif any(re.match(also[part], name) for part in lora.also_train):
            count += prod(shape)
    return count


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of an export, from the headers of its files.

    Raises:
        ConfigError: no weights, or a file that is none or is not whole.
    """
    try:
        index = folder / "model.safetensors.index.json"
        files = {"model.safetensors"}
        if index.exists():
            files = set(json.loads(index.read_text())["weight_map"].values())
        shapes: dict[str, tuple[int, ...]] = {}
        for name in sorted(files):
            with safe_open(folder / name, "numpy") as weights:
                shapes |= {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ConfigError(
            f"the model's weights can't be read: {error}",
            where=str(folder),
            remedy="make the folder with `megablip convert`, or copy it again",
        ) from None
    return shapes


def gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:,.1f} GiB"
