"""tokenizer_config.json of a checkpoint folder: settings of the tokenizer, its special tokens and the chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcinfer.errors import CheckpointError


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """The settings in `folder`; {} where the file is missing. Raises CheckpointError."""
    path = folder / "tokenizer_config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read", found=str(error)) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return config


def token_text(entry: Any) -> str | None:
    """The text of a special token, which is a string or an object with "content"."""
    if isinstance(entry, Mapping):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None
