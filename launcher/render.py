"""The sbatch script of a job.

Names of the cluster are words that can't hold a blank (profile.py); they make
the head of the script, which Slurm reads.  All else is quoted for the shell.
The path of the log is in no option: Slurm would expand what it takes for
patterns there.  It goes to the folder of submission, as sbatch does by itself.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from launcher.profile import ClusterProfile
from megablip.errors import ConfigError

CHECKOUT = Path(__file__).parents[1]
TEMPLATE = "job.sbatch.j2"
JOB_NAME_LENGTH = 64

_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))")


def render_job(profile: ClusterProfile, *, name: str, nodes: int, command: list[str], folder: Path) -> str:
    """The script of a job that runs `python -m launcher COMMAND` as its batch step.

    Args:
        name: of the job; what Slurm's lists could not show becomes `_`.
        nodes: that the job asks for.
        command: words after `python -m launcher`; they arrive as they are.
        folder: where it and the ranks run, which relative paths of a recipe are seen from.

    Raises:
        ConfigError: a word that no command line can hold.
    """
    for word in [*command, str(folder)]:
        if "\x00" in word:
            raise ConfigError(f"{word!r} holds a zero byte, which no command line can", where="launcher")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=False,  # a shell's script, no page
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
    )
    environment.filters["quote"] = shlex.quote
    script = environment.get_template(TEMPLATE).render(
        profile=profile,
        options=sbatch_options(profile, name, nodes),
        environment=list(_environment(profile).items()),
        checkout=str(CHECKOUT),
        folder=str(folder),
        interpreter=profile.interpreter,
        command=command,
    )
    return re.sub(r"\n+\Z", "", script) + "\n"


def sbatch_options(profile: ClusterProfile, name: str, nodes: int) -> list[str]:
    """What is asked of Slurm, each as `--option=value` or `--option`."""
    asked = {
        "job-name": job_name(name),
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "nodes": nodes,
        "ntasks-per-node": 1,  # the launcher's half for one node, which starts the ranks there
        "gres": _gres(profile),
        "cpus-per-task": profile.cpus_per_node,
        "mem": profile.memory,
        "time": profile.time,
        "exclude": ",".join(profile.exclude) or None,
        # To the batch step alone, which passes it on: to all steps it would end the launchers on the nodes.
        "signal": f"B:USR1@{profile.signal_lead_s}",
        "open-mode": "append",  # a requeued job goes on in the same log
    }
    flags = ["exclusive"] if profile.exclusive else []
    # Not no-kill: were the first node lost, with the supervisor, the job would hold the others until its time limit.
    # Without it Slurm requeues a job that has lost a node, once it notices (SlurmdTimeout); until then the supervisor
    # goes on with the nodes that are left.
    flags += ["requeue"]
    options = [f"--{option}={value}" for option, value in asked.items() if value is not None]
    return [*options, *(f"--{flag}" for flag in flags), *profile.options]


def job_name(name: str) -> str:
    """`name` as Slurm's lists, patterns and options can hold it."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", name)[:JOB_NAME_LENGTH] or "megablip"


def _gres(profile: ClusterProfile) -> str | None:
    if not profile.gpus_per_node:
        return None
    kind = f"{profile.gpu_type}:" if profile.gpu_type else ""
    return f"gpu:{kind}{profile.gpus_per_node}"


def _environment(profile: ClusterProfile) -> dict[str, str]:
    """Variables and their values as shell words."""
    variables = {}
    if profile.cpus_per_node:
        # Since Slurm 22.05 srun does not take it from sbatch, and all ranks of a node would share one core.
        variables["SRUN_CPUS_PER_TASK"] = str(profile.cpus_per_node)
    if profile.network_interface:
        variables["NCCL_SOCKET_IFNAME"] = shlex.quote(profile.network_interface)
        variables["GLOO_SOCKET_IFNAME"] = shlex.quote(profile.network_interface)
    if profile.scratch:
        variables["TMPDIR"] = quote_but_variables(profile.scratch)
    if profile.cache:
        for variable, folder in (
            ("TRITON_CACHE_DIR", "triton"),
            ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
            ("TORCH_EXTENSIONS_DIR", "extensions"),
        ):
            variables[variable] = quote_but_variables(f"{profile.cache}/{folder}")
    return variables | {name: shlex.quote(value) for name, value in profile.environment.items()}


def quote_but_variables(text: str) -> str:
    """One shell word in which `$NAME` and `${NAME}` expand, and nothing else.

    What a variable holds is not looked at again, so it can't inject.
    """
    words, end = [], 0
    for match in _VARIABLE.finditer(text):
        words += [shlex.quote(text[end : match.start()])] if match.start() > end else []
        words.append(f'"${{{match[1] or match[2]}}}"')
        end = match.end()
    words += [shlex.quote(text[end:])] if end < len(text) else []
    return "".join(words) or "''"
