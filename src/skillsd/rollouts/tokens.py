"""Messages to token ids, by the tokenizer's own chat template, without ever touching what was sampled.

A trajectory's ids only grow: the first prompt is rendered once; then sampled ids are appended as they are, and each
observation is rendered once, with whatever the template puts around it. To find that out, the template renders a short
made-up dialogue with and without one more message, and the difference in text is what a turn adds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from skillsd.errors import UserError
from skillsd.types import Message

_MARK = "\u27e6reply\u27e7"  # stands for the student's words; no template writes this by itself
_CUT = "\u27e6cut\u27e7"  # here a text is encoded in two pieces


class ChatRenderer:
    """Renders for one tokenizer.

    Special tokens are the template's alone: where a message *says* `<|im_end|>`, say, it is encoded as those letters,
    so that no environment, skill or demonstration can end a turn or speak in another's name.

    Raises:
        UserError: if the chat template changes earlier turns when later ones are added (it would then be impossible
            to train on exactly what was sampled), or has no place for a turn.
    """

    def __init__(self, tokenizer: Any, stop_tokens: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._stop_texts = {token: tokenizer.decode([token]) for token in stop_tokens}
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, [*longest_first, _CUT])))
        self._tail = self._find_tail()
        self._cache: dict[tuple[str, int | None], tuple[int, ...]] = {}

    def prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Ids of the first prompt, up to where the student begins to speak."""
        return self._encode(self._render([(m.role, m.content) for m in messages], reply_next=True))

    def observation(self, text: str, last_sampled: int) -> tuple[int, ...]:
        """Ids between the student's last sampled token and its next one: the environment's turn.

        Args:
            text: the observation.
            last_sampled: the id the student's turn ended with. If that is the template's own end of turn, it is not
                written again; if the turn was cut short, the template's end of turn comes first.
        """
        stop = last_sampled if last_sampled in self._stop_texts else None
        key = (text, stop)
        if key not in self._cache:
            if len(self._cache) > 100_000:
                self._cache.clear()
            tail = self._tail
            if stop is not None:
                tail = tail.removeprefix(self._stop_texts[stop])
            self._cache[key] = self._encode(tail + self._turn(text))
        return self._cache[key]

    def reply(self, text: str) -> tuple[int, ...]:
        """Ids of a whole reply as the student would have sampled it, end of turn included (for demonstrations)."""
        opening = self._render([("user", "x")], reply_next=True)
        whole = self._render([("user", "x"), ("assistant", text)], reply_next=False)
        if not whole.startswith(opening):
            raise UserError("the chat template renders a reply differently from what it asks the model to continue")
        said = whole[len(opening) :]
        for stop in self._stop_texts.values():  # what follows the end of turn is not the student's to say
            head, found, _ = said.partition(stop)
            if found:
                said = head + stop
                break
        return self._encode(said)

    def count(self, text: str) -> int:
        """How many tokens `text` has as part of a message."""
        return len(self._encode(self._as_letters(text)))

    def text(self, tokens: Sequence[int]) -> str:
        """What the student said, for the environment and for people."""
        ids = list(tokens)
        return self._tokenizer.decode(ids, skip_special_tokens=True).strip()

    # -- the template -------------------------------------------------------------------------------------------

    def _render(self, messages: list[tuple[str, str]], *, reply_next: bool) -> str:
        chat = [{"role": role, "content": self._as_letters(content)} for role, content in messages]
        try:
            return self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=reply_next)
        except Exception as error:  # templates raise what they like (jinja2, ValueError ...)
            raise UserError(f"the chat template refuses {[role for role, _ in messages]}: {error}") from error

    def _as_letters(self, content: str) -> str:
        """Cut every special token's name behind its first letter: no piece of it is one."""
        return self._special.sub(lambda match: match[0][0] + _CUT + match[0][1:], content)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(i for piece in text.split(_CUT) for i in self._tokenizer.encode(piece, add_special_tokens=False))

    def _find_tail(self) -> str:
        """What the template writes between the end of a reply's words and the next message."""
        dialogue = [("user", "x"), ("assistant", _MARK)]
        alone = self._render(dialogue, reply_next=False)
        _, found, tail = alone.partition(_MARK)
        if not found:
            raise UserError("the chat template does not show the assistant's words")
        longer = self._render([*dialogue, ("user", "y")], reply_next=True)
        if not longer.startswith(alone):
            raise UserError(
                "the chat template rewrites earlier turns when a message is added (as templates that drop earlier "
                "thinking do); give a tokenizer whose template keeps them"
            )
        return tail

    def _turn(self, text: str) -> str:
        dialogue = [("user", "x"), ("assistant", _MARK)]
        alone = self._render(dialogue, reply_next=False)
        longer = self._render([*dialogue, ("user", text)], reply_next=True)
        if not longer.startswith(alone):
            raise UserError(f"the chat template rewrites earlier turns when the message {text!r} is added")
        return longer[len(alone) :]
