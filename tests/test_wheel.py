"""The built wheel holds megablip only, and works far from the checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SOURCES = ["setup.cfg", "pyproject.toml", "README.md", "LICENSE", "megablip", "ds_configs", "launcher", "tools",
           "tokenization", "tests"]  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: a build leaves its folders in the sources, where old files would get into the next wheel."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", source / "dist", source)
    return next((source / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--target", target, wheel)
    return target


def pip(*arguments) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def python(target: Path, folder: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_megablip_and_all_its_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.endswith("/")}
    assert {re.sub(r"-.*\.dist-info", "", name.split("/")[0]) for name in held} == {"megablip"}
    wanted = {
        str(path.relative_to(REPOSITORY))
        for pattern in ("**/*.py", "recipes/**/*.yaml", "**/*.j2", "ds_configs/*.json", "py.typed")
        for path in (REPOSITORY / "megablip").glob(pattern)
    }
    assert any(name.startswith("megablip/ds_configs/") for name in wanted)
    assert {name for name in held if name.startswith("megablip/")} == wanted


def test_the_command_works_elsewhere(installed, tmp_path):
    assert "train" in python(installed, tmp_path, "-m", "megablip.cli", "--help")
    assert (installed / "bin" / "megablip").exists()


def test_packaged_files_are_found_elsewhere(installed, tmp_path):
    script = """
import json
from importlib.resources import files
import megablip
from megablip.config import load_config
from megablip.evaluate.report import write_report
from pathlib import Path
recipe = load_config(files("megablip") / "recipes" / "mini" / "pretrain.yaml")
write_report(Path("report.html"), title="title", metrics=[], group="kind", groups={}, pictures=[])
ds_config = files("megablip") / "ds_configs" / f"{recipe.engine.ds_config}.json"
print(json.dumps({"file": megablip.__file__, "stage": recipe.stage, "ds_config": json.loads(ds_config.read_text())}))
"""
    found = json.loads(python(installed, tmp_path, "-c", script))
    assert Path(found["file"]).is_relative_to(installed)
    assert found["stage"] == "pretrain"
    assert found["ds_config"]["zero_optimization"]["stage"] == 3
    assert "title" in (tmp_path / "report.html").read_text()
