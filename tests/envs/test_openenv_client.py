"""The client of OpenEnv servers: against our own server, and against one that misbehaves."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

pytest.importorskip("websockets", reason="needs skillsd[openenv]")
pytest.importorskip("uvicorn", reason="needs skillsd[serve]")

from openenv_kit import Scripted, error, free_port, observation, running
from starlette.responses import PlainTextResponse
from toy_env import Toy
from toy_run import MakeRun, go

from skillsd.envs.conformance import assert_conforms
from skillsd.envs.openenv.actions import JsonAction, NoActionError, TextAction, actions_of
from skillsd.envs.openenv.environment import OpenEnv
from skillsd.envs.openenv.server import Server
from skillsd.envs.openenv.session import Session, SessionError
from skillsd.envs.sokoban import Sokoban
from skillsd.errors import UserError
from skillsd.rollouts.collect import Collected, collect
from skillsd.rollouts.policy import Budget, EpisodeState, Policy
from skillsd.types import Message, Outcome, Task

SEEDS = {"train": {"seeds": "0-3"}, "test": {"seeds": "10-11"}}


def client(url: str, **options: Any) -> OpenEnv:
    """The tasks of a scripted server, which lists none."""
    return OpenEnv(url=url, **{"splits": SEEDS, "max_turns": 3, **options})


async def played(tasks: OpenEnv | Sokoban, task: Task, actions: Sequence[str]) -> list[Any]:
    """The prompt and the steps of an episode."""
    environment = tasks.make()
    try:
        return [await environment.reset(task, 7), *[await environment.step(action) for action in actions]]
    finally:
        await environment.close()


# -- on our own server ----------------------------------------------------------------------------------------------


def test_it_conforms_and_says_what_the_environment_says() -> None:
    """Nothing is lost or changed on the way: tasks, prompts, observations, rewards, success."""
    sokoban = Sokoban()
    server = Server(sokoban, sessions=1)
    with running(server.app()) as url:
        tasks = OpenEnv(url=url, max_turns=12)
        assert_conforms(tasks, actions=["Up", "Down", "Left", "Right"])
        assert tasks.splits == sokoban.splits
        for split in sokoban.splits:
            mine, theirs = tasks.tasks(split), sokoban.tasks(split)
            assert [(task.id, task.difficulty) for task in mine] == [(task.id, task.difficulty) for task in theirs]
        place = 17
        task = sokoban.tasks("test")[place]
        plan = ["nonsense", *(sokoban.oracle(task) or "").split()]
        prompt, *steps = asyncio.run(played(tasks, tasks.tasks("test")[place], plan))
        expected, *direct = asyncio.run(played(sokoban, task, plan))
        assert prompt == expected
        for one, other in zip(steps, direct, strict=True):
            assert (one.observation, one.reward, one.done, one.success) == (
                other.observation,
                other.reward,
                other.done,
                other.success,
            )
        assert steps[-1].success
        assert server.active == 0


def test_a_closed_session_leaves_room_for_the_next_one() -> None:
    """A server with one place refuses the next session as long as it is closing the last one."""
    toy = Toy()
    toy.faults = lambda call, environment: asyncio.sleep(0.1) if call == "close" else None
    with running(Server(toy, sessions=1).app()) as url:
        tasks = OpenEnv(url=url)
        for task in tasks.tasks("train"):
            asyncio.run(played(tasks, task, ["Up"]))


def test_a_run_trains_over_the_socket_and_asks_for_no_held_out_task(make_run: MakeRun) -> None:
    toy = Toy()
    server = Server(toy, splits=["train", "tune"])
    with running(server.app()) as url:
        settings = {"evaluation": {"every": 0}, "training": {"iterations": 2}}
        run = make_run("run", OpenEnv(url=url, max_turns=3), method="grpo", **settings)  # type: ignore[arg-type]
        listener = go(run)
    assert len(listener.iterations) == 2
    assert {group.task.split for group in listener.groups} == {"train"}
    resets = [task.partition("-")[0] for environment in toy.made for task, _ in environment.resets]
    assert resets.count("train") == 2 * 3 * 4
    assert set(resets) == {"train", "tune"}  # tune: the learning curve
    assert all(environment.closed for environment in toy.made)


# -- on a server that misbehaves ------------------------------------------------------------------------------------


class Saying(Policy):
    """Says the same in every turn."""

    def __init__(self, text: str = "go") -> None:
        self._text = text

    def begin(self, prompt: Any, budget: Any, **_: Any) -> EpisodeState:
        text = self._text

        class State(EpisodeState):
            async def act(self, turn: int) -> str:
                self.action_span = (0, 0)
                return text

            def observe(self, observation: str) -> None:
                pass

        return State()


def collected(tasks: OpenEnv, *, retries: int = 1, step_seconds: float = 20) -> Collected:
    """One group of two episodes."""
    budget = Budget(turns=tasks.max_turns, turn_tokens=8, trajectory_tokens=64, step_seconds=step_seconds)
    found = collect(Saying(), tasks, tasks.tasks("train")[:1], budget, group_size=2, seed=0, retries=retries)
    return asyncio.run(found)


FAULTS: dict[str, tuple[Any, str]] = {
    "dropped": (RuntimeError("crash"), "the server closed the connection during"),
    "text": ("no JSON", "malformed answer"),
    "list": ("[1]", "malformed answer"),
    "nested": ("[" * 100_000, "malformed answer"),
    "no type": ({"data": {}}, "malformed answer"),
    "no observation": ({"type": "observation", "data": {"done": True}}, "the server sent no observation"),
    "reward in words": (observation("much"), "the server's reward is 'much'"),
    "no number": ('{"type": "observation", "data": {"observation": {}, "reward": NaN}}', "the server's reward is nan"),
    "done in words": (observation(done="no"), "the server's done is 'no'"),
    "an error": (error("EXECUTION_ERROR", "disk full"), r"disk full \(EXECUTION_ERROR\)"),
    "no code": ({"type": "error", "data": {}}, r"None \(None\)"),
    "full": (error("CAPACITY_REACHED"), "set rollout.concurrency to no more than its sessions"),
}


@pytest.mark.parametrize("kind", ["reset", "step"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_infrastructure_failures_and_played_again(kind: str, fault: str) -> None:
    """The first episode has the fault. It is played again, in a new session, and no reward is made up."""
    wrong, reason = FAULTS[fault]
    faults = iter([wrong])

    def answer(given: str, data: dict[str, Any]) -> Any:
        if given == kind and (fault_now := next(faults, None)) is not None:
            return fault_now
        return observation(1.0, given == "step", text="hello")

    server = Scripted(answer)
    with running(server.app) as url:
        found = collected(client(url))
        [group] = found.groups
        assert [episode.outcome for episode in group.trajectories] == [Outcome.SOLVED] * 2
        assert found.infra_failures == {Outcome.ENV_ERROR: 1}
        _matches(found.reason, reason)
        if fault != "dropped":
            assert _waits_for(lambda: server.active == 0)


def test_a_group_is_dropped_if_the_server_fails_in_every_attempt() -> None:
    with running(Scripted(lambda kind, data: error("FACTORY_ERROR")).app) as url:
        found = collected(client(url))
        assert not found.groups
        assert found.infra_failures == {Outcome.ENV_ERROR: 4}
        assert len(found.dropped) == 1


def test_a_server_that_is_gone_is_an_infrastructure_failure() -> None:
    with running(Scripted(lambda kind, data: observation(text="hello")).app) as url:
        tasks = client(url)
        tasks.check_machine()
    found = collected(tasks, retries=0)
    assert found.infra_failures == {Outcome.ENV_ERROR: 2}
    _matches(found.reason, f"can't connect to {url.replace('http', 'ws')}/ws: ")
    with pytest.raises(UserError, match=rf"^no OpenEnv server answers at {url}: .*\. Start it, or correct"):
        tasks.check_machine()


def test_a_slow_server_is_a_timeout_and_loses_its_session() -> None:
    async def slow() -> Any:
        await asyncio.sleep(30)

    server = Scripted(lambda kind, data: slow() if kind == "step" else observation(text="hello"))
    with running(server.app) as url:
        start = time.monotonic()
        found = collected(client(url), retries=0, step_seconds=0.3)
        assert time.monotonic() - start < 8
        assert found.infra_failures == {Outcome.TIMEOUT: 2}


def test_a_busy_trainer_does_not_lose_its_sessions() -> None:
    """Servers ping; the event loop of the episodes also runs the model, which blocks it for longer than they wait."""

    async def play(tasks: OpenEnv) -> None:
        environment = tasks.make()
        await environment.reset(tasks.tasks("train")[0], 0)
        time.sleep(1.5)
        assert (await environment.step("Up")).observation
        await environment.close()

    with running(Server(Sokoban()).app(), ws_ping_interval=0.2, ws_ping_timeout=0.2) as url:
        asyncio.run(play(OpenEnv(url=url)))


def test_a_session_that_was_lost_is_not_used_again() -> None:
    async def play(url: str) -> None:
        session = await Session.open(url.replace("http", "ws") + "/ws")
        with pytest.raises(SessionError, match="closed the connection"):
            await session.ask("step", {})
        with pytest.raises(SessionError, match="lost before"):
            await session.ask("step", {})
        await session.close()
        await session.close()

    with running(Scripted(lambda kind, data: RuntimeError("crash")).app) as url:
        asyncio.run(play(url))


def test_half_a_surrogate_pair_is_replaced() -> None:
    with running(Scripted(lambda kind, data: observation(text="a \ud800 b")).app) as url:
        [prompt], step = asyncio.run(played(client(url), Task("seed-0", "openenv", "train", {"reset": {}}), ["x"]))
        assert prompt.content == step.observation == "a ? b"


# -- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": None}, r"openenv needs environment.options.url"),
        ({"url": "example.org:80"}, r"url is 'example.org:80': expected the address of an OpenEnv server"),
        ({"url": 8000}, r"url is 8000: expected"),
        ({"max_turns": 0}, r"environment.options.max_turns is 0 \(int\), expected a positive integer"),
        ({"full_reward": 0}, r"full_reward is 0: expected more than 0"),
        ({"full_reward": "1"}, r"full_reward is '1' \(str\), expected a finite number"),
        ({"reward": "max"}, r"unknown value of the option reward 'max'.*Known: last, sum"),
        ({"splits": ["train"]}, r"splits is \['train'\]: expected a mapping of names, e.g. {train: {seeds: 0-199}"),
        ({"splits": {"train": 3}}, r"splits.train is 3: expected the name of a split of the server, or seeds"),
        ({"splits": {"train": {"seeds": "9-0"}}}, r"splits.train .*: expected the first and the last seed"),
        ({"splits": {"train": {"seeds": 5}}}, r"splits.train .*: expected the first and the last seed"),
        (
            {"splits": {"train": {"seeds": "0-9"}, "test": {"seeds": "9-12"}}},
            r"the seed 9 is in the splits 'train' and 'test': held-out tasks must be other ones",
        ),
        (
            {"splits": {"train": "all", "test": {"split": "all"}}},
            r"the server's split 'all' is in the splits 'train' and 'test'",
        ),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as found:
        OpenEnv(**{"url": "http://127.0.0.1:1", **options})
    assert "\n" not in str(found.value)


TOOLS = {"action": {"properties": {"type": {}, "tool_name": {}, "arguments": {}}}}


@pytest.mark.parametrize(
    ("schema", "options", "message"),
    [
        ({}, {}, "is no OpenEnv server: /schema has no schema of its actions"),
        (TOOLS, {}, r"takes calls of tools \(MCP\) but lists no tools"),
        ({"action": {"properties": {"metadata": {}}}}, {}, r"takes calls of tools \(MCP\) but lists no tools"),
        (None, {"action_field": "acton"}, r"option action_field\) 'acton'. Did you mean 'action'"),
        (None, {"observation_field": "txt"}, r"option observation_field\) 'txt'. Did you mean 'text'"),
        (None, {"success_field": "won"}, r"option success_field\) 'won'"),
    ],
)
def test_a_server_that_does_not_fit_is_one_line_before_the_run(schema: Any, options: Any, message: str) -> None:
    with running(Scripted(lambda kind, data: None, schema).app) as url:
        with pytest.raises(UserError, match=message) as found:
            client(url, **options).check_machine()
        assert "\n" not in str(found.value)


def test_what_is_no_openenv_server_is_named() -> None:
    routes = {"/schema": PlainTextResponse("<html>")}
    with (
        running(Scripted(lambda kind, data: None, routes=routes).app) as url,
        pytest.raises(UserError, match=r"/schema did not answer with JSON: is it an OpenEnv server\?"),
    ):
        client(url).check_machine()
    routes = {"/schema": PlainTextResponse("full", 503)}
    with (
        running(Scripted(lambda kind, data: None, routes=routes).app) as url,
        pytest.raises(UserError, match=r"the OpenEnv server failed at .*/schema: HTTP 503 full"),
    ):
        client(url).check_machine()
    with pytest.raises(UserError, match="no OpenEnv server answers at"):
        client(f"http://127.0.0.1:{free_port()}").check_machine()


# -- tasks ----------------------------------------------------------------------------------------------------------


def listing(**splits: list[Any]) -> dict[str, Any]:
    """The routes of a server that lists these tasks."""
    return {
        "/scripted/splits": [{"name": name, "type": "train"} for name in splits],
        "POST /scripted/tasks": lambda data: {"tasks": splits[data["split"]]},
        "POST /scripted/num_tasks": lambda data: {"num_tasks": len(splits[data["split"]]) + (data["split"] == "big")},
    }


def test_the_server_lists_the_tasks() -> None:
    """Ids of the content stay; ids that only count are made unique. Easy tasks come first."""
    train = [{"id": "b", "index": 0, "difficulty": 2}, {"id": "a", "index": 1, "difficulty": 1}]
    routes = listing(train=train, test=[{"id": "0", "index": 0}, "text"], big=[{"index": 0}])
    with running(Scripted(lambda kind, data: None, routes=routes).app) as url:
        tasks = OpenEnv(url=url)
        assert tasks.splits == ("train", "test", "big")
        assert [task.id for task in tasks.tasks("train")] == ["a", "b"]
        assert [task.id for task in tasks.tasks("test")] == ["test-0", "test-1"]
        assert tasks.tasks("test")[1].payload == {"reset": {"split": "test", "index": 1}}
        assert [task.id for task in tasks.tasks("big")] == ["big-0", "big-1"]  # it lists the first task only
        with pytest.raises(UserError, match=r"unknown split of the server .* 'tst'. Did you mean 'test'"):
            tasks.tasks("tst")
        renamed = OpenEnv(url=url, splits={"train": "big", "tune": {"split": "test", "level": 3}})
        assert renamed.splits == ("train", "tune")
        assert renamed.tasks("tune")[0].payload == {"reset": {"split": "test", "index": 0, "level": 3}}


def test_a_task_in_two_splits_is_refused() -> None:
    routes = listing(train=[{"id": "one"}], test=[{"id": "two"}, {"id": "one"}])
    with (
        running(Scripted(lambda kind, data: None, routes=routes).app) as url,
        pytest.raises(UserError, match=r"lists the task 'one' in the splits 'train' and 'test': held-out tasks"),
    ):
        OpenEnv(url=url).tasks("train")


def test_resets_from_the_recipe() -> None:
    """A task's own seed is its seed; other resets get the episode's, small enough for any generator."""
    server = Scripted(lambda kind, data: observation(text="hello"), routes=listing(train=[{"id": "a"}]))
    with running(server.app) as url:
        tasks = client(url, splits={"train": {"seeds": "5-6", "level": "easy"}, "test": {"seeds": "5-6"}})
        assert [task.id for task in tasks.tasks("test")] == ["seed-5", "seed-6"]
        assert tasks.tasks("train")[0].id not in ("seed-5", "seed-6")
        asyncio.run(played(tasks, tasks.tasks("train")[1], []))
        listed = OpenEnv(url=url)

        async def play() -> None:
            environment = listed.make()
            await environment.reset(listed.tasks("train")[0], 2**62 + 3)
            await environment.close()

        asyncio.run(play())
    assert server.received == [
        ("reset", {"seed": 6, "level": "easy"}),
        ("reset", {"seed": 3, "split": "train", "index": 0}),
    ]


def test_a_server_without_a_list_asks_for_seeds() -> None:
    with running(Scripted(lambda kind, data: None).app) as url:
        with pytest.raises(UserError, match=r"lists no tasks of 'scripted': give seeds for its resets, e.g. "):
            _ = OpenEnv(url=url).splits
        with pytest.raises(UserError, match=r"lists no tasks of the split 'train'"):
            OpenEnv(url=url, splits={"train": "train"}).tasks("train")
    routes = {"/list_environments": ["one", "two"]}
    with running(Scripted(lambda kind, data: None, routes=routes).app) as url:
        with pytest.raises(UserError, match=r"lists these environments: one, two: give the name in environment\.opti"):
            _ = OpenEnv(url=url).splits
        with pytest.raises(UserError, match="lists no tasks of 'two'"):
            _ = OpenEnv(url=url, env="two").splits


def test_the_fingerprint_covers_what_decides_a_result() -> None:
    with running(Scripted(lambda kind, data: None).app) as url:
        assert client(url).fingerprint("test") == client(url).fingerprint("test")
        changes: list[dict[str, Any]] = [{"full_reward": 2}, {"instructions": "Play."}, {"reward": "sum"}]
        changes += [{"splits": {"train": {"seeds": "0-3"}, "test": {"seeds": "10-12"}}}, {"success_field": "success"}]
        prints = {client(url, **change).fingerprint("test") for change in [{}, *changes]}
        assert len(prints) == len(changes) + 1


# -- actions, observations, rewards ---------------------------------------------------------------------------------


def fields(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "title": "A", "properties": {**properties, "metadata": {"type": "object"}}}


TEXT, NUMBER = {"type": "string", "title": "T"}, {"type": "integer"}


def test_the_schema_decides_how_actions_are_written() -> None:
    assert actions_of(fields(move=TEXT), None) == TextAction("move")
    assert actions_of(fields(move=TEXT, note=TEXT), "note") == TextAction("note")
    for schema in (fields(move=NUMBER), fields(move=TEXT, n=NUMBER), fields(move={"type": "string", "enum": ["a"]})):
        assert isinstance(actions_of(schema, None), JsonAction)
    with pytest.raises(UserError, match="action_field is 'n', which takes no text"):
        actions_of(fields(move=TEXT, n=NUMBER), "n")
    with pytest.raises(UserError, match="an action also needs n"):
        actions_of({**fields(move=TEXT, n=NUMBER), "required": ["move", "n"]}, "move")


def test_the_agent_reads_a_short_schema_and_writes_json() -> None:
    found = actions_of({**fields(title=TEXT, n=NUMBER), "required": ["n"], "additionalProperties": False}, None)
    assert isinstance(found, JsonAction)
    assert found.instructions.endswith(
        ': {"type": "object", "properties": {"title": {"type": "string"}, "n": {"type": "integer"}}, "required": ["n"]}'
    )
    assert found.parse('I think.\n```json\n{"n": 3, "title": "{}"}\n```') == {"n": 3, "title": "{}"}
    for text in ("", "no", "}{", '{"n": 3', "[3]", '{"n": NaN}', '{"n"' * 50_000 + "}"):
        with pytest.raises(NoActionError):
            found.parse(text)


def test_an_invalid_action_is_explained_and_changes_nothing() -> None:
    """No JSON at all is answered here; what does not fit the schema, by the server."""
    errors = [{"loc": ["n"], "msg": "too small"}, {"loc": ["n", 0], "msg": "odd"}]
    refusal = error("VALIDATION_ERROR", "Invalid message", errors=errors)
    answers = iter([observation(board="x"), observation(0.5, board="y"), refusal, observation(0.5, True, board="z")])
    server = Scripted(lambda kind, data: next(answers), {"action": fields(n=NUMBER), "observation": fields(n=NUMBER)})
    with running(server.app) as url:
        actions = ['{"n": 1}', "no JSON", '{"n": -1}', '{"n": 2}']
        tasks = client(url)
        [prompt], *steps = asyncio.run(played(tasks, tasks.tasks("train")[0], actions))
    assert prompt.content.startswith("Each of your answers is one JSON object")
    assert prompt.content.endswith('\n\n{"board": "x"}')
    assert [step.observation for step in steps] == [
        '{"board": "y"}',
        "Invalid action: it has no JSON object",
        "Invalid action: n: too small; n.0: odd",
        '{"board": "z"}',
    ]
    assert [step.reward for step in steps] == [0.5] * 4
    assert [data for _, data in server.received[1:]] == [{"n": 1}, {"n": -1}, {"n": 2}]


SEEN = {"action": fields(action=TEXT), "observation": fields(board=TEXT, hint=TEXT, solved={"type": "boolean"})}


@pytest.mark.parametrize(
    ("options", "rewards", "expected"),
    [
        ({}, [(0.5, False), (None, False), (1.0, True)], [(0.5, False), (0.5, False), (1.0, True)]),
        ({}, [(-1.0, False), (0.25, True)], [(0.0, False), (0.25, False)]),
        ({}, [(1.0, False), (0.0, True)], [(1.0, False), (0.0, False)]),
        ({"reward": "sum", "full_reward": 4}, [(3, False), (-1, False), (2, True)], [(0.75, 0), (0.5, 0), (1.0, 1)]),
        ({"full_reward": 10}, [(5, False), (12, True)], [(0.5, False), (1.0, True)]),
        ({"success_field": "solved"}, [(1.0, False), (1.0, True)], [(1.0, False), (1.0, False)]),
    ],
)
def test_rewards_and_success(options: Any, rewards: Any, expected: Any) -> None:
    answers = iter([observation(board="x"), *(observation(*reward, board="x") for reward in rewards)])
    with running(Scripted(lambda kind, data: next(answers), SEEN).app) as url:
        tasks = client(url, **options)
        _, *steps = asyncio.run(played(tasks, tasks.tasks("train")[0], ["go"] * len(rewards)))
    assert [(step.reward, step.success) for step in steps] == expected
    assert [step.info["reward"] for step in steps] == [reward for reward, _ in rewards]


def test_the_success_field_decides() -> None:
    answers = iter([observation(board="x"), observation(0.3, True, board="x", solved=True)])
    with running(Scripted(lambda kind, data: next(answers), SEEN).app) as url:
        tasks = client(url, success_field="solved")
        _, step = asyncio.run(played(tasks, tasks.tasks("train")[0], ["go"]))
    assert (step.reward, step.success) == (1.0, True)


def test_what_the_agent_reads() -> None:
    """The chosen field, or the only one with text, or all; messages of a reset as they are; never nothing."""
    chat = [{"role": "system", "content": "Rules."}, {"role": "user", "content": "Go."}]
    cases: list[tuple[dict[str, Any], dict[str, Any], tuple[Message, ...]]] = [
        ({}, {"board": "x", "hint": "y", "metadata": {}}, (Message("user", '{"board": "x", "hint": "y"}'),)),
        ({"observation_field": "hint"}, {"board": "x", "hint": "y"}, (Message("user", "y"),)),
        ({"observation_field": "hint"}, {"board": "x", "hint": " "}, (Message("user", "(empty)"),)),
        ({"observation_field": "hint"}, {"board": "x", "hint": [1]}, (Message("user", "[1]"),)),
        ({}, {"messages": chat}, (Message("system", "Rules."), Message("user", "Go."))),
        ({"instructions": "Win."}, {"messages": chat}, (Message("system", "Rules."), Message("user", "Win.\n\nGo."))),
        ({}, {"messages": ["Go."]}, (Message("user", '{"messages": ["Go."]}'),)),
    ]  # fmt: skip
    for options, found, expected in cases:
        server = Scripted(lambda kind, data, found=found: observation(**found), SEEN)  # type: ignore[misc]
        with running(server.app) as url:
            tasks = client(url, **options)
            assert asyncio.run(played(tasks, tasks.tasks("train")[0], [])) == [expected]
    server = Scripted(lambda kind, data: observation(0.0, hint="h", board="b"), SEEN)
    with running(server.app) as url:
        tasks = client(url, observation_field="hint")
        _, step = asyncio.run(played(tasks, tasks.tasks("train")[0], ["go"]))
        assert step.info == {"reward": 0.0, "observation": {"board": "b"}}


def test_an_episode_that_is_over_after_its_reset_is_an_infrastructure_failure() -> None:
    with running(Scripted(lambda kind, data: observation(done=True, text="hello")).app) as url:
        found = collected(client(url), retries=0)
        _matches(found.reason, "the server's reset says that the episode is over")


def _matches(text: str, part: str) -> None:
    assert re.search(part, text), text


def _waits_for(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()
