"""Text to token ids, and the special tokens that text can never become.

A tokenizer is a Hugging Face folder, read with `tokenizers` alone.  Control
tokens (bos, eos, `<image>`, `<|endofchunk|>`, ...) exist as ids only: the
encoder places them, and their strings inside a document encode as ordinary
characters, so no web page can forge an image, a turn or the end of a document.  Markup tags
(`<ocr>`, `<bbox>`) are part of the text: one token each where the tokenizer
knows them, several characters where it doesn't (Phi-3).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from megablip.errors import ConfigError

PAD_TOKEN = "<pad>"
IMAGE_TOKEN = "<image>"
IMAGE_PLACEHOLDER_TOKEN = "<image placeholder>"
END_OF_CHUNK_TOKEN = "<|endofchunk|>"

# The order in which xGen-MM adds them after its decoder's own vocabulary;
# released weights depend on it (salesforce/LAVIS, branch xgen-mm, xgenmm.py).
VISION_TOKENS = (IMAGE_TOKEN, IMAGE_PLACEHOLDER_TOKEN, END_OF_CHUNK_TOKEN)

# Phi-3's chat format. Models that are only pre-trained do without.
CHAT_TOKENS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>", "end": "<|end|>"}

# As the model card of microsoft/Phi-3-mini-4k-instruct describes it.
PHI3_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

# Markup of BLIP-3's OCR captions (arXiv 2408.08872, figure 4).
OCR_TAGS = ("<ocr>", "</ocr>", "<bbox>", "</bbox>")
# and of its grounding captions, beside <bbox>.
OBJECT_TAGS = ("<object>", "</object>")


class Tokenizer:
    """A tokenizer folder (`tokenizer.json`, `tokenizer_config.json`) and its special ids.

    Attributes:
        pad_id, eos_id, image_id, end_of_chunk_id: ids of special tokens.
        bos_id: id of the token that opens a document, None if there is none.
        control_ids: ids of all tokens that text can't become.
        vocab_size: one more than the highest id, added tokens included: the rows that a model needs.

    Raises:
        ConfigError: the folder can't be read, lacks a token that megablip needs,
            or lets text spell a control token.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
            names = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises plain Exception
            raise ConfigError(
                f"the tokenizer can't be read: {error}",
                where=str(path),
                remedy="name a folder with tokenizer.json and tokenizer_config.json",
            ) from None
        self._path = path
        # True means that special tokens' strings in text are encoded as text.
        self._tokenizer.encode_special_tokens = True
        self.bos_id = self._id(names.get("bos_token"), required=False)
        self.eos_id = self._id(names.get("eos_token"))
        self.pad_id = self._id(PAD_TOKEN)
        self.image_id = self._id(IMAGE_TOKEN)
        self.end_of_chunk_id = self._id(END_OF_CHUNK_TOKEN)
        added = self._tokenizer.get_added_tokens_decoder()
        self.control_ids = frozenset(number for number, token in added.items() if token.special)
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values())

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos or eos; never a control token's id."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_template(self, text: str) -> list[int]:
        """Ids of text that is not a document's: here the names of control tokens are control tokens."""
        self._tokenizer.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._tokenizer.encode_special_tokens = True

    def has(self, token: str) -> bool:
        """Whether `token` is a control token."""
        return self._tokenizer.token_to_id(token) in self.control_ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; control tokens vanish, markup tags stay."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def spell(self, ids: Iterable[int]) -> str:
        """The same with control tokens by their names, for people to look at."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def names(self, ids: Iterable[int]) -> list[str]:
        """Each id's name in the vocabulary, where a space or a line's end is a mark that can be seen."""
        return [self._tokenizer.id_to_token(number) for number in ids]

    def id_of(self, token: str) -> int | None:
        """The id of a token, control tokens included; None if there is no such token."""
        return self._tokenizer.token_to_id(token)

    def __reduce__(self):
        # Pickled as its path: tokenizers' own pickling forgets encode_special_tokens,
        # and a worker would let text forge special tokens.
        return type(self), (self._path,)

    def _id(self, token: str | dict | None, required: bool = True) -> int | None:
        content = token.get("content") if isinstance(token, dict) else token
        number = self._tokenizer.token_to_id(content) if content else None
        if number is None and required:
            raise ConfigError(
                f"the tokenizer has no {content or 'eos_token'}",
                where=str(self._path),
                remedy=f"add {PAD_TOKEN}, then {', '.join(VISION_TOKENS)} in this order, as special tokens",
            )
        if number is not None and number in self.encode(content):
            raise ConfigError(
                f"text that holds '{content}' would become the control token",
                where=str(self._path),
                remedy='set "special": true for it in tokenizer.json',
            )
        return number
