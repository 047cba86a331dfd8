"""Runs microbatches through one stage, in the order of their ticks."""

from __future__ import annotations

import torch

from hpcinfer.batch import MicroBatch
from hpcinfer.kvcache.pool import KvPool
from hpcinfer.layers.segments import run_to_end
from hpcinfer.models.base import StageInputs, StageModel
from hpcinfer.pipeline.transfer import StageLinks


class StageRunner:
    """One stage of a replica on one rank: receive, compute, send.

    Shape letters: S sequences of the microbatch that draw a token, V vocabulary.
    """

    def __init__(self, model: StageModel, kv: KvPool, links: StageLinks) -> None:
        self._model = model
        self._kv = kv
        self._links = links

    @torch.inference_mode()
    def run(self, batch: MicroBatch) -> torch.Tensor | None:
        """Compute a microbatch on this stage.

        Returns:
            float32 logits [S, V] on the last stage; None on the others, whose activations are on their way.
        """
        arriving = None if self._links.is_first else self._links.receive(batch.num_tokens)
        inputs = StageInputs.from_microbatch(
            batch,
            block_size=self._kv.layout.block_size,
            device=self._model.device,
            hidden=arriving.wait() if arriving else None,
        )
        output = run_to_end(self._model.forward(inputs, self._kv))
        if self._links.is_last:
            return output
        self._links.send(output)
        return None

    def drain(self) -> None:
        """Return when everything sent has left."""
        self._links.drain()
