"""Known attacks by the model's code, on AppWorld's engine. docs/appworld.md lists what stops each of them.

They run on this machine, and as root and as a user of a container that has Docker's defaults (machines.py).
"""

from __future__ import annotations

import asyncio
import json
import shlex
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from appworld_kit import play, solution, task_of

from skillsd.envs.appworld import AppWorld, client, paths
from skillsd.envs.appworld.environment import AppWorldEnvironment
from skillsd.envs.base import Step
from skillsd.errors import UserError

pytestmark = pytest.mark.timeout(900)

HERE = "this machine"
OPEN = {HERE: [], "Docker's root": ["metadata"], "Docker's user": ["metadata"]}
"""Machine -> protections that it lacks."""

MORE = {"old Docker's root": ["files"], "powerless namespaces": ["metadata"]}
"""Further machines, where only the protections are checked."""

DENIED = ("No such file", "Read-only", "Permission denied", "not permitted", "No module named")


def on(machine: str) -> list[str]:
    """The beginning of a command that runs the rest on a machine; skips if that isn't possible."""
    if machine == HERE:
        return []
    command = [sys.executable, str(Path(__file__).with_name("machines.py")), machine]
    tried = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"{machine} can't be emulated here: {' '.join(tried.stderr.splitlines()[-1:])}")
    return command


class Victim:
    """An episode shared by all attacks on a machine. Each attack must leave it usable."""

    def __init__(self, machine: str, task_set: AppWorld, runner: asyncio.Runner, made: AppWorld) -> None:
        self.machine, self.host = machine, made.host()
        self._environment, self._runner, self._made = made.make(), runner, made
        runner.run(self._environment.reset(task_of(task_set, "songcount"), 0))

    def __call__(self, code: str, seconds: float = 60.0) -> Step:
        """Run code that may take `seconds`. Only attacks on the time limit have a low one: machines may be busy."""
        self._made.code_seconds = seconds
        return self._runner.run(self._environment.step(code))

    def lacks(self) -> list[str]:
        assert isinstance(self._environment, AppWorldEnvironment)
        assert self._environment._world is not None
        return [name for name in client.PROTECTIONS if name not in self._environment._world.protections]

    def requires(self, protection: str) -> None:
        if protection in self.lacks():
            pytest.skip(f"{self.machine}: the jail lacks {protection}; episodes are refused unless that is allowed")

    def end(self) -> None:
        assert "@" in self("print(apis.supervisor.show_profile()['email'])").observation
        self._runner.run(self._environment.close())


@pytest.fixture(scope="module", params=list(OPEN))
def victim(
    request: pytest.FixtureRequest, task_set: AppWorld, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Victim]:
    machine, prefix = request.param, on(request.param)
    python = tmp_path_factory.mktemp("machine") / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.join([*prefix, str(paths.python())])} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    made = AppWorld(style="short", max_turns=10_000, max_observation_chars=2000, unsafe_without="all" if prefix else ())
    host = client.Host(python, task_set.data.root.absolute())
    made.host = lambda: host  # type: ignore[method-assign]
    with asyncio.Runner() as runner:
        try:
            try:
                victim = Victim(machine, task_set, runner, made)
            except UserError as error:
                pytest.skip(str(error))
            yield victim
            victim.end()
        finally:
            host.stop()


def test_the_machine_has_the_known_protections(victim: Victim) -> None:
    """So that no attack test is skipped, or passes, for another reason."""
    assert victim.lacks() == OPEN[victim.machine]


def truth_of(task_set: AppWorld) -> Path:
    truth = task_set.data.root.absolute() / "data" / "tasks" / task_of(task_set, "songcount").id / "ground_truth"
    assert (truth / "answer.json").is_file()
    return truth


def test_attack_reading_the_answer(task_set: AppWorld, victim: Victim) -> None:
    answer = str(truth_of(task_set) / "answer.json")
    for code in (
        f"print(open({answer!r}).read())",
        f"import pathlib\nprint(pathlib.Path({answer!r}).read_text())",
        f"import os\nprint(os.listdir({str(Path(answer).parent)!r}))",
        f"import os\nprint(os.open({answer!r}, os.O_PATH | os.O_RDWR))\nopen({answer!r}, 'rb')",
        "print(open('/proc/self/environ').read())",
        f"print(open('/proc/self/root' + {answer!r}).read())",
        "import os\nprint(open(f'/proc/{os.getppid()}/cmdline').read())",
        f"import os\nos.chdir({str(Path(answer).parent)!r})\nprint(open('answer.json').read())",
    ):
        assert any(text in victim(code).observation for text in DENIED), code


def test_attack_reading_the_users_files(tmp_path: Path, victim: Victim) -> None:
    (tmp_path / "secret").write_text("a password", encoding="utf-8")
    engine = next(paths.venv().glob("lib/python3*/site-packages/appworld/environment.py"))  # hidden, with the data
    for path in (tmp_path / "secret", Path("/etc/passwd"), Path(__file__), engine):
        assert any(text in victim(f"print(open({str(path)!r}).read())").observation for text in DENIED), path
    assert "statistics" in victim("import statistics\nprint(open(statistics.__file__).read()[:30])").observation


def test_attack_measuring_the_answer(task_set: AppWorld, victim: Victim) -> None:
    """The size of the answer's file tells its length."""
    victim.requires("metadata")
    for path in (truth_of(task_set) / "answer.json", task_set.data.root.absolute()):
        assert "No such file" in victim(f"import os\nprint(os.stat({str(path)!r}))").observation


def test_attack_writing_files(tmp_path: Path, victim: Victim) -> None:
    """Nothing can be written, so nothing can be filled either."""
    (tmp_path / "mine").write_text("x", encoding="utf-8")
    before = (tmp_path / "mine").stat()
    for folder in (str(tmp_path), ".", "/", "/tmp", "/usr", "/etc", "/dev", "/dev/shm", "/root", sys.prefix):
        for code in (
            f"open({folder + '/skillsd-attack'!r}, 'w').write('x')",
            f"import os\nos.mkdir({folder + '/skillsd-attack'!r})",
            f"import os\nos.symlink('/', {folder + '/skillsd-attack'!r})",
        ):
            answer = victim(code).observation
            assert any(text in answer for text in DENIED), (code, answer)
        assert folder == "." or not Path(folder, "skillsd-attack").exists()
    mine = str(tmp_path / "mine")
    for call in (
        "remove(M)",
        "truncate(M, 0)",
        "chmod(M, 0)",
        "utime(M, (0, 0))",
        "rename(M, M + '2')",
        "link(M, '/x')",
        "open(M, os.O_RDONLY | os.O_TRUNC)",
        "open(M, os.O_ACCMODE | os.O_TRUNC)",
        "open(os.__file__, os.O_RDONLY | os.O_TRUNC)",  # it can be read
    ):
        answer = victim(f"import os\nM = {mine!r}\nos.{call}").observation
        assert any(text in answer for text in DENIED), (call, answer)
    after = (tmp_path / "mine").stat()
    assert (after.st_mode, after.st_size, after.st_mtime) == (before.st_mode, before.st_size, before.st_mtime)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import os\nos.posix_spawn('/bin/sh', ['sh', '-c', 'touch MADE'], {})", id="posix_spawn"),
        pytest.param("import subprocess\nsubprocess.run(['touch', 'MADE'])", id="subprocess"),
        pytest.param("import os\nwhile True: os.fork()", id="fork bomb"),
        pytest.param("import os\nos.execv('/bin/touch', ['touch', 'MADE'])", id="exec"),
        pytest.param("import threading\nthreading.Thread(target=print).start()", id="threads"),
        pytest.param("import multiprocessing\nmultiprocessing.Process(target=print).start()", id="multiprocessing"),
    ],
)
def test_attack_starting_processes(tmp_path: Path, victim: Victim, code: str) -> None:
    made = tmp_path / "made"
    answer = victim(code.replace("MADE", str(made))).observation
    assert any(text in answer for text in ("temporarily unavailable", "can't start new thread", *DENIED)), answer
    assert not made.exists()


def test_attack_on_other_processes(victim: Victim) -> None:
    killed = victim(
        "import os\nfor pid in (0, 1, os.getppid(), -1):\n  try: os.kill(pid, 9)\n  except OSError as e: print(e)"
    )
    assert killed.observation.count("Operation not permitted") == 4
    limited = "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))"
    assert "PermissionError" in victim(limited).observation
    assert "PermissionError" in victim("import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)").observation
    assert "PermissionError" in victim("import os\nos.sched_setaffinity(os.getppid(), {0})").observation
    other = subprocess.Popen(["sleep", "600"])
    try:
        for own in (
            f"fcntl.fcntl(b, fcntl.F_SETOWN, {other.pid})",
            f"fcntl.ioctl(b, 0x8901, struct.pack('i', {other.pid}))",  # FIOSETOWN
        ):
            signals = f"""
                import fcntl, os, socket, struct
                a, b = socket.socketpair()
                for call in ({own!r}, "fcntl.fcntl(b, 10, 9)", "fcntl.fcntl(b, fcntl.F_SETFL, os.O_ASYNC)"):
                    try: eval(call)
                    except OSError as error: print(error)
                a.send(b"x")  # the kernel sends signal 9 to the owner of b
            """
            assert "not permitted" in victim(textwrap.dedent(signals)).observation
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
    lock = "import fcntl, os\nfcntl.{}(open(os.__file__, 'rb'), {})"
    for call, operation in (("flock", "fcntl.LOCK_EX"), ("lockf", "fcntl.LOCK_SH"), ("fcntl", "fcntl.F_SETLEASE, 1")):
        assert "PermissionError" in victim(lock.format(call, operation)).observation, call


@pytest.mark.parametrize("command", [[], ["unshare", "-Ur"]], ids=["as root or user", "as a namespace's root"])
def test_attack_killing_the_process_group(task_set: AppWorld, command: list[str]) -> None:
    """``kill(0)`` checks only the user id, and namespaces don't stop it. Other episodes must be unaffected."""
    task = task_of(task_set, "songcount")
    program = f"""
        import asyncio
        from skillsd.envs.appworld import AppWorld, client
        made = AppWorld(root={str(task_set.data.root.absolute())!r})
        async def main():
            one, other = [await client.World.open(made.host(), {task.id!r}, 200) for _ in range(2)]
            print((await one.execute("import os\\nos.kill(0, 9)", 60))["error"])
            for world in (one, other):
                print((await world.execute("print(7)", 60))["output"].strip())
            print(made.host()._process.poll())
        asyncio.run(main())
        made.host().stop()
    """
    if command and subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip(f"{' '.join(command)} doesn't work on this machine")
    done = subprocess.run(
        [*command, sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False
    )
    assert done.stdout.split("\n") == ["PermissionError: [Errno 1] Operation not permitted", "7", "7", "None", ""], (
        done.stderr
    )


def test_attack_outliving_the_episode(victim: Victim) -> None:
    """The code can't refuse to end with the process that supervises it."""
    prctl = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nprint(libc.prctl({}, 0, 0, 0, 0), ctypes.get_errno())"
    )
    assert victim(prctl.format(1)).observation == "-1 1"
    assert victim(prctl.format(3)).observation.split()[0] in "01"  # other settings work


def test_attack_network(victim: Victim) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        answer = victim(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)").observation
        assert "not permitted" in answer
        with pytest.raises(TimeoutError):
            server.accept()
    for connect in (
        "socket.create_connection(('192.0.2.1', 80), timeout=1)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
        "socket.socket(socket.AF_UNIX).connect('\\0skillsd')",
        "socket.socket(socket.AF_VSOCK)",
        "socket.socket(socket.AF_NETLINK)",
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",  # can send to others, such as /dev/log
    ):
        assert "not permitted" in victim(f"import socket\n{connect}").observation, connect


def test_harmless_code_works(victim: Victim) -> None:
    """Although it uses calls that are denied in part."""
    for code, output in (
        ("import asyncio\nasync def f(): return 5\nprint(asyncio.run(f()))", "5"),
        ("import os\nwith open(os.devnull, 'w') as null: print(1, file=null)\nprint(null.name)", "/dev/null"),
        ("import os, resource\nprint(os.isatty(0), resource.prlimit(0, resource.RLIMIT_CORE))", "False (0, 0)"),
        (
            "import os\na, b = os.pipe()\nos.set_blocking(a, False)\nos.set_inheritable(a, True)\nprint(os.dup(b) > b)",
            "True",
        ),
    ):
        assert victim(code).observation == output


def test_attack_a_loop_that_swallows_the_timeout(victim: Victim) -> None:
    victim("kept = 1")
    loop = "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
    answer = victim(loop, seconds=1)
    assert "timed out after 1 seconds" in answer.observation
    assert "restarted" in answer.observation
    assert "NameError" in victim("print(kept)").observation


def test_attack_five_megabytes_of_output(victim: Victim) -> None:
    flood = victim("print('x' * 5_000_000)")
    assert len(flood.observation) < 2200
    assert "characters left out" in flood.observation


def test_attack_memory_bomb(victim: Victim) -> None:
    assert "MemoryError" in victim("x = bytearray(4 << 30)").observation
    many = "x = []\nfor i in range(99): x.append(bytes(1 << 26))"  # calloc: doesn't touch the pages, so it is quick
    assert "MemoryError" in victim(many).observation


def test_attack_by_calls_that_no_namespace_covers(victim: Victim) -> None:
    """Memory outside all limits, namespaces, tracing, calls newer than the filter: stopped by the filter."""
    for call in (
        *("memfd_create(b'x', 0)", "shmget(0, 1 << 20, 0o1600)", "shmat(0, 0, 0)", "unshare(0x10000000)"),
        *("ptrace(0, 0, 0, 0)", "inotify_init1(0)", "syscall(425, 8, 0)"),  # 425: io_uring_setup
    ):
        code = f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nprint(libc.{call}, ctypes.get_errno())"
        assert victim(code).observation == "-1 1", call
    newer = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nprint(libc.syscall({}), ctypes.get_errno())"
    for number in (470, 0x40000000 + 39):
        assert victim(newer.format(number)).observation == "-1 38", number


def test_attack_by_floods_of_calls(victim: Victim) -> None:
    """They end the agent's code block, and cause no infrastructure failure."""
    retry = "while True:\n    try: apis.spotify.show_song(song_id=9)\n    except Exception: pass"
    answer = victim(retry, seconds=3)
    assert "timed out" in answer.observation
    assert len(answer.info["calls"]) <= 1000
    long = victim("apis.simple_note.create_note(access_token='x', title='a', content='b' * 100_000)")
    assert "longer than" in long.observation
    named = victim("print(apis.supervisor.show_profile(the_answer_is_42=1)['email'])")
    assert "the_answer" not in json.dumps(named.info["calls"])


def test_lone_surrogates_are_replaced(victim: Victim) -> None:
    assert victim("print('\\ud83d x')").observation == "? x"
    victim("raise Exception('\\ud83d')").observation.encode()


def test_attack_changing_the_world_through_its_models(victim: Victim) -> None:
    """The process has no part of the engine: no module, no object, no importable package."""
    code = (
        "import gc, sys\nfound = {type(o).__module__.split('.')[0] for o in gc.get_objects()} | set(sys.modules)\n"
        "print(sorted(found & {'sqlalchemy', 'sqlmodel', 'fastapi', 'IPython'}))"
    )
    assert victim(code).observation == "[]"
    assert "Error" in victim("from appworld import AppWorld").observation
    assert "Error" in victim("from appworld.apps.spotify.models import Song").observation


def test_attack_forging_messages(victim: Victim) -> None:
    """Forged messages can neither complete the task nor call anything but the public APIs."""
    victim("import os\nfor fd in range(3):\n  try: os.write(fd, b'x' * 10)\n  except OSError: pass")
    with open(victim.host.address.parent / "log", encoding="utf-8") as log:
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
def test_attack_by_an_answer_that_is_too_long(task_set: AppWorld, victim: Victim, where: str) -> None:
    """It ends the session. Passed on, it would count as an infrastructure failure, and the episode would be retried."""

    async def answer() -> dict[str, Any]:
        world = await client.World.open(victim.host, task_of(task_set, "songcount").id, 200)
        message = f"json.dumps({{'turn': 1, 'error': None, 'output': '', {where!r}: 'x' * 2_000_000}}).encode()"
        send = f"import os\nfor fd in range(3, 64):\n  try: os.write(fd, {message} + b'\\n')\n  except OSError: pass"
        found = await world.execute(send, 60)
        await world.close()
        return found

    assert "something that is no message" in asyncio.run(answer())["output"]


def test_attack_crashing_the_session(victim: Victim) -> None:
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


@pytest.mark.parametrize("machine", [*OPEN, *MORE])
def test_episodes_are_refused_where_protections_are_missing(task_set: AppWorld, tmp_path: Path, machine: str) -> None:
    """Unless the recipe allows it. The doctor names the missing ones, too."""
    root, missing = str(task_set.data.root.absolute()), (OPEN | MORE)[machine]
    program = f"""
        from skillsd.envs.appworld import AppWorld, doctor
        from skillsd.errors import UserError
        for allowed in ((), {missing!r}):
            try:
                AppWorld(root={root!r}, unsafe_without=allowed).make()
                print("made")
            except UserError as error:
                print(error)
        print(*[line for line in doctor.report() if "MISSING" in line or "refused" in line], sep="\\n")
    """
    command = [*on(machine), sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    first, second, *report = done.stdout.splitlines()
    assert second == "made", done.stderr
    if not missing:
        assert first == "made"
        assert report == [""]
        return
    assert first.endswith(f"environment.options.unsafe_without=[{','.join(missing)}]")
    assert [line.split()[2] for line in report[:-1]] == missing
    assert report[-1].endswith(f"unsafe_without=[{','.join(missing)}]")
    assert "runs without these protections" in done.stderr


def test_a_world_with_too_few_protections_is_refused(task_set: AppWorld, victim: Victim) -> None:
    """Also if the machine had them when it was checked."""
    strict = AppWorld(style="short")
    strict.host = lambda: victim.host  # type: ignore[method-assign]

    async def reset() -> None:
        environment = strict.make()
        try:
            await environment.reset(task_of(task_set, "songcount"), 0)
        finally:
            await environment.close()

    if not victim.lacks():
        return asyncio.run(reset())
    with pytest.raises(UserError, match=r"lacks metadata \("):
        asyncio.run(reset())


@pytest.mark.parametrize(
    "command", [["unshare", "-Ur"], ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]]
)
def test_a_jail_starts_for_a_restricted_root(task_set: AppWorld, command: list[str]) -> None:
    """As in containers: root of a user namespace without spare user ids; root without the right to mount."""
    root = str(task_set.data.root.absolute())
    probe = [str(paths.python()), str(client.HOST / "probe.py"), json.dumps(client.LIMITS), root]
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"{' '.join(command)} doesn't work on this machine")
    done = subprocess.run([*command, *probe], capture_output=True, text=True, check=False)
    assert json.loads(done.stdout) == list(client.PROTECTIONS), done.stderr


def test_the_probe_reports_the_protections_of_real_episodes(task_set: AppWorld) -> None:
    async def protections() -> list[str]:
        world = await client.World.open(task_set.host(), task_of(task_set, "songcount").id, 200)
        await world.close()
        return world.protections

    assert sorted(client.protections(paths.python(), task_set.data.root.absolute())) == sorted(
        asyncio.run(protections())
    )


def test_attack_deleting_what_the_tests_look_at(task_set: AppWorld, tmp_path: Path) -> None:
    """Tests that raise an error, e.g. because their data were deleted, count as failed by the agent."""
    task = task_of(task_set, "songcount")
    shutil.copytree(task_set.data.root / "data", tmp_path / "data")
    broken = tmp_path / "data" / "tasks" / task.id / "ground_truth" / "evaluation.py"
    signature = "test, public_data, private_data, main_user, models, ground_truth_answer"
    broken.write_text(f"def evaluate({signature}):\n    None.deleted\n", encoding="utf-8")
    made = AppWorld(root=str(tmp_path), style="short", code_seconds=60)
    try:
        end = play(made, task, solution(task_set, task))[-1]
    finally:
        made.host().stop()
    assert (end.done, end.success, end.reward) == (True, False, 0.0)
