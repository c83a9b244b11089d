"""Replaying steps of a real run, and comparing runs."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from megablip.cli import app
from megablip.errors import ConfigError
from megablip.metrics.points import read_metrics
from megablip.records import PackedSequence
from megablip.replay.batch import ReplayedSequence, ReplayedStep, Sample, rebuild
from megablip.replay.diff import compare
from megablip.replay.page import write_replay
from megablip.replay.step import printable, replay
from tests.distributed.exact import different
from tests.distributed.test_exact import BUFFER, points, recipe_of, train, waiting

STEPS, CUT = 18, 15  # of two epochs; at the cut each lane's packing buffer is less than half full


@pytest.fixture(scope="module")
def two_runs(work) -> tuple[Path, Path]:
    """Two ranks, fp32, deterministic: straight, and cut."""
    recipe = recipe_of(work, "to-replay", "fp32", epochs=2)
    folder = recipe.parent
    cut = f"run_dir={folder}/cut"
    for loads in train(2, recipe, [], [cut, f"stop_after_steps={CUT}"], [cut]):
        assert loads[2]["loaded"]
        assert loads[2]["differ"] == []
    return folder / "straight", folder / "cut"


@pytest.fixture(scope="module")
def run_dir(two_runs) -> Path:
    """The run that has checkpoints after CUT and STEPS steps."""
    return two_runs[1]


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()
    } | {str(path): str(path.stat().st_mtime_ns) for path in folder.rglob("*")}


def logged(run_dir: Path, step: int) -> dict:
    return next(point for point in read_metrics(run_dir) if point["step"] == step)


def copy(run_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_dir, tmp_path / "copy"))


def rewrite_metrics(run_dir: Path, step: int, **changes: object) -> None:
    points = [point | (changes if point["step"] == step else {}) for point in read_metrics(run_dir)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))


def test_a_cut_changes_no_bit(two_runs, capsys):
    """In the second epoch, with a half-empty packing buffer."""
    straight, cut = two_runs
    assert compare(straight, cut), capsys.readouterr().out
    assert points(straight) == points(cut)
    assert len(points(cut)) == STEPS
    assert different(straight, cut, STEPS) == []
    assert all(0 < count < BUFFER // 2 for count in waiting(cut, CUT))


def test_every_step_is_rebuilt_as_it_was(run_dir):
    """Right after a checkpoint, further from it, and without any before."""
    for step in (1, 2, CUT, CUT + 1, STEPS):
        found = rebuild(run_dir, step, print)
        assert found.digest == logged(run_dir, step)["data_digest"]
        assert found.steps_before == (step - 1 if step <= CUT else step - CUT - 1)
        assert [(s.packed.lane, s.packed.index) for s in found.sequences] == [(lane, step - 1) for lane in range(4)]
        for sequence in found.sequences:
            assert [sample.key for sample in sequence.samples] == list(sequence.packed.keys)
            assert sum(sample.tiles for sample in sequence.samples) == len(sequence.packed.tiles)
            for sample in sequence.samples:
                assert Path(sample.shard).name.startswith(sample.source)
                header = Path(sample.shard).read_bytes()[sample.offset - 512 : sample.offset]
                assert header.startswith(sample.key.encode())


def test_a_step_after_a_checkpoint_has_the_loss_that_was_logged(run_dir, tmp_path, capsys):
    before = contents(run_dir)
    assert replay(run_dir, CUT + 1, tmp_path / "page.html", "step")
    assert contents(run_dir) == before, "a run is never written to"
    said = " ".join(capsys.readouterr().out.split())
    found = re.search(r"loss of tokens: ([0-9.]+), with the weights that the step began with \(fp32\)", said)
    assert float(found[1]) == (pytest.approx(logged(run_dir, CUT + 1)["loss"], rel=1e-5))
    assert "the one that was logged" in said
    assert (tmp_path / "page.html").read_text().count("<figure>") == logged(run_dir, CUT + 1)["documents_seen"] - (
        logged(run_dir, CUT)["documents_seen"]
    )


def test_weights_between_checkpoints_are_trained_up_to(run_dir, tmp_path, capsys):
    before = contents(run_dir)
    assert replay(run_dir, CUT + 2, tmp_path / "page.html", "step")
    assert contents(run_dir) == before
    said = " ".join(capsys.readouterr().out.split())
    loss = float(
        re.search(r"loss of tokens: ([0-9.]+), with the weights that the step began with: trained on", said)[1]
    )
    assert loss == pytest.approx(logged(run_dir, CUT + 2)["loss"], rel=1e-4)
    assert replay(run_dir, CUT + 2, tmp_path / "page.html", "checkpoint")
    said = " ".join(capsys.readouterr().out.split())
    older = float(re.search(r"loss of tokens: ([0-9.]+), with the weights of step_00000015, older by 1 than", said)[1])
    assert abs(older - loss) > 1e-3, "other weights"


def test_data_that_are_no_longer_those_of_the_run_are_told(run_dir, tmp_path, capsys):
    other = copy(run_dir, tmp_path)
    rewrite_metrics(other, 3, data_digest="0" * 16)
    assert not replay(other, 3, tmp_path / "page.html", "none")
    assert "shards, tokenizer or recipe are not what they were" in " ".join(capsys.readouterr().out.split())


def test_a_step_that_is_none(run_dir, tmp_path):
    with pytest.raises(ConfigError, match="steps are counted from 1"):
        replay(run_dir, 0, tmp_path / "page.html", "none")


def test_a_run_equals_its_copy(run_dir, tmp_path, capsys):
    assert compare(run_dir, copy(run_dir, tmp_path))
    said = capsys.readouterr().out
    assert "data: the same in all 18 steps" in said
    assert "loss: bit for bit the same in all 18 steps" in said
    assert "bit for bit the same at the steps 15, 18" in said


def test_the_first_loss_that_differs_is_named(run_dir, tmp_path, capsys):
    other = copy(run_dir, tmp_path)
    rewrite_metrics(other, 5, loss=logged(run_dir, 5)["loss"] * (1 + 1e-6))
    assert not compare(run_dir, other)
    said = capsys.readouterr().out
    assert re.search(r"loss: first differs at step 5: .* \(relative 1\.\de-06\)", said)
    assert "first difference: step 5 (loss)" in said


def test_a_moment_that_differs_in_one_bit_is_named(run_dir, tmp_path, capsys):
    other = copy(run_dir, tmp_path)
    folder = other / "checkpoints" / "step_00000015"
    path = folder / "rank_00001.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("|exp_avg") and tensors[name].numel() > 9)
    tensors[name].view(dtype=tensors[name].dtype)[3] = np.nextafter(
        np.float32(tensors[name][3]), np.float32(np.inf)
    ).item()
    save_file(tensors, path, metadata=metadata)
    manifest = json.loads((folder / "manifest.json").read_text())
    written = path.read_bytes()
    manifest["files"][path.name] = {"size": len(written), "sha256": hashlib.sha256(written).hexdigest()}
    content = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(content)
    (folder / "COMMITTED").write_text(hashlib.sha256(content).hexdigest())
    assert not compare(run_dir, other)
    said = capsys.readouterr().out
    assert f"weights: first differ at step 15: {name}, 1 of " in said
    assert "first difference: step 15 (weights)" in said


def test_the_sequence_that_differs_is_named(run_dir, tmp_path, capsys):
    """Two runs of which only recipe and curves are left, and whose seeds differ."""
    found = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        recipe = yaml.safe_load((run_dir / "config.yaml").read_text()) | {"seed": seed, "run_dir": str(folder)}
        (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
        points = [{"step": 2, "loss": 1.0, "data_digest": rebuild(folder, 2, print).digest}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
        found.append(folder)
    assert not compare(*found)
    said = capsys.readouterr().out
    assert "recipe: seed: 0 -> 1" in said
    assert re.search(r"data: first differ at step 2: lane 0, sequence 1 holds .*, and in the other ", said)
    assert "first difference: step 2 (data)" in said


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--diff", "same"], 0),
        (["--diff", "missing"], 2),
        (["--step", "1", "--weights", "none"], 0),
        ([], 2),
        (["--step", "1", "--diff", "same"], 2),
    ],
)
def test_exit_codes(run_dir, tmp_path, monkeypatch, arguments, code):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "same").symlink_to(run_dir)
    assert CliRunner().invoke(app, ["replay", str(run_dir), *arguments]).exit_code == code


HOSTILE = "</figure><script>alert(1)</script>\" onerror='alert(2)' \x1b[31m"


class Tags(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs


def test_hostile_samples_stay_text(run_dir, tmp_path):
    step = rebuild(run_dir, 1, print)
    text = np.array([400, 401], np.int32) % 100
    packed = PackedSequence(
        lane=0, index=0, input_ids=text, labels=text, doc_lens=np.array([2], np.int32), source=np.zeros(1, np.int32),
        pair=np.full(1, -1), visual_positions=np.zeros(0, np.int32), tiles=np.zeros((0, 3, 16, 16), np.uint8),
        patch_mask=np.zeros((0, 4), bool), grids=np.zeros((0, 2), np.int32), keys=(HOSTILE,), skipped=(),
        lane_state=np.zeros(0, np.int64),
    )  # fmt: skip
    sample = Sample(HOSTILE, HOSTILE + "\udcff", HOSTILE, 0, 2, 2, 0)
    hostile = ReplayedStep(1, step.config, None, step.layout, [ReplayedSequence(packed, [sample])])
    write_replay(tmp_path / "page.html", hostile, [[float("nan")]], [(HOSTILE, HOSTILE)])
    found = Tags((tmp_path / "page.html").read_text())
    assert not {"script", "link", "iframe"} & set(found.tags)
    assert not any(name.startswith("on") for name, _ in found.attributes)
    assert printable(HOSTILE).count("\\x1b") == 1


def test_a_large_batch_shows_the_sequences_of_the_highest_loss(run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("megablip.replay.page.MAX_SEQUENCES", 1)
    step = rebuild(run_dir, 1, print)
    losses = [[float(number)] * len(sequence.samples) for number, sequence in enumerate(step.sequences)]
    write_replay(tmp_path / "page.html", step, losses, [])
    page = (tmp_path / "page.html").read_text()
    assert "lane 3, sequence 0" in page
    assert "lane 2, sequence 0" not in page
    assert "3 sequences more" in page
