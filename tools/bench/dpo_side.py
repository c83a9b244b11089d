"""TRL's loss of preference pairs; runs in TRL's own environment.

    python dpo_side.py POLICY REFERENCE PAIRS.json

PAIRS.json: {"input_ids": [[...]], "completion_mask": [[...]]}, of each pair the chosen answer, then the rejected one;
padded on the right with id 0 and mask 0; "attention_mask" likewise.  Prints the loss of each pair, {"sigmoid": [...],
"ipo": [...], "smoothed": [...]}, and the log-probabilities that TRL reports, {"chosen": [...], "rejected": [...]}.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

LOSSES = {
    "sigmoid": {"loss_type": ["sigmoid"]},
    "ipo": {"loss_type": ["ipo"]},
    # Conservative DPO: TRL's sigmoid ignores label_smoothing, its aot does not.  That sorts the pairs of a batch
    # among themselves, which is nothing in a batch of one.
    "smoothed": {"loss_type": ["aot"], "label_smoothing": 0.1},
}


def main(policy: str, reference: str, pairs: str) -> dict[str, list[float]]:
    inputs = {name: torch.tensor(rows) for name, rows in json.loads(Path(pairs).read_text()).items()}
    words = Tokenizer(models.WordLevel({str(number): number for number in range(96)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="2")
    dummy = Dataset.from_list([{"prompt": "3", "chosen": "4", "rejected": "5"}] * 2)
    found = {}
    for name, settings in LOSSES.items():
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32),
            ref_model=AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32),
            args=DPOConfig(
                tempfile.mkdtemp(), beta=0.1, use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False,
                **settings,
            ),
            train_dataset=dummy,
            processing_class=tokenizer,
        )  # fmt: skip
        metrics = trainer._metrics["train" if trainer.model.training else "eval"]
        found |= {name: [], "chosen": [], "rejected": []}
        for first in range(0, len(inputs["input_ids"]), 2):
            pair = {key: rows[first : first + 2] for key, rows in inputs.items()}
            found[name].append(float(trainer.compute_loss(trainer.model, pair)))
            for side in ("chosen", "rejected"):
                found[side].append(metrics[f"logps/{side}"][-1])
    return found


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
