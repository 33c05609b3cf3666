"""`skillsd doctor RECIPE --gpus N`: the plan against arithmetic by hand, and its errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
from command import Command, assert_one_line

from skillsd.engines.options import EngineSpec, LoraOptions
from skillsd.engines.plan import DECODE_SHARE, STEP_SECONDS, TAIL, UPDATE_SHARE, Episodes, Gpus, plan
from skillsd.engines.torch.sizes import Sizes

H100 = Gpus(8, 80 * 2**30, 3.35e12, 989e12)
SPEC = EngineSpec("a model", seed=0, dtype="bfloat16", teacher="student", gradient_checkpointing=True)
WORK = Episodes(256, 24_000, 7_200, rescored=True)


@pytest.fixture(scope="module")
def qwen() -> Sizes:
    return Sizes.of("Qwen/Qwen3-4B-Instruct-2507")


def test_decoding_by_hand(qwen: Sizes) -> None:
    """32 episodes a GPU: each step reads the weights once, and each episode's keys and values so far."""
    found = plan(qwen, SPEC, WORK, H100)
    cache = 36 * 2 * 8 * 128 * 2
    assert found.room == pytest.approx((80 * 2**30 * 0.88 - 2 * qwen.parameters) / cache)
    assert found.wanted == 32 * 24_000
    assert found.waves == 1
    read = 7_200 * (32 * 12_000 * cache + 2 * qwen.parameters)
    token = 2 * qwen.matrices + 36 * 2 * 4096 * 24_000  # 32 heads of 128
    prefill = 32 * (24_000 - 7_200) * token / 989e12
    assert found.seconds["rollout"] == pytest.approx((read / 3.35e12 / DECODE_SHARE + prefill / 0.49) * (1 + TAIL))
    assert found.cache_share == pytest.approx(1 - 7_200 * 2 * qwen.parameters / read)
    forward = 256 * (24_000 * token + 7_200 * 2 * qwen.head) / 8 / 989e12
    assert found.seconds["update"] == pytest.approx(4 * forward / UPDATE_SHARE)
    assert found.seconds["teacher"] == found.seconds["rescoring"] == pytest.approx(forward / 0.49)
    assert found.ideal < sum(found.seconds.values())


def test_memory_of_a_rank_by_hand(qwen: Sizes) -> None:
    whole = 2 + 4 + 4 + 8  # weights, gradients, master weights and moments, bytes per parameter
    found = plan(qwen, SPEC, WORK, H100).ranks
    assert found["none"] == whole * qwen.parameters
    assert found["state"] == (2 + 4 + 16 / 8) * qwen.parameters
    assert found["layers"] == whole / 8 * qwen.parameters
    adapter = plan(qwen, replace(SPEC, lora=LoraOptions(rank=32)), WORK, H100)
    assert adapter.ranks["none"] == 2 * qwen.parameters + 16 * 32 * qwen.adapter
    frozen = plan(qwen, replace(SPEC, teacher="snapshot"), WORK, H100).ranks["none"]
    assert frozen - found["none"] == 2 * qwen.parameters


def test_eight_times_the_gpus_for_eight_times_the_episodes(qwen: Sizes) -> None:
    one = plan(qwen, SPEC, WORK, H100)
    eight = plan(qwen, SPEC, replace(WORK, count=2048), replace(H100, count=64))
    for phase in ("rollout", "teacher", "update"):
        assert eight.seconds[phase] == pytest.approx(one.seconds[phase])
    assert eight.ideal == pytest.approx(one.ideal)
    assert "exchange" not in plan(qwen, SPEC, WORK, replace(H100, count=1)).seconds


def test_keys_and_values_beyond_the_room_need_more_steps(qwen: Sizes) -> None:
    crowded = plan(qwen, SPEC, replace(WORK, count=1024), H100)
    assert crowded.waves == pytest.approx(1024 / 8 * 12_000 / crowded.room)
    assert plan(qwen, SPEC, WORK, replace(H100, memory=8 * 2**30)).room < 0


def test_a_small_models_steps_take_their_launch(qwen: Sizes) -> None:
    small = replace(qwen, parameters=qwen.parameters // 1000, matrices=0, head=0, cache=2)
    found = plan(small, SPEC, replace(WORK, rescored=False), replace(H100, flops=1e30))
    assert found.seconds["rollout"] == pytest.approx(7_200 * STEP_SECONDS * (1 + TAIL))
    assert "rescoring" not in found.seconds


def test_the_command(skillsd: Command) -> None:
    shown = skillsd("doctor", "sokoban-qwen3-4b", "--gpus", "8", "--gpu-memory", "24").out
    assert "8 GPUs of 24 GiB, 3,350 GB/s and 989 TFLOP/s each; 128 episodes" in shown
    assert "assumed: 47% of the peak arithmetic in the update" in shown
    assert "layers " in shown
    assert "time per iteration, about" in shown
    shown = skillsd("doctor", "sokoban-qwen3-4b", "--gpus", "1", "--gpu-memory", "8").out
    assert "do NOT fit on a GPU" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "8"], "--gpus estimates a recipe: give one"),
        (["sokoban-nano", "--gpus", "0"], "--gpus is 0, expected more than 0"),
        (["sokoban-nano", "--gpus", "2", "--flops", "-1"], "--flops is -1"),
    ],
)
def test_errors(skillsd: Command, arguments: list[str], words: str) -> None:
    assert_one_line(skillsd("doctor", *arguments), words)
