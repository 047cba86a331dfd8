"""Memory that a stage of a model takes on one rank, computed from its sizes alone. Torch-free.

Shape letters: T tokens in a microbatch, D model, N query heads and K key/value heads of the whole model, H head dim,
I intermediate size, V vocabulary, n ranks of the tensor-parallel axis, S rows whose logits are wanted, E experts, J
intermediate size of one, m ranks over which whole experts are spread (1: each is split over the n ranks), k experts of
a token. A size that n does not divide is padded: each rank stores ceil(size / n).
"""

from __future__ import annotations

from hpcinfer.config.model import ModelConfig, heads_per_rank

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def layer_parameters(config: ModelConfig, tp: int = 1, *, layer: int = 0, ep: int = 1) -> int:
    """Numbers that rank 0 stores for one layer of the model, by default the first.

    (N + 2K)/n H D [+ (N + 2K)/n H] for q, k, v; D N/n H [+ D] for o; with qk-norm (N + K)/n H (each head keeps its
    weight); with sinks N/n; the MLP or the experts; two norms. Key/value heads count at least one a rank.
    """
    mlp = expert_parameters(config, tp, ep) if config.moe_layers[layer] else mlp_parameters(config, tp)
    return attention_parameters(config, tp) + mlp + 2 * norm_parameters(config)


def attention_parameters(config: ModelConfig, tp: int) -> int:
    """Numbers that each rank stores for one attention layer: see `layer_parameters`."""
    heads, kv_heads = heads_per_rank(config.num_heads, config.num_kv_heads, tp)
    hidden, dim = config.hidden_size, config.head_dim
    qkv = (heads + 2 * kv_heads) * dim
    count = qkv * hidden + hidden * heads * dim
    count += qkv if config.qkv_bias else 0
    count += hidden if config.o_bias else 0
    count += (heads + kv_heads) * dim if config.qk_norm else 0
    count += heads if config.attention_sinks else 0
    return count


def mlp_parameters(config: ModelConfig, tp: int) -> int:
    """Numbers that rank 0 stores for a dense MLP: ceil(I/n) (D [+ 1]) for up and, with a gate, as much again for it;
    D ceil(I/n) [+ D] for down.
    """
    hidden, mlp, inputs = config.hidden_size, _part(config.intermediate_size, tp), 1 + config.gated_mlp
    count = (inputs + 1) * mlp * hidden
    count += inputs * mlp + hidden if config.mlp_bias else 0
    return count


def expert_parameters(config: ModelConfig, tp: int, ep: int) -> int:
    """Numbers that rank 0 stores for a mixture: E (D [+ 1]) for the router; whole experts, ceil(E/m) (3 J D
    [+ 2J + D]), or, with m = 1, slices of all, E (3 ceil(J/n) D [+ 2 ceil(J/n) + D]).
    """
    hidden, size = config.hidden_size, config.expert_size if ep > 1 else _part(config.expert_size, tp)
    router = config.num_experts * (hidden + config.router_bias)
    biases = 2 * size + hidden if config.expert_bias else 0
    return router + _part(config.num_experts, ep) * (3 * size * hidden + biases)


def layer_cost(config: ModelConfig, layer: int, tp: int = 1) -> float:
    """What a layer costs in a step, in numbers of weights that a lane's token meets on each tp rank when experts are
    evenly used: attention and router, and k / E of the experts' weights. To compare layers with. Where the experts lie
    does not matter: with m = lanes * n each rank has fewer experts and the tokens of as many more lanes.
    """
    if not config.moe_layers[layer]:
        return float(layer_parameters(config, tp, layer=layer))
    always = attention_parameters(config, tp) + 2 * norm_parameters(config) + config.num_experts * config.hidden_size
    active = 3 * config.experts_per_token * config.expert_size * config.hidden_size
    return always + active / tp


def norm_parameters(config: ModelConfig) -> int:
    """Numbers of a norm over D: its weight, and the bias of a LayerNorm."""
    return config.hidden_size * (2 if config.norm == "layer" else 1)


def position_parameters(config: ModelConfig) -> int:
    """Numbers of learned positions, which rank 0 of the first stage has alone: one vector of D a position."""
    return config.max_position_embeddings * config.hidden_size if config.learned_positions else 0


def stage_parameters(config: ModelConfig, layers: range, tp: int = 1, ep: int = 1) -> int:
    """Numbers that rank 0 of a stage stores.

    Its layers; on the first stage ceil(V/n) D for the embedding, and learned positions; on the last the norm and
    ceil(V/n) D for the head, which a tied model on one stage has for nothing.
    """
    is_first, is_last = layers.start == 0, layers.stop == config.num_layers
    table = _part(config.vocab_size, tp) * config.hidden_size
    count = sum(layer_parameters(config, tp, layer=layer, ep=ep) for layer in layers)
    count += table + position_parameters(config) if is_first else 0
    if is_last:
        count += norm_parameters(config)
        count += 0 if is_first and config.tie_word_embeddings else table
    return count


def weight_bytes(
    config: ModelConfig, layers: range, tp: int, dtype_bytes: int, *, ep: int = 1
) -> int:
    """Bytes of weights on rank 0 of a stage, which holds at least as much as the stage's other ranks.

    Experts that stay packed in MXFP4 take 17 bytes for 32 numbers.
    """
    total = stage_parameters(config, layers, tp, ep) * dtype_bytes
    if config.packed_experts:
        mixtures = sum(config.moe_layers[layer] for layer in layers)
        numbers = mixtures * _part(config.num_experts, ep) * 3 * config.expert_size * config.hidden_size
        total -= numbers * dtype_bytes - numbers * 17 // 32
    return total


def kv_bytes_per_token(config: ModelConfig, num_layers: int, tp: int, dtype_bytes: int) -> int:
    """Bytes of keys and values that a token takes on one rank: 2 layers max(K/n, 1) H."""
    _, kv_heads = heads_per_rank(config.num_heads, config.num_kv_heads, tp)
    return 2 * num_layers * kv_heads * config.head_dim * dtype_bytes


def activation_bytes(
    config: ModelConfig, num_tokens: int, tp: int, dtype_bytes: int, *, num_logit_rows: int = 0, ep: int = 1
) -> int:
    """An estimate, from above, of what one microbatch holds at once beside weights and pages.

    In a layer: the residual stream, its norm in float32 and in the model's dtype, and the larger of attention (q, k, v,
    the rotated q and k, the output) and MLP (gate and up, the product): T (3D + max((3N + 3K)/n H, 3 ceil(I/n))) + 4TD.
    A mixture has the router's and its experts' work instead of the MLP's (`expert_work_bytes`).
    At the end the logits: the shard, the gathered copy and the joined float32. Attention's own work space is extra.
    """
    heads, kv_heads = heads_per_rank(config.num_heads, config.num_kv_heads, tp)
    attention = 3 * (heads + kv_heads) * config.head_dim
    dense = 0 if all(config.moe_layers) else 3 * _part(config.intermediate_size, tp)
    work = num_tokens * max(attention, dense) * dtype_bytes
    if any(config.moe_layers):
        work = max(work, expert_work_bytes(config, num_tokens, tp, ep, dtype_bytes))
    layer = num_tokens * (3 * dtype_bytes + 4) * config.hidden_size + work
    padded = _part(config.vocab_size, tp)
    logits = num_logit_rows * ((padded + padded * tp) * dtype_bytes + 4 * config.vocab_size)
    return num_tokens * config.hidden_size * dtype_bytes + max(layer, logits)


def expert_work_bytes(config: ModelConfig, num_tokens: int, tp: int, ep: int, dtype_bytes: int) -> int:
    """What one rank's experts hold at once, when all tokens of all lanes choose them: for each of min(k, ceil(E/m))
    pairs of a token its row, gate, up and product, the output, and that in float32 and weighted; for each token, where
    tokens travel, the packed and the unpacked row and the output; the float32 sum.
    """
    hidden, size = config.hidden_size, config.expert_size if ep > 1 else _part(config.expert_size, tp)
    lanes = max(ep // tp, 1)
    pairs = num_tokens * lanes * min(config.experts_per_token, _part(config.num_experts, ep))
    pair = (2 * hidden + 3 * size) * dtype_bytes + 8 * hidden
    travelling = 4 * hidden * dtype_bytes if ep > tp else 0
    return pairs * pair + num_tokens * lanes * (4 * hidden + travelling + 12 * config.experts_per_token)


def _part(size: int, num_ranks: int) -> int:
    return -(-size // num_ranks)
