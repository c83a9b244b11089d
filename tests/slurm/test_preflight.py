"""What the nodes are checked for before a job trains: a bad one is named with a remedy, and not used."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import yaml

from megablip.engine.topology import job_port
from tests.slurm.cluster import Node
from tests.slurm.submitted import START_S, Submitted


def make_read_only(node: Node, folder: Path) -> None:
    node.run("mount", "--bind", str(folder), str(folder))
    node.run("mount", "-o", "remount,bind,ro", str(folder))


def test_each_bad_node_is_named_with_what_to_do_and_left_out(cluster, straight, tmp_path):
    """One of four nodes is good: another can't write the run, one has no interpreter, one lacks a shard."""
    recipe = straight.recipe("bad-nodes", "20 steps")
    run_dir = recipe.parent
    make_read_only(cluster.nodes["n2"], run_dir)
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    interpreter.chmod(0o755)
    cluster.nodes["n3"].run("mount", "--bind", "/bin/false", str(interpreter))
    [source, *_] = yaml.safe_load(recipe.read_text())["data"]["sources"]
    shard = sorted(Path(source["shards"]).parent.glob("caption-*.tar"))[1]
    cluster.nodes["n4"].run("mount", "--bind", "/dev/null", str(shard))
    run = Submitted.start(cluster, recipe, nodes=4, partition="four", python=str(interpreter))
    assert run.job.wait(START_S) == "COMPLETED", run.describe()
    [attempt] = run.attempts
    assert (attempt["nodes"], attempt["outcome"]) == (["n1"], "finished")
    found = {
        "n2": ("run directory: [Errno 30] Read-only file system", "check the path and its permissions"),
        "n3": ("start: no word from it: srun: error: n3: task 2: Exited with exit code 1", "see that the interpreter"),
        "n4": ("shards of caption: 2 shards, readable and indexed, and 3 shards", "mount the same file system there"),
    }
    log = run.log
    for node, (what, remedy) in found.items():
        assert f"{node} is left out: {what}" in log
        assert remedy in log


def test_a_port_in_use_is_told_and_another_one_taken(cluster, straight):
    run = Submitted.start(cluster, straight.recipe("port", "5 steps"), options=["--hold"])
    with socket.socket() as other:
        other.bind(("127.0.0.1", job_port(run.job.number, 0)))
        other.listen()
        cluster.run("scontrol", "release", str(run.job.number))
        assert run.job.wait(START_S) == "COMPLETED", run.describe()
    assert f"port {job_port(run.job.number, 0)} of n1 is taken; trying another" in run.log
    assert run.attempts[-1]["outcome"] == "finished"


def test_nothing_starts_where_all_nodes_lack_a_shard(cluster, straight):
    recipe = straight.recipe("no-shard", "5 steps")
    raw = yaml.safe_load(recipe.read_text())
    missing = raw["data"]["sources"][0]["shards"] = str(recipe.parent / "caption-{0..1}.tar")
    recipe.write_text(yaml.safe_dump(raw))
    run = Submitted.start(cluster, recipe)
    assert run.job.wait(START_S) == "FAILED"
    assert "caption-" in run.log, missing
    assert not run.attempts or run.attempts[-1]["outcome"] == "failed"
    assert not (run.run_dir / "metrics.jsonl").exists()
