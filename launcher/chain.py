"""Chains: stages that follow each other, each one job that starts when the one before has done all of its work.

    DIR/chain.json                     the stages, their order, what their exports are asked
    DIR/pretrain/run                   the stage's run, supervised like any other
    DIR/pretrain/export                its newest checkpoint as Hugging Face weights: where the next stage starts
    DIR/pretrain/evaluation/reading    what the export answers
    DIR/pretrain/stage.json            which of this is done, and what failed

A job waits for the one before with `afterok`; where that one fails, Slurm cancels
those behind it.  The same command again submits what is neither done nor waiting,
and a stage that is taken up again begins with the part that failed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from types import FrameType
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launcher.allocation import Allocation, SlurmJob
from launcher.job import FOLDER, job_number, job_state, most_nodes, run_job, submit_job, write_job
from launcher.profile import load_profile
from launcher.status import WIDTH
from launcher.supervise import say
from megablip.cli import AskedTask
from megablip.engine.status import EXIT_CODES, RunStatus
from megablip.errors import ConfigError, MegablipError
from megablip.launch import heeding

CHAIN, STAGE = "chain.json", "stage.json"


@dataclass(frozen=True)
class Question:
    """What exports are asked: a task of `megablip eval`, and held-out shards for it."""

    task: str
    shards: str

    @classmethod
    def parse(cls, text: str) -> Question:
        """`TASK=SHARDS`.

        Raises:
            ConfigError: it is not of this form, or no such task.
        """
        task, equals, shards = text.partition("=")
        if not equals or not shards or task not in list(AskedTask):
            raise ConfigError(
                f"'{text}' is nothing to ask",
                where="--ask",
                remedy=f"write TASK=SHARDS; tasks are {', '.join(AskedTask)}",
            )
        return cls(task, shards)


@dataclass(frozen=True)
class Stage:
    """One stage of a chain; `folder` holds all of it."""

    name: str
    recipe: str
    overrides: list[str]
    folder: Path

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def export(self) -> Path:
        return self.folder / "export"

    def answers(self, task: str) -> Path:
        return self.folder / "evaluation" / task


@dataclass(frozen=True)
class Chain:
    """A chain as its folder describes it."""

    folder: Path
    stages: list[Stage]
    questions: list[Question]
    limit: int | None
    """Samples that each task asks at most."""

    @property
    def parts(self) -> list[str]:
        """What a stage's job does once it has trained."""
        return ["convert", *(f"evaluate {question.task}" for question in self.questions)]

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def before(self, stage: Stage) -> Stage | None:
        place = self.stages.index(stage)
        return self.stages[place - 1] if place else None

    def write(self) -> None:
        """
        Raises:
            ConfigError: the folder can't be written.
        """
        stages = [{"name": stage.name, "recipe": stage.recipe, "overrides": stage.overrides} for stage in self.stages]
        asked = [asdict(question) for question in self.questions]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder / CHAIN, {"stages": stages, "questions": asked, "limit": self.limit})
        except OSError as error:
            raise ConfigError(f"the chain can't be written: {error}", where=str(self.folder)) from None

    @classmethod
    def read(cls, folder: Path) -> Chain:
        """
        Raises:
            ConfigError: there is no chain.
        """
        raw = _read(folder / CHAIN)
        try:
            stages = [Stage(**entry, folder=folder / entry["name"]) for entry in raw["stages"]]
            return cls(folder, stages, [Question(**entry) for entry in raw["questions"]], raw["limit"])
        except (KeyError, TypeError):
            raise ConfigError("there is no chain here", where=str(folder), remedy="give the --out of a chain") from None


def plan_chain(words: list[str], folder: Path, questions: list[Question], limit: int | None) -> Chain:
    """The chain that a command line names.

    Args:
        words: recipes (`sft`, `mini/sft`, `ours/sft.yaml`), and overrides: `key=value` of all, `sft:key=value` of one.

    Raises:
        ConfigError: no stage, two of one name, or an override of a stage that is not there.
    """
    recipes = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    names = [Path(recipe).stem for recipe in recipes]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"a chain needs stages of distinct names, got {', '.join(names) or 'none'}", where="chain")
    own: dict[str, list[str]] = {name: [] for name in names}
    for override in overrides:
        match = re.fullmatch(r"([^:=]+):(.*)", override, re.DOTALL)
        if match and match[1] not in own:
            raise ConfigError(f"{match[1]} is no stage of this chain: {', '.join(names)}", where=override)
        for name in [match[1]] if match else names:
            own[name].append(match[2] if match else override)
    if len({question.task for question in questions}) < len(questions):
        raise ConfigError("a task is asked once; name all of its shards together", where="--ask")
    folder = folder.resolve()
    stages = [
        Stage(name, str(find_recipe(recipe)), own[name], folder / name)
        for name, recipe in zip(names, recipes, strict=True)
    ]
    return Chain(folder, stages, questions, limit)


def find_recipe(name: str) -> Path:
    """A recipe's file, or a shipped one by its name."""
    if name.endswith((".yaml", ".yml")):
        return Path(name).resolve()
    return Path(str(files("megablip"))) / "recipes" / f"{name}.yaml"


def write_jobs(chain: Chain, profile: str, nodes: int) -> dict[str, Path]:
    """Write the scripts of the stages that are neither done nor have a job that waits or runs, by name.

    Args:
        nodes: of each job; a stage that has lanes for fewer ranks gets fewer, and that is told.

    Raises:
        ConfigError: in a recipe or the profile, of whichever stage; nothing is written then.
    """
    todo, start = [], None
    for stage in chain.stages:
        overrides = [*stage.overrides, f"run_dir={json.dumps(str(stage.run_dir))}"]
        if start:
            overrides.append(f"model.path={json.dumps(str(start))}")
        if not (is_done(chain, stage) or job_state(stage.run_dir)):
            todo.append((stage, overrides, most_nodes(Path(stage.recipe), overrides, profile)))
        start = stage.export
    scripts = {}
    chain.write()
    for stage, overrides, most in todo:
        if most < nodes:
            print(f"{stage.name}: on {most} nodes, it has no lanes for the ranks of more", flush=True)
        scripts[stage.name] = write_job(
            Path(stage.recipe), overrides, profile, min(nodes, most),
            command=["stage", str(chain.folder), stage.name], name=f"{chain.folder.name}-{stage.name}",
        )  # fmt: skip
    return scripts


def submit_chain(chain: Chain, scripts: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """Submit what neither is done nor waits or runs already; (stage, what became of it) in order.

    Raises:
        ConfigError: Slurm refuses a job.
    """
    before: int | None = None
    for stage in chain.stages:
        if is_done(chain, stage):
            yield stage.name, "done before"
        elif stage.name not in scripts:
            before = job_number(stage.run_dir)
            yield stage.name, job_state(stage.run_dir)
        else:
            # Without the second a job whose condition can't come true any more would wait for ever.
            wait = [f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"] if before else []
            before = submit_job(scripts[stage.name], wait)
            yield stage.name, f"job {before}" + (f", after {wait[0].rpartition(':')[2]}" if wait else "")


def is_done(chain: Chain, stage: Stage) -> bool:
    """Whether a stage and all before it have trained, and its export is there and has been asked."""
    before, record = chain.before(stage), _read(stage.folder / STAGE)
    return (
        (before is None or is_done(chain, before))
        and record.get("start") == _trained(before)
        and stage.export.exists()
        and all(part in record.get("done", []) for part in chain.parts)
    )


def _trained(stage: Stage | None) -> str | None:
    """Checkpoint that a stage's export was made from; None for what the first stage starts from."""
    return _read(stage.folder / STAGE).get("trained") if stage else None


def run_stage(folder: Path, name: str) -> int:
    """The batch step of a stage's job: train, convert, evaluate; the exit code.

    0 when all is done, 75 when it was stopped (a requeued job goes on by itself), else what `supervise` ends with,
    or 1.
    """
    chain = Chain.read(folder)
    stage = chain.stage(name)
    allocation = SlurmJob.here(load_profile(stage.run_dir / FOLDER / "profile.yaml"))
    start = _trained(chain.before(stage))
    record = _read(stage.folder / STAGE)
    if record.setdefault("start", start) != start:
        raise ConfigError(
            f"{stage.name} was trained from another export than there is now",
            where=str(stage.folder),
            remedy="remove this folder to train the stage once more, from the new one",
        )
    record.pop("failed", None)
    _write(stage.folder / STAGE, record)
    with _Stop() as stop:
        try:
            code = run_job(stage.run_dir)
        except MegablipError as error:
            where = f" ({error.where})" if error.where else ""
            _write(
                stage.folder / STAGE, record | {"failed": f"{error.what}{where}; to do: {error.remedy or 'mend it'}"}
            )
            raise
        if code:
            return code
        return finish(chain, stage, allocation, stop)


def finish(chain: Chain, stage: Stage, allocation: Allocation, stop: _Stop) -> int:
    """Convert and ask what a finished run has made, on the first node of the allocation."""
    committed = max((stage.run_dir / "checkpoints").glob("step_*/COMMITTED"))
    newest = f"{committed.parent.name} {committed.read_text().strip()}"
    record = _read(stage.folder / STAGE)
    if record.get("trained") != newest or "convert" not in record["done"]:
        # A longer run has another export, and what was asked of the old one does not hold for it.
        shutil.rmtree(stage.export, ignore_errors=True)
        record |= {"trained": newest, "done": []}
    record.pop("failed", None)
    _write(stage.folder / STAGE, record)
    nodes, _ = allocation.usable_nodes()
    for part, words in _commands(chain, stage):
        if part in record["done"]:
            continue
        say(f"{stage.name}: {part}")
        began = time.monotonic()
        code, last = stop.wait(allocation.step(nodes[:1], ["-m", "megablip.cli", *words]))
        if stop.asked:
            say(f"{stage.name}: {part} was stopped; {allocation.requeue([])}")
            return EXIT_CODES["stopped"]
        if code:
            reason = f"{part} ended with exit code {code}: {last}"
            _write(stage.folder / STAGE, record | {"failed": reason})
            say(f"{stage.name}: {reason}")
            return EXIT_CODES["failed"]
        say(f"{stage.name}: {part} took {time.monotonic() - began:.0f} s")
        record["done"].append(part)
        _write(stage.folder / STAGE, record)
    return EXIT_CODES["finished"]


def _commands(chain: Chain, stage: Stage) -> Iterator[tuple[str, list[str]]]:
    yield "convert", ["convert", "zero-to-hf", str(stage.run_dir), str(stage.export)]
    for question in chain.questions:
        words = ["eval", str(stage.export), question.shards, "--output", str(stage.answers(question.task))]
        words += ["--task", question.task, "--run-dir", str(stage.run_dir)]
        yield f"evaluate {question.task}", [*words, *(["--limit", str(chain.limit)] if chain.limit else [])]


class _Stop:
    """Signals that ask the job to end, from before it trains until it has evaluated."""

    def __init__(self) -> None:
        self.asked = False
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> _Stop:
        self._heeding = heeding(self._on_signal)
        self._heeding.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._heeding.__exit__(*error)

    def wait(self, command: list[str]) -> tuple[int, str]:
        """Run a command to its end, or to a stop; exit code and the last line of what it said."""
        last = ""
        if not self.asked:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                errors="replace",
            )  # fmt: skip
            if self.asked:
                self._process.terminate()
            for line in self._process.stdout:
                print(line, end="", flush=True)
                # srun's own words come last, and say less than the program's.
                last = line.strip() if line.strip() and not line.startswith(("srun:", "slurmstepd:")) else last
            return self._process.wait(), last
        return EXIT_CODES["stopped"], last

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self._process:
            self._process.terminate()


def show_chain(chain: Chain, console: Console | None = None) -> None:
    """Print how far each stage is, and of one that did not run why."""
    console = console or Console(width=None if sys.stdout.isatty() else WIDTH)
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("stage", "state", "job", "trained", *chain.parts, "why"):
        table.add_column(heading)
    broken = ""
    for stage in chain.stages:
        state, why = stage_state(chain, stage, broken)
        if state in ("failed", "not run"):
            broken = broken or stage.name
        record, number = _read(stage.folder / STAGE), job_number(stage.run_dir)
        attempt = RunStatus(stage.run_dir).current
        trained = f"{attempt['last_step']} steps" if "last_step" in attempt else ""
        done = ["done" if part in record.get("done", []) else "" for part in chain.parts]
        table.add_row(*map(escape, [stage.name, state, str(number or ""), trained, *done, why]))
    console.print(table)


def stage_state(chain: Chain, stage: Stage, broken: str) -> tuple[str, str]:
    """(state, why it is so).

    Args:
        broken: name of the first stage before it that has failed; empty if none has.
    """
    if is_done(chain, stage):
        return "done", ""
    if state := job_state(stage.run_dir):
        return ("waiting" if "PENDING" in state else "running"), state
    attempt, record = RunStatus(stage.run_dir).current, _read(stage.folder / STAGE)
    if "failed" in record:
        return "failed", record["failed"]
    if attempt.get("outcome") in ("failed", "stopped"):
        return attempt["outcome"], str(attempt.get("reason", ""))
    if broken:
        return "not run", f"{broken} failed before it"
    number = job_number(stage.run_dir)
    if number is None:
        return "not submitted", ""
    log = stage.run_dir / FOLDER / f"slurm-{number}.out"
    return "failed", f"its job ended; {_last_line(log) or 'it has left no log'}"


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _read(path: Path) -> dict[str, Any]:
    """Empty if it is not there."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"it can't be read: {error}", where=str(path)) from None


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, path)
