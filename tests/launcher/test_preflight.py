"""The checks of a job's nodes as a whole: real processes, which a shell starts in srun's place."""

from __future__ import annotations

import shlex
import socket
import sys
from pathlib import Path

import pytest
import yaml

from launcher.preflight import preflight, preflight_here
from megablip.config import dump_config, load_config
from megablip.errors import ConfigError
from tests.data.builders import write_tar
from tests.distributed.runs import REPOSITORY
from tests.minimal import RECIPE
from tests.small_export import make_export

# As `python -m launcher`, with less patience for nodes that do not come.
HURRIED = """\
import runpy, sys
sys.path.insert(0, {repository!r})
import launcher.between_nodes
launcher.between_nodes.ARRIVE_S, launcher.between_nodes.VALUES = {arrive_s}, {{"cpu": 5000}}
del sys.argv[0]
runpy.run_module("launcher", run_name="__main__")
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    write_tar(tmp_path / "a.tar", [{"txt": b"words"}])
    source = {"name": "a", "shards": str(tmp_path / "a.tar"), "schema": "text", "weight": 1}
    export = make_export(tmp_path)
    raw = RECIPE | {"run_dir": str(tmp_path / "run"), "model": {"path": str(export)}, "engine": {"ranks": 2}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw | {"data": RECIPE["data"] | {"sources": [source]}}))
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_nodes_that_work_and_one_without_an_interpreter(recipe, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(load_config(recipe)))
    program = [sys.executable, "-c", HURRIED.format(repository=str(REPOSITORY), arrive_s=10.0)]

    def step(words: list[str]) -> list[str]:
        assert words[:2] == ["-m", "launcher"]
        command = shlex.join([*program, "launcher", *words[2:]])
        lines = [f"SLURMD_NODENAME=n{number} SLURM_NODEID={number} OMP_NUM_THREADS=1 {command} &" for number in (0, 1)]
        told = "echo 'srun: error: n2: task 2: Exited with exit code 2' >&2"
        return ["sh", "-c", "\n".join([*lines, told, "wait"])]

    report = preflight(config, ["n0", "n1", "n2"], ("127.0.0.1", free_port()), step)
    report.print()
    out = capsys.readouterr().out
    assert list(report.bad) == ["n2"], out
    assert "n2: task 2: Exited with exit code 2" in report.bad["n2"]
    # Three nodes of two ranks are too many for four lanes, which is nobody's fault.
    assert report.usable == []
    assert "n2: start: no word from it" in report.reason
    found = {finding.subject: finding for finding in report.findings}
    assert found["batch"].remedy == "use 2 nodes"
    assert found["meeting place"].found.startswith("2 of 3 nodes met")
    assert found["all-reduce"].found.startswith("1 pairs of nodes, all sums right")
    assert found["run directory"].found == "2 nodes see the same files"
    assert not list((tmp_path / "run").iterdir())


def test_nodes_that_are_not_done_in_time_are_named(tmp_path):
    report = preflight(tmp_path / "config.yaml", ["n0", "n1"], ("127.0.0.1", 1), lambda words: ["sleep", "60"], 0.2)
    assert list(report.bad) == ["n0", "n1"]
    assert "not done after 0 s" in report.bad["n0"]
    assert report.usable == []


def test_on_a_login_node_recipe_and_packages_are_checked(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("COLUMNS", "250")
    profile = tmp_path / "ours.yaml"
    profile.write_text("{gpus_per_node: 0, ranks_per_node: 2, time: '1:00:00'}")
    assert preflight_here(recipe, [], str(profile), 2)
    assert not preflight_here(recipe, [], str(profile), 3)
    assert "use 2 nodes" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="the recipe does not exist"):
        preflight_here(tmp_path / "none.yaml", [], str(profile), 2)
