"""The choice of a backend, and what it says when it cannot be had."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hpcinfer.attention.base import AttentionQuery
from hpcinfer.attention.registry import attention_query, explain_backends, select_backend
from hpcinfer.config.model import ModelConfig
from hpcinfer.errors import ConfigError

QUERY = AttentionQuery(
    device_type="cpu", dtype=torch.float32, head_dim=64, num_heads=8, num_kv_heads=2, block_size=16, sliding_window=True
)


def test_automatic_choice_is_sdpa():
    assert select_backend(QUERY).name == "SDPA"
    assert select_backend(QUERY, setting="auto").name == "SDPA"


def test_setting_beats_environment_beats_automatic():
    assert select_backend(QUERY, environment="naive").name == "NAIVE"
    assert select_backend(QUERY, setting="sdpa", environment="NAIVE").name == "SDPA"
    assert select_backend(QUERY, setting="auto", environment="NAIVE").name == "NAIVE"


def test_unknown_name_lists_the_valid():
    with pytest.raises(ConfigError, match="(?s)attention backend = 'fast'.*auto, SDPA, NAIVE"):
        select_backend(QUERY, setting="fast")
    with pytest.raises(ConfigError, match="HPCINFER_ATTENTION_BACKEND = 'fast'"):
        select_backend(QUERY, environment="fast")


def test_refusal_names_the_condition():
    query = dataclasses.replace(QUERY, softcap=True)
    with pytest.raises(ConfigError, match="(?s)softcap not supported.*NAIVE"):
        select_backend(query, setting="SDPA")
    assert select_backend(query).name == "NAIVE"
    assert explain_backends(query) == {"SDPA": "softcap not supported", "NAIVE": None}


def test_query_of_a_model():
    config = ModelConfig(
        family="MistralForCausalLM", vocab_size=11, hidden_size=64, intermediate_size=8, num_layers=2, num_heads=8,
        num_kv_heads=2, head_dim=64, sliding_window=(None, 4),
    )
    query = attention_query(config, tp=4, block_size=16, dtype=torch.float32, device=torch.device("cpu"))
    assert (query.num_heads, query.num_kv_heads, query.sliding_window, query.capability) == (2, 1, True, None)
    assert not query.sinks
    sinks = dataclasses.replace(config, attention_sinks=True)
    query = attention_query(sinks, tp=4, block_size=16, dtype=torch.float32, device=torch.device("cpu"))
    assert query.sinks and explain_backends(query)["SDPA"] is None
    assert "attention sinks" in explain_backends(dataclasses.replace(query, device_type="cuda"))["SDPA"]
