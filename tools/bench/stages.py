"""Stages after pre-training: DPO's numbers beside TRL's, and packed against padded batches.

- `trl_*`: log-probabilities and losses of preference pairs, packed here, padded in
  TRL's own trainer, by the same models; the largest relative difference of any pair.
  `smoothed` is conservative DPO; `trl_*_alone`: here one document a call, not packed.
- `sft`, `dpo`, `dpo_stored`: real tokens a second, forward and backward in bf16 on all cores, of
  conversations whose lengths are spread as those of instructions are.  The rival is
  transformers' decoder on the same conversations padded to the longest (SDPA), with
  logits of all rows; for DPO with peft's adapters and the reference by switching them
  off, as ours; stored: both have the reference's scores from before.
"""

from __future__ import annotations

import copy
import json
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Phi3Config

from megablip.config import LoraConfig, PreferenceConfig
from megablip.model.attention import ATTENTION
from megablip.model.blip3 import Blip3Config, Blip3ForConditionalGeneration
from megablip.model.lora import add_lora, without_adapters
from megablip.model.preference import Answers, PreferenceLoss, preference_loss
from megablip.records import IGNORE_LABEL, MicroBatch
from tools.bench.core import Rival, Row, median_seconds
from tools.bench.rivals import call, venv
from tools.bench.step import FIRST_TEXT_ID, all_threads, build, document, micro_batch, padded
from tools.tower import CONFIG as TOWER

DECODER = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 8, "vocab_size": 32064, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
# Sequences of a padded micro-batch: 16, as in LLaVA-1.5's fine-tuning script; 8 pairs are as many, and TRL's default.
CONVERSATIONS, PAIRS = 16, 8
# Median and sigma of log-normal lengths, of an instruction and of its answer.
PROMPT_TOKENS, ANSWER_TOKENS = (90, 0.9), (70, 0.9)
# A draw in which padding multiplies the tokens by 2.7 (pairs: 2.5), about the median of a thousand draws, 2.6 and 2.4.
SEED = 20

TRL_LOSSES = {
    "sigmoid": PreferenceConfig(),
    "ipo": PreferenceConfig(loss="ipo"),
    "smoothed": PreferenceConfig(label_smoothing=0.1),
}

TINY = Phi3Config(
    vocab_size=96, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, sliding_window=None, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, initializer_range=0.2,
)  # fmt: skip


def rows() -> list[Row]:
    with all_threads():
        speed = [*sft_rows(), *dpo_rows()]
    return [*trl_rows(), *speed]


# --- TRL ----------------------------------------------------------------------------------


def trl_rows() -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {}
        for seed, side in enumerate(("policy", "reference")):
            torch.manual_seed(seed)
            decoder = AutoModelForCausalLM.from_config(TINY)
            decoder.save_pretrained(folder / side)
            models[side] = with_sampler(TINY)
            models[side].decoder.load_state_dict(decoder.state_dict())
        batch, features = conversations(6, pairs=True, vocabulary=TINY.vocab_size, lengths=((9, 0.5), (6, 0.5)))
        (folder / "pairs.json").write_text(json.dumps(as_lists(batch)))
        side = Path(__file__).with_name("dpo_side.py")
        python = venv("trl", ["torch==2.13.0", "trl", "datasets"])
        printed = call(
            [str(python), str(side), str(folder / "policy"), str(folder / "reference"), str(folder / "pairs.json")]
        )
    theirs = {name: torch.tensor(values) for name, values in json.loads(printed.splitlines()[-1]).items()}
    found = []
    for suffix, answer in ("", packed_answers), ("_alone", answers_alone):
        with torch.no_grad():
            policy, reference = (answer(models[side], batch, features) for side in ("policy", "reference"))
        ours = {"chosen": policy.chosen, "rejected": policy.rejected}
        for name, config in TRL_LOSSES.items():
            pairs = zip(of_each_pair(policy), of_each_pair(reference), strict=True)
            ours[name] = torch.stack([preference_loss(*pair, config).loss for pair in pairs])
        print_pairs(f"pairs{suffix}", ours, theirs)
        apart = {name: float((ours[name] / theirs[name] - 1).abs().max()) for name in ours}
        apart["log_probs"] = max(apart.pop("chosen"), apart.pop("rejected"))
        found += [Row(f"trl_{name}{suffix}", value, "", "lower", goal=1e-5) for name, value in apart.items()]
    return found


def packed_answers(model: nn.Module, batch: MicroBatch, features: Tensor) -> Answers:
    found = model(packed=batch, vision_features=features)
    return Answers.of(found.document_loss, found.document_labels, batch.pair)


def answers_alone(model: nn.Module, batch: MicroBatch, features: Tensor) -> Answers:
    """The same from a forward for each document."""
    layout, losses, labels = config_of(TINY).layout, [], []
    rows = zip(batch.input_ids.split(batch.doc_lens), batch.labels.split(batch.doc_lens), strict=True)
    for number, (ids, wanted) in enumerate(rows):
        alone = micro_batch([document(number, ids.numpy(), wanted.numpy(), layout)], layout)
        found = model(packed=alone, vision_features=features)
        losses.append(found.document_loss)
        labels.append(found.document_labels)
    return Answers.of(torch.cat(losses), torch.cat(labels), batch.pair)


def of_each_pair(answers: Answers) -> list[Answers]:
    columns = (answers.chosen, answers.rejected, answers.chosen_labels, answers.rejected_labels)
    return [Answers(*row) for row in zip(*(column.split(1) for column in columns), strict=True)]


def print_pairs(title: str, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Ours, and TRL's as far as it differs relatively, pair by pair."""
    table = Table("pair", *ours, title=f"{title}: ours (relative difference to TRL's)")
    for number in range(len(ours["chosen"])):
        cells = ((float(ours[name][number]), float(theirs[name][number])) for name in ours)
        table.add_row(str(number), *(f"{mine:.6f} ({mine / other - 1:+.1e})" for mine, other in cells))
    Console().print(table)


def as_lists(batch: MicroBatch) -> dict[str, list[list[int]]]:
    inputs = padded(batch)
    return {
        "input_ids": inputs["input_ids"].tolist(),
        "attention_mask": inputs["attention_mask"].tolist(),
        "completion_mask": (inputs["labels"] != IGNORE_LABEL).long().tolist(),
    }


# --- Packed and padded --------------------------------------------------------------------


def sft_rows() -> list[Row]:
    model = build(config_of(AutoConfig.for_model("phi3", **DECODER)))
    batch, features = conversations(CONVERSATIONS, pairs=False, vocabulary=DECODER["vocab_size"])
    inputs = padded(batch)

    def ours() -> None:
        model.decoder.set_attn_implementation(ATTENTION)
        backward(model, model(packed=batch, vision_features=features).loss / batch.valid_labels)

    def theirs() -> None:
        model.decoder.set_attn_implementation("sdpa")
        backward(model, model.decoder(**inputs, use_cache=False).loss)

    return [speed_row("sft", batch, median_seconds({"ours": ours, "theirs": theirs}))]


def dpo_rows() -> list[Row]:
    model = build(config_of(AutoConfig.for_model("phi3", **DECODER)))
    add_lora(model, LoraConfig(dropout=0.0))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.02)
            parameter.data = parameter.data.to(torch.bfloat16)
    batch, features = conversations(PAIRS, pairs=True, vocabulary=DECODER["vocab_size"])
    inputs, config = padded(batch), PreferenceConfig()

    forward = partial(model, packed=batch, vision_features=features, by_document=True)

    with torch.no_grad(), without_adapters(model):
        model.decoder.set_attn_implementation(ATTENTION)
        known = forward()
        model.decoder.set_attn_implementation("sdpa")
        known_padded = answer_log_probs(model.decoder, inputs)

    def ours(stored: bool) -> None:
        model.decoder.set_attn_implementation(ATTENTION)
        base = known
        if not stored:
            with torch.no_grad(), without_adapters(model):
                base = forward()
        policy = forward(reference_hidden=None if stored else base.hidden)
        backward(model, loss_of(batch, policy, base, config).loss)

    def theirs(stored: bool) -> None:
        model.decoder.set_attn_implementation("sdpa")
        base = known_padded
        if not stored:
            with torch.no_grad(), without_adapters(model):
                base = answer_log_probs(model.decoder, inputs)
        gain = answer_log_probs(model.decoder, inputs) - base
        backward(model, -F.logsigmoid(config.beta * (gain[0::2] - gain[1::2])).sum())

    return [
        speed_row(name, batch, median_seconds({"ours": partial(ours, stored), "theirs": partial(theirs, stored)}))
        for name, stored in (("dpo", False), ("dpo_stored", True))
    ]


def answer_log_probs(decoder: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Of each row's labels, in the usual way: from the logits of all rows."""
    labels = inputs["labels"][:, 1:]
    logits = (
        decoder(inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits[:, :-1].float()
    )
    chosen = logits.log_softmax(-1).gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    return (chosen * (labels != IGNORE_LABEL)).sum(1)


def loss_of(batch: MicroBatch, policy, reference, config: PreferenceConfig) -> PreferenceLoss:
    sides = (Answers.of(side.document_loss, side.document_labels, batch.pair) for side in (policy, reference))
    return preference_loss(*sides, config)


def backward(model: nn.Module, loss: Tensor) -> None:
    model.zero_grad()
    loss.backward()


def speed_row(name: str, batch: MicroBatch, seconds: dict[str, float]) -> Row:
    tokens = len(batch.input_ids)
    return Row(name, tokens / seconds["ours"], "tokens/s", "higher", 3.0, Rival("padded", tokens / seconds["theirs"]))


def conversations(
    count: int, *, pairs: bool, vocabulary: int, lengths=(PROMPT_TOKENS, ANSWER_TOKENS)
) -> tuple[MicroBatch, Tensor]:
    """Instructions with an answer, or two, that carries the labels; and the features of the dummy tile."""
    rng = np.random.default_rng(SEED)
    layout = config_of(TINY).layout
    documents = []
    for _ in range(count):
        prompt = rng.integers(FIRST_TEXT_ID, vocabulary, draw_length(rng, lengths[0]))
        for _ in range(1 + pairs):
            answer = rng.integers(FIRST_TEXT_ID, vocabulary, draw_length(rng, lengths[1]))
            labels = np.concatenate([np.full_like(prompt, IGNORE_LABEL), answer])
            documents.append(document(len(documents), np.concatenate([prompt, answer]), labels, layout))
    batch = micro_batch(documents, layout)
    if pairs:
        batch.pair = torch.arange(count, dtype=torch.int32).repeat_interleave(2)
    return batch, torch.zeros(1, layout.patches_per_tile, TOWER["hidden_size"])


def draw_length(rng: np.random.Generator, distribution: tuple[float, float]) -> int:
    median, sigma = distribution
    return 2 + int(rng.lognormal(np.log(median), sigma))


def config_of(text: Phi3Config) -> Blip3Config:
    """Of a model whose sampler costs nothing."""
    return Blip3Config(
        text_config=copy.deepcopy(text),  # a model sets its own attention there
        vision_config=AutoConfig.for_model("siglip_vision_model", **TOWER),
        sampler={"depth": 1, "heads": 1, "dim_head": 16, "num_latents": 1},
        head_bias=False,
        image_token_id=5,
    )


def with_sampler(text: Phi3Config) -> Blip3ForConditionalGeneration:
    return Blip3ForConditionalGeneration(config_of(text), with_vision_tower=False).eval()
