"""`skillsd eval` of a model behind an endpoint, against a misbehaving server; and its resumption."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import Result
from fake_endpoint import FakeEndpoint, Reply, Request, completion, refusal
from safetensors.torch import load_file, save_file
from toy_run import toy_settings

from skillsd.cli.app import main
from skillsd.cli.common import console
from skillsd.engines import endpoint
from skillsd.errors import UserError
from skillsd.evaluation.episode_log import EpisodeLog
from skillsd.report import manifest
from skillsd.runs.subjects import replace_records

KEY = "sk-very-secret-0123456789"
TASKS = 3  # of the toy's test split
FIRST_PROMPT = 20  # its characters


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("MY_KEY", KEY)


@pytest.fixture
def serve() -> Iterator[Callable[..., FakeEndpoint]]:
    servers: list[FakeEndpoint] = []

    def make(*replies: Reply, **options: Any) -> FakeEndpoint:
        servers.append(FakeEndpoint(*replies, **options))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def evaluate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Result]:
    """`evaluate(server, *arguments)`: the model ``a/model`` on the toy, at temperature 1 by default."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "_width", 300)
    recipe = toy_settings(Path("unused"), rollout={"turn_tokens": 8, "trajectory_tokens": 500})
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(recipe))

    def call(server: FakeEndpoint, *arguments: object) -> Result:
        words = ["skillsd", "eval", "--model", "a/model", "--endpoint", server.url, "--recipe", "toy.yaml"]
        words += ["--key-env", "MY_KEY", *([] if "--temperature" in arguments else ["--temperature", "1"])]
        monkeypatch.setattr(sys, "argv", [*words, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        assert isinstance(code, int)
        return Result(code, *capsys.readouterr())

    return call


Evaluate = Callable[..., Result]
Serve = Callable[..., FakeEndpoint]


def test_requests_and_results(evaluate: Evaluate, serve: Serve, tmp_path: Path) -> None:
    server = serve(completion("Up"))
    result = evaluate(server, "--price-in", 2, "--price-out", 10, "--json", "x.json", "--request", "{seed: 3}")
    assert result.code == 0, result
    [figures] = json.loads((tmp_path / "x.json").read_text())
    calls = len(server.requests)
    assert figures["spent"] == {
        "calls": calls, "tokens_in": 100 * calls, "tokens_out": 20 * calls, "cost": pytest.approx(calls * 4e-4)
    }  # fmt: skip
    assert figures["model"] == {"name": "a/model", "endpoint": server.url, "request": {"seed": 3}}
    assert len(figures["fingerprint"]) == 16
    assert (figures["tasks"], figures["split"]) == (TASKS, "test")
    assert f"{calls} calls, {100 * calls:,} tokens in, {20 * calls:,} out, cost {calls * 4e-4:.4f}" in result.out
    first = server.requests[0]
    assert first.headers["authorization"] == f"Bearer {KEY}"
    assert first.body["model"] == "a/model"
    assert (first.body["max_tokens"], first.body["temperature"], first.body["seed"]) == (8, 1.0, 3)
    longest = max((request.body["messages"] for request in server.requests), key=len)
    assert [message["role"] for message in longest[:3]] == ["user", "assistant", "user"]
    assert longest[1]["content"] == "Up"
    assert KEY not in result.out + result.err + "".join(p.read_text() for p in tmp_path.rglob("*.json*"))


def test_a_second_attempt_pays_for_nothing_twice(evaluate: Evaluate, serve: Serve, tmp_path: Path) -> None:
    server = serve(completion("Up"))
    assert evaluate(server, "--json", "x.json").code == 0
    calls = len(server.requests)
    moved = serve(completion("Up"))  # the same model elsewhere
    result = evaluate(moved, "--json", "y.json")
    assert result.code == 0, result
    assert not moved.requests
    one, two = (
        {**json.loads((tmp_path / name).read_text())[0], "seconds": 0, "model": 0} for name in ("x.json", "y.json")
    )
    assert one == two
    assert f"{calls} calls" in result.out
    more = evaluate(moved, "--samples", 2, "--json", "y.json")  # and more episodes extend it
    assert more.code == 0
    assert json.loads((tmp_path / "y.json").read_text())[0]["episodes"] == 2 * TASKS
    assert 0 < len(moved.requests) <= 3 * TASKS


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("seed=5", "seed"),
        ("rollout.turn_tokens=9", "budget"),
        ("environment.options={turns: 2}", ""),
        ("--limit=2", "limit"),
    ],
)
def test_episodes_of_other_settings_are_not_mixed(evaluate: Evaluate, serve: Serve, change: str, expected: str) -> None:
    server = serve(completion("Up"))
    assert evaluate(server).code == 0
    calls = len(server.requests)
    result = evaluate(server, change)
    assert result.code == 2
    assert f"their {expected}" in result.err
    assert "--episodes" in result.err
    assert len(server.requests) == calls


def test_settings_that_change_no_answer_may_change(evaluate: Evaluate, serve: Serve) -> None:
    """They decide which episodes are lost, and lost ones are played again."""
    server = serve(completion("Up"))
    assert evaluate(server).code == 0
    calls = len(server.requests)
    changes = ["rollout.retries=5", "rollout.step_seconds=9", "rollout.concurrency=1", "rollout.group_size=7"]
    changes += ["rollout.tasks_per_iteration=9", "training.learning_rate=1", "model.dtype=bfloat16"]
    assert evaluate(server, *changes).code == 0
    assert len(server.requests) == calls


def test_another_version_is_another_evaluation(
    evaluate: Evaluate, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(completion("Up"))
    assert evaluate(server).code == 0
    versions = manifest.versions()
    monkeypatch.setattr(manifest, "versions", lambda: {**versions, "torch": "99"})
    assert evaluate(server).code == 0  # not of what the server does
    monkeypatch.setattr(manifest, "versions", lambda: {**versions, "skillsd": "99"})
    said = evaluate(server)
    assert (said.code, "their versions.skillsd is" in said.err) == (2, True), said


def test_an_episode_whose_line_was_cut_by_a_crash_is_repeated(evaluate: Evaluate, serve: Serve, tmp_path: Path) -> None:
    server = serve(completion("Up"))
    assert evaluate(server, "--episodes", "kept.jsonl", "--json", "x.json").code == 0
    whole = (tmp_path / "kept.jsonl").read_bytes()
    (tmp_path / "kept.jsonl").write_bytes(whole[:-20])
    assert evaluate(server, "--episodes", "kept.jsonl", "--json", "y.json").code == 0
    records = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert len([r for r in records if "episode" in r]) == TASKS
    (tmp_path / "kept.jsonl").write_text("what?\n")
    result = evaluate(server, "--episodes", "kept.jsonl")
    assert (result.code, "not an episode log" in result.err) == (2, True)


@pytest.mark.parametrize("text", ['{"a": 1}', '[{"format": 1}]', '{"format": 2}', "x", '{"format": 1}\n[1]\n'])
def test_another_file_is_left_alone(evaluate: Evaluate, serve: Serve, tmp_path: Path, text: str) -> None:
    """Also one without a line break, like minified JSON."""
    (tmp_path / "mine.json").write_text(text)
    server = serve(completion("Up"))
    result = evaluate(server, "--episodes", "mine.json")
    assert (result.code, "not an episode log" in result.err) == (2, True)
    assert (tmp_path / "mine.json").read_text() == text
    assert not server.requests


@pytest.mark.parametrize("size", [0, 1, 9, 40])
def test_a_first_line_cut_by_a_crash_is_rewritten(tmp_path: Path, size: int) -> None:
    path = tmp_path / "kept.jsonl"
    EpisodeLog(path, {"model": "m", "seed": 3}).close({})
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    EpisodeLog(path, {"model": "m", "seed": 3}).close({})
    assert path.read_bytes() == whole


def test_an_episode_log_is_locked(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    first = EpisodeLog(path, {"seed": 3})
    with pytest.raises(UserError, match="another process is using"):
        EpisodeLog(path, {"seed": 3})
    first.close({})
    with pytest.raises(UserError, match="another evaluation"):
        EpisodeLog(path, {"seed": 4})
    EpisodeLog(path, {"seed": 3}).close({})  # neither of them still holds the lock


@pytest.mark.parametrize("name", ["x.json", "./x.json", "runs/eval-a-model-toy_env:Toy-test.jsonl"])
def test_results_and_episodes_need_separate_files(evaluate: Evaluate, serve: Serve, tmp_path: Path, name: str) -> None:
    (tmp_path / "runs").mkdir()
    episodes = [] if name.startswith("runs") else ["--episodes", "x.json"]
    server = serve(completion("Up"))
    result = evaluate(server, "--json", name, *episodes)
    assert (result.code, "give two files" in result.err) == (2, True), result
    assert not server.requests


def test_finished_passes_are_shown_and_written_when_a_later_one_fails(
    evaluate: Evaluate, serve: Serve, tmp_path: Path
) -> None:
    def answer(request: Request) -> Reply:
        return completion("Up") if request.body["temperature"] else refusal(401, "not at 0")

    result = evaluate(serve(answer=answer), "--temperature", 1, "--temperature", 0, "--json", "x.json")
    assert (result.code, "not at 0" in result.err) == (2, True)
    assert "sampled at 1" in result.out
    assert "greedy" not in result.out
    [figures] = json.loads((tmp_path / "x.json").read_text())
    assert (figures["temperature"], figures["episodes"]) == (1, TASKS)


def test_other_requests_and_budgets_are_other_evaluations(evaluate: Evaluate, serve: Serve, tmp_path: Path) -> None:
    for number, change in enumerate(([], ["--request", "{seed: 3}"], ["rollout.turn_tokens=9"], [])):
        keep = ["--json", "x.json", "--append", "--episodes", f"{number}.jsonl"]
        assert evaluate(serve(completion("Up")), *keep, *change).code == 0
    records = json.loads((tmp_path / "x.json").read_text())
    found = [(record["model"]["request"], record["budget"]["turn_tokens"]) for record in records]
    assert found == [({"seed": 3}, 8), ({}, 9), ({}, 8)]  # the last replaced the first, although on another server


def test_other_adapters_are_other_evaluations(tmp_path: Path) -> None:
    weights = []
    for content in (b"one", b"two"):
        (tmp_path / "adapter_model.safetensors").write_bytes(content)
        weights.append(manifest.fingerprint(tmp_path))
    assert None not in weights
    assert weights[0] != weights[1]
    records = [{"model": {"name": "m", "adapter": {"name": "a", "weights": w}}, "seed": 1} for w in weights]
    (tmp_path / "x.json").write_text(json.dumps(records[:1]))
    assert replace_records(records[1:], tmp_path / "x.json") == records


def test_retries_are_the_recipes(evaluate: Evaluate, serve: Serve, tmp_path: Path) -> None:
    def answer(request: Request) -> Reply:
        again = len(request.body["messages"]) > 1
        return refusal(400, "not these words") if again else completion("Sideways")

    for retries in (0, 3):  # one task ends after its first turn, the others fail in every attempt
        server = serve(answer=answer)
        result = evaluate(server, f"rollout.retries={retries}", "--episodes", f"{retries}.jsonl")
        assert f"{TASKS - 1} tasks are excluded" in result.out, result
        assert len(server.requests) == 1 + 3 * (TASKS - 1) * (retries + 1)  # answered, refused, asked for less


def test_a_request_that_is_not_json(evaluate: Evaluate, serve: Serve) -> None:
    server = serve(completion("Up"))
    for value in ("2024-01-01", ".nan", "{a: [2024-01-01]}"):
        result = evaluate(server, "--request", f"{{x: {value}}}")
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert "'x' can't be written as JSON" in result.err
    assert not server.requests


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (refusal(401, "who are you?"), "refuses the key of $MY_KEY"),
        (refusal(404, "no such model"), "no model 'a/model' (--model)"),
        (refusal(400, "what is temperature?"), "what is temperature?"),
        (refusal(429, "no money", code="insufficient_quota"), "no money"),
        (refusal(500, "oops"), "oops"),
        (Reply(b"<html>Welcome</html>"), "chat completion"),
    ],
)
def test_an_endpoint_that_never_answers_is_one_error_line(
    evaluate: Evaluate, serve: Serve, reply: Reply, expected: str
) -> None:
    result = evaluate(serve(reply))
    assert result.code == 2
    assert expected in result.err
    assert "Traceback" not in result.err
    assert result.err.count("error:") == 1


def test_an_endpoint_that_is_down(evaluate: Evaluate, serve: Serve) -> None:
    server = serve(completion("Up"))
    server.close()
    result = evaluate(server)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert server.url in result.err


@pytest.mark.parametrize("text", ["This model's maximum context length is 32 tokens.", "no"])
def test_a_dialogue_longer_than_the_context_ends_and_is_counted(
    evaluate: Evaluate, serve: Serve, tmp_path: Path, text: str
) -> None:
    def answer(request: Request) -> Reply:
        sizes = [len(message["content"]) for message in request.body["messages"]]
        return refusal(400, text) if len(sizes) > 1 and sum(sizes) > FIRST_PROMPT else completion("Sideways")

    result = evaluate(serve(answer=answer), "--json", "x.json")
    assert result.code == 0, result
    [figures] = json.loads((tmp_path / "x.json").read_text())
    outcomes = Counter(figures["outcomes"])
    assert outcomes["truncated_tokens"] == TASKS - outcomes["solved"] - outcomes["failed"]
    assert figures["episodes"] == TASKS
    assert "ran out of tokens" in result.out


def test_the_token_budget_ends_an_episode(evaluate: Evaluate, serve: Serve, tmp_path: Path) -> None:
    server = serve(completion("Up", usage=(495, 5)))
    result = evaluate(server, "--json", "x.json")
    [figures] = json.loads((tmp_path / "x.json").read_text())
    assert result.code == 0
    assert len(server.requests) == TASKS
    assert figures["mean_turns"] == 1


def test_temporary_server_errors_lose_no_episode(evaluate: Evaluate, serve: Serve, tmp_path: Path) -> None:
    """After a request has failed in all its retries, the episode is repeated; none is lost."""
    seen: Counter[str] = Counter()

    def answer(request: Request) -> Reply:
        words = json.dumps(request.body["messages"])
        seen[words] += 1
        stumbles = len(request.body["messages"]) > 1 and sum(seen.values()) < 14
        return refusal(503, "busy") if stumbles else completion("Up")

    result = evaluate(serve(answer=answer), "--json", "x.json", "rollout.concurrency=1")
    assert result.code == 0, result
    [figures] = json.loads((tmp_path / "x.json").read_text())
    assert figures["episodes"] == TASKS
    assert set(figures["outcomes"]) <= {"solved", "failed", "truncated_turns"}


def test_resumption_after_the_server_died(evaluate: Evaluate, serve: Serve, tmp_path: Path) -> None:
    served = 0

    def answer(request: Request) -> Reply:
        nonlocal served
        served += 1
        return completion("Up") if served <= 4 or served > 60 else refusal(502, "gone")

    server = serve(answer=answer)
    result = evaluate(server, "--samples", 4, "rollout.concurrency=1")
    assert result.code == 2
    assert "gone" in result.err
    assert "episodes are in" in result.out
    [path] = (tmp_path / "runs").glob("eval-a-model-*.jsonl")
    kept = sum("episode" in json.loads(line) for line in path.read_text().splitlines())
    assert 0 < kept < 4 * TASKS
    served = 61
    result = evaluate(server, "--samples", 4, "rollout.concurrency=1", "--json", "x.json")
    assert result.code == 0, result
    assert f"{kept} finished episodes" in result.out
    assert json.loads((tmp_path / "x.json").read_text())[0]["episodes"] == 4 * TASKS


def test_a_token_budget_holds_across_attempts(evaluate: Evaluate, serve: Serve) -> None:
    server = serve(completion("Up"))
    result = evaluate(server, "--budget-tokens", 150, "rollout.concurrency=1")
    assert result.code == 2
    assert "--budget-tokens is 150, and" in result.err
    calls = len(server.requests)
    assert evaluate(server, "--budget-tokens", 150, "rollout.concurrency=1").code == 2
    assert len(server.requests) == calls
    assert evaluate(server, "--budget-tokens", 5000, "rollout.concurrency=1").code == 0


@pytest.fixture
def evaluate_locally(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Evaluate:
    """`evaluate_locally(model, *arguments)`: with the log ``kept.jsonl``."""

    def call(model: Path, *arguments: object) -> Result:
        words = ["skillsd", "eval", "--model", str(model), "--recipe", "toy.yaml", "rollout.trajectory_tokens=60"]
        monkeypatch.setattr(sys, "argv", [*words, "--episodes", "kept.jsonl", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return Result(ended.value.code, *capsys.readouterr())

    return call


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("model.dtype=bfloat16", "settings.model.dtype"),
        ("model.threads=2", "settings.model.threads"),
        ("environment.options={turns: 2}", ""),
        ("rollout.turn_tokens=9", "budget"),
    ],
)
def test_episodes_of_a_local_model_under_other_settings(
    evaluate_locally: Evaluate, tiny_model: Path, change: str, key: str
) -> None:
    assert evaluate_locally(tiny_model).code == 0
    said = evaluate_locally(tiny_model, change)
    assert (said.code, f"their {key}" in said.err) == (2, True), said


@pytest.mark.parametrize(
    ("file", "key"), [("tokenizer_config.json", "model.files"), ("model.safetensors", "model.weights")]
)
def test_episodes_of_a_model_that_changed_on_disk(
    evaluate_locally: Evaluate, tiny_model: Path, tmp_path: Path, file: str, key: str
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    assert evaluate_locally(folder).code == 0
    if file.endswith(".json"):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, "extra": 1}))
    else:
        tensors = load_file(folder / file)
        save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, folder / file, {"format": "pt"})
    said = evaluate_locally(folder)
    assert (said.code, f"their {key} is" in said.err) == (2, True), said


def test_evaluations_under_other_settings_are_kept_side_by_side(
    evaluate_locally: Evaluate, tiny_model: Path, tmp_path: Path
) -> None:
    for change in ([], ["model.dtype=bfloat16"], []):
        (tmp_path / "kept.jsonl").unlink(missing_ok=True)
        assert evaluate_locally(tiny_model, "--temperature", 0, "--json", "x.json", "--append", *change).code == 0
    records = json.loads((tmp_path / "x.json").read_text())
    assert [record["settings"]["model"]["dtype"] for record in records] == ["bfloat16", "float32"]
    assert records[0]["versions"]["torch"]


def test_an_evaluation_of_a_local_model_is_resumed_too(
    evaluate_locally: Evaluate, tmp_path: Path, tiny_model: Path
) -> None:
    figures = []
    for name in ("x.json", "y.json"):
        assert evaluate_locally(tiny_model, "--json", name).code == 0
        figures.append([{**record, "seconds": 0} for record in json.loads((tmp_path / name).read_text())])
    assert figures[0] == figures[1]
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == 1 + 2 * TASKS
