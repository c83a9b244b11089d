"""A small tokenizer, a small layout and small images."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import tokenizers
from PIL import Image as PILImage

from megablip.records import Image, VisualLayout
from megablip.tokens import CHAT_TOKENS
from tokenization.train import train_tokenizer

LAYOUT = VisualLayout(tile_size=16, patch_size=8, tokens_per_tile=3, grids=((2, 1), (1, 2)))


def write_tokenizer(folder: Path, chat: bool = True) -> Path:
    """A folder with a tokenizer of some 300 ids, and the tokens of conversations."""
    corpus = folder / "corpus.txt"
    corpus.write_text("a dog\na cat\nthe dog 381\n" * 20)
    train_tokenizer([corpus], folder / "tokenizer", vocab_size=300)
    if chat:
        path = str(folder / "tokenizer" / "tokenizer.json")
        tokenizer = tokenizers.Tokenizer.from_file(path)
        tokenizer.add_special_tokens(list(CHAT_TOKENS.values()))
        tokenizer.save(path)
    return folder / "tokenizer"


def image(width: int = 32, height: int = 16, value: int = 200, format: str = "PNG") -> Image:
    buffer = io.BytesIO()
    PILImage.fromarray(np.full((height, width, 3), value, np.uint8)).save(buffer, format)
    return Image(buffer.getvalue())
