"""A small tokenizer, a small layout and small images."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import tokenizers
from PIL import Image as PILImage
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from megablip.records import Image, VisualLayout
from megablip.tokens import CHAT_TOKENS, PAD_TOKEN, VISION_TOKENS
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


PHI3_TEMPLATES = {
    # Of microsoft/Phi-3-mini-4k-instruct since July 2024, Phi-3-small and Phi-3.5-mini-instruct.
    "new": "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
    "'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    # Of its first release and of Phi-3-medium.
    "old": "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}{{'<|user|>' + '\n' + "
    "message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n'}}{% elif (message['role'] == 'assistant') %}"
    "{{message['content'] + '<|end|>' + '\n'}}{% endif %}{% endfor %}",
}


def write_phi3_tokenizer(folder: Path, template: str | None, byte_level: bool = False, rstrip: bool = True) -> Path:
    """Phi-3's tokenizer but for its words: pieces and flags as there, and the tokens that megablip adds.

    Args:
        byte_level: make it one of GPT-2's kind instead, with the same tokens.
        rstrip: whether white space after the tokens of conversations is theirs, as it is in Phi-3.
    """
    folder.mkdir(exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet()) if byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
    space = "Ġ" if byte_level else "▁"
    words = [*("a dog cat") * (not byte_level), space, f"{space}a"]
    vocab = {piece: n for n, piece in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", *letters, *words]))}
    options = {"unk_token": "<unk>", "byte_fallback": True} if not byte_level else {}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[(space, "a")], **options))
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    tokenizer.add_tokens([AddedToken("</s>", rstrip=True, normalized=False)])
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.add_special_tokens([AddedToken(token, rstrip=rstrip, normalized=False) for token in CHAT_TOKENS.values()])
    tokenizer.add_special_tokens([PAD_TOKEN, *VISION_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|endoftext|>"}
    config |= {"pad_token": PAD_TOKEN, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def image(width: int = 32, height: int = 16, value: int = 200, format: str = "PNG") -> Image:
    buffer = io.BytesIO()
    PILImage.fromarray(np.full((height, width, 3), value, np.uint8)).save(buffer, format)
    return Image(buffer.getvalue())
