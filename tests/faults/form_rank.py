"""A rank of `hpcinfer ...` with a fault that can be set off: rank VICTIM raises in its next layer once TRIGGER exists.

usage: form_rank.py VICTIM TRIGGER run JOB.toml --set ...
"""

from __future__ import annotations

import sys
from pathlib import Path

from hpcinfer.cli.main import main
from hpcinfer.launch.env import LaunchEnvironment
from hpcinfer.models.decoder import DecoderLayer

PLANTED = "a layer fails here"


def plant(trigger: Path) -> None:
    """From now on the first layer that is computed after `trigger` has appeared raises, with its transfer in flight."""
    sound = DecoderLayer.forward

    def forward(self, *args):
        segments = sound(self, *args)
        handle = next(segments)
        if trigger.exists():
            raise RuntimeError(PLANTED)
        # The rest of the layer, as `yield from` would run it.
        while True:
            result = yield handle
            try:
                handle = segments.send(result)
            except StopIteration as end:
                return end.value

    DecoderLayer.forward = forward


if __name__ == "__main__":
    victim, trigger, *argv = sys.argv[1:]
    if LaunchEnvironment.from_environ().launcher_rank == int(victim):
        plant(Path(trigger))
    sys.exit(main(argv))
