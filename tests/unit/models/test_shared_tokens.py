"""A prompt whose tokens are spread over lanes: all lanes get all keys and values, with rotary embedding and without."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpcinfer.attention.sdpa import SdpaBackend
from hpcinfer.batch import MicroBatch
from hpcinfer.comm.bootstrap import local_world
from hpcinfer.comm.communicator import FinishedHandle
from hpcinfer.config.model import ModelConfig
from hpcinfer.models.base import StageInputs
from hpcinfer.models.checkpoint import Checkpoint
from hpcinfer.models.registry import model_class
from hpcinfer.models.weights import load_stage
from hpcinfer.parallel.axes import StageAxes
from tests.checkpoints import make_variant
from tests.unit.layers.lockstep import LockstepCommunicator, run_lockstep
from tests.unit.models.stages import Replica, build_stages

CPU = torch.device("cpu")
LANES, TP, BLOCK = 2, 2, 4
PROMPT = (np.arange(23) * 37 + 5) % 211
# Runs of each lane: (first token, one past the last). Lane 0 has the first and the last part, as in a balanced cut.
RUNS = (((0, 5), (18, 23)), ((5, 18),))
TABLES = (np.array([3, 0, 5, 1, 2, 4]), np.array([1, 4, 0, 3, 5, 2]))


def build_lanes(folder, sequence_form: bool) -> list:
    """Models by lane * TP + tp rank."""
    config, checkpoint = ModelConfig.from_folder(folder), Checkpoint(folder)
    models = []
    for lane in range(LANES):
        for rank in range(TP):
            tp = LockstepCommunicator(rank, TP, members=tuple(lane * TP + r for r in range(TP)))
            sp = LockstepCommunicator(lane, LANES, "sp", members=tuple(other * TP + rank for other in range(LANES)))
            model = model_class(config)(
                config, layers=range(config.num_layers), axes=StageAxes(tp=tp, sp=sp, sequence_form=sequence_form),
                backend=SdpaBackend(), dtype=torch.float32, device=CPU,
            )
            load_stage(model, checkpoint, local_world())
            models.append(model)
    return models


def lane_microbatch(lane: int) -> MicroBatch:
    order = np.concatenate([np.arange(*run) for runs in RUNS for run in runs])
    runs = RUNS[lane]
    counts = tuple(sum(end - start for start, end in runs) for runs in RUNS)
    return MicroBatch(
        tick=0,
        sequence_ids=(0,) * len(runs),
        token_ids=np.concatenate([PROMPT[start:end] for start, end in runs]).astype(np.int32),
        query_lens=np.array([end - start for start, end in runs], np.int32),
        context_lens=np.array([start for start, _ in runs], np.int32),
        block_tables=np.stack([TABLES[lane]] * len(runs)).astype(np.int32),
        samples=np.array([end == len(PROMPT) for _, end in runs]),
        lane_tokens=counts,
        shared_lens=counts,
        shared_slots=TABLES[lane][order // BLOCK] * BLOCK + order % BLOCK,
    )


@pytest.mark.parametrize("sequence_form", [False, True])
@pytest.mark.parametrize("variant", ["gpt2", "qwen3-bias-tied"])
def test_logits_are_those_of_one_lane(tmp_path, variant, sequence_form):
    folder = make_variant(tmp_path, variant)
    alone = Replica(build_stages(folder, SdpaBackend), max_len=24, num_sequences=1)
    wanted = alone.step({0: PROMPT})

    models, log = build_lanes(folder, sequence_form), []
    with torch.inference_mode():
        forwards, pools = [], []
        for index, model in enumerate(models):
            lane = index // TP
            pool = model.allocate_kv(num_blocks=6, block_size=BLOCK)
            for layer in range(pool.num_layers):
                for pages in pool.layer(layer):
                    pages.fill_(float("nan"))
            inputs = StageInputs.from_microbatch(lane_microbatch(lane), block_size=BLOCK, device=CPU, lane=lane)
            forwards.append(model.forward(inputs, pool))
            pools.append(pool)
        # Only lane 0 draws, and only it gathers for its head; the lanes take the same steps until then.
        head_gathers = 2 if sequence_form else 1  # of the stream, and of the logits
        results = run_lockstep(
            [_until_logits(forward, head_gathers if index // TP else 0) for index, forward in enumerate(forwards)], log
        )
    for result in results[:TP]:
        torch.testing.assert_close(result, wanted, rtol=0, atol=1e-5)
    assert sum(label.endswith(" kv") for _, label, *_ in log) == 3 * TP
    for pool in pools:
        keys = pool.layer(2)[0]
        assert keys.isnan().sum() * 24 == keys.numel(), "every lane has the keys of all 23 tokens of 24"


def _until_logits(forward, num_skipped: int):
    result = yield from forward
    for _ in range(num_skipped):
        # The lane that draws nothing waits for the other's gathers.
        yield FinishedHandle(None)
    return result
