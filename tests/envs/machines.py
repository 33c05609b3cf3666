"""Run a command as on a machine that forbids more: ``python machines.py MACHINE COMMAND ...``. Linux, as root.

Containers are emulated by what they take from a process: Docker's default profile of system calls (the parts that
matter to a jail: https://docs.docker.com/engine/security/seccomp/) and its default capabilities. A user other than root
is one in a user namespace, so that files stay accessible; the profile is installed afterwards, as in a container.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "src/skillsd/envs/appworld/host"))

import kernel
from kernel import ALLOW, ANY_BIT, DENY, EQUAL, FIRST_ARGUMENT, LOAD, RETURN, Step, check, libc

_DOCKER_CAPABILITIES = (0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31)
"""Docker's default: chown, dac_override, fowner, fsetid, kill, setgid, setuid, setpcap, net_bind_service, net_raw,
sys_chroot, mknod, audit_write, setfcap."""
_NEW_NAMESPACES = 0x7E020000
_NEWUSER = 0x10000000
_VSOCK = 40
_CAPBSET_DROP = 24

_LANDLOCK: list[Step] = [
    step for number in (444, 445, 446) for step in ((EQUAL, 0, 1, number), (RETURN, 0, 0, DENY | errno.EPERM))
]


def _docker() -> list[Step]:
    deny: Step = (RETURN, 0, 0, DENY | errno.EPERM)
    allow: Step = (RETURN, 0, 0, ALLOW)
    steps: list[Step] = []
    for name in (
        *("mount", "unshare", "setns", "bpf", "perf_event_open", "syslog"),
        *("add_key", "request_key", "keyctl", "io_uring_setup", "userfaultfd"),
    ):
        steps += kernel.on_call(name, [deny])
    steps += kernel.on_call("clone3", [(RETURN, 0, 0, DENY | errno.ENOSYS)])
    steps += kernel.on_call("socket", [(LOAD, 0, 0, FIRST_ARGUMENT), (EQUAL, 0, 1, _VSOCK), deny, allow])
    namespaces: list[Step] = [(LOAD, 0, 0, FIRST_ARGUMENT), (ANY_BIT, 0, 1, _NEW_NAMESPACES), deny, allow]
    return [*steps, *kernel.on_call("clone", namespaces)]


def _become_a_user() -> None:
    uid, gid = os.getuid(), os.getgid()
    check(libc.unshare(_NEWUSER), "unshare")
    for name, line in (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1")):
        Path(f"/proc/self/{name}").write_text(line, encoding="ascii")


def _keep_capabilities(kept: tuple[int, ...]) -> None:
    for number in range(41):
        if number not in kept:
            check(libc.prctl(_CAPBSET_DROP, number, 0, 0, 0), "bounding set")
    if not kept:
        kernel.drop_capabilities()  # otherwise executing the command as root sets them to the bounding set


def _filtered(steps: list[Step]) -> None:
    if not kernel.install_filter(steps):
        sys.exit("no filter of system calls on this machine")


MACHINES = {
    "Docker's root": lambda: (_filtered(_docker()), _keep_capabilities(_DOCKER_CAPABILITIES)),
    "Docker's user": lambda: (_become_a_user(), _filtered(_docker()), _keep_capabilities(())),
    "old Docker's root": lambda: (_filtered(_LANDLOCK + _docker()), _keep_capabilities(_DOCKER_CAPABILITIES)),
    # As with AppArmor's restriction in Ubuntu 24.04: user namespaces can be made, but give no rights.
    "powerless namespaces": lambda: (
        _become_a_user(),
        _filtered(kernel.on_call("mount", [(RETURN, 0, 0, DENY | errno.EACCES)])),
        _keep_capabilities(()),
    ),
}


def main() -> None:
    machine, *command = sys.argv[1:]
    MACHINES[machine]()
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
