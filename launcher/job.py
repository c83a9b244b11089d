"""The job of one run: what stands in RUN/launch, and what its batch step does.

recipe.yaml    resolved when the job was written, so that later edits don't change a job that waits
profile.yaml   of the cluster
job.sbatch     the script; Slurm's log comes beside it
"""

from __future__ import annotations

from pathlib import Path

from launcher.allocation import SlurmError, SlurmJob, show
from launcher.profile import ClusterProfile, dump_profile, load_profile
from launcher.render import render_job
from launcher.submit import submit
from launcher.supervise import Supervisor
from megablip.config import Config, dump_config, load_config
from megablip.errors import ConfigError

FOLDER, JOB = "launch", "job"


def write_job(
    recipe: Path,
    overrides: list[str],
    profile_name: str,
    nodes: int,
    *,
    name: str | None = None,
    command: list[str] | None = None,
) -> Path:
    """Write the job of a recipe into its run directory; the script.

    The profile says how many ranks a node has, unless `engine.ranks` is among the overrides.

    Args:
        name: of the job; None: the run directory's.
        command: of the batch step, after `python -m launcher`; None: to supervise the run.

    Raises:
        ConfigError: in recipe or profile, more ranks than lanes or GPUs, or a folder that can't be written.
    """
    profile, config = _resolved(recipe, overrides, profile_name, nodes)
    run_dir = Path(config.run_dir).resolve()
    script = run_dir / FOLDER / "job.sbatch"
    command = command or ["supervise", str(run_dir)]
    text = render_job(profile, name=name or run_dir.name, nodes=nodes, command=command, folder=Path.cwd())
    try:
        script.parent.mkdir(parents=True, exist_ok=True)
        (script.parent / "recipe.yaml").write_text(dump_config(config))
        (script.parent / "profile.yaml").write_text(dump_profile(profile))
        script.write_text(text)
    except OSError as error:
        raise ConfigError(f"the job can't be written: {error}", where=str(script.parent)) from None
    return script


def most_nodes(recipe: Path, overrides: list[str], profile_name: str) -> int:
    """Nodes whose ranks a recipe has lanes for.

    Raises:
        ConfigError: in recipe or profile, or not even one.
    """
    _, config = _resolved(recipe, overrides, profile_name, 1)
    return config.batch.lanes // config.engine.ranks


def _resolved(recipe: Path, overrides: list[str], profile_name: str, nodes: int) -> tuple[ClusterProfile, Config]:
    profile = load_profile(profile_name)
    if not any(override.partition("=")[0] == "engine.ranks" for override in overrides):
        overrides = [*overrides, f"engine.ranks={profile.ranks}"]
    config = load_config(recipe, overrides)
    ranks = config.engine.ranks
    if profile.gpus_per_node and ranks > profile.gpus_per_node:
        raise ConfigError(
            f"{ranks} ranks a node need as many GPUs, and a node has {profile.gpus_per_node}",
            where=f"engine.ranks, profile {profile_name}",
        )
    if nodes * ranks > config.batch.lanes:
        raise ConfigError(
            f"{nodes} nodes of {ranks} ranks are more than the {config.batch.lanes} lanes, and each rank needs one",
            where="batch.lanes",
            remedy=f"ask for at most {max(config.batch.lanes // ranks, 1)} nodes, or begin a run with more lanes",
        )
    return profile, config


def submit_job(script: Path, options: list[str] | tuple[str, ...] = ()) -> int:
    """Hand a script that `write_job` has written to Slurm; the job's number.

    Args:
        options: of sbatch, beside those in the script.

    Raises:
        ConfigError: the run has a job already, or Slurm refuses this one.
    """
    if state := job_state(script.parent.parent):
        raise ConfigError(
            f"the run has a job already: {state}",
            where=str(script.parent),
            remedy="wait for it, or scancel it first; a failed or requeued run goes on by itself",
        )
    number = submit(script, options)
    (script.parent / JOB).write_text(f"{number}\n")
    return number


def job_number(run_dir: Path) -> int | None:
    """Of the job that was submitted last for a run; None if there was none."""
    try:
        return int((run_dir / FOLDER / JOB).read_text())
    except (OSError, ValueError):
        return None


def job_state(run_dir: Path) -> str:
    """The job of a run that waits or runs, in words; empty if there is none, or no Slurm to ask."""
    number = job_number(run_dir)
    if number is None:
        return ""
    try:
        facts = show("job", str(number))
    except SlurmError:  # Slurm forgets a job some minutes after its end
        return ""
    state, reason = facts.get("JobState"), facts.get("Reason", "None")
    if state not in {"PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING"}:
        return ""
    return f"job {number} is {state}" + (f" ({reason})" if reason != "None" else "")


def run_job(run_dir: Path) -> int:
    """See the run of this job through; the exit code. On the first node of the job."""
    folder = run_dir / FOLDER
    job = SlurmJob.here(load_profile(folder / "profile.yaml"))
    return Supervisor(load_config(folder / "recipe.yaml", []), job, at_once=False).run()
