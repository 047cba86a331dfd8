"""Each Triton kernel against its torch reference on the CPU and against the formula in float64: on any device, at any size.

How far apart they may be. `eps` of a dtype is the distance of 1 from the next number; rounding is off by eps / 2 at most.
- What is only moved, added or multiplied once is equal: the kernels round where torch rounds.
- A sum over many numbers (norm, matrix product) is made in another order: in float32 a few eps apart. In half precision
  that may tip a rounding to the neighbouring number (1 ulp), and a product with a weight after it may show 2.
- exp, erf and division are those of the GPU: a few eps of float32, which again may tip a rounding.
"""

from __future__ import annotations

import dataclasses

import torch

from hpcinfer.kernels import draw, experts, gate, norm, rotary, routing
from hpcinfer.kernels import (
    triton_draw,
    triton_experts,
    triton_gate,
    triton_norm,
    triton_pairs,
    triton_rotary,
    triton_routing,
)
from hpcinfer.kernels.experts import ExpertWeights
from hpcinfer.kernels.gate import Gate
from hpcinfer.kernels.mxfp4 import unpack
from hpcinfer.request import NOT_A_TOKEN

CPU = torch.device("cpu")
FLOAT32_EPS = torch.finfo(torch.float32).eps


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers on the CPU."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def permutations(rows: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """int64 [rows, size]: 0 to size - 1 in random order in each row."""
    return torch.rand(rows, size, generator=generator).argsort(dim=-1)


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many numbers of the dtype a and b are apart at most. NaN is as far from everything as can be."""
    if not a.numel():
        return 0
    bits = {2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    ordered = []
    for x in (a, b):
        assert not x.isnan().any()
        raw = x.contiguous().view(bits).long()
        ordered.append(torch.where(raw < 0, torch.iinfo(bits).min - raw, raw))
    return int((ordered[0] - ordered[1]).abs().max())


def check_norm(device: torch.device, rows: int, size: int, dtype: torch.dtype, *, wide: bool, strided: bool = False) -> None:
    """Alone and behind an addition."""
    weight = numbers(size, dtype=dtype, seed=3) + 1
    hidden, y = (numbers(rows, size + 8, dtype=dtype, seed=seed, scale=3)[:, :size] for seed in (1, 2))
    if not strided:
        hidden, y = hidden.contiguous(), y.contiguous()
    wanted, total = norm.add_rms_norm(hidden, y, weight, 1e-5, wide=wide)
    moved = [numbers(rows, size + 8, dtype=dtype, seed=seed, scale=3).to(device)[:, :size] for seed in (1, 2)]
    if not strided:
        moved = [t.contiguous() for t in moved]
    kept = [t.clone() for t in moved]
    got, got_total = triton_norm.add_rms_norm(*moved, weight.to(device), 1e-5, wide=wide)
    assert all(torch.equal(a, b) for a, b in zip(moved, kept))  # a communicator's buffers
    assert torch.equal(got_total.cpu(), total)
    alone = triton_norm.rms_norm(total.to(device), weight.to(device), 1e-5, wide=wide)
    assert torch.equal(alone, got)
    assert ulps(got.cpu(), wanted) <= (16 if dtype == torch.float32 else 2)
    if dtype != torch.float32 and wanted.numel() > 20:
        # Few sums are so near the middle of two numbers; rounding at another place would show in every third number.
        assert (got.cpu() != wanted).double().mean() < 0.05
    exact = total.double()
    exact = exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    torch.testing.assert_close(got.cpu().double(), exact, rtol=max(1.1 * torch.finfo(dtype).eps, 1e-6), atol=0)


def check_heads(
    device: torch.device, tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, *,
    norms: bool, rotates: bool, page: int = 4,
) -> None:
    """Norm, rotation, pages; the pages are every other one of a larger pool, and slots that get nothing stay as they are."""
    total, blocks = heads + 2 * kv_heads, -(-tokens // page) + 2
    qkv = numbers(tokens, total, head_dim, dtype=dtype, seed=1)
    weight = (numbers(heads + kv_heads, head_dim, dtype=dtype, seed=2) + 1, 1e-6) if norms else None
    angles = torch.rand(tokens, 1, head_dim // 2, generator=torch.Generator().manual_seed(3)) * 6
    tables = (angles.cos().to(dtype), angles.sin().to(dtype)) if rotates else None
    slots = torch.randperm(blocks * page, generator=torch.Generator().manual_seed(4))[:tokens]
    shape = (blocks, 2, page, kv_heads, head_dim)
    wanted_pages, pages = (
        [torch.full(shape, 7.0, dtype=dtype, device=place)[:, side] for side in (0, 1)] for place in (CPU, device)
    )
    wanted = rotary.norm_rotate_write(qkv.clone(), heads, weight, tables, wanted_pages, slots, _write)
    ours = qkv.clone().to(device)
    moved_weight, moved_tables = weight and (weight[0].to(device), weight[1]), tables and tuple(t.to(device) for t in tables)
    triton_rotary.norm_rotate_write(ours, heads, moved_weight, moved_tables, pages, slots.to(device))
    got = (ours[:, :heads], ours[:, heads : heads + kv_heads], ours[:, heads + kv_heads :])
    for a, b in zip((*got, *pages), (*wanted, *wanted_pages)):
        # The norm's sum may tip a rounding; two products and their difference may be small against it.
        atol = 4 * torch.finfo(dtype).eps * float(b.abs().max()) if norms and b.numel() else 0
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=atol)
    assert (pages[0] == 7.0).sum() >= (blocks * page - tokens) * kv_heads * head_dim
    if rotates and not norms:
        half = head_dim // 2
        turned = torch.complex(*(qkv[:, : heads + kv_heads, part].double() for part in (slice(half), slice(half, None))))
        turned = turned * torch.complex(*(table.double() for table in tables))
        exact = torch.cat((turned.real, turned.imag), dim=-1)
        # Two products and a sum are rounded, of numbers up to 6.
        got_qk = torch.cat(got[:2], dim=1).cpu().double()
        torch.testing.assert_close(got_qk, exact, rtol=0, atol=12 * torch.finfo(dtype).eps)
    if norms or rotates:
        # Keys that travel to other lanes first: a part of the heads, no pages.
        keys = qkv.clone().to(device)[:, heads : heads + kv_heads]
        part = moved_weight and (moved_weight[0][heads:], moved_weight[1])
        assert torch.equal(triton_rotary.norm_rotate(keys, part, moved_tables), got[1])


def _write(k, v, k_pages, v_pages, slots) -> None:
    page = k_pages.shape[1]
    k_pages[slots // page, slots % page] = k
    v_pages[slots // page, slots % page] = v


def check_gate(device: torch.device, rows: int, size: int, dtype: torch.dtype, kind: Gate) -> None:
    """Numbers from the flat ends of the activations to their bends."""
    gate_up = numbers(rows, 2 * size, dtype=dtype, seed=1, scale=4)
    got = triton_gate.gate_up_product(gate_up.to(device), kind).cpu()
    eps = torch.finfo(dtype).eps
    # erf and tanh are near -1 there: torch's own float32 is off by this much of up.
    tail = 2e-6 * float(gate_up.abs().max() + 1) ** 2 if gate_up.numel() else 0
    torch.testing.assert_close(got, gate.gate_up_product(gate_up, kind), rtol=max(2 * eps, 4e-6), atol=tail)
    left, right = gate_up.double().split(size, dim=-1)
    if kind.limit:
        left, right = left.clamp(max=kind.limit), right.clamp(-kind.limit, kind.limit)
        exact = (right + 1) * left * torch.sigmoid(1.702 * left)
    else:
        exact = gate.ACTIVATIONS[kind.activation](left) * right
    # Rounded after each of up to five operations; where up is near -1 the sum with 1 is small and its rounding is not.
    torch.testing.assert_close(got.double(), exact, rtol=3 * eps + 4e-6, atol=tail + (16 * eps if kind.limit else 0))


def check_gate_keeps_nan(device: torch.device, kind: Gate) -> None:
    """A number that is none reaches the logits, where it is noticed."""
    gate_up = torch.ones(2, 10)
    gate_up[0, 1] = gate_up[1, 7] = torch.nan
    got = triton_gate.gate_up_product(gate_up.to(device), kind).cpu().isnan()
    assert got.nonzero().tolist() == [[0, 1], [1, 2]]


def check_draw(device: torch.device, logits: torch.Tensor, temperature: torch.Tensor, uniforms: torch.Tensor, **more) -> None:
    """The same tokens."""
    wanted = draw.draw(logits, temperature, uniforms)
    got = triton_draw.draw(logits.to(device), temperature.to(device), uniforms.to(device), **more)
    assert torch.equal(got.cpu(), wanted), (got.cpu() != wanted).nonzero()[:5]


def check_draws_at_the_borders(device: torch.device, **more) -> None:
    """A uniform number that is just the sum of some tokens' probabilities draws the next token."""
    rows = torch.arange(64)
    logits = torch.full((64, 130), -torch.inf)
    logits[:, 3:131:2] = 1.0  # 64 equal ones, so that all sums are exact
    got = triton_draw.draw(
        logits.to(device), torch.ones(64, dtype=torch.float64, device=device), (rows.double() / 64).to(device), **more
    )
    assert got.tolist() == (2 * rows + 3).tolist()


def check_the_last_uniform_number(device: torch.device, **more) -> None:
    """It draws a token that has some probability, and those after it have next to none: where exactly, rounding decides."""
    logits = numbers(12, 100, seed=9, scale=8)
    logits[:, -7:] = logits[:, :5] = -torch.inf
    ones = torch.ones(12, dtype=torch.float64)
    got = triton_draw.draw(logits.to(device), ones.to(device), ones.to(device) * (1 - 2.0**-53), **more).cpu()
    probs = torch.softmax(logits.double(), dim=-1)
    assert (probs.gather(1, got[:, None]) > 0).all()
    after = torch.where(torch.arange(100) > got[:, None], probs, 0.0).sum(1)
    assert after.max() < 1e-14


def check_draw_of_what_is_no_number(device: torch.device, **more) -> None:
    """Infinity and NaN anywhere, for greedy and drawn rows; the other rows do not notice."""
    logits = numbers(8, 70, seed=5)
    logits[0, 3] = logits[1, 69] = torch.nan
    logits[2, 5] = logits[3, 0] = torch.inf
    logits[4] = logits[5] = -torch.inf
    temperature = torch.tensor([0, 1.0] * 4, dtype=torch.float64)
    uniforms = torch.full((8,), 0.4, dtype=torch.float64)
    check_draw(device, logits, temperature, uniforms, **more)
    got = triton_draw.draw(logits.to(device), temperature.to(device), uniforms.to(device), **more).tolist()
    assert got[:6] == [NOT_A_TOKEN] * 6 and NOT_A_TOKEN not in got[6:]


def check_choice(
    device: torch.device, tokens: int, num_experts: int, choice: routing.Choice, dtype: torch.dtype, *, masked: bool
) -> None:
    """Logits of a row are all different: of equal ones torch chooses any."""
    generator = torch.Generator().manual_seed(tokens)
    logits = (permutations(tokens, num_experts, generator) / 8 - 3).to(dtype)
    valid = torch.arange(tokens) % 3 != 1 if masked else None
    wanted_ids, wanted = routing.choose_experts(logits, choice, valid)
    ids, weights = triton_routing.choose_experts(logits.to(device), choice, valid if valid is None else valid.to(device))
    assert torch.equal(ids.cpu(), wanted_ids)
    rounding = torch.finfo(dtype).eps if choice.rounded else 0
    torch.testing.assert_close(weights.cpu(), wanted, rtol=rounding + 32 * FLOAT32_EPS, atol=0)
    load, wanted_load = torch.ones(num_experts, dtype=torch.int64, device=device), torch.ones(num_experts, dtype=torch.int64)
    triton_routing.count_experts(load, ids)
    routing.count_experts(wanted_load, wanted_ids)
    assert torch.equal(load.cpu(), wanted_load)
    assert load.sum() == num_experts + choice.num_chosen * (tokens if valid is None else int(valid.sum()))


def check_choice_of_nan(device: torch.device, choice: routing.Choice) -> None:
    """It chooses experts of the model, with weights that are no numbers."""
    logits = torch.full((2, 5), torch.nan)
    logits[1] = torch.tensor([0.0, 1.0, torch.nan, 3.0, 4.0])
    ids, weights = triton_routing.choose_experts(logits.to(device), choice)
    assert ids.min() >= 0 and ids.max() < 5 and weights.isnan().all()


def make_experts(
    num_experts: int, first: int, num_local: int, size: int, hidden: int, dtype: torch.dtype, *,
    bias: bool = False, packed: bool = False, kind: Gate = Gate(activation="silu"),
) -> ExpertWeights:
    """Random experts on the CPU."""
    generator = torch.Generator().manual_seed(num_experts)

    def matrices(rows: int, columns: int, seed: int):
        if not packed:
            return numbers(num_local, rows, columns, dtype=dtype, seed=seed, scale=columns**-0.5)
        blocks = torch.randint(0, 256, (num_local, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
        return blocks, torch.randint(122, 126, (num_local, rows, columns // 32), dtype=torch.uint8, generator=generator)

    return ExpertWeights(
        num_experts=num_experts, first=first, num_local=num_local, size=size, hidden=hidden,
        gate_up=matrices(2 * size, hidden, 1), down=matrices(hidden, size, 2),
        gate_up_bias=numbers(num_local, 2 * size, dtype=dtype, seed=3) if bias else None,
        down_bias=numbers(num_local, hidden, dtype=dtype, seed=4) if bias else None, gate=kind,
    )


def on(device: torch.device, held: ExpertWeights) -> ExpertWeights:
    """The same on a device."""
    def moved(value):
        if isinstance(value, torch.Tensor):
            return value.to(device)
        return tuple(map(moved, value)) if isinstance(value, tuple) else value

    return ExpertWeights(**{field.name: moved(getattr(held, field.name)) for field in dataclasses.fields(held)})


def check_experts(device: torch.device, held: ExpertWeights, tokens: int, num_chosen: int, dtype: torch.dtype) -> None:
    """Tokens go to experts here, to others, and some to nobody."""
    x = numbers(tokens, held.hidden, dtype=dtype, seed=6)
    generator = torch.Generator().manual_seed(7)
    ids = permutations(tokens, held.num_experts, generator)[:, :num_chosen].contiguous()
    ids[3::5] = -1
    weights = torch.rand(tokens, num_chosen, generator=generator)
    wanted = experts.expert_outputs(x, ids, weights, held)
    got = triton_experts.expert_outputs(x.to(device), ids.to(device), weights.to(device), on(device, held)).cpu()
    assert not got[3::5].any()
    eps = torch.finfo(dtype).eps
    size = float(wanted.abs().max()) if wanted.numel() else 0.0
    # Numbers of size `size` are rounded in the middle and at the end; a middle one that tips changes a sum by its own eps.
    torch.testing.assert_close(got, wanted, rtol=0, atol=max(2 * eps, 8 * FLOAT32_EPS) * max(size, 1))
    exact = _by_the_formula(x, ids, weights, held)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=max(4 * eps, 16 * FLOAT32_EPS) * max(size, 1))


def check_sorted_pairs(device: torch.device, tokens: int, chosen: int, held: ExpertWeights, tile: int) -> None:
    """Every pair of this rank stands in one tile, in order, with no other expert's; the tiles that are left have nobody."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, held.num_experts, (tokens, chosen), generator=generator)
    got = triton_pairs.sort_pairs(ids.to(device), held, tile)
    order, tiles = got.order.cpu(), got.tiles.cpu()
    found: dict[int, list[int]] = {local: [] for local in range(held.num_local)}
    for local, begin, end in tiles.t().tolist():
        if local >= 0:
            assert 0 < end - begin <= tile
            found[local] += order[begin:end].tolist()
    flat = ids.flatten()
    assert found == {local: (flat == held.first + local).nonzero()[:, 0].tolist() for local in found}


def _by_the_formula(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, held: ExpertWeights) -> torch.Tensor:
    """One expert after the other, in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for local in range(held.num_local):
        gate_up, down = (
            (m[local] if isinstance(m, torch.Tensor) else unpack(m[0][local], m[1][local], x.dtype)).double()
            for m in (held.gate_up, held.down)
        )
        share = ((ids == held.first + local) * weights).sum(1)
        tokens = share.nonzero()[:, 0]
        inner = x[tokens].double() @ gate_up.T + (0 if held.gate_up_bias is None else held.gate_up_bias[local].double())
        y = gate.gate_up_product(inner, held.gate) @ down.T + (0 if held.down_bias is None else held.down_bias[local].double())
        out[tokens] += share[tokens, None].double() * y
    return out
