"""Two gloo ranks for the whole session: this process leads, and one other process follows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from skillsd.engines.torch.ranks import group
from skillsd.engines.torch.ranks.orders import Ranks

TESTS = Path(__file__).parents[2]

FOLLOWER = """
import sys, torch, torch.distributed as dist
from skillsd.engines.torch.ranks import group
torch.set_num_threads(1)
group.follow(dist.TCPStore("127.0.0.1", int(sys.argv[1]), 2, is_master=False), 1, 2)
"""


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    path = os.pathsep.join([*sys.path, str(TESTS)])  # tests and their losses are pickled by name
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    other = subprocess.Popen([sys.executable, "-c", FOLLOWER, str(store.port)], env=environment)
    with group.lead(store, 2) as led:
        led.seconds = 120.0
        yield led
    assert other.wait(60) == 0
