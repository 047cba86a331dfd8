"""Lives of writers over a run directory, for tests of the ledger."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hpcinfer.data.ledger.claims import Claim, Ledger
from hpcinfer.data.ledger.coverage import Coverage
from hpcinfer.data.ledger.liveness import Liveness
from hpcinfer.data.ledger.run_directory import RunDirectory
from hpcinfer.data.ledger.selection import RowSelection
from hpcinfer.data.ledger.segments import SegmentPolicy, SegmentWriter
from hpcinfer.data.ledger.writers import Writer, WriterIdentity, register_writer
from hpcinfer.request import Generation
from tests.faults.shim.harness import stub_generation


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Life:
    """A writer with its ledger and segments; by default in another place, so that only its heartbeat speaks for it."""

    def __init__(
        self,
        run: RunDirectory,
        clock: Clock,
        who: WriterIdentity = WriterIdentity(),
        *,
        num_rows: int,
        selection: RowSelection | None = None,
    ) -> None:
        self.run = run
        self.writer: Writer = register_writer(run, who, interval_s=0.0, clock=clock)
        self.liveness = Liveness(run, clock=clock, stale_after_s=100)
        coverage = Coverage(run, num_rows, selection=selection, retry_round=who.retry_round)
        self.ledger = Ledger(run, self.writer.id, self.liveness, coverage, clock=clock, min_scan_s=0)
        self.segments = SegmentWriter(
            run, self.writer.id, SegmentPolicy(max_rows=10**6), on_commit=self.ledger.coverage.add_table
        )

    def take_all(self) -> list[Claim]:
        claims = []
        while isinstance(claim := self.ledger.next_claim(), Claim):
            claims.append(claim)
        return claims

    def do(self, claims: Sequence[Claim], answer: Callable[[int, int], Generation] = stub_generation) -> int:
        """Commit an answer for each row that remains; returns how many."""
        done = [answer(row, sample) for claim in claims for row, sample, _ in self.ledger.remaining(claim)]
        self.segments.add(done)
        self.segments.flush()
        return len(done)
