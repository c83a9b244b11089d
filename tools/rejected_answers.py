"""Second rejected answers: a model's own, to images that noise has made hard to see.

    python -m tools.rejected_answers MODEL 'data/dpo/vlfeedback/*.tar' --out data/dpo/noised

Each preference sample gives another with the same prompt, image and chosen
answer; rejected is what MODEL says of the image under noise, where it must lean
on what it expects rather than on what it sees (arXiv 2408.08872, post-training,
which says no more of the noise).  The noise is that of visual contrastive
decoding (arXiv 2311.16922): a step of a diffusion, step 500 of 1000 by default.
Answers equal to the chosen one are dropped and counted.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image as PILImage

from megablip.config import SourceConfig
from megablip.data.schemas import SCHEMAS
from megablip.data.shards import ShardSource, expand_shards
from megablip.errors import SampleError
from megablip.evaluate.generation import Answerer, Decoding
from megablip.records import Document, Image
from tools.errors import errors_end_the_program
from tools.shard_writer import write_counted

DIFFUSION_STEPS = 1000
SAMPLES_AT_ONCE = 2000  # read, answered and written together, to bound memory


def signal_share(step: int) -> float:
    """What is left of the picture at a step, of the square of its amplitude: the product of 1 - beta up to it.

    Betas rise as a sigmoid from 1e-5 to 5e-3, as the code of arXiv 2311.16922 has them.
    """
    betas = 1 / (1 + np.exp(-np.linspace(-6, 6, DIFFUSION_STEPS))) * (5e-3 - 1e-5) + 1e-5
    return float(np.prod(1 - betas[: step + 1]))


def noised(data: bytes, step: int, rng: np.random.Generator) -> bytes:
    """The image file as a PNG under the noise of a diffusion's step.

    Raises:
        SampleError: it can't be decoded.
    """
    try:
        pixels = np.asarray(PILImage.open(io.BytesIO(data)).convert("RGB"), np.float32) / 127.5 - 1
    except (OSError, ValueError, PILImage.DecompressionBombError) as error:
        raise SampleError(f"the image can't be decoded: {error}") from None
    kept = signal_share(step)
    mixed = np.sqrt(kept) * pixels + np.sqrt(1 - kept) * rng.standard_normal(pixels.shape, np.float32)
    buffer = io.BytesIO()
    PILImage.fromarray(np.clip((mixed + 1) * 127.5, 0, 255).astype(np.uint8)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def rejected_answers(
    answerer: Answerer, shards: str, step: int, decoding: Decoding, seed: int, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """The samples of `shards` with new rejected answers, members as a shard writer takes them."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    chat = answerer.encoder.require_chat()
    ends = [chat.closing["assistant"][chat.end_of_turn - 1], answerer.encoder.tokenizer.eos_id]
    config = SourceConfig(name="pairs", shards=shards, schema="preference", weight=1)
    source = ShardSource(config.name, expand_shards(shards))
    addresses = [(shard, sample) for shard, count in enumerate(source.counts) for sample in range(count)]
    for start in range(0, len(addresses), SAMPLES_AT_ONCE):
        read = [source.read(*address) for address in addresses[start : start + SAMPLES_AT_ONCE]]
        prompts = []
        for key, members in read:
            chosen, _ = SCHEMAS["preference"](members, config, key)
            *segments, _answer = chosen.segments
            seen = [Image(noised(s.data, step, rng)) if isinstance(s, Image) else s for s in segments]
            prompts.append(Document(tuple(seen), config.name, key))
        answers = answerer.answer(prompts, decoding, ends, f"answers {start} to {start + len(read)}")
        for (key, members), answer in zip(read, answers, strict=True):
            content = json.loads(members["json"])
            if not answer or answer == content["chosen"].strip():
                counts["dropped: empty, or the chosen answer itself"] += 1
                continue
            counts["pairs"] += 1
            yield {"__key__": f"{key}_noised", **members, "json": content | {"rejected": answer}}


def main(
    model: Annotated[Path, typer.Argument(help="Folder of the Hugging Face export that is to be tuned.")],
    shards: Annotated[str, typer.Argument(help="Preference shards: path, glob or braces.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards; an earlier one is replaced.")],
    step: Annotated[
        int, typer.Option(help="Of the diffusion: more is more noise.", min=0, max=DIFFUSION_STEPS - 1)
    ] = 500,
    temperature: Annotated[float, typer.Option(help="0 answers greedily.", min=0)] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer.", min=1)] = 512,
    seed: Annotated[int, typer.Option(help="Of noise and draws.")] = 0,
) -> None:
    """Answer noised images, and write the answers as rejected ones."""
    counts: Counter[str] = Counter()
    with errors_end_the_program():
        decoding = Decoding(max_new_tokens, temperature)
        samples = rejected_answers(Answerer(model), shards, step, decoding, seed, counts)
        line = write_counted(out, samples, counts)
    typer.echo(line)


if __name__ == "__main__":
    typer.run(main)
