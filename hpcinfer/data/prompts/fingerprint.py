"""The fingerprint of prompts: a chain of SHA-256 digests, so that any first part of an input has one too.

Rows are hashed in blocks of 1024: digest[b] = SHA-256(digest[b-1], the rows' bytes as stored, their lengths as int64,
the values of their sampling columns as JSON). The digests are stored with the prompts, so the fingerprint of the first
n rows costs one stored digest and at most 1023 rows read: so an input that grew at its end is told from another input.
What cannot change a generation (ids, meta columns, chunking) takes no part.
"""

from __future__ import annotations

import array
import hashlib
import sys
from collections.abc import Mapping
from typing import Any

from hpcinfer.data.prompts.schema import encode_json

BLOCK_ROWS = 1024
DIGEST_BYTES = 32


class FingerprintChain:
    """Takes rows in order; knows the fingerprint of those taken so far.

    Args:
        kind: "text" or "token_ids".
        num_rows: start after so many rows, a multiple of BLOCK_ROWS ...
        digest: ... with the digest stored for them.
    """

    def __init__(self, kind: str, *, num_rows: int = 0, digest: bytes = b"") -> None:
        self._digest = digest or hashlib.sha256(f"hpcinfer prompts v1 {kind}".encode()).digest()
        self.num_rows = num_rows
        self.digests = bytearray()
        """The digest after each whole block, one after the other."""
        self._begin_block()

    def _begin_block(self) -> None:
        self._data = hashlib.sha256(self._digest)
        self._lengths = array.array("q")
        self._overrides: list[bytes] = []

    def add(self, raw: bytes, overrides: Mapping[str, Any] | None = None) -> None:
        """Takes one row: its bytes as stored (UTF-8, or int32 little-endian) and its sampling values."""
        self._data.update(raw)
        self._lengths.append(len(raw))
        if overrides:
            self._overrides.append(b"%d %b\n" % (len(self._lengths), encode_json(dict(sorted(overrides.items())))))
        self.num_rows += 1
        if len(self._lengths) == BLOCK_ROWS:
            self._digest = self._end_of_block()
            self.digests += self._digest
            self._begin_block()

    def _end_of_block(self) -> bytes:
        lengths = array.array("q", self._lengths)
        if sys.byteorder == "big":
            lengths.byteswap()
        digest = self._data.copy()
        digest.update(lengths.tobytes())
        digest.update(b"".join(self._overrides))
        return digest.digest()

    def value(self) -> str:
        """The fingerprint of the rows taken so far."""
        return f"sha256:{hashlib.sha256(self._end_of_block() + b'%d' % self.num_rows).hexdigest()}"
