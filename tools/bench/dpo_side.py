"""TRL's loss of preference pairs; runs in TRL's own environment.

    python dpo_side.py POLICY REFERENCE PAIRS.json

PAIRS.json: {"input_ids": [[...]], "completion_mask": [[...]]}, chosen answers first, then the rejected ones, padded
on the right with id 0 and mask 0; "attention_mask" likewise.  Prints {"sigmoid": {...}, "ipo": {...}} with the loss and
the log-probabilities that TRL reports.
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


def main(policy: str, reference: str, pairs: str) -> dict[str, dict[str, float]]:
    inputs = {name: torch.tensor(rows) for name, rows in json.loads(Path(pairs).read_text()).items()}
    words = Tokenizer(models.WordLevel({str(number): number for number in range(96)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="2")
    dummy = Dataset.from_list([{"prompt": "3", "chosen": "4", "rejected": "5"}] * 2)
    found = {}
    for loss in ("sigmoid", "ipo"):
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32),
            ref_model=AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32),
            args=DPOConfig(
                tempfile.mkdtemp(), loss_type=[loss], beta=0.1, use_cpu=True, bf16=False, report_to=[],
                gradient_checkpointing=False,
            ),
            train_dataset=dummy,
            processing_class=tokenizer,
        )  # fmt: skip
        value = trainer.compute_loss(trainer.model, dict(inputs))
        metrics = trainer._metrics["train"] if trainer.model.training else trainer._metrics["eval"]
        found[loss] = {"loss": float(value)} | {name: values[-1] for name, values in metrics.items()}
    return found


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
