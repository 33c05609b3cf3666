"""States of a run in which nothing is learnt, or a part of the method does nothing, found in its metrics.

`health` finds them over a run's records, with their count and the settings that cure them; `symptoms` describes one
iteration for the progress line. Both are pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from skillsd.config import RunConfig
from skillsd.methods import METHODS, Method

Record = Mapping[str, Any]

STREAK = 3
"""So many iterations in a row in the same state are reported; fewer if the whole run was in it."""


@dataclass(frozen=True)
class Finding:
    """A state in which nothing is learnt.

    Attributes:
        name: of the state; a run has at most one finding of each name.
        text: what happened, with its count.
        cure: what to change, with the keys of the settings.
    """

    name: str
    text: str
    cure: str

    def __str__(self) -> str:
        return f"{self.text}. {self.cure}"


def symptoms(record: Record) -> list[str]:
    """The states of one iteration, in a few words each."""
    return [words for words, is_in in _STATES.items() if is_in(record)]


def health(records: Sequence[Record], config: RunConfig) -> list[Finding]:
    """The findings over a run's records, the most basic first.

    Args:
        records: of metrics.jsonl, from the first iteration on. What concerns the run as a whole (such as that no
            group had a teacher) is found once the last iteration of `config` is among them.
    """
    if not records:
        return []
    run = _Run(records, config, METHODS[config.method])
    return [finding for check in _CHECKS if (finding := check(run)) is not None]


def never_revisited(config: RunConfig, tasks: int) -> Finding | None:
    """A finding before the start: the run is too short for any task to come twice, so that no skill will be used.

    Args:
        tasks: number of tasks that the run trains on.
    """
    picked = config.training.iterations * config.rollout.tasks_per_iteration
    row = METHODS[config.method]
    if not row.uses_skills or config.skills.hindsight or config.curriculum.easy_first or not 0 < picked <= tasks:
        return None
    visits = f"{config.training.iterations} iterations of {config.rollout.tasks_per_iteration} of {tasks} tasks"
    return Finding("no_teacher", f"no task will come twice ({visits}), so no skill will be used", _more_visits(config))


# -- states of an iteration -----------------------------------------------------------------------------------------


def _number(record: Record, name: str) -> float:
    """A metric; 0 if it is missing or not finite."""
    value = record.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


def _no_groups(record: Record) -> bool:
    return _number(record, "rollout/dropped_groups") > 0 and not any(
        value for name, value in record.items() if name.startswith("outcome/")
    )


def _out_of_tokens(record: Record) -> bool:
    return _number(record, "outcome/truncated_tokens") == 1


def _equal_rewards(record: Record) -> bool:
    return _number(record, "batch/zero_advantage_groups") == 1


def _no_update(record: Record) -> bool:
    return _number(record, "step/refused") > 0 and _number(record, "step/applied") == 0


def _no_context(record: Record) -> bool:
    """A method with a context (the others lack the metric), none of whose prompts had one."""
    return record.get("batch/groups_with_context") == 0 and not _no_groups(record)


_STATES: dict[str, Callable[[Record], bool]] = {
    "all groups dropped": _no_groups,
    "out of tokens": _out_of_tokens,
    "equal rewards": lambda record: _equal_rewards(record) and not _out_of_tokens(record),
    "no update": _no_update,
    "skills too long": lambda record: _no_context(record) and _number(record, "batch/skills_over_budget") > 0,
    "no skill yet": lambda record: _no_context(record) and _number(record, "batch/skills_over_budget") == 0,
}


# -- over a run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    records: Sequence[Record]
    config: RunConfig
    row: Method

    @property
    def last(self) -> Record:
        return self.records[-1]

    @property
    def is_finished(self) -> bool:
        return _number(self.last, "iteration") >= self.config.training.iterations

    def total(self, name: str) -> float:
        return sum(_number(record, name) for record in self.records)

    @property
    def never_had_context(self) -> bool:
        """Whether no prompt had a context, although the method has one."""
        played = [record for record in self.records if not _no_groups(record)]
        return bool(played) and all(_no_context(record) for record in played)

    def in_state(self, is_in: Callable[[Record], bool]) -> list[Record]:
        """The records in a state, if they are `STREAK` in a row or the whole run; otherwise none."""
        states = [is_in(record) for record in self.records]
        longest = max((len(list(group)) for state, group in groupby(states) if state), default=0)
        if longest >= STREAK or (all(states) and self.is_finished):
            return [record for record, state in zip(self.records, states, strict=True) if state]
        return []

    def count(self, found: Sequence[Record]) -> str:
        return f"in {len(found)} of {len(self.records)} iterations"


def _dropped(run: _Run) -> Finding | None:
    if not (found := run.in_state(_no_groups)):
        return None
    return Finding(
        "all_dropped",
        f"every group was dropped {run.count(found)}: episodes failed in the environment in every attempt",
        "See the notes for its errors; rollout.step_seconds and rollout.retries bound a slow or unreliable environment",
    )


def _tokens(run: _Run) -> Finding | None:
    if not (found := run.in_state(_out_of_tokens)):
        return None
    options = run.config.rollout
    return Finding(
        "out_of_tokens",
        f"every episode ran out of tokens {run.count(found)}",
        f"Raise rollout.trajectory_tokens ({options.trajectory_tokens}), or shorten the turns: rollout.turn_tokens "
        f"({options.turn_tokens}), the environment's observations",
    )


def _rewards(run: _Run) -> Finding | None:
    given = run.config.objective.reward_weight
    if (run.row.reward_weight if given is None else given) == 0:
        return None
    if not (found := run.in_state(_STATES["equal rewards"])):
        return None
    rewards = [_number(record, "rollout/reward") for record in found]
    if max(rewards) == 0:
        cure = (
            "No episode earned a reward: take easier tasks (environment.options, curriculum.easy_first), a stronger "
            "model (skillsd sft), or larger groups (rollout.group_size)"
        )
    elif min(rewards) == 1:
        cure = "Every episode earned the full reward: take harder tasks (environment.options)"
    else:
        cure = "Raise rollout.group_size or rollout.temperature, or let the environment reward partial progress"
    return Finding(
        "equal_rewards", f"the rewards of every group were equal {run.count(found)}: no gradient from the reward", cure
    )


def _updates(run: _Run) -> Finding | None:
    if not (found := run.in_state(_no_update)):
        return None
    refused, applied = run.total("step/refused"), run.total("step/applied")
    steps = f"{refused:.0f} of {refused + applied:.0f} steps"
    return Finding(
        "no_update",
        f"nothing was updated {run.count(found)}: a loss or gradient was not finite ({steps})",
        "Lower training.learning_rate, or set objective.distil_clamp; the minibatches are in not-finite/",
    )


def _summaries(run: _Run) -> Finding | None:
    """No trajectory gave a skill. A refusal is reported at once; trajectories without a lesson, after the whole run."""
    if not run.row.uses_skills:
        return None
    counts = summary_counts(run.last)
    written = counts.pop("added") + counts.pop("duplicate")
    submitted = counts.pop("submitted")
    if written or not submitted or _number(run.last, "summaries/pending"):
        return None
    refused = {name: count for name, count in counts.items() if name != "no_skill"}
    if not refused and not run.is_finished:
        return None
    reason = max(refused, key=lambda name: refused[name]) if refused else "no_skill"
    listed = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    return Finding(
        "no_skills",
        f"none of {submitted} summaries gave a skill ({listed}): without skills {_without(run.row)}",
        next(cure for beginning, cure in _SUMMARY_CURES if reason.startswith(beginning)),
    )


_SUMMARY_CURES = (
    ("no_skill", "The summariser found nothing to write down: see skills.sources and skills.summariser"),
    (
        "rejected_malformed",
        "The summariser has to return a skillsd.Skill of three strings; a language model, the JSON object that its "
        "prompt asks for (summariser.prompt, summariser.model)",
    ),
    ("rejected_too_long", "Raise skills.max_chars, or summariser.max_output_tokens if its answers are cut"),
    ("rejected_leaks_answer", "Tell the summariser to leave the answer out (summariser.prompt)"),
    ("rejected", "Change summariser.prompt or summariser.model (docs/summarisers.md)"),
    ("timeout", "Raise skills.timeout_seconds, or lower skills.concurrency"),
    ("failed_http", "Check summariser.base_url, summariser.api_key_env and summariser.model"),
    ("skipped_budget", "Raise summariser.budget_calls or summariser.budget_tokens"),
    ("", "See the notes for the first error of the summariser (skills.summariser)"),
)
"""Beginning of a reason -> what to change. The first that fits counts."""


def _too_long(run: _Run) -> Finding | None:
    if not run.never_had_context or not run.total("batch/skills_over_budget"):
        return None
    found = run.in_state(_STATES["skills too long"])
    if not found and not run.is_finished:
        return None
    what = "reference solution" if run.row.context == "oracle" else "skill"
    return Finding(
        "skills_too_long",
        f"every {what} was too long for the prompt: without one {_without(run.row)}",
        f"Raise skills.teacher_extra_tokens ({run.config.skills.teacher_extra_tokens}) or write less (skills.template, "
        "summariser.prompt); prompt and trajectory must fit the model's length (rollout.trajectory_tokens)",
    )


def _teacher(run: _Run) -> Finding | None:
    """No prompt had a context in the whole run, although skills were written and short enough."""
    if not run.is_finished or not run.never_had_context:
        return None
    if _summaries(run) or _too_long(run):
        return None
    who = "no group had a teacher" if run.row.teacher != "none" else "no skill was in the student's prompt"
    text = f"{who} in {len(run.records)} iterations, so {_without(run.row)}"
    limit = run.config.teacher.max_group_reward
    if run.row.context == "oracle" or (limit is not None and _number(run.last, "skills/skills")):
        return Finding("no_teacher", text, f"Raise teacher.max_group_reward ({limit}), or leave it out")
    if not _number(run.last, "summaries/submitted"):
        cure = f"No trajectory was summarised: skills.sources is {run.config.skills.sources!r}; set it to all"
        return Finding("no_teacher", text, cure)
    return Finding("no_teacher", f"{text}: no task with a skill came again", _more_visits(run.config))


MIN_READING = 0.2
"""Below this, a measurement of few episodes does not show that the teacher ever read."""
READING_LOST = 0.25
"""A teacher whose reading fell below this share of the highest measured has stopped reading."""


def _reading(run: _Run) -> Finding | None:
    measured = [
        (r["iteration"], r["reading/gap"]) for r in run.records if isinstance(r.get("reading/gap"), int | float)
    ]
    if not measured:
        return None
    (best_at, best), (last_at, last) = max(measured, key=lambda pair: pair[1]), measured[-1]
    if best < MIN_READING or last >= READING_LOST * best:
        return None
    return Finding(
        "reading_lost",
        f"the teacher has stopped reading its skill: told a right one instead of a wrong one, its success rose by "
        f"{100 * best:.0f} points in iteration {best_at}, and by {100 * last:.0f} in iteration {last_at}",
        "Keep it up with reading.share or reading.replay, let the teacher follow slowly (teacher.ema=0.995) or not at "
        "all (method=skill-sd-frozen), or sync it only while it reads (teacher.min_reading)",
    )


def _imitation(run: _Run) -> Finding | None:
    if not run.row.imitation_weight or not run.is_finished or run.total("batch/imitated"):
        return None
    return Finding(
        "no_imitation",
        f"no success to imitate in {len(run.records)} iterations, so {_without(run.row)}",
        "Take easier tasks (environment.options, curriculum.easy_first) or a stronger model (skillsd sft)",
    )


_CHECKS = (_dropped, _tokens, _rewards, _updates, _summaries, _too_long, _teacher, _reading, _imitation)


def summary_counts(record: Record) -> dict[str, int]:
    """Numbers of summaries so far: ``submitted``, ``added``, ``duplicate``, and those without a skill by reason."""
    counts = {
        name.removeprefix("summaries/"): round(_number(record, name))
        for name in record
        if name.startswith(("summaries/no_skill", "summaries/rejected_", "summaries/failed", "summaries/timeout"))
        or name == "summaries/skipped_budget"
    }
    known = {name: round(_number(record, f"summaries/{name}")) for name in ("submitted", "added", "duplicate")}
    return {**known, **{name: count for name, count in counts.items() if count}}


def _without(row: Method) -> str:
    """What the run amounts to without a context or a success to imitate."""
    return "the run is plain GRPO" if row.reward_weight else "nothing is learnt"


def _more_visits(config: RunConfig) -> str:
    """The cure for tasks that are not visited twice."""
    visits = config.rollout.tasks_per_iteration
    return (
        f"Train longer (training.iterations, {config.training.iterations}) or on fewer tasks (curriculum.tasks; "
        f"{visits} are visited per iteration), or use a group's skills in its own update (skills.hindsight=true)"
    )
