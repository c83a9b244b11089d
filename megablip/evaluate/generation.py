"""Answers of a model to many prompts: in batches, greedy or sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText

import megablip.model.blip3  # noqa: F401 (registers the model with transformers)
from megablip.data.encode import Encoder
from megablip.engine.topology import prepare_device
from megablip.errors import ConfigError
from megablip.records import DecodedDocument, Document

BATCH_TOKENS = 16_384  # of the prompts in a batch, padding included


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: of an answer.
        temperature: 0 takes the likeliest token, above it tokens are drawn.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0

    def arguments(self) -> dict[str, object]:
        """Of `generate`."""
        if self.temperature == 0:
            return {"do_sample": False, "max_new_tokens": self.max_new_tokens}
        return {
            "do_sample": True, "temperature": self.temperature, "top_k": 0, "max_new_tokens": self.max_new_tokens,
        }  # fmt: skip


class Answerer:
    """An exported model, its tokenizer and its tiles, ready to answer.

    Prompts are encoded by the trainer's own encoder, so a model is asked in the
    form that it was trained in.

    Args:
        folder: of the export.

    Raises:
        ConfigError: no model there, or a broken one.
    """

    def __init__(self, folder: Path):
        if not (folder / "config.json").exists():
            raise ConfigError(
                "there is no model", where=str(folder), remedy="export one with `megablip convert zero-to-hf`"
            )
        device = prepare_device()
        try:
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigError(
                f"the model can't be loaded: {error}", where=str(folder), remedy="copy or convert the folder again"
            ) from error
        self.model = model.to(device).eval()
        self.encoder = Encoder(str(folder), model.config.layout)

    @torch.no_grad()
    def answer(
        self, prompts: Sequence[Document], decoding: Decoding, ends: Sequence[int], title: str = "answering"
    ) -> list[str]:
        """What the model says after each prompt, up to one of the ids `ends`; control tokens left out.

        Prompts of like length share a batch, padded on the left; the answers come in the order of the prompts.

        Raises:
            SampleError: an image can't be decoded.
        """
        tokenizer = self.encoder.tokenizer
        encoded = [self.encoder.encode_prompt(prompt) for prompt in prompts]
        answers = [""] * len(prompts)
        batches = batches_of([len(document.input_ids) for document in encoded], BATCH_TOKENS)
        for batch in track(batches, title, transient=True):
            rows = [self.encoder.decode(encoded[number], 0) for number in batch]
            inputs = {
                name: tensor.to(self.model.device) for name, tensor in left_padded(rows, tokenizer.pad_id).items()
            }
            generated = self.model.generate(
                **inputs, eos_token_id=list(ends), pad_token_id=tokenizer.pad_id, **decoding.arguments()
            )
            for number, ids in zip(batch, generated[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
                answers[number] = tokenizer.decode(ids[:stop]).strip()
        return answers


def batches_of(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of prompts of like length, longest first, so many that a padded batch holds `batch_tokens` at most."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    batches: list[list[int]] = []
    for number in order:
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > batch_tokens:
            batches.append([])
        batches[-1].append(number)
    return batches


def left_padded(rows: Sequence[DecodedDocument], pad_id: int) -> dict[str, torch.Tensor]:
    """Arguments of the model's inference forward."""
    length = max(len(row.input_ids) for row in rows)
    input_ids = np.full((len(rows), length), pad_id, np.int64)
    attention_mask = np.zeros_like(input_ids)
    for number, row in enumerate(rows):
        input_ids[number, length - len(row.input_ids) :] = row.input_ids
        attention_mask[number, length - len(row.input_ids) :] = 1
    arrays = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "tiles": np.concatenate([row.tiles for row in rows]),
        "patch_mask": np.concatenate([row.patch_mask for row in rows]),
        "grids": np.concatenate([row.grids for row in rows]),
    }
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
