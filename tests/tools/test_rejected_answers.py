import io
import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from megablip.data.shards import ShardSource, expand_shards
from megablip.errors import ConfigError, SampleError
from megablip.evaluate.generation import Answerer, Decoding
from tests.data.builders import write_tar
from tests.small_export import make_export
from tools import rejected_answers as tool
from tools.rejected_answers import RejectedAnswers, noised, signal_share, write_rejected_answers


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


def test_a_picture_is_turned_upright_as_training_does():
    """Stored lying, with the EXIF tag that says so: half dark, half light, from top to bottom when upright."""
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, :32] = 255
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(buffer, "JPEG", exif=exif, quality=95)
    seen = np.asarray(Image.open(io.BytesIO(noised(buffer.getvalue(), 0, np.random.default_rng(0)))), float)
    assert seen.shape == (64, 32, 3)
    assert seen[:28].mean() > 240
    assert seen[36:].mean() < 15


@pytest.fixture(scope="module")
def answerer(tmp_path_factory):
    answerer = Answerer(make_export(tmp_path_factory.mktemp("model"), chat=True))
    torch.manual_seed(0)
    for parameter in answerer.model.decoder.parameters():
        parameter.data.normal_(0, 0.5)
    return answerer


def pair(**members):
    content = {"prompt": "<image> one", "chosen": "two", "rejected": "old"}
    return {"png": picture(), "json": json.dumps(content).encode()} | members


def run(answerer, folder, seed=0, out="out", **settings):
    answers = RejectedAnswers(answerer, 300, Decoding(6, 2.0))
    return write_rejected_answers(answers, str(folder / "*.tar"), folder / out, {"step": 300} | settings, seed)


def written(folder):
    source = ShardSource("s", expand_shards(str(folder)))
    found = [source.read(shard, n) for shard, count in enumerate(source.counts) for n in range(count)]
    return {key: (json.loads(members["json"]), members["png"]) for key, members in found}


def test_rejected_answers_take_the_place_of_the_old(tmp_path, answerer):
    write_tar(tmp_path / "a.tar", [pair() for _ in range(5)])
    run(answerer, tmp_path)
    counts, found = json.loads((tmp_path / "out" / "counts.json").read_text()), written(tmp_path / "out")
    assert counts["pairs"] == len(found) > 0
    assert sum(counts.values()) == 5
    for content, image in found.values():
        assert content["chosen"] == "two"
        assert content["rejected"] not in ("old", "two", "")
        assert image == picture(), "the noise is for the answer only"
    run(answerer, tmp_path, out="again")
    assert written(tmp_path / "again") == found


def test_samples_that_cannot_be_used_are_counted_and_told(tmp_path, answerer, capsys):
    text_alone = {"json": json.dumps({"prompt": "one", "chosen": "two", "rejected": "old"}).encode()}
    long = json.dumps({"prompt": "<image>" + " one" * 60, "chosen": "two", "rejected": "old"}).encode()
    bad = [pair(png=b"x"), pair(png=picture()[:60]), pair(json=b"{"), pair(json=long), text_alone]
    write_tar(tmp_path / "a.tar", [*bad, *(pair() for _ in range(4))])
    run(answerer, tmp_path)
    counts = json.loads((tmp_path / "out" / "counts.json").read_text())
    assert counts["left out: can't be used"] == 4
    assert counts["left out: without an image"] == 1
    assert sum(counts.values()) == 9
    told = capsys.readouterr().err
    assert f"left out: {tmp_path / 'a.tar'}, sample 0: the image can't be decoded" in told
    assert told.count("left out: ") == 4
    assert "the model has room for 58" in told


def test_an_interrupted_run_goes_on_with_the_next_shard(tmp_path, answerer, monkeypatch):
    monkeypatch.setattr(tool, "SAMPLES_AT_ONCE", 3)
    write_tar(tmp_path / "a.tar", [pair() for _ in range(4)])
    write_tar(tmp_path / "b.tar", [pair(__key__=b"b%d" % number) for number in range(4)])
    run(answerer, tmp_path, out="whole")
    made, of = [], RejectedAnswers.of

    def interrupted(self, source, addresses, seed, counts, title):
        if made == [0]:
            made.clear()
            raise ZeroDivisionError
        made.append(seed[1])
        return of(self, source, addresses, seed, counts, title)

    monkeypatch.setattr(RejectedAnswers, "of", interrupted)
    with pytest.raises(ZeroDivisionError):
        run(answerer, tmp_path)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="begun with other settings"):
        run(answerer, tmp_path, step=301)
    run(answerer, tmp_path)
    assert made == [1, 2], "the first shard is not answered again"
    assert written(tmp_path / "out") == written(tmp_path / "whole")
    counts = [json.loads((tmp_path / name / "counts.json").read_text()) for name in ("out", "whole")]
    assert counts[0] == counts[1]


def test_no_pair_at_all_is_an_error(tmp_path, answerer):
    write_tar(tmp_path / "a.tar", [pair(png=b"x")])
    with pytest.raises(ConfigError, match="there is no pair"):
        run(answerer, tmp_path)


def test_the_system_speaks_first_as_in_training(tmp_path, answerer, monkeypatch):
    write_tar(tmp_path / "a.tar", [pair()])
    asked = []
    monkeypatch.setattr(type(answerer), "answer", lambda self, prompts, *_: asked.extend(prompts) or ["six"])
    answers = RejectedAnswers(answerer, 300, Decoding(6), "be brief")
    source = ShardSource("s", [str(tmp_path / "a.tar")])
    assert answers.of(source, [(0, 0)], [0], Counter(), "")[0]["json"]["rejected"] == "six"
    assert (asked[0].segments[0].role, asked[0].segments[0].text) == ("system", "be brief")
