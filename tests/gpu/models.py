"""Stages of small models on a GPU and on the CPU, with the same weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from hpcinfer.attention.naive import NaiveBackend
from hpcinfer.attention.registry import attention_query, select_backend
from hpcinfer.batch import MicroBatch
from hpcinfer.comm.bootstrap import World, local_world
from hpcinfer.comm.local import LocalCommunicator
from hpcinfer.config.model import ModelConfig
from hpcinfer.models.base import StageInputs, StageModel
from hpcinfer.models.checkpoint import Checkpoint
from hpcinfer.models.registry import model_class
from hpcinfer.models.weights import load_stage
from hpcinfer.parallel.axes import StageAxes
from hpcinfer.parallel.segments import run_to_end

CPU = torch.device("cpu")


def world_on(device: torch.device) -> World:
    return dataclasses.replace(local_world(), device=device)


def load(folder: Path, device: torch.device, dtype: torch.dtype, *, attention: str = "", block_size: int = 16) -> StageModel:
    """All layers of a checkpoint on a device; on the CPU with the reference attention."""
    config = ModelConfig.from_folder(folder)
    backend = NaiveBackend()
    if device.type == "cuda":
        query = attention_query(config, tp=1, block_size=block_size, dtype=dtype, device=device)
        backend = select_backend(query, setting=attention).backend
    axes = StageAxes(
        tp=LocalCommunicator("tp", device), sp=LocalCommunicator("sp", device), ep=LocalCommunicator("ep", device)
    )
    model = model_class(config)(
        config, layers=range(config.num_layers), axes=axes, backend=backend, dtype=dtype, device=device
    )
    load_stage(model, Checkpoint(folder), world_on(device))
    return model


def microbatch(token_ids: list[list[int]], starts: list[int], tables: np.ndarray) -> MicroBatch:
    """Consecutive tokens of each sequence from `starts` on; all draw."""
    lens = np.array([len(ids) for ids in token_ids], np.int32)
    return MicroBatch(
        tick=0, is_prefill=bool((lens > 1).any()), sequence_ids=tuple(range(len(lens))),
        token_ids=np.concatenate([np.array(ids, np.int32) for ids in token_ids]), query_lens=lens,
        context_lens=np.array(starts, np.int32), block_tables=tables, samples=np.ones(len(lens), bool),
        num_prefill_tokens=int(lens[lens > 1].sum()),
    )


def tables_of(lengths: list[int], block_size: int) -> tuple[np.ndarray, int]:
    """Pages in random order for sequences of these lengths, and how many pages there are."""
    needed = [-(-length // block_size) for length in lengths]
    order = np.random.default_rng(0).permutation(np.arange(1, sum(needed) + 1))
    tables = np.zeros((len(lengths), max(needed)), np.int32)
    start = 0
    for row, count in enumerate(needed):
        tables[row, :count] = order[start : start + count]
        start += count
    return tables, sum(needed) + 1


def logits_of_prompts_and_decodes(model: StageModel, prompts: list[list[int]], more: list[list[int]], *, block_size: int = 16) -> torch.Tensor:
    """Prefill all prompts in one step, then decode given tokens step by step: all logits, float32 [steps, sequences, V] on the CPU."""
    lengths = [len(prompt) + len(each) for prompt, each in zip(prompts, more, strict=True)]
    tables, num_blocks = tables_of(lengths, block_size)
    kv = model.allocate_kv(num_blocks=num_blocks, block_size=block_size)
    steps = [microbatch(prompts, [0] * len(prompts), tables)]
    for index in range(len(more[0])):
        steps.append(microbatch(
            [[each[index]] for each in more], [len(prompt) + index for prompt in prompts], tables
        ))
    found = []
    with torch.inference_mode():
        for step in steps:
            inputs = StageInputs.from_microbatch(step, block_size=block_size, device=model.device)
            found.append(run_to_end(model.forward(inputs, kv)).float().cpu())
    return torch.stack(found)
