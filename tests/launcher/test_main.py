"""`python -m launcher`: what it prints is what `megablip train` runs."""

from __future__ import annotations

import base64
import json
import shlex
import subprocess
import sys

import yaml

from megablip.config import load_config
from tests.data.builders import write_tar
from tests.distributed.runs import REPOSITORY
from tests.minimal import RECIPE, make_start


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher", *arguments], cwd=REPOSITORY, capture_output=True, text=True
    )


def test_the_printed_command_starts_the_ranks_of_the_resolved_recipe(tmp_path):
    write_tar(tmp_path / "a.tar", [{"txt": b"words"}])
    make_start(tmp_path / "start")
    recipe = tmp_path / "recipe.yaml"
    source = {"name": "a", "shards": str(tmp_path / "a.tar"), "schema": "text", "weight": 1}
    recipe.write_text(yaml.safe_dump(RECIPE | {"data": RECIPE["data"] | {"sources": [source]}}))
    run_dir = tmp_path / "a run; rm -rf x"
    changes = [f"run_dir={run_dir}", f"model.path={tmp_path / 'start'}", "engine.ranks=3"]
    done = run("print", str(recipe), *changes)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    [world] = [word.removeprefix("--world_info=") for word in words if word.startswith("--world_info=")]
    assert json.loads(base64.urlsafe_b64decode(world)) == {"localhost": [0, 1, 2]}
    assert words[-2:] == ["megablip.train", str(run_dir / "config.yaml")]
    assert load_config(words[-1]).engine.ranks == 3


def test_a_mistake_is_named_without_a_traceback(tmp_path):
    done = run("print", str(tmp_path / "none.yaml"))
    assert done.returncode == 1
    assert "the recipe does not exist" in done.stderr
    assert "Traceback" not in done.stderr
