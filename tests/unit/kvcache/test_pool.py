"""Page layout arithmetic and the pages."""

from __future__ import annotations

import torch

from hpcinfer.kvcache.layout import KvLayout
from hpcinfer.kvcache.pool import KvPool


def test_shape_follows_the_order():
    sizes = {"block_size": 16, "num_kv_heads": 2, "head_dim": 8}
    assert KvLayout(**sizes).shape(5) == (5, 16, 2, 8)
    assert KvLayout(**sizes, order=("block", "head", "token", "dim")).shape(5) == (5, 2, 16, 8)


def test_pool_has_pages_for_every_layer():
    layout = KvLayout(block_size=4, num_kv_heads=2, head_dim=8)
    pool = KvPool(layout, num_layers=3, num_blocks=5, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert pool.num_layers == 3
    assert pool.num_bytes == 3 * 5 * layout.bytes_per_block(2)
    pages = [page for i in range(3) for page in pool.layer(i)]
    assert len({page.data_ptr() for page in pages}) == 6
    assert all(page.shape == (5, 4, 2, 8) and page.dtype == torch.bfloat16 and not page.any() for page in pages)
