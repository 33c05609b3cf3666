"""The cells of a sweep and their states; every mistake is reported before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from synthetic import edit, fill

from skillsd import config as configs
from skillsd.config import RunConfig
from skillsd.config.load import apply_override
from skillsd.errors import UserError
from skillsd.report.writer import METRICS
from skillsd.sweeps.plan import asked, remember
from skillsd.sweeps.state import DONE, EVALUATE, MISSING, RESUME, state, steps
from skillsd.sweeps.variants import assignment, load_variants


def write(path: Path, variants: Any) -> str:
    path.write_text(variants if isinstance(variants, str) else yaml.safe_dump(variants))
    return str(path)


def test_the_cells_of_a_sweep(make_sweep: Any, two_models: list[str], tmp_path: Path) -> None:
    sweep = make_sweep(models=two_models, seeds=range(2), methods=["skill-sd", "grpo"], episodes=[72, 24])
    assert sweep.methods == ("base", "skill-sd", "grpo")
    assert sweep.against == "grpo"
    assert sweep.budgets == (24, 72)
    assert len(sweep.cells) == 2 * 2 * 3
    cell = next(c for c in sweep.cells if c.name == "two/skill-sd/seed-1")
    assert cell.folder == tmp_path / "out" / "two" / "skill-sd" / "seed-1"
    assert (cell.config.model.name, cell.config.method, cell.config.seed) == (two_models[1], "skill-sd", 1)
    assert cell.iterations == (2, 6)
    assert cell.config.training.iterations == 6
    # A checkpoint at each budget, and all of them are kept.
    assert (cell.config.checkpoint.every, cell.config.checkpoint.keep) == (2, 3)


def test_defaults_are_the_recipes(make_sweep: Any, tiny_model: Path) -> None:
    sweep = make_sweep()
    assert sweep.methods == ("base", "grpo", "skill-sd")
    assert sweep.budgets == (72,)
    assert list(sweep.models) == [tiny_model.name]
    assert sweep.cells[1].config.checkpoint.every == 2  # the recipe's own
    assert sweep.cells[1].config.checkpoint.keep == 2
    assert make_sweep("training.iterations=2").budgets == (24,)


@pytest.mark.parametrize(
    ("every", "episodes", "expected"),
    [
        (2, [24, 72], (2, 3)),
        (5, [72, 144], (3, 3)),
        (0, [48, 144], (4, 3)),
        (1, [24, 36], (1, 2)),
        (9, [12, 24], (1, 2)),
    ],
)
def test_checkpoints_fall_on_each_budget(
    make_sweep: Any, every: int, episodes: list[int], expected: tuple[int, int]
) -> None:
    options = make_sweep(f"checkpoint.every={every}", episodes=episodes).cells[1].config.checkpoint
    assert (options.every, options.keep) == expected


def test_variants_override_the_recipe(make_sweep: Any, tmp_path: Path) -> None:
    file = write(
        tmp_path / "v.yaml",
        {
            "last": {"method": "skill-sd", "skills.pick": "last", "objective": {"lambda_sdl": 1e-5}},
            "wide": {"method": "grpo", "rollout": {"group_size": 8}},
            "unused": {"no_such": 1},
        },
    )
    sweep = make_sweep("skills.pick=random", variants=file, methods=["last", "wide"], episodes=[48])
    last, wide = sweep.cells[1].config, sweep.cells[2].config
    assert (last.method, last.skills.pick, last.objective.lambda_sdl) == ("skill-sd", "last", 1e-5)
    assert last.skills.template == "teacher_terse"
    assert (sweep.cells[1].iterations, sweep.cells[2].iterations) == ((4,), (2,))
    assert wide.rollout.group_size == 8
    assert sweep.against == "last"
    # A cell's command line gives the same configuration.
    assert configs.load(RunConfig, sweep.recipe, sweep.cells[1].overrides) == last


@pytest.mark.parametrize(
    "value", [None, True, 0, -3, 1e-5, float("inf"), "a b", "null", "1e-4", "x: y", "a\nb", [1, "2"], {}, "grün", "'"]
)
def test_values_survive_the_command_line(value: Any) -> None:
    data: dict[str, Any] = {}
    apply_override(data, assignment("a.b", value))
    assert data == {"a": {"b": 1e-4 if value == "1e-4" else value}}


@pytest.mark.parametrize(
    ("overrides", "options", "expected"),
    [
        ([], {"methods": ["gpro"]}, "Did you mean 'grpo'"),
        ([], {"variants": "no-such"}, "unknown variants file 'no-such'"),
        ([], {"variants": "no/such.yaml"}, "no variants file 'no/such.yaml'"),
        ([], {"episodes": [30]}, "30: not a whole number of iterations of 'grpo', which uses 12 episodes"),
        ([], {"episodes": [0]}, "--episodes is 0"),
        (["seed=1"], {}, "--seeds"),
        (["method=grpo"], {}, "--methods"),
        (["model.name=nano"], {"models": ["nano"]}, "--models"),
        (["training.iterations=1"], {"episodes": [12]}, "--episodes"),
        (["training.iteratons=1"], {}, "training.iterations"),
        ([], {"models": ["nano", "hub/nano"]}, "have the same label 'nano'"),
        ([], {"models": ["/no/where"]}, "no model in '/no/where'"),
        ([], {"split": "tst"}, "tst"),
        ([], {"limit": 4}, "has 3 tasks"),
        ([], {"against": "opd"}, "unknown method of this table 'opd'"),
        (
            ["curriculum.easy_first=true"],
            {"episodes": [12, 24]},
            "'grpo': curriculum.easy_first is true, which depends",
        ),
        (["objective.lambda_schedule=cosine"], {"episodes": [12, 24]}, "'skill-sd': objective.lambda_schedule is"),
        ([], {"methods": ["grpo", "opd-external"]}, "teacher.model is None"),
        (["skills.template=nowhere"], {}, "'nowhere'"),
    ],
)
def test_mistakes_are_reported(make_sweep: Any, overrides: list[str], options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as error:
        make_sweep(*overrides, **options)
    assert expected in str(error.value)


def test_a_schedule_is_allowed_for_one_budget_or_without_a_teacher(make_sweep: Any) -> None:
    make_sweep("objective.lambda_schedule=cosine", "curriculum.easy_first=true", episodes=[24])
    make_sweep("objective.lambda_schedule=cosine", episodes=[12, 24], methods=["grpo"])


def test_what_measures_reading_comes_out_of_the_budget(make_sweep: Any) -> None:
    """10 iterations of 12 episodes; with 16 more after every second one, 6 iterations fit: 72 + 3 * 16 = 120."""
    sweep = make_sweep("reading.every=2", "reading.episodes=8", episodes=[120], methods=["grpo", "skill-sd"])
    assert [cell.iterations for cell in sweep.cells] == [(), (10,), (6,)]
    assert sweep.cells[2].config.episodes_after(6) == 120


@pytest.mark.parametrize(("every", "gate", "expected"), [(0, None, 120), (5, None, 136), (0, 0.5, 152), (5, 0.5, 168)])
def test_the_episodes_of_a_run_include_what_measures_reading(every: int, gate: float | None, expected: int) -> None:
    """10 iterations of 12, 8 per measurement; with syncs at 3, 6 and 9 of 10 measured, and the first teacher once."""
    config = RunConfig.model_validate(
        {
            "name": "x",
            "rollout": {"tasks_per_iteration": 3, "group_size": 4},
            "reading": {"every": every, "episodes": 4},
            "teacher": {"min_reading": gate, "sync_every": 3},
        }
    )
    assert config.episodes_after(10) == expected
    assert config.model_copy(update={"method": "grpo"}).episodes_after(10) == 120


@pytest.mark.parametrize(
    ("variants", "expected"),
    [
        ("a: [", "not readable YAML"),
        ("", "is empty"),
        ("- a", "contains a list"),
        ("a: {}\na: {}", "the key 'a' is given twice"),
        ("grpo: {seed: 1}", "has the name of a method"),
        ("base: {}", "has the name of a method"),
        ("a/b: {}", "not usable as a folder name"),
        ("3: {}", "not usable as a folder name"),
        ("a: 3", "expected settings"),
        ("a: {seed: 3}", "--seeds"),
        ("a: {model: {name: x}}", "--models"),
        ("a: {1: x}", "1 is not a key"),
        ("a: {skills.pik: last}", "variant 'a': recipe"),
        ("a: {rollout.temperature: 0.5}", "'a' is evaluated differently"),
        ("a: {environment.options: {turns: 2}}", "'a' is evaluated differently"),
        ("a: {rollout.group_size: 5}", "not a whole number of iterations of 'a'"),
        ("a: {method: opd-external}", "variant 'a': teacher.model is None"),
        ("a: {training.minibatches: 4}", "variant 'a': training.minibatches is 4"),
    ],
)
def test_mistakes_in_variants_are_reported(make_sweep: Any, tmp_path: Path, variants: str, expected: str) -> None:
    file = write(tmp_path / "v.yaml", variants)
    with pytest.raises(UserError) as error:
        make_sweep(variants=file, methods=["a", "grpo"])
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_every_mistake_is_reported_once(make_sweep: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "v.yaml", {"a": {"skills.pik": 1, "seeed": 1}, "b": {"methd": 1}})
    with pytest.raises(UserError) as error:
        make_sweep(variants=file, methods=["a", "b"], seeds=range(3))
    assert len(str(error.value).splitlines()) == 3


def test_the_shipped_variants_are_valid(tmp_path: Path) -> None:
    from skillsd.sweeps.plan import plan
    from skillsd.sweeps.variants import VARIANTS

    for path in VARIANTS.glob("*.yaml"):
        labels = list(load_variants(path.stem))
        sweep = plan("sokoban-nano", [], tmp_path, variants=path.stem, methods=labels, episodes=[6144])
        assert len(sweep.cells) == 1 + len(labels)


# -- the states of cells --------------------------------------------------------------------------------------------


def test_states(make_sweep: Any) -> None:
    sweep = make_sweep(methods=["grpo"], episodes=[24, 48])
    base, cell = sweep.cells
    assert [state(sweep, c) for c in sweep.cells] == [MISSING, MISSING]
    assert [command[3] for command in steps(sweep, cell)] == ["train", "eval"]
    assert steps(sweep, cell)[1][-4:] == ["--at", "2", "--at", "4"]
    fill(sweep, lambda cell, iteration: ([1, 0, 1], [1, 1, 1]))
    assert [state(sweep, c) for c in sweep.cells] == [DONE, DONE]
    assert steps(sweep, cell) == steps(sweep, base) == []
    # Evaluations that do not fit are repeated; nothing is trained again.
    assert state(make_sweep(methods=["grpo"], episodes=[24, 48], samples=2), cell) == EVALUATE
    assert state(make_sweep(methods=["grpo"], episodes=[24, 48], split="tune"), cell) == EVALUATE
    assert state(make_sweep(methods=["grpo"], episodes=[24, 48], limit=2), cell) == DONE
    for change in (
        lambda records: records[:3],
        lambda records: [{**r, "fingerprint": "another"} for r in records],
        lambda records: [{**r, "run": "another"} for r in records],
        lambda records: [{**r, "successes": r["successes"][:2]} for r in records],
        lambda records: [{**r, "seed": 99} for r in records],
        lambda records: [{**r, "temperature": r["temperature"] * 0.7} for r in records],
        lambda records: [{k: v for k, v in r.items() if k != "settings"} for r in records],
    ):
        fresh = cell.evaluation("test").read_text()
        edit(cell.evaluation("test"), change)
        assert state(sweep, cell) == EVALUATE
        assert [command[3] for command in steps(sweep, cell)] == ["eval"]
        cell.evaluation("test").write_text(fresh)
    cell.evaluation("test").write_text("[{")
    assert state(sweep, cell) == EVALUATE
    (cell.folder / "checkpoints" / "step-4").rmdir()
    assert state(sweep, cell) == RESUME


@pytest.mark.parametrize(
    "change",
    [
        "rollout.turn_tokens=3",
        "rollout.temperature=0.9",
        "environment.options={turns: 2}",
        "model.dtype=bfloat16",
        "model.threads=2",
        "model.chat_template_kwargs={enable_thinking: false}",
        "engine.name=vllm",
    ],
)
def test_an_evaluation_of_the_base_model_under_other_settings_is_repeated(make_sweep: Any, change: str) -> None:
    fill(make_sweep(methods=["grpo"]), solved)
    same = make_sweep("rollout.retries=5", methods=["grpo"])
    assert state(same, same.cells[0]) == DONE
    other = make_sweep(change, methods=["grpo"])
    assert state(other, other.cells[0]) == MISSING


def test_a_longer_sweep_resumes_a_shorter_one(make_sweep: Any) -> None:
    fill(make_sweep(methods=["grpo"], episodes=[24]), lambda cell, iteration: ([1, 0, 1], [1, 1, 1]))
    longer = make_sweep(methods=["grpo"], episodes=[24, 48])
    assert [state(longer, cell) for cell in longer.cells] == [DONE, RESUME]


def test_a_run_of_other_settings_is_an_error(make_sweep: Any) -> None:
    fill(make_sweep(methods=["grpo"]), lambda cell, iteration: ([1, 0, 1], [1, 1, 1]))
    other = make_sweep("training.learning_rate=0.5", methods=["grpo"])
    with pytest.raises(UserError, match=r"training\.learning_rate was 0\.003, now 0\.5"):
        state(other, other.cells[1])


def test_a_run_with_another_template_is_an_error(make_sweep: Any, tmp_path: Path) -> None:
    template = write(tmp_path / "mine.txt", "Plan: {golden_workflow}")
    sweep = make_sweep(f"skills.template={template}", methods=["skill-sd", "grpo"])
    fill(sweep, solved)
    assert [state(sweep, cell) for cell in sweep.cells] == [DONE] * 3
    write(tmp_path / "mine.txt", "The plan: {golden_workflow}")
    with pytest.raises(UserError, match=r"the text behind skills\.template has changed"):
        state(sweep, sweep.cells[1])
    assert state(sweep, sweep.cells[2]) == DONE  # GRPO has no skills


def test_a_budget_without_a_checkpoint(make_sweep: Any) -> None:
    fill(make_sweep(methods=["grpo"], episodes=[48]), lambda cell, iteration: ([1, 0, 1], [1, 1, 1]))
    sweep = make_sweep(methods=["grpo"], episodes=[24, 48])
    with pytest.raises(UserError, match="has no checkpoint of iteration 2"):
        state(sweep, sweep.cells[1])


def test_a_lost_checkpoint_is_reported_before_the_run_is_resumed(make_sweep: Any) -> None:
    fill(make_sweep(methods=["grpo"], episodes=[48]), solved)
    sweep = make_sweep(methods=["grpo"], episodes=[24, 48, 72])
    with pytest.raises(UserError, match="has no checkpoint of iteration 2,"):
        state(sweep, sweep.cells[1])


def solved(cell: Any, iteration: int | None) -> tuple[list[float], list[float]]:
    return [1, 0, 1], [1, 1, 1]


def test_an_evaluated_budget_needs_no_checkpoint(make_sweep: Any) -> None:
    shorter = make_sweep(methods=["grpo"], episodes=[24])
    fill(shorter, solved)
    fill(make_sweep(methods=["grpo"], episodes=[72]), solved)
    (shorter.cells[1].folder / "checkpoints" / "step-2").rmdir()
    both = make_sweep(methods=["grpo"], episodes=[24, 72])
    assert [state(both, cell) for cell in both.cells] == [DONE, DONE]
    # Only what is missing is evaluated.
    (both.cells[1].folder / "checkpoints" / "step-4").mkdir()
    more = make_sweep(methods=["grpo"], episodes=[24, 48, 72])
    [command] = steps(more, more.cells[1])
    assert (command[-1], command.count("--at"), "--append" in command) == ("4", 1, True)


def test_an_evaluation_beyond_the_metrics_does_not_count(make_sweep: Any) -> None:
    sweep = make_sweep(methods=["grpo"], episodes=[24, 48])
    fill(sweep, solved)
    metrics = sweep.cells[1].folder / METRICS
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:2]))
    (sweep.cells[1].folder / "checkpoints" / "step-4").rmdir()
    assert state(sweep, sweep.cells[1]) == RESUME
    assert [command[-1] for command in steps(sweep, sweep.cells[1])] == ["--resume", "4"]


def test_checkpoints_of_all_requested_budgets_are_kept(make_sweep: Any) -> None:
    def options(**asked_for: Any) -> tuple[int, int]:
        made = make_sweep(methods=["grpo"], **asked_for).cells[1].config.checkpoint
        return made.every, made.keep

    sweep = make_sweep(methods=["grpo"], episodes=[24, 72])
    assert asked(sweep.out) == ()
    sweep.out.mkdir()
    remember(sweep)
    assert asked(sweep.out) == (24, 72)
    assert options(episodes=[72]) == (2, 3)
    assert options(episodes=[144]) == (2, 6)
    assert options(episodes=[24]) == (2, 2)  # the recipe's: no earlier budget to keep
    remember(make_sweep(methods=["grpo"], episodes=[12]))
    assert asked(sweep.out) == (12, 24, 72)
    assert options(episodes=[48]) == (1, 4)
    (sweep.out / "budgets.json").write_text("[{")
    assert asked(sweep.out) == ()


def test_a_checkpoint_of_an_interruption_does_not_displace_a_budgets(make_sweep: Any) -> None:
    sweep = make_sweep(methods=["grpo"], episodes=[24, 72])
    for iteration in (1, 2, 3):
        (sweep.cells[1].folder / "checkpoints" / f"step-{iteration}").mkdir(parents=True)
    assert make_sweep(methods=["grpo"], episodes=[24, 72]).cells[1].config.checkpoint.keep == 4


def test_a_scheduled_run_has_a_fixed_length(make_sweep: Any) -> None:
    easy = "curriculum.easy_first=true"
    fill(make_sweep(easy, methods=["grpo"], episodes=[24]), lambda cell, iteration: ([1, 0, 1], [1, 1, 1]))
    sweep = make_sweep(easy, methods=["grpo"], episodes=[48])
    with pytest.raises(UserError, match="can't be extended to 4"):
        state(sweep, sweep.cells[1])
