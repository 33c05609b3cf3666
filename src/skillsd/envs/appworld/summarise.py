"""The rule-based summariser: turns a finished episode into a skill, using only the ``info`` of its turns.

It ignores the agent's text and the printed output. A skill consists of names of apps, APIs and arguments, and of this
module's own phrases. So it can't contain passwords, tokens, addresses, ids or the answer, nor the text of the hidden
tests (only their number). It never searches for a better solution: a skill contains only what the student found itself.

Keys used from ``info``: ``code`` (None if the turn had none), ``calls`` (each with ``app``, ``api``, ``args``, ``ok``,
``error`` and, if known, ``changes``), ``error``, ``completed``; from the last turn also ``passes`` and ``failures``.
"""

from __future__ import annotations

import builtins
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from skillsd.envs.appworld.prompt import Style
from skillsd.types import Skill, Trajectory

MAX_SUCCESS_CHARS = 180
MAX_MISTAKE_CHARS = 440
MAX_WORKFLOW_CHARS = 570
MAX_SHORT_CHARS = 290
"""Maximum lengths of the fields. They keep a skill below 1,200 characters, and a short one below 300."""

MAX_MISTAKES = 4
"""Maximum number of failed calls that a skill reports. The first ones: later failures often follow from them."""

MAX_NAME_CHARS = 60
"""Calls with longer names are skipped; no real API has one."""

_DOCS = "api_docs"
_COMPLETE = "supervisor.complete_task"
_READING = ("show_", "search_", "login")
_RESULTS = {"supervisor.show_account_passwords": "password", "login": "access_token"}
_PAGES = ("page_index", "page_limit")
_STATUS = {
    "400": "bad request",
    "401": "not authorised",
    "403": "forbidden",
    "404": "not found",
    "409": "conflict",
    "422": "wrong or missing arguments",
}
_UNKNOWN = "an API or app that does not exist"
_TIMEOUT = "too long a run"
_ERROR_NAMES = {
    name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, BaseException)
} - {"Exception", "BaseException"} | {"JSONDecodeError"}


@dataclass(frozen=True)
class _Call:
    turn: int
    app: str
    api: str
    args: tuple[str, ...]
    ok: bool
    error: str
    reads: bool

    @property
    def name(self) -> str:
        return f"{self.app}.{self.api}"


@dataclass(frozen=True)
class _Step:
    """A step of a workflow: one or more calls, repeated if `loop` is set."""

    calls: tuple[_Call, ...]
    loop: bool


def summariser(style: Style) -> Callable[[Trajectory], Skill | None]:
    """The summariser for a prompt style: ``react`` fills all fields, ``short`` only the workflow of a success."""

    def summarise(trajectory: Trajectory) -> Skill | None:
        return summarise_turns([turn.info for turn in trajectory.turns], trajectory.success, style)

    return summarise


def summarise_turns(infos: Sequence[Mapping[str, Any]], success: bool, style: Style) -> Skill | None:
    """The skill for an episode with these turns; None if it made no API call or there is nothing to report.

    In the style ``short``, failures give no skill.
    """
    calls = list(_calls(infos))
    if not calls:
        return None
    steps = _steps(calls, success)
    if style == "short":
        # The short style can't express mistakes, and a failure's calls as a workflow would lack the final call.
        skill = Skill("", "", _workflow(steps, MAX_SHORT_CHARS, _in_short) if success else "")
    else:
        # For a failure, `steps` has only the calls that read: those that made changes may have been the mistake.
        plan = _workflow(steps, MAX_WORKFLOW_CHARS - len(_START), _in_prose)
        workflow = plan if success or not plan else _START + plan
        skill = Skill(_success(calls, steps, infos, success), _mistakes(calls, infos, success), workflow)
    return None if skill.is_empty else skill


_START = "A start, the rest has to be found out: "


def _calls(infos: Sequence[Mapping[str, Any]]) -> Iterable[_Call]:
    for turn, info in enumerate(infos):
        for call in info.get("calls") or ():
            app, api = str(call["app"]), str(call["api"])
            args = tuple(name for name in map(str, call.get("args") or ()) if _is_name(name))
            if _is_name(app) and _is_name(api):
                reads = not call["changes"] if "changes" in call else api.startswith(_READING)
                yield _Call(turn, app, api, args, bool(call["ok"]), str(call.get("error") or ""), reads)


def _is_name(text: str) -> bool:
    return text.isidentifier() and text.isascii() and len(text) <= MAX_NAME_CHARS


def _steps(calls: Sequence[_Call], success: bool) -> list[_Step]:
    """The successful calls as steps: each API once, at the position of its first call; complete_task last.

    Agents explore: they call an API once to inspect the result, and again to use it. Calls to the documentation are
    left out, since the steps already contain what was found there.
    """
    useful = [call for call in calls if call.ok and call.app != _DOCS and (success or call.reads)]
    by_name: dict[str, list[_Call]] = {}
    for call in useful:
        by_name.setdefault(call.name, []).append(call)
    completing = by_name.pop(_COMPLETE, [])
    steps: list[_Step] = []
    for made in by_name.values():
        in_turn = Counter(call.turn for call in made)
        loop = max(in_turn.values()) > 1 or (len(made) > 1 and not made[0].reads)
        step = _Step((_merged(made),), loop)
        if loop and steps and steps[-1].loop and _interleaved(by_name[steps[-1].calls[-1].name], made, useful):
            steps[-1] = _Step((*steps[-1].calls, *step.calls), True)
        else:
            steps.append(step)
    return [*steps, *([_Step((completing[-1],), False)] if completing else [])]


def _merged(made: Sequence[_Call]) -> _Call:
    """Merge calls of one API, with the arguments of the last turn, when the agent knew how to call it."""
    last = [call for call in made if call.turn == made[-1].turn]
    args = dict.fromkeys(name for call in last for name in call.args)
    return replace(made[0], args=tuple(args))


def _interleaved(first: Sequence[_Call], second: Sequence[_Call], order: Sequence[_Call]) -> bool:
    """Whether calls of the two APIs alternate within one turn, as in the body of a loop."""
    for turn in {call.turn for call in first} & {call.turn for call in second}:
        names = [call.name for call in order if call.turn == turn]
        last_of_first = len(names) - 1 - names[::-1].index(first[0].name)
        if names.index(second[0].name) < last_of_first:
            return True
    return False


def _workflow(steps: Sequence[_Step], limit: int, render: Callable[[Sequence[_Step], int], str]) -> str:
    """The steps as text within `limit` characters: reduces detail first, then drops steps from the middle."""
    remaining = list(steps)
    while remaining:
        for detail in (2, 1, 0):
            text = render(remaining, detail)
            if len(text) <= limit:
                return text
        del remaining[len(remaining) // 2]
    return ""


def _in_prose(steps: Sequence[_Step], detail: int) -> str:
    texts = []
    for number, step in enumerate(steps, 1):
        calls = [f"apis.{call.name}({_args(call, detail)}){_result(call)}" for call in step.calls]
        if len(calls) > 1:
            text = f"for each: {', '.join(calls)}"
        elif step.loop:
            paged = "page_index" in step.calls[0].args
            text = f"{calls[0]} {'page by page' if paged else 'in a loop'}"
        else:
            text = calls[0]
        texts.append(f"{number}. {text}")
    return "; ".join(texts)


def _in_short(steps: Sequence[_Step], detail: int) -> str:
    texts = []
    for step in steps:
        calls = " ".join(f"{call.name}({_args(call, detail)})" for call in step.calls)
        texts.append(f"loop {calls}" if step.loop else calls)
    return "; ".join(texts)


def _args(call: _Call, detail: int) -> str:
    """The argument names. Detail 2: all; 1: without the access token and paging arguments; 0: none."""
    names = [name for name in call.args if detail == 2 or name not in ("access_token", *_PAGES)]
    return ", ".join(names) if detail else ""


def _result(call: _Call) -> str:
    result = _RESULTS.get(call.name) or _RESULTS.get(call.api)
    return f" -> {result}" if result else ""


def _success(calls: Sequence[_Call], steps: Sequence[_Step], infos: Sequence[Mapping[str, Any]], success: bool) -> str:
    apps = dict.fromkeys(call.app for step in steps for call in step.calls if call.app != "supervisor")
    used = f" with {', '.join(apps)}" if apps else ""
    if not success:
        worked = list(dict.fromkeys(call.name for call in calls if call.ok and call.app != _DOCS))
        listed = f"These calls worked: {', '.join(worked[:4])}." if worked else ""
        return _fit([f"Not solved{used}.", listed], MAX_SUCCESS_CHARS)
    sentences = [f"Solved{used} in {len(infos)} {'turn' if len(infos) == 1 else 'turns'}."]
    if any("page_index" in call.args for step in steps if step.loop for call in step.calls):
        sentences.append("Reading all pages was right.")
    completing = [call for call in calls if call.name == _COMPLETE and call.ok]
    if completing:
        answered = "answer" in completing[-1].args
        sentences.append("The task wanted an answer." if answered else "The task wanted no answer.")
    return _fit(sentences, MAX_SUCCESS_CHARS)


def _mistakes(calls: Sequence[_Call], infos: Sequence[Mapping[str, Any]], success: bool) -> str:
    sentences = [] if success else [_ending(calls, infos)]
    failed: dict[str, None] = {}
    for place, call in enumerate(calls):
        if not call.ok:
            failed.setdefault(_failure(call, calls[place + 1 :]))
    sentences += list(failed)[:MAX_MISTAKES]
    reported = {call.turn for call in calls if not call.ok}
    others = [
        str(info["error"])
        for turn, info in enumerate(infos)
        if info.get("error") and turn not in reported and info.get("code") is not None
    ]
    for kind, count in Counter(_kind(error) for error in others).items():
        sentences.append(f"{count} {'turn' if count == 1 else 'turns'} failed with {kind}.")
    codeless = sum(info.get("code", "") is None for info in infos)
    if codeless:
        sentences.append(f"{codeless} {'answer' if codeless == 1 else 'answers'} held no code to run.")
    return _fit(sentences, MAX_MISTAKE_CHARS)


def _ending(calls: Sequence[_Call], infos: Sequence[Mapping[str, Any]]) -> str:
    """How an unsuccessful episode ended."""
    if not any(info.get("completed") for info in infos):
        return "complete_task was never called, so the task stayed unfinished."
    failures, passes = (infos[-1].get(name) or () for name in ("failures", "passes"))
    if not failures:
        return "The task was called complete when it was not."
    text = f"{len(failures)} of {len(failures) + len(passes)} checks failed after the task was called complete"
    if any("answer" in str(failure).lower() for failure in failures):
        completing = [call for call in calls if call.name == _COMPLETE and call.ok]
        given = bool(completing) and "answer" in completing[-1].args
        text += "; the answer was wrong" if given else "; no answer was given"
    return f"{text}."


def _failure(call: _Call, later: Sequence[_Call]) -> str:
    """A failed call, the kind of error, and whether a later call succeeded. Names only arguments that worked."""
    text = f"apis.{call.name} failed ({_kind(call.error)})"
    again = next((other for other in later if other.ok and other.name == call.name), None)
    if again is None:
        return f"{text} and never worked."
    if again.args == call.args:
        return f"{text}; it worked with other values."
    return f"{text}; it worked with ({', '.join(again.args)})."


def _kind(error: str) -> str:
    """Classify an error message. The result is a phrase of this module or a known exception name, never other text."""
    if re.match(r"\W*time(d )?out", error, re.IGNORECASE):
        return _TIMEOUT
    if "No API named" in error or "No app named" in error:
        return _UNKNOWN
    if status := re.search(r"\b(?:status code is|status|HTTP)\s*:?\s*([45]\d\d)\b|^\s*([45]\d\d)\b", error):
        return _STATUS.get(status[1] or status[2], "refused")
    name = re.match(r"\s*(?:\w+\.)*(\w+)", error)
    return name[1] if name and name[1] in _ERROR_NAMES else "an error"


def _fit(sentences: Sequence[str], limit: int) -> str:
    """Join the sentences in order, skipping those that would exceed the limit."""
    text = ""
    for sentence in sentences:
        longer = f"{text} {sentence}".strip()
        if len(longer) <= limit:
            text = longer
    return text
