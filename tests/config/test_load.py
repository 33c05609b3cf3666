"""Loading recipes, and the error messages for mistakes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skillsd import config as configs
from skillsd.config import ObjectiveSection, RunConfig, SftConfig, SummariserSection, load, schema
from skillsd.config.skills import PICKING_RULES, SUMMARISERS
from skillsd.engines.vllm.options import VllmOptions
from skillsd.errors import UserError
from skillsd.objective import ESTIMATORS
from skillsd.objective.objective import SCHEDULES
from skillsd.runs.checks import check_config
from skillsd.skills.ucb import picking_rule

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


# -- valid recipes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", configs.recipes())
def test_every_shipped_recipe_loads(name: str) -> None:
    warm_start = "warm_start" in (configs.RECIPES / f"{name}.yaml").read_text()
    loaded = load(SftConfig, name) if warm_start else load(RunConfig, name)
    assert loaded.name == name


def test_the_names_in_the_configuration_are_those_in_the_code(recipe: Any) -> None:
    assert set(schema.ESTIMATORS) == set(ESTIMATORS)
    assert set(get_args(ObjectiveSection.model_fields["lambda_schedule"].annotation)) == set(SCHEDULES)
    for name in PICKING_RULES:
        assert picking_rule(name)
    with pytest.raises(UserError) as error:
        picking_rule("no-such-rule")
    assert str(error.value).endswith(f"Known: {', '.join(sorted(PICKING_RULES))}")
    for name in SUMMARISERS:
        model = ["summariser.model=m"] if name == "openai" else []
        check_config(load(RunConfig, recipe(), [f"skills.summariser={name}", *model]))


@pytest.mark.parametrize(
    "override",
    ["skills.pick=my.rules:Mine", "skills.summariser=my.writers:Mine", "objective.estimator=my.estimators:k4"],
)
def test_custom_code_is_named_by_module_and_attribute(recipe: Any, override: str) -> None:
    """It is imported when the run is put together, not when its recipe is read."""
    section, _, key = override.partition("=")[0].partition(".")
    config = load(RunConfig, recipe(), [override])
    assert getattr(getattr(config, section), key) == override.partition("=")[2]


def test_the_options_of_an_engine_are_its_section(recipe: Any) -> None:
    config = load(RunConfig, recipe(), ["engine.name=vllm", "engine.max_model_len=99", "engine.learner={name: torch}"])
    assert isinstance(config.engine, VllmOptions)
    assert config.engine.max_model_len == 99
    assert load(RunConfig, recipe()).engine.name == "torch"


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


def test_overrides_of_a_missing_section(recipe: Any) -> None:
    lora = load(RunConfig, recipe(), ["model.lora.rank=8", "model.lora.target_modules=[q_proj, v_proj]"]).model.lora
    assert lora is not None
    assert (lora.rank, lora.target_modules) == (8, ["q_proj", "v_proj"])
    assert load(RunConfig, recipe(), ["model.lora.rank=8", "model.lora=null"]).model.lora is None


def test_the_last_override_wins_and_other_values_stay(recipe: Any) -> None:
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
def test_a_dumped_configuration_loads_as_the_same(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]
) -> None:
    config = RunConfig.model_validate(data)
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(configs.dump(config), encoding="utf-8")
    assert load(RunConfig, str(path)) == config


# -- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
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
        ("objective.estimator=k4", "Did you mean 'k3'? Known: forward_kl, iw_k1, iw_k3"),
        ("training..iterations=3", "unknown key 'training.'"),
        ("name=a/b", "name is 'a/b': must be usable as a folder name"),
        ("name=.hidden", "name is '.hidden'"),
        ("seed=-1", "seed is -1"),
        ("iterations", "is not an override: write key=value"),
        ("=3", "is not an override"),
        ("training={", "not readable as YAML"),
        ("lamda_sdl=3", "Did you mean 'objective.lambda_sdl'?"),
        ("objective.lamda_sdl=3", "Did you mean 'objective.lambda_sdl'?"),
        ("objectve.lambda_sdl=3", "unknown key 'objectve'. Did you mean 'objective'?"),
        ("objective.terms=3", "objective.terms is 3"),
        ("objective.terms=[3]", "objective.terms[0] is 3, expected keys and values"),
        ("objective.terms=[{name: x}]", "the key 'objective.terms[0].fn' is missing"),
        ("objective.terms=[{name: x, fn: a:b, wieght: 1}]", "Did you mean 'objective.terms[0].weight'?"),
        (
            "skills.pick=usb",
            "Did you mean 'ucb'? Known: best, last, random, ucb, ucb-prior; or module:Class for your own",
        ),
        ("skills.summariser=my.writers", "unknown summariser 'my.writers'"),
        ("engine.name=vlm", "unknown engine 'vlm'. Did you mean 'vllm'? Known: tinker, torch, vllm"),
        ("engine.name=no.such:Engine", "engine 'no.such:Engine' can't be imported"),
        (
            "training.micro_batch_tokens=lots",
            "input should be a valid integer, unable to parse string as an integer, or 'auto'",
        ),
        ("engine.name=pathlib:Path", "expected a subclass of skillsd.engines.options.EngineOptions"),
        ("engine.name=3", "engine.name is 3, expected the name of an engine"),
        ("engine=3", "engine is 3: expected keys and values"),
        ("engine.python=x", "engine.python is an option of the engine 'vllm', but engine.name is 'torch'"),
        ("engine={name: vllm, pythn: x}", "Did you mean 'engine.python'?"),
        ("engine={name: vllm, learner: {nme: x}}", "Did you mean 'engine.learner.name'?"),
        ("engine={name: vllm, learner: {name: trch}}", "unknown engine 'trch'. Did you mean 'torch'?"),
        ("engine={name: vllm, gpu_memory_utilization: 2}", "engine.gpu_memory_utilization is 2"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(recipe: Any, override: str, expected: str) -> None:
    message = problem(recipe(), override)
    assert expected in message
    assert "\n" not in message
    assert "pydantic" not in message


def test_an_override_below_a_value(recipe: Any) -> None:
    assert "'seed' is a value" in problem(recipe("name: a\nseed: 3\n"), "seed.x=1")


def test_several_mistakes_get_a_line_each(recipe: Any) -> None:
    lines = problem(recipe(), "seed=-1", "training.iteratons=3").splitlines()
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty, expected keys and values"),
        ("- a\n- b\n", "contains a list"),
        ("name: [\n", "not readable YAML"),
        ("# only a comment\n", "is empty, expected keys and values"),
        ("name: a\nseed: 1\nseed: 2\n", "the key 'seed' is given twice, in line 2 and in line 3"),
        ("name: a\ntraining: {}\ntraining: {}\n", "the key 'training' is given twice, in line 2 and in line 3"),
        ("name: a\nx: 2024-13-45\n", "not readable YAML"),
        ("name: a\n? [b]\n: 1\n", "not readable YAML"),
        ("seed: 3\n", "the key 'name' is missing"),
        ("name: a\n1: 2\n", "the key 1 is not text"),
        ("name: a\ntraining: {1: 2}\n", "the key 1 of training is not text"),
        ("name: a\ntraining:\n", "training is None, expected keys and values"),
        ("name: a\nwarm_start: {steps: 3}\n", "is for `skillsd sft`, not for `skillsd train`"),
    ],
)
def test_a_file_that_is_not_a_recipe(recipe: Any, text: str, expected: str) -> None:
    message = problem(recipe(text))
    assert expected in message
    assert "\n" not in message


def test_a_recipe_of_the_other_kind() -> None:
    assert "is for `skillsd sft`" in problem("nano-base")
    assert "is for `skillsd train`" in problem("sokoban-nano", kind=SftConfig)


def test_paths_that_are_not_recipes(tmp_path: Path) -> None:
    assert "is a folder" in problem(str(tmp_path))
    assert "Did you mean 'sokoban-nano'" in problem("sokoban-nan")
    assert "there is no recipe file" in problem(str(tmp_path / "none.yaml"))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"name: \xff\xfe\x00")
    message = problem(str(binary))
    assert "not readable YAML" in message
    assert "\n" not in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_a_recipe_without_read_permission(tmp_path: Path) -> None:
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
    ("override", "expected"),
    [
        ("skills.summariser=gpt", "Known: openai, policy, rules"),
        ("summariser.modle=x", "Did you mean 'summariser.model'?"),
        ("summariser.api_key=sk-123", "unknown key 'summariser.api_key'"),
        ("summariser.api_key_env=sk-123", "the name of an environment variable, not the key itself"),
        ("summariser.base_url=localhost:8000", "such as http://localhost:8000/v1"),
        ("summariser.base_url=https://me:sk-123@host/v1", "environment variable"),
        ("summariser.base_url=https://host/v1?key=sk-123", "environment variable"),
        ("summariser.base_url=http://localhost:80o0/v1", "up to 65535"),
        ("summariser.base_url=http://localhost:99999/v1", "up to 65535"),
        ("summariser.base_url=http://[::1/v1", "not usable"),
        ("summariser.request={x: 2024-01-01}", "'x' can't be written as JSON"),
        ("summariser.request={x: {y: [.inf]}}", "'x' can't be written as JSON"),
        ("model.chat_template_kwargs={day: 2024-01-01}", "'day' can't be written as JSON"),
        ("summariser.max_retries=-1", "greater than or equal to 0"),
    ],
)
def test_mistakes_in_the_summariser(recipe: Any, override: str, expected: str) -> None:
    message = problem(recipe(), override)
    assert expected in message
    assert "sk-123" not in message  # the error must not repeat an API key
