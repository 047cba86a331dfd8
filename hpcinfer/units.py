"""Numbers with units, read from text and written for people."""

from __future__ import annotations

import re

from hpcinfer.errors import ConfigError

_BYTE_FACTORS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """Bytes from `4096`, "512 MiB" or "1.5GB". Raises ConfigError on anything else."""
    if isinstance(text, int):
        return text
    match = _BYTES.fullmatch(text)
    factor = _BYTE_FACTORS.get(match.group(2).upper()) if match else None
    if factor is None:
        raise ConfigError(f"not a size in bytes: {text!r}", fix="write a number with B, KB, MB, GB, KiB, MiB or GiB")
    return int(float(match.group(1)) * factor)


def format_bytes(num_bytes: float) -> str:
    """`1536` -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def format_count(count: float) -> str:
    """`12345` -> "12,345"; below 100 one decimal is kept unless it is whole."""
    if count < 100 and count != int(count):
        return f"{count:.1f}"
    return f"{count:,.0f}"


def counted(count: int, one: str, many: str = "") -> str:
    """A count and what it counts: (1, "row") -> "1 row", (2000, "row") -> "2,000 rows"."""
    return f"{format_count(count)} {one if count == 1 else many or one + 's'}"


def format_rate(rate: float) -> str:
    """Like `format_count`, but below 1 with two digits that say something: `0.0123` -> "0.012"."""
    return f"{rate:.2g}" if 0 < rate < 1 else format_count(rate)


def format_duration(seconds: float) -> str:
    """`75.3` -> "1:15"; below ten seconds "4.2 s"; unknown (inf, nan) "-"."""
    if seconds != seconds or seconds == float("inf"):
        return "-"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, secs = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"
