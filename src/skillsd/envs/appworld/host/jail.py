"""Where the model's code runs: processes of its own that can harm nothing. Run as ``python jail.py OPTIONS``.

The code never shares a process with AppWorld's databases or with the evaluation: it calls the APIs through a socket
(see world.py). One server, which has imported what every session needs and nothing of the engine, forks a keeper for
each jail that a world asks for; the keeper forks the jail and sees to it that it ends with its world, however that
came about. What stands between the code and the machine:

- **files**: a mount namespace with a root of its own: the Python it runs on and the system's libraries, read-only, and
  a scratch folder in memory, which is the only place to write. AppWorld's data are not there;
- **network**: a network namespace without a single working interface, loopback included;
- **processes**: a PID namespace; the process can't fork (RLIMIT_NPROC), and everything in it dies with its first one;
- **user**: an unprivileged user id that no other process has, and no capabilities;
- **syscalls**: a seccomp filter against what the others don't reach: memory that no limit counts, kernel key rings,
  sockets of other families (a virtual machine's host is one vsock away), namespaces within;
- **limits**: of memory, file size, open files.

Namespaces need Linux, and root or the kernel's leave for unprivileged ones. Where something can't be had, world.py asks
for less once, when the server starts, and the first message says what holds: ``{"held": [...]}``. `skillsd doctor` and
the docs put it into words.

Nothing of the model's is read before the doors are closed.
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
_SCRATCH = "/scratch"  # not /tmp: what is shown may lie there
_SCRATCH_FILES = 4096
_DENIED = {  # by machine: the audit architecture, socket(2), and the calls that are denied whatever their arguments are
    "x86_64": (0xC000003E, 41, (29, 64, 68, 319, 250, 248, 249, 425, 321, 323, 272, 308, 165, 101, 298)),
    "aarch64": (0xC00000B7, 198, (194, 190, 186, 279, 219, 217, 218, 425, 280, 282, 97, 268, 40, 117, 241)),
}
"""In this order: shmget, semget, msgget, memfd_create, keyctl, add_key, request_key, io_uring_setup, bpf, userfaultfd,
unshare, setns, mount, ptrace, perf_event_open."""
_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6: there is nobody to be reached by them
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind)]
    _check(_libc.mount(*encoded, ctypes.c_ulong(flags), None if data is None else data.encode()), f"mount {target}")


def _remount_flags(path: str) -> int:
    """The flags that a mount has already: in a user namespace they are locked and have to be named again."""
    have = os.statvfs(path).f_flag
    return (have & 0b1110) | (have & (1024 | 2048)) | (1 << 21 if have & 4096 else 0)


def _bind(source: str, target: str) -> None:
    """`source`, read-only, at `target`, which is made."""
    if os.path.isdir(source):
        os.makedirs(target, mode=0o755, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(source, target, None, _BIND | _REC)


def _mounted_in(root: str) -> list[str]:
    """Everything that is mounted in `root`; a folder that was bound brings along what is mounted in it."""
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        points = [line.split()[4].encode().decode("unicode_escape") for line in file]
    return [point for point in points if point.startswith(root + "/")]


def _own_root(root: str, prefixes: list[str], hidden: list[str], scratch_bytes: int) -> None:
    """Make `root` the root of a file system in which there is nothing but Python, libraries and a scratch folder."""
    os.umask(0o022)
    _mount("none", "/", None, _REC | _PRIVATE)
    _mount("jail", root, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    shown: list[str] = []
    for path in (*_SYSTEM, *prefixes):
        if not os.path.exists(path) or any(path == other or path.startswith(other + "/") for other in shown):
            continue
        if os.path.islink(path) and os.path.dirname(path) == "/":  # /lib is a link to usr/lib on many systems
            os.symlink(os.readlink(path), root + path)
            continue
        _bind(path, root + path)
        shown.append(path)
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
    """Deny for good what no namespace and no limit reaches. False on a machine whose numbers are not known."""
    if platform.machine() not in _DENIED:
        return False
    architecture, sockets, denied = _DENIED[platform.machine()]
    load, jump, more, back = 0x20, 0x15, 0x35, 0x06  # BPF: load a word, jump if equal, if greater or equal, return
    allow, no = 0x7FFF0000, 0x00050000 | errno.EPERM
    program = [(load, 0, 0, 4), (jump, 1, 0, architecture), (back, 0, 0, no), (load, 0, 0, 0)]
    program += [(more, 0, 1, 0x40000000), (back, 0, 0, no)]  # x86's second set of numbers for the same calls
    for number in denied:
        program += [(jump, 0, 1, number), (back, 0, 0, no)]
    program += [(jump, 1, 0, sockets), (back, 0, 0, allow), (load, 0, 0, 16)]
    for family in _FAMILIES:
        program += [(jump, 0, 1, family), (back, 0, 0, allow)]
    program.append((back, 0, 0, no))
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
    """Go on in a child; the parent ends as the child ends, and the child with the parent."""
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


def _become_nobody(options: dict[str, Any], inside: bool) -> bool:
    """Take a user id that is nobody else's, so that its processes are counted by themselves.

    False where a container's root has no such id to give; outside a namespace of one's own that is an error.
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
    _die_with_parent()  # a change of user takes it back
    return True


def _namespaces(root: bool) -> int | None:
    """Enter namespaces of one's own. Returns which, or None if the kernel won't have it."""
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


def close_doors(channel: socket.socket, options: dict[str, Any]) -> list[str]:
    """Take everything away from this process that can be taken. Returns what is: names of the module's list."""
    held: list[str] = []
    linux, root = sys.platform == "linux", os.geteuid() == 0
    _die_with_parent()
    entered = _namespaces(root) if linux and options["namespaces"] else None
    if entered is None and linux and options["namespaces"]:
        raise OSError(f"no namespaces: {os.strerror(ctypes.get_errno())}")
    if entered is not None:
        _own_root(options["root"], options["prefixes"], options["hidden"], options["scratch_bytes"])
        _fork_inside(channel)  # the namespace's first process: when it dies, all others in there do
        _fork_inside(channel)
        held += ["files", "network", "processes"]
    else:
        os.chdir(options["root"])
    alone = root and options["user"] and _become_nobody(options, entered is not None)
    if alone:
        held.append("user")
    elif entered is not None:
        _drop_capabilities()
        held.append("user")  # the user's own id, but in namespaces where nothing of the user's is to be seen
    limits = [
        _limit(resource.RLIMIT_AS, options["memory_bytes"]),
        _limit(resource.RLIMIT_FSIZE, options["scratch_bytes"]),
        _limit(resource.RLIMIT_NOFILE, 64),
        _limit(resource.RLIMIT_CORE, 0),
    ]
    if "user" in held:  # else it would count the user's other processes
        limits.append(_limit(resource.RLIMIT_NPROC, 1 if alone else 3))  # jail.py's own two are counted besides
    if all(limits):
        held.append("limits")
    if linux:
        with contextlib.suppress(OSError):
            _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
            held += ["syscalls"] if _filter_syscalls() else []
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)  # the server's log, until now
    os.close(nothing)
    return held


def _children() -> list[int]:
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except OSError:
        return []


def _keep(connection: socket.socket, shell: dict[str, Any]) -> None:
    """Have a jail until the world that asked for it hangs up; then nothing of it is left, and we hang up."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _die_with_parent()
    request, fds, _, _ = socket.recv_fds(connection, 1 << 16, 1)
    while request[-1:] != b"\n":
        if not (more := connection.recv(1 << 16)):
            return
        request += more
    options, channel = json.loads(request), socket.socket(fileno=fds[0])
    if sys.platform == "linux":  # what the jail leaves behind is ours to wait for
        _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "subreaper")
    if (jail := os.fork()) == 0:
        connection.close()
        os.setsid()  # kill(0) reaches the whole group, whatever namespaces its members are in
        shell["serve"](channel, close_doors(channel, options))
        return
    channel.close()
    connection.recv(1)
    os.kill(jail, signal.SIGKILL)  # its namespace dies with it; without one, there may be more
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
            for left in _children():
                os.kill(left, signal.SIGKILL)


def main() -> None:
    options = json.loads(sys.argv[1])
    listener = socket.socket(fileno=options["listener"])
    listener.settimeout(10.0)
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    shell: dict[str, Any] = {"__name__": "shell"}
    exec(compile(Path(__file__).with_name("shell.py").read_text(encoding="utf-8"), "shell.py", "exec"), shell)
    shell["prepare"](options["modules"])
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    while os.getppid() == options["parent"]:  # where nobody kills us with it
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        try:
            keeper = os.fork()
        except OSError as error:  # no room for one more: whoever asked is told by the connection's end
            print(f"no fork: {error}", file=sys.stderr, flush=True)
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
            if not isinstance(error, SystemExit):  # the session's, when its world is gone
                traceback.print_exc()
        finally:
            os._exit(code)


if __name__ == "__main__":
    main()
