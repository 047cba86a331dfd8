"""How many pages the K/V cache of a rank gets: computed before any weight is read, so that what cannot fit is said at once. On a
GPU the number is measured again when the weights are there (`engine.profile`).
"""

from __future__ import annotations

import torch

from hpcinfer.config.job import EngineSection
from hpcinfer.config.model import ModelConfig
from hpcinfer.config.parallel import ParallelConfig
from hpcinfer.errors import ConfigError
from hpcinfer.launch.host_memory import available_host_bytes
from hpcinfer.models.footprint import DTYPE_BYTES, activation_bytes, kv_bytes_per_token, weight_bytes
from hpcinfer.units import format_bytes, parse_bytes


KV_MEMORY_SHARE = {"cpu": 0.5, "cuda": 0.93}
"""Of a rank's free memory. The rest of a CPU's is for the page cache and for others; of a GPU's for captured graphs and gaps between
allocations."""


def available_bytes(device: torch.device, *, num_local_ranks: int, num_device_ranks: int = 1) -> int:
    """Memory that a rank may take: its share of the node's, or of its GPU's.

    Args:
        num_local_ranks: ranks of the node.
        num_device_ranks: ranks that share the GPU.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // num_device_ranks
    return available_host_bytes(num_local_ranks)


def context_limit(model: ModelConfig, engine: EngineSection) -> int:
    """Longest sequence in tokens: what the job asks, at most what the model allows. Raises ConfigError above that."""
    if engine.max_context > model.max_position_embeddings:
        raise ConfigError(
            f"engine.max_context = {engine.max_context} is longer than the model's context",
            found=f"max_position_embeddings = {model.max_position_embeddings}",
            fix=f"set engine.max_context = {model.max_position_embeddings} or leave it out",
        )
    return engine.max_context or model.max_position_embeddings


def num_kv_blocks(
    model: ModelConfig,
    engine: EngineSection,
    *,
    layers: range,
    parallel: ParallelConfig,
    block_size: int,
    dtype: str,
    available_bytes: int,
    device_type: str = "cpu",
) -> int:
    """Pages for one rank, page 0 included: what the setting or the free memory gives, and no more than can be used.

    Args:
        layers: of this rank's stage.
        parallel: sizes of the axes.
        block_size: tokens in a page, as chosen with the attention backend.
        dtype: of weights and pages.
        available_bytes: memory free for this rank before its weights are loaded.
        device_type: cpu or cuda.

    Raises:
        ConfigError: weights do not fit, or no sequence of the asked length would fit into the pages.
    """
    dtype_bytes, tp, ep = DTYPE_BYTES[dtype], parallel.tp, parallel.ep
    page_bytes = kv_bytes_per_token(model, len(layers), tp, dtype_bytes) * block_size
    weights = weight_bytes(model, layers, tp, dtype_bytes, ep=ep)
    working = activation_bytes(
        model, engine.max_batch_tokens, tp, dtype_bytes, ep=ep,
        num_logit_rows=min(engine.max_sequences, engine.max_batch_tokens),
    )
    if parallel.pp > 1:  # what is received ahead, and what is still being sent
        rows = -(-engine.max_batch_tokens // (tp if parallel.sequence_form else 1))
        working += 2 * parallel.num_in_flight * rows * model.hidden_size * dtype_bytes
    if parallel.sp > 1:  # keys and values of all lanes, as they arrive and in the order of their slots
        working += 2 * parallel.sp * engine.max_batch_tokens * kv_bytes_per_token(model, 1, tp, dtype_bytes)
    free = available_bytes - weights - working
    if free <= 0:
        raise ConfigError(
            f"the weights of {len(layers)} layers do not fit into this rank's memory",
            found=f"weights {format_bytes(weights)}, working space {format_bytes(working)}, free {format_bytes(available_bytes)}",
            fix="raise parallel.tp or parallel.pp, lower engine.max_batch_tokens, or start fewer ranks a node",
        )
    return fit_blocks(
        model, engine, block_size=block_size, page_bytes=page_bytes, free_bytes=free, device_type=device_type,
        spent=f"weights of {format_bytes(weights)} and {format_bytes(working)} of working space",
    )


def fit_blocks(
    model: ModelConfig,
    engine: EngineSection,
    *,
    block_size: int,
    page_bytes: int,
    free_bytes: int,
    device_type: str,
    spent: str,
) -> int:
    """Pages, page 0 included, in what is free.

    Args:
        block_size: tokens in a page.
        page_bytes: of a page in all layers of the rank.
        free_bytes: after everything else.
        device_type: cpu or cuda.
        spent: what everything else is, in words.

    Raises:
        ConfigError: no sequence of the asked length would fit, or the setting is more than what is free.
    """
    share = engine.kv_memory_share or KV_MEMORY_SHARE[device_type]
    asked = free_bytes * share if engine.kv_memory == "auto" else parse_bytes(engine.kv_memory)
    if asked > free_bytes:
        raise ConfigError(
            f"engine.kv_memory = {engine.kv_memory!r} is more than this rank has",
            found=f"{format_bytes(free_bytes)} free after {spent}",
            fix=f"give at most {format_bytes(free_bytes)}, or auto",
        )
    longest = -(-context_limit(model, engine) // block_size)
    blocks = min(int(asked // page_bytes), longest * engine.max_sequences)
    needed = longest if engine.max_context else 1
    if blocks < needed:
        raise ConfigError(
            "no memory for the keys and values"
            + (f" of one sequence of engine.max_context = {engine.max_context} tokens" if engine.max_context else ""),
            found=f"{format_bytes(asked)} hold {blocks * block_size} tokens at {format_bytes(page_bytes / block_size)} a token",
            fix=f"raise engine.kv_memory to {format_bytes(needed * page_bytes)} or more, raise parallel.tp or parallel.pp"
            + (f", or lower engine.max_context to {blocks * block_size}" if blocks and engine.max_context else ""),
        )
    return blocks + 1
