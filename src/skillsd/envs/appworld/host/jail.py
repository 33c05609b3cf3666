"""Where the model's code runs: a process of its own that can harm nothing. Run as ``python -I jail.py OPTIONS``.

The code never shares a process with AppWorld's databases or with the evaluation: it calls the APIs through a socket
(see world.py). What stands between it and the machine, from a fresh interpreter on:

- **processes**: a PID namespace; the process can't fork (RLIMIT_NPROC), and everything in it dies with its first one;
- **files**: a mount namespace with a root of its own: the Python it runs on and the system's libraries, read-only, and
  a scratch folder in memory, which is the only place to write. AppWorld's data are not there;
- **network**: a network namespace without a single working interface, loopback included;
- **user**: an unprivileged user id that no other process has, and no capabilities;
- **limits**: of memory, file size, open files.

Namespaces need Linux, and root or the kernel's leave for unprivileged ones. Where something can't be had, the code runs
without it and the first message says so: ``{"held": [...]}``, which `skillsd doctor` and the docs put into words.

Nothing of the model's is read before the doors are closed.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import socket
import struct
import sys
from typing import Any

_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/localtime")
_SCRATCH = "/scratch"  # not /tmp: what is shown may lie there
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
    return (have & 0b1110) | (have & 1024) | (1 << 21 if have & 4096 else 0)


def _bind(source: str, target: str) -> None:
    """`source`, read-only, at `target`, which is made."""
    if os.path.isdir(source):
        os.makedirs(target, mode=0o755, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(source, target, None, _BIND | _REC)
    if not source.startswith("/dev/"):
        _mount("none", target, None, _BIND | _REMOUNT | _RDONLY | _NOSUID | _remount_flags(target))


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
    for path in hidden:
        if os.path.isdir(root + path):
            _mount("hidden", root + path, "tmpfs", _RDONLY | _NOSUID | _NODEV, "size=0,mode=755")
    for path in _DEVICES:
        _bind(path, root + path)
    os.mkdir(root + _SCRATCH)
    _mount("scratch", root + _SCRATCH, "tmpfs", _NOSUID | _NODEV, f"size={scratch_bytes},mode=1777")
    _mount("none", root, None, _BIND | _REMOUNT | _RDONLY | _NOSUID | _NODEV)
    os.chroot(root)
    os.chdir(_SCRATCH)
    os.environ["HOME"] = os.environ["TMPDIR"] = _SCRATCH


def _drop_capabilities() -> None:
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
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


def close_doors(channel: socket.socket, options: dict[str, Any]) -> list[str]:
    """Take everything away from this process that can be taken. Returns what is: the names of the module's list."""
    root, held = os.geteuid() == 0, []
    uid, gid = os.getuid(), os.getgid()
    _die_with_parent()
    if sys.platform == "linux" and options.get("namespaces", True):
        flags = _NEWNS | _NEWIPC | _NEWPID | _NEWNET | (0 if root else _NEWUSER)
        if _libc.unshare(flags) == 0:
            if not root:
                for name, line in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
                    with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                        file.write(line)
            _own_root(options["root"], options["prefixes"], options["hidden"], options["scratch_bytes"])
            _fork_inside(channel)  # the namespace's first process: when it dies, all others in there do
            _fork_inside(channel)
            held += ["files", "network", "processes"]
    if not held:
        os.chdir(options["root"])
    if root:
        os.setgroups([])
        own = 0x30000000 + options["number"]  # nobody else's, so that its processes are counted by themselves
        if not held:
            os.chown(options["root"], own, own)
        os.setresgid(own, own, own)
        os.setresuid(own, own, own)
        _die_with_parent()  # a change of user takes it back
        held.append("user")
    elif held:
        _drop_capabilities()
        held.append("user")  # the user's own id, but in a namespace where nothing of the user's is to be seen
    limits = [
        _limit(resource.RLIMIT_AS, options["memory_bytes"]),
        _limit(resource.RLIMIT_FSIZE, options["scratch_bytes"]),
        _limit(resource.RLIMIT_NOFILE, 64),
        _limit(resource.RLIMIT_CORE, 0),
    ]
    if "user" in held:  # else it would count the user's other processes
        limits.append(_limit(resource.RLIMIT_NPROC, 1 if root else 3))
        if not root or "processes" not in held:
            held = sorted({*held, "processes"})
    return [*held, *(["limits"] if all(limits) else [])]


def main() -> None:
    options = json.loads(sys.argv[1])
    channel = socket.socket(fileno=options["channel"])
    shell: dict[str, Any] = {"__name__": "shell"}
    exec(compile(options["shell"], "shell.py", "exec"), shell)
    shell["prepare"](options["modules"])  # what it imports may be out of another user's reach later
    shell["serve"](channel, close_doors(channel, options))


if __name__ == "__main__":
    main()
