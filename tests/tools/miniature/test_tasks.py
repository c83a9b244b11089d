"""Questions have right answers, pictures show what they say, and samples are in the schemas of the trainer."""

import io
import json
from itertools import combinations

import numpy as np
import pytest
from PIL import Image
from rich.progress import Progress

from megablip.config import SourceConfig
from megablip.data.schemas import SCHEMAS
from megablip.data.shards import ShardSource, expand_shards
from megablip.evaluate.tasks import conversation_questions, reading_questions, shots_questions
from tests.tools.test_canvases import DIGITS
from tools.canvases import CELL, STAMPS
from tools.miniature.claims import CONTROL, Claim, claims
from tools.miniature.pairs import rejected
from tools.miniature.pictures import draw
from tools.miniature.shards import SHOTS, make_shards
from tools.miniature.tasks import CONVERSATIONS, READING, REFUSAL, UNCLEAR, Asker, spelled


def pixels(picture):
    return np.asarray(Image.open(io.BytesIO(picture.jpeg)).convert("RGB")).astype(int)


@pytest.fixture
def asker():
    return Asker(DIGITS, np.random.default_rng(0))


@pytest.mark.parametrize("colour", STAMPS)
def test_a_stamp_has_its_colour_and_hides_no_digit(colour):
    rng = np.random.default_rng(3)
    for _ in range(10):
        picture = draw(DIGITS, 5, rng, stamp=colour)
        image = pixels(picture)
        assert image.shape == (48, 96, 3)
        near = np.abs(image - np.array(STAMPS[colour])).max(axis=2) < 70
        cells = near.reshape(3, CELL, 6, CELL).mean(axis=(1, 3))
        assert (cells > 0.2).any()
        assert len(picture.digits) == 5


def test_smudges_are_spelled_unclear():
    picture = draw(DIGITS, 4, np.random.default_rng(0), smudges=2)
    words = spelled(picture).split()
    assert [word == UNCLEAR for word in words] == [place in picture.smudged for place in range(4)]
    assert words.count(UNCLEAR) == 2
    assert spelled(picture, honest=False) == " ".join(picture.digits)


def test_answers_are_true(asker):
    for _ in range(30):
        counted, largest, placed = asker.count(), asker.largest(), asker.place()
        assert counted.answer == str(len(counted.pictures[0].digits))
        assert largest.answer == max(largest.pictures[0].digits)
        assert placed.answer in placed.pictures[0].digits
        several = asker.several()
        asked = int(several.question.split("image ")[-1].split()[0])
        assert several.question.count("<image>") == len(several.pictures)
        assert several.answer == " ".join(several.pictures[asked - 1].digits)
        assert asker.marked("red").answer == REFUSAL != asker.marked("blue").answer
        assert asker.unsafe().answer == REFUSAL


def test_rejected_answers(asker):
    rng = np.random.default_rng(0)
    smudged, clean = asker.read_smudged(), asker.read_clean()
    hidden = smudged.pictures[0].smudged[0]
    named = smudged.answer.split()
    named[hidden] = "3"
    assert rejected(smudged, " ".join(named), rng) == " ".join(named)
    assert rejected(smudged, smudged.answer, rng) is None, "it was honest"
    assert rejected(smudged, "3", rng) is None, "another length"
    assert rejected(clean, "3 3 3 3 3 3", rng) == "3 3 3 3 3 3"
    assert rejected(clean, clean.answer, rng).split().count(UNCLEAR) == 1


def test_samples_are_in_the_schemas_of_the_trainer(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.miniature.shards.HELD_OUT_ITEMS", 3)
    make_shards(tmp_path / "data", 0.002, 0, Progress(disable=True))
    kinds = {
        "ocr": "ocr", "caption": "caption", "interleaved": "interleaved", "text": "text", "single": "conversation",
        "several": "conversation", "safety": "safety",
    }  # fmt: skip
    digits = {}
    for kind, schema in kinds.items():
        source = ShardSource(kind, expand_shards(f"{tmp_path}/data/train/{kind}-*.tar"))
        config = SourceConfig(name=kind, shards="x", schema=schema, weight=1)
        for number in range(source.counts[0]):
            key, members = source.read(0, number)
            assert SCHEMAS[schema](members, config, key)
            digits.setdefault("train", set()).update(json.loads(members["json"]).get("source_ids", []))
    for split in ("validation", "test"):
        for task in CONVERSATIONS:
            questions = conversation_questions(str(tmp_path / "data" / split / f"{task}-*.tar"), None)
            assert len(questions) == 3
            assert {question.facts["task"].replace(" ", "_") for question in questions} == {task}
            for question in questions:
                digits.setdefault(split, set()).update(question.facts.get("source_ids", []))
                forbidden = "red" in question.facts["stamp"]
                assert not forbidden or task in ("stamp", "marked_red"), "a replayed sample would contradict safety"
        for task in READING:
            questions = reading_questions(str(tmp_path / "data" / split / f"{task}-*.tar"), None)
            assert all(question.truth.isdigit() for question in questions)
        assert len(shots_questions(str(tmp_path / "data" / split / "shots-*.tar"), None, SHOTS - 1)) == 3
    assert digits["train"]
    assert digits["validation"]
    assert not any(digits[one] & digits[other] for one, other in combinations(digits, 2))


def test_claims_say_whether_they_hold():
    tasks = [
        "ocr_one_tile",
        "ocr_three_tiles",
        "stamp",
        "largest",
        "several",
        "read",
        "count",
        "place",
        "clean",
        "hallucination",
        "over-abstention",
        "marked_red",
        "marked_green",
        "marked_blue",
        "unsafe",
        "over-refusal",
    ]
    row = dict.fromkeys(tasks, 0.5) | {f"{task}: refused": 0.5 for task in tasks} | {"ocr_three_tiles: digits": 0.9}
    row |= {f"shots {count}": 0.1 * count for count in (0, 1, 2, 4, 8)}
    found = claims(dict.fromkeys(("pretrain", "sft", "interleave", "dpo", CONTROL, "safety"), row))
    by_what = {claim.what: claim for claim in found}
    assert not by_what["three digits on two tiles, exact"].holds
    assert not by_what["4 shots less none, exact"].holds
    assert by_what["8 shots less one, exact"].holds
    assert by_what["single-picture skill lost"].value == 0
    assert Claim("s", "p", "w", 0.05, at_most=0.05).holds
    assert not Claim("s", "p", "w", 0.051, at_most=0.05).holds
