import io
import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from megablip.errors import SampleError
from megablip.evaluate.generation import Answerer, Decoding
from tests.data.builders import write_tar
from tests.small_export import make_export
from tools.rejected_answers import noised, rejected_answers, signal_share


def picture(size=64):
    buffer = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), 230, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_signal_fades_step_by_step():
    shares = [signal_share(step) for step in range(0, 1000, 50)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.999
    assert signal_share(999) < 0.1
    assert 0.1 < signal_share(500) < 0.9


def test_noise_has_the_strength_of_its_step():
    pixels = np.asarray(Image.open(io.BytesIO(noised(picture(), 100, np.random.default_rng(0)))), float)
    kept = signal_share(100)
    assert pixels.mean() == pytest.approx((np.sqrt(kept) * (230 / 127.5 - 1) + 1) * 127.5, abs=2)
    assert pixels.std() == pytest.approx(np.sqrt(1 - kept) * 127.5, rel=0.1)
    with pytest.raises(SampleError, match="can't be decoded"):
        noised(b"x", 1, np.random.default_rng(0))


def test_rejected_answers_take_the_place_of_the_old(tmp_path):
    answerer = Answerer(make_export(tmp_path, chat=True))
    torch.manual_seed(0)
    for parameter in answerer.model.decoder.parameters():
        parameter.data.normal_(0, 0.5)
    content = {"prompt": "<image> one", "chosen": "two", "rejected": "old"}
    write_tar(tmp_path / "a.tar", [{"png": picture(), "json": json.dumps(content).encode()} for _ in range(5)])
    counts = Counter()
    found = list(rejected_answers(answerer, str(tmp_path / "a.tar"), 300, Decoding(6, 2.0), 0, counts))
    assert counts["pairs"] == len(found) > 0
    assert sum(counts.values()) == 5
    for sample in found:
        assert sample["json"]["chosen"] == "two"
        assert sample["json"]["rejected"] not in ("old", "two", "")
        assert sample["png"] == picture(), "the noise is for the answer only"
    again = list(rejected_answers(answerer, str(tmp_path / "a.tar"), 300, Decoding(6, 2.0), 0, Counter()))
    assert [sample["json"] for sample in again] == [sample["json"] for sample in found]
