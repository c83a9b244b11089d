"""The packed example: colours, counts, thumbnails; and that odd batches can be drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megablip.metrics import picture
from megablip.metrics.layout import QUESTIONS
from tests.model.tiny import make_doc, pack, tiny_config


class Letters:
    def decode(self, ids):
        return "".join(chr(97 + number % 26) for number in ids)


def draw(docs):
    return picture.draw_example(pack(docs), ["web"], Letters(), tiny_config().layout, "a title")


def share(image, colour):
    """Of the strip, at half its height."""
    row = np.asarray(image)[87, picture.MARGIN : picture.WIDTH - picture.MARGIN]
    return (row == colour).all(axis=1).mean()


def test_the_strip_shows_what_becomes_of_the_tokens():
    doc = make_doc(60, [(2, 1)], 0)
    image = draw([doc])
    kinds = {
        picture.VISUAL: doc.input_ids == 90,
        picture.TRAINED: doc.labels != -100,
        picture.MASKED: (doc.labels == -100) & (doc.input_ids != 90),
    }
    for colour, mask in kinds.items():
        assert share(image, colour) == pytest.approx(mask.float().mean().item(), abs=0.05)


def test_tiles_are_shown_with_their_document():
    docs = [make_doc(10, [], 0), make_doc(10, [(1, 2)], 1)]
    docs[1].tiles[:] = torch.tensor([250, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    pixels = np.asarray(draw(docs))
    red = (pixels == (250, 0, 0)).all(axis=2)
    assert red.sum() == pytest.approx(3 * picture.THUMBNAIL**2, rel=0.1)
    assert np.nonzero(red)[0].min() > 122 + 54, "below the first document"


@pytest.mark.parametrize(
    "docs",
    [
        [make_doc(3, [], 0)],
        [make_doc(5, [(2, 2)] * 8, 0)],
        [make_doc(3 + n, [(1, 1)] if n % 2 else [], n) for n in range(30)],
        [make_doc(900, [], 0), make_doc(2, [], 1)],
    ],
    ids=["a dummy tile", "many tiles", "many documents", "long and short"],
)
def test_anything_can_be_drawn(docs):
    image = draw(docs)
    assert image.width == picture.WIDTH
    assert 150 < image.height < 2500


def test_a_batch_without_documents_can_be_drawn():
    batch = pack([make_doc(2, [], 0)])
    batch.source = torch.tensor([-1], dtype=torch.int32)
    assert picture.draw_example(batch, ["web"], Letters(), tiny_config().layout, "t").height > 100


def test_the_first_question_comes_first():
    assert next(iter(QUESTIONS)).endswith("Is it learning?")
    assert next(iter(next(iter(QUESTIONS.values())).values())) == ["^loss$", "^held_out_loss$"]
