"""The reference of all keys, and the JSON schema."""

from __future__ import annotations

import json
from typing import Any

import pytest

from skillsd import config as configs
from skillsd.config import RunConfig, SftConfig
from skillsd.config.describe import default, find, json_schema, lines, markdown
from skillsd.config.keys import Key, keys
from skillsd.engines import registry
from skillsd.errors import UserError


def names(*arguments: Any, **options: Any) -> list[str]:
    return [key.path for _, _, those in find(*arguments, **options) for key in those]


@pytest.mark.parametrize(("kind", "engine"), [(RunConfig, "torch"), (RunConfig, "vllm"), (SftConfig, "torch")])
def test_every_key_has_a_meaning(kind: Any, engine: str) -> None:
    found = list(keys(kind, engine=engine))
    assert len(found) == len({key.path for key in found}) > 30
    assert [key.path for key in found if not key.meaning.endswith((".", "?"))] == []
    assert [key.path for key in found if "``" in key.meaning or "\n" in key.meaning] == []
    for name, about, _ in find(sft=kind is SftConfig, engine=engine):
        assert about.endswith((".", "?")), name


@pytest.mark.parametrize("kind", [RunConfig, SftConfig])
def test_every_key_of_a_dumped_configuration_is_described(kind: Any) -> None:
    described = {key.path for key in keys(kind)}

    def check(section: dict[str, Any], prefix: str) -> None:
        for name, value in section.items():
            path = f"{prefix}{name}"
            if any(other.startswith(f"{path}.") for other in described) and isinstance(value, dict):
                check(value, f"{path}.")
            else:
                assert path in described

    check(kind(name="x").model_dump(), "")


def test_all_or_one_section_or_key() -> None:
    assert {"name", "method", "model.lora", "model.lora.rank", "objective.terms[].fn"} <= set(names())
    assert set(names("training")) == {path for path in names() if path.startswith("training.")}
    assert names("model.lora") == ["model.lora.rank", "model.lora.alpha", "model.lora.target_modules"]
    assert names("skills.pick") == names("pick") == ["skills.pick"]
    assert names("objective.terms.fn") == ["objective.terms[].fn"]
    assert names("concurrency") == ["rollout.concurrency", "skills.concurrency"]
    assert "warm_start.steps" in names(sft=True)
    assert names("engine") == ["engine.name", "engine.decode", "engine.shard", "engine.rank_seconds"]
    assert "engine.gpu_memory_utilization" in names("engine", engine="vllm")


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("skills.pik", {}, "Did you mean 'skills.pick'?"),
        ("pik", {}, "Did you mean 'skills.pick'?"),
        ("trainning", {}, "Did you mean 'training'?"),
        ("lamda_sdl", {}, "Did you mean 'objective.lambda_sdl'?"),
        ("warm_start", {}, "there is no section or key 'warm_start'"),
        ("skills", {"sft": True}, "Sections: model, model.lora, new, environment, warm_start, check"),
        (None, {"engine": "vlm"}, "unknown engine 'vlm'. Did you mean 'vllm'?"),
    ],
)
def test_a_misspelt_name(name: str | None, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as error:
        find(name, **options)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "null"),
        (True, "true"),
        (3, "3"),
        (1e-6, "1e-06"),
        (0.5, "0.5"),
        ("ucb", "ucb"),
        ([], "[]"),
        ({"name": "torch"}, "{name: torch}"),
    ],
)
def test_defaults_are_written_as_yaml(value: Any, expected: str) -> None:
    assert default(Key("x", value, required=False, kind="", meaning="")) == expected


def test_a_key_as_text() -> None:
    assert list(lines(find("rollout.group_size")))[1:] == [
        "  rollout.group_size = 8   (integer)",
        "      G: episodes per group. Not given in the paper.",
    ]


def test_the_markdown_has_a_row_for_every_key_and_a_table_for_every_engine() -> None:
    text = markdown(RunConfig)
    for key in keys(RunConfig):
        assert f"| `{key.path}` |" in text
    for name in registry.names():
        assert f"### engine ({name})" in text
    assert "(float32 | bfloat16)" not in text  # a bare | would split the cell
    assert "| float32 \\| bfloat16 |" in text


# -- the JSON schema ------------------------------------------------------------------------------------------------


def references(part: Any) -> set[str]:
    if isinstance(part, list):
        return set().union(*map(references, part)) if part else set()
    if not isinstance(part, dict):
        return set()
    own = {part["$ref"]} if isinstance(part.get("$ref"), str) else set()
    return own.union(*map(references, part.values()))


@pytest.mark.parametrize("sft", [False, True])
def test_the_schema_is_complete_json(sft: bool) -> None:
    schema = json_schema(sft=sft)
    assert json.loads(json.dumps(schema, allow_nan=False)) == schema
    assert references(schema) <= {f"#/$defs/{name}" for name in schema["$defs"]}
    assert schema["properties"].keys() == (SftConfig if sft else RunConfig).model_fields.keys()


def validate(data: dict[str, Any], *, sft: bool = False) -> bool:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema(sft=sft)
    jsonschema.Draft202012Validator.check_schema(schema)
    return bool(jsonschema.Draft202012Validator(schema).is_valid(data))


@pytest.mark.parametrize("name", configs.recipes())
def test_shipped_recipes_are_valid_by_the_schema(name: str) -> None:
    data = configs.read(name)
    assert validate(data, sft="warm_start" in data)


@pytest.mark.parametrize(
    ("data", "valid"),
    [
        ({}, False),
        ({"name": "a", "trainig": {}}, False),
        ({"name": "a", "training": {"iterations": -1}}, False),
        ({"name": "a", "skills": {"pick": "usb"}}, False),
        ({"name": "a", "skills": {"pick": "my.rules:Mine"}}, True),
        ({"name": "a", "model": {"lora": None}}, True),
        ({"name": "a", "engine": {"name": "vllm", "python": "x", "learner": {"name": "torch"}}}, True),
        ({"name": "a", "engine": {"python": "x"}}, False),
        ({"name": "a", "engine": {"name": "torch", "python": "x"}}, False),
        ({"name": "a", "engine": {"name": "my.engine:Options", "python": "x"}}, True),
    ],
)
def test_what_the_schema_accepts(data: dict[str, Any], valid: bool) -> None:
    assert validate(data) == valid
