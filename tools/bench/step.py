"""One training micro-batch, forward and backward in bf16, at two sizes.

All sides are the same model with the same weights on the same documents.  A rival's
decoder takes transformers' own ways: packed, with documents told apart by restarted
position ids (SDPA, eager), or padded to the longest document (SDPA); logits of all
rows, and transformers' loss.  Gradients are compared as well as the loss, which
with random weights hardly tells a wrong mask from the right one.

- `phi3`: 2048 tokens of text in 8 documents, half of the labels masked, through a
  decoder of 212M parameters in Phi-3's shape; on all cores.
- `demo`: the demo's model, sampler included; vision features are given.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig

from megablip.data.collate import collate, lay_out
from megablip.model.attention import ATTENTION
from megablip.model.blip3 import Blip3Config, Blip3ForConditionalGeneration
from megablip.records import IGNORE_LABEL, DecodedDocument, MicroBatch, PlannedSequence, VisualLayout
from tools.bench.core import Rival, Row, median_seconds
from tools.tower import CONFIG as TOWER

FIRST_TEXT_ID = 10

# phi3
DECODER = {
    "hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 32064, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
LENGTHS = (643, 421, 300, 250, 180, 120, 84, 50)  # 2048 tokens; the squares sum to 0.19 of one document's
# A power of two: transformers rounds 1 / labels to bf16 in every gradient, which is 0.3 % off for 983 of them.
LABELS = 1024
GOALS = {"packed sdpa": 1.4, "packed eager": 2.8, "padded sdpa": 4.2}

# demo
SETTINGS = Path(__file__).parents[2] / "megablip" / "recipes" / "mini" / "model.yaml"
VOCABULARY, IMAGE_ID = 400, 4
DOCUMENTS, GRID, TEXT_TOKENS = 24, (2, 1), (8, 23)  # three tiles of ten tokens each, and text: about 45 tokens


def rows() -> list[Row]:
    with all_threads():
        phi3 = phi3_rows()
    return [*phi3, *demo_rows()]


@contextmanager
def all_threads() -> Iterator[None]:
    """On all cores: a model of this size waits for its products, and in one thread the rivals for minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def phi3_rows() -> list[Row]:
    model, batch, features = phi3_model(), *phi3_batch()

    packed = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "labels": batch.labels}
    inputs = {
        "packed": {name: tensor[None] for name, tensor in packed.items()},
        "padded": padded(batch),
    }
    found: dict[str, tuple[Tensor, Tensor]] = {}  # loss and gradient norm

    def run(name: str) -> None:
        how, _, attention = name.partition(" ")
        model.decoder.set_attn_implementation(attention or ATTENTION)
        if name == "ours":
            loss = model(packed=batch, vision_features=features).loss / batch.valid_labels
        else:
            loss = model.decoder(**inputs[how], use_cache=False).loss
        loss = step(model, loss)
        if name not in found:  # in the call that warms up
            found[name] = loss, gradients(model.decoder).norm()

    seconds = median_seconds({name: partial(run, name) for name in ("ours", *GOALS)})
    ours = found.pop("ours")
    return [
        *(
            Row(name, seconds["ours"] * 1e3, "ms", "lower", GOALS[name], Rival("transformers", seconds[name] * 1e3))
            for name in GOALS
        ),
        Row("loss_error", max(relative_error(ours[0], loss) for loss, _ in found.values()), "", "lower", goal=1e-4),
        Row("norm_error", max(relative_error(ours[1], norm) for _, norm in found.values()), "", "lower", goal=1e-3),
    ]


def phi3_model() -> Blip3ForConditionalGeneration:
    """The decoder, and a sampler that costs nothing."""
    config = Blip3Config(
        text_config=AutoConfig.for_model("phi3", **DECODER),
        vision_config=AutoConfig.for_model("siglip_vision_model", **TOWER),
        sampler={"depth": 1, "heads": 1, "dim_head": 16, "num_latents": 1},
        head_bias=False,
    )
    return build(config)


def phi3_batch() -> tuple[MicroBatch, Tensor]:
    """Documents of text, and the features of the one dummy tile that goes with them."""
    rng = np.random.default_rng(0)
    layout = Blip3Config(vision_config=AutoConfig.for_model("siglip_vision_model", **TOWER)).layout
    ids = rng.integers(FIRST_TEXT_ID, DECODER["vocab_size"], sum(LENGTHS))
    starts = np.cumsum(LENGTHS) - LENGTHS
    kept = rng.permutation(np.setdiff1d(np.arange(len(ids)), starts))[:LABELS]
    labels = np.full_like(ids, IGNORE_LABEL)
    labels[kept] = ids[kept]
    documents = [
        document(number, ids[start : start + length], labels[start : start + length], layout)
        for number, (start, length) in enumerate(zip(starts, LENGTHS, strict=True))
    ]
    return micro_batch(documents, layout), torch.zeros(1, layout.patches_per_tile, TOWER["hidden_size"])


def padded(batch: MicroBatch) -> dict[str, Tensor]:
    """A row for each document."""
    ids, labels = batch.input_ids.split(batch.doc_lens), batch.labels.split(batch.doc_lens)
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_LABEL),
    }


def demo_rows() -> list[Row]:
    ours = demo_model()
    theirs = copy.deepcopy(ours)
    theirs.decoder.set_attn_implementation("sdpa")
    batch = demo_batch(ours.config.layout)
    features = torch.randn(*batch.patch_mask.shape, TOWER["hidden_size"], dtype=torch.bfloat16)
    sides = {
        "ours": lambda: step(ours, ours(packed=batch, vision_features=features).loss / batch.valid_labels),
        "theirs": lambda: step(theirs, transformers_loss(theirs, batch, features)),
    }
    losses = [side() for side in sides.values()]
    seconds = median_seconds(sides | {"deterministic": lambda: deterministic(sides["ours"])}, repeats=15)
    rival, plain = Rival("transformers", seconds["theirs"] * 1e3), Rival("not so", seconds["ours"] * 1e3)
    return [
        Row("demo", seconds["ours"] * 1e3, "ms", "lower", goal=2.0, rival=rival),
        Row("demo_deterministic", seconds["deterministic"] * 1e3, "ms", "lower", goal=0.9, rival=plain),
        Row("demo_loss_error", relative_error(*losses), "", "lower", goal=1e-4),
        # Rounding to bf16 alone puts either side 0.009 off the gradient in float32.
        Row("demo_gradient_error", relative_error(gradients(ours), gradients(theirs)), "", "lower", goal=0.02),
    ]


def deterministic(run: Callable[[], Tensor]) -> Tensor:
    """In deterministic mode, as far as it is torch's (engine/determinism.py)."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        return run()
    finally:
        torch.use_deterministic_algorithms(False)


def demo_model() -> Blip3ForConditionalGeneration:
    settings = yaml.safe_load(SETTINGS.read_text())
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = Blip3Config(
        text_config=AutoConfig.for_model(**settings["decoder"], **ids, vocab_size=VOCABULARY),
        vision_config=AutoConfig.for_model("siglip_vision_model", **TOWER),
        sampler=settings["sampler"],
        grids=settings["grids"],
        image_token_id=IMAGE_ID,
    )
    return build(config)


def demo_batch(layout: VisualLayout) -> MicroBatch:
    """Documents of one image and a text that is trained on, of lengths that differ."""
    rng = np.random.default_rng(0)
    visual = layout.visual_tokens(GRID)
    documents = []
    for number in range(DOCUMENTS):
        text = rng.integers(FIRST_TEXT_ID, VOCABULARY, rng.integers(*TEXT_TOKENS))
        ids, labels = (np.append(np.full(visual, value), text) for value in (IMAGE_ID, IGNORE_LABEL))
        documents.append(document(number, ids, labels, layout, [GRID]))
    return micro_batch(documents, layout)


def transformers_loss(model: Blip3ForConditionalGeneration, batch: MicroBatch, features: Tensor) -> Tensor:
    visual = model.sampler(features, batch.patch_mask).flatten(0, 1)
    embeds = model.get_input_embeddings()(batch.input_ids).index_copy(0, batch.visual_token_index, visual)
    positions, labels = batch.position_ids[None], batch.labels[None]
    return model.decoder(inputs_embeds=embeds[None], position_ids=positions, labels=labels, use_cache=False).loss


def build(config: Blip3Config) -> Blip3ForConditionalGeneration:
    torch.manual_seed(0)
    model = Blip3ForConditionalGeneration(config, with_vision_tower=False)
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay float32
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def document(
    number: int, ids: np.ndarray, labels: np.ndarray, layout: VisualLayout, grids: list[tuple[int, int]] | None = None
) -> DecodedDocument:
    grids = grids or []
    tiles = sum(layout.tiles(grid) for grid in grids)
    return DecodedDocument(
        input_ids=ids,
        labels=labels,
        visual_positions=np.arange(sum(map(layout.visual_tokens, grids))),
        tiles=np.zeros((tiles, 3, layout.tile_size, layout.tile_size), np.uint8),
        patch_mask=np.ones((tiles, layout.patches_per_tile), bool),
        grids=np.array(grids).reshape(-1, 2),
        source=0,
        key=str(number),
    )


def micro_batch(documents: list[DecodedDocument], layout: VisualLayout) -> MicroBatch:
    planned = PlannedSequence(0, 0, (), np.zeros(0, np.int64))
    pixels = np.concatenate([document.tiles for document in documents])
    return collate([lay_out(planned, documents, (), pixels, layout)], layout)


def step(model: Blip3ForConditionalGeneration, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return loss.detach()


def gradients(model: nn.Module) -> Tensor:
    """All gradients in one vector."""
    return torch.cat([parameter.grad.float().flatten() for parameter in model.parameters()])


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())
