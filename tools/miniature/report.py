"""One page that shows what each stage of the miniature did, and what comparisons found that have been run beside it.

python -m tools.miniature.report runs/miniature/seed_0 --out runs/miniature/seed_0/report
"""

from __future__ import annotations

import base64
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from megablip.evaluate.report import HEIGHT, WIDTH, curve
from megablip.evaluate.tasks import conversation_questions
from megablip.metrics.points import read_metrics
from megablip.pages import write_page
from tools.folders import complete_folder
from tools.miniature.ablations import ABLATIONS, DIFFERENCES, Compared
from tools.miniature.chain import STAGES
from tools.miniature.claims import CONTROL, claims

SHOWN = {"read": 4, "stamp": 2, "largest": 2, "several": 3, "smudged": 6, "marked_red": 4, "marked_blue": 3}


def main(
    folder: Annotated[Path, typer.Argument(help="Where the chain ran.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html and claims.json; an earlier one is replaced.")],
    split: Annotated[str, typer.Option(help="Of the questions: test or validation.")] = "test",
) -> None:
    """Write the miniature's report."""
    suffix = "" if split == "test" else f"_{split}"
    figures = {stage: _json(folder / f"{stage}_answers{suffix}" / "figures.json") for stage in (*STAGES, CONTROL)}
    answers = {stage: _json(folder / f"{stage}_answers{suffix}" / "answers.json") for stage in STAGES}
    found = claims(figures)
    with complete_folder(out, "claims.json") as new:
        (new / "claims.json").write_text(
            json.dumps([asdict(claim) | {"holds": claim.holds} for claim in found], indent=1)
        )
        write_page(
            new / "report.html",
            "report.html.j2",
            folder=Path(__file__).parent,
            title="BLIP-3 in miniature: five stages on real handwritten digits",
            claims=found,
            comparisons={name: Compared.read(name, folder.parent) for name in ABLATIONS},
            differences=DIFFERENCES,
            stages=STAGES,
            tasks=list(dict.fromkeys(task for stage in STAGES for task in figures[stage])),
            figures=figures,
            curves={stage: _curves(folder / stage) for stage in STAGES},
            pictures=_pictures(folder / "data" / split, answers),
            width=WIDTH,
            height=HEIGHT // 2,
        )
    for claim in found:
        typer.echo(
            f"{'ok' if claim.holds else '!!'}  {claim.what}: {claim.value:.3f} (goal {claim.goal}) {claim.detail}"
        )


def _curves(run_dir: Path) -> dict[str, dict[str, Any]]:
    """By name: the loss by tokens seen, and of preference tuning accuracy, margin and the chosen answer's reward."""
    points = read_metrics(run_dir)
    names = ("loss", "preference/accuracy", "preference/margin", "preference/chosen_reward")
    found = {name: curve([(p["tokens_seen"], p[name]) for p in points if name in p]) for name in names}
    return {name: line for name, line in found.items() if line}


def _pictures(questions: Path, answers: dict[str, dict[str, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """Some questions of each task with every stage's answer."""
    shown = []
    for task, count in SHOWN.items():
        for number, question in enumerate(conversation_questions(str(questions / f"{task}-*.tar"), count)):
            asked = " ".join(segment.text for segment in question.prompt.segments if hasattr(segment, "text"))
            shown.append(
                {
                    "task": task,
                    "image": question.image and base64.b64encode(question.image).decode(),
                    "question": " ".join(asked.split()),
                    "truth": question.truth,
                    "answers": {
                        stage: answers[stage][task][number]["answer"]
                        for stage in STAGES
                        if number < len(answers[stage].get(task, []))
                    },
                }
            )
    return shown


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    typer.run(main)
