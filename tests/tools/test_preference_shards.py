import json

import pytest
from typer.testing import CliRunner

from megablip.config import SourceConfig
from megablip.data.schemas import SCHEMAS
from megablip.data.shards import ShardSource, expand_shards
from megablip.errors import SampleError
from tests.data.small import image
from tools.preference_shards import app, best_and_worst, mean_rating


def ratings(*values):
    return {f"aspect {number}": {"Rating": value} for number, value in enumerate(values)}


def row(*answers, image="a.png"):
    return {
        "prompt": "what?",
        "img_path": image,
        "completions": {
            "response": [text for text, _ in answers],
            "annotations": [ratings(*values) for _, values in answers],
        },
    }


def test_ratings_that_are_no_numbers_are_left_out():
    assert mean_rating(ratings("4", "N/A", "2", "nan")) == 3
    assert mean_rating(ratings("N/A")) is None
    assert mean_rating({"Helpfulness": {}}) is None
    assert mean_rating(None) is None


def test_the_best_and_the_worst():
    found = best_and_worst(row(("good", "55"), ("bad", "12"), ("middle", "43"), ("unrated", "x")))
    assert found == ("good", "bad")


@pytest.mark.parametrize(
    "answers",
    [
        [("a", "4"), ("b", "4")],
        [("a", "x"), ("b", "x")],
        [("a", "5")],
        [("a", "5"), ("a", "1")],
        [("a", "5"), (" a\n", "1")],
        [],
    ],
)
def test_no_preference(answers):
    assert best_and_worst(row(*answers)) is None


def test_answers_may_be_a_list_of_objects():
    completions = [{"response": "good", "annotations": ratings(5)}, {"response": "bad", "annotations": ratings(1)}]
    assert best_and_worst({"completions": completions}) == ("good", "bad")


@pytest.mark.parametrize("completions", [None, {"response": ["a"]}, {"response": ["a"], "annotations": []}])
def test_another_layout_is_named(completions):
    with pytest.raises(SampleError):
        best_and_worst({"completions": completions})


def samples(folder):
    source = ShardSource("s", expand_shards(f"{folder}/*.tar"))
    return [source.read(shard, n) for shard, count in enumerate(source.counts) for n in range(count)]


def run(tmp_path, verb, rows):
    (tmp_path / "images").mkdir(exist_ok=True)
    (tmp_path / "images" / "a.png").write_bytes(image().data)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    arguments = [
        verb,
        str(tmp_path / "rows.json"),
        "--images",
        str(tmp_path / "images"),
        "--out",
        str(tmp_path / "out"),
    ]
    return CliRunner().invoke(app, arguments)


def test_vlfeedback_to_pairs_that_the_trainer_reads(tmp_path):
    rows = [row(("good", "5"), ("bad", "1")), row(("a", "4"), ("b", "4")), row(("worse", "2"), ("better", "3"))]
    assert run(tmp_path, "vlfeedback", rows).output.endswith("2 pairs, 1 without a preference\n")
    config = SourceConfig(name="s", shards="x", schema="preference", weight=1)
    texts = []
    for key, members in samples(tmp_path / "out"):
        chosen, rejected = SCHEMAS["preference"](members, config, key)
        texts.append((chosen.segments[-1].text, rejected.segments[-1].text))
    assert texts == [("good", "bad"), ("better", "worse")]


def test_vlguard_to_exchanges_that_the_trainer_reads(tmp_path):
    rows = [
        {"id": "1", "image": "a.png", "safe": False, "instr-resp": [{"instruction": "do it", "response": "no"}]},
        {
            "id": "2",
            "image": "a.png",
            "safe": True,
            "instr-resp": [
                {"safe_instruction": "describe", "response": "a square"},
                {"unsafe_instruction": "harm", "response": "no"},
            ],
        },
    ]
    assert "1 exchanges on harmful images, 2 exchanges on safe images" in run(tmp_path, "vlguard", rows).output
    config = SourceConfig(name="s", shards="x", schema="safety", weight=1)
    answers = [
        SCHEMAS["safety"](members, config, key)[0].segments[-1].text for key, members in samples(tmp_path / "out")
    ]
    assert answers == ["no", "a square", "no"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row(("a", "5"), ("b", "1"), image="../rows.json")], "outside the folder"),
        ([row(("a", "5"), ("b", "1"), image="none.png")], "can't be read"),
        ([{"completions": 3}], 'no "completions"'),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(tmp_path, rows, words):
    found = run(tmp_path, "vlfeedback", rows)
    assert found.exit_code == 1
    assert words in found.output
    assert not (tmp_path / "out").exists()
