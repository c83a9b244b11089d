"""Chains: what is submitted and waits for what, what a stage's job does after training, and what status says."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from launcher import chain as chains
from launcher.chain import Chain, Question, finish, is_done, plan_chain, run_stage, show_chain, submit_chain, write_jobs
from megablip.config import load_config
from megablip.engine.status import RunStatus
from megablip.errors import ConfigError, ShardError
from tests.minimal import RECIPE

NAMES = ["first", "second", "third"]
ASKED = [Question("reading", "held out/*.tar")]
# Says what it was asked, makes the folder that it was asked for, and fails or waits where a file says so.
PROGRAM = """\
import json, os, sys, time
folder, words = sys.argv[1], sys.argv[2:]
with open(folder + "/calls", "a") as stream:
    stream.write(json.dumps(words[2:]) + "\\n")
if os.path.exists(folder + "/waits"):
    open(folder + "/started", "w").close()
    time.sleep(60)
if words[2] == "convert":
    os.mkdir(words[5])
elif os.path.exists(folder + "/fails"):
    print("ShardError: no shard matches", flush=True)
    print("srun: error: n1: task 0: Exited with exit code 3", flush=True)
    sys.exit(3)
"""
SBATCH = """\
#!/bin/sh
number=$(($(cat "{folder}/number" 2>/dev/null || echo 100) + 1))
echo $number > "{folder}/number"
cd ../..
echo "$(basename "$PWD") $*" >> "{folder}/submitted"
echo $number
"""
SCONTROL = """\
#!/bin/sh
test -f "{folder}/job_$3" || exit 1
echo "JobId=$3 JobState=$(cat "{folder}/job_$3") Reason=Dependency NodeList=n1"
"""


class PlayedJob:
    """An allocation of which each step runs PROGRAM."""

    def __init__(self, folder: Path):
        self.folder, self.requeued = folder, False
        (folder / "program.py").write_text(PROGRAM)

    def usable_nodes(self):
        return ["n1", "n2"], {}

    def step(self, nodes: list[str], words: list[str]) -> list[str]:
        assert nodes == ["n1"]
        return [sys.executable, "-IS", str(self.folder / "program.py"), str(self.folder), *words]

    def requeue(self, bad_nodes) -> str:
        self.requeued = True
        return "job 7 is requeued"

    @property
    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """Folder of a played sbatch and scontrol; a file job_N there holds the state of job N."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("scontrol", SCONTROL)):
        (folder / name).write_text(text.format(folder=folder))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.fixture
def recipes(tmp_path) -> list[str]:
    for name in NAMES:
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(RECIPE | {"batch": {"lanes": 16}}))
    (tmp_path / "cluster.yaml").write_text("{gpus_per_node: 4, time: '2:00:00'}")
    return [str(tmp_path / f"{name}.yaml") for name in NAMES]


@pytest.fixture
def chain(recipes, tmp_path) -> Chain:
    planned = plan_chain(recipes, tmp_path / "a chain", ASKED, 5)
    planned.write()
    return planned


def trained(chain: Chain, name: str, step: int = 5) -> None:
    """A stage whose run has finished."""
    stage = chain.stage(name)
    folder = stage.run_dir / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "COMMITTED").write_text(f"hash{step}")
    status = RunStatus(stage.run_dir)
    status.begin(ranks=8)
    status.end("finished", last_step=step)


def done(chain: Chain, *names: str, job: PlayedJob) -> None:
    for name in names:
        stage = chain.stage(name)
        trained(chain, name)
        before = chain.before(stage)
        start = json.loads((before.folder / "stage.json").read_text())["trained"] if before else None
        (stage.folder / "stage.json").write_text(json.dumps({"start": start}))
        with chains._Stop() as stop:
            assert finish(chain, stage, job, stop) == 0


def submitted(slurm: Path) -> list[str]:
    return (slurm / "submitted").read_text().splitlines()


def test_each_job_waits_for_the_one_before_and_starts_from_its_export(chain, slurm, tmp_path):
    scripts = write_jobs(chain, str(tmp_path / "cluster.yaml"), 2)
    assert dict(submit_chain(chain, scripts)) == {
        "first": "job 101", "second": "job 102, after 101", "third": "job 103, after 102"
    }  # fmt: skip
    wait = "--kill-on-invalid-dep=yes job.sbatch"
    assert submitted(slurm) == [
        "first --parsable job.sbatch",
        f"second --parsable --dependency=afterok:101 {wait}",
        f"third --parsable --dependency=afterok:102 {wait}",
    ]
    second = load_config(scripts["second"].parent / "recipe.yaml")
    assert second.run_dir == str(tmp_path / "a chain" / "second" / "run")
    assert second.model.path == str(tmp_path / "a chain" / "first" / "export")
    assert load_config(scripts["first"].parent / "recipe.yaml").model.path == RECIPE["model"]["path"]
    assert f"launcher stage '{tmp_path / 'a chain'}' second\n" in scripts["second"].read_text()
    assert "#SBATCH --job-name=a_chain-second\n" in scripts["second"].read_text()
    assert Chain.read(chain.folder) == chain


def test_the_same_command_again_submits_what_is_neither_done_nor_waiting(chain, slurm, tmp_path):
    dict(submit_chain(chain, write_jobs(chain, str(tmp_path / "cluster.yaml"), 1)))
    done(chain, "first", job=PlayedJob(tmp_path))
    (slurm / "job_102").write_text("RUNNING")
    (slurm / "submitted").unlink()
    waiting = chain.stage("second").run_dir / "launch" / "recipe.yaml"
    waiting.write_text("as it was submitted")
    scripts = write_jobs(chain, str(tmp_path / "cluster.yaml"), 1)
    assert dict(submit_chain(chain, scripts)) == {
        "first": "done before", "second": "job 102 is RUNNING (Dependency)", "third": "job 104, after 102"
    }  # fmt: skip
    assert [line.split()[0] for line in submitted(slurm)] == ["third"]
    assert waiting.read_text() == "as it was submitted"


def test_overrides_are_of_all_or_of_one(recipes, tmp_path):
    chain = plan_chain([*recipes, "seed=3", "second:optimizer.lr=1e-5"], tmp_path, [], None)
    assert [stage.overrides for stage in chain.stages] == [["seed=3"], ["seed=3", "optimizer.lr=1e-5"], ["seed=3"]]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "needs stages of distinct names"),
        (["sft", "mini/sft"], "needs stages of distinct names"),
        (["sft", "dpo:seed=1"], "dpo is no stage of this chain"),
    ],
)
def test_what_is_no_chain_is_refused(words, error, tmp_path):
    with pytest.raises(ConfigError, match=error):
        plan_chain(words, tmp_path, [], None)


def test_the_shipped_recipes_make_a_chain(tmp_path, slurm):
    for form in ("{}", "mini/{}"):
        words = [form.format(name) for name in ("pretrain", "sft", "interleave", "dpo", "safety")]
        chain = plan_chain(words, tmp_path / form[:4], ASKED, None)
        (tmp_path / "cluster.yaml").write_text("{gpus_per_node: 0, ranks_per_node: 2, time: '2:00:00'}")
        assert len(write_jobs(chain, str(tmp_path / "cluster.yaml"), 2)) == 5


def test_a_stage_gets_no_more_nodes_than_it_has_lanes_for(tmp_path, slurm, capsys):
    """The shipped recipes have 512, 16, 32, 32 and 8 lanes; a node has eight ranks."""
    chain = plan_chain(["pretrain", "sft", "interleave", "dpo", "safety"], tmp_path / "chain", ASKED, None)
    scripts = write_jobs(chain, "h100_infiniband", 8)
    nodes = [re.search(r"--nodes=(\d+)", script.read_text())[1] for script in scripts.values()]
    assert nodes == ["8", "2", "4", "4", "1"]
    assert "safety: on 1 nodes" in capsys.readouterr().out


def test_nothing_is_written_where_one_stage_can_not_be(recipes, tmp_path, slurm):
    chain = plan_chain([*recipes, "third:batch.lanes=1"], tmp_path / "chain", [], None)
    (tmp_path / "cluster.yaml").write_text("{gpus_per_node: 0, ranks_per_node: 2, time: '2:00:00'}")
    with pytest.raises(ConfigError, match=r"larger than batch\.lanes"):
        write_jobs(chain, str(tmp_path / "cluster.yaml"), 2)
    assert not chain.folder.exists()


@pytest.mark.parametrize("text", ["reading", "reading=", "writing=a.tar"])
def test_a_question_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="is nothing to ask"):
        Question.parse(text)


def test_a_run_that_is_finished_is_converted_and_asked(chain, tmp_path):
    job = PlayedJob(tmp_path)
    assert not is_done(chain, chain.stages[0])
    done(chain, "first", job=job)
    stage = chain.stages[0]
    assert is_done(chain, stage)
    run, export, answers = str(stage.run_dir), str(stage.export), str(stage.folder / "evaluation" / "reading")
    asked = ["--output", answers, "--task", "reading", "--run-dir", run, "--limit", "5"]
    assert job.calls == [["convert", "zero-to-hf", run, export], ["eval", export, "held out/*.tar", *asked]]


def test_a_part_that_fails_is_named_and_the_next_time_begins_with_it(chain, tmp_path, capsys, slurm):
    job = PlayedJob(tmp_path)
    (tmp_path / "fails").touch()
    trained(chain, "first")
    (chain.stages[0].folder / "stage.json").write_text('{"start": null}')
    with chains._Stop() as stop:
        assert finish(chain, chain.stages[0], job, stop) == 1
    reason = "evaluate reading ended with exit code 3: ShardError: no shard matches"
    assert reason in capsys.readouterr().out
    assert table(chain)["first"].endswith(reason)
    assert "first failed before it" in table(chain)["second"]
    assert "not run" in table(chain)["third"]
    (tmp_path / "fails").unlink()
    with chains._Stop() as stop:
        assert finish(chain, chain.stages[0], job, stop) == 0
    assert [call[0] for call in job.calls] == ["convert", "eval", "eval"]
    assert is_done(chain, chain.stages[0])


def test_a_conversion_that_was_broken_off_is_made_again(chain, tmp_path):
    job = PlayedJob(tmp_path)
    trained(chain, "first")
    record = {"start": None, "trained": "step_00000005 hash5", "done": []}
    (chain.stages[0].folder / "stage.json").write_text(json.dumps(record))
    chain.stages[0].export.mkdir()  # as where the job was killed before it could say so
    with chains._Stop() as stop:
        assert finish(chain, chain.stages[0], job, stop) == 0
    assert [call[0] for call in job.calls] == ["convert", "eval"]


def test_a_run_that_went_on_is_converted_and_asked_again(chain, tmp_path):
    job = PlayedJob(tmp_path)
    done(chain, "first", "second", job=job)
    trained(chain, "first", step=9)
    with chains._Stop() as stop:
        assert finish(chain, chain.stages[0], job, stop) == 0
    assert len(job.calls) == 6
    assert not is_done(chain, chain.stage("second")), "it was trained from the old export"


def test_a_stage_that_another_export_has_made_is_not_trained_further(chain, tmp_path, monkeypatch):
    done(chain, "first", "second", job=PlayedJob(tmp_path))
    trained(chain, "first", step=9)
    with chains._Stop() as stop:
        finish(chain, chain.stages[0], PlayedJob(tmp_path), stop)
    monkeypatch.setattr(chains, "load_profile", lambda path: None)
    monkeypatch.setattr(chains.SlurmJob, "here", lambda profile: None)
    with pytest.raises(ConfigError, match="second was trained from another export") as caught:
        run_stage(chain.folder, "second")
    assert str(chain.stage("second").folder) in caught.value.where


@pytest.mark.parametrize("code", [1, 69, 75])
def test_what_is_not_trained_is_not_converted(chain, tmp_path, monkeypatch, code):
    monkeypatch.setattr(chains, "load_profile", lambda path: None)
    monkeypatch.setattr(chains.SlurmJob, "here", lambda profile: None)
    monkeypatch.setattr(chains, "run_job", lambda run_dir: code)
    chain.stages[0].folder.mkdir()
    assert run_stage(chain.folder, "first") == code


def test_what_a_run_can_not_begin_with_is_what_status_says(chain, tmp_path, monkeypatch, slurm):
    def refuse(run_dir: Path) -> int:
        raise ShardError("the shard does not exist", where="/none/x.tar", remedy="check data.sources.*.shards")

    monkeypatch.setattr(chains, "load_profile", lambda path: None)
    monkeypatch.setattr(chains.SlurmJob, "here", lambda profile: None)
    monkeypatch.setattr(chains, "run_job", refuse)
    chain.stages[0].folder.mkdir()
    with pytest.raises(ShardError):
        run_stage(chain.folder, "first")
    assert table(chain)["first"].endswith("the shard does not exist (/none/x.tar); to do: check data.sources.*.shards")
    monkeypatch.setattr(chains, "run_job", lambda run_dir: 75)
    run_stage(chain.folder, "first")
    assert "shard" not in table(chain)["first"]


def test_a_signal_while_it_converts_requeues_the_job(chain, tmp_path):
    job = PlayedJob(tmp_path)
    (tmp_path / "waits").touch()
    trained(chain, "first")
    (chain.stages[0].folder / "stage.json").write_text('{"start": null}')

    def signal_when_started() -> None:
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=signal_when_started)
    thread.start()
    with chains._Stop() as stop:
        assert finish(chain, chain.stages[0], job, stop) == 75
    thread.join()
    assert job.requeued
    (tmp_path / "waits").unlink()
    with chains._Stop() as stop:
        assert finish(chain, chain.stages[0], job, stop) == 0


def table(chain: Chain) -> dict[str, str]:
    """A stage's line, its cells apart by single blanks."""
    console = Console(width=300, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    show_chain(chain, console)
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    return {line.split()[0]: line for line in lines if line.split() and line.split()[0] in NAMES}


def test_status_says_why_a_stage_does_not_run(chain, slurm, tmp_path):
    assert table(chain)["first"] == "first not submitted"
    dict(submit_chain(chain, write_jobs(chain, str(tmp_path / "cluster.yaml"), 1)))
    (slurm / "job_101").write_text("RUNNING")
    (slurm / "job_102").write_text("PENDING")
    assert table(chain)["first"] == "first running 101 job 101 is RUNNING (Dependency)"
    assert table(chain)["second"] == "second waiting 102 job 102 is PENDING (Dependency)"
    for job in ("job_101", "job_102"):
        (slurm / job).unlink()
    status = RunStatus(chain.stages[0].run_dir)
    status.begin(ranks=4)
    status.end("failed", reason="loss is not finite", last_step=3)
    assert table(chain)["first"] == "first failed 101 3 steps loss is not finite"
    assert table(chain)["second"] == "second not run 102 first failed before it"
    assert table(chain)["third"] == "third not run 103 first failed before it"


def test_a_job_that_ended_before_it_could_say_why_is_known_by_its_log(chain, slurm, tmp_path):
    dict(submit_chain(chain, write_jobs(chain, str(tmp_path / "cluster.yaml"), 1)))
    log = chain.stages[0].run_dir / "launch" / "slurm-101.out"
    log.write_text("job.sbatch: line 20: /no/python: No such file or directory\n\n")
    assert table(chain)["first"].endswith("its job ended; job.sbatch: line 20: /no/python: No such file or directory")


def test_a_folder_without_a_chain_is_said(tmp_path):
    with pytest.raises(ConfigError, match="there is no chain here"):
        Chain.read(tmp_path)
