"""AppWorld's engine on our own tasks: scripted episodes, and infrastructure faults. For attacks by the agent's code,
see test_appworld_attacks.py."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from skillsd import config as configs
from skillsd.cli.app import main
from skillsd.config import RunConfig, SummariserSection
from skillsd.envs.appworld import AppWorld, client, paths
from skillsd.envs.appworld.data import SolutionTurn
from skillsd.envs.conformance import assert_conforms
from skillsd.envs.hosts import MAX_MESSAGE_BYTES, Host, HostBrokenError
from skillsd.errors import UserError
from skillsd.rollouts.collect import collect
from skillsd.rollouts.policy import Budget, EpisodeState
from skillsd.runs.build import build
from skillsd.skills.endpoint_summariser import EndpointSummariser
from skillsd.skills.summary_prompt import SummaryPrompt, load_prompt
from skillsd.types import Message, Outcome, Skill

sys.path.insert(0, str(Path(__file__).parents[1]))
from appworld_kit import play, solution, task_of
from fake_endpoint import SKILL, FakeEndpoint, Reply, Request, completion

pytestmark = pytest.mark.timeout(900)

OPEN_SECONDS, CODE_SECONDS, WAIT_SECONDS = 200.0, 60.0, 100.0
"""Far above what is needed on an idle machine: other programs may use it."""


# --- scripted episodes ---


def test_conforms_to_the_environment_interface(task_set: AppWorld) -> None:
    actions = ("print(apis.supervisor.show_profile())", "apis.supervisor.complete_task()", "1/0", "print('a' * 9999)")
    assert_conforms(task_set, episodes=1, actions=actions, demonstrations=0)


def test_reference_solutions_succeed_and_wrong_ones_fail(task_set: AppWorld) -> None:
    question, payment = task_of(task_set, "songcount"), task_of(task_set, "sendmoney")
    for task in (question, payment):
        solved = play(task_set, task, solution(task_set, task))[-1]
        assert (solved.reward, solved.success, solved.done) == (1.0, True, True)
        idle = play(task_set, task, ["apis.supervisor.complete_task()"])[-1]
        assert (idle.reward, idle.success, idle.done) == (0.0, False, True)
    wrong = play(task_set, question, ["apis.supervisor.complete_task(answer=-1)"])[-1]
    assert wrong.reward < 1
    assert not wrong.success
    *steps, end = solution(task_set, question)
    harm = (
        "for song in apis.spotify.show_song_library(access_token=token):\n"
        "    apis.spotify.remove_song_from_library(access_token=token, song_id=song['song_id'])"
    )
    harmful = play(task_set, question, [*steps, harm, end])[-1]  # solves the task, with a harmful side effect
    assert 0 < harmful.reward < 1
    assert not harmful.success


def test_the_golden_skill_is_the_summary_of_the_reference_solution(
    task_set: AppWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(task_set, "sendmoney")
    skill = task_set.golden_skill(task)
    assert skill is not None
    assert "venmo.create_transaction(" in skill.golden_workflow
    assert "access_token=" not in skill.golden_workflow  # argument names without values
    for found in (None, (SolutionTurn("", "apis.supervisor.complete_task()"),)):  # no solution, and one that fails
        monkeypatch.setattr(task_set.data, "solution", lambda task_id, given=found: given)
        assert task_set.golden_skill(task) is None


def test_the_reward_grows_with_progress(task_set: AppWorld) -> None:
    task = task_of(task_set, "sendmoney")
    steps = play(task_set, task, ["no code at all, sorry", *solution(task_set, task)])
    rewards = [step.reward for step in steps]
    assert rewards == sorted(rewards)
    assert rewards[0] == 0
    assert rewards[-1] == 1
    assert "Syntax error" in steps[0].observation


def test_outputs_match_the_engines_own_shell(task_set: AppWorld, tmp_path: Path) -> None:
    task = task_of(task_set, "songcount")
    script = [
        *solution(task_set, task)[:-1],
        "x = [1, {'a': 2}]\nprint(x)",
        "print(datetime.datetime.now(), DateTime.now(), time.time() if 'time' in globals() else '')",
        "x",
        "print(1, 2, sep='-')",
        "print(list(range(60)))",
        "1 / 0",
        "def f(n):\n    return g(n)\ndef g(n):\n    raise ValueError(n)\nprint('lost')\nf(3)",
        "y = (",
        "   ",
        "apis.spotify.no_such_api()",
        "apis.no_such_app.x()",
        "apis.spotify.show_song(song_id=99999999)",
        "apis.spotify.show_song(song_id='x')",
        "apis.venmo.create_transaction(access_token='no', receiver_email='a@b.c', amount=1)",
        "apis.venmo.add_friend(user_email='nobody@example.com', access_token='no')",
        "apis.todoist.download_attachment(task_comment_id=1, attachment_file_name='a b.pdf', access_token='no')",
        "print(apis.api_docs.show_app_descriptions())",
        "print(apis.api_docs.show_api_doc(app_name='spotify', api_name='login'))",
        "raise KeyError('a')",
        "import collections\nprint(collections.OrderedDict(a=1))",
    ]
    program = f"""
        import json, sys
        from appworld import AppWorld
        world = AppWorld({task.id!r}, experiment_name={str(tmp_path / "outputs")!r})
        print(json.dumps([world.execute(code) for code in {script!r}]), file=sys.stderr)
    """
    root = task_set.data.root.absolute()
    done = subprocess.run(
        [str(paths.python()), "-c", textwrap.dedent(program)],
        env=os.environ | {"APPWORLD_ROOT": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stderr.splitlines()[-1])

    async def ours() -> list[str]:
        world = await client.World.open(task_set.host(), task.id, OPEN_SECONDS)
        try:
            return [(await world.execute(code, CODE_SECONDS))["output"] for code in script]
        finally:
            await world.close()

    for code, mine, other in zip(script, asyncio.run(ours()), theirs, strict=True):
        assert mine.rstrip() == other.rstrip(), code


def test_a_model_behind_an_endpoint_can_be_evaluated(
    task_set: AppWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    by_instruction = {str(task.payload["instruction"]): task for task in task_set.tasks("dev")}

    def answer(request: Request) -> Reply:
        messages = request.body["messages"]
        task = next(task for text, task in by_instruction.items() if text in messages[0]["content"])
        turn = sum(message["role"] == "assistant" for message in messages)
        return completion(f"Next.\n```python\n{solution(task_set, task)[turn]}\n```")

    server = FakeEndpoint(answer=answer)
    arguments = ["eval", "--model", "a/model", "--endpoint", server.url, "--recipe", "appworld-smoke", "--split", "dev"]
    arguments += ["--limit", "4", "--temperature", "1", "--json", str(tmp_path / "x.json")]
    monkeypatch.setattr(sys, "argv", ["skillsd", *arguments])
    monkeypatch.chdir(tmp_path)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        server.close()
    output = capsys.readouterr()
    assert ended.value.code == 0, output
    [metrics] = json.loads((tmp_path / "x.json").read_text())
    assert (metrics["accuracy"], metrics["tasks"], metrics["scenario_accuracy"]) == (1.0, 4, 1.0)
    assert "whole" in output.out


def test_the_summary_prompt_has_the_episode_without_the_hidden_tests(task_set: AppWorld) -> None:
    task = task_of(task_set, "songcount")
    policy = Script(lambda prompt: [*solution(task_set, task)[:-1], "apis.supervisor.complete_task(answer=-1)"])
    budget = Budget(turns=8, turn_tokens=10, trajectory_tokens=1000)
    collected = asyncio.run(collect(policy, task_set, [task], budget, group_size=1, seed=0))
    [trajectory] = collected.groups[0].trajectories
    hidden = trajectory.turns[-1].info["failures"]
    assert hidden
    server = FakeEndpoint(completion(SKILL))
    try:
        section = SummariserSection(model="m", base_url=server.url, api_key_env=None)
        prompt = SummaryPrompt(load_prompt("summarise"), max_chars=1000, max_input_chars=section.max_input_chars)
        skill = asyncio.run(EndpointSummariser(section, prompt, Counter()).summarise(trajectory))
    finally:
        server.close()
    assert skill == Skill(**SKILL)
    [request] = server.requests
    for turn in trajectory.turns:
        assert turn.action in request.text
        assert turn.observation in request.text
    assert not [test for test in hidden if test in request.text]


def test_episodes_are_deterministic(task_set: AppWorld) -> None:
    script = ["print({'a', 'b', 'c', 'd', 'e'}, random.random(), hash('x'))", "apis.supervisor.complete_task()"]
    first, second = (play(task_set, task_of(task_set, "songcount"), script) for _ in range(2))
    assert first == second


def test_plays_the_official_data() -> None:
    if paths.official() is None:
        pytest.skip("needs AppWorld's official data: set $APPWORLD_ROOT to a folder that contains them")
    official = AppWorld(root="official", max_turns=3)
    assert (len(official.tasks("train")), len(official.tasks("dev"))) == (90, 57)
    task = official.tasks("dev")[0]
    idle = play(official, task, ["print(apis.supervisor.show_profile())", "apis.supervisor.complete_task()"])
    assert task.payload["supervisor"]["email"] in idle[0].observation
    assert (idle[-1].done, idle[-1].success) == (True, False)


# --- infrastructure faults ---


class Script:
    """A `Policy` that plays fixed actions, chosen by the prompt."""

    temperature = 1.0

    def __init__(self, actions: Callable[[tuple[Message, ...]], list[str]]) -> None:
        self._actions = actions

    def begin(
        self, prompt: tuple[Message, ...], budget: Budget, *, seed: int, session: str, context: str = ""
    ) -> EpisodeState:
        actions = self._actions(prompt)

        class Scripted(EpisodeState):
            async def act(self, turn: int) -> str | None:
                return actions[turn] if turn < len(actions) else None

            def observe(self, observation: str) -> None:
                pass

        return Scripted()


def test_episodes_of_killed_worlds_are_retried(task_set: AppWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(task_set, "songcount")
    execute, killed = client.World.execute, []

    async def kill_first(world: client.World, code: str, seconds: float) -> dict[str, Any]:
        if len(killed) < 2 and "complete_task" in code:
            assert world._pid is not None
            os.kill(world._pid, signal.SIGKILL)
            killed.append(world._pid)
        return await execute(world, code, seconds)

    monkeypatch.setattr(client.World, "execute", kill_first)
    policy = Script(lambda prompt: solution(task_set, task))
    budget = Budget(turns=8, turn_tokens=10, trajectory_tokens=1000)
    collected = asyncio.run(collect(policy, task_set, [task], budget, group_size=2, seed=0, retries=2))
    assert len(killed) == 2
    assert [t.outcome for group in collected.groups for t in group.trajectories] == [Outcome.SOLVED, Outcome.SOLVED]


def test_a_hung_world_is_killed_at_its_deadline(task_set: AppWorld) -> None:
    async def hang() -> int:
        world = await client.World.open(task_set.host(), task_of(task_set, "songcount").id, OPEN_SECONDS)
        assert world._pid is not None
        os.kill(world._pid, signal.SIGSTOP)
        with pytest.raises(HostBrokenError, match=r"took longer than 0.5 s for 'evaluate': killed"):
            await world.evaluate(0.5)
        return world._pid

    assert gone(asyncio.run(hang()))


OTHERS = re.compile(r"experiments(/outputs(/episode-.*)?)?")
"""Files of `world/episode.py`, which another test may be running."""


def test_episodes_leave_no_files_or_processes(task_set: AppWorld) -> None:
    task, host = task_of(task_set, "songcount"), client.Host(paths.python(), task_set.data.root.absolute())
    root = task_set.data.root

    def files() -> list[Path]:
        return sorted(path for path in root.rglob("*") if not OTHERS.fullmatch(str(path.relative_to(root))))

    before = files()

    async def play_and_abandon() -> None:
        world = await client.World.open(host, task.id, OPEN_SECONDS)
        for code in ("while True: pass", "import os\nos._exit(1)", "print(1)"):
            await world.execute(code, 0.5)
        await world.close()
        await client.World.open(host, task.id, OPEN_SECONDS)

    try:
        asyncio.run(play_and_abandon())
        folder = host.address.parent
        wait_for(lambda: len(jails(host)) == 1 and not [*folder.glob("outputs-*"), *folder.glob("jail-*")])
    finally:
        host.stop()
    assert not folder.exists()
    assert files() == before  # the data folder may be read-only


def test_the_server_is_restarted_and_ends_with_the_trainer(task_set: AppWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_hosts", {})  # don't use the other tests' server
    task = task_of(task_set, "songcount")
    host = task_set.host()
    host.ensure()
    assert host._process is not None
    first = host._process.pid
    os.kill(first, signal.SIGKILL)
    host._process.wait()
    assert play(task_set, task, solution(task_set, task))[-1].success
    assert host._process.pid != first
    host.stop()

    program = f"""
        import asyncio, os, signal
        from skillsd.envs.appworld import AppWorld, client
        made = AppWorld(root={str(task_set.data.root.absolute())!r})
        async def main():
            world = await client.World.open(made.host(), {task.id!r}, {OPEN_SECONDS})
            print(made.host()._process.pid, world._pid, made.host().address.parent, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        asyncio.run(main())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    *pids, folder = done.stdout.split()
    for pid in map(int, pids):
        assert gone(pid)
    assert wait_for(lambda: not Path(folder).exists())


def test_a_dead_jail_server_is_an_infrastructure_failure(task_set: AppWorld) -> None:
    """The episode is lost through no fault of the agent, and the next one gets a new server."""
    task, host = task_of(task_set, "songcount"), client.Host(paths.python(), task_set.data.root.absolute())

    async def broken() -> None:
        world = await client.World.open(host, task.id, OPEN_SECONDS)
        first = host._process
        os.kill(jails(host)[0], signal.SIGKILL)
        with pytest.raises(HostBrokenError):
            await world.execute("print(1)", CODE_SECONDS)
        assert first is not None
        assert first.wait(WAIT_SECONDS) == 0
        world = await client.World.open(host, task.id, OPEN_SECONDS)
        assert (await world.execute("print(1)", CODE_SECONDS))["output"] == "1\n"
        await world.close()

    try:
        asyncio.run(broken())
    finally:
        host.stop()


def test_a_jail_with_a_missing_protection_is_rejected(task_set: AppWorld) -> None:
    host = client.Host(paths.python(), task_set.data.root.absolute(), limits={"protections": ["limits", "moonlight"]})
    with pytest.raises(HostBrokenError, match="started without moonlight"):
        host.ensure()


def test_a_server_that_fails_to_start_reports_the_reason(tmp_path: Path) -> None:
    with pytest.raises(HostBrokenError, match=r"did not start.*No module named"):
        client.Host(Path(sys.executable), tmp_path).ensure()
    host = client.Host(Path("/bin/cat"), tmp_path, start_seconds=0.5)
    with pytest.raises(HostBrokenError, match="did not start"):
        host.ensure()


class FakeHost(Host):
    """A world server in this process that sends prepared responses."""

    def __init__(self, folder: Path, answers: Sequence[bytes]) -> None:
        super().__init__("a fake", lambda socket: [])
        self._folder, self._answers = folder, list(answers)

    def ensure(self) -> None:
        pass

    async def serve(self, use: Awaitable[Any]) -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                while self._answers and await reader.readline():
                    writer.write(self._answers.pop(0))
                    await writer.drain()
                writer.close()

        async with await asyncio.start_unix_server(answer, self.address):
            await use


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (b"", "(died|broke) during 'open'"),
        (b"nonsense\n", "malformed response to 'open': b'nonsense"),
        (b"[]\n", "malformed response"),
        (b'{"ok": []}\n', "without a valid"),
        (b'{"ok": {"apps": 3, "protections": []}}\n', "without a valid 'apps'"),
        (b'{"error": "KeyError: 3"}\n', "failed at 'open': KeyError: 3"),
        (b"x" * (MAX_MESSAGE_BYTES + 10), "broke during 'open'"),
    ],
)
def test_a_malformed_response_breaks_the_world(tmp_path: Path, response: bytes, message: str) -> None:
    host = FakeHost(tmp_path, [b'{"ok": {"pid": 999999999}}\n', *([response] if response else [])])

    async def use() -> None:
        with pytest.raises(HostBrokenError, match=message):
            await client.World.open(host, "a_1", OPEN_SECONDS)

    asyncio.run(host.serve(use()))


# --- helpers ---


def gone(pid: int) -> bool:
    return wait_for(
        lambda: not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    )


def jails(host: client.Host) -> list[int]:
    """Process ids of this server's jail server, keepers and jails."""
    assert host._process is not None
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    servers = [pid for pid, parent in parents.items() if parent == host._process.pid and "jail.py" in command(pid)]
    found = todo = servers
    while todo:
        todo = [pid for pid, parent in parents.items() if parent in todo]
        found = [*found, *todo]
    return found


def command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return ""


def wait_for(condition: Callable[[], bool], seconds: float = WAIT_SECONDS) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)
    return True


# --- options ---


def test_invalid_options_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="AppWorld prompt style"):
        AppWorld(style="reactt")
    with pytest.raises(UserError, match="max_turns is 0"):
        AppWorld(max_turns=0)
    with pytest.raises(UserError, match="not an AppWorld root"):
        AppWorld(root=str(tmp_path))


def test_splits_without_ground_truth_are_hidden_and_rejected(task_set: AppWorld, tmp_path: Path) -> None:
    """The official test splits may have none. The other splits stay usable."""
    shutil.copytree(task_set.data.root / "data", tmp_path / "data")
    for task in task_set.data.tasks("test_scenario"):
        (tmp_path / "data" / "tasks" / task.id / "ground_truth" / "evaluation.py").unlink()
    made = AppWorld(root=str(tmp_path))
    assert made.splits == ("train", "dev", "test", "dev_scenario")
    with pytest.raises(UserError, match="can't be graded: 24 tasks have no ground truth"):
        made.tasks("test_scenario")
    hard = AppWorld(root=str(tmp_path), max_difficulty=1)
    assert max(task.difficulty for task in hard.tasks("dev")) == 1


def test_conflicting_deadlines_are_rejected(task_set: AppWorld, tmp_path: Path) -> None:
    slow = AppWorld(root=str(task_set.data.root), code_seconds=90)
    with pytest.raises(UserError, match=r"step_seconds is 60, but a call of 'appworld' may take 120 s"):
        build(configs.load(RunConfig, "appworld-smoke"), tmp_path, task_set=slow)
