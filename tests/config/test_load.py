"""Recipes: what loads, and what a mistake is told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skillsd import config as configs
from skillsd.config import ObjectiveSection, RunConfig, SftConfig, SummariserSection, load
from skillsd.errors import UserError
from skillsd.objective import ESTIMATORS, SCHEDULES

RUN = "name: mine\n"
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=5)


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    def write(text: str = RUN) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def problem(recipe: str, *overrides: str, kind: Any = RunConfig) -> str:
    with pytest.raises(UserError) as error:
        load(kind, recipe, overrides)
    return str(error.value)


# -- what is right --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", configs.recipes())
def test_every_shipped_recipe_loads(name: str) -> None:
    warm_start = "warm_start" in (configs.RECIPES / f"{name}.yaml").read_text()
    loaded = load(SftConfig, name) if warm_start else load(RunConfig, name)
    assert loaded.name == name


def test_names_in_the_configuration_are_those_of_the_objective() -> None:
    fields = ObjectiveSection.model_fields
    assert set(get_args(fields["estimator"].annotation)) == set(ESTIMATORS)
    assert set(get_args(fields["lambda_schedule"].annotation)) == set(SCHEDULES)


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("training.learning_rate=1e-4", "training", "learning_rate", 1e-4),
        ("training.learning_rate=2.5E-3", "training", "learning_rate", 2.5e-3),
        ("training.iterations=1e3", "training", "iterations", 1000),
        ("training.max_grad_norm=.inf", "training", "max_grad_norm", float("inf")),
        ("evaluation.limit=null", "evaluation", "limit", None),
        ("evaluation.limit=", "evaluation", "limit", None),
        ("evaluation.greedy=true", "evaluation", "greedy", True),
        ("environment.options.preset=paper", "environment", "options", {"preset": "paper"}),
        ("environment.options.a.b=[1, x]", "environment", "options", {"a": {"b": [1, "x"]}}),
        ("environment.options={p: 1e-4}", "environment", "options", {"p": "1e-4"}),
        ("log.wandb=a=b", "log", "wandb", "a=b"),
    ],
)
def test_overrides(recipe: Any, override: str, section: str, key: str, value: object) -> None:
    assert getattr(getattr(load(RunConfig, recipe(), [override]), section), key) == value


def test_overrides_of_a_section_that_is_not_there(recipe: Any) -> None:
    lora = load(RunConfig, recipe(), ["model.lora.rank=8", "model.lora.target_modules=[q_proj, v_proj]"]).model.lora
    assert lora is not None
    assert (lora.rank, lora.target_modules) == (8, ["q_proj", "v_proj"])
    assert load(RunConfig, recipe(), ["model.lora.rank=8", "model.lora=null"]).model.lora is None


def test_the_last_override_wins_and_others_stay(recipe: Any) -> None:
    text = "name: mine\ntraining: {iterations: 7, learning_rate: 1e-5}\n"
    training = load(RunConfig, recipe(text), ["training.iterations=1", "training.iterations=2"]).training
    assert (training.iterations, training.learning_rate) == (2, 1e-5)


@settings(deadline=None, max_examples=40)
@given(
    st.builds(
        dict,
        name=st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=9).filter(
            lambda name: "/" not in name and not name.startswith(".")
        ),
        seed=st.integers(0, 2**40),
        method=st.sampled_from(["grpo", "skill-sd"]),
        objective=st.fixed_dictionaries({"lambda_sdl": st.none() | st.floats(0, 1e9), "clip_low": st.floats(0, 1)}),
        environment=st.fixed_dictionaries(
            {"options": st.dictionaries(WORDS, st.none() | st.booleans() | st.floats(allow_nan=False))}
        ),
        model=st.fixed_dictionaries(
            {"lora": st.none() | st.fixed_dictionaries({"target_modules": st.lists(WORDS, max_size=3)})}
        ),
    )
)
def test_what_is_dumped_is_loaded_again(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]) -> None:
    config = RunConfig.model_validate(data)
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(configs.dump(config), encoding="utf-8")
    assert load(RunConfig, str(path)) == config


# -- what is wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.iteratons=3", "'training.iterations'"),
        ("trainin.iterations=3", "'training'"),
        ("iterations=3", "'training.iterations'"),
        ("objective.learning_rate=3", "'training.learning_rate'"),
        ("method=skillsd", "Did you mean 'skill-sd'"),
        ("rollout.group_size=1", "rollout.group_size is 1: input should be greater than or equal to 2"),
        ("training.iterations=many", "training.iterations is 'many': input should be a valid integer"),
        ("training.learning_rate=.inf", "finite"),
        ("skills.ucb_c=.nan", "skills.ucb_c is nan"),
        ("training.iterations.x=3", "training.iterations"),
        ("training=3", "training is 3, expected keys and values"),
        ("model.lora=3", "model.lora is 3, expected keys and values"),
        ("model.lora.target_modules=5", "model.lora.target_modules is 5"),
        ("objective.estimator=k4", "'iw_k3'"),
        ("training..iterations=3", "unknown key 'training.'"),
        ("name=a/b", "name is 'a/b': must be usable as a folder's name"),
        ("name=.hidden", "name is '.hidden'"),
        ("seed=-1", "seed is -1"),
        ("iterations", "is no override: write key=value"),
        ("=3", "is no override"),
        ("training={", "not readable as YAML"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(recipe: Any, override: str, told: str) -> None:
    message = problem(recipe(), override)
    assert told in message
    assert "\n" not in message
    assert "pydantic" not in message


def test_an_override_below_a_value(recipe: Any) -> None:
    assert "'seed' is a value" in problem(recipe("name: a\nseed: 3\n"), "seed.x=1")


def test_several_mistakes_get_a_line_each(recipe: Any) -> None:
    lines = problem(recipe(), "seed=-1", "training.iteratons=3").splitlines()
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds NoneType, expected keys and values"),
        ("- a\n- b\n", "holds list"),
        ("name: [\n", "not readable YAML"),
        ("seed: 3\n", "the key 'name' is missing"),
        ("name: a\n1: 2\n", "the key 1 is no name"),
        ("name: a\ntraining: {1: 2}\n", "the key 1 of training is no name"),
        ("name: a\ntraining:\n", "training is None, expected keys and values"),
        ("name: a\nwarm_start: {steps: 3}\n", "is one for `skillsd sft`, not for `skillsd train`"),
    ],
)
def test_a_recipe_that_is_none(recipe: Any, text: str, told: str) -> None:
    message = problem(recipe(text))
    assert told in message
    assert "\n" not in message


def test_a_recipe_of_the_other_kind() -> None:
    assert "is one for `skillsd sft`" in problem("nano-base")
    assert "is one for `skillsd train`" in problem("sokoban-nano", kind=SftConfig)


def test_paths_that_are_no_recipes(tmp_path: Path) -> None:
    assert "is a folder" in problem(str(tmp_path))
    assert "Did you mean 'sokoban-nano'" in problem("sokoban-nan")
    assert "there is no recipe file" in problem(str(tmp_path / "none.yaml"))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"name: \xff\xfe\x00")
    message = problem(str(binary))
    assert "not readable YAML" in message
    assert "\n" not in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_recipe_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "secret.yaml"
    path.write_text(RUN)
    path.chmod(0)
    assert "can't be read" in problem(str(path))


# -- the summariser -------------------------------------------------------------------------------------------------


def test_a_cost_needs_a_price() -> None:
    assert SummariserSection().cost(10, 10) is None
    assert SummariserSection(price_in=2).cost(500_000, 10) == 1.0
    assert SummariserSection(price_in=2, price_out=8).cost(500_000, 250_000) == 3.0


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("skills.summariser=gpt", "'rules', 'openai' or 'policy'"),
        ("summariser.modle=x", "Did you mean 'summariser.model'?"),
        ("summariser.api_key=sk-123", "unknown key 'summariser.api_key'"),
        ("summariser.api_key_env=sk-123", "the name of an environment variable, not the key itself"),
        ("summariser.base_url=localhost:8000", "such as http://localhost:8000/v1"),
        ("summariser.base_url=https://me:sk-123@host/v1", "environment variable instead"),
        ("summariser.base_url=https://host/v1?key=sk-123", "environment variable instead"),
        ("summariser.base_url=http://localhost:80o0/v1", "its port has to be a number"),
        ("summariser.base_url=http://localhost:99999/v1", "its port has to be a number"),
        ("summariser.base_url=http://[::1/v1", "not usable"),
        ("summariser.request={x: 2024-01-01}", "'x' has to be JSON"),
        ("summariser.request={x: {y: [.inf]}}", "'x' has to be JSON"),
        ("model.chat_template_kwargs={day: 2024-01-01}", "'day' has to be JSON"),
        ("summariser.max_retries=-1", "greater than or equal to 0"),
    ],
)
def test_what_is_wrong_with_a_summariser(recipe: Any, override: str, said: str) -> None:
    message = problem(recipe(), override)
    assert said in message
    assert "sk-123" not in message  # a key in the wrong place is not repeated
