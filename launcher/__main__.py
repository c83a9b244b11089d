"""Start runs: on this machine, or on the nodes of a SLURM job.

python -m launcher local RECIPE [key.subkey=value ...]                 here, started again after failures
python -m launcher slurm RECIPE --nodes 4 [--submit] [key.subkey=value ...]
python -m launcher status RUN                                          attempts of a run, and how each ended
python -m launcher preflight RECIPE --nodes 4 [key.subkey=value ...]   whether it could start
python -m launcher chain pretrain sft --out DIR [--submit] ...         stages that start from each other's exports
python -m launcher print RECIPE [--hostfile HOSTS]                     the commands that start the ranks
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from megablip.config import load_config
from megablip.errors import MegablipError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Recipe = Annotated[Path, typer.Argument(help="YAML recipe")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.subkey=value ...")]
Profile = Annotated[str, typer.Option(help="cluster profile: a name in launcher/profiles, or a file")]
Hostfile = Annotated[Path | None, typer.Option(help="machines and their slots, as DeepSpeed writes them")]


@app.command()
def local(recipe: Recipe, overrides: Overrides = None) -> None:
    """Train on this machine; after a failure go on from the newest checkpoint.

    Ends with 0 when the run is finished, 75 when it was asked to stop and has
    saved, 1 when it failed too often, or twice at the same step.
    """
    from launcher.allocation import ThisMachine
    from launcher.supervise import Supervisor

    raise typer.Exit(Supervisor(load_config(recipe, overrides or []), ThisMachine(), at_once=True).run())


@app.command("print")
def print_command(recipe: Recipe, overrides: Overrides = None, hostfile: Hostfile = None) -> None:
    """Check a recipe, write its resolved form into the run directory, and print what starts the ranks.

    That is one command for each machine: this one alone, those of a hostfile, or inside a Slurm job its nodes.
    """
    from launcher.nodes import all_machines
    from megablip.launch import launcher_command, prepare_run

    config = load_config(recipe, overrides or [])
    path = prepare_run(config)
    machines = all_machines(config.engine.ranks, hostfile)
    for number, host in enumerate(machines.slots):
        if len(machines.slots) > 1:
            print(f"# {host}")
        print(shlex.join(launcher_command(path, replace(machines, node_rank=number))))


@app.command()
def status(run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="run directory, or a chain's folder")]) -> None:
    """Show a run's attempts: when, where, from which step to which, loss and speed, how each ended and why.

    Of a chain: how far each stage is, and why one did not run.
    """
    from launcher.chain import CHAIN, Chain, show_chain
    from launcher.job import job_state
    from launcher.status import show_status

    if (run_dir / CHAIN).exists():
        show_chain(Chain.read(run_dir.resolve()))
        return
    if state := job_state(run_dir):
        print(state)
    show_status(run_dir)


@app.command()
def slurm(
    recipe: Recipe,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(help="nodes to ask for", min=1)] = 1,
    profile: Profile = "plain",
    submit: Annotated[bool, typer.Option("--submit", help="hand it to sbatch")] = False,
) -> None:
    """Write the script of a job that trains a recipe to its end, requeued as often as it takes; show or submit it.

    The job ends with 0 when the run is finished, 75 when it was stopped and has saved (a requeued job goes on by
    itself), 1 when it failed too often or twice at the same step, 69 when no node passed its checks.
    """
    from launcher.job import submit_job, write_job

    script = write_job(recipe, overrides or [], profile, nodes)
    if submit:
        print(f"job {submit_job(script)}: {script}")
    else:
        print(script.read_text())
        print(f"# not submitted; --submit hands it over: {script}")


@app.command()
def chain(
    stages: Annotated[
        list[str],
        typer.Argument(help="recipes in order (sft, mini/sft, ours/sft.yaml); key=value of all, sft:key=value of one"),
    ],
    out: Annotated[Path, typer.Option(help="folder of all that the chain makes")],
    nodes: Annotated[int, typer.Option(help="nodes of each job", min=1)] = 1,
    profile: Profile = "plain",
    ask: Annotated[
        list[str] | None, typer.Option(help="TASK=SHARDS: what each stage's export is asked, as `megablip eval` does")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="samples that each task asks at most", min=1)] = None,
    submit: Annotated[bool, typer.Option("--submit", help="hand the jobs to sbatch")] = False,
) -> None:
    """Train stages one after the other, each from the export of the one before: one job each, which waits for that one.

    Each job trains, converts and evaluates. The same command again goes on where a chain has stopped.
    """
    from launcher.chain import Question, plan_chain, submit_chain, write_jobs

    planned = plan_chain(stages, out, [Question.parse(text) for text in ask or []], limit)
    scripts = write_jobs(planned, profile, nodes)
    if not ask:
        print("nothing is asked of the exports: --ask TASK=SHARDS gives held-out shards")
    if submit:
        for name, what in submit_chain(planned, scripts):
            print(f"{name}: {what}")
        return
    for stage in planned.stages:
        print(f"{stage.name}: {scripts.get(stage.name, 'done before')}")
    print("# not submitted; --submit hands them over")


@app.command(hidden=True)
def stage(
    folder: Annotated[Path, typer.Argument(help="folder of the chain")],
    name: Annotated[str, typer.Argument(help="of the stage")],
) -> None:
    """The batch step of a stage's job."""
    from launcher.chain import run_stage

    raise typer.Exit(run_stage(folder, name))


@app.command(hidden=True)
def supervise(run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="run directory of a job")]) -> None:
    """The batch step of a job."""
    from launcher.job import run_job

    raise typer.Exit(run_job(run_dir))


@app.command(hidden=True)
def node(
    config: Annotated[Path, typer.Argument(help="RUN/config.yaml")],
    hostfile: Hostfile = None,
    nodes: Annotated[str | None, typer.Option(help="of the attempt, from `supervise`")] = None,
    master: Annotated[str | None, typer.Option(help="ADDRESS:PORT where the ranks meet, from `supervise`")] = None,
) -> None:
    """Start this machine's ranks of a run: on each node by srun, by torchrun, or by hand with a hostfile."""
    from launcher.node import run_node

    place = _place(master) if master else None
    raise typer.Exit(
        run_node(config, hostfile=hostfile, nodes=nodes.split(",") if nodes else None, meeting_place=place)
    )


@app.command()
def preflight(
    recipe: Recipe,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(help="nodes that the run is to have", min=1)] = 1,
    profile: Profile = "plain",
) -> None:
    """Check whether a recipe could start: here, or inside a Slurm job (salloc) on all of its nodes and between them.

    A job does this by itself. Ends with 0 if all is right, else with 1.
    """
    from launcher.preflight import preflight_here

    raise typer.Exit(0 if preflight_here(recipe, overrides or [], profile, nodes) else 1)


@app.command("preflight-node", hidden=True)
def preflight_node(
    config: Annotated[Path, typer.Argument(help="RUN/config.yaml")],
    master: Annotated[str, typer.Option(help="ADDRESS:PORT where the nodes meet")],
    nodes: Annotated[int, typer.Option(help="of the job")],
    nonce: Annotated[str, typer.Option(help="of this check")],
) -> None:
    """What `supervise` starts on each node before the ranks."""
    from launcher.preflight import run_on_node

    run_on_node(config, _place(master), nodes, nonce)


def _place(master: str) -> tuple[str, int]:
    """`ADDRESS:PORT`, as the supervisor writes it."""
    address, _, port = master.rpartition(":")
    return address, int(port)


if __name__ == "__main__":
    try:
        app()
    except MegablipError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
