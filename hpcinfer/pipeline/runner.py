"""Runs the steps of one stage, in the order of their ticks."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from hpcinfer.batch import MicroBatch, Step
from hpcinfer.comm.communicator import FinishedHandle, Handle
from hpcinfer.comm.operation import Mark
from hpcinfer.kvcache.pool import KvPool
from hpcinfer.models.base import Readout, StageInputs, StageModel
from hpcinfer.parallel.segments import Segments
from hpcinfer.pipeline.graphs import DecodeGraphs
from hpcinfer.pipeline.schedule import interleave
from hpcinfer.pipeline.transfer import StageLinks
from hpcinfer.pipeline.watch import SegmentWatch


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PreparedStep:
    """A step whose activations are on their way to this stage."""

    step: Step
    arriving: tuple[Handle | None, ...]
    """One for each part; None on the first stage and where the lane has no tokens."""
    readouts: tuple[Readout | None, ...]
    """One for each part; None but on the last stage, and where nothing is read beside logits."""


class StageRunner:
    """One stage of a replica on one rank: receive, compute, send.

    Shape letters: S sequences of the step that draw a token on this lane, V vocabulary.

    Args:
        model, kv, links: of this stage.
        lane: of this rank.
        watch: marks and records segments.
        graphs: decode steps that are replayed; None computes all steps one by one.
    """

    def __init__(
        self,
        model: StageModel,
        kv: KvPool,
        links: StageLinks,
        *,
        lane: int,
        watch: SegmentWatch | None = None,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self._model = model
        self._kv = kv
        self._links = links
        self._lane = lane
        self.graphs = graphs
        self._last_sent = (-1, 0)  # tick and part
        self._watch = SegmentWatch(Mark()) if watch is None else watch

    @property
    def hidden_size(self) -> int:
        """D of the model."""
        return self._model.config.hidden_size

    def prepare(self, step: Step) -> PreparedStep:
        """Post the receives of a step, perhaps long before it is computed. Steps are prepared in the order of their ticks."""
        return PreparedStep(
            step=step, arriving=tuple(self._receive(part) for part in step.parts),
            readouts=tuple(
                Readout(part.reading, self._model.device) if part.reading and self._links.is_last else None for part in step.parts
            ),
        )

    @torch.inference_mode()
    def run(
        self,
        prepared: PreparedStep,
        *,
        drawn: torch.Tensor | None = None,
        between: Callable[[], None] | None = None,
    ) -> torch.Tensor | None:
        """Compute a step on this stage; its parts take turns.

        Args:
            drawn: int64, the tokens that this lane drew in the step before, where the host may not know them.
            between: called between segments of computation.

        Returns:
            float32 logits [S, V] on the last stage; None on the others, whose activations are on their way.
        """
        active = [
            turn for turn in zip(prepared.step.parts, prepared.arriving, prepared.readouts, strict=True)
            if self._takes_part(turn[0])
        ]
        parts = [part for part, *_ in active]
        key = self.graphs.key_of(parts) if self.graphs is not None and parts else None
        if key is not None:
            outputs = self._replay(key, parts, [arriving for _, arriving, _ in active], drawn, between)
        else:
            outputs = interleave(
                [self._forward(*turn, drawn) for turn in active], between=between,
                before_segment=self._watch.before_segment(parts), on_segment=self._watch.on_segment(parts),
            )
        if not self._links.is_last:
            return None
        return torch.cat(outputs) if outputs else None

    def close(self) -> None:
        """Let go of captured steps, before communicators are closed."""
        self._watch.harvest()
        if self.graphs is not None:
            self.graphs.close()

    def drain(self) -> None:
        """Return when everything sent has left."""
        self._links.drain()

    def _receive(self, part: MicroBatch) -> Handle | None:
        if self._links.is_first or not part.num_tokens:
            return None
        self._watch.mark.set(part.tick, part.part)
        return self._links.receive(self._model.stream.num_rows(part.num_tokens))

    def _takes_part(self, part: MicroBatch) -> bool:
        """A lane without tokens of its own computes only where other lanes need it."""
        return bool(part.num_tokens or any(part.shared_lens) or self._model.axes.ep_spans_lanes)

    def _forward(
        self, part: MicroBatch, arriving: Handle | None, readout: Readout | None, drawn: torch.Tensor | None
    ) -> Segments:
        """One microbatch: wait for its activations, compute, send on."""
        hidden = None
        if not self._links.is_first:
            # A turn is taken without tokens too, so that all lanes issue their transfers in the same order.
            hidden = yield arriving or FinishedHandle(self._links.empty(), "activations")
        inputs = StageInputs.from_microbatch(
            part, block_size=self._kv.layout.block_size, device=self._model.device, lane=self._lane, hidden=hidden,
            drawn=drawn, readout=readout,
        )
        output = yield from self._model.forward(inputs, self._kv)
        self._send(part, output)
        return output

    def _replay(
        self,
        key: tuple[int, ...],
        parts: list[MicroBatch],
        arriving: list[Handle | None],
        drawn: torch.Tensor | None,
        between: Callable[[], None] | None,
    ) -> list[torch.Tensor]:
        """All microbatches of a decode step at once, as one segment of the first: wait for their activations, replay, send on."""
        hidden = [None if handle is None else handle.wait() for handle in arriving]
        before, ended = self._watch.before_segment(parts), self._watch.on_segment(parts)
        before(0, "")
        start_s = time.perf_counter()
        outputs = self.graphs.run(key, parts, hidden, drawn)
        if ended is not None:
            ended(0, "", start_s, time.perf_counter())
        if between is not None:
            between()
        for part, output in zip(parts, outputs, strict=True):
            # The next replay may come before this one's activations have left.
            self._send(part, output if self._links.is_last else output.clone())
        return outputs

    def _send(self, part: MicroBatch, output: torch.Tensor) -> None:
        if not self._links.is_last and part.num_tokens:
            # All parts of a step take the same number of turns, so that none overtakes another.
            assert self._last_sent < (part.tick, part.part), (self._last_sent, part.tick, part.part)
            self._last_sent = (part.tick, part.part)
            self._links.send(output)
