"""The ledger: which rows a writer runs next. Claims avoid wasted work and nothing else; the segments count."""

from __future__ import annotations

import dataclasses
import enum
import os
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from hpcinfer.data.ledger.commit import claim_name, is_transient, read_owner
from hpcinfer.data.ledger.coverage import Coverage, list_segments
from hpcinfer.data.ledger.liveness import Liveness, Verdict
from hpcinfer.data.ledger.permutation import KeyedPermutation
from hpcinfer.data.ledger.run_directory import RunDirectory, read_json, storage_errors, unusable
from hpcinfer.data.ledger.writers import identity_path
from hpcinfer.request import Generation

_SCAN_SHARE = 0.05
_LONGEST_SCAN_PAUSE_S = 10.0
# Reading so many segments at the start takes a few seconds.
_EAGER_SEGMENTS = 2000
# A listing is worth its price when this many claims in a row turn out to be taken.
_MISSES_BEFORE_LISTING = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """The right to run rows [start, stop) first."""

    number: int
    generation: int
    """0 for the first owner; one more for each takeover."""
    start: int
    stop: int


class NoClaim(enum.Enum):
    """Why `next_claim` has none."""

    WAIT = "wait"
    """Everything left is held by live writers (this one included), or the file system refuses for now: ask again
    later.
    """
    DONE = "done"
    """Every (row, sample) is committed."""


class Ledger:
    """The claims of a run as one writer sees them.

    Free claims are walked in an order keyed by the writer's id, so that writers rarely meet; the folder is listed at
    the start and after several misses in a row, never once a claim. Segments are read at the start when they are not
    too many, else (and again) only when no claim is free any more.
    """

    def __init__(
        self,
        run: RunDirectory,
        writer_id: str,
        liveness: Liveness,
        coverage: Coverage,
        *,
        min_scan_s: float = 0.25,
        retry_s: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`min_scan_s`: after WAIT the folders are read again no sooner than this; where reading them is slow, it is
        made to take at most a twentieth of the time, up to a pause of 10 s. `retry_s`: how long a file system may
        refuse claims before the run ends.
        """
        self._run = run
        self._min_scan_s = min_scan_s
        self._clock = clock
        self._scan_at = float("-inf")
        self._retry_s = retry_s
        self._refused_since: float | None = None
        self._id = writer_id
        self._liveness = liveness
        self.coverage = coverage
        """The bitmap; the segment writer's `on_commit` should feed it."""
        self._order = KeyedPermutation(coverage.num_claims, int(writer_id, 16))
        self._cursor = 0
        self._misses = 0
        self._generations = np.full(coverage.num_claims, -1, np.int32)
        self._owners: dict[tuple[int, int], str] = {}
        self._takeovers: list[int] = []
        self._listed = False
        self.num_claimed_keys = 0
        """(row, sample) pairs that were missing in the claims given out, when they were given out."""
        self.num_takeovers = 0

    def next_claim(self, *, idle: bool = False) -> Claim | NoClaim:
        """A claim that is now this writer's: a free one; else one of a writer that left or died; else, when nothing
        else is left, one of a silent writer (run twice perhaps, kept once).

        `idle`: no row of this writer is in flight or waits to be committed. Then its own claims are offered again if
        rows are missing in them after all (a segment was found to be damaged).

        Raises RunDirectoryError; ResumableError where the file system has refused for `retry_s` (full disk, I/O
        errors).
        """
        try:
            claim = self._next_claim(idle)
        except OSError as error:
            now = self._clock()
            if self._refused_since is None:
                self._refused_since = now
            if is_transient(error) and now - self._refused_since < self._retry_s:
                return NoClaim.WAIT
            raise unusable(self._run.path, error) from error
        self._refused_since = None
        return claim

    def _next_claim(self, idle: bool) -> Claim | NoClaim:
        if not self._listed:
            self._list_claims()
            # Claims may be fewer than the rows done (their names are not durable): what is quick to know is not run
            # again.
            if len(list_segments(self._run)[0]) <= _EAGER_SEGMENTS:
                self.coverage.refresh()
        claim = self._take_free() or self._take_over(self._takeovers)
        if claim is not None:
            return claim
        scan_began = self._clock()
        if scan_began < self._scan_at:
            return NoClaim.DONE if self.coverage.is_full else NoClaim.WAIT
        self.coverage.refresh()
        if self.coverage.is_full:
            return NoClaim.DONE
        abandoned, silent, _ = self._held_by_others(own_too=idle)
        now = self._clock()
        pause_s = max(self._min_scan_s, (now - scan_began) / _SCAN_SHARE)
        self._scan_at = now + min(pause_s, _LONGEST_SCAN_PAUSE_S)
        claim = self._take_over(abandoned) or self._take_over(silent, limit=1)
        self._takeovers = abandoned
        return claim or NoClaim.WAIT

    def remaining(self, claim: Claim) -> Iterator[tuple[int, int, Generation | None]]:
        """(row, sample, what an earlier life made of it or None) of a claim, without what is committed already.

        Lazy: to be iterated as rows are admitted.
        """
        return self.coverage.remaining(claim.start, claim.stop)

    def live_claims_exist(self) -> bool:
        """Whether another live (or merely silent) writer still works: reason to linger. Raises RunDirectoryError,
        ResumableError.
        """
        with storage_errors(self._run.path):
            self.coverage.refresh()
            _, silent, num_live = self._held_by_others()
        return num_live > 0 or bool(silent)

    def requeue_wanted(self, num_committed: int) -> bool:
        """Whether the job should be requeued when this writer leaves: not complete, rows are free, abandoned or its
        own, and this life committed rows (`num_committed`). Raises RunDirectoryError, ResumableError.
        """
        with storage_errors(self._run.path):
            if num_committed == 0 or self._run.is_complete(self.coverage.num_rows, self.coverage.retry_round):
                return False
            self.coverage.refresh()
            # What is not held by somebody who may be at work is free, abandoned or this writer's own.
            _, silent, num_live = self._held_by_others()
        return len(self.coverage.incomplete_claims()) > len(silent) + num_live

    def _list_claims(self) -> None:
        for name in os.listdir(self._run.claims):
            number, _, generation = name.partition(".")
            if number.isdecimal() and generation.isdecimal() and int(number) < len(self._generations):
                self._generations[int(number)] = max(self._generations[int(number)], int(generation))
        self._listed = True
        self._misses = 0

    def _take_free(self) -> Claim | None:
        while self._cursor < len(self._order):
            number = self._order[self._cursor]
            if self._generations[number] < 0 and self.coverage.missing_in_claim(number):
                if self._create(number, 0):
                    self._cursor += 1
                    return self._claim(number, 0)
                self._misses += 1
                if self._misses >= _MISSES_BEFORE_LISTING:
                    self._list_claims()
            self._cursor += 1
        return None

    def _take_over(self, numbers: list[int], limit: int | None = None) -> Claim | None:
        """Takes the first of `numbers` that nobody else takes, consuming the list."""
        while numbers:
            number = numbers.pop(0)
            generation = int(self._generations[number]) + 1
            if self.coverage.missing_in_claim(number) and self._create(number, generation):
                self.num_takeovers += 1
                if limit is not None:
                    del numbers[:]
                return self._claim(number, generation)
        return None

    def _create(self, number: int, generation: int) -> bool:
        created = claim_name(
            self._run.claims, f"{number}.{generation}", self._id, identity_path(self._run, self._id)
        )
        self._generations[number] = max(self._generations[number], generation)
        if created:
            self._owners[number, generation] = self._id
        return created

    def _claim(self, number: int, generation: int) -> Claim:
        start = number * self.coverage.claim_size
        self.num_claimed_keys += self.coverage.missing_in_claim(number)
        return Claim(number, generation, start, min(start + self.coverage.claim_size, self.coverage.num_rows))

    def _held_by_others(self, *, own_too: bool = False) -> tuple[list[int], list[int], int]:
        """Incomplete claims of others: (of writers that left or died, of silent ones, number of live ones), each list
        in this writer's order.
        """
        self._list_claims()
        self._liveness.refresh()
        finished = read_json(self._run.done) or {}
        verdicts: dict[str, Verdict] = {}
        abandoned, silent, num_live = [], [], 0
        for number in self.coverage.incomplete_claims().tolist():
            generation = int(self._generations[number])
            if generation < 0:
                continue
            owner = self._owner(number, generation)
            if owner == self._id:
                if own_too:
                    abandoned.append(number)
                continue
            if owner and self._is_over(finished, number, owner):
                verdict = Verdict.LEFT
            elif owner:
                verdict = verdicts.get(owner) or verdicts.setdefault(owner, self._liveness.verdict(owner))
            else:
                verdict = self._liveness.unowned_verdict(f"{number}.{generation}")
            if verdict in (Verdict.LEFT, Verdict.DEAD):
                abandoned.append(number)
            elif verdict is Verdict.SILENT:
                silent.append(number)
            else:
                num_live += 1
        return self._in_own_order(abandoned), self._in_own_order(silent), num_live

    def _is_over(self, finished: Mapping[str, int], number: int, owner: str) -> bool:
        """Whether the round of a claim's owner was complete as far as the claim goes: nobody works on it, whoever lives."""
        last = min((number + 1) * self.coverage.claim_size, self.coverage.num_rows)
        return last <= finished.get("num_rows", -1) and self.coverage.rounds.of(owner) <= finished.get("retry_round", 0)

    def _in_own_order(self, numbers: list[int]) -> list[int]:
        order = KeyedPermutation(len(numbers), int(self._id, 16))
        return [numbers[i] for i in order]

    def _owner(self, number: int, generation: int) -> str:
        owner = self._owners.get((number, generation))
        if not owner:
            owner = read_owner(self._run.claims, f"{number}.{generation}") or ""
            self._owners[number, generation] = owner
        return owner


