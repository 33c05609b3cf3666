"""What a skill is worth, by an actor whose uplift is known exactly; and the teacher's gap against a manual count."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from scipy import stats
from toy_env import Toy, ToyEnvironment
from toy_run import MakeRun, go, toy_settings

from skillsd import cli
from skillsd.config import RunConfig, load
from skillsd.engines.base import Sample, SampleRequest, TokenSequence
from skillsd.engines.torch.engine import TorchEngine
from skillsd.rollouts.collect import collect
from skillsd.rollouts.engine_policy import EnginePolicy
from skillsd.rollouts.policy import Budget
from skillsd.prompting.renderer import ChatRenderer
from skillsd.skills.bank import HeldOutTaskError, Bank, StoredSkill
from skillsd.training.batch import view
from skillsd.runs.lifecycle import run_training
from skillsd.training.teacher_gap import TurnGap, gap_figures, measure_gap, turn_gaps
from skillsd.evaluation.uplift import Uplift, by_kind, measure_uplift, summarise_uplift
from skillsd.types import Outcome, Skill, Task
from skillsd.cli.skill_value import opened

BUDGET = Budget(turns=3, turn_tokens=2, trajectory_tokens=60)


class Scripted(TorchEngine):
    """Does what the workflow in its prompt says; without one, episode by episode, `Left` or `Up` in turn."""

    def __init__(self, model: Path) -> None:
        super().__init__(str(model), device="cpu")
        self.prompts: Counter[str] = Counter()
        self.rooms: dict[str, list[int]] = {}
        self._moves: dict[str, str] = {}

    async def sample(self, request: SampleRequest) -> Sample:
        text = self.tokenizer.decode(request.tokens)
        _, told, rest = text.partition("Workflow: ")
        context = rest.split()[0] if told else ""
        session = str(request.session)
        if session not in self._moves:
            self._moves[session] = context or ("Left", "Up")[self.prompts[""] % 2]
            self.prompts[context] += 1
            self.rooms.setdefault(context, []).append(request.max_tokens)
        ids = tuple(self.tokenizer.encode(self._moves[session], add_special_tokens=False))
        assert len(ids) <= request.max_tokens
        return Sample(ids, (0.0,) * len(ids), "length")


@pytest.fixture
def scripted(tiny_model: Path) -> Scripted:
    return Scripted(tiny_model)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> TorchEngine:
    return TorchEngine(str(tiny_model), device="cpu")


def actor_of(engine: TorchEngine) -> EnginePolicy:
    return EnginePolicy(engine, ChatRenderer(engine.tokenizer, engine.stop_tokens))


def measure(engine: TorchEngine, told: list[tuple[Task, str]], toy: Toy | None = None, **options: Any) -> list[Uplift]:
    settings = {"episodes": 4, "seed": 0} | options
    budget = settings.pop("budget", BUDGET)
    return asyncio.run(measure_uplift(actor_of(engine), toy or Toy(), told, budget, **settings))


def train_task(number: int) -> Task:
    return Toy().tasks("train")[number]  # solved by Up, Down, Left, Right in turn; lost by the next of them


# -- one skill ------------------------------------------------------------------------------------------------------


def test_the_uplift_of_a_known_actor(scripted: Scripted) -> None:
    # On train-0 `Up` solves and `Down` loses at once. Without a skill every other episode is `Up` (score 1), the
    # others are `Left` to the end (score 0.5): success 0.5, score 0.75.
    told = [(train_task(0), f" Workflow: {move}") for move in ("Up", "Down", "Left")]
    good, bad, idle = measure(scripted, told)
    assert (good.task_id, good.episodes, good.place) == ("train-0", 4, 0)
    assert (good.told_success, good.plain_success, good.success) == (1.0, 0.5, 0.5)
    assert (good.told_score, good.plain_score, good.score) == (1.0, 0.75, 0.25)
    assert (bad.success, bad.score) == (-0.5, -0.75)
    assert (idle.success, idle.score) == (-0.5, -0.25)


def test_the_plain_prompt_is_played_once_per_task(scripted: Scripted) -> None:
    told = [(train_task(n), f" Workflow: {move}") for n in (0, 1) for move in ("Up", "Down", "Up")]
    heard: list[Any] = []
    figures = measure(scripted, told, on_episode=heard.append)
    # 4 episodes of each: 2 tasks plainly, and 2 different contexts each.
    assert scripted.prompts == {"": 8, "Up": 8, "Down": 8}
    assert len(heard) == 24
    assert [uplift.place for uplift in figures] == list(range(6))
    assert figures[0].told_score == figures[2].told_score
    assert figures[0].plain_score == figures[1].plain_score


def test_a_plain_score_that_is_known_is_not_played_again(scripted: Scripted) -> None:
    told = [(train_task(0), " Workflow: Up"), (train_task(1), " Workflow: Down")]
    first, second = measure(scripted, told, plain={"train-0": 0.125})
    assert (first.reward, first.told_success) == (0.875, 1.0)
    assert math.isnan(first.plain_success)
    assert math.isnan(first.success)
    assert second.plain_success == 0.0  # neither `Left` nor `Up` solves train-1
    assert scripted.prompts[""] == 4
    (figure,) = measure(scripted, [(train_task(0), "")], plain={"train-0": 0.125})
    assert figure.plain_score == 0.125


def test_nothing_told_is_worth_nothing(engine: TorchEngine) -> None:
    (figure,) = measure(engine, [(train_task(0), "")])
    assert (figure.success, figure.score) == (0.0, 0.0)


def test_who_is_told_has_as_much_room_as_who_is_not(scripted: Scripted) -> None:
    actor = actor_of(scripted)
    prompt = len(actor.renderer.prompt(asyncio.run(Toy().make().reset(train_task(0), 0))))
    tight = Budget(turns=3, turn_tokens=100, trajectory_tokens=prompt + 20)
    context = " Workflow: Up" + " never Down" * 20
    measure(scripted, [(train_task(0), context)], budget=tight)
    assert scripted.rooms == {"": [20] * 4, "Up": [20] * 4}


def test_the_teacher_may_play(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[str] = set()
    sample = Scripted.sample

    async def spy(self: Scripted, request: SampleRequest) -> Sample:
        asked.add(request.weights)
        return await sample(self, request)

    monkeypatch.setattr(Scripted, "sample", spy)
    actor = EnginePolicy(scripted, ChatRenderer(scripted.tokenizer, scripted.stop_tokens), weights="teacher")
    told = [(train_task(0), " Workflow: Up")]
    (figure,) = asyncio.run(measure_uplift(actor, Toy(), told, BUDGET, episodes=2, seed=0))
    assert figure.told_success == 1.0
    assert asked == {"teacher"}


@pytest.mark.parametrize(
    "task",
    [
        Toy().tasks("tune")[0],
        Toy(overlap=True).tasks("train")[0],  # says `train`, but is in `tune` too
    ],
)
def test_held_out_tasks_are_refused_before_anything_is_played(scripted: Scripted, task: Task) -> None:
    toy = Toy(overlap=True)
    with pytest.raises(HeldOutTaskError, match=task.id):
        measure(scripted, [(train_task(1), " Workflow: Up"), (task, " Workflow: Up")], toy)
    assert not toy.made


def test_what_the_environment_breaks_is_left_out(scripted: Scripted) -> None:
    toy = Toy()
    broken: Counter[str] = Counter()

    def fault(call: str, environment: ToyEnvironment) -> None:
        if call != "step":
            return
        task = environment.task.id
        # train-1 always breaks; train-2 only the first time, and is played again.
        if task == "train-1" or (task == "train-2" and not broken[task]):
            broken[task] += 1
            raise RuntimeError("gone")

    toy.faults = fault
    figures = measure(scripted, [(train_task(n), " Workflow: Left") for n in (0, 1, 2)], toy)
    assert [(f.place, f.task_id) for f in figures] == [(0, "train-0"), (2, "train-2")]
    assert figures[1].told_success == 1.0
    assert broken["train-2"] == 1


def test_one_broken_side_is_enough_to_leave_a_skill_out(scripted: Scripted) -> None:
    toy = Toy()

    def fault(call: str, environment: ToyEnvironment) -> None:
        if call == "step" and environment.actions[-1] == "Down":
            raise RuntimeError("gone")

    toy.faults = fault
    told = [(train_task(0), " Workflow: Down"), (train_task(0), " Workflow: Up")]
    assert [figure.place for figure in measure(scripted, told, toy)] == [1]


def test_a_failing_engine_is_told_as_it_is(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    async def sample(self: Scripted, request: SampleRequest) -> Sample:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Scripted, "sample", sample)
    with pytest.raises(RuntimeError, match="out of memory"):
        measure(scripted, [(train_task(0), " Workflow: Up")])


def test_a_skill_is_worth_the_same_whatever_else_is_measured(engine: TorchEngine) -> None:
    told = [(train_task(n), f" Workflow: {move}") for n in (0, 1, 2) for move in ("Up", "Down")]
    together = measure(engine, told, episodes=8)
    alone = measure(engine, told[3:4], episodes=8, concurrency=3)
    assert (alone[0].told_score, alone[0].plain_score) == (together[3].told_score, together[3].plain_score)
    assert measure(engine, told, episodes=8) == together
    assert measure(engine, told, episodes=8, seed=1) != together


# -- many skills ----------------------------------------------------------------------------------------------------


def stored(number: int, task: str, skill: Skill, outcome: Outcome = Outcome.SOLVED) -> StoredSkill:
    return StoredSkill(number, "toy", task, skill, "", 1, 1.0, outcome, 1, 0, 0.0)


def uplift(task: str, told: float, plain: float) -> Uplift:
    return Uplift(0, task, told, plain, told, plain, 4)


def test_tasks_weigh_the_same_and_are_the_unit_of_the_interval() -> None:
    # Three skills of a, one of b and of c: the uplifts of the tasks are 0.5, -0.25 and 0.
    figures = summarise_uplift(
        [
            (stored(1, "a", Skill("", "", "x")), uplift("a", 1.0, 0.25)),
            (stored(2, "a", Skill("", "", "y")), uplift("a", 0.75, 0.25)),
            (stored(3, "a", Skill("", "", "z")), uplift("a", 0.5, 0.25)),
            (stored(4, "b", Skill("", "", "x")), uplift("b", 0.5, 0.75)),
            (stored(5, "c", Skill("", "", "x")), uplift("c", 0.5, 0.5)),
        ]
    )
    assert (figures.skills, figures.tasks) == (5, 3)
    assert figures.told == pytest.approx((0.75 + 0.5 + 0.5) / 3)
    assert figures.plain == pytest.approx((0.25 + 0.75 + 0.5) / 3)
    assert figures.success == pytest.approx(0.25 / 3)
    low, high = stats.t.interval(0.95, 2, 0.25 / 3, stats.sem([0.5, -0.25, 0.0]))
    assert high > 1
    assert figures.success_interval == pytest.approx((low, 1.0))
    assert (figures.better, figures.worse) == (0.6, 0.2)


def test_an_interval_stays_within_what_can_be() -> None:
    figures = summarise_uplift([(stored(1, "a", Skill("", "", "x")), uplift("a", 1.0, 0.0))])
    assert figures.success == 1.0
    assert -1 <= figures.success_interval[0] <= figures.success_interval[1] <= 1


def test_kinds_of_skills() -> None:
    kinds = by_kind(
        [
            (stored(1, "a", Skill("", "", "go")), uplift("a", 1, 0)),
            (stored(2, "a", Skill("well", "not so", "go")), uplift("a", 1, 0)),
            (stored(3, "a", Skill("", "not so", ""), Outcome.FAILED), uplift("a", 1, 0)),
            (stored(4, "a", Skill("well", "", ""), Outcome.TRUNCATED_TURNS), uplift("a", 1, 0)),
        ]
    )
    assert {kind: [skill.id for skill, _ in those] for kind, those in kinds.items()} == {
        "from failed": [3],
        "from solved": [1, 2],
        "from truncated_turns": [4],
        "mistake only": [3],
        "neither workflow nor mistake": [4],
        "workflow and mistake": [2],
        "workflow only": [1],
    }


# -- the teacher's gap ----------------------------------------------------------------------------------------------


def test_a_teacher_that_is_told_nothing_is_the_student(make_run: MakeRun) -> None:
    run = make_run(training={"iterations": 2}, skills={"content": "empty"})
    go(run)
    run.engine.sync_teacher()
    gap = asyncio.run(measure_gap(run, episodes=3, seed=0))
    assert gap.tasks
    assert gap.episodes == 3 * gap.tasks
    assert all((t.log_ratio, t.abs_log_ratio, t.kl, t.moved) == (0, 0, 0, 0) for t in gap.turns)


def test_the_gap_is_what_a_count_by_hand_gives(engine: TorchEngine) -> None:
    actor = actor_of(engine)
    played = asyncio.run(collect(actor, Toy(), Toy().tasks("train"), BUDGET, group_size=2, seed=0))
    trajectory = max((t for group in played.groups for t in group.trajectories), key=lambda t: len(t.turns))
    assert len(trajectory.turns) == 3
    seen = view(trajectory, " Workflow: Up", actor.renderer)
    added = len(seen.tokens) - len(trajectory.tokens)
    gaps = turn_gaps(trajectory, seen, engine, (engine, "teacher"), 0.7)
    assert [gap.number for gap in gaps] == [1, 2, 3]
    for gap, turn in zip(gaps, trajectory.turns, strict=True):
        log_ratio = absolute = kl = 0.0
        moved = 0
        for place in range(turn.start, turn.end):
            # The one token by itself, from the texts cut behind it.
            p = last(engine, trajectory.tokens[: place + 1])
            q = last(engine, seen.tokens[: place + 1 + added])
            token = trajectory.tokens[place]
            log_ratio += float(p[token] - q[token])
            absolute += abs(float(p[token] - q[token]))
            kl += sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
            moved += int(p.argmax() != q.argmax())
        assert gap.tokens == turn.end - turn.start
        assert gap.log_ratio == pytest.approx(log_ratio, abs=1e-4)
        assert gap.abs_log_ratio == pytest.approx(absolute, abs=1e-4)
        assert gap.kl == pytest.approx(kl, abs=1e-4)
        assert gap.kl > 0
        assert gap.moved == moved


def last(engine: TorchEngine, tokens: tuple[int, ...]) -> torch.Tensor:
    mask = (*[False] * (len(tokens) - 1), True)
    return engine.score([TokenSequence(tokens, mask)], temperature=0.7, distribution=True)[0][0]


def test_the_gap_of_a_run_records_nothing_and_may_have_another_teacher(
    make_run: MakeRun, engine: TorchEngine, tmp_path: Path
) -> None:
    run = make_run(training={"iterations": 2})
    go(run)
    run.engine.sync_teacher()
    before = run.bank.skills()
    gap = asyncio.run(measure_gap(run, episodes=2, seed=0))
    assert run.bank.skills() == before
    assert gap.tasks == len({skill.task_id for skill in before})
    assert gap.tasks + gap.untold == 7
    assert any(turn.kl > 0 for turn in gap.turns)
    again = asyncio.run(measure_gap(run, episodes=2, seed=0, teacher=(run.engine, "student")))
    assert again.turns == gap.turns  # the run's teacher is the student
    base = asyncio.run(measure_gap(run, episodes=2, seed=0, teacher=(engine, "student")))
    assert [t.number for t in base.turns] == [t.number for t in gap.turns]
    assert base.turns != gap.turns
    few = asyncio.run(measure_gap(run, episodes=1, seed=0, tasks=2))
    assert few.tasks + few.untold == 2


def test_figures_of_the_gap_are_means_over_tokens() -> None:
    turns = [
        TurnGap(1, True, True, tokens=3, log_ratio=1.0, abs_log_ratio=2.0, kl=0.5, moved=2),
        TurnGap(2, False, True, tokens=1, log_ratio=-2.0, abs_log_ratio=2.0, kl=0.5, moved=0),
        TurnGap(25, False, False, tokens=4, log_ratio=0.0, abs_log_ratio=0.0, kl=0.0, moved=1),
    ]
    rows = {(row["split"], row["turns"]): row for row in gap_figures(turns)}
    assert [turns for split, turns in rows if split == "all"] == ["all", "1-2", "21-"]
    first = rows["all", "1-2"]
    assert (first["count"], first["tokens"]) == (2, 4)
    assert (first["log_ratio"], first["abs_log_ratio"], first["kl"]) == (-0.25, 1.0, 0.25)
    assert (first["tokens_moved"], first["turns_moved"]) == (0.5, 0.5)
    assert rows["episode solved", "all"]["tokens"] == 3
    assert rows["skill from a failure", "all"]["tokens"] == 4
    assert ("skill from a failure", "1-2") not in rows


# -- the commands ---------------------------------------------------------------------------------------------------

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def skills(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """`skillsd skills ...`: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.console, "_width", 300)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["skillsd", "skills", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (int(ended.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four iterations, with checkpoints of the second and the last."""
    torch.set_num_threads(1)
    made = tmp_path_factory.mktemp("uplift")
    for name, changes in {"run": {}, "grpo": {"method": "grpo"}}.items():
        settings = toy_settings(tiny_model, training={"iterations": 4}, rollout={"tasks_per_iteration": 7}, **changes)
        (made / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        run_training(load(RunConfig, str(made / f"{name}.yaml")), made / name)
    return made


def test_uplift_of_a_run(skills: Command, folder: Path, tmp_path: Path) -> None:
    run = folder / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code, said, mistakes = skills("uplift", run, "--episodes", 2, "--json", "figures.json")
    assert code == 0, mistakes
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    figures = json.loads((tmp_path / "figures.json").read_text())
    with Bank(run / "skills.sqlite") as bank:
        picked = {skill.id for skill in bank.skills() if skill.picks}
    assert [record["id"] for record in figures["skills"]] == sorted(picked, reverse=True)
    assert (figures["iteration"], figures["weights"], figures["left_out"]) == (4, "student", 0)
    overall = figures["summary"]["all"]
    assert overall["skills"] == len(picked)
    assert f"{100 * overall['success']:.1f} %" in said
    assert all(kind in said for kind in figures["summary"])
    first = figures["skills"][0]
    assert first["uplift"]["success"] == first["uplift"]["told_success"] - first["uplift"]["plain_success"]
    assert "Best and worst" in said
    assert "…" not in said

    # The same skill alone, by its task; and other weights.
    code, said, mistakes = skills(
        "uplift", run, "--episodes", 2, "--task", first["task_id"], "--limit", 1, "--json", "1"
    )
    assert code == 0, mistakes
    assert json.loads(Path("1").read_text())["skills"] == [first]
    assert skills("uplift", run, "--limit", 2, "--at", "base", "--teacher", "--json", "2")[0] == 0
    assert json.loads(Path("2").read_text())["iteration"] == 0
    assert skills("uplift", run, "--limit", 2, "--at", 2, "--all", "--json", "3")[0] == 0
    assert json.loads(Path("3").read_text())["iteration"] == 2


def test_gap_of_a_run(skills: Command, folder: Path, tmp_path: Path) -> None:
    code, said, mistakes = skills("gap", folder / "run", "--episodes", 2, "--json", "gap.json")
    assert code == 0, mistakes
    figures = json.loads((tmp_path / "gap.json").read_text())
    everything = figures["rows"][0]
    assert (everything["split"], everything["turns"]) == ("all", "all")
    assert everything["kl"] > 0
    assert f"{everything['kl']:.4f}" in said
    code, _, mistakes = skills(
        "gap", folder / "run", "--tasks", 3, "--teacher", "base", "--at", 2, "--json", "base.json"
    )
    assert code == 0, mistakes
    base = json.loads((tmp_path / "base.json").read_text())
    assert (base["teacher"], base["iteration"], base["tasks"] + base["untold"]) == ("base", 2, 3)


def test_a_checkpoint_brings_its_weights(folder: Path) -> None:
    def weights(at: str | None) -> torch.Tensor:
        with opened(folder / "run", at) as run:
            assert isinstance(run.engine, TorchEngine)
            return next(run.engine.model.parameters()).detach().clone()

    base, second, newest = weights("base"), weights("2"), weights(None)
    assert torch.equal(newest, weights("4"))
    assert not torch.equal(base, second)
    assert not torch.equal(second, newest)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["uplift", "nowhere"], "no run in"),
        (["gap", "nowhere"], "no run in"),
        (["uplift", "run", "--task", "train-99"], "'train-99'"),
        (["uplift", "run", "--at", "3"], "2, 4"),
        (["gap", "run", "--at", "three"], "'base'"),
        (["gap", "run", "--teacher", "bse"], "'base'"),
        (["uplift", "run", "--episodes", "0"], "--episodes"),
        (["uplift", "run", "--json", "no/folder/x.json"], "no/folder"),
        (["uplift", "grpo"], "empty"),
        (["gap", "grpo"], "empty"),
    ],
)
def test_a_mistake_gets_one_helpful_line(
    skills: Command, folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str
) -> None:
    monkeypatch.chdir(folder)
    code, said, mistakes = skills(*arguments)
    assert (code, said) == (2, "")
    assert mistakes.startswith("error: ")
    assert mistakes.count("\n") == 1, mistakes
    assert told in mistakes


def test_a_run_without_its_bank(skills: Command, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text((folder / "run" / "config.yaml").read_text())
    assert "no skill bank" in skills("uplift", "run")[2]
    assert not (tmp_path / "run" / "skills.sqlite").exists()
    Bank(tmp_path / "run" / "skills.sqlite").close()
    assert "no checkpoint" in skills("uplift", "run")[2]
    assert "empty" in skills("uplift", "run", "--at", "base")[2]


def test_skills_that_were_never_picked_are_asked_for(skills: Command, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text((folder / "run" / "config.yaml").read_text())
    with Bank(tmp_path / "run" / "skills.sqlite") as bank:
        known = {"source": "x", "iteration": 1, "reward": 1.0, "outcome": Outcome.SOLVED}
        bank.add(train_task(0), Skill("", "", "Up"), **known)  # type: ignore[arg-type]
    assert "--all" in skills("uplift", "run", "--at", "base")[2]
    assert skills("uplift", "run", "--at", "base", "--all")[0] == 0
