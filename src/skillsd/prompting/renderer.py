"""Messages to token ids, by the tokenizer's own chat template, without ever touching what was sampled.

A trajectory's ids only grow: the first prompt is rendered once; then sampled ids are appended as they are, and each
observation is rendered once, with whatever the template puts around it. To find that out, the template renders a short
made-up dialogue with one more message: what it writes behind the reply's words is what a turn adds. What it does to
the words before them when the dialogue goes on (drop thinking, move the system prompt) never reaches the ids.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any

from skillsd.errors import UserError
from skillsd.types import Message

_MARK = "\u27e6reply\u27e7"  # stands for the student's words; no template writes this by itself
_CUT = "\u27e6cut\u27e7"  # here a text is encoded in two pieces
_TAG = re.compile(r"[<\[].*[>\]]", re.DOTALL)
_TODAY = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_DAY = datetime.date(2024, 7, 26)


class ChatRenderer:
    """Renders for one tokenizer.

    Control tokens are the template's alone: where a message *says* `<|im_end|>`, say, it is encoded as those letters,
    so that no environment, skill or demonstration can end a turn or speak in another's name by them. Markers that are
    plain text (``[INST]`` of Llama 2) anyone can imitate. A template's *today* is always 26 July 2024: a run taken up
    tomorrow reads the same prompts.

    Where a template has no system role, or wants user and assistant to alternate, messages that it would refuse are
    joined by a blank line.

    Args:
        tokenizer: with a chat template.
        stop_tokens: ids that end the student's turn.
        template_kwargs: what the template shall know besides, e.g. ``{"enable_thinking": False}``.

    Raises:
        UserError: if what the template adds for a turn is not always the same (it would then be impossible to train on
            exactly what was sampled), it has no place for a turn, or does not read a key of `template_kwargs`.
    """

    def __init__(
        self, tokenizer: Any, stop_tokens: frozenset[int], template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._template = _TODAY.sub(lambda call: repr(_DAY.strftime(call[2])), tokenizer.get_chat_template())
        self._kwargs = dict(template_kwargs or {})
        for key in self._kwargs:
            if key in ("messages", "add_generation_prompt"):
                raise UserError(f"model.chat_template_kwargs has {key!r}, which is not a recipe's to set")
            if not re.search(rf"\b{re.escape(key)}\b", self._template):
                raise UserError(
                    f"model.chat_template_kwargs has {key!r}, which the model's chat template does not read"
                )
        self._stop_texts = {token: tokenizer.decode([token]) for token in stop_tokens}
        added = list(tokenizer.added_tokens_decoder.values())
        self._special = {token.content for token in added if token.special}
        # Some tags are control tokens without being called special (Qwen3's <think>). The student may write them.
        tags = {token.content for token in added if _TAG.fullmatch(token.content) and token.content in self._template}
        self._forged_by_others, self._forged_by_student = _any_of(self._special | tags), _any_of(self._special)
        self._cache: dict[tuple[str, int | None], tuple[int, ...]] = {}
        self._has_system = self._shows([("system", _MARK), ("user", "x")])
        self._alternates = not self._shows([("user", _MARK), ("user", "x")])
        self._tail, self._next = self._find_turn()

    def prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Ids of the first prompt, up to where the student begins to speak."""
        folded: list[tuple[str, str]] = []
        for message in messages:
            role = message.role if self._has_system or message.role != "system" else "user"
            if folded and folded[-1][0] == role and (self._alternates or not self._has_system):
                folded[-1] = (role, f"{folded[-1][1]}\n\n{message.content}")
            else:
                folded.append((role, message.content))
        return self._encode(self._render(folded, reply_next=True))

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
            turn = self._behind_reply([("user", "x"), ("assistant", _MARK), ("user", text)], reply_next=True)
            if not turn.startswith(self._tail):
                raise UserError(
                    f"the chat template ends the reply before the message {text!r} in another way than usual "
                    f"({turn[:40]!r} instead of {self._tail!r}): such a template can't be trained on"
                )
            if stop is None:
                self._cache[key] = self._encode(turn)
            else:
                said = self._stop_texts[stop]
                self._cache[key] = self._encode(self._without_stop(turn, said), said if said in self._special else "")
        return self._cache[key]

    def reply(self, text: str) -> tuple[int, ...]:
        """Ids of a whole reply as the student would have sampled it, end of turn included (for demonstrations)."""
        opening = self._render([("user", "x")], reply_next=True)
        whole = self._render([("user", "x"), ("assistant", text)], reply_next=False)
        if not whole.startswith(opening):
            asked, written = _differing(opening, whole)
            thinks = "enable_thinking" in self._template
            hint = " Try model.chat_template_kwargs={enable_thinking: false}" if thinks else ""
            raise UserError(
                f"the chat template asks for a reply by {asked!r} but writes a given one as {written[:40]!r}, so it "
                f"can't say what the model should have sampled.{hint}"
            )
        said = whole[len(opening) :]
        ended = False
        for stop in self._stop_texts.values():  # what follows the end of turn is not the student's to say
            head, found, _ = said.partition(stop)
            if found:
                said, ended = head + stop, True
        if not ended:  # templates whose next speaker's token ends the turn
            said += next((stop for stop in self._stop_texts.values() if self._next.startswith(stop)), "")
        return self._encode(said, opening)

    def count(self, text: str) -> int:
        """How many tokens `text` has as part of a message."""
        return len(self._encode(self._as_letters("user", text)))

    def text(self, tokens: Sequence[int]) -> str:
        """What the student said, for the environment and for people."""
        ids = list(tokens)
        return self._tokenizer.decode(ids, skip_special_tokens=True).strip()

    def notes(self) -> list[str]:
        """What the template would write otherwise once a dialogue goes on, and the ids keep as it was."""
        notes = []
        dialogue = [("user", "x"), ("assistant", _MARK), ("user", "y")]
        asked = self._render(dialogue[:1], reply_next=True)
        kept, rewritten = _differing(asked, self._render(dialogue, reply_next=True).partition(_MARK)[0])
        if kept.strip() or rewritten.strip():
            notes.append(
                f"before a reply, the chat template would write {rewritten!r} instead of {kept!r} once another message "
                "follows; an episode keeps what was there when the reply was sampled"
            )
        thought = [("user", "x"), ("assistant", f"<think>\nwhy\n</think>\n\n{_MARK}"), ("user", "y")]
        if "</think>" in self._template and "why" not in self._render(thought, reply_next=True):
            notes.append(
                "the chat template would drop a reply's thinking once another message follows; an episode keeps it, as "
                "sampled (rollout.trajectory_tokens must hold it)"
            )
        if self._has_system and self._behind_reply([("system", "z"), *dialogue], reply_next=True) != self._next:
            notes.append(
                "the chat template would move the system prompt to the last turn; an episode keeps it in the first"
            )
        return notes

    # -- the template -------------------------------------------------------------------------------------------

    def _render(self, messages: Sequence[tuple[str, str]], *, reply_next: bool) -> str:
        chat = [{"role": role, "content": self._as_letters(role, content)} for role, content in messages]
        try:
            return self._tokenizer.apply_chat_template(
                chat,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=reply_next,
                **self._kwargs,
            )
        except Exception as error:  # templates raise what they like (jinja2, ValueError ...)
            raise UserError(f"the chat template refuses {[role for role, _ in messages]}: {error}") from error

    def _as_letters(self, role: str, content: str) -> str:
        """Cut every control token's name behind its first letter: no piece of it is one."""
        forged = self._forged_by_student if role == "assistant" else self._forged_by_others
        return forged.sub(lambda match: match[0][0] + _CUT + match[0][1:], content)

    def _encode(self, text: str, context: str = "") -> tuple[int, ...]:
        """Ids of `text`; those that it has behind `context`, which some tokenizers take into account."""
        first, *others = text.split(_CUT)
        lead, whole = self._ids(context), self._ids(context + first)
        ids = whole[len(lead) :] if whole[: len(lead)] == lead else self._ids(first)
        return (*ids, *(i for piece in others for i in self._ids(piece)))

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False) if text else []

    def _shows(self, messages: list[tuple[str, str]]) -> bool:
        try:
            return _MARK in self._render(messages, reply_next=True)
        except UserError:
            return False

    def _find_turn(self) -> tuple[str, str]:
        """What the template writes behind a reply's words: up to the next message, and through it to the next reply."""
        dialogue = [("user", "x"), ("assistant", _MARK), ("user", "y")]
        tail = self._behind_reply(dialogue[:2], reply_next=False)
        turn = self._behind_reply(dialogue, reply_next=True)
        # Some templates close a dialogue that nobody is asked to continue.
        closed = next((stop for stop in self._stop_texts.values() if tail.endswith(stop) and tail != stop), "")
        if not turn.startswith(tail):
            tail = tail.removesuffix(closed)
        if not turn.startswith(tail):
            raise UserError(
                f"the chat template rewrites the end of a reply when a message is added: {tail!r} becomes "
                f"{turn[:40]!r}. Give a tokenizer whose chat template ends every reply alike"
            )
        later = self._behind_reply([("user", "x"), ("assistant", "x"), ("user", "y"), *dialogue[1:]], reply_next=True)
        if later != turn:
            raise UserError(
                f"the chat template writes a later turn ({later!r}) otherwise than the first ({turn!r}). Give a "
                "tokenizer whose chat template writes every turn alike"
            )
        return tail, turn

    def _behind_reply(self, messages: Sequence[tuple[str, str]], *, reply_next: bool) -> str:
        text = self._render(messages, reply_next=reply_next)
        _, found, behind = text.partition(_MARK)
        if not found:
            when = "" if messages[-1][0] == "assistant" else " once another message follows"
            raise UserError(
                f"the chat template does not show the assistant's words{when}. Give a tokenizer whose chat template "
                "writes every message"
            )
        return behind

    def _without_stop(self, turn: str, stop: str) -> str:
        """`turn` without the end of turn that was sampled already."""
        before, found, rest = self._tail.partition(stop)
        if found and (stop in self._special or not before):
            return rest + turn[len(self._tail) :]
        # Where the next speaker's token ends a turn. Messages can't begin with it: in them it is cut in two.
        return turn.removeprefix(stop) if stop in self._special else turn


def _any_of(texts: set[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, [*longest_first, _CUT])))


def _differing(a: str, b: str) -> tuple[str, str]:
    """What is left of each behind their common beginning."""
    common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[common:], b[common:]
