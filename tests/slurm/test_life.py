"""The life of a job: it trains, is stopped and requeued, loses processes and nodes, and goes on exactly."""

from __future__ import annotations

import math
from collections.abc import Callable

from megablip.metrics.points import last_step, read_metrics
from tests.distributed import runs
from tests.distributed.exact import different
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.submitted import Submitted, launcher

LONG = "100000 steps"


def test_a_job_trains_and_finishes_with_the_losses_of_one_machine(cluster, straight):
    run = Submitted.start(cluster, straight.recipe("finishing", "20 steps"))
    assert run.job.wait() == "COMPLETED", run.describe()
    assert runs.losses(run.run_dir) == straight.losses(20)
    [attempt] = run.attempts
    assert (attempt["outcome"], attempt["nodes"], attempt["ranks"]) == ("finished", ["n1", "n2"], 2)
    assert "finished" in launcher(cluster, "status", str(run.run_dir)).stdout


# How each of them ends an attempt, and who starts the next one.
def time_limit(cluster: Cluster, run: Submitted) -> str:
    # So near that the signal, 120 s before it, is due; Slurm looks at it every half minute.
    hours, minutes, _ = run.job.show()["RunTime"].split(":")
    limit = int(hours) * 60 + int(minutes) + 2
    cluster.run("scontrol", "update", f"JobId={run.job.number}", f"TimeLimit={limit}")
    wait_until(lambda: run.job.state == "PENDING", "requeue", 120, run.describe)
    cluster.run("scontrol", "update", f"JobId={run.job.number}", "TimeLimit=60")
    return "stopped, requeued"


def signal_to_the_ranks(cluster: Cluster, run: Submitted) -> str:
    cluster.run("scancel", "--signal=USR1", str(run.job.number))
    return "stopped, requeued"


def signal_to_the_batch_step(cluster: Cluster, run: Submitted) -> str:
    cluster.run("scancel", "--signal=USR1", "--batch", str(run.job.number))
    return "stopped, requeued"


def requeue(cluster: Cluster, run: Submitted) -> str:
    cluster.run("scontrol", "requeue", str(run.job.number))
    return "stopped, requeued"


def kill_a_rank(cluster: Cluster, run: Submitted) -> str:
    [rank, *_] = [rank for rank in cluster.nodes["n2"].processes("megablip.train") if is_rank(rank)]
    rank.kill()
    return "failed"


def kill_a_launcher(cluster: Cluster, run: Submitted) -> str:
    [launcher] = cluster.nodes["n2"].processes("deepspeed.launcher.launch")
    launcher.kill()
    return "failed"


def kill_a_slurmd(cluster: Cluster, run: Submitted) -> str:
    """What runs there goes on, unseen; Slurm gives the node up after SlurmdTimeout, and requeues the job."""
    node = cluster.nodes["n1"]
    node.kill_slurmd()
    wait_until(lambda: run.job.state == "PENDING", "requeue", 60, run.describe)
    node.start_slurmd()
    return "stopped or failed, requeued"  # the other node's ranks are told to end, and all save if that is quick enough


INCIDENTS: list[Callable[[Cluster, Submitted], str]] = [
    signal_to_the_ranks, time_limit, requeue, kill_a_rank, kill_a_launcher, kill_a_slurmd, signal_to_the_batch_step,
]  # fmt: skip


def is_rank(process) -> bool:
    return not any("deepspeed.launcher" in word for word in process.cmdline())


def test_a_run_goes_on_exactly_after_whatever_ends_an_attempt(cluster, straight):
    run = Submitted.start(cluster, straight.recipe("often-ended", LONG))
    for number, strike in enumerate(INCIDENTS, 1):
        run.wait_for_attempt(number, steps=3 * number)  # failures at the same step would end the job
        restarts = int(run.job.show()["Restarts"])
        expected, _, requeued = strike(cluster, run).partition(", ")
        following = run.wait_for_attempt(number + 1)
        ended = run.attempts[number - 1]
        print(f"{strike.__name__}: {ended} -> {following}")
        assert ended["outcome"] in expected.split(" or "), run.describe()
        assert int(run.job.show()["Restarts"]) == restarts + bool(requeued)
        assert following["nodes"] == ["n1", "n2"]
        if ended["outcome"] == "stopped":
            assert following["first_step"] == ended["last_step"], "not a step is lost"
        else:
            assert ended["last_step"] - 2 * straight.every <= following["first_step"] <= ended["last_step"]
    cluster.run("scancel", str(run.job.number))
    assert run.job.wait() == "CANCELLED", run.describe()
    wait_until(lambda: run.attempts[-1]["outcome"] != "running", "outcome", 60, run.describe)
    assert run.attempts[-1]["outcome"] == "stopped", "a cancelled job saves, and does not come back"
    step = last_step(run.run_dir)
    assert runs.losses(run.run_dir) == straight.losses(step)
    assert different(run.run_dir, straight.run_dir(step), step) == []
    print(launcher(cluster, "status", str(run.run_dir)).stdout)


def test_a_run_goes_on_with_fewer_nodes_and_the_same_data(cluster, straight):
    run = Submitted.start(cluster, straight.recipe("lost-node", LONG))
    run.wait_for_attempt(1)
    cluster.nodes["n1"].power_off()  # with the batch step
    wait_until(lambda: run.job.state == "PENDING", "requeue", 90, run.describe)
    cluster.run("scancel", str(run.job.number))

    again = Submitted.start(cluster, straight.recipe("lost-node", LONG), nodes=1)
    alone = again.wait_for_attempt(2, steps=10)
    assert (alone["nodes"], alone["ranks"]) == (["n2"], 1)
    assert run.attempts[0]["outcome"] == "failed"

    # Nobody is left to look after the job, so nothing of it may be left.
    [supervisor] = cluster.nodes["n2"].processes("supervise")
    supervisor.kill()
    assert again.job.wait() == "FAILED"
    wait_until(lambda: not cluster.nodes["n2"].processes("megablip.train"), "end of the ranks", 60)

    step, points = last_step(run.run_dir), read_metrics(run.run_dir)
    expected = straight.points(step)
    assert [point["data_digest"] for point in points] == [point["data_digest"] for point in expected]
    losses, on_both = straight.losses(step), alone["first_step"]
    assert runs.losses(run.run_dir)[:on_both] == losses[:on_both]
    # In bf16 another number of ranks rounds gradients otherwise.
    assert all(map(lambda one, other: math.isclose(one, other, rel_tol=1e-3), runs.losses(run.run_dir), losses))
