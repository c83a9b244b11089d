"""Chat formats: the ids that open and close a turn, read off a tokenizer's own chat template.

A template is a program; what is needed of it are six pieces of text.  Rendering
it on a few probes finds them, and shows whether the template is what a format
can be: turns laid end to end, each the same wherever it stands.

    preamble  [opening content closing]  [opening content closing]  ...

bos and eos at the very ends are no part of it: a document has its own.  Last, one
conversation is encoded piece by piece, as documents are, and as a whole, as
transformers does it: the ids must be the same.

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
        opening, closing: of a turn, by role; "system" is missing where the template has none. The
            assistant's opening is empty where the user's closing always brings it along.
        end_of_turn: how many of the assistant's closing ids are trained: up to the first control token.
        answer_end_ids: that token, which ends an answer; none where the template has none, and only eos does.
    """

    preamble: tuple[int, ...]
    opening: dict[Role, tuple[int, ...]]
    closing: dict[Role, tuple[int, ...]]
    end_of_turn: int
    answer_end_ids: tuple[int, ...]

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
            open with plain text, which any document could forge, or a tokenizer that gives
            other ids piece by piece.
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
    return [tokenizer.eos_id, *(token for token in (chat.answer_end_ids if chat else ()) if token != tokenizer.eos_id)]


class _Prober:
    def __init__(self, template: str, names: dict[str, Any], tokenizer: Tokenizer, folder: Path):
        self._tokenizer, self._folder = tokenizer, folder
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: ""}
        self._names = {name: token for name, token in names.items() if name.endswith("_token") and token is not None}
        try:
            self._template = environment.from_string(_GENERATION_TAG.sub("", template))
        except TemplateError as error:
            self._refuse(f"it is no template: {error}")

    def format(self) -> ChatFormat:
        start, first_answer, between, last_answer, tail = self._pieces("user", "assistant", "user", "assistant")
        if first_answer != last_answer:
            self._refuse(f"the last answer opens with {last_answer!r}, the one before with {first_answer!r}")
        assistant_closing = self._at_the_end(tail, between)
        if assistant_closing is None:
            self._refuse("an assistant's turn ends in another way at the end")
        user_opening = between[len(assistant_closing) :]
        if not start.endswith(user_opening):
            self._refuse("the first user's turn opens in another way")
        preamble = start[: len(start) - len(user_opening)]
        user_closing = self._at_the_end(self._pieces("user")[1], first_answer)
        if user_closing is None:
            self._refuse("a user's turn ends in another way at the end")
        opening = {"user": user_opening, "assistant": first_answer[len(user_closing) :]}
        closing = {"user": user_closing, "assistant": assistant_closing}
        try:
            system_start, system_rest, *_ = self._pieces("system", "user", "assistant")
        except ConfigError:  # the template refuses such turns, or leaves them out
            pass
        else:
            if not system_rest.endswith(user_opening):
                self._refuse("the user's turn opens in another way after the system's")
            opening["system"] = system_start
            closing["system"] = system_rest[: len(system_rest) - len(user_opening)]
        found = self._ids(preamble, opening, closing)
        asked = self._pieces("user", add_generation_prompt=True)[1]
        if asked != first_answer:
            self._refuse(f"add_generation_prompt writes {asked!r}, but before an answer stands {first_answer!r}")
        self._compare(found, "user", "assistant", "user")
        if "system" in opening:
            self._compare(found, "system", "user", "assistant", "user")
        return found

    def _at_the_end(self, text: str, following: str) -> str | None:
        """What closes a turn, from the text after the last one; None unless it opens `following` too.

        A template may write eos once, after the last turn (Phi-3's does).
        """
        for token in ("", self._names.get("eos_token"), self._names.get("bos_token")):
            if token is not None and text.endswith(token) and following.startswith(text.removesuffix(token)):
                return text.removesuffix(token)
        return None

    def _pieces(self, *roles: Role, add_generation_prompt: bool = False) -> list[str]:
        """The text before, between and after the turns' contents."""
        text = self._render(*roles, add_generation_prompt=add_generation_prompt)
        pieces = re.split("|".join(_PROBES.values()), text)
        if len(pieces) != len(roles) + 1:
            self._refuse(f"a conversation of {len(roles)} turns shows {len(pieces) - 1} of them")
        return pieces

    def _render(self, *roles: Role, add_generation_prompt: bool) -> str:
        messages = [{"role": role, "content": _PROBES[role]} for role in roles]
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **self._names)
        except (TemplateError, TypeError, ValueError) as error:
            self._refuse(f"it can't be rendered: {error}")

    def _ids(self, preamble: str, opening: dict[Role, str], closing: dict[Role, str]) -> ChatFormat:
        control = self._tokenizer.control_ids
        openings = {role: self._encode(text) for role, text in opening.items()}
        if "system" in openings:
            openings["system"] = self._without_bos(openings["system"])
        closings = {role: self._encode(text) for role, text in closing.items()}
        for role, ids in openings.items():
            if role == "assistant" and not ids:
                ids = closings["user"]
            if not control & set(ids):
                self._refuse(f"the {role}'s turn opens with plain text, so that any text could forge a turn")
        answer_closing = closings["assistant"]
        ends = [number for number, token in enumerate(answer_closing, 1) if token in control]
        end_of_turn = ends[0] if ends else len(answer_closing)
        answer_end_ids = answer_closing[end_of_turn - 1 : end_of_turn] if ends else ()
        preamble_ids = self._without_bos(self._encode(preamble))
        return ChatFormat(preamble_ids, openings, closings, end_of_turn, answer_end_ids)

    def _compare(self, found: ChatFormat, *roles: Role) -> None:
        """Refuse a format whose pieces give other ids than the whole text of a conversation with these turns."""
        whole = self._without_bos(self._encode(self._render(*roles, add_generation_prompt=True)))
        laid = () if roles[0] == "system" else found.preamble
        for role in roles:
            laid += found.opening[role] + tuple(self._tokenizer.encode(_PROBES[role])) + found.closing[role]
        laid += found.opening["assistant"]
        if laid != whole:
            place = next((n for n, ids in enumerate(zip(laid, whole, strict=False)) if ids[0] != ids[1]), len(whole))
            ours, theirs = (self._tokenizer.names(ids[max(place - 1, 0) : place + 3]) for ids in (laid, whole))
            raise ConfigError(
                "the tokenizer gives other ids for a conversation turn by turn, as training lays it, than for its "
                f"whole text: {ours}, not {theirs}",
                where=str(self._folder),
                remedy="if it puts a space before each text, turn that off in tokenizer.json (prepend_scheme: never), "
                "or write a chat_template.jinja where each message stands alone between two control tokens",
            )

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode_template(text))

    def _without_bos(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        return ids[1:] if ids[:1] == (self._tokenizer.bos_id,) else ids

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
