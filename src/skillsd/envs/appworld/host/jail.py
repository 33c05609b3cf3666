"""The jail: sandboxed processes that run the model's code. Run as ``python jail.py OPTIONS``.

The code never shares a process with AppWorld's databases or the evaluation; it calls the APIs through a socket (see
world.py). A server, which has imported what every session needs but not the engine, forks a keeper for each jail that a
world requests. The keeper forks the jail and ensures that it ends when its world does, for whatever reason.

Protections:

- **files**: a mount namespace with its own root: the jail's Python and the system libraries, read-only, and a scratch
  folder in memory, the only writable place. AppWorld's data are not in it;
- **network**: a network namespace without a working interface, loopback included;
- **processes**: a PID namespace; the process can't fork (RLIMIT_NPROC), and everything in the namespace dies with its
  first process;
- **user**: an unprivileged user id that no other process has, and no capabilities;
- **syscalls**: a seccomp filter for what the others don't cover: memory outside all limits, kernel key rings, other
  socket families (vsock reaches a virtual machine's host), nested namespaces;
- **limits**: on memory, file size and open files.

Namespaces need Linux, and root or a kernel that allows unprivileged ones. If a protection is unavailable, jails.py
falls back to a weaker kind of jail; it decides that once, when the server starts. The jail's first message lists the
active protections: ``{"protections": [...]}``. client.py and docs/appworld.md describe them for users.

The jail reads no input from the model before all protections are active.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import json
import os
import platform
import resource
import signal
import socket
import struct
import sys
import traceback
from pathlib import Path
from typing import Any

_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/localtime")
_SCRATCH = "/scratch"  # not /tmp: a visible folder (e.g. a virtual environment) may be in there
_SCRATCH_FILES = 4096
_DENIED = {  # by machine: the audit architecture, the number of socket(2), and the system calls to deny
    "x86_64": (0xC000003E, 41, (29, 64, 68, 319, 250, 248, 249, 425, 321, 323, 272, 308, 165, 101, 298)),
    "aarch64": (0xC00000B7, 198, (194, 190, 186, 279, 219, 217, 218, 425, 280, 282, 97, 268, 40, 117, 241)),
}
"""The denied calls are, in order: shmget, semget, msgget, memfd_create, keyctl, add_key, request_key, io_uring_setup,
bpf, userfaultfd, unshare, setns, mount, ptrace, perf_event_open."""
_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6: allowed, since they reach nothing from inside the jail
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind)]
    _check(_libc.mount(*encoded, ctypes.c_ulong(flags), None if data is None else data.encode()), f"mount {target}")


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


def _own_root(root: str, prefixes: list[str], hidden: list[str], scratch_bytes: int) -> None:
    """Change to a root file system that contains only Python, libraries and a scratch folder."""
    os.umask(0o022)
    _mount("none", "/", None, _REC | _PRIVATE)
    _mount("jail", root, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    bound: list[str] = []
    for path in (*_SYSTEM, *prefixes):
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
    os.mkdir(root + _SCRATCH)
    _mount(
        "scratch",
        root + _SCRATCH,
        "tmpfs",
        _NOSUID | _NODEV,
        f"size={scratch_bytes},nr_inodes={_SCRATCH_FILES},mode=1777",
    )
    _mount("none", root, None, _BIND | _REMOUNT | _RDONLY | _NOSUID | _NODEV)
    os.chroot(root)
    os.chdir(_SCRATCH)
    os.environ["HOME"] = os.environ["TMPDIR"] = _SCRATCH


def _filter_syscalls() -> bool:
    """Deny, irrevocably, the system calls that namespaces and limits don't cover. False on unknown machines."""
    if platform.machine() not in _DENIED:
        return False
    architecture, sockets, denied = _DENIED[platform.machine()]
    load, jump, more, back = 0x20, 0x15, 0x35, 0x06  # BPF: load a word, jump if equal, if greater or equal, return
    allow, deny = 0x7FFF0000, 0x00050000 | errno.EPERM
    program = [(load, 0, 0, 4), (jump, 1, 0, architecture), (back, 0, 0, deny), (load, 0, 0, 0)]
    program += [(more, 0, 1, 0x40000000), (back, 0, 0, deny)]  # x32: a second set of numbers for the same calls
    for number in denied:
        program += [(jump, 0, 1, number), (back, 0, 0, deny)]
    program += [(jump, 1, 0, sockets), (back, 0, 0, allow), (load, 0, 0, 16)]
    for family in _FAMILIES:
        program += [(jump, 0, 1, family), (back, 0, 0, allow)]
    program.append((back, 0, 0, deny))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    wrapped = struct.pack("@HP", len(program), ctypes.addressof(code))
    return _libc.prctl(_PR_SET_SECCOMP, 2, wrapped, 0, 0) == 0


def _drop_capabilities() -> None:
    header = struct.pack("=Ii", 0x20080522, 0)
    _check(_libc.capset(header, bytes(24)), "capset")


def _die_with_parent() -> None:
    if sys.platform == "linux":
        _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "pdeathsig")


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


def _switch_user(options: dict[str, Any], inside: bool) -> bool:
    """Switch to an unused user id, so that the limit on processes counts only the jail's.

    Returns False if root has no such id (in some containers). Outside its own namespaces that is an error.
    """
    own = 0x30000000 + options["number"]
    try:
        os.setgroups([])
        if not inside:
            os.chown(options["root"], own, own)
        os.setresgid(own, own, own)
        os.setresuid(own, own, own)
    except OSError:
        if not inside:
            raise
        return False
    _die_with_parent()  # again: changing the user clears the setting
    return True


def _namespaces(root: bool) -> int | None:
    """Enter new namespaces. Returns their flags, or None if the kernel doesn't allow it."""
    uid, gid = os.getuid(), os.getgid()
    own = _NEWNS | _NEWIPC | _NEWPID | _NEWNET
    for flags in (own, own | _NEWUSER) if root else (own | _NEWUSER,):  # a container's root may need a user namespace
        if _libc.unshare(flags) == 0:
            if flags & _NEWUSER:
                for name, line in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
                    with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                        file.write(line)
            return flags
    return None


def sandbox(channel: socket.socket, options: dict[str, Any]) -> list[str]:
    """Apply all available protections to this process. Returns their names, as in the module's docstring."""
    active: list[str] = []
    linux, root = sys.platform == "linux", os.geteuid() == 0
    _die_with_parent()
    entered = _namespaces(root) if linux and options["namespaces"] else None
    if entered is None and linux and options["namespaces"]:
        raise OSError(f"no namespaces: {os.strerror(ctypes.get_errno())}")
    if entered is not None:
        _own_root(options["root"], options["prefixes"], options["hidden"], options["scratch_bytes"])
        _fork_inside(channel)  # the namespace's first process: when it dies, all others in it die
        _fork_inside(channel)
        active += ["files", "network", "processes"]
    else:
        os.chdir(options["root"])
    own_user = root and options["user"] and _switch_user(options, entered is not None)
    if own_user:
        active.append("user")
    elif entered is not None:
        _drop_capabilities()
        active.append("user")  # the invoking user's id, but in namespaces that hide that user's files and processes
    limits = [
        _limit(resource.RLIMIT_AS, options["memory_bytes"]),
        _limit(resource.RLIMIT_FSIZE, options["scratch_bytes"]),
        _limit(resource.RLIMIT_NOFILE, 64),
        _limit(resource.RLIMIT_CORE, 0),
    ]
    if "user" in active:  # otherwise it would count the user's other processes
        limits.append(_limit(resource.RLIMIT_NPROC, 1 if own_user else 3))  # 3: it also counts two of jail.py's
    if all(limits):
        active.append("limits")
    if linux:
        with contextlib.suppress(OSError):
            _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
            active += ["syscalls"] if _filter_syscalls() else []
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # so far, standard error was the server's log
    os.close(null)
    return active


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
        _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "subreaper")
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
