"""Messages to token ids with the tokenizer's own chat template, without ever changing sampled ids.

A trajectory's ids only grow: the first prompt is rendered once, sampled ids are appended as they are, and each
observation is rendered once, with the markup the template puts around it. To find that markup, a short made-up dialogue
is rendered: whatever the template writes after the reply's text is what a turn adds. Changes that a template makes to
*earlier* text when the dialogue goes on (dropping the thinking, moving the system prompt) never reach the ids.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any

from skillsd.engines.chat_template import chat_template, control_tokens, first_control_token, separator
from skillsd.errors import UserError
from skillsd.prompting.templates import Place, with_context
from skillsd.prompting.thinking import TAGS, opened_by, without_thinking
from skillsd.prompting.tool_calls import ARGUMENTS, PROBE, CallParser, as_function
from skillsd.types import Message, Tool

_MARK = "\u27e6reply\u27e7"  # placeholder for the reply's text; no template writes this by itself
_CUT = "\u27e6cut\u27e7"  # where a text is split, its pieces encoded separately
_THINKING = {*TAGS, *TAGS.values()}
_TODAY = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_DAY = datetime.date(2024, 7, 26)


class ChatRenderer:
    """Renders chat messages for one tokenizer.

    Only the template writes control tokens. If a message contains the text ``<|im_end|>``, it is encoded as ordinary
    characters, so no environment, skill or demonstration can end a turn or forge another role. Markers that are plain
    text (``[INST]`` of Llama 2) cannot be protected this way. The date that a template inserts is always 26 July 2024,
    so a run resumed on another day gets the same prompts.

    If a template has no system role, or requires user and assistant to alternate, messages that it would refuse are
    joined by a blank line.

    Args:
        tokenizer: with a chat template.
        stop_tokens: ids that end the student's turn.
        template_kwargs: additional variables for the template, e.g. ``{"enable_thinking": False}``.
        place: where a context stands in the last user message of a first prompt, see `with_context`.
        tools: that the agent can call. The template writes them into the prompt, and observations that answer calls
            get its markup for results of tools.

    Raises:
        UserError: if the markup of a turn is not always the same (training on exactly the sampled ids would then be
            impossible), if no stop token ends a turn, if the template does not render replies, or if it does not read a
            key of `template_kwargs`. With tools: if the template has none, or if no parser reads its calls.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_tokens: frozenset[int],
        template_kwargs: Mapping[str, Any] | None = None,
        *,
        place: Place = "before",
        tools: Sequence[Tool] = (),
    ) -> None:
        self._tokenizer, self._place = tokenizer, place
        self._template = _TODAY.sub(lambda call: repr(_DAY.strftime(call[2])), chat_template(tokenizer))
        self._kwargs = dict(template_kwargs or {})
        for key in self._kwargs:
            if key in ("messages", "add_generation_prompt", "tools"):
                raise UserError(f"model.chat_template_kwargs has {key!r}, which is set by skillsd: leave it out")
            if not re.search(rf"\b{re.escape(key)}\b", self._template):
                raise UserError(
                    f"model.chat_template_kwargs has {key!r}, which the model's chat template does not read: "
                    "correct it or leave it out"
                )
        self._stop_texts = {token: tokenizer.decode([token]) for token in stop_tokens}
        added = tokenizer.added_tokens_decoder
        self._special = {token.content for token in added.values() if token.special}
        self._thinking = {index: token.content for index, token in added.items() if token.content in _THINKING}
        # Some tags are single tokens but not marked special (Qwen3's <think>). Only the student may write them.
        self._control = control_tokens(tokenizer)
        self._forged_by_others, self._forged_by_student = _any_of(set(self._control)), _any_of(self._special)
        self._tools = [as_function(tool) for tool in tools]
        self._cache: dict[tuple[str, int | None, bool], tuple[int, ...]] = {}
        self._has_system = self._shows([("system", _MARK), ("user", "x")])
        self._alternates = not self._shows([("user", _MARK), ("user", "x")])
        self._tail, self._next = self._find_turn()
        self._check_end_of_turn()
        self._opened = opened_by(self._render([("user", _MARK)], reply_next=True).rpartition(_MARK)[2])
        self._calls = CallParser(tokenizer, tools, self._probe_of_tools()) if tools else None

    def prompt(self, messages: Sequence[Message], context: str = "") -> tuple[int, ...]:
        """Ids of the first prompt, up to where the student's reply begins.

        Args:
            context: added to the last user message: a skill or a reference solution, as rendered with a template.
        """
        folded: list[tuple[str, str]] = []
        for message in with_context(messages, context, self._place) if context else messages:
            role = message.role if self._has_system or message.role != "system" else "user"
            if folded and folded[-1][0] == role and (self._alternates or not self._has_system):
                folded[-1] = (role, f"{folded[-1][1]}\n\n{message.content}")
            else:
                folded.append((role, message.content))
        return self._encode(self._render(folded, reply_next=True))

    def observation(self, text: str, last_sampled: int, *, answers_calls: bool = False) -> tuple[int, ...]:
        """Ids between the student's last sampled token and its next one: the environment's turn.

        Args:
            text: the observation.
            answers_calls: whether it is the result of tools: it then has the role ``tool`` instead of ``user``.
            last_sampled: the last id of the student's turn. If it is the template's end-of-turn token, that token is
                not written again; if the turn was cut short, it is written first.
        """
        stop = last_sampled if last_sampled in self._stop_texts else None
        key = (text, stop, answers_calls)
        if key not in self._cache:
            if len(self._cache) > 100_000:
                self._cache.clear()
            role = "tool" if answers_calls else "user"
            turn = self._after_reply([("user", "x"), ("assistant", _MARK), (role, text)], reply_next=True)
            if not turn.startswith(self._tail):
                raise UserError(
                    f"the chat template ends the reply before the message {text[:40]!r} with {turn[:40]!r} instead of "
                    f"{self._tail!r}. Give a tokenizer whose chat template ends every reply the same way"
                )
            if stop is None:
                self._cache[key] = self._encode(turn)
            else:
                end = self._stop_texts[stop]
                self._cache[key] = self._encode(self._without_stop(turn, end), end if end in self._special else "")
        return self._cache[key]

    def reply(self, text: str) -> tuple[int, ...]:
        """Ids of a reply as the student would have sampled it, end of turn included (for demonstrations).

        Raises:
            UserError: if the template renders a given reply differently from what it asks the model to continue, and
                in an environment with tools.
        """
        if self._calls is not None:
            raise UserError("the environment has tools, and demonstrations that call tools are not supported")
        opening = self._render([("user", "x")], reply_next=True)
        whole = self._render([("user", "x"), ("assistant", text)], reply_next=False)
        if not whole.startswith(opening):
            prompted, written = _differing(opening, whole)
            thinks = "enable_thinking" in self._template
            hint = " Try model.chat_template_kwargs={enable_thinking: false}" if thinks else ""
            raise UserError(
                f"the chat template prompts for a reply with {prompted!r}, but renders a given reply as "
                f"{written[:40]!r}, so the ids that the model should have sampled are undefined.{hint}"
            )
        reply = whole[len(opening) :]
        ended = False
        for stop in self._stop_texts.values():  # text after the end of turn is not part of the reply
            head, found, _ = reply.partition(stop)
            if found:
                reply, ended = head + stop, True
        if not ended:  # templates in which the next role's token ends the turn
            reply += next((stop for stop in self._stop_texts.values() if self._next.startswith(stop)), "")
        return self._encode(reply, opening)

    def count(self, text: str) -> int:
        """Number of tokens of `text` inside a message."""
        return len(self._encode(self._as_letters("user", text)))

    def text(self, tokens: Sequence[int]) -> str:
        """The action in sampled ids: without special tokens and thinking; empty if the thinking is unfinished."""
        parts: list[str] = []
        run: list[int] = []
        for token in tokens:  # tags can be special tokens, which `decode` leaves out
            if token in self._thinking:
                parts += [self._decode(run), self._thinking[token]]
                run = []
            else:
                run.append(token)
        return without_thinking("".join([*parts, self._decode(run)]), self._opened).strip()

    def action(self, reply: Sequence[int], before: Sequence[int]) -> tuple[str, bool]:
        """The action for the environment in sampled ids, and whether it has calls of tools.

        Args:
            before: all ids before the reply: thinking may begin there.
        """
        if self._calls is None:
            return self.text(reply), False
        ended = bool(reply) and reply[-1] in self._stop_texts
        return self._calls.action(reply[:-1] if ended else reply, before)

    def with_markup(self, tokens: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=False)
        return text

    def token_text(self, token: int) -> str:
        """The text of one id inside a text: some tokenizers leave the blank before a word out at the beginning."""
        text = self.with_markup([token])
        begins_word = str(self._tokenizer.convert_ids_to_tokens(token)).startswith("\N{LOWER ONE EIGHTH BLOCK}")
        return f" {text}" if begins_word and not text.startswith(" ") else text

    def notes(self) -> list[str]:
        """Changes that the template would make to earlier text as a dialogue goes on; the ids keep the original."""
        notes = []
        dialogue = [("user", "x"), ("assistant", _MARK), ("user", "y")]
        prompt = self._render(dialogue[:1], reply_next=True)
        kept, rewritten = _differing(prompt, self._render(dialogue, reply_next=True).partition(_MARK)[0])
        if kept.strip() or rewritten.strip():
            notes.append(
                f"once another message follows, the chat template would write {rewritten!r} instead of {kept!r} before "
                "a reply; an episode keeps the text under which the reply was sampled"
            )
        thought = [("user", "x"), ("assistant", f"<think>\nwhy\n</think>\n\n{_MARK}"), ("user", "y")]
        if "</think>" in self._template and "why" not in self._render(thought, reply_next=True):
            notes.append(
                "once another message follows, the chat template would drop a reply's thinking; an episode keeps it as "
                "sampled, and it counts towards rollout.trajectory_tokens"
            )
        if self._has_system and self._after_reply([("system", "z"), *dialogue], reply_next=True) != self._next:
            notes.append(
                "the chat template would move the system prompt to the last turn; an episode keeps it in the first"
            )
        return notes

    # -- the template -------------------------------------------------------------------------------------------

    def _render(self, messages: Sequence[tuple[str, str]], *, reply_next: bool) -> str:
        chat = [{"role": role, "content": self._as_letters(role, content)} for role, content in messages]
        return self._render_chat(chat, self._tools, reply_next=reply_next)

    def _render_chat(self, chat: list[dict[str, Any]], tools: list[Any], *, reply_next: bool) -> str:
        """The text of messages as the template takes them."""
        try:
            return self._tokenizer.apply_chat_template(
                chat,
                tools=self._all_as_letters(tools) or None,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=reply_next,
                **self._kwargs,
            )
        except Exception as error:  # a template may raise any type (jinja2's errors, ValueError ...)
            roles = [message["role"] for message in chat]
            raise UserError(f"the chat template refuses messages with the roles {roles}: {error}") from error

    def _as_letters(self, role: str, content: str) -> str:
        """Split every control token's name after its first character, so that no piece of it is a control token."""
        forged = self._forged_by_student if role == "assistant" else self._forged_by_others
        return forged.sub(lambda match: match[0][0] + _CUT + match[0][1:], content)

    def _all_as_letters(self, value: Any) -> Any:
        """The same for all texts in JSON."""
        if isinstance(value, Mapping):
            return {self._all_as_letters(key): self._all_as_letters(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self._all_as_letters(inner) for inner in value]
        return self._as_letters("tool", value) if isinstance(value, str) else value

    def _encode(self, text: str, context: str = "") -> tuple[int, ...]:
        """Ids of `text` when it follows `context`: with some tokenizers they depend on it."""
        first, *others = text.split(_CUT)
        # The other pieces begin inside a word. Alone, some tokenizers (SentencePiece) would put a blank before them.
        return (*self._ids_after(context, first), *(i for piece in others for i in self._ids_after("\n", piece)))

    def _ids_after(self, context: str, text: str) -> list[int]:
        lead, whole = self._ids(context), self._ids(context + text)
        return whole[len(lead) :] if whole[: len(lead)] == lead else self._ids(text)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False) if text else []

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _shows(self, messages: list[tuple[str, str]]) -> bool:
        try:
            return _MARK in self._render(messages, reply_next=True)
        except UserError:
            return False

    def _find_turn(self) -> tuple[str, str]:
        """The template's text after a reply: (up to the next message, up to the next reply)."""
        dialogue = [("user", "x"), ("assistant", _MARK), ("user", "y")]
        tail = self._after_reply(dialogue[:2], reply_next=False)
        turn = self._after_reply(dialogue, reply_next=True)
        # Some templates write a closing token if no reply is requested.
        closed = next((stop for stop in self._stop_texts.values() if tail.endswith(stop) and tail != stop), "")
        if not turn.startswith(tail):
            tail = tail.removesuffix(closed)
        if not turn.startswith(tail):
            raise UserError(
                f"the chat template rewrites the end of a reply when a message is added: {tail!r} becomes "
                f"{turn[:40]!r}. Give a tokenizer whose chat template ends every reply the same way"
            )
        later = self._after_reply([("user", "x"), ("assistant", "x"), ("user", "y"), *dialogue[1:]], reply_next=True)
        if later != turn:
            raise UserError(
                f"the chat template writes a later turn ({later!r}) differently from the first ({turn!r}). Give a "
                "tokenizer whose chat template writes every turn the same way"
            )
        return tail, turn

    def _check_end_of_turn(self) -> None:
        """Refuse a template whose replies no stop token ends: the student would go on with turns of its own making."""
        between = separator(self._tokenizer, self._template, **self._kwargs) or ""
        found = first_control_token(between, self._control)
        if found is not None and found[1] not in self._stop_texts:
            raise UserError(
                f"the chat template ends a reply with {found[0]!r} (id {found[1]}), which is not one of the model's "
                f"stop tokens {self._stop_texts}: add it to eos_token_id in the model's generation_config.json"
            )
        if found is None and between.strip() and not any(stop in between for stop in self._stop_texts.values()):
            raise UserError(
                f"the chat template writes {between!r} between a reply and the next message, which is plain text for "
                "this tokenizer: no token ends a reply. Give a tokenizer that has the template's control tokens, or a "
                "template that writes the tokenizer's eos_token after a reply"
            )

    def _probe_of_tools(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """How the template writes a call: the ids before the reply, and the reply's. Checks the turn that follows it.

        Raises:
            UserError: if the template takes no tools, or if a call changes the text after the reply.
        """
        marked = [as_function(Tool(PROBE.name, _MARK, PROBE.parameters))]
        question: dict[str, Any] = {"role": "user", "content": "x"}
        if _MARK not in self._render_chat([question], marked, reply_next=True):
            raise UserError(
                "the environment has tools, but the model's chat template writes none into the prompt: give a model "
                "whose chat template takes `tools`"
            )
        tools = [as_function(PROBE)]
        call = {"type": "function", "id": "call12345", "function": {"name": PROBE.name, "arguments": dict(ARGUMENTS)}}
        dialogue = [question, {"role": "assistant", "content": "", "tool_calls": [call]}]
        answer = {"role": "tool", "content": "y", "tool_call_id": "call12345", "name": PROBE.name}
        turn = self._after_reply([("user", "x"), ("assistant", _MARK), ("tool", "y")], reply_next=True)
        called = self._render_chat([*dialogue, answer], tools, reply_next=True)
        if not called.endswith(turn):
            raise UserError(
                f"the chat template writes the turn of a tool's result as {turn!r}, but after a call as "
                f"{called[-len(turn) :]!r}: tools can't be used with it"
            )
        ends = first_control_token(turn, self._control)
        if ends is None or ends[1] not in self._stop_texts:
            raise UserError(
                f"the chat template goes on after a call with {turn!r}, which begins with none of the model's stop "
                f"tokens {self._stop_texts}: add the token to eos_token_id in the model's generation_config.json"
            )
        asked = self._render_chat([question], tools, reply_next=True)
        reply, _ = _differing(called.removesuffix(turn), asked)
        return self._encode(called.removesuffix(turn).removesuffix(reply)), self._encode(reply)

    def _after_reply(self, messages: Sequence[tuple[str, str]], *, reply_next: bool) -> str:
        text = self._render(messages, reply_next=reply_next)
        _, found, after = text.partition(_MARK)
        if not found:
            when = "" if messages[-1][0] == "assistant" else " once another message follows"
            raise UserError(
                f"the chat template does not render the assistant's messages{when}. Give a tokenizer whose chat "
                "template writes every message"
            )
        return after

    def _without_stop(self, turn: str, stop: str) -> str:
        """`turn` without the end-of-turn token `stop`, which was sampled already."""
        before, found, rest = self._tail.partition(stop)
        if found and (stop in self._special or not before):
            return rest + turn[len(self._tail) :]
        # Templates in which the next role's token ends a turn. A message can't start with it: there it is split.
        return turn.removeprefix(stop) if stop in self._special else turn


def _any_of(texts: set[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, [*longest_first, _CUT])))


def _differing(a: str, b: str) -> tuple[str, str]:
    """The rest of each after their common prefix."""
    common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[common:], b[common:]
