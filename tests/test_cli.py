"""The installed command: mistakes are answered at once, in words, before torch is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner

from megablip import doctor
from megablip.cli import app
from megablip.config import dump_config, load_config
from tests.data.builders import write_tar
from tests.minimal import RECIPE, make_start

# An import of what takes seconds would end in a traceback.
WITHOUT_TORCH = """
import sys
sys.modules |= dict.fromkeys(["torch", "transformers", "deepspeed", "accelerate"])
from megablip.cli import main
main()
"""


def megablip(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, in a process that can't import torch."""
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def recipe(tmp_path):
    """A recipe whose shards and model are there, as far as `megablip train` looks before it starts ranks."""
    write_tar(tmp_path / "data" / "a-0.tar", [{"txt": b"x"}])
    make_start(tmp_path / "start")
    source = {"name": "a", "shards": str(tmp_path / "data" / "a-*.tar"), "schema": "text", "weight": 1}
    raw = RECIPE | {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tmp_path / "start")},
        "data": RECIPE["data"] | {"sources": [source]},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def used_run(recipe):
    """Make the recipe's run directory one that has a checkpoint."""
    config = load_config(recipe)
    folder = recipe.parent / "run" / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True)
    (folder / "COMMITTED").write_text("x")
    (recipe.parent / "run" / "config.yaml").write_text(dump_config(config))


MISTAKES = {
    "no recipe": (lambda r: r.unlink(), [], ["ConfigError", "does not exist", "recipe.yaml", "check the path"]),
    "typo": (lambda r: None, ["optimizer.rl=1"], ["ConfigError", "unknown key 'optimizer.rl'", "did you mean"]),
    "wrong value": (lambda r: None, ["batch.lanes=no"], ["ConfigError", "batch.lanes", "recipe.yaml"]),
    "missing shards": (
        lambda r: None,
        ["data.sources.0.shards=/no/such/folder/*.tar"],
        ["ShardError", "does not exist", "/no/such/folder", "to do"],
    ),
    "empty folder": (
        lambda r: (r.parent / "data" / "a-0.tar").unlink(),
        [],
        ["ShardError", "is empty", "data", "put shards there"],
    ),
    "no model": (
        lambda r: (r.parent / "start" / "config.json").unlink(),
        [],
        ["ConfigError", "no model to start from", "model.path", "megablip convert init"],
    ),
    "another recipe": (
        used_run,
        ["optimizer.lr=0.5"],
        ["ConfigError", "belongs to another recipe", "optimizer.lr: 0.001 -> 0.5", "run", "choose another run_dir"],
    ),
    "a used run that must be new": (
        used_run,
        ["resume=never"],
        ["ConfigError", "already has checkpoints", "resume=auto"],
    ),
    "a run_dir that can't be": (
        lambda r: (r.parent / "file").touch(),
        ["run_dir={folder}/file/run"],
        ["ConfigError", "can't be written", "file/run"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_train_answers_a_mistake_in_words(recipe, mistake):
    prepare, overrides, words = MISTAKES[mistake]
    prepare(recipe)
    before = sorted(recipe.parent.rglob("*"))
    done = megablip("train", recipe, *(text.format(folder=recipe.parent) for text in overrides))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert done.stdout == ""
    assert sorted(recipe.parent.rglob("*")) == before, "a run that did not start leaves nothing behind"


def test_help_names_the_verbs():
    done = megablip("--help")
    assert done.returncode == 0
    for verb in ("train", "convert", "eval", "doctor"):
        assert verb in done.stdout


def test_an_unknown_verb_is_refused():
    done = megablip("trian")
    assert done.returncode == 2
    assert "trian" in done.stderr


def test_convert_and_eval_name_what_is_missing(tmp_path):
    for arguments in (
        ["convert", "zero-to-hf", str(tmp_path), str(tmp_path / "out")],
        ["eval", str(tmp_path), "no/*.tar", "--output", str(tmp_path / "out")],
    ):
        result = CliRunner().invoke(app, arguments)
        assert str(tmp_path) in str(result.exception)
        assert type(result.exception).__name__ in ("CheckpointError", "ConfigError")


def test_doctor_is_content_with_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for subject in ("python", "torch", "deepspeed", "device", "attention", "disk"):
        assert subject in result.output


def test_doctor_says_what_to_do_about_a_wrong_version(monkeypatch):
    real = doctor.metadata.version

    def version(name):
        if name == "webdataset":
            raise doctor.metadata.PackageNotFoundError(name)
        return "0.1" if name == "deepspeed" else real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    wrong = [line for line in result.output.splitlines() if "!!" in line]
    assert len(wrong) == 2
    assert all("pip install" in line for line in wrong)


def test_doctor_finds_a_stale_build_lock(monkeypatch, tmp_path):
    lock = tmp_path / "op" / "lock"
    lock.parent.mkdir()
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(doctor.time, "time", lambda: lock.stat().st_mtime + 7200)
    findings = doctor.stale_builds()
    assert [finding.ok for finding in findings] == [False]
    assert findings[0].remedy == f"rm {lock}"


def test_the_main_module_prints_errors_without_a_traceback(tmp_path):
    """The same through `python -m`, with all imports allowed."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "megablip.cli", "train", str(tmp_path / "no.yaml")],
        capture_output=True,
        text=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "megablip.launch" in imported
    assert not imported & {"torch", "transformers", "deepspeed"}
    assert done.returncode == 1
