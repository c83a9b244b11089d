"""The first document of a run in colour: what is trained, what is masked, where images stand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from rich.text import Text

from megablip.records import IGNORE_LABEL, MicroBatch
from megablip.tokens import Tokenizer

_STYLES = {"trained": "bold green", "masked": "dim", "visual": "blue"}
_MAX_CHARACTERS = 1200


def colour_example(micro_batch: MicroBatch, names: Sequence[str], tokenizer: Tokenizer) -> Text | None:
    """The first document, control tokens spelled out and a run of visual tokens as their number.

    Args:
        micro_batch: on the host.
        names: of the sources.

    Returns:
        None where the micro-batch has no document.
    """
    if int(micro_batch.source[0]) < 0:
        return None
    length = micro_batch.doc_lens[0]
    ids, labels = micro_batch.input_ids[:length].numpy(), micro_batch.labels[:length].numpy()
    kinds = np.where(labels == IGNORE_LABEL, "masked", "trained")
    visual = micro_batch.visual_token_index.numpy()
    kinds[visual[visual < length]] = "visual"
    counts = ", ".join(f"{int((kinds == kind).sum())} {kind}" for kind in _STYLES)
    text = Text(f"{names[int(micro_batch.source[0])]} {micro_batch.keys[0]}: {length} tokens, ")
    text.append(f"{counts}\n")
    for kind, run in groupby(zip(kinds.tolist(), ids.tolist(), strict=True), key=lambda pair: pair[0]):
        run_ids = [token for _, token in run]
        words = f"[{len(run_ids)} visual tokens]" if kind == "visual" else tokenizer.spell(run_ids)
        text.append(words, _STYLES[kind])
    text.truncate(_MAX_CHARACTERS, overflow="ellipsis")
    return text
