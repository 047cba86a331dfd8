"""Norm and rotary embedding have transformers' numbers, bit for bit in float32 and bfloat16."""

from __future__ import annotations

import pytest
import torch

from hpcinfer.config.model import ModelConfig
from hpcinfer.kernels.norm import rms_norm
from hpcinfer.kernels.rotary import rotate
from hpcinfer.layers.norm import LayerNorm, QkNorm, RmsNorm
from hpcinfer.layers.rotary import Rotary
from tests.checkpoints import LINEAR_ROPE, LLAMA3_ROPE, YARN_ROPE

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs = LlamaRMSNorm(48, eps=1e-5)
    theirs.weight.data.normal_()
    theirs = theirs.to(dtype)
    ours = RmsNorm(48, eps=1e-5, dtype=dtype, device=CPU)
    ours.load_weight(theirs.weight.data)
    x = (torch.randn(7, 48) * 3).to(dtype)
    kept = x.clone()
    assert torch.equal(ours.forward(x), theirs(x))
    assert torch.equal(x, kept)


def test_qk_norm_has_a_weight_for_each():
    norm = QkNorm(3, 2, 8, eps=1e-6, dtype=torch.float32, device=CPU)
    q, k = torch.rand(8), torch.rand(8)
    norm.load_q(q), norm.load_k(k)
    x = torch.randn(4, 5, 8)
    wanted = torch.nn.functional.rms_norm(x, (8,), eps=1e-6)
    torch.testing.assert_close(rms_norm(x, *norm.of_qk), torch.cat((wanted[:, :3] * q, wanted[:, 3:] * k), dim=1))
    torch.testing.assert_close(rms_norm(x[:, :3], *norm.of_q), wanted[:, :3] * q)
    torch.testing.assert_close(rms_norm(x[:, 3:], *norm.of_k), wanted[:, 3:] * k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "default", "rope_theta": 5e5}, LINEAR_ROPE, LLAMA3_ROPE, YARN_ROPE, YARN_ROPE | {"truncate": False}],
)
def test_rotary(rope, dtype):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(
        hidden_size=128, num_attention_heads=2, rope_parameters=dict(rope), max_position_embeddings=256,
        architectures=["LlamaForCausalLM"],
    )
    ours = ModelConfig.from_dict(config.to_dict())
    positions = torch.tensor([0, 1, 17, 255, 100_000])
    q, k = torch.randn(5, 3, 64).to(dtype), torch.randn(5, 1, 64).to(dtype)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    wanted_q, wanted_k = apply_rotary_pos_emb(q[None], k[None], cos, sin, unsqueeze_dim=2)
    tables = Rotary(ours.rope, ours.head_dim, dtype=dtype, device=CPU).tables(positions)
    assert torch.equal(rotate(q, *tables), wanted_q[0])
    assert torch.equal(rotate(k, *tables), wanted_k[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm(dtype):
    theirs = torch.nn.LayerNorm(48, eps=1e-5)
    theirs.weight.data.normal_(), theirs.bias.data.normal_()
    theirs = theirs.to(dtype)
    ours = LayerNorm(48, eps=1e-5, dtype=dtype, device=CPU)
    for name, load in ours.weights().items():
        load(getattr(theirs, name).data)
    x = (torch.randn(7, 48) * 3 + 5).to(dtype)
    kept = x.clone()
    assert torch.equal(ours.forward(x), theirs(x))
    assert torch.equal(x, kept)
