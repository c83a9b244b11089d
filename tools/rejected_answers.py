"""Second rejected answers: a model's own, to images that noise has made hard to see.

    python -m tools.rejected_answers MODEL 'data/dpo/vlfeedback/*.tar' --out data/dpo/noised

Each preference sample gives another with the same prompt, image and chosen
answer; rejected is what MODEL says of the image under noise, where it must lean
on what it expects rather than on what it sees (arXiv 2408.08872, post-training,
which says no more of the noise).  The noise is that of visual contrastive
decoding (arXiv 2311.16922): a step of a diffusion, step 500 of 1000 by default.
Answers equal to the chosen one are dropped and counted; so are pairs without an
image, to which nothing would be different, and samples that can't be used.

A shard is written whole after every 500 pairs.  An interrupted run, started
again with the same arguments, goes on with the next shard.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image as PILImage

from megablip.config import SourceConfig
from megablip.data.images import decode
from megablip.data.schemas import SCHEMAS
from megablip.data.shards import ShardSource, expand_shards
from megablip.errors import ConfigError, SampleError
from megablip.evaluate.generation import Answerer, Decoding
from megablip.records import Document, Image
from tools.errors import errors_end_the_program, leave_out
from tools.folders import complete_folder, write_whole
from tools.shard_writer import IndexedShardWriter, counts_line

DIFFUSION_STEPS = 1000
SAMPLES_AT_ONCE = 500  # read, answered and written together: bounds memory, and what an interruption costs


def signal_share(step: int) -> float:
    """What is left of the picture at a step, of the square of its amplitude: the product of 1 - beta up to it.

    Betas rise as a sigmoid from 1e-5 to 5e-3, as the code of arXiv 2311.16922 has them.
    """
    betas = 1 / (1 + np.exp(-np.linspace(-6, 6, DIFFUSION_STEPS))) * (5e-3 - 1e-5) + 1e-5
    return float(np.prod(1 - betas[: step + 1]))


def noised(data: bytes, step: int, rng: np.random.Generator) -> bytes:
    """The image file as training decodes it (upright, on white), as a PNG under the noise of a diffusion's step.

    Raises:
        SampleError: it can't be decoded.
    """
    pixels = decode(data).astype(np.float32) / 127.5 - 1
    kept = signal_share(step)
    mixed = np.sqrt(kept) * pixels + np.sqrt(1 - kept) * rng.standard_normal(pixels.shape, np.float32)
    buffer = io.BytesIO()
    PILImage.fromarray(np.clip((mixed + 1) * 127.5, 0, 255).astype(np.uint8)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


class RejectedAnswers:
    """Makes samples with new rejected answers of samples with old ones.

    Args:
        step: of the diffusion, 0 to DIFFUSION_STEPS - 1.
        system_prompt: what the system says before each prompt, as `system_prompt` of a recipe's source.

    Raises:
        ConfigError: the model's tokenizer has no chat format.
    """

    def __init__(self, answerer: Answerer, step: int, decoding: Decoding, system_prompt: str | None = None):
        self._answerer, self._step, self._decoding = answerer, step, decoding
        self._config = SourceConfig(name="pairs", shards="", schema="preference", weight=1, system_prompt=system_prompt)
        self._ends = [*answerer.encoder.require_chat().answer_end_ids, answerer.encoder.tokenizer.eos_id]
        context = getattr(answerer.model.config.get_text_config(), "max_position_embeddings", None)
        self._prompt_tokens = context - decoding.max_new_tokens if context else None

    def of(
        self, source: ShardSource, addresses: list[tuple[int, int]], seed: list[int], counts: Counter[str], title: str
    ) -> list[dict[str, Any]]:
        """Samples as a shard writer takes them.

        Args:
            addresses: (shard, sample) of each.
            seed: of noise and draws.
            counts: of what became of the samples; grows.
        """
        rng = np.random.default_rng(seed)
        torch.manual_seed(int(rng.integers(2**63)))
        kept, prompts = [], []
        for address in addresses:
            try:
                key, members = source.read(*address)
                prompt = self._prompt(key, members, rng)
            except SampleError as error:
                leave_out(f"{source.paths[address[0]]}, sample {address[1]}", "can't be used", error, counts)
                continue
            if prompt is None:
                counts["left out: without an image"] += 1
                continue
            kept.append((key, members))
            prompts.append(prompt)
        samples = []
        answers = self._answerer.answer(prompts, self._decoding, self._ends, title)
        for (key, members), answer in zip(kept, answers, strict=True):
            content = json.loads(members["json"])
            if not answer or answer == content["chosen"].strip():
                counts["dropped: empty, or the chosen answer itself"] += 1
                continue
            counts["pairs"] += 1
            samples.append({"__key__": f"{key}_noised", **members, "json": content | {"rejected": answer}})
        return samples

    def _prompt(self, key: str, members: dict[str, bytes], rng: np.random.Generator) -> Document | None:
        """The prompt with its images under noise; None where it has none."""
        chosen, _ = SCHEMAS["preference"](members, self._config, key)
        *segments, _answer = chosen.segments
        if not any(isinstance(segment, Image) for segment in segments):
            return None
        seen = [Image(noised(s.data, self._step, rng)) if isinstance(s, Image) else s for s in segments]
        prompt = Document(tuple(seen), self._config.name, key)
        tokens = len(self._answerer.encoder.encode_prompt(prompt).input_ids)
        if self._prompt_tokens is not None and tokens > self._prompt_tokens:
            raise SampleError(f"its prompt has {tokens} tokens, the model has room for {self._prompt_tokens}")
        return prompt


def write_rejected_answers(
    answers: RejectedAnswers, shards: str, out: Path, settings: dict[str, Any], seed: int
) -> str:
    """Fill the folder `out` with shards and counts.json; go on with what an interrupted run has left.

    Args:
        settings: what the answers depend on, beside the shards.

    Returns:
        A line that tells what there is.

    Raises:
        ConfigError: `out` holds something else, or is unfinished with other settings; or there is no pair.
        ShardError: a shard can't be read.
    """
    source = ShardSource("pairs", expand_shards(shards))
    addresses = [(shard, sample) for shard, count in enumerate(source.counts.tolist()) for sample in range(count)]
    settings = settings | {"shards": source.paths, "samples": len(addresses), "seed": seed}
    counts: Counter[str] = Counter()
    with complete_folder(out, mark="counts.json", settings=settings) as folder:
        for number, start in enumerate(range(0, len(addresses), SAMPLES_AT_ONCE)):
            done = folder / f"{out.name}-{number:06d}.json"  # a shard's counts, written after it
            if not done.exists():
                some, found = addresses[start : start + SAMPLES_AT_ONCE], Counter()
                title = f"answers {start} to {start + len(some)} of {len(addresses)}"
                samples = answers.of(source, some, [seed, number], found, title)
                if samples:
                    with IndexedShardWriter(f"{folder}/{out.name}-%06d.tar", SAMPLES_AT_ONCE, number) as writer:
                        for sample in samples:
                            writer.write(sample)
                write_whole(done, json.dumps(found))
            counts.update(json.loads(done.read_text()))
        if not counts["pairs"]:
            raise ConfigError(
                f"there is no pair ({counts_line(out, counts)})",
                where=shards,
                remedy="give shards of pairs with images; more noise or a temperature makes other answers",
            )
        (folder / "counts.json").write_text(json.dumps(counts, indent=1))
    return counts_line(out, counts)


def main(
    model: Annotated[Path, typer.Argument(help="Folder of the Hugging Face export that is to be tuned.")],
    shards: Annotated[str, typer.Argument(help="Preference shards: path, glob or braces.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards; an earlier one is replaced.")],
    step: Annotated[
        int, typer.Option(help="Of the diffusion: more is more noise.", min=0, max=DIFFUSION_STEPS - 1)
    ] = 500,
    temperature: Annotated[float, typer.Option(help="0 answers greedily.", min=0)] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer.", min=1)] = 512,
    system_prompt: Annotated[str | None, typer.Option(help="As the recipe has it for the source.")] = None,
    seed: Annotated[int, typer.Option(help="Of noise and draws.", min=0)] = 0,
) -> None:
    """Answer noised images, and write the answers as rejected ones."""
    settings = {
        "model": str(model), "step": step, "temperature": temperature, "max_new_tokens": max_new_tokens,
        "system_prompt": system_prompt,
    }  # fmt: skip
    with errors_end_the_program():
        answers = RejectedAnswers(Answerer(model), step, Decoding(max_new_tokens, temperature), system_prompt)
        line = write_rejected_answers(answers, shards, out, settings, seed)
    typer.echo(line)


if __name__ == "__main__":
    typer.run(main)
