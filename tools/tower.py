"""Train the demo's vision tower: a small ViT of SigLIP's shape that reads digits.

    python -m tools.tower --out runs/demo/tower

It stands in for SigLIP's weights, as a frozen encoder whose features are worth
reading.  It is trained with supervision, which SigLIP is not: each patch names
the digit (or stamp, or smudge) that it shows and its own place in the tile.  The
place is needed: the resampler has no position embedding (as in BLIP-3), so a
string of digits comes out scrambled when the features don't tell where they are.

The tiles are 48 pixels, drawn from training digits: full ones with 3 to 9
digits, and for a quarter of them whole canvases squashed to one tile, as an
image's base tile is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import SiglipVisionConfig, SiglipVisionModel

from tools.canvases import CELL, EMPTY, STAMPS, augment, cell_of, paint, put_stamp, smudge
from tools.digits import Digits, load_digits
from tools.errors import errors_end_the_program
from tools.folders import complete_folder

TILE, PATCH = 48, 8
PATCHES_PER_SIDE = TILE // PATCH
CONFIG = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "image_size": TILE,
    "patch_size": PATCH,
    "hidden_act": "gelu",  # SigLIP's tanh form takes four times as long on a CPU in bf16
    "vision_use_head": False,  # the resampler reads the patches, not the pooled image
}

BACKGROUND = 10  # class of a patch without a digit, after the ten digits
SMUDGE = 11
FIRST_STAMP = 12  # and so on, in the order of STAMPS
CLASSES = FIRST_STAMP + len(STAMPS)
STAMP_SHARE, SMUDGE_SHARE = 0.3, 0.15  # of tiles
BACKGROUND_WEIGHT = 0.1
POSITION_WEIGHT = 0.3
THUMBNAIL_SHARE = 0.25
THUMBNAIL_TILES = ((2, 1), (1, 2), (3, 1))  # columns and rows of the canvases that are squashed

BATCH_TILES = 64
LR, WEIGHT_DECAY, WARMUP_STEPS, MIN_LR_RATIO = 2e-3, 0.05, 30, 0.05
AUGMENTED_COPIES = 24
VALIDATION_TILES = 256


class PatchHeads(nn.Module):
    """Linear read-outs of a patch's class and place; thrown away after training."""

    def __init__(self, hidden: int):
        super().__init__()
        self.digit = nn.Linear(hidden, CLASSES)
        self.position = nn.Linear(hidden, PATCHES_PER_SIDE**2)


def make_tile(digits: Digits, columns: int, rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A canvas of `columns` x `rows` tiles squashed to one.

    Returns:
        uint8[48, 48, 3], and the class of each of its patches int64[36], row by row.
    """
    cells = np.full((rows * TILE // CELL, columns * TILE // CELL), EMPTY)
    fewest = cells.size // 3
    count = rng.integers(fewest, cells.size + 1)
    cells.flat[rng.permutation(cells.size)[:count]] = rng.integers(len(digits), size=count)
    pixels = paint(digits, cells, rng)
    shown = np.where(cells == EMPTY, BACKGROUND, digits.labels[cells])
    if rng.random() < STAMP_SHARE:
        place, colour = tuple(rng.integers(cells.shape)), int(rng.integers(len(STAMPS)))
        put_stamp(cell_of(pixels, *place), list(STAMPS)[colour], rng)
        shown[place] = FIRST_STAMP + colour
    if rng.random() < SMUDGE_SHARE:
        place = tuple(rng.integers(cells.shape))
        smudge(cell_of(pixels, *place), rng)
        shown[place] = SMUDGE
    if columns * rows > 1:
        pixels = np.asarray(Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BICUBIC))
    # The cell under each patch's middle.
    middles = (np.arange(PATCHES_PER_SIDE) + 0.5) / PATCHES_PER_SIDE
    under = shown[(middles * cells.shape[0]).astype(int)][:, (middles * cells.shape[1]).astype(int)]
    return pixels, under.ravel()


def make_batch(
    digits: Digits, tiles: int, rng: np.random.Generator, thumbnail_share: float = THUMBNAIL_SHARE
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32[tiles, 3, 48, 48] from -1 to 1, and the patches' classes int64[tiles, 36]."""
    made = []
    for _ in range(tiles):
        squashed = rng.random() < thumbnail_share
        shape = THUMBNAIL_TILES[rng.integers(len(THUMBNAIL_TILES))] if squashed else (1, 1)
        made.append(make_tile(digits, *shape, rng))
    pixels, classes = zip(*made, strict=True)
    return normalise(torch.from_numpy(np.stack(pixels))), torch.from_numpy(np.stack(classes))


class Batches(IterableDataset):
    """`steps` batches of 64 tiles."""

    def __init__(self, digits: Digits, steps: int, rng: np.random.Generator):
        self.digits, self.steps, self.rng = digits, steps, rng

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return (make_batch(self.digits, BATCH_TILES, self.rng) for _ in range(self.steps))


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8[n, H, W, 3] to float32[n, 3, H, W] with SigLIP's mean and deviation of 0.5."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def train_tower(out: Path, steps: int, seed: int, progress: Progress) -> dict[str, float]:
    """Train for `steps` batches of 64 tiles and save the tower to the folder `out`.

    Returns:
        What `evaluate` finds on validation digits.

    Raises:
        ConfigError: `out` holds something else, or the digits are not installed.
    """
    torch.set_num_threads(1)  # tensors this small gain nothing from a second, and lose much on a busy machine
    torch.manual_seed(seed)
    sources, rng = load_digits(seed), np.random.default_rng(seed)
    digits = augment(sources["train"], AUGMENTED_COPIES, rng)
    # Eager: at 36 patches the CPU's fused attention is slower, its bf16 backward 2.7 times.
    tower = SiglipVisionModel(SiglipVisionConfig(**CONFIG, attn_implementation="eager"))
    heads = PatchHeads(CONFIG["hidden_size"])
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_ratio(step, steps))
    class_weights = torch.ones(CLASSES)
    class_weights[BACKGROUND] = BACKGROUND_WEIGHT
    positions = torch.arange(PATCHES_PER_SIDE**2).repeat(BATCH_TILES)

    # Drawing would take a good part of each step: a process beside this one does it.
    batches = DataLoader(Batches(digits, steps, rng), batch_size=None, num_workers=1)
    task = progress.add_task("tower", total=steps, loss=math.nan)
    for tiles, classes in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = tower(pixel_values=tiles).last_hidden_state.flatten(0, 1)
            digit_logits, position_logits = heads.digit(features).float(), heads.position(features).float()
        loss = F.cross_entropy(digit_logits, classes.flatten(), weight=class_weights)
        loss = loss + POSITION_WEIGHT * F.cross_entropy(position_logits, positions)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress.update(task, advance=1, loss=loss.item())
    with complete_folder(out, mark="config.json") as folder:
        tower.save_pretrained(folder)
    return evaluate(tower, heads, sources["validation"])


@torch.no_grad()
def evaluate(tower: SiglipVisionModel, heads: PatchHeads, digits: Digits) -> dict[str, float]:
    """Shares of patches read rightly: of those that show something, in tiles and in thumbnails; of all, the place."""
    shares = {}
    for name, thumbnail_share in (("marks", 0.0), ("marks in thumbnails", 1.0)):
        tiles, classes = make_batch(digits, VALIDATION_TILES, np.random.default_rng(0), thumbnail_share)
        features = tower(pixel_values=tiles).last_hidden_state
        right = heads.digit(features).argmax(-1) == classes
        shares[name] = right[classes != BACKGROUND].float().mean().item()
        place = heads.position(features).argmax(-1) == torch.arange(PATCHES_PER_SIDE**2)
        shares["position"] = min(shares.get("position", 1.0), place.float().mean().item())
    return shares


def _lr_ratio(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return MIN_LR_RATIO + (1 - MIN_LR_RATIO) * 0.5 * (1 + math.cos(math.pi * min(done, 1)))


def main(
    out: Annotated[Path, typer.Option(help="Folder for the tower; an earlier one is replaced.")],
    steps: Annotated[int, typer.Option(help=f"Batches of {BATCH_TILES} tiles.", min=1)] = 1500,
    seed: Annotated[int, typer.Option(help="As for the demo's shards: it fixes the split of the digits.")] = 0,
) -> None:
    """Train the small ViT that stands in for SigLIP in the demo."""
    started = time.perf_counter()
    columns = ("{task.description}", BarColumn(), TextColumn("loss {task.fields[loss]:.3f}"), TimeRemainingColumn())
    with errors_end_the_program(), Progress(*columns, transient=True) as progress:
        shares = train_tower(out, steps, seed, progress)
    figures = ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
    typer.echo(f"{out}: share of validation patches read rightly: {figures}; {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    typer.run(main)
