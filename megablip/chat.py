"""Chat formats: the ids that open and close a turn, read off a tokenizer's own chat template.

A template is a program; what is needed of it are six pieces of text.  Rendering
it on a few probes finds them, and shows whether the template is what a format
can be: turns laid end to end, each the same wherever it stands.

    preamble  [opening content closing]  [opening content closing]  ...

A tokenizer that has Phi-3's tokens and no template gets Phi-3's format.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megablip.errors import ConfigError
from megablip.tokens import CHAT_TOKENS, PHI3_TEMPLATE, Tokenizer

Role = Literal["system", "user", "assistant"]

_PROBES = {"system": "qsx", "user": "qux", "assistant": "qax"}
# transformers' own tag, which marks what an assistant says; it changes nothing in the text.
_GENERATION_TAG = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")


@dataclass(frozen=True)
class ChatFormat:
    """Ids around the turns of a conversation.

    Attributes:
        preamble: ids before a first turn that is not the system's, bos left out.
        opening, closing: of a turn, by role; "system" is missing where the template has none.
        end_of_turn: how many of the assistant's closing ids are trained: up to the first control token.
    """

    preamble: tuple[int, ...]
    opening: dict[Role, tuple[int, ...]]
    closing: dict[Role, tuple[int, ...]]
    end_of_turn: int

    def user_turn(self, tokenizer: Tokenizer) -> tuple[list[int], int]:
        """What a user's turn is known by in a row of ids: the ids that begin it, and the one that ends it.

        The first are its opening without the white space at the end, the last is
        the next control token.
        """
        begin = list(self.opening["user"])
        while not tokenizer.spell(begin[-1:]).strip():
            begin.pop()
        following = (*self.closing["user"], *self.opening["assistant"])
        return begin, next(token for token in following if token in tokenizer.control_ids)


def chat_format(tokenizer: Tokenizer, folder: Path) -> ChatFormat | None:
    """The format of the tokenizer in `folder`; None if it has neither a template nor Phi-3's tokens.

    Raises:
        ConfigError: a template that is not turns laid end to end, or whose turns
            open with plain text, which any document could forge.
    """
    template, names = _template(folder)
    if template is None:
        if not all(tokenizer.has(token) for token in CHAT_TOKENS.values()):
            return None
        template = PHI3_TEMPLATE
    return _Prober(template, names, tokenizer, folder).format()


def end_ids(tokenizer: Tokenizer, folder: Path) -> list[int]:
    """Ids that end what a model says: eos, and the control token that ends an assistant's turn.

    Raises:
        ConfigError: as `chat_format`.
    """
    chat = chat_format(tokenizer, folder)
    turn = chat.closing["assistant"][: chat.end_of_turn][-1:] if chat else ()
    return [tokenizer.eos_id, *(token for token in turn if token in tokenizer.control_ids - {tokenizer.eos_id})]


class _Prober:
    def __init__(self, template: str, names: dict[str, Any], tokenizer: Tokenizer, folder: Path):
        self._tokenizer, self._folder = tokenizer, folder
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: ""}
        self._names = {name: token for name, token in names.items() if name.endswith("_token")}
        try:
            self._template = environment.from_string(_GENERATION_TAG.sub("", template))
        except TemplateError as error:
            self._refuse(f"it is no template: {error}")

    def format(self) -> ChatFormat:
        start, user_closing, between, tail = self._pieces("user", "assistant", "user", "assistant", ends=(0, 1, 2, 4))
        assistant_closing = tail
        if not between.startswith(assistant_closing):
            self._refuse("an assistant's turn ends in another way at the end")
        user_opening = between[len(assistant_closing) :]
        if not start.endswith(user_opening):
            self._refuse("the first user's turn opens in another way")
        preamble = start[: len(start) - len(user_opening)]
        _, asked = self._pieces("user")
        if not user_closing.startswith(asked):
            self._refuse("a user's turn ends in another way at the end")
        opening = {"user": user_opening, "assistant": user_closing[len(asked) :]}
        closing = {"user": asked, "assistant": assistant_closing}
        try:
            system_start, system_rest = self._pieces("system", "user", "assistant", ends=(0, 1))
        except ConfigError:  # the template refuses such turns, or leaves them out
            pass
        else:
            if not system_rest.endswith(user_opening):
                self._refuse("the user's turn opens in another way after the system's")
            opening["system"] = system_start
            closing["system"] = system_rest[: len(system_rest) - len(user_opening)]
        return self._ids(preamble, opening, closing)

    def _pieces(self, *roles: Role, ends: tuple[int, ...] | None = None) -> list[str]:
        """The text before, between and after the turns' contents; `ends` selects some."""
        messages = [{"role": role, "content": _PROBES[role]} for role in roles]
        try:
            text = self._template.render(messages=messages, add_generation_prompt=False, **self._names)
        except (TemplateError, TypeError, ValueError) as error:
            self._refuse(f"it can't be rendered: {error}")
        pieces = re.split("|".join(_PROBES.values()), text)
        if len(pieces) != len(roles) + 1:
            self._refuse(f"a conversation of {len(roles)} turns shows {len(pieces) - 1} of them")
        return pieces if ends is None else [pieces[number] for number in ends]

    def _ids(self, preamble: str, opening: dict[Role, str], closing: dict[Role, str]) -> ChatFormat:
        encode = self._tokenizer.encode_template
        control = self._tokenizer.control_ids
        first = encode(preamble)
        if first[:1] == [self._tokenizer.bos_id]:
            first = first[1:]
        openings = {role: tuple(encode(text)) for role, text in opening.items()}
        openings = {
            role: ids[1:] if role == "system" and ids[:1] == (self._tokenizer.bos_id,) else ids
            for role, ids in openings.items()
        }
        closings = {role: tuple(encode(text)) for role, text in closing.items()}
        for role, ids in openings.items():
            if not control & set(ids):
                self._refuse(f"the {role}'s turn opens with plain text, so that any text could forge a turn")
        ends = [number for number, token in enumerate(closings["assistant"], 1) if token in control]
        return ChatFormat(tuple(first), openings, closings, ends[0] if ends else len(closings["assistant"]))

    def _refuse(self, why: str) -> NoReturn:
        raise ConfigError(
            f"the tokenizer's chat template can't be used: {why}",
            where=str(self._folder),
            remedy="write a plain one to chat_template.jinja: for each message its opening, its content, its end",
        )


def _template(folder: Path) -> tuple[str | None, dict[str, Any]]:
    """The chat template of a tokenizer folder, if it has one, and the names of its special tokens."""
    names = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    names = {name: token.get("content") if isinstance(token, dict) else token for name, token in names.items()}
    path = folder / "chat_template.jinja"
    template = path.read_text(encoding="utf-8") if path.exists() else names.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template, names


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
