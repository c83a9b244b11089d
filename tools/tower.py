"""Train the demo's vision tower: a small ViT of SigLIP's shape that reads digits.

    python -m tools.tower --out demo/tower

It stands in for SigLIP's weights, as a frozen encoder whose features are worth
reading.  It is trained with supervision, which SigLIP is not: each patch names
the digit that it shows and its own place in the tile.  The place is needed:
the resampler has no position embedding (as in BLIP-3), so a string of digits
comes out scrambled when the features don't tell where they are.

The tiles are 48 pixels, drawn from training digits: full ones with 3 to 9
digits, and for a quarter of them whole canvases squashed to one tile, as an
image's base tile is.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.nn import functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel

from megablip.errors import MegablipError
from tools.canvases import CELL, EMPTY, augment, paint
from tools.digits import Digits, load_digits
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
    "vision_use_head": False,  # the resampler reads the patches, not the pooled image
}

BACKGROUND = 10  # class of a patch without a digit, after the ten digits
BACKGROUND_WEIGHT = 0.1
POSITION_WEIGHT = 0.3
THUMBNAIL_SHARE = 0.25
THUMBNAIL_TILES = ((2, 1), (1, 2), (3, 1))  # columns and rows of the canvases that are squashed

BATCH_TILES = 64
LR, WEIGHT_DECAY, WARMUP_STEPS, MIN_LR_RATIO = 2e-3, 0.05, 30, 0.05
AUGMENTED_COPIES = 8
VALIDATION_TILES = 512


class PatchHeads(nn.Module):
    """Linear read-outs of a patch's class and place; thrown away after training."""

    def __init__(self, hidden: int):
        super().__init__()
        self.digit = nn.Linear(hidden, BACKGROUND + 1)
        self.position = nn.Linear(hidden, PATCHES_PER_SIDE**2)


def make_tile(digits: Digits, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One tile uint8[48, 48, 3] and the class of each of its patches int64[36], row by row."""
    if rng.random() < THUMBNAIL_SHARE:
        columns, rows = THUMBNAIL_TILES[rng.integers(len(THUMBNAIL_TILES))]
    else:
        columns, rows = 1, 1
    cells = np.full((rows * TILE // CELL, columns * TILE // CELL), EMPTY)
    fewest = cells.size // 3
    count = rng.integers(fewest, cells.size + 1)
    cells.flat[rng.permutation(cells.size)[:count]] = rng.integers(len(digits), size=count)
    pixels = paint(digits, cells, rng)
    if cells.size > 9:
        pixels = np.asarray(Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BICUBIC))
    # The cell under each patch's middle.
    middles = (np.arange(PATCHES_PER_SIDE) + 0.5) / PATCHES_PER_SIDE
    under = cells[(middles * cells.shape[0]).astype(int)][:, (middles * cells.shape[1]).astype(int)].ravel()
    return pixels, np.where(under == EMPTY, BACKGROUND, digits.labels[under])


def make_batch(digits: Digits, tiles: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """float32[tiles, 3, 48, 48] from -1 to 1, and int64[tiles, 36]."""
    pixels, classes = zip(*(make_tile(digits, rng) for _ in range(tiles)), strict=True)
    return normalise(torch.from_numpy(np.stack(pixels))), torch.from_numpy(np.stack(classes))


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8[n, H, W, 3] to float32[n, 3, H, W] with SigLIP's mean and deviation of 0.5."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def train_tower(out: Path, steps: int, seed: int, progress: Progress) -> dict[str, float]:
    """Train for `steps` batches of 64 tiles and save the tower to the folder `out`.

    Returns:
        Shares of validation patches, from unseen digits, read rightly:
        `digit` (of those that show one), `background`, `position`.

    Raises:
        ConfigError: `out` holds something else, or the digits are not installed.
    """
    torch.manual_seed(seed)
    sources, rng = load_digits(seed), np.random.default_rng(seed)
    digits = augment(sources["train"], AUGMENTED_COPIES, rng)
    # Eager: at 36 patches the CPU's fused attention is slower, its bf16 backward 2.7 times.
    tower = SiglipVisionModel(SiglipVisionConfig(**CONFIG, attn_implementation="eager"))
    heads = PatchHeads(CONFIG["hidden_size"])
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_ratio(step, steps))
    class_weights = torch.ones(BACKGROUND + 1)
    class_weights[BACKGROUND] = BACKGROUND_WEIGHT
    positions = torch.arange(PATCHES_PER_SIDE**2).repeat(BATCH_TILES)

    task = progress.add_task("tower", total=steps, loss=math.nan)
    for _ in range(steps):
        tiles, classes = make_batch(digits, BATCH_TILES, rng)
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
    return evaluate(tower, heads, *make_batch(sources["validation"], VALIDATION_TILES, np.random.default_rng(seed)))


@torch.no_grad()
def evaluate(
    tower: SiglipVisionModel, heads: PatchHeads, tiles: torch.Tensor, classes: torch.Tensor
) -> dict[str, float]:
    """Shares of patches whose digit, background and position are read rightly."""
    features = tower(pixel_values=tiles).last_hidden_state
    right = heads.digit(features).argmax(-1) == classes
    place = heads.position(features).argmax(-1) == torch.arange(PATCHES_PER_SIDE**2)
    shown = classes != BACKGROUND
    shares = {"digit": right[shown], "background": right[~shown], "position": place}
    return {name: share.float().mean().item() for name, share in shares.items()}


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
    try:
        with Progress(*columns, transient=True) as progress:
            shares = train_tower(out, steps, seed, progress)
    except MegablipError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    figures = ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
    typer.echo(f"{out}: share of validation patches read rightly: {figures}; {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    typer.run(main)
