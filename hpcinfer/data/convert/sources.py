"""Sources as bytes: compressed files are seen through, lines are bounded, a file that changes meanwhile is noticed."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import re
import shlex
import stat
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from hpcinfer.errors import DataError

COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
"""Endings that may follow a format's own. What is opened is decided by the first bytes, never by the name."""

READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError)
"""What reading a damaged compressed file raises; ValueError comes from pyarrow."""

_GZIP = re.compile(rb"\x1f\x8b")
# The first block's magic too: "BZh" alone may begin a line of text.
_BZIP2 = re.compile(rb"BZh[1-9](\x31\x41\x59\x26\x53\x59|\x17\x72\x45\x38\x50\x90)")
_XZ = re.compile(rb"\xfd7zXZ\x00")
_ZSTD = re.compile(rb"\x28\xb5\x2f\xfd")
_HEAD_BYTES = 10


@contextlib.contextmanager
def open_source(source: str) -> Iterator[BinaryIO]:
    """Opens a file for reading bytes, through gzip, bzip2, xz or zstd when its first bytes say so; closes it at the end.

    Raises:
        DataError: it cannot be opened, or is compressed in a way that needs a package that is not installed.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(source, "rb"))
            head = file.peek(_HEAD_BYTES)[:_HEAD_BYTES]
            if _GZIP.match(head):
                file = stack.enter_context(gzip.GzipFile(fileobj=file))
            elif _BZIP2.match(head):
                file = stack.enter_context(bz2.BZ2File(file))
            elif _XZ.match(head):
                file = stack.enter_context(lzma.LZMAFile(file))
            elif _ZSTD.match(head):
                file = stack.enter_context(_zstd(source, file))
        except IsADirectoryError as error:
            raise DataError(f"{source} is a folder", fix="name a file in it") from error
        except OSError as error:
            raise DataError(f"cannot read {source}", found=error.strerror or str(error)) from error
        yield file


def _zstd(source: str, file: BinaryIO) -> BinaryIO:
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            f"{source} is compressed with zstd", fix="pip install 'hpcinfer[tables]' (pyarrow), or decompress it before"
        ) from error
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd"), 1 << 20)


def bounded_lines(source: str, most: int) -> Iterator[tuple[int, bytes | None]]:
    """Yields (number from 1, line without its end); None for a line longer than `most` bytes, which is skipped unread.

    A file's last line need not end. Line ends are "\\n" or "\\r\\n"; a byte order mark at the start is taken off.

    Raises:
        DataError: the file cannot be opened, or ends or breaks in the middle of its compression.
    """
    number = 0
    with open_source(source) as file:
        try:
            while line := file.readline(most + 2):
                number += 1
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                        raise DataError(
                            f"{source} is UTF-16, not UTF-8", fix=f"iconv -f UTF-16 -t UTF-8 {shlex.quote(source)} > NAME, and convert that"
                        )
                content = line.removesuffix(b"\n").removesuffix(b"\r")
                if len(content) > most:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(1 << 20)
                    yield number, None
                else:
                    yield number, content
        except READ_ERRORS as error:
            raise DataError(
                f"{source} breaks off after line {number}", found=str(error), fix="get the file again"
            ) from error


@contextlib.contextmanager
def unchanged(source: str) -> Iterator[None]:
    """Notices that a plain file was changed while the body read it: rows of two states must not be mixed unseen.

    Raises:
        DataError: its size or time of change is another one at the end.
    """
    before = _state(source)
    yield
    after = _state(source)
    if before != after:
        raise DataError(
            f"{source} changed while it was read",
            found=" bytes, then ".join("no plain file" if state is None else str(state[0]) for state in (before, after)),
            fix="convert it when nobody writes to it any more",
        )


def _state(source: str) -> tuple[int, int] | None:
    try:
        found = os.stat(source)
    except OSError:
        return None
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None
