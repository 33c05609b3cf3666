"""An engine's section of the recipe: found by name, typed, and checked before a model is loaded."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from skillsd.config import RunConfig, load
from skillsd.engines import options as module
from skillsd.engines import registry
from skillsd.engines.base import Engine
from skillsd.engines.options import Capabilities, EngineOptions, EngineSpec
from skillsd.engines.torch.options import TorchOptions
from skillsd.engines.vllm.options import VllmOptions
from skillsd.errors import UserError
from skillsd.runs.checks import check_config

CAPABILITIES = [field.name for field in dataclasses.fields(Capabilities)]


class Weak(EngineOptions):
    """An engine that can do nothing optional. In recipes: ``engines.test_options:Weak``."""

    capabilities: ClassVar[Capabilities] = Capabilities()

    address: str = "localhost"
    retries: int = 3

    def build(self, spec: EngineSpec) -> Engine:
        raise AssertionError("it must be refused before it is built")


class Able(Weak):
    """And one that can do everything."""

    capabilities: ClassVar[Capabilities] = Capabilities(**dict.fromkeys(CAPABILITIES, True))


WEAK = "engines.test_options:Weak"


# -- capabilities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_missing_capability_is_refused_with_the_setting_that_needs_it(capability: str) -> None:
    spec = EngineSpec("model", seed=0, needs={capability: "some.setting=1"})
    with pytest.raises(UserError, match=r"some\.setting=1 needs .+, which the engine 'weak' can't do.*engine\.name"):
        Weak(name="weak").check(spec)
    Able(name="able").check(spec)
    Weak(name="weak").check(dataclasses.replace(spec, needs={}))


def test_every_capability_is_described_in_words() -> None:
    assert list(module._IN_WORDS) == CAPABILITIES


RECIPES: dict[str, tuple[dict[str, Any], str]] = {
    "distribution": ({"objective": {"estimator": "reverse_kl"}}, r"objective\.estimator=reverse_kl needs log-probs"),
    "temperature": ({"rollout": {"temperature": 0.7}}, r"rollout\.temperature=0\.7 needs a temperature"),
    "teacher_average": ({"teacher": {"ema": 0.9}}, r"teacher\.ema=0\.9 needs .* moving average"),
    "teacher_snapshot": ({"teacher": {"sync_every": 3}}, r"teacher\.sync_every=3 needs a teacher with weights of its"),
    "teacher_snapshot of a frozen teacher": ({"method": "skill-sd-frozen"}, "method=skill-sd-frozen needs a teacher"),
    "teacher_external": (
        {"method": "opd-external", "teacher": {"model": "x"}},
        "method=opd-external needs .* another model",
    ),
    "teacher_sampling": ({"method": "teacher-rollouts"}, "method=teacher-rollouts needs rollouts by the teacher"),
    "lora": ({"model": {"lora": {"rank": 4}}}, r"model\.lora needs LoRA"),
    "lora of an adapter": ({"model": {"adapter": "folder"}}, r"model\.adapter needs LoRA"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_that_needs_too_much_is_refused_at_the_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, words = RECIPES[name]
    plain = {"name": "x", "method": "skill-sd"}

    def config(engine: type[EngineOptions], **settings: Any) -> RunConfig:
        given = {"engine": {"name": f"engines.test_options:{engine.__name__}"}}
        return RunConfig.model_validate({**plain, **given, **settings})

    check_config(config(Weak))
    check_config(config(Able, **settings))
    with pytest.raises(UserError, match=rf"{words}.*'{WEAK}'"):
        check_config(config(Weak, **settings))
    lacking = name.split()[0]
    able = dataclasses.replace(Able.capabilities, **{lacking: False})
    monkeypatch.setattr(Able, "capabilities", able)
    with pytest.raises(UserError, match=words):
        check_config(config(Able, **settings))


# -- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["engine.max_model_len=100"], r"engine\.max_model_len is an option of the engine 'vllm'.*'torch'"),
        ([f"engine.name={WEAK}", "engine.python=x"], rf"engine\.python is an option of the engine 'vllm'.*'{WEAK}'"),
        (["engine.no_such_key=1"], r"engine\.no_such_key"),
        ([f"engine.name={WEAK}", "engine.retries=many"], r"engine\.retries"),
        (["engine.name=vlm"], "unknown engine 'vlm'.*'vllm'"),
        (["engine.name=engines.test_options:CAPABILITIES"], "expected a subclass of .*EngineOptions"),
        (["engine.name=engines.test_options:Missing"], "can't be imported"),
    ],
)
def test_bad_engine_section_is_an_error(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load(RunConfig, "sokoban-nano", overrides)


def test_engines_own_keys_are_typed() -> None:
    config = load(RunConfig, "sokoban-nano", [f"engine.name={WEAK}", "engine.retries=5"])
    assert config.engine == Weak(name=WEAK, retries=5)
    assert registry.owners("max_model_len") == ["vllm"]
    assert registry.owners("retries") == []  # it is not registered
    assert {"torch", "vllm"} <= set(registry.names())
    assert RunConfig(name="x").engine == TorchOptions()


def test_vllm_names_its_learner_as_a_section_of_its_own() -> None:
    section = {"name": "vllm", "learner": {"name": WEAK, "address": "elsewhere"}}
    options = registry.options(section)
    assert isinstance(options, VllmOptions)
    assert options.learner == Weak(name=WEAK, address="elsewhere")
    assert registry.options(options.model_dump()) == options
    assert options.for_learner() is options.learner
    with pytest.raises(ValidationError, match="extra"):
        registry.options({"name": "vllm", "learner": {"name": WEAK, "python": "x"}})


def test_only_what_changes_results_is_compared_on_resume() -> None:
    assert Weak(name=WEAK).resume_key() == {"name": WEAK, "address": "localhost", "retries": 3}
    vllm = VllmOptions(python="/a", learner=Weak(name=WEAK))
    assert vllm.resume_key() == VllmOptions(python="/b", max_model_len=99, learner=Weak(name=WEAK)).resume_key()
    assert vllm.resume_key() != VllmOptions(learner=Weak(name=WEAK, retries=9)).resume_key()
    assert vllm.resume_key() != VllmOptions().resume_key()
