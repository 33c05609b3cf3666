"""The real engine on our own tasks: scripted play, attacks by the model's code, faults of the infrastructure."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from skillsd import cli
from skillsd import config as configs
from skillsd.config import RunConfig, SummariserSection
from skillsd.envs.appworld import AppWorld, client, paths
from skillsd.envs.appworld.data import SolutionTurn
from skillsd.envs.appworld.environment import AppWorldEnvironment
from skillsd.envs.base import Step
from skillsd.envs.conformance import assert_conforms
from skillsd.errors import UserError
from skillsd.rollouts.collect import collect
from skillsd.rollouts.episode import Budget, Part
from skillsd.skills.endpoint import EndpointSummariser
from skillsd.skills.prompt import SummaryPrompt, load_prompt
from skillsd.training.run import build
from skillsd.types import Message, Outcome, Skill, Task

sys.path.insert(0, str(Path(__file__).parents[1]))
from fake_endpoint import SKILL, FakeEndpoint, Reply, Request, completion

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def task_set() -> Iterator[AppWorld]:
    try:
        paths.python()
        made = AppWorld(style="short", max_turns=8, max_observation_chars=1000, code_seconds=3)
    except UserError as error:
        pytest.skip(str(error))
    yield made
    made.host().stop()


def task_of(task_set: AppWorld, scenario: str) -> Task:
    return next(task for task in task_set.tasks("train") if task.id.startswith(scenario + "_"))


def solution(task_set: AppWorld, task: Task) -> list[str]:
    return [turn.code for turn in task_set.data.solution(task.id) or ()]


def play(task_set: AppWorld, task: Task, actions: Sequence[str]) -> list[Step]:
    return asyncio.run(task_set.play(task, actions))


# ------------------------------------------------------------------------------------------------- playing by the rules


def test_keeps_every_promise_of_an_environment(task_set: AppWorld) -> None:
    actions = ("print(apis.supervisor.show_profile())", "apis.supervisor.complete_task()", "1/0", "print('a' * 9999)")
    assert_conforms(task_set, episodes=1, actions=actions)


def test_reference_solutions_solve_and_others_do_not(task_set: AppWorld) -> None:
    question, payment = task_of(task_set, "songcount"), task_of(task_set, "sendmoney")
    for task in (question, payment):
        solved = play(task_set, task, solution(task_set, task))[-1]
        assert (solved.score, solved.success, solved.done) == (1.0, True, True)
        idle = play(task_set, task, ["apis.supervisor.complete_task()"])[-1]
        assert (idle.score, idle.success, idle.done) == (0.0, False, True)
    wrong = play(task_set, question, ["apis.supervisor.complete_task(answer=-1)"])[-1]
    assert wrong.score < 1
    assert not wrong.success
    *steps, end = solution(task_set, question)
    harm = (
        "for song in apis.spotify.show_song_library(access_token=token):\n"
        "    apis.spotify.remove_song_from_library(access_token=token, song_id=song['song_id'])"
    )
    harmful = play(task_set, question, [*steps, harm, end])[-1]  # what was asked for, and damage besides
    assert 0 < harmful.score < 1
    assert not harmful.success


def test_a_golden_skill_is_what_the_rules_write_of_the_reference_solution(
    task_set: AppWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(task_set, "sendmoney")
    skill = task_set.golden_skill(task)
    assert skill is not None
    assert "venmo.create_transaction(" in skill.golden_workflow
    assert "access_token=" not in skill.golden_workflow  # names of arguments, no code
    for solution in (None, (SolutionTurn("", "apis.supervisor.complete_task()"),)):  # none, and one that solves nothing
        monkeypatch.setattr(task_set.data, "solution", lambda task_id, given=solution: given)
        assert task_set.golden_skill(task) is None


def test_the_score_grows_with_what_is_done_and_no_turn_is_lost(task_set: AppWorld) -> None:
    task = task_of(task_set, "sendmoney")
    steps = solution(task_set, task)
    answers = play(task_set, task, ["no code at all, sorry", *steps])
    scores = [step.score for step in answers]
    assert scores == sorted(scores)
    assert scores[0] == 0
    assert scores[-1] == 1
    assert "Syntax error" in answers[0].observation


def test_answers_in_the_words_of_the_engines_own_shell(task_set: AppWorld, tmp_path: Path) -> None:
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
        world = await client.World.open(task_set.host(), task.id, 60)
        try:
            return [(await world.execute(code, 20))["output"] for code in script]
        finally:
            await world.close()

    for code, mine, other in zip(script, asyncio.run(ours()), theirs, strict=True):
        assert mine.rstrip() == other.rstrip(), code


def test_any_model_behind_an_endpoint_is_evaluated(
    task_set: AppWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    by_instruction = {str(task.payload["instruction"]): task for task in task_set.tasks("dev")}

    def answer(request: Request) -> Reply:
        messages = request.body["messages"]
        task = next(task for words, task in by_instruction.items() if words in messages[0]["content"])
        turn = sum(message["role"] == "assistant" for message in messages)
        return completion(f"Next.\n```python\n{solution(task_set, task)[turn]}\n```")

    server = FakeEndpoint(answer=answer)
    words = ["eval", "--model", "a/model", "--endpoint", server.url, "--recipe", "appworld-smoke", "--split", "dev"]
    words += ["--limit", "4", "--temperature", "1", "--json", str(tmp_path / "x.json")]
    monkeypatch.setattr(sys, "argv", ["skillsd", *words])
    monkeypatch.chdir(tmp_path)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        server.close()
    said = capsys.readouterr()
    assert ended.value.code == 0, said
    [figures] = json.loads((tmp_path / "x.json").read_text())
    assert (figures["accuracy"], figures["tasks"], figures["scenario_accuracy"]) == (1.0, 4, 1.0)
    assert "whole" in said.out


def test_a_language_model_summarises_what_the_agent_saw_and_no_hidden_test(task_set: AppWorld) -> None:
    task = task_of(task_set, "songcount")
    player = Script(lambda prompt: [*solution(task_set, task)[:-1], "apis.supervisor.complete_task(answer=-1)"])
    budget = Budget(turns=8, turn_tokens=10, trajectory_tokens=1000)
    collected = asyncio.run(collect(player, task_set, [task], budget, group_size=1, seed=0))
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
    assert not [words for words in hidden if words in request.text]


def test_an_episode_is_the_same_whenever_it_is_played(task_set: AppWorld) -> None:
    script = ["print({'a', 'b', 'c', 'd', 'e'}, random.random(), hash('x'))", "apis.supervisor.complete_task()"]
    first, second = (play(task_set, task_of(task_set, "songcount"), script) for _ in range(2))
    assert first == second


def test_the_official_data_are_played() -> None:
    if paths.official() is None:
        pytest.skip("AppWorld's official data are not here: $APPWORLD_ROOT names no folder that holds them")
    official = AppWorld(root="official", max_turns=3)
    assert (len(official.tasks("train")), len(official.tasks("dev"))) == (90, 57)
    task = official.tasks("dev")[0]
    idle = play(official, task, ["print(apis.supervisor.show_profile())", "apis.supervisor.complete_task()"])
    assert task.payload["supervisor"]["email"] in idle[0].observation
    assert (idle[-1].done, idle[-1].success) == (True, False)


# ------------------------------------------------------------------------------------------------------------- attacks


@pytest.fixture(scope="module")
def victim(task_set: AppWorld) -> Iterator[Callable[[str], Step]]:
    """One episode that all attacks are tried in, one after the other; each has to leave it usable."""
    patient = AppWorld(style="short", max_turns=1000, max_observation_chars=2000, code_seconds=2)
    environment = patient.make()
    assert isinstance(environment, AppWorldEnvironment)
    with asyncio.Runner() as runner:
        runner.run(environment.reset(task_of(task_set, "songcount"), 0))
        assert environment._world is not None
        missing = [name for name in client.PROTECTIONS if name not in environment._world.held]
        if missing:
            pytest.skip(f"this machine gives no jail: {', '.join(missing)} stay open (docs/appworld.md)")
        yield lambda code: runner.run(environment.step(code))
        after = runner.run(environment.step("print(apis.supervisor.show_profile()['email'])"))
        assert "@" in after.observation
        runner.run(environment.close())


def test_attack_reading_the_answer(task_set: AppWorld, victim: Callable[[str], Step]) -> None:
    truth = task_set.data.root.absolute() / "data" / "tasks" / task_of(task_set, "songcount").id / "ground_truth"
    assert (truth / "answer.json").is_file()
    for code in (
        f"print(open({str(truth / 'answer.json')!r}).read())",
        f"import pathlib\nprint(pathlib.Path({str(truth / 'answer.json')!r}).read_text())",
        f"import os\nprint(os.listdir({str(truth)!r}))",
        f"import os\nprint(os.stat({str(task_set.data.root.absolute())!r}))",
        "print(open('/proc/self/environ').read())",
    ):
        assert "No such file" in victim(code).observation


def test_attack_writing_outside_the_scratch_folder(tmp_path: Path, victim: Callable[[str], Step]) -> None:
    for folder in (str(tmp_path), "/", "/tmp", "/usr", "/etc", "/dev/shm", "/root", sys.prefix):
        answer = victim(f"open({folder + '/skillsd-attack'!r}, 'w').write('x')").observation
        assert "No such file" in answer or "Read-only" in answer or "Permission denied" in answer, (folder, answer)
        assert not Path(folder, "skillsd-attack").exists()
    assert victim("open('/scratch/mine', 'w').write('x')\nprint(open('/scratch/mine').read())").observation == "x"


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import os\nos.posix_spawn('/bin/sh', ['sh', '-c', 'touch MADE'], {})", id="posix_spawn"),
        pytest.param("import subprocess\nsubprocess.run(['touch', 'MADE'])", id="subprocess"),
        pytest.param("import os\nwhile True: os.fork()", id="fork bomb"),
        pytest.param("import threading\nthreading.Thread(target=print).start()", id="threads"),
        pytest.param("import multiprocessing\nmultiprocessing.Process(target=print).start()", id="multiprocessing"),
    ],
)
def test_attack_starting_processes(tmp_path: Path, victim: Callable[[str], Step], code: str) -> None:
    made = tmp_path / "made"
    answer = victim(code.replace("MADE", str(made))).observation
    assert "temporarily unavailable" in answer or "can't start new thread" in answer, answer
    assert not made.exists()


def test_attack_killing_other_processes(victim: Callable[[str], Step]) -> None:
    killed = victim(
        "import os\nfor pid in (1, os.getppid(), -1):\n  try: os.kill(pid, 9)\n  except OSError as e: print(e)"
    )
    assert killed.observation.count("Operation not permitted") >= 2


@pytest.mark.parametrize("command", [[], ["unshare", "-Ur"]], ids=["as root or user", "as a namespace's root"])
def test_attack_killing_the_process_group(task_set: AppWorld, command: list[str]) -> None:
    """``kill(0)`` asks for the kernel's user id only, and namespaces do not stop it: other episodes must go on."""
    task = task_of(task_set, "songcount")
    program = f"""
        import asyncio
        from skillsd.envs.appworld import AppWorld, client
        made = AppWorld(root={str(task_set.data.root.absolute())!r})
        async def main():
            one, other = [await client.World.open(made.host(), {task.id!r}, 60) for _ in range(2)]
            print((await one.execute("import os\\nos.kill(0, 9)", 5))["error"])
            for world in (one, other):
                print((await world.execute("print(7)", 5))["output"].strip())
            print(made.host()._process.poll())
        asyncio.run(main())
        made.host().stop()
    """
    script = [*command, sys.executable, "-c", textwrap.dedent(program)]
    if command and subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip(f"{' '.join(command)} is not to be had here")
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.stdout.split("\n") == ["RuntimeError: the Python session ended", "7", "7", "None", ""], done.stderr


def test_attack_network(victim: Callable[[str], Step]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        answer = victim(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)").observation
        assert "unreachable" in answer
        with pytest.raises(TimeoutError):
            server.accept()
    assert "unreachable" in victim("import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=1)").observation


def test_attack_a_loop_that_swallows_the_timeout(victim: Callable[[str], Step]) -> None:
    victim("kept = 1")
    begin = time.monotonic()
    answer = victim("while True:\n    try:\n        while True: pass\n    except BaseException: pass")
    assert time.monotonic() - begin < 20
    assert "timed out after 2 seconds" in answer.observation
    assert "restarted" in answer.observation
    assert "NameError" in victim("print(kept)").observation


def test_attack_five_megabytes_of_output(victim: Callable[[str], Step]) -> None:
    flood = victim("print('x' * 5_000_000)")
    assert len(flood.observation) < 2200
    assert "characters left out" in flood.observation


def test_attack_memory_bomb(victim: Callable[[str], Step]) -> None:
    assert "MemoryError" in victim("x = bytearray(4 << 30)").observation
    assert "MemoryError" in victim("x = []\nfor i in range(99): x.append(bytearray(1 << 26))").observation


def test_attack_filling_the_disk(victim: Callable[[str], Step]) -> None:
    assert "Errno" in victim("f = open('/scratch/big', 'wb')\nwhile True: f.write(bytes(1 << 22))").observation
    many = "for i in range(9999): open(f'/scratch/{i}', 'wb').close()"
    assert "No space left" in victim(many).observation
    victim("import os\nfor name in os.listdir('/scratch'): os.remove('/scratch/' + name)")
    full = "for i in range(40): open(f'/scratch/{i}', 'wb').write(bytes(4 << 20))"
    assert "No space left" in victim(full).observation


def test_attack_by_calls_that_no_namespace_covers(victim: Callable[[str], Step]) -> None:
    """Memory that no limit counts, the way out of a virtual machine, key rings, namespaces and mounts of one's own."""
    for call in ("memfd_create(b'x', 0)", "shmget(0, 1 << 20, 0o1600)", "unshare(0x10000000)", "ptrace(0, 0, 0, 0)"):
        code = f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nprint(libc.{call}, ctypes.get_errno())"
        assert victim(code).observation == "-1 1", call
    assert "not permitted" in victim("import socket\nsocket.socket(socket.AF_VSOCK)").observation
    assert "not permitted" in victim("import socket\nsocket.socket(socket.AF_NETLINK)").observation


def test_attack_by_floods_of_calls(victim: Callable[[str], Step]) -> None:
    """They cost the agent its block, not the infrastructure its world."""
    retry = "while True:\n    try: apis.spotify.show_song(song_id=9)\n    except Exception: pass"
    answer = victim(retry)
    assert "timed out" in answer.observation
    assert len(answer.info["calls"]) <= 1000
    long = victim("apis.simple_note.create_note(access_token='x', title='a', content='b' * 100_000)")
    assert "longer than" in long.observation
    named = victim("print(apis.supervisor.show_profile(the_answer_is_42=1)['email'])")
    assert "the_answer" not in json.dumps(named.info["calls"])


def test_what_no_tokenizer_takes_is_replaced(victim: Callable[[str], Step]) -> None:
    assert victim("print('\\ud83d x')").observation == "? x"
    victim("raise Exception('\\ud83d')").observation.encode()


def test_attack_changing_the_world_through_its_models(victim: Callable[[str], Step]) -> None:
    """There is nothing of the engine in the process: no module, no object, no package to import."""
    code = (
        "import gc, sys\nfound = {type(o).__module__.split('.')[0] for o in gc.get_objects()} | set(sys.modules)\n"
        "print(sorted(found & {'sqlalchemy', 'sqlmodel', 'fastapi', 'IPython'}))"
    )
    assert victim(code).observation == "[]"
    assert "Error" in victim("from appworld import AppWorld").observation
    assert "Error" in victim("from appworld.apps.spotify.models import Song").observation


def test_attack_forging_messages(task_set: AppWorld, victim: Callable[[str], Step]) -> None:
    """Whatever the session sends, it can neither complete the task nor reach what is no public API."""
    victim("import os\nfor fd in range(3):\n  try: os.write(fd, b'x' * 10)\n  except OSError: pass")
    with open(task_set.host().address.parent / "log", encoding="utf-8") as log:
        assert "xxxxxxxxxx" not in log.read()
    send = "import os, json\nfor fd in range(3, 1024):\n  try: os.write(fd, {} + b'\\n')\n  except OSError: pass\n"
    forged = victim(send.format(b'{"output": "x", "error": null, "completed": true, "success": true}'))
    assert not forged.info["completed"]
    assert not forged.done
    for message in (
        b'{"call": ["admin", "set_date_and_time", {}]}',
        b'{"call": ["spotify", "__class__", {}]}',
        b'{"call": []}',
        b"[" * 50_000,
        b"nonsense",
        b'{"output": 3}',
    ):
        answer = victim(send.format(message))
        assert (answer.info["error"] is not None, answer.info["completed"]) == (True, False), message
        victim("pass")
    for path in ("../../admin/x", "..", "%2e%2e/x", "1?a=2", "1#x"):
        assert "not a valid value" in victim(f"apis.spotify.show_song(song_id={path!r})").observation
    assert "no parameter" in victim("apis.spotify.show_song(song_id=1, client=3)").observation
    assert "no parameter" in victim("apis.spotify.show_song(song_id=1, _app_name='admin')").observation


@pytest.mark.parametrize("where", ["output", "error"])
def test_attack_by_an_answer_that_is_too_long(task_set: AppWorld, where: str) -> None:
    """It costs the session. Were it passed on, the trainer would take the world for a broken one, and play again."""

    async def answer() -> dict[str, Any]:
        world = await client.World.open(task_set.host(), task_of(task_set, "songcount").id, 60)
        message = f"json.dumps({{'turn': 1, 'error': None, 'output': '', {where!r}: 'x' * 2_000_000}}).encode()"
        send = f"import os\nfor fd in range(3, 64):\n  try: os.write(fd, {message} + b'\\n')\n  except OSError: pass"
        found = await world.execute(send, 5)
        await world.close()
        return found

    assert "something that is no message" in asyncio.run(answer())["output"]


def test_attack_crashing_the_session(victim: Callable[[str], Step]) -> None:
    for code in ("import os\nos._exit(3)", "import ctypes\nctypes.string_at(0)", "import os\nos.abort()"):
        assert "restarted" in victim(code).observation
    for code in (
        "exit()",
        "raise SystemExit",
        "raise KeyboardInterrupt",
        "class E(Exception):\n  __str__ = 3\nraise E",
    ):
        answer = victim(code).observation
        assert "Execution failed" in answer
        assert "restarted" not in answer


def test_a_machine_without_namespaces_is_told_what_stays_open(task_set: AppWorld) -> None:
    """What can be had without them still is; the rest is named."""
    host = client.Host(paths.python(), task_set.data.root.absolute(), limits={"namespaces": False})

    async def held() -> list[str]:
        world = await client.World.open(host, task_of(task_set, "songcount").id, 60)
        assert (await world.execute("print(1)", 5))["output"] == "1\n"
        await world.close()
        return world.held

    try:
        found = asyncio.run(held())
    finally:
        host.stop()
    assert "files" not in found
    assert "network" not in found
    assert "limits" in found


@pytest.mark.parametrize(
    "command", [["unshare", "-Ur"], ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]]
)
def test_where_root_is_not_quite_root_a_jail_comes_up_all_the_same(task_set: AppWorld, command: list[str]) -> None:
    """A container's root: of a user namespace, without ids to give away; without the right to mount."""
    probe = [str(paths.python()), str(client.HOST / "probe.py"), json.dumps(client.LIMITS)]
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"{' '.join(command)} is not to be had here")
    done = subprocess.run([*command, *probe], capture_output=True, text=True, check=False)
    assert "limits" in json.loads(done.stdout), done.stderr


def test_doctor_tells_what_holds(task_set: AppWorld) -> None:
    async def held() -> list[str]:
        world = await client.World.open(task_set.host(), task_of(task_set, "songcount").id, 60)
        await world.close()
        return world.held

    assert sorted(client.protections(paths.python())) == sorted(asyncio.run(held()))


def test_attack_deleting_what_the_tests_look_at(task_set: AppWorld, tmp_path: Path) -> None:
    """Tests that fail with an error, because what they look at was deleted, say, are a failure of the agent's."""
    task = task_of(task_set, "songcount")
    shutil.copytree(task_set.data.root / "data", tmp_path / "data")
    broken = tmp_path / "data" / "tasks" / task.id / "ground_truth" / "evaluation.py"
    signature = "test, public_data, private_data, main_user, models, ground_truth_answer"
    broken.write_text(f"def evaluate({signature}):\n    None.deleted\n", encoding="utf-8")
    made = AppWorld(root=str(tmp_path), style="short")
    try:
        end = play(made, task, solution(task_set, task))[-1]
    finally:
        made.host().stop()
    assert (end.done, end.success, end.score) == (True, False, 0.0)


# -------------------------------------------------------------------------------------------------------------- faults


class Script:
    """A `Player` that says the lines of a reference solution."""

    temperature = 1.0

    def __init__(self, lines: Callable[[tuple[Message, ...]], list[str]]) -> None:
        self._lines = lines

    def begin(self, prompt: tuple[Message, ...], budget: Budget, *, seed: int, session: str, context: str = "") -> Part:
        lines = self._lines(prompt)

        class Reader(Part):
            async def act(self, number: int) -> str | None:
                return lines[number] if number < len(lines) else None

            def hear(self, observation: str) -> None:
                pass

        return Reader()


def test_a_killed_world_costs_a_try_and_nothing_else(task_set: AppWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(task_set, "songcount")
    execute, killed = client.World.execute, []

    async def kill_first(world: client.World, code: str, seconds: float) -> dict[str, Any]:
        if len(killed) < 2 and "complete_task" in code:
            assert world._pid is not None
            os.kill(world._pid, signal.SIGKILL)
            killed.append(world._pid)
        return await execute(world, code, seconds)

    monkeypatch.setattr(client.World, "execute", kill_first)
    player = Script(lambda prompt: solution(task_set, task))
    budget = Budget(turns=8, turn_tokens=10, trajectory_tokens=1000)
    collected = asyncio.run(collect(player, task_set, [task], budget, group_size=2, seed=0, retries=2))
    assert len(killed) == 2
    assert [t.outcome for group in collected.groups for t in group.trajectories] == [Outcome.SOLVED, Outcome.SOLVED]


def test_a_hung_world_is_killed_at_the_deadline(task_set: AppWorld) -> None:
    async def hang() -> int:
        world = await client.World.open(task_set.host(), task_of(task_set, "songcount").id, 60)
        assert world._pid is not None
        os.kill(world._pid, signal.SIGSTOP)
        with pytest.raises(client.WorldBrokenError, match=r"took longer than 0.5 s for 'evaluate': killed"):
            await world.evaluate(0.5)
        return world._pid

    assert gone(asyncio.run(hang()))


def test_nothing_is_left_of_an_episode(task_set: AppWorld) -> None:
    task, host = task_of(task_set, "songcount"), client.Host(paths.python(), task_set.data.root.absolute())
    before = sorted(task_set.data.root.rglob("*"))

    async def play_and_abandon() -> None:
        world = await client.World.open(host, task.id, 60)
        for code in ("while True: pass", "import os\nos._exit(1)", "print(1)"):
            await world.execute(code, 0.5)
        await world.close()
        await client.World.open(host, task.id, 60)

    try:
        asyncio.run(play_and_abandon())
        folder = host.address.parent
        wait_for(lambda: len(jails(host)) == 1 and not [*folder.glob("outputs-*"), *folder.glob("jail-*")])
    finally:
        host.stop()
    assert not folder.exists()
    assert sorted(task_set.data.root.rglob("*")) == before  # the data's folder may be read-only


def test_the_server_is_started_again_and_ends_with_the_trainer(
    task_set: AppWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_hosts", {})  # not the server of the other tests
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
            world = await client.World.open(made.host(), {task.id!r}, 60)
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


def test_a_server_of_jails_that_dies_takes_no_agent_down(task_set: AppWorld) -> None:
    """Its sessions end, which is no fault of theirs: the episode is lost, and the next one has a new server."""
    task, host = task_of(task_set, "songcount"), client.Host(paths.python(), task_set.data.root.absolute())

    async def broken() -> None:
        world = await client.World.open(host, task.id, 60)
        first = host._process
        os.kill(jails(host)[0], signal.SIGKILL)
        with pytest.raises(client.WorldBrokenError):
            await world.execute("print(1)", 5)
        assert first is not None
        assert first.wait(10) == 0
        world = await client.World.open(host, task.id, 60)
        assert (await world.execute("print(1)", 5))["output"] == "1\n"
        await world.close()

    try:
        asyncio.run(broken())
    finally:
        host.stop()


def test_no_jail_is_taken_that_holds_less_than_it_should(task_set: AppWorld) -> None:
    host = client.Host(paths.python(), task_set.data.root.absolute(), limits={"held": ["limits", "moonlight"]})
    with pytest.raises(client.WorldBrokenError, match="came up without moonlight"):
        host.ensure()


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(client.WorldBrokenError, match=r"did not start.*No module named"):
        client.Host(Path(sys.executable), tmp_path).ensure()
    host = client.Host(Path("/bin/cat"), tmp_path, start_seconds=0.5)
    with pytest.raises(client.WorldBrokenError, match="did not start"):
        host.ensure()


class FakeHost:
    """A server of ours in this process, which answers what it is told to."""

    def __init__(self, address: Path, answers: Sequence[bytes]) -> None:
        self.address, self._answers = address, list(answers)

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
    ("answer", "complaint"),
    [
        (b"", "(died|broke) during 'open'"),
        (b"nonsense\n", "with nonsense: b'nonsense"),
        (b"[]\n", "with nonsense"),
        (b'{"ok": []}\n', "without a usable"),
        (b'{"ok": {"apps": 3, "held": []}}\n', "without a usable 'apps'"),
        (b'{"error": "KeyError: 3"}\n', "failed at 'open': KeyError: 3"),
        (b"x" * (client.MESSAGE + 10), "broke during 'open'"),
    ],
)
def test_a_world_that_answers_nonsense_is_broken(tmp_path: Path, answer: bytes, complaint: str) -> None:
    host: Any = FakeHost(tmp_path / "s", [b'{"ok": {"pid": 999999999}}\n', *([answer] if answer else [])])

    async def use() -> None:
        with pytest.raises(client.WorldBrokenError, match=complaint):
            await client.World.open(host, "a_1", 5)

    asyncio.run(host.serve(use()))


# ------------------------------------------------------------------------------------------------------------- helpers


def gone(pid: int) -> bool:
    return wait_for(
        lambda: not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    )


def jails(host: client.Host) -> list[int]:
    """Process ids of this server's jails, their keepers, and the one that they are forked from."""
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


def wait_for(what: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)
    return True


def test_an_unknown_style_or_number_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="AppWorld prompt style"):
        AppWorld(style="reactt")
    with pytest.raises(UserError, match="max_turns is 0"):
        AppWorld(max_turns=0)
    with pytest.raises(UserError, match="no AppWorld root"):
        AppWorld(root=str(tmp_path))


def test_splits_that_can_not_be_graded_are_left_out_and_refused_by_name(task_set: AppWorld, tmp_path: Path) -> None:
    """As the official test splits may be: training on the others goes on."""
    shutil.copytree(task_set.data.root / "data", tmp_path / "data")
    for task in task_set.data.tasks("test_scenario"):
        (tmp_path / "data" / "tasks" / task.id / "ground_truth" / "evaluation.py").unlink()
    made = AppWorld(root=str(tmp_path))
    assert made.splits == ("train", "dev", "test", "dev_scenario")
    with pytest.raises(UserError, match="can't be graded: 24 tasks have no ground truth"):
        made.tasks("test_scenario")
    hard = AppWorld(root=str(tmp_path), max_difficulty=1)
    assert max(task.difficulty for task in hard.tasks("dev")) == 1


def test_deadlines_that_contradict_each_other_are_refused(task_set: AppWorld, tmp_path: Path) -> None:
    slow = AppWorld(root=str(task_set.data.root), code_seconds=90)
    with pytest.raises(UserError, match=r"step_seconds is 60, but a call of 'appworld' may take 120 s"):
        build(configs.load(RunConfig, "appworld-smoke"), tmp_path, task_set=slow)
