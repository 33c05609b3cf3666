"""Statistics against numbers by hand and by scipy; results that are not comparable are refused."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats
from synthetic import edit, fill

from skillsd.cli.app import main
from skillsd.errors import UserError
from skillsd.evaluation.evaluate import mean_interval, student
from skillsd.sweeps import show
from skillsd.sweeps.plan import Cell
from skillsd.sweeps.results import Measured, check, difference, estimate, left_out, summarise, unit_of
from skillsd.sweeps.state import state
from skillsd.sweeps.table import run_table, show_plan, write

T_1, T_2, T_4 = 12.7062047, 4.3026527, 2.7764451  # 97.5 % points of Student's t, from a table


def cell(model: str, seed: int, *accuracy: float | None) -> Measured:
    tasks = tuple(accuracy)
    return Measured(model, "m", seed, tasks, tasks, tasks)


# -- statistics -----------------------------------------------------------------------------------------------------


def test_students_interval_by_hand() -> None:
    # mean 0.4, squared deviations 0.01, 0, 0.01: s^2 = 0.01, standard error 0.1 / sqrt(3)
    assert student([0.3, 0.4, 0.5]) == pytest.approx((0.4 - T_2 * 0.1 / math.sqrt(3), 0.4 + T_2 * 0.1 / math.sqrt(3)))


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_students_interval_against_scipy(count: int) -> None:
    values = np.random.default_rng(count).uniform(0.4, 0.5, count)
    expected = stats.t.interval(0.95, count - 1, loc=values.mean(), scale=stats.sem(values))
    assert student(list(values), (-9, 9)) == pytest.approx(expected)


def test_an_interval_needs_two_values_and_is_clipped_to_the_bounds() -> None:
    assert student([0.5]) is None
    assert student([]) is None
    assert student([0.0, 1.0]) == (0.0, 1.0)
    assert student([-1.0, 1.0], (-1.0, 1.0)) == (-1.0, 1.0)
    assert student([0.3, 0.3, 0.3]) == pytest.approx((0.3, 0.3))


def test_the_unit_of_inference() -> None:
    assert [unit_of(1, 1), unit_of(1, 5), unit_of(2, 1), unit_of(3, 5)] == ["tasks", "seeds", "models", "models"]


def test_one_model_over_its_seeds() -> None:
    cells = [cell("a", seed, 1.0, mean) for seed, mean in enumerate((0.0, 0.2, 0.4, 0.6, 0.8))]  # 0.5, 0.6 ... 0.9
    found = estimate(cells, "accuracy", "seeds")
    assert found is not None
    # s^2 = 0.1 / 4 = 0.025, standard error sqrt(0.005)
    assert (found.mean, found.cells) == (pytest.approx(0.7), 5)
    assert found.interval == pytest.approx((0.7 - T_4 * math.sqrt(0.005), 0.7 + T_4 * math.sqrt(0.005)))


def test_each_of_several_models_counts_once() -> None:
    # Model a: (0.2 + 0.4) / 2 = 0.3; model b, with one seed missing: 0.5.
    cells = [cell("a", 0, 0.2), cell("a", 1, 0.4), cell("b", 0, 0.5)]
    found = estimate(cells, "accuracy", "models")
    assert found is not None
    assert (found.mean, found.cells) == (pytest.approx(0.4), 3)
    assert found.interval == student([0.3, 0.5]) == (0.0, 1.0)  # +- 12.7 * 0.1
    assert 0.1 * T_1 > 0.6


def test_one_run_over_the_tasks() -> None:
    found = estimate([cell("a", 0, 1.0, 0.0, 1.0, None, 1.0)], "accuracy", "tasks")
    assert found is not None
    assert found.mean == 0.75
    assert found.interval == mean_interval([1.0, 0.0, 1.0, 1.0])  # Wilson's interval, as in the evaluation


def test_differences_are_paired() -> None:
    ours = [cell("a", 0, 0.5), cell("a", 1, 0.7), cell("a", 2, 0.9), cell("a", 9, 0.0)]
    theirs = [cell("a", 2, 0.6), cell("a", 0, 0.4), cell("a", 1, 0.5), cell("b", 9, 1.0)]
    found = difference(ours, theirs, "accuracy", "seeds")
    assert found is not None
    # 0.1, 0.2, 0.3: s^2 = 0.01; unpaired cells are left out
    reach = T_2 * 0.1 / math.sqrt(3)
    assert (found.mean, found.cells) == (pytest.approx(0.2), 3)
    assert found.interval == pytest.approx((0.2 - reach, 0.2 + reach))
    assert difference(ours, [], "accuracy", "seeds") is None


def test_differences_over_models() -> None:
    ours = [cell("a", 0, 0.5), cell("a", 1, 0.7), cell("b", 0, 0.9), cell("c", 0, 0.3)]
    theirs = [cell("a", 0, 0.4), cell("a", 1, 0.4), cell("b", 0, 0.6), cell("c", 0, 0.2)]
    found = difference(ours, theirs, "accuracy", "models")
    assert found is not None
    # a: (0.1 + 0.3) / 2 = 0.2, b: 0.3, c: 0.1
    assert (found.mean, found.cells) == (pytest.approx(0.2), 4)
    assert found.interval == pytest.approx((0.2 - T_2 * 0.1 / math.sqrt(3), 0.2 + T_2 * 0.1 / math.sqrt(3)))


def test_one_pair_over_its_common_tasks() -> None:
    ours = [cell("a", 0, 1.0, 1.0, None, 0.0, 1.0)]
    theirs = [cell("a", 0, 0.0, 1.0, 1.0, 0.0, None)]
    found = difference(ours, theirs, "accuracy", "tasks")
    assert found is not None
    # 1, 0, 0: mean 1/3, s^2 = 1/3, standard error 1/3
    assert found.mean == pytest.approx(1 / 3)
    assert found.interval == pytest.approx((max(-1, (1 - T_2) / 3), 1.0))
    # With several runs too, a task that failed on one side is excluded on both.
    assert difference(ours, theirs, "accuracy", "seeds").mean == pytest.approx(1 / 3)  # type: ignore[union-attr]


def test_identical_seeds_count_as_one_result() -> None:
    greedy = [cell("a", seed, 1.0, 0.0, 1.0, 1.0) for seed in range(3)]
    found = estimate(greedy, "accuracy", "seeds")
    assert found is not None
    assert (found.mean, found.cells, found.interval) == (0.75, 3, mean_interval([1.0, 0.0, 1.0, 1.0]))
    # Over base models, each model still counts once.
    both = [*greedy, cell("b", 0, 0.0, 0.0, 0.0, 0.0), cell("b", 1, 0.0, 0.0, 0.0, 0.0)]
    assert estimate(both, "accuracy", "models").interval == student([0.75, 0.0])  # type: ignore[union-attr]
    # One seed of several gives no interval.
    assert estimate(greedy[:1], "accuracy", "seeds").interval is None  # type: ignore[union-attr]


def test_differences_between_identical_seeds() -> None:
    ours = [cell("a", seed, 1.0, 1.0, 1.0, 0.0) for seed in range(3)]
    theirs = [cell("a", seed, 1.0, 0.0, 1.0, 0.0) for seed in range(3)]
    found = difference(ours, theirs, "accuracy", "seeds")
    assert found is not None
    assert (found.mean, found.cells) == (0.25, 3)
    assert found.interval == student([0.0, 1.0, 0.0, 0.0], (-1, 1))
    same = difference(ours, ours, "accuracy", "seeds")
    assert same is not None
    assert (same.mean, same.interval) == (0.0, None)
    # Different episodes with the same mean by chance: an interval of zero width would be wrong.
    by_chance = [cell("a", 0, 1.0, 0.0), cell("a", 1, 0.0, 1.0)]
    assert estimate(by_chance, "accuracy", "seeds").interval is None  # type: ignore[union-attr]


# -- a whole table --------------------------------------------------------------------------------------------------


def by_seed(c: Cell, iteration: int | None) -> tuple[list[float], list[float]]:
    """Of three tasks, GRPO solves one, Skill-SD two or (with a seed above 0) three, and the base none."""
    if c.method == "base":
        return [0, 0, 0], [0, 0, 0]
    if c.method == "grpo":
        return [1, 0, 0], [1, 0, 0]
    return [1, 1, float(c.seed > 0)], [1, 1, 1]


def test_a_table_of_seeds(make_sweep: Any) -> None:
    sweep = make_sweep(seeds=range(3), episodes=[24, 72])
    fill(sweep, by_seed)
    check(sweep)
    found = summarise(sweep)
    assert (found["unit"], found["against"], list(found["budgets"])) == ("seeds", "grpo", ["24", "72"])
    row = found["budgets"]["72"]["skill-sd"]
    assert row["accuracy"] == pytest.approx((2 / 3 + 1 + 1) / 3)
    assert row["greedy_accuracy"] == 1
    assert (row["seeds"], row["models"], row["cells"], row["cells_asked"]) == (3, 1, 3, 3)
    assert (row["episodes"], row["seconds"]) == (72, 12.0)
    assert found["budgets"]["24"]["skill-sd"]["seconds"] == 4.0
    # Against grpo's 1/3: 1/3, 2/3, 2/3; s^2 = 1/27, standard error 1/9
    accuracy = row["difference"]["accuracy"]
    assert (accuracy["mean"], accuracy["pairs"]) == (pytest.approx(5 / 9), 3)
    assert accuracy["interval"] == pytest.approx((5 / 9 - T_2 / 9, 1.0))
    [model] = sweep.models
    assert row["by_model"][model]["accuracy_by_seed"] == {"0": pytest.approx(2 / 3), "1": 1, "2": 1}
    assert row["by_model"][model]["difference"]["accuracy"] == accuracy
    assert "difference" not in found["budgets"]["72"]["grpo"]
    assert found["budgets"]["72"]["base"]["difference"]["accuracy"]["mean"] == pytest.approx(-1 / 3)


def test_a_limit_keeps_evenly_spaced_tasks(make_sweep: Any) -> None:
    fill(make_sweep(), lambda c, iteration: ([0, 1, 0], [0, 1, 0]))
    sweep = make_sweep(limit=1)
    row = summarise(sweep)["budgets"]["72"]["skill-sd"]
    assert row["accuracy"] == 1  # the middle one
    assert row["interval"] == mean_interval([1.0])
    shown = write(sweep, Console(quiet=True))
    assert (shown["tasks"], shown["fingerprint"]) == (1, sweep.panels[0]["test"] + ":1 spread")
    assert "1 of the 3 tasks of 'test', evenly spaced" in (sweep.out / "table.md").read_text()


def test_the_bases_greedy_results_are_the_same_for_all_seeds(make_sweep: Any) -> None:
    sweep = make_sweep(seeds=range(3))
    fill(sweep, lambda c, iteration: ([float(c.seed == i) for i in range(3)], [1, 0, 0]))
    row = summarise(sweep)["budgets"]["72"]["base"]
    assert row["greedy_interval"] == mean_interval([1.0, 0.0, 0.0])
    assert row["by_model"][next(iter(sweep.models))]["greedy_interval"] == row["greedy_interval"]


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer_config.json", "chat_template.jinja"])
def test_a_base_model_that_changed_on_disk_is_refused(
    make_sweep: Any, tiny_model: Path, tmp_path: Path, file: str
) -> None:
    """Its evaluation would be taken up again although the same command would give another one."""
    folder = shutil.copytree(tiny_model, tmp_path / "copy")
    sweep = make_sweep(models=[str(folder)])
    fill(sweep, by_seed)
    check(sweep)
    (folder / file).write_bytes(b"another")
    with pytest.raises(UserError, match=r"of the base model 'copy' differ between .* and its folder now"):
        check(sweep)


def test_commits_and_versions_of_the_runs(make_sweep: Any) -> None:
    sweep = make_sweep(methods=["grpo"], seeds=range(3))
    fill(sweep, by_seed)

    def made(commit: str, torch: str) -> Callable[[Any], Any]:
        return lambda m: m | {"commit": commit, "versions": {"torch": torch, "peft": None}}

    for place in range(2):
        edit(sweep.cells[2 * place + 1].folder / "manifest.json", made("b" * 40, "2.9"))
    edit(sweep.cells[5].folder / "manifest.json", made("b" * 40, "2.9"))
    assert summarise(sweep)["made_with"] == {
        "commits": ["b" * 40],
        "versions": {"peft": ["none"], "torch": ["2.9"]},
    }
    assert show.notes(summarise(sweep)) == []
    edit(sweep.cells[5].folder / "manifest.json", made("a" * 40, "2.10"))
    console = Console(record=True, width=400, file=io.StringIO())
    summary = write(sweep, console)
    assert summary["made_with"]["commits"] == ["a" * 40, "b" * 40]
    note = f"Made with more than one version: commit {'a' * 40}, {'b' * 40}; torch 2.10, 2.9"
    assert note in console.export_text()
    assert note in (sweep.out / "table.md").read_text()
    assert json.loads((sweep.out / "table.json").read_text())["made_with"] == summary["made_with"]


def test_a_row_with_fewer_episodes_is_marked(make_sweep: Any, tmp_path: Path) -> None:
    (tmp_path / "v.yaml").write_text("probes: {method: skill-sd, skills.credit: uplift, skills.uplift_episodes: 2}")
    sweep = make_sweep(variants=str(tmp_path / "v.yaml"), methods=["grpo", "probes"], episodes=[36])
    fill(sweep, by_seed)
    write(sweep, Console(quiet=True))
    assert "N of M" not in (sweep.out / "table.md").read_text()
    fewer_episodes(sweep)
    write(sweep, Console(quiet=True))
    whole, _, differences = (sweep.out / "table.md").read_text().partition("**Difference")
    for text, row in ((whole, "| 32 of 36 |"), (differences, "| probes (32 of 36 episodes) |")):
        assert row in text
        assert 'A row with "N of M" episodes' in text
    assert "| 36 |" in whole


def test_a_table_of_models_is_written_and_shown(make_sweep: Any, two_models: list[str], tmp_path: Path) -> None:
    sweep = make_sweep(seeds=range(2), models=two_models)
    fill(sweep, by_seed)
    # A missing cell is left out and counted.
    sweep.cells[-1].evaluation("test").unlink()
    write(sweep, Console(quiet=True))
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    assert found["unit"] == "models"
    assert found["models"]["two"] == {"name": two_models[1], "weights": "w-two"}
    row = found["budgets"]["72"]["skill-sd"]
    assert (row["cells"], row["cells_asked"]) == (3, 4)
    # one: (2/3 + 1) / 2 - 1/3 = 1/2; two: 2/3 - 1/3 = 1/3
    assert row["difference"]["accuracy"]["mean"] == pytest.approx(5 / 12)
    assert row["difference"]["accuracy"]["interval"] == pytest.approx([5 / 12 - T_1 / 12, 1.0])
    assert row["by_model"]["two"]["difference"]["accuracy"] == {
        "mean": pytest.approx(1 / 3),
        "interval": None,
        "pairs": 1,
    }
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "out" / "table.md").read_text()
    assert "2 independently trained base models" in text
    assert "| 3 of 4 |" in text
    assert "| skill-sd | one |" in text
    assert all(line.startswith(("|", "*", "Paired", "Intervals", "Made by")) for line in text.split("\n") if line)
    assert len(show.tables(sweep, found)) == 3


def test_an_empty_sweep(make_sweep: Any) -> None:
    sweep = make_sweep(episodes=[24, 72])
    sweep.out.mkdir()
    shown = write(sweep, Console(quiet=True))
    assert shown["budgets"]["24"]["grpo"]["accuracy"] is None
    assert "0 of 1" in (sweep.out / "table.md").read_text()


def test_many_methods_have_distinct_lines(tmp_path: Path) -> None:
    from skillsd.report.pictures import COLOURS, LINES, cost_curves

    records = [{"episodes": e, "seconds": e / 2, "eval/accuracy": e / 100} for e in (0, 24, 48)]
    cost_curves({f"m{i}": [records] * 2 for i in range(20)}, tmp_path / "c.png", title="t", split="tune")
    assert len(COLOURS) * len(LINES) >= 32


# -- checks ---------------------------------------------------------------------------------------------------------


def change_panel(sweep: Any) -> None:
    edit(sweep.cells[2].folder / "manifest.json", lambda m: m["panels"].update(train="another"))


def change_all_panels(sweep: Any) -> None:
    for c in sweep.cells[1:]:
        edit(c.folder / "manifest.json", lambda m: m["panels"].update(tune="another"))


def change_weights(sweep: Any) -> None:
    edit(sweep.cells[2].folder / "manifest.json", lambda m: m["model"].update(weights="others"))


def change_evaluated_weights(sweep: Any) -> None:
    edit(
        sweep.cells[0].evaluation("test"),
        lambda records: [r | {"model": {**r["model"], "weights": "x"}} for r in records],
    )


def change_budget(sweep: Any) -> None:
    edit(sweep.cells[2].evaluation("test"), lambda r: [x | {"budget": {**x["budget"], "turn_tokens": 9}} for x in r])


def more_episodes(sweep: Any) -> None:
    records = [json.loads(line) for line in (sweep.cells[2].folder / "metrics.jsonl").read_text().splitlines()]
    records[-1]["episodes"] += 4
    (sweep.cells[2].folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def fewer_episodes(sweep: Any) -> None:
    records = [json.loads(line) for line in (sweep.cells[2].folder / "metrics.jsonl").read_text().splitlines()]
    records[-1]["episodes"] -= 4
    (sweep.cells[2].folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (change_panel, ["the tasks of 'train' differ between", "skill-sd/seed-0 (another)"]),
        (change_all_panels, ["the tasks of 'tune' differ between", "the current environment"]),
        (change_weights, ["the weights of the base model", "skill-sd/seed-0 (others)"]),
        (change_evaluated_weights, ["the weights of the base model"]),
        (change_budget, ["skill-sd/seed-0 and ", "were evaluated with different settings", "'turn_tokens': 9"]),
    ],
)
def test_results_that_are_not_comparable_are_refused(
    make_sweep: Any, spoil: Callable[[Any], None], expected: list[str]
) -> None:
    sweep = make_sweep()
    fill(sweep, by_seed)
    check(sweep)
    spoil(sweep)
    assert all(state(sweep, c) == "done" for c in sweep.cells)
    with pytest.raises(UserError) as error:
        run_table(sweep, Console(quiet=True))
    for part in ("not comparable", *expected):
        assert part in str(error.value)
    assert not (sweep.out / "table.json").exists()


def another_run(sweep: Any) -> None:
    config = sweep.cells[2].folder / "config.yaml"
    config.write_text(config.read_text().replace("learning_rate: 0.003", "learning_rate: 0.5"))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (more_episodes, "it used 76 episodes up to iteration 6, not 72"),
        (fewer_episodes, "it used 68 episodes up to iteration 6, not 72"),
        (another_run, "training.learning_rate was 0.5, now 0.003"),
    ],
)
def test_an_unusable_cell_is_left_out_with_a_note(
    make_sweep: Any, recipe: str, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Any], None], expected: str
) -> None:
    sweep = make_sweep(seeds=range(2))
    fill(sweep, by_seed)
    assert left_out(sweep) == {}
    spoil(sweep)
    # Other faults of the same cell do not matter.
    edit(sweep.cells[2].folder / "manifest.json", lambda m: m["model"].update(weights="others"))
    console = Console(record=True, width=400, file=io.StringIO())
    assert run_table(sweep, console) is False
    table = json.loads((sweep.out / "table.json").read_text())
    [(name, reason)] = table["left_out"].items()
    assert name.endswith("skill-sd/seed-0")
    assert expected in reason
    rows = table["budgets"]["72"]
    assert (rows["skill-sd"]["cells"], rows["grpo"]["cells"], rows["base"]["cells"]) == (1, 2, 2)
    assert rows["skill-sd"]["difference"]["accuracy"]["pairs"] == 1
    assert f"Left out: {name}: {reason}" in (sweep.out / "table.md").read_text()
    assert f"Left out: {name}: {reason}" in console.export_text()
    show_plan(sweep, console)
    assert f"{name} is left out: {reason}" in console.export_text()
    monkeypatch.setattr("sys.argv", ["skillsd", "table", recipe, "--seeds", "2", "--out", str(sweep.out)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1


def test_no_usable_run_is_an_error(make_sweep: Any) -> None:
    fill(make_sweep(), by_seed)
    other = make_sweep("training.learning_rate=0.5")
    with pytest.raises(UserError, match="no usable run for a table") as error:
        run_table(other, Console(quiet=True))
    assert str(error.value).count("training.learning_rate was 0.003, now 0.5") == 2


def test_one_base_under_two_labels_is_refused(make_sweep: Any, two_models: list[str]) -> None:
    sweep = make_sweep(models=two_models)
    fill(sweep, by_seed, weights=lambda c: "w")
    with pytest.raises(UserError, match=r"'one' and 'two' are the same base model: equal weights \(w\)"):
        check(sweep)


def test_one_base_under_two_labels_is_refused_before_it_is_trained(make_sweep: Any, two_models: list[str]) -> None:
    for name in two_models:
        (Path(name) / "model.safetensors").write_bytes(b"the same")
    with pytest.raises(UserError, match="'one' and 'two' are the same base model"):
        check(make_sweep(models=two_models))
    (Path(two_models[1]) / "model.safetensors").write_bytes(b"others")
    check(make_sweep(models=two_models))


def test_uplift_runs_may_use_fewer_episodes_but_never_more(make_sweep: Any, tmp_path: Path) -> None:
    (tmp_path / "v.yaml").write_text("probes: {method: skill-sd, skills.credit: uplift, skills.uplift_episodes: 2}")
    sweep = make_sweep(variants=str(tmp_path / "v.yaml"), methods=["grpo", "probes"], episodes=[36])
    assert [c.iterations for c in sweep.cells] == [(), (3,), (2,)]
    fill(sweep, lambda c, iteration: ([1, 0, 1], [1, 1, 1]))
    fewer_episodes(sweep)
    check(sweep)
    assert summarise(sweep)["budgets"]["36"]["probes"]["episodes"] == 32
    more_episodes(sweep)
    more_episodes(sweep)
    assert list(left_out(sweep).values()) == ["it used 40 episodes up to iteration 2, not 36"]
