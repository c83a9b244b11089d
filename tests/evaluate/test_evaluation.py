"""Reading text in held-out images, with a model that knows nothing."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from megablip.errors import ConfigError, SampleError, ShardError
from megablip.evaluate import evaluation
from megablip.evaluate.evaluation import GROUPS, evaluate, summarize
from megablip.evaluate.tasks import Answer, reading_questions
from tests.data.builders import write_tar
from tests.small_export import make_export


def png(color=(10, 20, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 12), color).save(buffer, "PNG")
    return buffer.getvalue()


def sample(text: str, **members: bytes) -> dict[str, bytes]:
    return {"png": png(), "json": json.dumps({"lines": [{"text": text, "bbox": [0, 0, 1, 1]}]}).encode()} | members


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return make_export(tmp_path_factory.mktemp("export"))


def test_answers_are_counted_by_length():
    answers = [
        Answer("a", "12", "12"),
        Answer("b", "34", "3"),
        Answer("c", "567", "567"),
        Answer("d", "567", "5671"),  # not exact, though all its characters are there
        Answer("e", "567", ""),
    ]
    assert summarize(answers, GROUPS["reading"]) == {
        "2": {"items": 2, "exact": 0.5, "characters": 0.75, "refused": 0},
        "3": {"items": 3, "exact": pytest.approx(1 / 3), "characters": pytest.approx(2 / 3), "refused": 0},
    }


def test_lengths_are_in_the_order_of_numbers():
    assert list(summarize([Answer("k", "x" * n, "") for n in (10, 9, 1)], GROUPS["reading"])) == ["1", "9", "10"]


def test_samples_are_the_first_lines_of_all_shards(tmp_path):
    two = {"lines": [{"text": " 56 "}, {"text": "7", "bbox": [0, 0, 1, 1]}]}
    write_tar(tmp_path / "a-0.tar", [sample("12"), {"png": png(), "json": json.dumps(two).encode()}])
    write_tar(tmp_path / "a-1.tar", [{"__key__": b"x", "jpg": png(), "json": b'{"text": "a\\nb"}'}])
    found = reading_questions(str(tmp_path / "a-*.tar"), None)
    assert [(question.key, question.truth) for question in found] == [("000000", "12"), ("000001", "56"), ("x", "a\nb")]
    assert found[0].image == png()
    assert len(reading_questions(str(tmp_path / "a-{0..1}.tar"), 2)) == 2


@pytest.mark.parametrize(
    ("members", "words"),
    [({"json": b"{"}, "json"), ({"jpg": b"x"}, "one image"), ({"json": b'{"lines": []}'}, "lines")],
)
def test_a_bad_sample_is_named(tmp_path, members, words):
    write_tar(tmp_path / "a.tar", [sample("12"), sample("34", **members)])
    with pytest.raises(SampleError, match=words) as caught:
        reading_questions(str(tmp_path / "a.tar"), None)
    assert caught.value.where == f"{tmp_path / 'a.tar'}, key 000001"


def test_an_evaluation_writes_results_and_page(tmp_path, export, monkeypatch, capsys):
    write_tar(tmp_path / "a.tar", [sample("1"), sample("<b>2</b>"), sample("3")])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(
        "".join(f'{{"step": {n}, "tokens_seen": {10 * n}, "loss": {5 - n}}}\n' for n in (1, 2))
    )
    evaluate(export, str(tmp_path / "a.tar"), tmp_path / "out", run_dir=tmp_path / "run")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["items"] == 3
    assert [(answer["key"], answer["truth"]) for answer in results["answers"]] == [
        ("000000", "1"), ("000001", "<b>2</b>"), ("000002", "3"),
    ]  # fmt: skip
    assert results["groups"].keys() == {"1", "8"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<figure") == 3
    assert "<b>2" not in page
    assert "<polyline" in page
    assert "exact match" in capsys.readouterr().out
    evaluate(export, str(tmp_path / "a.tar"), tmp_path / "one", limit=1)
    assert json.loads((tmp_path / "one" / "results.json").read_text())["items"] == 1


def test_wrong_answers_are_shown_first(tmp_path, export, monkeypatch):
    monkeypatch.setattr(evaluation, "PICTURES", 4)
    answers = [Answer(str(number), "1", text) for number, text in enumerate(["1", "1", "1", "no", "no", "1", "no"])]
    monkeypatch.setattr(evaluation, "ask", lambda *arguments: answers)
    write_tar(tmp_path / "a.tar", [sample("1") for _ in range(7)])
    evaluate(export, str(tmp_path / "a.tar"), tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('class="wrong"') == page.count('class="right"') == 2
    assert page.index('class="wrong"') < page.index('class="right"')


def test_what_is_missing_is_named(tmp_path, export):
    write_tar(tmp_path / "a.tar", [sample("1")])
    shards = str(tmp_path / "a.tar")
    with pytest.raises(ConfigError, match="there is no model"):
        evaluate(tmp_path, shards, tmp_path / "out")
    with pytest.raises(ShardError):
        evaluate(export, str(tmp_path / "no.tar"), tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="can't be made"):
        evaluate(export, shards, tmp_path / "file" / "out")


def test_a_broken_model_is_named(tmp_path, export):
    model = tmp_path / "model"
    model.mkdir()
    for path in export.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    write_tar(tmp_path / "a.tar", [sample("1")])
    for content in (None, b"", (model / "model.safetensors").read_bytes()[:1000]):
        (model / "model.safetensors").unlink(missing_ok=True)
        if content is not None:
            (model / "model.safetensors").write_bytes(content)
        with pytest.raises(ConfigError, match="can't be loaded") as caught:
            evaluate(model, str(tmp_path / "a.tar"), tmp_path / "out")
        assert str(model) in caught.value.where
