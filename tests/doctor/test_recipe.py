"""Whether a recipe could start, as `megablip doctor RECIPE` and the checks of a job's nodes see it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

from megablip.cli import app
from megablip.config import Config, parse_config
from megablip.doctor import recipe
from megablip.doctor.finding import Finding
from megablip.doctor.recipe import check_batch, check_paths, check_recipe, check_space, trained_values
from megablip.model.blip3 import Blip3Config
from megablip.model.trained import trained_part
from tests.data.builders import write_tar
from tests.minimal import RECIPE
from tests.small_export import make_export


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    return make_export(tmp_path_factory.mktemp("export"), chat=True)


@pytest.fixture
def raw(tmp_path, export) -> dict:
    source = {"name": "a", "shards": str(tmp_path / "a-*.tar"), "schema": "text", "weight": 1}
    write_tar(tmp_path / "a-0.tar", [{"txt": b"words"}])
    changes = {"run_dir": str(tmp_path / "run"), "model": {"path": str(export)}}
    return RECIPE | changes | {"data": RECIPE["data"] | {"sources": [source]}}


def config_of(raw: dict, **changes) -> Config:
    return parse_config(raw | changes, "test")


def by_subject(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


def test_a_recipe_that_could_start(raw):
    found = by_subject(check_recipe(config_of(raw)))
    assert all(finding.ok for finding in found.values())
    assert found["shards of a"].warns  # not indexed yet
    assert set(found) == {"batch", "model", "shards of a", "run directory", "tokenizer", "disk"}
    assert not list((Path(raw["run_dir"])).iterdir())


def test_the_command_says_all_of_it_and_what_to_do(raw, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    environment = {"COLUMNS": "300"}
    right = CliRunner().invoke(app, ["doctor", str(path)], env=environment)
    assert right.exit_code == 0, right.output
    assert "can be written" in right.output
    wrong = CliRunner().invoke(app, ["doctor", str(path), "data.sources.0.shards=none/*.tar"], env=environment)
    assert wrong.exit_code == 1
    [line] = [line for line in wrong.output.splitlines() if "!!" in line]
    assert "shards of a" in line
    assert "check data.sources.*.shards" in line
    both = CliRunner().invoke(app, ["doctor", "--gpu", str(path)])
    assert both.exit_code == 2


def test_shards_that_are_cut_short_or_not_readable_are_named(raw, tmp_path, monkeypatch):
    (tmp_path / "a-1.tar").write_bytes(b"x" * 100)
    assert any("a-1.tar is cut short" in finding.found for finding in check_paths(config_of(raw)) if not finding.ok)
    monkeypatch.setattr(recipe, "open_shard", lambda path: (_ for _ in ()).throw(PermissionError(13, "no", path)))
    found = by_subject(check_paths(config_of(raw)))["shards of a"]
    assert not found.ok
    assert "a-0.tar" in found.found


def test_an_indexed_source_is_said_to_be(raw, tmp_path):
    from megablip.data.samples import index_sources

    config = config_of(raw)
    index_sources(config.data)
    found = by_subject(check_paths(config))["shards of a"]
    assert (found.found, found.warns) == ("1 shards, readable and indexed", False)


def test_of_many_shards_some_are_looked_at(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "LOOKED_AT", 3)
    for number in range(1, 10):
        write_tar(tmp_path / f"a-{number}.tar", [{"txt": b"words"}])
    opened = []
    real = recipe.open_shard
    monkeypatch.setattr(recipe, "open_shard", lambda path: opened.append(path) or real(path))
    found = by_subject(check_paths(config_of(raw)))["shards of a"]
    assert found.found.startswith("10 shards, 3 looked at")
    assert len(opened) == 3


def test_a_run_directory_that_can_not_be_written_is_told(raw, tmp_path):
    (tmp_path / "run").write_text("a file")
    found = by_subject(check_paths(config_of(raw)))["run directory"]
    assert (found.ok, found.means) == (False, "nothing could be saved")


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_weights_that_are_not_whole_are_told(raw, export, tmp_path, damage):
    copy = tmp_path / "copy"
    shutil.copytree(export, copy)
    weights = copy / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink() if damage == "missing" else weights.write_bytes(content[: len(content) // 2])
    found = by_subject(check_paths(config_of(raw, model={"path": str(copy)})))["model"]
    assert not found.ok
    assert str(copy) in found.found


@pytest.mark.parametrize(
    ("nodes", "ranks", "lanes", "ok", "warns", "words"),
    [
        (2, 4, 8, True, False, "8 lanes on 8 ranks (2 nodes), 1 micro-batches a step, all of them full"),
        (2, 3, 8, True, True, "33% of their places stay empty"),
        (3, 4, 8, False, False, "12 ranks, and there are 8 lanes"),
    ],
)
def test_ranks_and_lanes(raw, nodes, ranks, lanes, ok, warns, words):
    config = config_of(raw, batch={"lanes": lanes}, engine={"ranks": ranks})
    [found] = check_batch(config, nodes, on_gpu=False)
    assert (found.ok, found.warns) == (ok, warns)
    assert words in found.found


def test_what_to_do_about_nodes_that_do_not_fit(raw):
    config = config_of(raw, batch={"lanes": 8}, engine={"ranks": 2})
    assert check_batch(config, 5, on_gpu=False)[0].remedy == "use 4 nodes"
    assert "nodes divide 8 lanes" in check_batch(config, 3, on_gpu=False)[0].remedy


def test_room_for_the_checkpoints_that_are_kept(raw, monkeypatch):
    config = config_of(raw, checkpoint={"keep": 4})
    monkeypatch.setattr(recipe, "MIN_FREE_BYTES", 0)
    needed = 5 * 12 * trained_values(config)
    for free, ok in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(recipe.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert check_space(config)[0].ok == ok
    # What has been saved already needs no room any more.
    saved = Path(config.run_dir) / "checkpoints" / "step_00000005"
    saved.mkdir(parents=True)
    (saved / "rank_00000.safetensors").write_bytes(b"x" * 10)
    monkeypatch.setattr(recipe.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 10))
    assert check_space(config)[0].ok


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"train_tower": True},
        {"lora": {"rank": 4}},
        {"lora": {"rank": 3, "targets": ["o_proj"], "also_train": ["sampler"]}},
        {"lora": {"rank": 3, "also_train": ["embeddings", "head"]}},
    ],
    ids=str,
)
def test_what_a_checkpoint_holds_is_what_the_model_trains(raw, export, model):
    """Counted from headers, and by the model itself."""
    config = config_of(raw, model={"path": str(export)} | model)
    built = trained_part(Blip3Config.of_run(config.model), config.model)
    real = sum(parameter.numel() for parameter in built.parameters() if parameter.requires_grad)
    assert trained_values(config) == real
