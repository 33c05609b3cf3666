"""The jail: sandboxed processes that run the model's code. Run as ``python jail.py OPTIONS``.

The code never shares a process with AppWorld's databases or the evaluation; it calls the APIs through a socket (see
world.py). A server, which has imported what every session needs but not the engine, forks a keeper for each jail that a
world requests. The keeper forks the jail and ensures that it ends when its world does, for whatever reason.

There are three kinds of jails; jails.py decides once, when the server starts, which one this machine gets:

- **namespaces**: a mount namespace with its own root (Python and the system libraries, read-only, and nothing else), a
  network without interfaces, its own process ids and an unprivileged user id. Needs Linux, and root or a kernel that
  allows unprivileged user namespaces;
- **landlock**: Python and the libraries can be read, nothing can be written. Needs Linux 5.13. What no file has to be
  opened for stays visible: whether a path exists, its size and its times;
- **bare**: only the limits and, on Linux, the system call filter.

All kinds drop their capabilities, limit memory, file size and open files, and filter system calls (kernel.py): no
network, no new processes or threads, no effect on other processes. The jail's first message lists the protections that
are active: ``{"protections": [...]}``. client.py and docs/appworld.md describe them for users.

The jail reads no input from the model before all protections are active.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import kernel
from kernel import check, libc

del sys.path[0]

_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/localtime")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind)]
    check(libc.mount(*encoded, ctypes.c_ulong(flags), None if data is None else data.encode()), f"mount {target}")


def _remount_flags(path: str) -> int:
    """A mount's current flags: in a user namespace they are locked, so a remount has to repeat them."""
    flags = os.statvfs(path).f_flag
    return (flags & 0b1110) | (flags & (1024 | 2048)) | (1 << 21 if flags & 4096 else 0)


def _bind(source: str, target: str) -> None:
    """Bind-mount `source` at `target`, creating the mount point. `_own_root` makes it read-only afterwards."""
    if os.path.isdir(source):
        os.makedirs(target, mode=0o755, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(source, target, None, _BIND | _REC)


def _mounted_in(root: str) -> list[str]:
    """All mount points in `root`, including mounts inside bound folders."""
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        points = [line.split()[4].encode().decode("unicode_escape") for line in file]
    return [point for point in points if point.startswith(root + "/")]


def _own_root(root: str, readable: list[str], hidden: list[str]) -> None:
    """Change to a root file system where nothing can be written, with `readable` in it and `hidden` emptied."""
    os.umask(0o022)
    _mount("none", "/", None, _REC | _PRIVATE)
    _mount("jail", root, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    bound: list[str] = []
    for path in readable:
        if not os.path.exists(path) or any(path == other or path.startswith(other + "/") for other in bound):
            continue
        if os.path.islink(path) and os.path.dirname(path) == "/":  # /lib is a link to usr/lib on many systems
            os.symlink(os.readlink(path), root + path)
            continue
        _bind(path, root + path)
        bound.append(path)
    for point in _mounted_in(root):
        _mount("none", point, None, _BIND | _REMOUNT | _RDONLY | _NOSUID | _remount_flags(point))
    for path in hidden:
        if os.path.isdir(root + path):
            _mount("hidden", root + path, "tmpfs", _RDONLY | _NOSUID | _NODEV, "size=0,mode=755")
    for path in _DEVICES:
        _bind(path, root + path)
    _mount("none", root, None, _BIND | _REMOUNT | _RDONLY | _NOSUID | _NODEV)
    os.chroot(root)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        kernel.die_with_parent(signal.SIGKILL)


def _fork_inside(channel: socket.socket) -> None:
    """Fork and continue in the child. The parent waits and ends with the child; the child dies with the parent."""
    if (child := os.fork()) == 0:
        _die_with_parent()
        return
    channel.close()
    os.waitpid(child, 0)
    os._exit(0)


def _limit(kind: int, value: int) -> bool:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(kind, (value, value))
    except (ValueError, OSError):
        return False
    return True


def _switch_user(number: int) -> bool:
    """Switch to a user id that no other process has. Returns False if root has no such id (in some containers)."""
    own = 0x30000000 + number
    try:
        os.setgroups([])
        os.setresgid(own, own, own)
        os.setresuid(own, own, own)
    except OSError:
        return False
    _die_with_parent()  # again: changing the user clears the setting
    return True


def _enter_namespaces() -> None:
    uid, gid = os.getuid(), os.getgid()
    own = _NEWNS | _NEWIPC | _NEWPID | _NEWNET
    # Root needs no user namespace, except in some containers.
    for flags in (own, own | _NEWUSER) if uid == 0 else (own | _NEWUSER,):
        if libc.unshare(flags) == 0:
            if flags & _NEWUSER:
                for name, line in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
                    with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                        file.write(line)
            return
    raise OSError(f"no namespaces: {os.strerror(ctypes.get_errno())}")


def sandbox(channel: socket.socket, options: dict[str, Any]) -> list[str]:
    """Apply the protections of the jail's kind to this process. Returns the names of all that are active.

    Raises:
        OSError: if this kind of jail is not possible here.
    """
    linux, kind, readable = sys.platform == "linux", options["kind"], [*_SYSTEM, *options["prefixes"]]
    if not linux and kind != "bare":
        raise OSError(f"{kind}: needs Linux")
    _die_with_parent()
    rules = None
    if kind == "namespaces":
        _enter_namespaces()
        _own_root(options["root"], readable, options["hidden"])
        _fork_inside(channel)  # the namespace's first process: when it dies, all others in it die
        _fork_inside(channel)
    elif kind == "landlock":
        rules = kernel.read_only(kernel.visible(readable, options["hidden"]), _DEVICES)
        if rules is None:
            raise OSError("no Landlock")
    os.chdir("/")
    # The user of a jail with Landlock stays the same: another one may not have access to Python's folders.
    plain_user = os.getuid() != 0 or (kind != "landlock" and _switch_user(options["number"]))
    null = os.open(os.devnull, os.O_WRONLY)
    limits = [
        _limit(resource.RLIMIT_AS, options["memory_bytes"]),
        _limit(resource.RLIMIT_FSIZE, options["file_bytes"]),
        _limit(resource.RLIMIT_NOFILE, 64),
        _limit(resource.RLIMIT_CORE, 0),
    ]
    filtered = False
    if linux:
        kernel.drop_capabilities()
        kernel.forbid_privileges()
        if rules is not None:
            kernel.restrict_files(rules)
        filtered = kernel.filter_calls()
    active = {
        "files": kind != "bare",
        "metadata": not os.path.lexists(os.path.join(options["data"], "data")),
        "network": filtered or kind == "namespaces",
        "processes": filtered,
        "user": linux or plain_user,
        "syscalls": filtered,
        "limits": all(limits),
    }
    os.dup2(null, 2)  # so far, standard error was the server's log
    os.close(null)
    return [name for name, holds in active.items() if holds]


def _children() -> list[int]:
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except OSError:
        return []


def _keep(connection: socket.socket, shell: dict[str, Any]) -> None:
    """Run a jail until its world closes the connection, kill all of it, then close our end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _die_with_parent()
    request, fds, _, _ = socket.recv_fds(connection, 1 << 16, 1)
    while request[-1:] != b"\n":
        if not (more := connection.recv(1 << 16)):
            return
        request += more
    options, channel = json.loads(request), socket.socket(fileno=fds[0])
    if sys.platform == "linux":  # orphans of the jail become our children, so that we can wait for them
        kernel.adopt_orphans()
    if (jail := os.fork()) == 0:
        connection.close()
        os.setsid()  # a process group of its own: kill(0) ignores namespaces
        shell["serve"](channel, sandbox(channel, options))
        return
    channel.close()
    connection.recv(1)
    os.kill(jail, signal.SIGKILL)  # its namespace dies with it; without namespaces, children may be left
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
            for child in _children():
                os.kill(child, signal.SIGKILL)


def main() -> None:
    options = json.loads(sys.argv[1])
    listener = socket.socket(fileno=options["listener"])
    listener.settimeout(10.0)
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer handles Ctrl-C
    shell: dict[str, Any] = {"__name__": "shell"}
    exec(compile(Path(__file__).with_name("shell.py").read_text(encoding="utf-8"), "shell.py", "exec"), shell)
    shell["prepare"](options["modules"])
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    while os.getppid() == options["parent"]:  # for systems without PDEATHSIG
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        try:
            keeper = os.fork()
        except OSError as error:  # out of processes or memory: the client sees the connection close
            print(f"fork failed: {error}", file=sys.stderr, flush=True)
            keeper = -1
        if keeper:
            connection.close()
            continue
        code = 1
        try:
            listener.close()
            _keep(connection, shell)
            code = 0
        except BaseException as error:
            if not isinstance(error, SystemExit):  # raised by the session when its world is gone
                traceback.print_exc()
        finally:
            os._exit(code)


if __name__ == "__main__":
    main()
