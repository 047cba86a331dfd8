"""Memory that a stage of a model takes on one rank, computed from its sizes alone. Torch-free.

Shape letters: T tokens in a microbatch, D model, N query heads and K key/value heads of the whole model, H head dim,
I intermediate size, V vocabulary, n ranks of the tensor-parallel axis, S rows whose logits are wanted. A size that n
does not divide is padded: each rank stores ceil(size / n).
"""

from __future__ import annotations

from hpcinfer.config.model import ModelConfig, heads_per_rank

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def layer_parameters(config: ModelConfig, tp: int = 1) -> int:
    """Numbers that rank 0 stores for one layer.

    (N + 2K)/n H D [+ (N + 2K)/n H] for q, k, v; D N/n H [+ D] for o; 2 ceil(I/n) (D [+ 1]) for gate and up;
    D ceil(I/n) [+ D] for down; 2D for the norms, and with qk-norm (N + K)/n H (each head keeps its weight). Key/value
    heads count at least one a rank.
    """
    heads, kv_heads = heads_per_rank(config.num_heads, config.num_kv_heads, tp)
    hidden, dim, mlp = config.hidden_size, config.head_dim, _part(config.intermediate_size, tp)
    qkv = (heads + 2 * kv_heads) * dim
    count = qkv * hidden + hidden * heads * dim + 3 * mlp * hidden + 2 * hidden
    count += qkv if config.qkv_bias else 0
    count += hidden if config.o_bias else 0
    count += 2 * mlp + hidden if config.mlp_bias else 0
    count += (heads + kv_heads) * dim if config.qk_norm else 0
    return count


def stage_parameters(config: ModelConfig, layers: range, tp: int = 1) -> int:
    """Numbers that rank 0 of a stage stores.

    Its layers; on the first stage ceil(V/n) D for the embedding; on the last D for the norm and ceil(V/n) D for the
    head, which a tied model on one stage has for nothing.
    """
    is_first, is_last = layers.start == 0, layers.stop == config.num_layers
    table = _part(config.vocab_size, tp) * config.hidden_size
    count = len(layers) * layer_parameters(config, tp)
    count += table if is_first else 0
    if is_last:
        count += config.hidden_size
        count += 0 if is_first and config.tie_word_embeddings else table
    return count


def weight_bytes(config: ModelConfig, layers: range, tp: int, dtype_bytes: int) -> int:
    """Bytes of weights on rank 0 of a stage, which holds at least as much as the stage's other ranks."""
    return stage_parameters(config, layers, tp) * dtype_bytes


def kv_bytes_per_token(config: ModelConfig, num_layers: int, tp: int, dtype_bytes: int) -> int:
    """Bytes of keys and values that a token takes on one rank: 2 layers max(K/n, 1) H."""
    _, kv_heads = heads_per_rank(config.num_heads, config.num_kv_heads, tp)
    return 2 * num_layers * kv_heads * config.head_dim * dtype_bytes


def activation_bytes(
    config: ModelConfig, num_tokens: int, tp: int, dtype_bytes: int, *, num_logit_rows: int = 0
) -> int:
    """An estimate, from above, of what one microbatch holds at once beside weights and pages.

    In a layer: the residual stream, its norm in float32 and in the model's dtype, and the larger of attention (q, k, v,
    the rotated q and k, the output) and MLP (gate and up, the product): T (3D + max((3N + 3K)/n H, 3 ceil(I/n))) + 4TD.
    At the end the logits: the shard, the gathered copy and the joined float32. Attention's own work space is extra.
    """
    heads, kv_heads = heads_per_rank(config.num_heads, config.num_kv_heads, tp)
    attention = 3 * (heads + kv_heads) * config.head_dim
    widest = max(attention, 3 * _part(config.intermediate_size, tp))
    layer = num_tokens * ((3 * config.hidden_size + widest) * dtype_bytes + 4 * config.hidden_size)
    padded = _part(config.vocab_size, tp)
    logits = num_logit_rows * ((padded + padded * tp) * dtype_bytes + 4 * config.vocab_size)
    return num_tokens * config.hidden_size * dtype_bytes + max(layer, logits)


def _part(size: int, num_ranks: int) -> int:
    return -(-size // num_ranks)
