"""Equality with the public xGen-MM code on a tiny model (tests/fixtures/xgen_mm_reference)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Phi3Config, SiglipVisionConfig

from megablip.checkpoint.xgenmm import ADDED_TOKENS, bare_name, model_shapes, released_layout
from megablip.data.images import choose_grid, patch_mask
from megablip.model.blip3 import Blip3Config, Blip3ForConditionalGeneration
from megablip.model.samplers import regroup_released
from megablip.model.vision import encode_tiles

FIXTURE = Path(__file__).parents[1] / "fixtures" / "xgen_mm_reference"
FACTS = json.loads((FIXTURE / "reference.json").read_text())
SPECIAL = FACTS["initial_tokenizer_len"]  # ids from here on have rows of their own in the released layout
CASES = range(len(FACTS["cases"]))


def from_released(weights, config):
    """Our weights from the released ones, by the key map."""
    weights = {bare_name(name): tensor.float() for name, tensor in weights.items()}
    shapes = model_shapes(config)
    state = {name: torch.empty(shape) for name, shape in shapes.items()}
    for tensor in released_layout(shapes, first_added=SPECIAL):
        for part in tensor.rows:
            state[part.ours][part.ours_start : part.ours_end] = weights[tensor.name][part.start : part.end]
    return state


@pytest.fixture(scope="module")
def model():
    resampler = FACTS["resampler"]
    config = Blip3Config(
        text_config=Phi3Config(
            **FACTS["text"]
            # A row for each id and none more: the reference's softmax has no others.
            | {"vocab_size": SPECIAL + ADDED_TOKENS, "pad_token_id": FACTS["pad_token_id"]}
            | {"bos_token_id": 1, "eos_token_id": 2}
        ),
        vision_config=SiglipVisionConfig(**FACTS["vision"]),
        sampler=resampler,
        grids=[(w // FACTS["base_tile"], h // FACTS["base_tile"]) for w, h in FACTS["grids_wh"]],
        tile_layout="released",
        image_token_id=FACTS["image_token_id"],
        pad_token_id=FACTS["pad_token_id"],
        head_bias=True,
    )
    model = Blip3ForConditionalGeneration(config).eval()
    model.load_state_dict(from_released(load_file(FIXTURE / "model.safetensors"), config))
    return model


@pytest.fixture(scope="module")
def cases():
    return load_file(FIXTURE / "cases.safetensors")


def images(cases, number, layout):
    """Tiles, crop-wise masks and grids of a case."""
    sizes = FACTS["cases"][number]["sizes_wh"]
    tiles = [cases[f"{number}.{k}.tiles"] for k in range(len(sizes))]
    grids = [choose_grid(tuple(size), layout) for size in sizes]
    masks = [torch.from_numpy(patch_mask(tuple(size), grid, layout)) for size, grid in zip(sizes, grids, strict=True)]
    return tiles, masks, grids


def expanded(ids, labels, visual_tokens):
    """Each `<image>` id as many times as its image has visual tokens, without labels there."""
    counts = torch.ones_like(ids)
    counts[ids == FACTS["image_token_id"]] = torch.tensor(visual_tokens)
    labels = torch.where(ids == FACTS["image_token_id"], -100, labels)
    # The reference never trains on its added tokens.
    labels = torch.where((labels >= SPECIAL) | (labels == FACTS["pad_token_id"]), -100, labels)
    return ids.repeat_interleave(counts), labels.repeat_interleave(counts)


@pytest.mark.parametrize("number", CASES)
def test_sampler(model, cases, number):
    tiles, masks, grids = images(cases, number, model.config.layout)
    features = encode_tiles(model.vision_tower, torch.cat(tiles))
    features, mask = regroup_released(features, torch.cat(masks), grids)
    fixture = torch.cat([cases[f"{number}.{k}.mask"] for k in range(len(tiles))])
    assert torch.equal(mask, fixture.bool())
    with torch.no_grad():
        visual = model.sampler(features, mask)
    torch.testing.assert_close(visual, cases[f"{number}.visual_tokens"], atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def fixed(model):
    """The same weights, sampled once for an image."""
    settings = model.config.to_dict()
    settings |= {"sampler": model.config.sampler | {"kind": "fixed"}, "visual_tokens": None}
    fixed = Blip3ForConditionalGeneration(Blip3Config(**settings)).eval()
    fixed.load_state_dict(model.state_dict())
    return fixed


# In the reference fixed sampling knows prompts of one image only.
MODES = [(number, mode) for number in CASES for mode in ("base", "anyres_patch", "anyres_fixed")]
MODES = [(n, mode) for n, mode in MODES if mode != "anyres_fixed" or len(FACTS["cases"][n]["images"]) == 1]


@pytest.mark.parametrize(("number", "mode"), MODES)
def test_logits_and_loss(model, fixed, cases, number, mode):
    check_logits_and_loss(fixed if mode == "anyres_fixed" else model, cases, number, mode)


def check_logits_and_loss(model, cases, number, mode):
    tiles, masks, grids = images(cases, number, model.config.layout)
    if mode == "base":  # the whole image squashed, and nothing else
        tiles, masks, grids = [x[:1] for x in tiles], [x[:1] for x in masks], [(0, 0)] * len(tiles)
    ids, labels = expanded(
        cases[f"{number}.input_ids"].flatten(),
        cases[f"{number}.labels"].flatten(),
        [model.config.layout.visual_tokens(grid) for grid in grids],
    )
    with torch.no_grad():
        out = model(
            ids[None],
            labels=labels[None],
            tiles=torch.cat(tiles),
            patch_mask=torch.cat(masks),
            grids=torch.tensor(grids, dtype=torch.int32).reshape(-1, 2),
        )
    wanted = cases[f"{number}.{mode}.logits"]
    torch.testing.assert_close(out.logits[0], wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.loss, cases[f"{number}.{mode}.loss"].reshape(()), atol=1e-5, rtol=1e-5)
