import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from megablip.data.encode import Encoder
from megablip.errors import ConfigError, SampleError
from megablip.model.processor import Blip3Processor
from megablip.records import Document, Text, VisualLayout
from megablip.records import Image as ImageSegment
from megablip.tokens import Tokenizer

from ..test_tokens import write_tokenizer
from .tiny import tiny_model

LAYOUT = VisualLayout(tile_size=16, patch_size=4, tokens_per_tile=3, grids=((1, 2), (2, 1), (2, 2)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder: weights, tokenizer and processor."""
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder, bos_token="<s>", tokenizer_class="PreTrainedTokenizerFast", pad_token="<pad>")
    tokenizer = Tokenizer(folder)
    model = tiny_model(
        image_token_id=tokenizer.image_id, pad_token_id=tokenizer.pad_id, vocabulary=tokenizer.vocab_size
    )
    model.save_pretrained(folder)
    Blip3Processor(
        AutoTokenizer.from_pretrained(folder), LAYOUT.tile_size, LAYOUT.patch_size, LAYOUT.tokens_per_tile, LAYOUT.grids
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


def picture(width, height, mode="RGB"):
    rng = np.random.default_rng(width * height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_survives_saving(processor, tmp_path):
    assert isinstance(processor, Blip3Processor)
    assert processor.layout == LAYOUT
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.layout == LAYOUT
    assert json.loads((tmp_path / "processor_config.json").read_text())["processor_class"] == "Blip3Processor"
    assert again("a <image> a", picture(20, 20))["input_ids"].tolist() == (
        processor("a <image> a", picture(20, 20))["input_ids"].tolist()
    )


def test_encodes_as_training_does(processor, folder):
    wide, tall = png(picture(40, 16)), png(picture(16, 40))
    encoder = Encoder(str(folder), LAYOUT)
    segments = (ImageSegment(wide), Text("a </s><pad> é"), ImageSegment(tall), Text(" a"))
    encoded = encoder.encode(Document(segments, "source", "key"))
    decoded = encoder.decode(encoded, 0)
    inputs = processor("<image>a </s><pad> é<|endofchunk|><image> a<|endofchunk|>", [wide, tall])
    assert inputs["input_ids"][0].tolist() == encoded.input_ids[:-1].tolist()  # all but eos
    assert np.array_equal(inputs["tiles"].numpy(), decoded.tiles)
    assert np.array_equal(inputs["patch_mask"].numpy(), decoded.patch_mask)
    assert np.array_equal(inputs["grids"].numpy(), decoded.grids)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1"])
def test_pillow_images_equal_their_bytes(processor, mode):
    image = picture(33, 20, mode)
    wanted = processor("<image>", png(picture(33, 20, mode).convert("RGB")))
    assert torch.equal(processor("<image>", image)["tiles"], wanted["tiles"])


def test_batch_is_padded_on_the_left(processor):
    images = [picture(20, 20), picture(40, 16), picture(16, 16)]
    inputs = processor(["a", "<image> a <image>", "a <image>"], images)
    nested = processor(["a", "<image> a <image>", "a <image>"], [[], images[:2], images[2:]])
    pad = processor.tokenizer.pad_token_id
    for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        assert mask.tolist() == sorted(mask.tolist())
        assert (row[mask == 0] == pad).all()
        assert row[mask == 1][0] == processor.tokenizer.bos_token_id
    assert inputs["tiles"].shape[0] == sum(1 + c * r for c, r in inputs["grids"].tolist())
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert int((inputs["input_ids"] == image_id).sum()) == len(inputs["tiles"]) * LAYOUT.tokens_per_tile
    for name, tensor in inputs.items():
        assert torch.equal(tensor, nested[name]), name


def test_bad_input_is_explained(processor):
    with pytest.raises(ConfigError, match=r"\[1\] <image> markers, but \[0\] images"):
        processor("<image>")
    with pytest.raises(ConfigError, match=r"\[1, 0\] <image> markers, but \[0, 1\] images"):
        processor(["<image>", "a"], [[], [picture(16, 16)]])
    with pytest.raises(SampleError, match="image 1 of the batch"):
        processor("<image><image>", [picture(16, 16), b"no image"])
    with pytest.raises(ConfigError, match="return_tensors"):
        processor("a", return_tensors="np")


def test_generates_from_processed_prompts(processor, folder):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder)
    inputs = processor(["a <image>", "a"], picture(40, 16))
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    texts = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(texts) == 2
    assert all(isinstance(text, str) for text in texts)
