"""The records of an iteration hold what was trained on: the loss computed from them is the one in the metrics."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_env import Toy
from toy_run import Listener, MakeRun, go, without_clocks

from skillsd.engines.base import TokenSequence
from skillsd.metrics import Metrics, PerToken, add_metrics
from skillsd.objective import (
    ACTION_MASK,
    IMITATION_MASK,
    STUDENT_LOGPROBS,
    TOKEN_NUMBER,
    LossTemplate,
    Objective,
    TokenLogprobs,
)
from skillsd.rollouts.groups import RecordedEpisode, RecordedGroup, group_from_json, group_to_json
from skillsd.training.recorded import loss_shares, recorded_objective, signals_of, token_values
from skillsd.training.run import Run, objective_of
from skillsd.training.update import _figures
from skillsd.types import Message, Outcome, Task, Trajectory, Turn

SHORT: dict[str, Any] = {
    "skills": {"hindsight": True},  # a teacher from the first iteration on
    "training": {"iterations": 2, "learning_rate": 2e-2, "minibatches": 2},
    "evaluation": {"every": 0},
}


def settings(**sections: Any) -> dict[str, Any]:
    return {name: {**SHORT.get(name, {}), **sections.get(name, {})} for name in SHORT} | {
        name: section for name, section in sections.items() if name not in SHORT
    }


def written(group: RecordedGroup) -> RecordedGroup:
    """The group after it has been in a file."""
    return group_from_json(json.loads(json.dumps(group_to_json(group))))


def metrics_of(groups: Sequence[RecordedGroup], template: LossTemplate) -> Metrics:
    """The loss of an iteration's minibatches, computed from its records."""
    parts = []
    for minibatch in sorted({group.minibatch for group in groups if group.minibatch is not None}):
        items = []
        for group in (group for group in groups if group.minibatch == minibatch):
            items += [(episode, signals_of(episode)) for episode in group.episodes]
            if group.imitated:
                signals = signals_of(group.imitated)
                items.append(
                    (
                        group.imitated,
                        {**signals, ACTION_MASK: ~signals[ACTION_MASK], IMITATION_MASK: signals[ACTION_MASK]},
                    )
                )
        loss = template.bind(signals for _, signals in items)
        for episode, signals in items:
            assert episode.student_logprobs is not None
            parts.append(loss(TokenLogprobs(torch.tensor(episode.student_logprobs, requires_grad=True)), signals)[1])
    return add_metrics(parts)


def by_iteration(run: Run, listener: Listener) -> list[list[RecordedGroup]]:
    return [
        [group for group in listener.groups if group.iteration == number]
        for number in range(1, run.config.training.iterations + 1)
    ]


LATER: dict[str, Any] = {"skills": {"hindsight": False}, "training": {"iterations": 4}}
"""Skills from the second visit on."""

CASES: dict[str, dict[str, Any]] = {
    "skill-sd": {},
    "k3 over taught tokens": {"objective": {"estimator": "k3", "normaliser": "taught", "lambda_sdl": 0.1}},
    "clamp": {"objective": {"distil_clamp": 0.02, "lambda_sdl": 0.1}},
    "importance cap": {"objective": {"importance_cap": 2.0, "lambda_sdl": 0.1}},
    "some groups have no teacher": LATER,
    "grpo": {"method": "grpo"},
    "skill-grpo": {"method": "skill-grpo", **LATER},
    "opsd": {"method": "opsd", "skills": {}},
    "teacher-rollouts": {"method": "teacher-rollouts", **LATER},
    "grpo-imitation": {"method": "grpo-imitation"},
}


class WithOracle(Toy):
    def oracle(self, task: Task) -> str:
        return f"{task.payload['target']}"


@pytest.mark.parametrize("case", CASES)
def test_the_loss_from_the_records_is_the_loss_in_the_metrics(case: str, make_run: MakeRun) -> None:
    run = make_run(toy=WithOracle(), **settings(**CASES[case]))
    listener = go(run)
    if case == "opsd":
        for group in listener.groups:
            assert (group.context, group.skill_id) == ("oracle", None)
            assert group.context_text == f" Workflow: {group.task.payload['target']}"
    compared: set[str] = set()
    for record, groups in zip(listener.iterations, by_iteration(run, listener), strict=True):
        objective = objective_of(run.config, run.method, (record["iteration"] - 1) / run.config.training.iterations)
        for found, tolerance in ((groups, 2e-6), ([written(group) for group in groups], 4e-4)):
            again = _figures(metrics_of(found, objective.template))
            assert again == pytest.approx({name: record[name] for name in again}, rel=tolerance, abs=tolerance)
            assert {name for name in record if name.startswith("loss/")} == {*again, "loss/lambda_sdl"}
            compared |= again.keys()
    assert {"loss/policy_loss", "loss/ratio", "loss/clip_fraction"} <= compared
    assert ("loss/distil_value" in compared) == (run.method.teacher != "none")
    assert ("loss/imitation_loss" in compared) == (case == "grpo-imitation")
    assert any(record["loss/ratio_max"] > 1.001 for record in listener.iterations)  # a second minibatch is off-policy


def test_values_per_token_and_shares_are_those_of_the_loss(make_run: MakeRun) -> None:
    run = make_run(**settings(training={"iterations": 1}))
    listener = go(run)
    [record], groups = listener.iterations, listener.groups
    objective = recorded_objective(run.config, 1)
    values = [token_values(episode, objective) for group in groups for episode in group.episodes]
    for name in ("policy_loss", "ratio", "clip_fraction", "teacher_log_ratio", "distil_value"):
        column = [value for of_episode in values for value in of_episode[name]]
        assert sum(column) / len(column) == pytest.approx(record[f"loss/{name}"], rel=1e-4, abs=1e-6)
    for minibatch in (0, 1):
        here = [group for group in groups if group.minibatch == minibatch]
        metrics: Any = metrics_of(here, objective.template)
        total = sum(share for group in loss_shares(here, objective) for shares in group for share in shares)
        expected = metrics["policy_loss"].value + 0.1 * metrics["distil_value"].value
        assert total == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_an_exact_divergence_is_recorded_as_it_was_computed(make_run: MakeRun) -> None:
    run = make_run(**settings(objective={"estimator": "reverse_kl", "lambda_sdl": 0.1}, training={"iterations": 1}))
    listener = go(run)
    values = [v for group in listener.groups for episode in group.episodes for v in episode.divergence]
    assert sum(values) / len(values) == pytest.approx(listener.iterations[0]["loss/distil_value"], rel=1e-5)
    shares = loss_shares(listener.groups, recorded_objective(run.config, 1))
    assert all(math.isfinite(share) for group in shares for episode in group for share in episode)


def test_what_is_unknown_has_no_share() -> None:
    run_without = RecordedEpisode(_trajectory(), 1.0, (-1.0,), None)
    group = _group(episodes=(run_without,))
    [[[share]]] = loss_shares([group], Objective())
    assert math.isnan(share)
    assert (run_without.gaps, token_values(run_without, Objective())) == (None, {})


# -- cost -----------------------------------------------------------------------------------------------------------


def counting(calls: list[str], name: str, call: Any) -> Any:
    async def counted(*args: Any, **options: Any) -> Any:
        calls.append(name)
        return await call(*args, **options)

    return counted


def test_records_need_no_further_pass_and_change_nothing(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[str], Listener]] = []
    for every in (1, 0):
        run = make_run(f"every-{every}", **settings(log={"trajectories_every": every, "tensorboard": False}))
        calls: list[str] = []
        for name in ("logprobs", "forward_backward"):
            monkeypatch.setattr(run.learner, name, counting(calls, name, getattr(run.learner, name)))
        seen.append((calls, go(run)))
    (recorded, with_records), (plain, without) = seen
    assert recorded == plain
    assert len(with_records.groups) == 6
    assert without.groups == []
    strip = [{k: v for k, v in r.items() if k != "time/records"} for r in without_clocks(with_records.iterations)]
    assert strip == without_clocks(without.iterations)


def test_only_the_iterations_that_are_written_are_recorded(make_run: MakeRun) -> None:
    options = settings(training={"iterations": 5}, log={"trajectories_every": 2, "tensorboard": False})
    listener = go(make_run(**options))
    assert [number for number, _ in itertools.groupby(g.iteration for g in listener.groups)] == [1, 3, 5]
    assert ["time/records" in record for record in listener.iterations] == [True, False, True, False, True]


def test_any_cut_into_micro_batches_gives_the_same_records(make_run: MakeRun) -> None:
    whole = go(make_run("whole", **settings()))
    cut = go(make_run("cut", **settings(training={"micro_batch_tokens": 30})))
    for one, other in zip(whole.groups, cut.groups, strict=True):
        for a, b in zip(one.episodes, other.episodes, strict=True):
            assert a.student_logprobs == pytest.approx(b.student_logprobs, abs=2e-5)
            assert a.gaps == pytest.approx(b.gaps, abs=4e-5)


def test_per_token_metrics_merge_in_any_order_and_the_loss_keeps_its_value() -> None:
    count = 7
    signals = {name: torch.rand(count) for name in ("old_logprobs", "advantages", "teacher_logprobs")}
    signals |= {name: torch.ones(count, dtype=torch.bool) for name in (ACTION_MASK, "teacher_mask")}
    signals |= {IMITATION_MASK: torch.zeros(count, dtype=torch.bool), TOKEN_NUMBER: torch.arange(10, 10 + count)}
    student = torch.rand(count)
    plain = Objective().template.bind([signals])
    logging = Objective().template.bind([signals], per_token=True)
    assert plain(TokenLogprobs(student), signals)[0] == logging(TokenLogprobs(student), signals)[0]
    assert not any(isinstance(m, PerToken) for m in plain(TokenLogprobs(student), signals)[1].values())
    parts = [
        logging(TokenLogprobs(student[i : i + 2]), {name: signal[i : i + 2] for name, signal in signals.items()})[1]
        for i in (4, 0, 6, 2)
    ]
    merged = add_metrics(parts)[STUDENT_LOGPROBS]
    assert isinstance(merged, PerToken)
    assert dict(zip(merged.tokens, merged.values, strict=True)) == dict(
        zip(range(10, 17), student.tolist(), strict=True)
    )


def test_an_engine_that_loses_a_micro_batchs_metrics_leaves_its_episodes_unknown(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(**settings(training={"iterations": 1, "minibatches": 1}))
    learner: Any = run.learner
    call = learner.forward_backward

    async def lossy(*args: Any, **options: Any) -> Any:
        metrics = await call(*args, **options)
        found = metrics[STUDENT_LOGPROBS]
        return {**metrics, STUDENT_LOGPROBS: PerToken(found.tokens[1:], found.values[1:])}

    monkeypatch.setattr(learner, "forward_backward", lossy)
    known = [episode.student_logprobs is not None for group in go(run).groups for episode in group.episodes]
    assert sorted(known) == [False, *[True] * 11]


# -- the truth about every method -----------------------------------------------------------------------------------


def test_teacher_and_student_logprobs_are_those_of_the_models_before_the_update(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(**settings(training={"iterations": 1, "minibatches": 1}))
    learner: Any = run.learner
    call, scored = learner.logprobs, []

    async def watch(sequences: Sequence[TokenSequence], *args: Any, **options: Any) -> Any:
        found = await call(sequences, *args, **options)
        scored.extend(
            (sequence.tokens, tuple(answer.chosen.tolist())) for sequence, answer in zip(sequences, found, strict=True)
        )
        return found

    monkeypatch.setattr(learner, "logprobs", watch)
    groups = go(run).groups
    assert all(group.taught and group.context == "skill" and group.untaught is None for group in groups)
    expected = iter(scored)
    for group in groups:
        prompt = run.renderer.prompt(group.trajectories[0].prompt, group.context_text)
        assert group.teacher_prompt_length == len(prompt) > group.student_prompt_length
        assert group.teacher_prompt == run.renderer.with_markup(prompt)
        assert group.context_text in group.teacher_prompt
        assert group.student_prompt == run.renderer.with_markup(run.renderer.prompt(group.trajectories[0].prompt))
        [skill] = [skill for skill in run.bank.skills() if skill.id == group.skill_id]
        assert skill.task_id == group.task.id
        for episode in group.episodes:
            tokens, teacher = next(expected)
            assert tokens[: len(prompt)] == prompt
            assert episode.teacher_logprobs == teacher
            assert episode.student_logprobs == pytest.approx(episode.old_logprobs, abs=1e-5)  # the sampler's, on policy
            assert episode.gaps == pytest.approx(
                [q - p for q, p in zip(teacher, episode.student_logprobs, strict=True)]
            )
            for turn in episode.trajectory.turns:
                texts = [group.token_texts[token] for token in episode.trajectory.tokens[turn.start : turn.end]]
                assert [turn.action] == ["".join(texts).strip()] or "\N{REPLACEMENT CHARACTER}" in turn.action


def test_with_several_epochs_the_records_are_of_the_first(make_run: MakeRun) -> None:
    run = make_run(**settings(training={"iterations": 1, "minibatches": 1, "epochs": 2}))
    for episode in (episode for group in go(run).groups for episode in group.episodes):
        assert episode.student_logprobs == pytest.approx(episode.old_logprobs, abs=1e-5)


def test_the_student_sees_the_skill_only_where_it_trains_under_it(make_run: MakeRun) -> None:
    augmented = go(make_run("augmented", **settings(method="skill-grpo", **LATER))).groups
    assert {group.context for group in augmented} == {None, "skill"}
    for group in augmented:
        assert (group.taught, group.teacher_prompt, group.untaught) == (False, None, None)
        assert (group.context == "skill") == (group.skill_id is not None) == bool(group.context_text)
        assert group.context_text is None or group.context_text in group.student_prompt
        for trajectory in group.trajectories:
            assert trajectory.prompt_length == group.student_prompt_length
    sampled = go(make_run("sampled", **settings(method="teacher-rollouts", **LATER))).groups
    with_skill = [group for group in sampled if group.taught]
    assert with_skill
    for group in with_skill:
        assert group.context_text not in group.student_prompt
        assert all(t.prompt_length == group.teacher_prompt_length for t in group.trajectories)


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"skills": {"hindsight": False}}, "there is no skill for this task yet"),
        ({"skills": {"teacher_extra_tokens": 1}}, "the skill has more than 1 tokens (skills.teacher_extra_tokens)"),
        ({"teacher": {"max_group_reward": 0.0}}, "the group's mean reward is above 0 (teacher.max_group_reward)"),
    ],
)
def test_why_there_was_no_teacher(sections: dict[str, Any], reason: str, make_run: MakeRun) -> None:
    [first, *_] = go(make_run(**settings(training={"iterations": 1}, **sections))).groups
    assert (first.taught, first.untaught) == (False, reason)
    assert all(episode.teacher_logprobs is episode.divergence is episode.gaps is None for episode in first.episodes)


def test_the_success_that_is_imitated_is_recorded(make_run: MakeRun) -> None:
    run = make_run(**settings(method="grpo-imitation", training={"iterations": 4}))
    listener = go(run)
    for record, groups in zip(listener.iterations, by_iteration(run, listener), strict=True):
        imitated = [group.imitated for group in groups if group.imitated]
        assert len(imitated) == record.get("batch/imitated", 0) * len(groups)
        assert all(e.trajectory.success and e.student_logprobs and e.advantage == 0 for e in imitated)
    assert any(g.imitated and g.imitated.trajectory not in g.trajectories for g in listener.groups)  # of earlier


def test_a_refused_step_and_values_that_are_not_finite_are_recorded(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(**settings(training={"iterations": 1}))
    learner: Any = run.learner
    call = learner.forward_backward
    calls: list[None] = []

    async def poisoned(batch: Any, loss: Any, **options: Any) -> Any:
        calls.append(None)

        def bad(student: TokenLogprobs, signals: Any) -> Any:
            return loss(TokenLogprobs(student.chosen * math.nan), signals)

        return await call(batch, bad if len(calls) == 1 else loss, **options)

    monkeypatch.setattr(learner, "forward_backward", poisoned)
    groups = [written(group) for group in go(run).groups]
    assert {(group.minibatch, group.applied) for group in groups} == {(0, False), (1, True)}
    for group in groups:
        values = [p for episode in group.episodes for p in episode.student_logprobs or ()]
        assert values
        assert all(math.isnan(p) != group.applied for p in values)


def test_dropped_groups_leave_no_record(make_run: MakeRun) -> None:
    toy = Toy()

    def fault(at: str, environment: Any) -> None:
        if at == "reset" and environment.task.id == "train-3":
            raise RuntimeError("gone")

    toy.faults = fault
    options = settings(
        rollout={"tasks_per_iteration": 7, "retries": 0, "group_size": 2, "turn_tokens": 2, "trajectory_tokens": 48}
    )
    listener = go(make_run(toy=toy, **options))
    assert all(record["rollout/dropped_groups"] == 1 for record in listener.iterations)
    assert len(listener.groups) == 12
    assert "train-3" not in {group.task.id for group in listener.groups}


# -- by hand --------------------------------------------------------------------------------------------------------


def _trajectory() -> Trajectory:
    return Trajectory(
        task=Task("t", "toy", "train"),
        prompt=(Message("user", "Go!"),),
        tokens=(1, 2, 3),
        action_mask=(False, True, False),
        logprobs=(0.0, -0.5, 0.0),
        prompt_length=1,
        turns=(Turn("Up", "Over", 1, 2),),
        outcome=Outcome.FAILED,
        reward=0.5,
        success=False,
        seed=7,
    )


def _group(**changes: Any) -> RecordedGroup:
    plain = RecordedGroup(
        iteration=1,
        task=_trajectory().task,
        context=None,
        skill_id=None,
        context_text=None,
        teacher_prompt=None,
        teacher_prompt_length=None,
        student_prompt="Go!",
        student_prompt_length=1,
        taught=False,
        untaught=None,
        minibatch=0,
        applied=True,
        episodes=(RecordedEpisode(_trajectory(), 1.0),),
    )
    return replace(plain, **changes)
