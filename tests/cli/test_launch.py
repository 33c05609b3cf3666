"""`skillsd train --gpus N`: what is refused before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import Command, assert_one_line

from skillsd.cli import launch

SMALL = ("model.device=cpu", "engine.shard=state")


@pytest.fixture(autouse=True)
def _nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: object) -> None:
        raise AssertionError("ranks were started")

    monkeypatch.setattr(launch._Agent, "start", start)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--gpus", 1, *SMALL), ("--gpus is 1", "2 or more")),
        (("--gpus", 2, "model.device=cpu"), ("engine.shard is 'none'", "set engine.shard=state")),
        (SMALL, ("engine.shard is 'state'", "add --gpus N, or set engine.shard=none")),
        (
            ("--gpus", 9, *SMALL, "rollout.tasks_per_iteration=4", "rollout.group_size=2", "training.minibatches=1"),
            ("9 ranks", "only 8 episodes", "rollout.tasks_per_iteration 4"),
        ),
        (
            ("--gpus", 4, *SMALL, "rollout.tasks_per_iteration=3", "training.minibatches=2", "rollout.group_size=3"),
            ("4 ranks", "only 3 episodes", "at most 3 ranks"),
        ),
        (("--gpus", 2, "engine.shard=state", "model.device=cuda:1"), ("model.device is 'cuda:1'", "its own number")),
        (("--gpus", 2, "engine.shard=halves"), ("engine.shard", "halves")),
        (("--gpus", 2, "engine.name=vllm", "engine.shard=state"), ("engine.shard", "'torch'")),
        (("--gpus", 2, "engine.name=vllm"), ("engine.learner.shard is 'none'",)),
        (("--gpus", 2, *SMALL, "method=opd-external"), ("teacher.model",)),
        (("--gpus", 2, *SMALL, "--max-restarts", -1), ("--max-restarts",)),
    ],
)
def test_refused(arguments: tuple[str, ...], parts: tuple[str, ...], skillsd: Command, tmp_path: Path) -> None:
    assert_one_line(skillsd("train", "sokoban-nano", *arguments, "--out", tmp_path / "run"), *parts)
    assert not (tmp_path / "run").exists()


def test_more_gpus_than_there_are(skillsd: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    result = skillsd("train", "sokoban-nano", "engine.shard=state", "model.device=cuda", "--gpus", 2)
    assert_one_line(result, "2 ranks", "torch sees 1 GPUs", "model.device=cpu")


def test_an_engine_without_ranks(skillsd: Command, tmp_path: Path) -> None:
    (tmp_path / "plain_engine.py").write_text(
        "from skillsd.engines.options import EngineOptions\n\n\nclass Plain(EngineOptions):\n    name: str = 'plain'\n"
    )
    result = skillsd("train", "sokoban-nano", "engine.name=plain_engine:Plain", "method=grpo", "--gpus", 2)
    assert_one_line(result, "'plain_engine:Plain' trains in one process", "leave --gpus out")


def test_inside_of_a_torchrun(skillsd: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert_one_line(skillsd("train", "sokoban-nano", *SMALL, "--gpus", 2), "started by torchrun already")
