"""States in which nothing is learnt: each is found once, with its count and the settings that cure it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from toy_env import Toy
from toy_run import MakeRun, go

from skillsd.config import RunConfig
from skillsd.config.keys import keys
from skillsd.methods import METHODS
from skillsd.rollouts.collect import Collected
from skillsd.training.health import STREAK, Finding, health, never_revisited, symptoms
from skillsd.training.metrics import describe_rollouts
from skillsd.training.rollouts import Rollouts, TeacherContext
from skillsd.types import Group, Outcome, Skill, Task, Trajectory

TASK = Task("t", "toy", "train")
HEALTHY = {
    "rollout/dropped_groups": 0,
    "rollout/reward": 0.4,
    "outcome/solved": 0.25,
    "outcome/failed": 0.5,
    "outcome/truncated_tokens": 0.25,
    "batch/zero_advantage_groups": 0.5,
    "batch/groups_with_teacher": 0.75,
    "batch/groups_with_context": 0.75,
    "batch/skills_over_budget": 0.0,
    "batch/imitated": 0.5,
    "step/applied": 2.0,
    "step/refused": 0.0,
    "skills/skills": 40,
    "skills/picks": 8,
    "summaries/submitted": 64,
    "summaries/added": 40,
    "summaries/duplicate": 20,
    "summaries/no_skill": 4,
    "summaries/pending": 0,
}


def config_of(method: str = "skill-sd", iterations: int = 6, **sections: Any) -> RunConfig:
    sections.setdefault("teacher", {"model": "m"} if METHODS[method].teacher == "external" else {})
    settings = {"name": "x", "method": method, "training": {"iterations": iterations}, **sections}
    return RunConfig.model_validate(settings)


def records(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    """One record per argument, healthy but for its changes; None removes a metric."""
    made = []
    for number, change in enumerate(changes, 1):
        record = {**HEALTHY, "iteration": number, **change}
        made.append({name: value for name, value in record.items() if value is not None})
    return made


def found(changes: list[dict[str, Any]], **settings: Any) -> dict[str, Finding]:
    findings = health(records(*changes), config_of(**settings))
    assert len({finding.name for finding in findings}) == len(findings)
    return {finding.name: finding for finding in findings}


EQUAL = {"batch/zero_advantage_groups": 1.0}
OUT = {"outcome/truncated_tokens": 1.0, "outcome/failed": 0.0, "outcome/solved": 0.0, **EQUAL}
REFUSED = {"step/applied": 0.0, "step/refused": 2.0}
DROPPED = {
    "rollout/dropped_groups": 16, "outcome/truncated_tokens": 0.0, "outcome/failed": 0.0, "outcome/solved": 0.0,
    "batch/groups_with_context": 0.0, "step/applied": 0.0,
}  # fmt: skip
SILENT = {"batch/groups_with_teacher": 0.0, "batch/groups_with_context": 0.0, "skills/picks": 0}
LONG = {**SILENT, "batch/skills_over_budget": 0.5}
MALFORMED = {
    **SILENT, "skills/skills": 0, "summaries/added": 0, "summaries/duplicate": 0, "summaries/no_skill": 0,
    "summaries/rejected_malformed": 64,
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_healthy_run_has_no_findings(method: str) -> None:
    for iterations in (1, 2, 6, 9):
        assert found([{}] * iterations, method=method) == {}
    assert symptoms(records({})[0]) == []
    assert health([], config_of()) == []


@pytest.mark.parametrize("method", METHODS)
def test_unknown_metrics_are_no_findings(method: str) -> None:
    """Of a run by a version without some of the metrics."""
    bare = [{"iteration": n, "episodes": 128.0 * n, "loss/ratio": None} for n in range(1, 7)]
    names = {finding.name for finding in health(bare, config_of(method))}
    assert names <= {"no_imitation"}


@pytest.mark.parametrize(
    ("name", "state", "settings", "expected"),
    [
        ("equal_rewards", {**EQUAL, "rollout/reward": 0.0}, {}, ["6 of 6 iterations", "easier", "rollout.group_size"]),
        ("equal_rewards", {**EQUAL, "rollout/reward": 1.0}, {}, ["harder"]),
        ("equal_rewards", EQUAL, {"method": "grpo"}, ["rollout.temperature"]),
        ("out_of_tokens", OUT, {"rollout": {"trajectory_tokens": 77}}, ["6 of 6", "rollout.trajectory_tokens (77)"]),
        ("no_update", REFUSED, {}, ["12 of 12 steps", "training.learning_rate", "not-finite/"]),
        ("all_dropped", DROPPED, {}, ["6 of 6 iterations", "rollout.step_seconds"]),
        ("no_skills", MALFORMED, {}, ["none of 64", "rejected_malformed 64", "plain GRPO", "skillsd.Skill"]),
        ("no_skills", MALFORMED, {"method": "opd"}, ["nothing is learnt"]),
        ("skills_too_long", LONG, {}, ["every skill", "plain GRPO", "skills.teacher_extra_tokens (512)"]),
        ("skills_too_long", LONG, {"method": "opsd"}, ["every reference solution", "nothing is learnt"]),
        ("no_teacher", SILENT, {}, ["no group had a teacher in 6 iterations", "plain GRPO", "curriculum.tasks",
                                    "skills.hindsight", "training.iterations"]),
        ("no_teacher", SILENT, {"method": "opd"}, ["nothing is learnt"]),
        ("no_teacher", SILENT, {"method": "skill-grpo"}, ["no skill was in the student's prompt", "plain GRPO"]),
        ("no_teacher", SILENT, {"teacher": {"max_group_reward": 0.0}}, ["teacher.max_group_reward (0.0)"]),
        ("no_teacher", {**SILENT, "skills/skills": 0, "summaries/submitted": 0, "summaries/added": 0},
         {"skills": {"sources": "successes"}}, ["skills.sources is 'successes'"]),
        ("no_imitation", {"batch/imitated": None}, {"method": "grpo-imitation"}, ["6 iterations", "easier"]),
    ],
)  # fmt: skip
def test_a_run_in_a_state_from_end_to_end(
    name: str, state: dict[str, Any], settings: dict[str, Any], expected: list[str]
) -> None:
    findings = found([state] * 6, **settings)
    assert list(findings) == [name]
    for part in expected:
        assert part in str(findings[name])
    assert "\n" not in str(findings[name])


@pytest.mark.parametrize(("name", "state"), [("equal_rewards", EQUAL), ("out_of_tokens", OUT), ("no_update", REFUSED)])
def test_a_state_is_found_after_a_streak_and_counted(name: str, state: dict[str, Any]) -> None:
    assert found([state] * (STREAK - 1), iterations=48) == {}
    assert found([{}, state, {}, state, state, {}], iterations=48) == {}
    assert list(found([state] * STREAK, iterations=48)) == [name]
    findings = found([{}, state, {}, state, state, state, {}], iterations=48)
    assert "in 4 of 7 iterations" in findings[name].text
    assert list(found([state] * 2, iterations=2)) == [name]  # a run that is shorter than a streak
    assert found([{}, state], iterations=2) == {}


@pytest.mark.parametrize(
    ("gaps", "lost"),
    [
        ([0.8, 0.5, 0.19], True),  # below a quarter of the highest
        ([0.8, 0.5, 0.21], False),
        ([0.5, 0.1, 0.4], False),  # it came back
        ([0.15, 0.0], False),  # it was never shown to read
        ([0.3, 0.4, -0.1], True),
        ([], False),
    ],
)
def test_a_teacher_that_stopped_reading_is_found(gaps: list[float], lost: bool) -> None:
    measured = {10 * (place + 1): {"reading/gap": gap} for place, gap in enumerate(gaps)}
    findings = found([measured.get(number, {}) for number in range(1, 41)], iterations=48)
    assert ("reading_lost" in findings) is lost
    if lost:
        text = str(findings["reading_lost"])
        assert f"in iteration {10 * len(gaps)}" in text
        assert f"{100 * max(gaps):.0f} points" in text
        for key in ("reading.share", "teacher.ema", "skill-sd-frozen", "teacher.min_reading"):
            assert key in text


def test_without_a_reward_term_equal_rewards_do_not_matter() -> None:
    assert found([EQUAL] * 6, method="opd") == {}
    assert found([EQUAL] * 6, objective={"reward_weight": 0}) == {}


def test_running_out_of_tokens_is_not_counted_as_equal_rewards_again() -> None:
    findings = found([OUT] * 4 + [EQUAL] * 3, iterations=48)
    assert "in 4 of 7" in findings["out_of_tokens"].text
    assert "in 3 of 7" in findings["equal_rewards"].text


def test_dropped_iterations_do_not_hide_that_no_teacher_spoke() -> None:
    assert list(found([DROPPED, SILENT, SILENT], iterations=3)) == ["no_teacher"]


def test_refused_summaries_are_found_after_the_first_iteration_and_empty_ones_after_the_last() -> None:
    first = {**MALFORMED, "summaries/submitted": 64}
    assert list(found([first], iterations=48)) == ["no_skills"]
    nothing = {**MALFORMED, "summaries/rejected_malformed": None, "summaries/no_skill": 64}
    assert found([nothing], iterations=48) == {}
    assert "skills.sources" in found([nothing], iterations=1)["no_skills"].cure
    assert found([{**first, "summaries/pending": 3}], iterations=48) == {}  # they may still come
    assert found([first, {"summaries/rejected_malformed": 64}], iterations=48) == {}


@pytest.mark.parametrize(
    ("reason", "cure"),
    [
        ("rejected_too_long", "skills.max_chars"),
        ("rejected_leaks_answer", "summariser.prompt"),
        ("rejected_copies_trajectory", "summariser.prompt"),
        ("rejected_empty", "summariser.prompt"),
        ("failed", "notes"),
        ("failed_no_room", "notes"),
        ("failed_http_401", "summariser.api_key_env"),
        ("timeout", "skills.timeout_seconds"),
        ("skipped_budget", "summariser.budget_calls"),
    ],
)
def test_the_most_frequent_reason_is_cured(reason: str, cure: str) -> None:
    state = {**MALFORMED, "summaries/rejected_malformed": 3, f"summaries/{reason}": 61}
    finding = found([state])["no_skills"]
    assert f"{reason} 61" in finding.text
    assert "rejected_malformed 3" in finding.text
    assert cure in finding.cure


def test_every_key_in_a_cure_exists() -> None:
    known = {key.path for key in keys(RunConfig)}
    states = [EQUAL, {**EQUAL, "rollout/reward": 0.0}, OUT, REFUSED, DROPPED, SILENT, LONG, {"batch/imitated": None}]
    reasons = ["malformed", "too_long", "leaks_answer", "empty"]
    states += [{**MALFORMED, "summaries/rejected_malformed": 0, f"summaries/rejected_{r}": 64} for r in reasons]
    others = ["failed", "failed_http_500", "timeout", "skipped_budget", "no_skill"]
    states += [{**MALFORMED, "summaries/rejected_malformed": 0, f"summaries/{r}": 64} for r in others]
    seen = set()
    for state in states:
        for method in METHODS:
            for finding in found([state] * 6, method=method).values():
                for word in str(finding).replace("(", " ").replace(")", " ").replace(",", " ").split():
                    word = word.partition("=")[0].rstrip(".;:")
                    section, dot, key = word.partition(".")
                    if dot and key and section in RunConfig.model_fields:
                        assert word in known, word
                        seen.add(word)
    assert len(seen) > 15


# -- before the start -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "tasks", "warned"),
    [
        ({"iterations": 4}, 96, True),  # 4 x 16 = 64
        ({"iterations": 6}, 96, True),  # each task once
        ({"iterations": 7}, 96, False),
        ({"iterations": 4}, 63, False),
        ({"iterations": 4, "skills": {"hindsight": True}}, 96, False),
        ({"iterations": 4, "curriculum": {"easy_first": True}}, 96, False),
        ({"iterations": 4, "method": "grpo"}, 96, False),
        ({"iterations": 4, "method": "opsd"}, 96, False),
        ({"iterations": 4, "method": "skill-grpo"}, 96, True),
        ({"iterations": 0}, 96, False),
    ],
)
def test_a_run_in_which_no_task_comes_twice_is_known_before_it_starts(
    settings: dict[str, Any], tasks: int, warned: bool
) -> None:
    finding = never_revisited(config_of(**settings), tasks)
    assert (finding is not None) == warned
    if finding:
        assert f"{settings['iterations']} iterations of 16 of {tasks} tasks" in finding.text
        assert "skills.hindsight" in finding.cure


# -- the progress line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (EQUAL, ["equal rewards"]),
        (OUT, ["out of tokens"]),
        (REFUSED, ["no update"]),
        (DROPPED, ["all groups dropped"]),
        (SILENT, ["no skill yet"]),
        (LONG, ["skills too long"]),
        ({**SILENT, "batch/groups_with_context": None}, []),  # a method without skills
    ],
)
def test_symptoms_of_an_iteration(state: dict[str, Any], words: list[str]) -> None:
    assert symptoms(records(state)[0]) == words


# -- metrics --------------------------------------------------------------------------------------------------------


def test_entropy_and_deviation_within_groups() -> None:
    def trajectory(reward: float, *logprobs: float) -> Trajectory:
        tokens = (7, 8, *range(len(logprobs)))
        return Trajectory(
            task=TASK, prompt=(), tokens=tokens, action_mask=(False, False, *[True] * len(logprobs)),
            logprobs=(0.0, 0.0, *logprobs), prompt_length=2, turns=(), outcome=Outcome.FAILED, reward=reward,
            success=False, seed=0,
        )  # fmt: skip

    even = Group(TASK, (trajectory(0.5, -1.0, -2.0), trajectory(0.5, -3.0)))
    spread = Group(TASK, (trajectory(0.0, -4.0), trajectory(1.0)))
    found = describe_rollouts(Rollouts(0, Collected([even, spread]), {}, 2.0))
    assert found["rollout/entropy_estimate"] == pytest.approx((1 + 2 + 3 + 4) / 4)
    assert found["rollout/reward_std_in_groups"] == pytest.approx((0 + 0.5) / 2)  # of the population, as in GRPO
    reading = {TASK.id: TeacherContext(text="x", reading=True)}
    other = Group(Task("other", "toy", "train"), (trajectory(1.0, -5.0),))
    found = describe_rollouts(Rollouts(0, Collected([even, other]), reading, 2.0))
    assert found["rollout/reward"] == 1.0  # of the other group alone
    assert found["reading/kept_up"] == 0.0
    assert found["rollout/sampled_tokens_per_second"] == (3 + 1) / 2  # of all
    nothing = describe_rollouts(Rollouts(0, Collected(), {}, 1.0))
    assert math.isnan(nothing["rollout/entropy_estimate"])
    assert math.isnan(nothing["rollout/reward_std_in_groups"])


# -- in real runs ---------------------------------------------------------------------------------------------------


def named(make_run: MakeRun, toy: Toy | None = None, **sections: Any) -> tuple[list[Finding], list[dict[str, Any]]]:
    run = make_run(toy=toy, **sections)
    listener = go(run)
    return health(listener.iterations, run.config), listener.iterations


def test_a_real_healthy_run(make_run: MakeRun) -> None:
    findings, made = named(make_run)
    assert findings == []
    assert symptoms(made[0]) == ["no skill yet"]
    assert symptoms(made[-1]) == []
    assert made[-1]["batch/groups_with_context"] == 1.0


def test_a_real_run_without_a_second_visit(make_run: MakeRun) -> None:
    findings, made = named(make_run, training={"iterations": 2})
    assert [finding.name for finding in findings] == ["no_teacher"]
    assert [record["batch/groups_with_context"] for record in made] == [0, 0]


def test_a_real_run_with_skills_that_are_too_long(make_run: MakeRun) -> None:
    findings, made = named(make_run, skills={"teacher_extra_tokens": 1})
    assert [finding.name for finding in findings] == ["skills_too_long"]
    assert "skills too long" in symptoms(made[-1])


@pytest.mark.parametrize("wrong", ["a text", None, Skill("", "", "")])
def test_a_real_run_whose_skills_are_all_refused(make_run: MakeRun, wrong: Any) -> None:
    toy = Toy()
    toy.write = lambda trajectory: wrong
    findings, _ = named(make_run, toy)
    assert [finding.name for finding in findings] == ["no_skills"]
    assert "none of 72 summaries" in findings[0].text


def test_a_real_run_whose_summariser_raises(make_run: MakeRun) -> None:
    def fail(trajectory: Trajectory) -> Skill:
        raise KeyError("x")

    toy = Toy()
    toy.write = fail
    [finding] = named(make_run, toy)[0]
    assert "failed 72" in finding.text


def test_a_real_run_in_which_every_episode_runs_out_of_tokens(make_run: MakeRun) -> None:
    # The prompt has 3 tokens; after a turn of two there is no room for the observation and another.
    rollout = {"turn_tokens": 1, "trajectory_tokens": 4}
    toy = Toy()

    def never_done(call: str, environment: Any) -> None:
        if call == "step":
            environment.task.payload.update(target="none", loses="none")

    toy.faults = never_done
    findings, made = named(make_run, toy, rollout=rollout, method="grpo")
    assert made[0]["outcome/truncated_tokens"] == 1
    assert [finding.name for finding in findings] == ["out_of_tokens"]


def test_a_real_run_of_skill_grpo_has_skills_in_the_students_prompt(make_run: MakeRun) -> None:
    findings, made = named(make_run, method="skill-grpo")
    assert findings == []
    assert [record["batch/groups_with_teacher"] for record in made] == [0.0] * 6
    assert made[-1]["batch/groups_with_context"] == 1.0


def test_grpo_has_no_metric_about_contexts(make_run: MakeRun) -> None:
    findings, made = named(make_run, method="grpo")
    assert findings == []
    assert all("batch/groups_with_context" not in record for record in made)


def test_a_real_run_that_imitates_nothing(make_run: MakeRun) -> None:
    toy = Toy()

    def hopeless(call: str, environment: Any) -> None:
        if call == "step":
            environment.task.payload.update(target="none")

    toy.faults = hopeless
    findings, _ = named(make_run, toy, method="grpo-imitation", training={"iterations": 2})
    assert "no_imitation" in [finding.name for finding in findings]
