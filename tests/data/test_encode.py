import io

import numpy as np
import pytest
import tokenizers
from PIL import Image as PILImage

from megablip.data.encode import Encoder
from megablip.errors import SampleError
from megablip.records import IGNORE_LABEL, Document, Image, Text, VisualLayout
from tokenization.train import train_tokenizer

LAYOUT = VisualLayout(tile_size=16, patch_size=8, tokens_per_tile=3, grids=((2, 1), (1, 2)))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    corpus = folder / "corpus.txt"
    corpus.write_text("a dog\na cat\nthe dog 381\n" * 20)
    train_tokenizer([corpus], folder / "out", vocab_size=300)
    return Encoder(str(folder / "out"), LAYOUT)


def image(width=32, height=16, value=200):
    buffer = io.BytesIO()
    PILImage.new("RGB", (width, height), (value,) * 3).save(buffer, "PNG")
    return Image(buffer.getvalue())


def document(*segments):
    return Document(segments, source="web", key="k7")


def readable(encoder, ids):
    """Runs of `<image>` as <n>, ignored labels as dots."""
    names = {encoder.tokenizer.image_id: "I", encoder.tokenizer.end_of_chunk_id: "E", IGNORE_LABEL: "."}
    names |= {encoder.tokenizer.bos_id: "[", encoder.tokenizer.eos_id: "]"}
    return "".join(names.get(int(i)) or encoder.tokenizer.decode([int(i)]) for i in ids)


@pytest.mark.parametrize(
    ("segments", "ids", "labels"),
    [
        ((Text("a1"),), "[a1]", ".a1]"),
        ((image(), Text("a1")), "[IIIIIIIIIa1E]", "..........a1E]"),
        ((Text("a1"), image()), "[a1IIIIIIIII]", ".a1.........]"),
        ((image(), image(), Text("a1")), "[" + "I" * 18 + "a1E]", "." * 19 + "a1E]"),
        (
            (Text("0"), image(), Text("1"), Text("2"), image(), Text("3")),
            "[0IIIIIIIII12EIIIIIIIII3E]",
            ".0.........12E.........3E]",
        ),
        ((image(), Text("1", loss=False), Text("2")), "[IIIIIIIII12E]", "...........2E]"),
        ((image(), Text("1", loss=False)), "[IIIIIIIII1E]", "............]"),
    ],
)
def test_tokens_and_labels(encoder, segments, ids, labels):
    encoded = encoder.encode(document(*segments))
    assert readable(encoder, encoded.input_ids) == ids
    assert readable(encoder, encoded.labels) == labels
    assert encoded.input_ids.dtype == encoded.labels.dtype == np.int32


def test_every_visual_token_has_a_place(encoder):
    encoded = encoder.encode(document(Text("a"), image(32, 16), Text("b"), image(16, 32), Text("c")))
    decoded = encoder.decode(encoded, source_index=4)
    assert [i.grid for i in encoded.images] == [(2, 1), (1, 2)]
    assert np.array_equal(decoded.visual_positions, np.flatnonzero(encoded.input_ids == encoder.tokenizer.image_id))
    assert decoded.tiles.shape == (6, 3, 16, 16)
    assert decoded.patch_mask.shape == (6, 4)
    assert len(decoded.visual_positions) == encoded.tiles * LAYOUT.tokens_per_tile
    assert decoded.grids.tolist() == [[2, 1], [1, 2]]
    assert (decoded.source, decoded.key) == (4, "k7")


def test_a_document_without_images_has_empty_arrays(encoder):
    decoded = encoder.decode(encoder.encode(document(Text("a"))), 0)
    assert decoded.tiles.shape == (0, 3, 16, 16)
    assert decoded.patch_mask.shape == (0, 4)
    assert decoded.grids.shape == (0, 2)
    assert decoded.visual_positions.shape == (0,)


def test_special_strings_in_a_document_place_no_image(encoder):
    encoded = encoder.encode(document(Text("<image></s><|endofchunk|><pad><s>")))
    assert readable(encoder, encoded.input_ids) == "[<image></s><|endofchunk|><pad><s>]"
    assert not encoded.images


def test_errors_name_the_sample(encoder):
    with pytest.raises(SampleError, match="source web, key k7, image 1"):
        encoder.encode(document(image(), Text("a"), Image(b"junk")))
    truncated = Image(image(64, 32).data[:60])  # the header is whole
    encoded = encoder.encode(document(truncated, Text("a")))
    with pytest.raises(SampleError, match="source web, key k7, image 0"):
        encoder.decode(encoded, 0)


def test_a_tokenizer_without_bos(encoder, tmp_path):
    """Documents then start with their first segment."""
    path = encoder.tokenizer._path
    (tmp_path / "tokenizer.json").write_bytes((path / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).token_to_id("</s>") is not None
    encoded = Encoder(str(tmp_path), LAYOUT).encode(document(Text("1")))
    assert readable(encoder, encoded.input_ids) == "1]"
