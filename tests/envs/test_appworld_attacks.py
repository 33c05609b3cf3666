"""Known attacks by the model's code, on AppWorld's engine. docs/appworld.md lists what stops each of them."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from appworld_kit import play, solution, task_of

from skillsd.envs.appworld import AppWorld, client, paths
from skillsd.envs.appworld.environment import AppWorldEnvironment
from skillsd.envs.base import Step

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def victim(task_set: AppWorld) -> Iterator[Callable[[str], Step]]:
    """Runs code in an episode shared by all attacks. Each attack must leave it usable."""
    environment = AppWorld(style="short", max_turns=1000, max_observation_chars=2000, code_seconds=2).make()
    assert isinstance(environment, AppWorldEnvironment)
    with asyncio.Runner() as runner:
        runner.run(environment.reset(task_of(task_set, "songcount"), 0))
        assert environment._world is not None
        missing = [name for name in client.PROTECTIONS if name not in environment._world.protections]
        if missing:
            pytest.skip(f"this machine lacks protections of the jail: {', '.join(missing)} (docs/appworld.md)")
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
    """``kill(0)`` checks only the user id, and namespaces don't stop it. Other episodes must be unaffected."""
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
        pytest.skip(f"{' '.join(command)} doesn't work on this machine")
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
    many = "x = []\nfor i in range(99): x.append(bytes(1 << 26))"  # calloc: doesn't touch the pages, so it is quick
    assert "MemoryError" in victim(many).observation


def test_attack_filling_the_disk(victim: Callable[[str], Step]) -> None:
    assert "Errno" in victim("f = open('/scratch/big', 'wb')\nwhile True: f.write(bytes(1 << 22))").observation
    many = "for i in range(9999): open(f'/scratch/{i}', 'wb').close()"
    assert "No space left" in victim(many).observation
    victim("import os\nfor name in os.listdir('/scratch'): os.remove('/scratch/' + name)")
    full = "for i in range(40): open(f'/scratch/{i}', 'wb').write(bytes(4 << 20))"
    assert "No space left" in victim(full).observation


def test_attack_by_calls_that_no_namespace_covers(victim: Callable[[str], Step]) -> None:
    """Memory outside all limits, vsock, netlink, namespaces and tracing: stopped by the system call filter."""
    for call in ("memfd_create(b'x', 0)", "shmget(0, 1 << 20, 0o1600)", "unshare(0x10000000)", "ptrace(0, 0, 0, 0)"):
        code = f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nprint(libc.{call}, ctypes.get_errno())"
        assert victim(code).observation == "-1 1", call
    assert "not permitted" in victim("import socket\nsocket.socket(socket.AF_VSOCK)").observation
    assert "not permitted" in victim("import socket\nsocket.socket(socket.AF_NETLINK)").observation


def test_attack_by_floods_of_calls(victim: Callable[[str], Step]) -> None:
    """They end the agent's code block, and cause no infrastructure failure."""
    retry = "while True:\n    try: apis.spotify.show_song(song_id=9)\n    except Exception: pass"
    answer = victim(retry)
    assert "timed out" in answer.observation
    assert len(answer.info["calls"]) <= 1000
    long = victim("apis.simple_note.create_note(access_token='x', title='a', content='b' * 100_000)")
    assert "longer than" in long.observation
    named = victim("print(apis.supervisor.show_profile(the_answer_is_42=1)['email'])")
    assert "the_answer" not in json.dumps(named.info["calls"])


def test_lone_surrogates_are_replaced(victim: Callable[[str], Step]) -> None:
    assert victim("print('\\ud83d x')").observation == "? x"
    victim("raise Exception('\\ud83d')").observation.encode()


def test_attack_changing_the_world_through_its_models(victim: Callable[[str], Step]) -> None:
    """The process has no part of the engine: no module, no object, no importable package."""
    code = (
        "import gc, sys\nfound = {type(o).__module__.split('.')[0] for o in gc.get_objects()} | set(sys.modules)\n"
        "print(sorted(found & {'sqlalchemy', 'sqlmodel', 'fastapi', 'IPython'}))"
    )
    assert victim(code).observation == "[]"
    assert "Error" in victim("from appworld import AppWorld").observation
    assert "Error" in victim("from appworld.apps.spotify.models import Song").observation


def test_attack_forging_messages(task_set: AppWorld, victim: Callable[[str], Step]) -> None:
    """Forged messages can neither complete the task nor call anything but the public APIs."""
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
    """It ends the session. Passed on, it would count as an infrastructure failure, and the episode would be retried."""

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


def test_without_namespaces_the_missing_protections_are_reported(task_set: AppWorld) -> None:
    """Protections that don't need namespaces are still active."""
    host = client.Host(paths.python(), task_set.data.root.absolute(), limits={"namespaces": False})

    async def protections() -> list[str]:
        world = await client.World.open(host, task_of(task_set, "songcount").id, 60)
        assert (await world.execute("print(1)", 5))["output"] == "1\n"
        await world.close()
        return world.protections

    try:
        found = asyncio.run(protections())
    finally:
        host.stop()
    assert "files" not in found
    assert "network" not in found
    assert "limits" in found


@pytest.mark.parametrize(
    "command", [["unshare", "-Ur"], ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]]
)
def test_a_jail_starts_for_a_restricted_root(task_set: AppWorld, command: list[str]) -> None:
    """As in containers: root of a user namespace without spare user ids; root without the right to mount."""
    probe = [str(paths.python()), str(client.HOST / "probe.py"), json.dumps(client.LIMITS)]
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"{' '.join(command)} doesn't work on this machine")
    done = subprocess.run([*command, *probe], capture_output=True, text=True, check=False)
    assert "limits" in json.loads(done.stdout), done.stderr


def test_the_probe_reports_the_protections_of_real_episodes(task_set: AppWorld) -> None:
    async def protections() -> list[str]:
        world = await client.World.open(task_set.host(), task_of(task_set, "songcount").id, 60)
        await world.close()
        return world.protections

    assert sorted(client.protections(paths.python())) == sorted(asyncio.run(protections()))


def test_attack_deleting_what_the_tests_look_at(task_set: AppWorld, tmp_path: Path) -> None:
    """Tests that raise an error, e.g. because their data were deleted, count as failed by the agent."""
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
    assert (end.done, end.success, end.reward) == (True, False, 0.0)
