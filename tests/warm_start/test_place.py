"""Where a skill stands in the warm start's prompts and in its check: as in the later run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_env import Toy

from skillsd.config import CheckSection, SftConfig
from skillsd.engines.options import EngineSpec
from skillsd.engines.torch.options import TorchOptions
from skillsd.prompting.renderer import ChatRenderer
from skillsd.prompting.templates import load_template
from skillsd.types import Demonstration, DemonstrationTurn, Message, Skill, Task
from skillsd.warm_start import sft
from skillsd.warm_start.check import skill_following

TASK = Task("train-0", "toy", "train", {"target": "Up", "loses": "Down"})
SKILL = Skill("", "", "@r1c1 Up")
CASES = [("before", " Workflow: @r1c1 Up Sokoban: @r0c0"), ("after", " Sokoban: @r0c0 Workflow: @r1c1 Up")]


class Shown(Toy):
    """With demonstrations and golden skills."""

    def demonstrations(self, split: str, *, seed: int, **options: Any) -> Iterator[Demonstration]:
        turns = (DemonstrationTurn("Up", "Solved"),)
        while True:
            yield Demonstration(TASK, (Message("user", "Sokoban: @r0c0"),), turns, SKILL)
            yield Demonstration(TASK, (Message("user", "Sokoban: @r0c0"),), turns)

    def golden_skill(self, task: Task) -> Skill:
        return SKILL


@pytest.mark.parametrize(("place", "prompt"), CASES)
def test_demonstrations(tiny_model: Path, tmp_path: Path, place: str, prompt: str, monkeypatch: Any) -> None:
    made: list[str] = []
    make_item = sft.make_item

    def watch(demonstration: Demonstration, renderer: ChatRenderer, *rest: Any) -> Any:
        item = make_item(demonstration, renderer, *rest)
        made.append(renderer.text(item.sequence.tokens))
        return item

    monkeypatch.setattr(sft, "make_item", watch)
    settings = {
        "name": "x",
        "model": {"name": str(tiny_model), "device": "cpu"},
        "warm_start": {"steps": 1, "batch": 2, "template": "teacher_terse", "place": place},
    }
    asyncio.run(sft.train(SftConfig.model_validate(settings), Shown(), tmp_path, lambda progress: None))
    assert made == [f"{prompt} Up".strip(), "Sokoban: @r0c0 Up"]
    texts, _ = sft._words(iter([next(Shown().demonstrations("train", seed=0))]), load_template("teacher_terse"), place)
    assert texts[0] == prompt  # what a new tokenizer is trained on


@pytest.mark.parametrize(("place", "_prompt"), CASES)
def test_check(tiny_model: Path, place: Any, _prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: set[str] = set()
    prompt_of = ChatRenderer.prompt

    def watch(self: ChatRenderer, messages: Any, context: str = "") -> Any:
        ids = prompt_of(self, messages, context)
        if context:
            prompts.add(self.text(ids))
        return ids

    monkeypatch.setattr(ChatRenderer, "prompt", watch)
    engine = TorchOptions().build(EngineSpec(str(tiny_model), seed=0, device="cpu"))
    rows = skill_following(engine, Shown(), CheckSection(samples=1, turn_tokens=2), "teacher_terse", place, seed=0)
    assert [row["prompt"] for row in rows] == ["plain", "golden skill", "another task's skill"]
    assert prompts
    for prompt in prompts:
        ends = prompt.startswith if place == "before" else prompt.endswith
        assert ends("Workflow: @r1c1 Up")
