"""`skillsd doctor`: estimates against peft's and transformers' counts, arithmetic, and the peak of a real run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import Command

from skillsd.cli.doctor import remedies
from skillsd.config import RunConfig, load
from skillsd.engines import estimate as estimates
from skillsd.engines.estimate import Estimate
from skillsd.engines.options import LoraOptions
from skillsd.engines.torch import estimate as torch_estimate
from skillsd.engines.torch.estimate import Speed
from skillsd.engines.torch.estimate import estimate as estimate_torch
from skillsd.engines.torch.sizes import PUBLISHED, Sizes, read_architecture
from skillsd.engines.vllm.estimate import VllmEstimator
from skillsd.errors import UserError
from skillsd.runs.checks import engine_spec, workload

QWEN = "Qwen/Qwen3-4B-Instruct-2507"
GIB = 1 << 30


@pytest.fixture(scope="module")
def qwen() -> Sizes:
    return Sizes.of(QWEN)


def recipe(*overrides: str) -> RunConfig:
    return load(RunConfig, "sokoban-nano", [f"model.name={QWEN}", *overrides])


def estimate(config: RunConfig, sizes: Sizes, *, turns: int = 20, **options: Any) -> Estimate:
    return estimate_torch(engine_spec(config), workload(config, turns), sizes, **options)


def test_sizes_are_read_without_weights(qwen: Sizes) -> None:
    assert qwen.parameters == 4_022_468_096  # as published: 4.0 B with tied embeddings
    assert qwen.cache == 2 * 36 * 8 * 128
    assert qwen.head == 151936 * 2560
    assert 32 * qwen.adapter == 66_060_288  # as peft counts
    assert Sizes.of(QWEN, ["q_proj"]).adapter == 36 * (2560 + 32 * 128)
    assert Sizes.of(QWEN, r".*\.(q|k)_proj").adapter == 36 * (2 * 2560 + (32 + 8) * 128)


def test_adapter_parameters_are_those_of_peft(tiny_model: Path) -> None:
    import torch

    from skillsd.engines.torch.engine import TorchEngine

    engine = TorchEngine(str(tiny_model), device="cpu", lora=LoraOptions(rank=3))
    trained = [p for p in engine.model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 3 * Sizes.of(str(tiny_model)).adapter
    assert {p.dtype for p in trained} == {torch.float32}


def test_a_folder_with_only_a_configuration_is_enough(tmp_path: Path, qwen: Sizes) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[QWEN]))
    assert Sizes.of(str(tmp_path)) == qwen


def test_a_model_that_cannot_be_read_is_an_error() -> None:
    with pytest.raises(UserError, match=r"can't read the model 'no/such-model'.*model.name=FOLDER"):
        read_architecture("no/such-model")


def parts(qwen: Sizes, *overrides: str) -> dict[str, int]:
    """Name -> bytes, of all phases together."""
    found = estimate(recipe(*overrides), qwen)
    named = dict(found.stays)
    for phase in found.phases.values():
        named |= phase
    return {name.split(" (")[0].split(" of ")[0]: size for name, size in named.items()}


def test_full_weights_by_hand(qwen: Sizes) -> None:
    n = qwen.parameters
    full = parts(qwen)
    assert (full["weights"], full["AdamW's two moments"], full["gradients"]) == (4 * n, 8 * n, 4 * n)
    assert "master weights in float32" not in full
    assert "the teacher's own weights" not in full
    half = parts(qwen, "model.dtype=bfloat16")
    assert (half["weights"], half["master weights in float32"]) == (2 * n, 4 * n)
    # KV cache: 128 episodes of 128 tokens, two bytes per number, and a quarter more as the pool grows in steps.
    assert half["keys and values"] == 1.25 * 128 * 128 * qwen.cache * 2
    assert parts(qwen, "rollout.concurrency=16")["keys and values"] == 1.25 * 16 * 128 * qwen.cache * 4


def test_logits_are_counted_per_chunk(qwen: Sizes) -> None:
    def logits(*overrides: str) -> float:
        """Bytes of the update's logits per vocabulary entry."""
        return parts(qwen, "rollout.turn_tokens=128", *overrides)["logits"] / qwen.vocabulary

    rows = 2**25 // qwen.vocabulary
    assert logits() == logits("training.micro_batch_tokens=4096") == 12 * rows
    assert logits("model.dtype=bfloat16") == 14 * rows
    assert logits("objective.estimator=reverse_kl", "objective.top_k=8") == 24 * rows
    assert logits("objective.estimator=reverse_kl", "training.micro_batch_tokens=4096") == 36 * 4096  # all at once
    assert logits("objective.estimator=reverse_kl", "method=grpo") == 12 * rows  # no teacher
    whole = parts(qwen, "objective.estimator=reverse_kl", "rollout.turn_tokens=128")
    assert whole["the teacher's distributions"] == 128 * 128 * qwen.vocabulary * 4


def test_only_the_language_model_of_a_multimodal_model_processes_tokens(tmp_path: Path) -> None:
    import transformers

    text = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 300,
    }  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    composite = transformers.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28})
    composite.save_pretrained(tmp_path / "both")
    transformers.Gemma3TextConfig(**text).save_pretrained(tmp_path / "text")
    both, text_only = Sizes.of(str(tmp_path / "both")), Sizes.of(str(tmp_path / "text"))
    assert both.parameters > text_only.parameters
    assert both.adapter > text_only.adapter  # all-linear includes the vision tower
    for name in ("matrices", "head", "flow", "cache", "layers", "hidden", "vocabulary", "adapted_in", "adapted_out"):
        assert getattr(both, name) == getattr(text_only, name), name
    assert both.unknown == text_only.unknown == 0


def test_only_a_tokens_own_experts_count_as_work(tmp_path: Path) -> None:
    import peft
    import transformers

    hidden, expert, layers = 32, 16, 2
    config = transformers.Qwen3MoeConfig(
        hidden_size=hidden, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=300, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=expert,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    sizes = Sizes.of(str(tmp_path))
    attention = (2 * 32 + 2 * 16) * hidden
    assert sizes.matrices == layers * (attention + 2 * 3 * expert * hidden)
    assert sizes.flow == layers * ((2 * 64 + 2 * 48) + 2 * ((hidden + 2 * expert) + (expert + hidden)))
    assert sizes.unknown == 0
    # Which of them get an adapter depends on peft.
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert 3 * sizes.adapter == sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapted = any("experts" in name for name, p in model.named_parameters() if p.requires_grad)
    assert sizes.rebuilt >= adapted * layers * 8 * 3 * expert * hidden


def test_weights_of_unknown_use_are_reported(tmp_path: Path) -> None:
    import transformers

    transformers.DbrxConfig(
        d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=300,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "hidden_size": 32},
    ).save_pretrained(tmp_path)  # fmt: skip
    assert Sizes.of(str(tmp_path)).unknown >= 2 * 4 * 3 * 32 * 48  # its experts are flat matrices


def test_an_adapter_keeps_its_input_in_float32(tiny_model: Path) -> None:
    """Why the estimate counts these inputs: below float32, peft casts them."""
    import torch

    from skillsd.engines.torch.engine import TorchEngine

    def kept(dtype: str) -> list[tuple[torch.dtype, int]]:
        engine = TorchEngine(str(tiny_model), device="cpu", dtype=dtype, lora=LoraOptions(rank=3))
        layer: Any = next(m for name, m in engine.model.named_modules() if name.endswith("mlp.down_proj"))
        x = torch.randn(5, layer.in_features, dtype=engine.model.dtype, requires_grad=True)  # type: ignore[arg-type]
        saved: dict[int, torch.Tensor] = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(id(t), t), lambda t: t):
            layer(x)
        weights = {p.data_ptr() for p in layer.parameters()}
        return [(t.dtype, t.numel()) for t in saved.values() if t.data_ptr() not in weights | {x.data_ptr()}]

    assert sorted(n for _, n in kept("float32")) == [5 * 3]  # A x; x itself exists anyway
    assert sorted(kept("bfloat16"), key=lambda found: found[1]) == [
        (torch.float32, 5 * 3), (torch.float32, 5 * 64)
    ]  # fmt: skip


def test_the_float32_inputs_of_adapters_are_counted(qwen: Sizes) -> None:
    def activations(*overrides: str) -> int:
        return parts(qwen, *overrides)["activations"]

    lora, half = "model.lora={}", "model.dtype=bfloat16"
    assert activations(lora) == activations()
    tokens = 128 * 128
    assert activations(lora, half) - activations(half) == min(tokens, 8192) * 4 * qwen.adapted_in
    assert qwen.adapted_in == 36 * (3 * 2560 + 32 * 128 + 2 * 2560 + 9728)
    assert qwen.adapted_out == 9728


@pytest.mark.parametrize(
    ("overrides", "teacher"),
    [
        (["method=grpo"], 0),
        (["method=skill-sd"], 0),
        (["method=skill-sd-frozen"], 1),
        (["teacher.sync_every=3"], 1),
        (["teacher.ema=0.9"], 1),
    ],
)
def test_a_teacher_under_lora_costs_an_adapter(qwen: Sizes, overrides: list[str], teacher: int) -> None:
    found = parts(qwen, "model.lora={rank: 8}", "model.dtype=bfloat16", *overrides)
    assert found.get("the teacher's own weights", 0) == teacher * 8 * qwen.adapter * 4
    assert found["adapter"] == 8 * qwen.adapter * 4


class Learner:
    """The embedded engine's estimator, on a device of the test's choice."""

    free, total = 80 * GIB, 80 * GIB

    def __init__(self, sizes: Sizes, device: str) -> None:
        self.sizes, self.device = sizes, device

    def __call__(self, spec: Any, workload: Any) -> Estimate:
        return estimate_torch(spec, workload, self.sizes)


def test_vllm_reserves_its_memory_throughout_or_while_it_is_awake(qwen: Sizes) -> None:
    def found(device: str, *overrides: str) -> Estimate:
        config: Any = recipe("engine.name=vllm", *overrides)
        return VllmEstimator(Learner(qwen, device), config.engine)(engine_spec(config), workload(config, 20))

    on_gpu = found("cuda:0", "engine.gpu_memory_utilization=0.5", "engine.sleep=false")
    assert on_gpu.stays["vLLM's reservation"] == 40 * GIB
    assert estimates.SAMPLING not in on_gpu.phases
    asleep = found("cuda:0")
    assert asleep.stays["vLLM, asleep"] == 2 * GIB
    assert asleep.phases[estimates.SAMPLING] == {"vLLM's reservation": 30 * GIB}
    assert asleep.need < on_gpu.need
    assert not [name for name in found("cuda:0", "engine.gpus=[1]").stays if name.startswith("vLLM")]
    assert found("cpu", "model.dtype=bfloat16").stays["vLLM's reservation"] == 2 * qwen.parameters + GIB


def test_time_is_proportional_to_the_work(qwen: Sizes) -> None:
    speed = Speed(many=1e12, few=1e11, call=1e-5)

    def seconds(*overrides: str) -> dict[str, float]:
        return dict(estimate(recipe(*overrides), qwen, speed=speed).seconds)

    plain = seconds()
    assert list(plain) == [estimates.SAMPLING, estimates.SCORING, estimates.UPDATE]
    assert estimates.SCORING not in seconds("method=grpo")
    assert seconds("training.epochs=2")["update"] == pytest.approx(2 * plain["update"])
    assert seconds("model.gradient_checkpointing=true")["update"] == pytest.approx(4 / 3 * plain["update"], rel=0.01)
    # 16,384 tokens through 3.6 G parameters (and some attention), forward and twice backward, at 1 TFLOP/s.
    assert plain["update"] == pytest.approx(16384 * 3 * 2 * qwen.matrices / 1e12, rel=0.2)


def test_a_slow_device_is_measured_with_small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 on a CPU without it took minutes."""
    rows: list[int] = []
    monkeypatch.setattr(torch_estimate, "_fastest", lambda work, device: rows.append(work().shape[0]) or 1.0)
    speed = torch_estimate.measure(torch.device("cpu"), "float32", rows=128, hidden=64)
    assert max(rows) == 8
    assert (speed.many, speed.few) == (2 * 8 * 64 * 64, 2 * 8 * 64 * 256)


def test_remedies_are_listed_by_effect(qwen: Sizes) -> None:
    config = recipe("rollout.trajectory_tokens=2048", "rollout.turn_tokens=64")

    def need(other: RunConfig) -> int:
        return estimate(other, qwen).need

    changes, after = remedies(config, 40 * GIB, need)
    assert after <= 40 * GIB < need(config)
    saved = [need(config), *(size for _, size in changes)]
    assert saved == sorted(saved, reverse=True)
    assert after == saved[-1]
    # The texts are valid settings.
    assert need(load(RunConfig, "sokoban-nano", [
        f"model.name={QWEN}", "rollout.trajectory_tokens=2048", "rollout.turn_tokens=64", *(text for text, _ in changes)
    ])) == after  # fmt: skip
    assert remedies(config, 1e15, need) == ([], need(config))
    assert remedies(config, 1 * GIB, need)[1] > GIB  # it gives up


def test_a_recipe_for_a_server_is_counted_in_tokens_without_a_key(skillsd: Command, monkeypatch: Any) -> None:
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    shown = skillsd("doctor", "sokoban-tinker", "engine.prices={prefill: 1, cached: 0, sample: 1, train: 1}")
    assert shown.code == 0
    assert "128 episodes per iteration, 120 iterations" in shown.out
    for line in (r"prefilled +655,360 tokens", r"cost of an iteration +4\.66 in", r"of 120 iterations +559\.35"):
        assert re.search(line, shown.out)


SCRIPT = """
import re, sys, torch
from pathlib import Path
from skillsd.config import RunConfig, load
from skillsd.engines.torch.estimate import Sizes, _resident, estimate
from skillsd.runs.checks import engine_spec, workload
from skillsd.runs.lifecycle import run_training

torch.set_num_threads(1)
config = load(RunConfig, "sokoban-nano", sys.argv[2:])
need = estimate(engine_spec(config), workload(config, 20), Sizes.of("nano"), own=_resident()).need
run_training(config, Path(sys.argv[1]))
# Not getrusage: its peak includes that of the parent process.
print(need, 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="a process's peak memory is read from /proc")
def test_the_estimate_is_near_the_peak_of_a_run(tmp_path: Path) -> None:
    settings = ["training.iterations=2", "evaluation.limit=4", "log.tensorboard=false"]
    result: Any = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), *settings], capture_output=True, text=True, check=True
    )
    need, peak = map(int, result.stdout.split()[-2:])
    assert peak / 1.3 < need < 1.5 * peak
