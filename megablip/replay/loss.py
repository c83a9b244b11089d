"""A step's loss on one process, document by document."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.progress import track
from torch import nn
from transformers.initialization import no_init_weights

from megablip.checkpoint.export import ExportReader, base_of, first_weights, load_tower
from megablip.checkpoint.slices import SliceReader
from megablip.config import dump_config
from megablip.data.collate import collate
from megablip.engine.topology import prepare_device
from megablip.errors import MegablipError
from megablip.model.blip3 import Blip3Config
from megablip.model.trained import trained_part
from megablip.model.vision import encode_tiles
from megablip.records import MASTER
from megablip.replay.batch import ReplayedStep

if TYPE_CHECKING:  # takes DeepSpeed with it
    from megablip.engine.zero import ReadSlice


@torch.no_grad()
def document_losses(step: ReplayedStep, weights: Path | None) -> list[torch.Tensor]:
    """float64[2, D] of each sequence: its documents' summed losses and their labels.

    In the run's precision, on one process, a sequence at a time: equal to what
    the ranks computed up to the order of sums.

    Args:
        weights: folder of a checkpoint; None: the model that the run began with.

    Raises:
        CheckpointError: the model or tokenizer is not the one that the run began with, or lacks a weight.
    """
    config, model_config = step.config, Blip3Config.of_run(step.config.model)
    export = ExportReader(config.model.path)
    if step.checkpoint:
        step.checkpoint.check(config, base_of(export, model_config))
    device = prepare_device()
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    with no_init_weights():
        model = trained_part(model_config, config.model).to(device)
    _load(model, SliceReader(weights) if weights else None, first_weights(export, config.seed), dtype)
    tower = None if config.model.train_tower else load_tower(export, model_config.vision_config, dtype, device)
    found = []
    for sequence in track(step.sequences, "computing the loss", transient=True):
        micro_batch = collate([sequence.packed], step.layout).to(device)
        features = encode_tiles(tower, micro_batch.tiles) if tower else None
        losses = model(packed=micro_batch, vision_features=features)
        sums = torch.stack([losses.document_loss, losses.document_labels]).double().cpu()
        found.append(sums[:, : len(sequence.samples)])  # without the dummy of an empty sequence
    return found


def _load(model: nn.Module, reader: SliceReader | None, first: ReadSlice, dtype: torch.dtype) -> None:
    """From the fp32 masters, rounded as the run rounds them; buffers stay as a plain build has them.

    Args:
        first: gives what the run began with.
    """
    model.train()  # as in training, where modules tell it from generation
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if reader and name in reader.parameters:
            values = reader.whole(name)
        else:
            values = first(name, MASTER, shape, 0, parameter.numel()).view(shape)
        parameter.data = values.to(parameter.device, dtype)


@contextmanager
def weights_before(step: ReplayedStep, say: Callable[[str], None]) -> Iterator[Path | None]:
    """Folder of a checkpoint with the weights that the step began with; None: those of the model's folder.

    If the run has none, it is trained on from the checkpoint before, on one
    process and in a folder that goes afterwards.

    Raises:
        MegablipError: that training failed.
    """
    start = step.checkpoint.folder if step.checkpoint else None
    if not step.steps_before:
        yield start
        return
    with tempfile.TemporaryDirectory(prefix="megablip-replay-") as folder:
        run_dir = Path(folder) / "run"
        if start:
            # Links to the files, not to the folder: what removes old checkpoints must not reach the run's.
            (run_dir / "checkpoints" / start.name).mkdir(parents=True)
            for path in start.iterdir():
                (run_dir / "checkpoints" / start.name / path.name).symlink_to(path.resolve())
        run_dir.mkdir(exist_ok=True)
        last = step.step - 1
        config = step.config.model_copy(
            update={
                "run_dir": str(run_dir),
                "resume": "auto",
                "stop_after_steps": last,
                "engine": step.config.engine.model_copy(update={"ranks": 1}),
            }
        )
        (run_dir / "config.yaml").write_text(dump_config(config))
        say(f"training up to step {last} on one process, from {start.name if start else 'the beginning'}")
        reached = run_dir / "checkpoints" / f"step_{last:08d}"
        done = subprocess.run(
            [sys.executable, "-m", "megablip.train", str(run_dir / "config.yaml")],
            env=_alone(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if not (reached / "COMMITTED").exists():
            raise MegablipError(
                f"training up to step {last} failed:\n{done.stdout[-3000:]}",
                where=f"step {step.step}",
                remedy="name a step right after a checkpoint, or take the checkpoint's weights: --weights checkpoint",
            )
        yield reached


def _alone() -> dict[str, str]:
    """The environment of a process that is the only rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return os.environ | {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
