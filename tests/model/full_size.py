"""A forward of the released model's size, in bf16, with random weights.  Prints what it found as JSON."""

import json
import resource
import time

import torch
from torch.nn.functional import cross_entropy

from megablip.checkpoint.xgenmm import released_config
from megablip.engine.build import build_unfilled
from megablip.model.blip3 import Blip3ForConditionalGeneration
from megablip.records import MicroBatch

GRID = (2, 2)
TEXT_TOKENS = 32


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Norms as they begin, biases zero, all else from one pool of normal numbers: quick, and in place."""
    pool = torch.randn(2**22 + 1).mul_(0.02).bfloat16()  # an odd length: rows differ
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.fill_(1)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            for piece in parameter.view(-1).split(len(pool)):
                piece.copy_(pool[: len(piece)])


def main() -> None:
    torch.manual_seed(0)
    started = time.monotonic()
    config = released_config()
    model = build_unfilled(lambda: Blip3ForConditionalGeneration(config), torch.bfloat16, torch.device("cpu")).eval()
    fill(model)
    built = time.monotonic()

    layout = config.layout
    tiles = layout.tiles(GRID)
    slots = tiles * layout.tokens_per_tile
    ids = torch.randint(3, 32000, (TEXT_TOKENS,))
    ids = torch.cat([ids[:8], torch.full((slots,), config.image_token_id), ids[8:]])
    images = {
        "tiles": torch.randint(0, 256, (tiles, 3, layout.tile_size, layout.tile_size), dtype=torch.uint8),
        "patch_mask": torch.ones(tiles, layout.patches_per_tile, dtype=torch.bool),
    }
    with torch.no_grad():
        logits = model(ids[None], **images, grids=torch.tensor([GRID])).logits
        forward = time.monotonic()
        labels = torch.where(ids == config.image_token_id, -100, ids)
        labels[0] = -100
        packed = MicroBatch(
            input_ids=ids,
            labels=labels,
            position_ids=torch.arange(len(ids)),
            cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
            doc_lens=[len(ids)],
            max_seqlen=len(ids),
            source=torch.zeros(1, dtype=torch.int32),
            pair=torch.full((1,), -1, dtype=torch.int32),
            **images,
            tile_to_image=torch.zeros(tiles, dtype=torch.int32),
            grid=torch.tensor([GRID], dtype=torch.int32),
            visual_token_index=(ids == config.image_token_id).nonzero().squeeze(1),
            keys=["0"],
        )
        loss = model(packed=packed).loss
    print(
        json.dumps(
            {
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "shape": list(logits.shape),
                "finite": bool(logits.isfinite().all()),
                "spread": float(logits.float().std()),
                "loss": float(cross_entropy(logits[0, :-1].float(), labels[1:], reduction="sum")),
                "packed_loss": float(loss),
                "build_s": round(built - started, 1),
                "forward_s": round(forward - built, 1),
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
