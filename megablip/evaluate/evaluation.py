"""`megablip eval`: ask an exported model about held-out shards; results.json, and a page to look at."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from megablip.errors import ConfigError
from megablip.evaluate.generation import Answerer, Decoding
from megablip.evaluate.report import write_report
from megablip.evaluate.tasks import (
    CLOSE,
    Answer,
    Question,
    ask,
    conversation_questions,
    reading_questions,
    right_characters,
    share,
    shots_questions,
)
from megablip.metrics.points import read_metrics

Task = Literal["reading", "conversation", "safety", "shots"]
SHOTS = (0, 1, 2, 4, 8)
PICTURES = 48  # in the report; wrong answers first


def evaluate(
    model: Path,
    shards: str,
    output: Path,
    task: Task = "reading",
    run_dir: Path | None = None,
    limit: int | None = None,
) -> None:
    """Let an exported model answer; write results.json and report.html, and print a table.

    Args:
        model: folder of the export.
        shards: path, glob or braces of held-out shards.
        task: see megablip.evaluate.tasks; `safety` asks conversations in VLGuard's layout.
        run_dir: run whose loss curve the report shows.
        limit: samples at most.

    Raises:
        ConfigError: no model, a broken one, or an output folder that can't be made.
        ShardError, SampleError: no samples, or one that can't be used.
    """
    answerer = Answerer(model)
    asked = _questions(shards, task, limit)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the folder can't be made: {error.strerror}", where=f"--output {output}") from None
    end = {"reading": CLOSE, "shots": "chunk"}.get(task, "turn")
    answers = ask(answerer, asked, end, Decoding(), f"{task}: {len(asked)} questions")
    groups = summarize(answers, GROUPS[task])
    results = {
        "task": task,
        "items": len(answers),
        "exact": share(answers, lambda answer: answer.exact),
        "refused": share(answers, lambda answer: answer.refused),
        "groups": groups,
        "answers": [asdict(answer) for answer in answers],
    }
    (output / "results.json").write_text(json.dumps(results, indent=1))
    shown = sorted(range(len(answers)), key=lambda number: answers[number].exact)[: PICTURES // 2]
    shown += [number for number in range(len(answers)) if answers[number].exact][: PICTURES - len(shown)]
    write_report(
        output / "report.html",
        title=f"{task.capitalize()} on held-out samples: {model}",
        metrics=read_metrics(run_dir) if run_dir else [],
        group=HEADINGS[task],
        groups=groups,
        pictures=[(asked[number].image, answers[number]) for number in shown],
    )
    table = Table(HEADINGS[task], "items", "exact match", "right characters", "refused")
    for name, row in groups.items():
        figures = (f"{row[figure]:.3f}" for figure in ("exact", "characters", "refused"))
        table.add_row(name, str(row["items"]), *figures)
    Console().print(table)


def summarize(answers: Iterable[Answer], group_of: Callable[[Answer], str | int]) -> dict[str, dict[str, float]]:
    """By group: how many, the shares of exact matches and of refusals, the mean share of right characters."""
    groups: dict[str | int, list[Answer]] = {}
    for answer in answers:
        groups.setdefault(group_of(answer), []).append(answer)
    return {
        str(name): {
            "items": len(group),
            "exact": share(group, lambda answer: answer.exact),
            "characters": right_characters(group),
            "refused": share(group, lambda answer: answer.refused),
        }
        for name, group in sorted(groups.items())
    }


HEADINGS = {"reading": "characters", "conversation": "task", "safety": "images", "shots": "shots"}
GROUPS: dict[str, Callable[[Answer], str | int]] = {
    "reading": lambda answer: len(answer.truth),
    "conversation": lambda answer: answer.facts.get("task", "all"),
    "safety": lambda answer: "harmless" if answer.facts.get("safe") else "harmful",
    "shots": lambda answer: answer.facts["shots"],
}


def _questions(shards: str, task: Task, limit: int | None) -> list[Question]:
    if task == "reading":
        return reading_questions(shards, limit)
    if task == "shots":
        return [question for shots in SHOTS for question in shots_questions(shards, limit, shots)]
    return conversation_questions(shards, limit, task)
