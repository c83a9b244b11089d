"""A chain of all five stages at their smallest, one of which fails at first."""

from __future__ import annotations

import json

from launcher.chain import Chain
from launcher.job import job_number
from megablip.engine.status import RunStatus
from tests.slurm.cluster import Job, wait_until
from tests.slurm.stages import STAGES, make_stages
from tests.slurm.submitted import launcher, write_profile

FAILING, BEHIND = "interleave", ("dpo", "safety")


def test_a_chain_stops_at_a_failing_stage_and_goes_on_when_that_is_mended(cluster, tmp_path):
    folder = tmp_path / "stages"
    recipes = make_stages(folder)
    out = tmp_path / "chain"
    command = [
        "chain", *(str(recipes[stage]) for stage in STAGES), "--out", str(out), "--nodes", "1", "--submit",
        "--profile", str(write_profile(tmp_path)), "--ask", f"conversation={folder}/held-out-sft.tar", "--limit", "2",
    ]  # fmt: skip
    shard, away = folder / f"{FAILING}.tar", folder / "away"
    shard.rename(away)

    def submit_and_wait() -> dict[str, Job]:
        launcher(cluster, *command)
        jobs = {stage.name: Job(cluster, job_number(stage.run_dir)) for stage in Chain.read(out).stages}
        ended = "end of the chain"
        wait_until(lambda: all(job.has_ended for job in jobs.values()), ended, 600, jobs[FAILING].describe, poll_s=1)
        return jobs

    jobs = submit_and_wait()
    states = {name: job.state for name, job in jobs.items()}
    assert states == dict.fromkeys(("pretrain", "sft"), "COMPLETED") | {FAILING: "FAILED"} | dict.fromkeys(
        BEHIND, "CANCELLED"
    ), jobs[FAILING].describe()
    told = {line.split()[0]: line for line in launcher(cluster, "status", str(out)).stdout.splitlines() if line.split()}
    assert told[FAILING].split()[1] == "failed"
    assert str(shard) in json.loads((out / FAILING / "stage.json").read_text())["failed"]
    for stage in BEHIND:
        assert f"{FAILING} failed before it" in told[stage]
        assert not (out / stage / "run" / "checkpoints").exists()

    away.rename(shard)
    again = submit_and_wait()
    assert {name: again[name].number for name in ("pretrain", "sft")} == {
        name: jobs[name].number for name in ("pretrain", "sft")
    }, "what is done is not done twice"
    for before, stage in zip((None, *STAGES), STAGES, strict=False):
        assert again[stage].state == "COMPLETED", again[stage].describe()
        assert RunStatus(out / stage / "run").current["outcome"] == "finished"
        answers = json.loads((out / stage / "evaluation" / "conversation" / "results.json").read_text())
        assert answers
        if before:
            config = (out / stage / "run" / "config.yaml").read_text()
            assert str(out / before / "export") in config
    states = launcher(cluster, "status", str(out)).stdout
    assert [line.split()[:2] for line in states.splitlines() if line.split()[:1] and line.split()[0] in STAGES] == [
        [stage, "done"] for stage in STAGES
    ]
