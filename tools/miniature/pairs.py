"""Preference pairs of the miniature: what is true, and what the model itself said wrongly.

    python -m tools.miniature.pairs MODEL --out runs/miniature/seed_0/pairs

Half of the pictures have a smudged digit: chosen is the honest answer, rejected
a drawn answer of the model that names a digit there.  The other half are clean:
rejected is a wrong answer of the model, or, where it is right, the truth with a
digit called unclear, so that honesty does not become the easy way out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from megablip.evaluate.generation import Answerer, Decoding
from megablip.records import Document, Image, Text
from tools.canvases import augment
from tools.digits import load_digits
from tools.errors import errors_end_the_program
from tools.miniature.shards import AUGMENTED_COPIES
from tools.miniature.tasks import UNCLEAR, Asker, Exchange
from tools.shard_writer import write_counted


def rejected(exchange: Exchange, answer: str, rng: np.random.Generator) -> str | None:
    """What to hold against the truth; None where the model's answer is of no use."""
    truth, said = exchange.answer.split(), answer.split()
    if exchange.task == "smudged":
        # Of equal length, so that the pair is about honesty and not about counting.
        if len(said) != len(truth):
            return None
        return answer if all(said[place] != UNCLEAR for place in exchange.pictures[0].smudged) else None
    if said != truth:
        return answer or None
    truth[rng.integers(len(truth))] = UNCLEAR
    return " ".join(truth)


def make_pairs(answerer: Answerer, count: int, seed: int, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    """Preference samples out of `count` questions."""
    streams = np.random.default_rng([seed, 7]).spawn(3)
    torch.manual_seed(seed)
    asker = Asker(augment(load_digits(seed)["train"], AUGMENTED_COPIES, streams[0]), streams[1])
    exchanges = [asker.read_smudged() if number % 2 else asker.read_clean() for number in range(count)]
    prompts = []
    for number, exchange in enumerate(exchanges):
        words = {"loss": False, "role": "user"}
        segments = (Text("", **words), Image(exchange.pictures[0].jpeg), Text(f"\n{exchange.question}", **words))
        prompts.append(Document(segments, "pairs", str(number)))
    ends = [*answerer.encoder.require_chat().answer_end_ids, answerer.encoder.tokenizer.eos_id]
    answers = answerer.answer(prompts, Decoding(16, temperature=1.0), ends, "sampling answers")
    for number, (exchange, answer) in enumerate(zip(exchanges, answers, strict=True)):
        other = rejected(exchange, answer, streams[2])
        if other is None or other == exchange.answer:
            counts[f"{exchange.task}: no use"] += 1
            continue
        counts[f"{exchange.task}: pairs"] += 1
        turns = [("human", exchange.question), ("gpt", exchange.answer)]
        content = {
            "prompt": exchange.question,
            "chosen": exchange.answer,
            "rejected": other,
            # For the control, which reads the chosen answers as conversations.
            "conversations": [{"from": speaker, "value": said} for speaker, said in turns],
        }
        yield {"__key__": f"{number:06d}", "jpg": exchange.pictures[0].jpeg, "json": content}


def main(
    model: Annotated[Path, typer.Argument(help="Folder of the export that is to be tuned.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards; an earlier one is replaced.")],
    questions: Annotated[int, typer.Option(help="To draw answers for.", min=2)] = 2400,
    seed: Annotated[int, typer.Option(help="As for the shards: it fixes the split of the digits.")] = 0,
) -> None:
    """Draw a model's answers and pair them with the truth."""
    counts: Counter[str] = Counter()
    with errors_end_the_program():
        line = write_counted(out, make_pairs(Answerer(model), questions, seed, counts), counts)
    typer.echo(line)


if __name__ == "__main__":
    typer.run(main)
