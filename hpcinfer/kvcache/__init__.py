"""Pages for keys and values: who owns which (blocks), how one looks (layout), the memory itself (pool)."""
