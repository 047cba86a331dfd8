"""These run in Triton's interpreter, which must be chosen before triton is imported: `test_interpreted` starts them so."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
