"""Being another user for a while, and a folder that this one may not enter. For root alone."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
_NOBODY = 65534


@contextlib.contextmanager
def secret_folder() -> Iterator[Path]:
    """A folder of mode 0700 in one that all may enter; pytest's own folders are entered by their user alone."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        secret = Path(folder) / "secret"
        secret.mkdir(mode=0o700)
        yield secret


@contextlib.contextmanager
def another_user() -> Iterator[None]:
    """What is inside runs as a user without rights."""
    os.seteuid(_NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
