"""Runs with other summarisers: a language model behind an endpoint, the policy itself, and a user's own class."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import SKILL, FakeEndpoint, Reply, Request, completion
from pydantic import ValidationError
from toy_env import Toy
from toy_run import Listener, MakeRun, go, toy_settings

from skillsd.config import RunConfig
from skillsd.engines import endpoint
from skillsd.engines.base import Sample, SampleRequest
from skillsd.errors import UserError
from skillsd.report.progress import summaries_note
from skillsd.report.writer import METRICS, read
from skillsd.runs.lifecycle import run_training
from skillsd.skills.bank import Bank
from skillsd.training import checkpoint
from skillsd.training.loop import train
from skillsd.types import Task

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("MY_KEY", KEY)


def new_skill(request: Request) -> Reply:
    """A different skill for every episode."""
    return completion({**SKILL, "golden_workflow": f"{hash(request.text):x}"})


def hanging(request: Request) -> Reply:
    return Reply({}, hang=60)


@pytest.fixture
def servers() -> Iterator[list[FakeEndpoint]]:
    made: list[FakeEndpoint] = []
    yield made
    for server in made:
        server.close()


def settings(server: FakeEndpoint, deterministic: bool = True, **summariser: Any) -> dict[str, Any]:
    return {
        "skills": {"summariser": "openai", "deterministic": deterministic, "teacher_extra_tokens": 200},
        "summariser": {
            "model": "a-model",
            "base_url": server.url,
            "api_key_env": "MY_KEY",
            "max_retries": 1,
            "price_in": 1.0,
            "price_out": 10.0,
            **summariser,
        },
    }


class StopsServer(Listener):
    """Stops the server after a number of iterations."""

    def __init__(self, server: FakeEndpoint, iterations: int) -> None:
        super().__init__()
        self.server, self.left = server, iterations

    def iteration(self, record: dict[str, Any]) -> None:
        super().iteration(record)
        self.left -= 1
        if self.left == 0:
            self.server.close()


def test_training_continues_when_the_server_stops(make_run: MakeRun, servers: list[FakeEndpoint]) -> None:
    servers.append(FakeEndpoint(answer=new_skill))
    run = make_run(**settings(servers[0]))
    listener = StopsServer(servers.pop(), 3)
    assert asyncio.run(train(run, listener))
    assert len(listener.iterations) == 6
    before, after = listener.iterations[2], listener.iterations[5]
    assert before["summaries/submitted"] == before["summaries/calls"] == 36
    assert before["summaries/added"] + before["summaries/duplicate"] == 36
    assert before["summaries/tokens_in"] == 3600
    assert before["summaries/cost"] == pytest.approx((3600 + 10 * 720) / 1e6)
    assert after["summaries/submitted"] == 72
    assert after["summaries/failed_connection"] == 36
    assert after["summaries/calls"] == 36 + 2 * 36
    assert after["summaries/retries"] == 36
    assert after["summaries/pending"] == 0
    assert after["summaries/cost"] == before["summaries/cost"]
    assert len(run.bank) == before["summaries/added"] > 0
    assert after["batch/groups_with_teacher"] == 1.0  # earlier skills are still used
    assert summaries_note(after) == "summaries: 108 calls, 3,600 tokens in, 720 out, cost 0.0108"


def test_pending_summaries_survive_a_restart_with_another_server(
    tiny_model: Path, tmp_path: Path, servers: list[FakeEndpoint], caplog: pytest.LogCaptureFixture
) -> None:
    """From the third iteration on the server hangs; the run then resumes with a new server at another port.

    The API key is in no file of the run's folder and in no log.
    """
    caplog.set_level(logging.DEBUG)
    folder = tmp_path / "run"

    def config(server: FakeEndpoint, iterations: int) -> RunConfig:
        training = {"training": {"iterations": iterations}}
        return RunConfig.model_validate(toy_settings(tiny_model, **settings(server, deterministic=False), **training))

    hangs_now = False
    servers.append(FakeEndpoint(answer=lambda request: hanging(request) if hangs_now else new_skill(request)))

    def on_record(kind: str, record: Any) -> None:
        nonlocal hangs_now
        hangs_now |= kind == "iteration" and record["iteration"] == 2

    assert run_training(config(servers[0], 4), folder, on_record=on_record)
    found = checkpoint.latest(folder)
    assert found is not None
    left = json.loads((found / "state.json").read_text())
    waiting = [p["source"] for p in left["pending_summaries"] if p["skill"] is None]
    assert len(waiting) >= 24
    assert {source.split("/")[0] for source in waiting} >= {"iteration-3", "iteration-4"}
    assert left["summary_stats"]["submitted"] == 48

    servers.append(FakeEndpoint(answer=new_skill))
    assert run_training(config(servers[1], 5), folder, resume=True)
    *_, record = read(folder / METRICS)
    assert record["iteration"] == 5
    assert record["summaries/submitted"] == 60
    assert record["summaries/resumed"] == len(left["pending_summaries"])
    assert record["summaries/calls"] >= left["summary_stats"]["calls"]
    asked = {request.text for request in servers[1].requests}
    assert len(asked) >= 10  # the hanging requests were sent again
    everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"MY_KEY" in everything
    assert KEY.encode() not in everything
    assert KEY not in caplog.text
    with Bank(folder / "skills.sqlite") as bank:
        assert {skill.source for skill in bank.skills()} & set(waiting)


def test_environments_secrets_are_in_no_skill(make_run: MakeRun, servers: list[FakeEndpoint]) -> None:
    class WithSecrets(Toy):
        def secrets(self, task: Task) -> Sequence[str]:
            return (f"code {task.id}",)

    servers.append(FakeEndpoint(completion({**SKILL, "golden_workflow": "Say CODE train-3."})))
    run = make_run(toy=WithSecrets(), training={"iterations": 3}, **settings(servers[0]))
    listener = go(run)
    visited = [group.task.id for group in listener.groups]
    assert listener.iterations[-1]["summaries/rejected_leaks_answer"] == 4 * visited.count("train-3") > 0
    assert {skill.task_id for skill in run.bank.skills()} == set(visited) - {"train-3"}  # not a secret of theirs


# -- the policy -----------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path: Path) -> str:
    path = tmp_path / "bare.txt"
    path.write_text("{trajectory}\n")
    return str(path)


def test_invalid_summaries_of_an_untrained_policy_do_not_stop_training(make_run: MakeRun, bare: str) -> None:
    options: dict[str, Any] = {
        "skills": {"summariser": "policy"},
        "summariser": {"prompt": bare, "max_output_tokens": 24},
        "training": {"iterations": 3},
    }
    one, two = (go(make_run(folder, **options)).iterations for folder in ("a", "b"))
    record = one[-1]
    assert record["summaries/submitted"] == record["summaries/calls"] == 36
    assert sum(n for name, n in record.items() if name.startswith("summaries/rejected_")) == 36
    assert record["summaries/pending"] == 0
    assert record["summaries/tokens_in"] > 0
    figures = [{k: v for k, v in r.items() if k.startswith(("summaries/", "rollout/reward"))} for r in one + two]
    assert figures[:3] == figures[3:]  # deterministic


def test_policys_answer_becomes_a_skill(make_run: MakeRun, bare: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(
        skills={"summariser": "policy", "teacher_extra_tokens": 200},
        summariser={"prompt": bare, "max_output_tokens": 100, "temperature": 0},
    )
    sampler: Any = run.engine.sampler
    sample = sampler.sample
    asked: list[SampleRequest] = []

    async def write_skills(request: SampleRequest) -> Sample:
        """The model plays, but its summaries are replaced."""
        if request.session is not None:
            return await sample(request)
        asked.append(request)
        await sample(request)
        ids = run.renderer.reply(json.dumps({**SKILL, "golden_workflow": f"{request.seed % 1000}"}))
        return Sample(ids, (0.0,) * len(ids), "stop")

    monkeypatch.setattr(sampler, "sample", write_skills)
    listener = go(run)
    assert len(asked) == 72
    assert {request.temperature for request in asked} == {0}
    assert len({request.seed for request in asked}) == 72
    assert all(len(request.tokens) + request.max_tokens <= run.engine.max_length for request in asked)
    assert "Turn 1" in run.renderer.text(asked[0].tokens)
    assert listener.iterations[-1]["batch/groups_with_teacher"] == 1.0
    assert run.bank.skills()[0].skill.success_analysis == "Left first."


def test_policy_summariser_needs_room_in_the_context(make_run: MakeRun) -> None:
    with pytest.raises(UserError, match=r"takes 256 tokens: too few for .*max_output_tokens \(1024\)"):
        make_run(skills={"summariser": "policy"})


# -- a user's own code ----------------------------------------------------------------------------------------------

OWN = """
from skillsd.types import Skill

class Summariser:
    def __init__(self, prefix, fail=False):
        self.prefix, self.fail = prefix, fail

    async def summarise(self, trajectory):
        if self.fail:
            raise RuntimeError("failed")
        return Skill("", "", f"{self.prefix} {trajectory.seed % 1000}")

def summarise(trajectory):
    return Skill("", "", "by a function") if trajectory.success else None

class Synchronous:
    def summarise(self, trajectory):
        return None

class Nothing:
    pass

async def asynchronous(trajectory):
    return None

number = 3

class Oldest:
    def __call__(self, skills, c):
        return 0

class Demanding:
    def __init__(self, required):
        pass

def none(skills, c):
    return None
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of a module in the current folder with a user's summarisers and picking rules."""
    (tmp_path / "own_code.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "own_code"
    sys.modules.pop("own_code", None)


def test_own_summariser_class_with_options(make_run: MakeRun, own: str) -> None:
    run = make_run(
        skills={"summariser": f"{own}:Summariser"},
        summariser={"options": {"prefix": "Go"}},
        training={"iterations": 3},
    )
    record = go(run).iterations[-1]
    assert {skill.skill.golden_workflow.split()[0] for skill in run.bank.skills()} == {"Go"}
    assert record["summaries/added"] + record["summaries/duplicate"] == record["summaries/submitted"] == 36


def test_own_summariser_that_fails_does_not_stop_training(make_run: MakeRun, own: str) -> None:
    run = make_run(
        skills={"summariser": f"{own}:Summariser"},
        summariser={"options": {"prefix": "Go", "fail": True}},
        training={"iterations": 2},
    )
    assert go(run).iterations[-1]["summaries/failed"] == 24


def test_own_summariser_function(make_run: MakeRun, own: str) -> None:
    run = make_run(skills={"summariser": f"{own}:summarise"}, training={"iterations": 3})
    record = go(run).iterations[-1]
    assert {skill.skill.golden_workflow for skill in run.bank.skills()} == {"by a function"}
    assert record["summaries/no_skill"] > 0


def test_own_picking_rule_class_and_function(make_run: MakeRun, own: str) -> None:
    run = make_run("class", skills={"pick": f"{own}:Oldest"})
    go(run)
    first_ids: dict[str, int] = {}
    for skill in run.bank.skills():
        first_ids.setdefault(skill.task_id, skill.id)
    picked = {skill.id for skill in run.bank.skills() if skill.picks}
    assert picked
    assert picked <= set(first_ids.values())
    run = make_run("function", skills={"pick": f"{own}:none"})
    assert [record["batch/groups_with_teacher"] for record in go(run).iterations] == [0.0] * 6
    assert run.bank.counts()["picks"] == 0


@pytest.mark.parametrize(
    ("skills", "options", "message"),
    [
        ({"summariser": "no_such_module:X"}, {}, "summariser 'no_such_module:X' can't be imported: No module named"),
        ({"summariser": "own_code:Absent"}, {}, "summariser 'own_code:Absent' can't be imported"),
        ({"summariser": "own_code:Synchronous"}, {}, "has a method `summarise` that is not async"),
        ({"summariser": "own_code:Nothing"}, {}, "is a class without a method `summarise`"),
        ({"summariser": "own_code:number"}, {}, "is int; expected a class with"),
        ({"summariser": "own_code:asynchronous"}, {}, "is an async function"),
        ({"summariser": "own_code:Summariser"}, {}, "can't be constructed with summariser.options {}: "),
        ({"summariser": "own_code:Summariser"}, {"prefx": 1}, "unexpected keyword argument 'prefx'"),
        ({"summariser": "own_code:summarise"}, {"prefix": 1}, "is a function and takes none"),
        ({"summariser": "rules"}, {"prefix": 1}, "they are for your own summariser"),
        ({"pick": "no_such_module:X"}, {}, "picking rule 'no_such_module:X' can't be imported"),
        ({"pick": "own_code:Absent"}, {}, "picking rule 'own_code:Absent' can't be imported"),
        ({"pick": "own_code:number"}, {}, "is int, expected a function (skills, c) -> index"),
        ({"pick": "own_code:Nothing"}, {}, "is Nothing, expected a function (skills, c) -> index"),
        ({"pick": "own_code:Demanding"}, {}, "can't be constructed without arguments"),
    ],
)
def test_own_code_with_the_wrong_form_is_refused(
    make_run: MakeRun, own: str, skills: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        make_run(skills=skills, summariser={"options": options})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("key", "value"), [("summariser", "rule"), ("summariser", "a:b:c"), ("pick", "ubc")])
def test_unknown_names_are_refused_by_the_configuration(make_run: MakeRun, key: str, value: str) -> None:
    with pytest.raises(ValidationError, match=r"or module:Class for your own"):
        make_run(skills={key: value})


# -- contradictory settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("skills", "summariser", "message"),
    [
        ({"summariser": "openai"}, {}, "summariser.model"),
        ({}, {"model": "gpt"}, "only 'openai' uses it"),
        ({"summariser": "policy", "deterministic": False}, {}, "Set skills.deterministic to true"),
        ({"summariser": "policy"}, {"prompt": "nonsense"}, "unknown template 'nonsense'"),
        (
            {"summariser": "openai"},
            {"model": "m", "requests_per_minute": 6},
            "concurrency 16 a summary may wait 160 s, but skills.timeout_seconds is 120",
        ),
        ({"summariser": "openai"}, {"model": "m", "api_key_env": "MISSING"}, "'MISSING' holds no key"),
    ],
)
def test_contradictory_settings_are_refused(
    make_run: MakeRun, skills: dict[str, Any], summariser: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        make_run(skills=skills, summariser=summariser)
    assert message in str(error.value)
