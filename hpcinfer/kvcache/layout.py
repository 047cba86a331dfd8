"""The shape of a page of keys or values: a plain statement by an attention backend, torch-free.

A page (block) holds S consecutive tokens of one sequence for the K key/value heads of this rank.
"""

from __future__ import annotations

import dataclasses

AXES = ("block", "token", "head", "dim")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KvLayout:
    """Keys and values each have one tensor of this layout in every layer."""

    block_size: int
    """S: tokens in a page."""
    num_kv_heads: int
    """K: key/value heads of this rank."""
    head_dim: int
    """H."""
    order: tuple[str, str, str, str] = AXES
    """Order of the axes in memory, outermost first; `block` is the first in every layout in use."""

    def shape(self, num_blocks: int) -> tuple[int, ...]:
        """Shape of one layer's key (or value) tensor."""
        sizes = {"block": num_blocks, "token": self.block_size, "head": self.num_kv_heads, "dim": self.head_dim}
        return tuple(sizes[axis] for axis in self.order)

    def bytes_per_block(self, dtype_bytes: int) -> int:
        """Bytes of one block in one layer, keys and values together."""
        return 2 * self.block_size * self.num_kv_heads * self.head_dim * dtype_bytes
