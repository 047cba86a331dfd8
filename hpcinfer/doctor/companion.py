"""A small process beside a rank that speaks for it when it cannot: stuck in the start of MPI, a driver, a dead file system.

Such calls block in C code, where neither a signal handler nor another thread of the interpreter runs. The companion is told
before each part what to say if the part does not end in time; it then says so and kills the rank, and the launcher ends the
rest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from hpcinfer.launch.process import die_with_parent

_PROGRAM = """
import json, os, select, sys
seconds, text = None, ""
while True:
    if not select.select([0], [], [], seconds)[0]:
        sys.stdout.write(text)
        sys.stdout.flush()
        os.kill(int(sys.argv[1]), 9)
        break
    line = sys.stdin.buffer.raw.readline()
    if not line:
        break
    seconds, text = json.loads(line)
"""


class Companion:
    """Make it before MPI is up: MPI libraries do not like forks. A context manager."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, str(os.getpid())], stdin=subprocess.PIPE, preexec_fn=die_with_parent
        )

    def __enter__(self) -> Companion:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()

    def watch(self, seconds: float, text: str) -> None:
        """From now on: what is printed, before this process is killed, unless it calls again or is done within so long."""
        self._process.stdin.write(json.dumps([seconds, text]).encode() + b"\n")
        self._process.stdin.flush()
