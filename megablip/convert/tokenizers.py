"""Tokenizer folders with the tokens that a model needs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megablip.errors import ConfigError
from megablip.model.processor import Blip3Processor
from megablip.records import VisualLayout
from megablip.tokens import PAD_TOKEN, VISION_TOKENS, Tokenizer


def extended_tokenizer(source: Path, folder: Path) -> Tokenizer:
    """Save a tokenizer with `<pad>` and xGen-MM's three tokens added, in its order, where it lacks them.

    Raises:
        ConfigError: there is no tokenizer in `source`.
    """
    try:
        # Not the class that the config names: those of Llama and others make tokenizer.json anew, and leave out how it
        # treats spaces.
        as_it_is = (source / "tokenizer.json").exists()
        tokenizer = (PreTrainedTokenizerFast if as_it_is else AutoTokenizer).from_pretrained(source)
    except Exception as error:  # transformers raises all kinds
        raise ConfigError(f"the tokenizer can't be read: {error}", where=str(source), remedy="check the path") from None
    known = tokenizer.get_vocab()
    missing = [token for token in (PAD_TOKEN, *VISION_TOKENS) if token not in known]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    tokenizer.save_pretrained(folder)
    return Tokenizer(folder)


def save_processor(folder: Path, layout: VisualLayout) -> None:
    """Write the processor of a model whose tokenizer lies in `folder` already."""
    Blip3Processor(AutoTokenizer.from_pretrained(folder), **asdict(layout)).save_pretrained(folder)
