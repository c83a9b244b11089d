"""Before a job begins to train: checks of each node, and between nodes.

`supervise` calls `preflight`, which starts `python -m launcher preflight-node` once on
each node by srun.  A node prints what it finds as lines of JSON, so that one which
can't write still tells; one that says nothing is named with srun's own words.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from launcher.allocation import SlurmJob
from launcher.profile import load_profile
from launcher.verdict import NodeReport, Report, judge
from megablip.config import dump_config, load_config
from megablip.doctor import packages, stale_builds
from megablip.doctor.finding import Finding
from megablip.doctor.recipe import check_recipe
from megablip.engine.topology import node_name

LIMIT_S, NODE_S = 420.0, 5.0  # for all nodes to tell all, and more for each, as it meets all others in turn
MARK = "@preflight"
END_S = 60.0  # for srun to end
PIECE = 600  # characters; srun forwards lines of up to 1024 bytes whole, and those of several nodes would mix
MESSAGE_LINES = 6  # of srun, in a finding


def preflight(
    config_path: Path,
    nodes: list[str],
    master: tuple[str, int],
    step: Callable[[list[str]], list[str]],
    limit_s: float | None = None,
) -> Report:
    """Check the nodes of an allocation together.

    Args:
        config_path: RUN/config.yaml, which all nodes read.
        nodes: by Slurm's names, in the order of SLURM_NODEID.
        master: address and port on the first node, where ranks will meet; they are tried.
        step: gives the command that runs `python WORDS` once on each of `nodes`: one process must be
            able to fail alone, and lines must arrive whole (srun without --kill-on-bad-exit, --unbuffered).
    """
    words = [
        "-m", "launcher", "preflight-node", str(config_path.resolve()), "--master", f"{master[0]}:{master[1]}",
        "--nodes", str(len(nodes)), "--nonce", secrets.token_hex(8),
    ]  # fmt: skip
    process = subprocess.Popen(
        step(words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        errors="replace",
    )  # fmt: skip
    limit_s = LIMIT_S + NODE_S * len(nodes) if limit_s is None else limit_s
    in_time = True
    try:
        try:
            out, messages = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            in_time = False
            process.terminate()  # srun ends its tasks, and passes on what they have said
            out, messages = process.communicate(timeout=END_S)
    except BaseException:  # a signal ends the wait, or srun hangs
        process.kill()
        raise
    reports = read_reports(out, nodes)
    for report in reports:
        if not report.done:
            report.message = _about(report.node, messages) if in_time else f"not done after {limit_s:.0f} s"
    return judge(reports, master)


def read_reports(out: str, nodes: list[str]) -> list[NodeReport]:
    """What the nodes have printed, one report each, in order."""
    reports = [NodeReport(node) for node in nodes]
    pieces: dict[tuple[int, int], dict[int, str]] = {}
    for match in re.finditer(rf"{MARK} (\d+) (\d+) (\d+)/(\d+) ([^\n]*)", out):
        node, record, piece, count = map(int, match.groups()[:4])
        found = pieces.setdefault((node, record), {})
        found[piece] = match[5]
        if len(found) == count and node < len(reports):
            with suppress(ValueError, KeyError, TypeError):  # a damaged one is as good as none
                reports[node].take(json.loads("".join(found[number] for number in range(count))))
    return reports


def _about(node: str, messages: str) -> str:
    """The lines of srun's messages that name a node; all of them where none does."""
    lines = [line for line in messages.splitlines() if line.strip()]
    own = [line for line in lines if re.search(rf"\b{re.escape(node)}\b", line)]
    # execve's error names no node; srun's line beside it does.
    causes = [line for line in lines if "execve" in line]
    return "; ".join(dict.fromkeys([*own, *causes] or lines[-MESSAGE_LINES:])) or "srun says nothing"


@dataclass
class Speaker:
    """Prints a node's records, in pieces that no other node's can get into."""

    number: int
    _records: int = field(default=0, init=False)

    def __call__(self, record: dict[str, Any]) -> None:
        text = json.dumps(record)
        pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
        for place, piece in enumerate(pieces):
            # One write, which a pipe takes whole; `print` may make two of a line and its end.
            line = f"{MARK} {self.number} {self._records} {place}/{len(pieces)} {piece}\n"
            os.write(sys.stdout.fileno(), line.encode())
        self._records += 1


def run_on_node(config_path: Path, master: tuple[str, int], nodes: int, nonce: str) -> NoReturn:
    """What srun starts once on each node; ends the process."""
    from launcher.between_nodes import Meeting, NoMeeting, look_together
    from launcher.node_checks import check_common, check_node

    meeting = Meeting(
        *master, number=int(os.environ.get("SLURM_NODEID", 0)), nodes=nodes, node=node_name(), nonce=nonce
    )
    say = Speaker(meeting.number)
    try:
        config = load_config(config_path)
        for finding in check_node(config):
            say({"finding": asdict(finding)})
        if meeting.number == 0:
            for finding in check_common(config, nodes):
                say({"common": asdict(finding)})
        look_together(meeting, Path(config.run_dir), say)
        say({"done": True})
    except NoMeeting as error:
        say({"no_meeting": str(error)})
        say({"done": True})
    except Exception as error:
        traceback.print_exc()
        say({"finding": asdict(Finding("checks", f"{type(error).__name__}: {error}", ok=False))})
        say({"done": True})
    sys.stderr.flush()
    os._exit(0)  # threads of gloo and NCCL, of nodes that failed, too, may hang or abort the interpreter's own exit


def preflight_here(recipe: Path, overrides: list[str], profile_name: str, nodes: int) -> bool:
    """Check what can be seen from here and print it: on a login node machine and recipe, in a job its nodes.

    Args:
        nodes: that the run is to have; in a job it has those of the job.

    Raises:
        ConfigError: recipe or profile can't be read.
    """
    profile = load_profile(profile_name)
    if not any(override.partition("=")[0] == "engine.ranks" for override in overrides):
        overrides = [*overrides, f"engine.ranks={profile.ranks}"]
    config = load_config(recipe, overrides)
    if "SLURM_JOB_ID" not in os.environ:
        findings = [*packages(), *stale_builds(), *check_recipe(config, nodes, profile.gpus_per_node > 0)]
        report = Report([""], findings)
        report.print()
        return report.ok
    job = SlurmJob.here(profile)
    names, bad = job.usable_nodes()
    with tempfile.TemporaryDirectory(prefix=".preflight-", dir=Path.cwd()) as folder:  # which all nodes see
        path = Path(folder) / "recipe.yaml"
        path.write_text(dump_config(config))
        report = preflight(path, names, job.meeting_place(names, 0), partial(job.step, names, each_alone=True))
    report.print()
    for node, reason in bad.items():
        print(f"{node} was not looked at: {reason}")
    return report.ok and not bad
