"""Restrictions that a process puts on itself for good: system calls (seccomp), files (Landlock), capabilities.

For Linux, by system calls through ctypes, because the standard library has none of this. See jail.py for their use.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import struct
from collections.abc import Iterable

libc = ctypes.CDLL(None, use_errno=True)

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38


def check(result: int, what: str) -> int:
    """The result of a C function, which is negative if it failed.

    Raises:
        OSError: if it failed.
    """
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def die_with_parent(signal: int) -> None:
    check(libc.prctl(_PR_SET_PDEATHSIG, signal, 0, 0, 0), "pdeathsig")


def adopt_orphans() -> None:
    """Make this process the parent of its descendants' orphans."""
    check(libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "subreaper")


def drop_capabilities() -> None:
    """Drop all capabilities. `forbid_privileges` keeps a root without them from regaining them."""
    check(libc.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24)), "capset")


def forbid_privileges() -> None:
    """No program that is executed from now on gains privileges. The other restrictions require it."""
    check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


# --- files: Landlock, https://docs.kernel.org/userspace-api/landlock.html ---

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on all machines
_WRITE_FILE, _READ_FILE, _READ_DIR = 2, 4, 8
_RIGHTS = (13, 14, 15, 15, 16)
"""Number of file rights that a version of the interface knows. Later versions have added none that matter here."""


def read_only(readable: Iterable[str], devices: Iterable[str]) -> int | None:
    """A ruleset that allows reading some files and folders, and `devices` also to be written; nothing else.

    It does not cover what needs no open file: whether a path exists, its size and times (stat), its mode and owner
    (`filter_calls` denies changing these). Paths are resolved now, and may be unreachable for the later user.

    Returns:
        A file descriptor for `restrict_files`; None if this kernel has no Landlock, or its use is forbidden.
    """
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return None
    handled = (1 << _RIGHTS[min(version, len(_RIGHTS)) - 1]) - 1
    rules = check(libc.syscall(_CREATE_RULESET, struct.pack("=Q", handled), ctypes.c_size_t(8), 0), "landlock")
    writable = set(devices)
    for path in (*readable, *writable):
        rights = _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0) | (_WRITE_FILE if path in writable else 0)
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            check(libc.syscall(_ADD_RULE, rules, 1, struct.pack("=Qi", rights, place), 0), f"landlock {path}")
        finally:
            os.close(place)
    return rules


def restrict_files(rules: int) -> None:
    check(libc.syscall(_RESTRICT_SELF, rules, 0), "landlock")
    os.close(rules)


def visible(paths: Iterable[str], hidden: Iterable[str]) -> list[str]:
    """The largest parts of `paths` that contain nothing `hidden`, without the symbolic links in between."""
    concealed = [os.path.realpath(path) for path in hidden]

    def parts(path: str) -> Iterable[str]:
        if path in concealed:
            return
        if any(other.startswith(path.rstrip("/") + "/") for other in concealed):
            for entry in os.scandir(path):
                if not entry.is_symlink():
                    yield from parts(entry.path)
        else:
            yield path

    real = sorted({os.path.realpath(path) for path in paths if os.path.exists(path)})
    return [part for path in real for part in parts(path)]


# --- system calls: seccomp ---

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine -> its column in `_NUMBERS`, and the kernel's number for its instruction set."""

_NUMBERS = {
    "memory outside all limits, and objects that other processes share": """
        shmget 29 194, shmat 30 196, shmctl 31 195, semget 64 190, semop 65 193, semtimedop 220 192, semctl 66 191,
        msgget 68 186, msgsnd 69 189, msgrcv 70 188, msgctl 71 187, mq_open 240 180, mq_unlink 241 181, add_key 248 217,
        request_key 249 218, keyctl 250 219, memfd_create 319 279, memfd_secret 447 447, userfaultfd 323 282,
        io_uring_setup 425 425""",
    "other processes": """
        kill 62 129, tkill 200 130, tgkill 234 131, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240,
        pidfd_open 434 434, pidfd_send_signal 424 424, pidfd_getfd 438 438, ptrace 101 117, kcmp 312 272,
        process_vm_readv 310 270, process_vm_writev 311 271, process_madvise 440 440, process_mrelease 448 448,
        setpriority 141 140, ioprio_set 251 30, sched_setaffinity 203 122, sched_setattr 314 274,
        sched_setparam 142 118, sched_setscheduler 144 119, migrate_pages 256 238, move_pages 279 239""",
    "the machine: networks, namespaces, programs in the kernel, its log": """
        socket 41 198, unshare 272 97, setns 308 268, mount 165 40, bpf 321 280, perf_event_open 298 241,
        syslog 103 116""",
    "files, where Landlock has gaps": """
        chmod 90 -, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, chown 92 -, fchown 93 55, lchown 94 -,
        fchownat 260 54, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14, lremovexattr 198 15,
        fremovexattr 199 16, utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88, truncate 76 45,
        inotify_init 253 -, inotify_init1 294 26, fanotify_init 300 262, flock 73 32, openat2 437 437""",
    "other programs": "execve 59 221, execveat 322 281",
    "new processes and threads": "fork 57 -, vfork 58 -, clone 56 220, clone3 435 435",
    "in part": """
        prlimit64 302 261, prctl 157 167, fcntl 72 25, ioctl 16 29, socketpair 53 199, open 2 -, openat 257 56""",
}
"""System calls that `filter_calls` denies, some only with certain arguments; with their numbers on x86-64 and on 64-bit
ARM, which lacks some."""

_NEWEST = 463
"""The first number that was unused when the list was made (Linux 6.12). Python needs no newer calls."""

LOAD, EQUAL, AT_LEAST, ANY_BIT, AND, RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
"""BPF operations: load a word; skip steps if it is equal to a number, at least it, or has one of its bits; keep only
these bits; return."""
ALLOW, DENY = 0x7FFF0000, 0x00050000
FIRST_ARGUMENT, ARGUMENT_BYTES = 16, 8
"""Where the lower half of a call's first argument is, and the distance to the next."""

Step = tuple[int, int, int, int]
"""A BPF instruction: operation, steps to skip if true and if false, number."""


def filter_calls() -> bool:
    """Deny, irrevocably, what a Python session doesn't need and no namespace or limit covers.

    Starting a process or thread fails as it does at a limit on their number. Returns False on unknown machines.
    """
    steps: list[Step] = [(AT_LEAST, 0, 1, _NEWEST), (RETURN, 0, 0, DENY | errno.ENOSYS)]  # and x32's second numbers
    for reason, calls in _NUMBERS.items():
        answer = errno.EAGAIN if reason == "new processes and threads" else errno.EPERM
        for call in calls.split(",") if reason != "in part" else ():
            steps += on_call(call.split()[0], [(RETURN, 0, 0, DENY | answer)])
    allow, deny = (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, DENY | errno.EPERM)
    truncates: list[Step] = [(ANY_BIT, 0, 4, os.O_TRUNC), (AND, 0, 0, os.O_ACCMODE), (EQUAL, 2, 0, os.O_WRONLY)]
    truncates += [(EQUAL, 1, 0, os.O_RDWR), deny]  # older versions of Landlock miss it in other modes
    in_part: dict[str, list[Step]] = {
        "prlimit64": _only(0, 0),  # its own limits
        "prctl": [_load(0), (EQUAL, 0, 1, _PR_SET_PDEATHSIG), deny],  # it would outlive its parent
        "fcntl": _only(1, *_FCNTL),
        "ioctl": _only(1, *_IOCTL, otherwise=errno.ENOTTY),
        # Connected for good. A datagram socket can send to any other.
        "socketpair": [*_only(0, socket.AF_UNIX), _load(1), (ANY_BIT, 0, 1, 0xF & ~socket.SOCK_STREAM), deny],
        "open": [_load(1), *truncates],
        "openat": [_load(2), *truncates],
    }
    return install_filter([*steps, *(step for name, part in in_part.items() for step in on_call(name, [*part, allow]))])


_FCNTL = (0, 1, 2, 3, 4, 1030)
"""Operations of fcntl that Python needs: duplicate; get and set flags. Others lock files, or send signals (SETOWN)."""
_IOCTL = (0x5421, 0x5450, 0x5451)
"""Operations of ioctl that Python needs: FIONBIO, FIONCLEX, FIOCLEX. Others send signals, or change a file's flags."""


def _load(argument: int) -> Step:
    return (LOAD, 0, 0, FIRST_ARGUMENT + ARGUMENT_BYTES * argument)


def _only(argument: int, *values: int, otherwise: int = errno.EPERM) -> list[Step]:
    """Steps that deny a call if one of its arguments, counted from 0, has none of these values."""
    equal: list[Step] = [(EQUAL, len(values) - place, 0, value) for place, value in enumerate(values)]
    return [_load(argument), *equal, (RETURN, 0, 0, DENY | otherwise)]


def on_call(name: str, steps: list[Step]) -> list[Step]:
    """Steps for one system call of `_NUMBERS`; they must end with a return. Nothing if the machine lacks the call."""
    column = _MACHINES.get(platform.machine(), (0, 0))[0]
    calls = (call.split() for listed in _NUMBERS.values() for call in listed.split(","))
    [number] = [numbers[column] for known, *numbers in calls if known == name]
    return [] if number == "-" else [(EQUAL, 0, len(steps), int(number)), *steps]


def install_filter(steps: list[Step]) -> bool:
    """Run `steps` before each system call, with its number loaded; it is allowed if they don't return."""
    if platform.machine() not in _MACHINES:
        return False
    program: list[Step] = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, _MACHINES[platform.machine()][1])]
    program += [(RETURN, 0, 0, DENY | errno.EPERM), (LOAD, 0, 0, 0), *steps, (RETURN, 0, 0, ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    wrapped = struct.pack("@HP", len(program), ctypes.addressof(code))
    return bool(libc.prctl(_PR_SET_SECCOMP, 2, wrapped, 0, 0) == 0)
