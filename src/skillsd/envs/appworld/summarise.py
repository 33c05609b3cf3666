"""The rule-based summariser: what a finished episode teaches, from the environment's account of its turns alone.

It never reads what was written or printed. A skill holds names of apps, APIs and arguments and words of this module,
so passwords, tokens, addresses, ids and the answer cannot get into one; neither can the hidden checks' texts, of which
only the number is told. It knows no better way than the one that was taken: what the skill says, the student has found
out itself.

What it reads of a turn's ``info``: ``code`` (None if there was none), ``calls`` (each with ``app``, ``api``, ``args``,
``ok``, ``error`` and, if known, ``changes``), ``error``, ``completed``; of the last one also ``passes``, ``failures``.
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

MOST_SUCCESS_CHARS = 180
MOST_MISTAKE_CHARS = 440
MOST_WORKFLOW_CHARS = 570
MOST_SHORT_CHARS = 290
"""The longest fields, so that a skill stays below 1,200 characters, and a short one below 300."""

MOST_MISTAKES = 4
"""Failed calls that are told of, the first ones: what comes later is often their consequence."""

LONGEST_NAME = 60
"""A call whose name is longer is not told: no API is called so."""

_DOCS = "api_docs"
_COMPLETE = "supervisor.complete_task"
_READING = ("show_", "search_", "login")
_GIVES = {"supervisor.show_account_passwords": "password", "login": "access_token"}
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
    """A step of a workflow: calls that are made together, again and again where `loop` is set."""

    calls: tuple[_Call, ...]
    loop: bool


def summariser(style: Style) -> Callable[[Trajectory], Skill | None]:
    """The summariser in one of two wordings: ``react`` in full, ``short`` a success's workflow and nothing else."""

    def summarise(trajectory: Trajectory) -> Skill | None:
        if not trajectory.outcome.has_reward:
            return None  # cut off by the infrastructure: what was left undone is not the student's mistake
        return summarise_turns([turn.info for turn in trajectory.turns], trajectory.success, style)

    return summarise


def summarise_turns(infos: Sequence[Mapping[str, Any]], success: bool, style: Style) -> Skill | None:
    """The skill of an episode with these turns; None if no API was called, or nothing useful can be said.

    Of a failure, nothing is said in the style ``short``.
    """
    calls = list(_calls(infos))
    if not calls:
        return None
    steps = _steps(calls, success)
    if style == "short":
        # It has no words for what went wrong, and a failure's calls, told as a workflow, would say never to finish.
        skill = Skill("", "", _workflow(steps, MOST_SHORT_CHARS, _in_short) if success else "")
    else:
        # One that failed is told as far as it looked around: what it changed may be what was wrong.
        plan = _workflow(steps, MOST_WORKFLOW_CHARS - len(_START), _in_words)
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
    return text.isidentifier() and text.isascii() and len(text) <= LONGEST_NAME


def _steps(calls: Sequence[_Call], success: bool) -> list[_Step]:
    """The successful calls as steps: every API once, where it was first called; the end at the end.

    An episode finds its way by trying: the same API is called to look, and again to work. Looking into the
    documentation is left out, since the steps say what was found there.
    """
    useful = [call for call in calls if call.ok and call.app != _DOCS and (success or call.reads)]
    by_name: dict[str, list[_Call]] = {}
    for call in useful:
        by_name.setdefault(call.name, []).append(call)
    end = by_name.pop(_COMPLETE, [])
    steps: list[_Step] = []
    for made in by_name.values():
        in_turn = Counter(call.turn for call in made)
        loop = max(in_turn.values()) > 1 or (len(made) > 1 and not made[0].reads)
        step = _Step((_merged(made),), loop)
        if loop and steps and steps[-1].loop and _interleaved(by_name[steps[-1].calls[-1].name], made, useful):
            steps[-1] = _Step((*steps[-1].calls, *step.calls), True)
        else:
            steps.append(step)
    return [*steps, *([_Step((end[-1],), False)] if end else [])]


def _merged(made: Sequence[_Call]) -> _Call:
    """One call for many: with the arguments of the turn that came last, by when it was known how to call it."""
    last = [call for call in made if call.turn == made[-1].turn]
    args = dict.fromkeys(name for call in last for name in call.args)
    return replace(made[0], args=tuple(args))


def _interleaved(first: Sequence[_Call], second: Sequence[_Call], order: Sequence[_Call]) -> bool:
    """Whether the two were called by turns within one turn's code, as in the body of a loop."""
    for turn in {call.turn for call in first} & {call.turn for call in second}:
        names = [call.name for call in order if call.turn == turn]
        last_of_first = len(names) - 1 - names[::-1].index(first[0].name)
        if names.index(second[0].name) < last_of_first:
            return True
    return False


def _workflow(steps: Sequence[_Step], limit: int, word: Callable[[Sequence[_Step], int], str]) -> str:
    """The steps in words, with ever less detail until they fit; then without steps in the middle."""
    kept = list(steps)
    while kept:
        for detail in (2, 1, 0):
            text = word(kept, detail)
            if len(text) <= limit:
                return text
        del kept[len(kept) // 2]
    return ""


def _in_words(steps: Sequence[_Step], detail: int) -> str:
    texts = []
    for number, step in enumerate(steps, 1):
        said = [f"apis.{call.name}({_args(call, detail)}){_gives(call)}" for call in step.calls]
        if len(said) > 1:
            text = f"for each: {', '.join(said)}"
        elif step.loop:
            paged = "page_index" in step.calls[0].args
            text = f"{said[0]} {'page by page' if paged else 'in a loop'}"
        else:
            text = said[0]
        texts.append(f"{number}. {text}")
    return "; ".join(texts)


def _in_short(steps: Sequence[_Step], detail: int) -> str:
    texts = []
    for step in steps:
        said = " ".join(f"{call.name}({_args(call, detail)})" for call in step.calls)
        texts.append(f"loop {said}" if step.loop else said)
    return "; ".join(texts)


def _args(call: _Call, detail: int) -> str:
    """The names of the arguments: all, without those that go without saying, or none."""
    names = [name for name in call.args if detail == 2 or name not in ("access_token", *_PAGES)]
    return ", ".join(names) if detail else ""


def _gives(call: _Call) -> str:
    gives = _GIVES.get(call.name) or _GIVES.get(call.api)
    return f" -> {gives}" if gives else ""


def _success(calls: Sequence[_Call], steps: Sequence[_Step], infos: Sequence[Mapping[str, Any]], success: bool) -> str:
    apps = dict.fromkeys(call.app for step in steps for call in step.calls if call.app != "supervisor")
    used = f" with {', '.join(apps)}" if apps else ""
    if not success:
        worked = list(dict.fromkeys(call.name for call in calls if call.ok and call.app != _DOCS))
        listed = f"These calls worked: {', '.join(worked[:4])}." if worked else ""
        return _fit([f"Not solved{used}.", listed], MOST_SUCCESS_CHARS)
    said = [f"Solved{used} in {len(infos)} {'turn' if len(infos) == 1 else 'turns'}."]
    if any("page_index" in call.args for step in steps if step.loop for call in step.calls):
        said.append("Reading all pages was right.")
    ends = [call for call in calls if call.name == _COMPLETE and call.ok]
    if ends:
        said.append("The task wanted an answer." if "answer" in ends[-1].args else "The task wanted no answer.")
    return _fit(said, MOST_SUCCESS_CHARS)


def _mistakes(calls: Sequence[_Call], infos: Sequence[Mapping[str, Any]], success: bool) -> str:
    told = [] if success else [_ending(calls, infos)]
    failed: dict[str, None] = {}
    for place, call in enumerate(calls):
        if not call.ok:
            failed.setdefault(_failure(call, calls[place + 1 :]))
    told += list(failed)[:MOST_MISTAKES]
    blamed = {call.turn for call in calls if not call.ok}
    others = [
        str(info["error"])
        for turn, info in enumerate(infos)
        if info.get("error") and turn not in blamed and info.get("code") is not None
    ]
    for kind, count in Counter(_kind(error) for error in others).items():
        told.append(f"{count} {'turn' if count == 1 else 'turns'} failed with {kind}.")
    mute = sum(info.get("code", "") is None for info in infos)
    if mute:
        told.append(f"{mute} {'answer' if mute == 1 else 'answers'} held no code to run.")
    return _fit(told, MOST_MISTAKE_CHARS)


def _ending(calls: Sequence[_Call], infos: Sequence[Mapping[str, Any]]) -> str:
    """How the episode missed its aim."""
    if not any(info.get("completed") for info in infos):
        return "complete_task was never called, so the task stayed unfinished."
    failures, passes = (infos[-1].get(name) or () for name in ("failures", "passes"))
    if not failures:
        return "The task was called complete when it was not."
    text = f"{len(failures)} of {len(failures) + len(passes)} checks failed after the task was called complete"
    if any("answer" in str(failure).lower() for failure in failures):
        ends = [call for call in calls if call.name == _COMPLETE and call.ok]
        given = bool(ends) and "answer" in ends[-1].args
        text += "; the answer was wrong" if given else "; no answer was given"
    return f"{text}."


def _failure(call: _Call, later: Sequence[_Call]) -> str:
    """A failed call, what was the matter, and how it was got over. Arguments are named only where they worked."""
    text = f"apis.{call.name} failed ({_kind(call.error)})"
    again = next((other for other in later if other.ok and other.name == call.name), None)
    if again is None:
        return f"{text} and never worked."
    if again.args == call.args:
        return f"{text}; it worked with other values."
    return f"{text}; it worked with ({', '.join(again.args)})."


def _kind(error: str) -> str:
    """What kind of error a text tells of, in words that come from here and not from the text."""
    if re.match(r"\W*time(d )?out", error, re.IGNORECASE):
        return _TIMEOUT
    if "No API named" in error or "No app named" in error:
        return _UNKNOWN
    if status := re.search(r"\b(?:status code is|status|HTTP)\s*:?\s*([45]\d\d)\b|^\s*([45]\d\d)\b", error):
        return _STATUS.get(status[1] or status[2], "refused")
    name = re.match(r"\s*(?:\w+\.)*(\w+)", error)
    return name[1] if name and name[1] in _ERROR_NAMES else "an error"


def _fit(sentences: Sequence[str], limit: int) -> str:
    """As many sentences, in order, as fit."""
    text = ""
    for sentence in sentences:
        longer = f"{text} {sentence}".strip()
        if len(longer) <= limit:
            text = longer
    return text
