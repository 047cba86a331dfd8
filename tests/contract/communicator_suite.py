"""The contract of a Communicator: one suite that every implementation passes at every size.

`CommunicatorSuite(make, device)` takes a factory, so that another implementation is one subclass or one factory away.
`communicator_world` runs it on the ranks of a world.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from hpcinfer.comm.communicator import DTYPES, Communicator, Handle
from hpcinfer.errors import CommunicationError

LARGE = (1 << 20) + 3
"""Elements of a large float32 buffer: a little over 4 MB, and an odd number."""


def filled(rank: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, salt: int = 0) -> torch.Tensor:
    """Small whole numbers that differ by rank and place: exact in every dtype, and so are their sums over 8 ranks."""
    count = int(torch.Size(shape).numel())
    values = (torch.arange(count) * 7 + rank * 3 + salt) % 13
    return values.reshape(shape).to(dtype).to(device)


class CommunicatorSuite:
    """Cases are methods named case_*; each gets a fresh communicator of all ranks.

    Args:
        make: makes a communicator; collective. Keyword `deadline_s` for cases that must run into it.
        device: where its tensors live.
        strict: order is NCCL's, so that a program that would deadlock there must run into its deadline.
    """

    rounds_once = True
    """Half-precision sums of any number of ranks are rounded once."""
    notices_short_messages = True

    def __init__(
        self, make: Callable[..., Communicator], *, device: torch.device = torch.device("cpu"), strict: bool = False
    ) -> None:
        self.make = make
        self.device = device
        self.strict = strict

    @classmethod
    def cases(cls) -> list[str]:
        return [name for name in dir(cls) if name.startswith("case_")]

    def run(self, name: str) -> None:
        """Run one case; raises on this rank what went wrong on it."""
        self.comm = self.make(name)
        self.rank, self.size = self.comm.rank, self.comm.size
        getattr(self, name)()
        self.comm.close()

    def fill(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, rank: int | None = None, salt: int = 0):
        return filled(self.rank if rank is None else rank, shape, dtype, self.device, salt)

    def every(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, salt: int = 0) -> list[torch.Tensor]:
        return [self.fill(shape, dtype, rank, salt) for rank in range(self.size)]

    # -- verbs --------------------------------------------------------------------------------------------------------

    def case_all_reduce(self) -> None:
        for dtype in DTYPES:
            for shape in ((5,), (3, 7), (1, 1, 1), (), (0,), (4, 0)):
                stack = torch.stack(self.every(shape, dtype)).double()
                for op, expected in (("sum", stack.sum(0)), ("max", stack.amax(0)), ("min", stack.amin(0))):
                    tensor = self.fill(shape, dtype)
                    result = self.comm.all_reduce(tensor, op).wait()
                    check(result is tensor, f"{dtype} {op}: the result is the same tensor")
                    equal(tensor, expected.to(dtype), f"{dtype} {shape} {op}")

    def case_all_reduce_half_rounds_once(self) -> None:
        # 256 + 1 is lost in bfloat16 when each addition rounds; in float32 the ones add up first or last alike.
        if not self.rounds_once and self.size > 2:
            return
        for dtype, big in ((torch.bfloat16, 256.0), (torch.float16, 2048.0)):
            value = big if self.rank == 0 else 1.0
            tensor = torch.full((64,), value, dtype=dtype, device=self.device)
            expected = torch.full((64,), big + self.size - 1).to(dtype)
            equal(self.comm.all_reduce(tensor).wait(), expected, str(dtype))
            rows = torch.full((2 * self.size, 3), value, dtype=dtype, device=self.device)
            equal(self.comm.reduce_scatter(rows).wait(), torch.full((2, 3), big + self.size - 1).to(dtype), str(dtype))

    def case_all_gather(self) -> None:
        for dtype in DTYPES:
            for shape in ((1,), (3, 5), (2, 3, 1), (0, 4), (3, 0)):
                result = self.comm.all_gather(self.fill(shape, dtype)).wait()
                equal(result, torch.cat(self.every(shape, dtype)), f"{dtype} {shape}")

    def case_reduce_scatter(self) -> None:
        for dtype in DTYPES:
            for rows, rest in ((1, ()), (3, (5,)), (2, (3, 1)), (0, (4,)), (2, (0,))):
                shape = (rows * self.size, *rest)
                result = self.comm.reduce_scatter(self.fill(shape, dtype)).wait()
                total = torch.stack(self.every(shape, dtype)).double().sum(0)
                equal(result, total[self.rank * rows : (self.rank + 1) * rows].to(dtype), f"{dtype} {shape}")

    def case_broadcast(self) -> None:
        for dtype in DTYPES:
            for root in range(self.size):
                for shape in ((9,), (3, 3, 3), (), (0,)):
                    tensor = self.fill(shape, dtype)
                    check(self.comm.broadcast(tensor, root).wait() is tensor, "the result is the same tensor")
                    equal(tensor, self.fill(shape, dtype, root), f"{dtype} {shape} from {root}")

    def case_all_to_all(self) -> None:
        for dtype in DTYPES:
            for rest in ((), (5,), (2, 3)):
                # Rank s sends s + r rows to rank r, so that some send none (0 to 0) and all differ.
                send = [self.rank + r for r in range(self.size)]
                receive = [r + self.rank for r in range(self.size)]
                parts = {}
                for rank in range(self.size):
                    counts = [rank + r for r in range(self.size)]
                    parts[rank] = self.fill((sum(counts), *rest), dtype, rank).split(counts)
                result = self.comm.all_to_all(self.fill((sum(send), *rest), dtype), send, receive).wait()
                equal(result, torch.cat([parts[r][self.rank] for r in range(self.size)]), f"{dtype} {rest}")
        zeros = [0] * self.size
        result = self.comm.all_to_all(torch.empty(0, 3, device=self.device), zeros, zeros).wait()
        check(tuple(result.shape) == (0, 3), "no rows at all")

    def case_send_recv(self) -> None:
        if self.size == 1:
            return
        for dtype in DTYPES:
            for shape in ((4,), (3, 5), (), (0,)):
                if self.rank == 0:
                    for peer in range(1, self.size):
                        check(self.comm.send(self.fill(shape, dtype, 0, peer), peer).wait() is None, "send gives None")
                else:
                    tensor = torch.empty(shape, dtype=dtype, device=self.device)
                    check(self.comm.recv(tensor, 0).wait() is tensor, "the result is the same tensor")
                    equal(tensor, self.fill(shape, dtype, 0, self.rank), f"{dtype} {shape}")

    def case_large(self) -> None:
        expected = torch.stack(self.every((LARGE,))).sum(0)
        equal(self.comm.all_reduce(self.fill((LARGE,))).wait(), expected, "all_reduce")
        tensor = self.fill((LARGE,), torch.bfloat16)
        equal(self.comm.all_reduce(tensor).wait(), expected.to(torch.bfloat16), "all_reduce bfloat16")
        equal(self.comm.all_gather(self.fill((LARGE,))).wait(), torch.cat(self.every((LARGE,))), "all_gather")
        equal(self.comm.broadcast(self.fill((LARGE,)), 0).wait(), self.fill((LARGE,), rank=0), "broadcast")
        if self.size > 1 and self.rank < 2:
            tensor = self.fill((LARGE,), rank=0)
            if self.rank == 0:
                self.comm.send(tensor, 1).wait()
            else:
                equal(self.comm.recv(torch.empty_like(tensor), 0).wait(), tensor, "recv")

    def case_inference_mode(self) -> None:
        with torch.inference_mode():
            inside = self.fill((9,), torch.bfloat16)
            handle = self.comm.all_reduce(inside)
        expected = torch.stack(self.every((9,))).sum(0).to(torch.bfloat16)
        equal(handle.wait(), expected, "issued inside inference mode, finished outside")
        with torch.inference_mode():
            outside = self.comm.all_reduce(self.fill((9,), torch.bfloat16))
            equal(outside.wait(), expected, "inside")

    # -- handles ------------------------------------------------------------------------------------------------------

    def case_many_in_flight(self) -> None:
        handles = []
        for i in range(60):
            if i % 3 == 0:
                handles.append(self.comm.all_reduce(self.fill((i * 11 + 1,), salt=i)))
            elif i % 3 == 1:
                handles.append(self.comm.all_gather(self.fill((i + 1, 2), torch.int32, salt=i)))
            else:
                handles.append(self.comm.broadcast(self.fill((i,), torch.bfloat16, salt=i), i % self.size))
        order = sorted(range(60), key=lambda i: (i * 17 + 5 * self.rank) % 60)
        for i in order:
            result = handles[i].wait()
            if i % 3 == 0:
                equal(result, torch.stack(self.every((i * 11 + 1,), salt=i)).sum(0), f"operation {i}")
            elif i % 3 == 1:
                equal(result, torch.cat(self.every((i + 1, 2), torch.int32, salt=i)), f"operation {i}")
            else:
                equal(result, self.fill((i,), torch.bfloat16, i % self.size, salt=i), f"operation {i}")

    def case_wait_again_and_done(self) -> None:
        handle = self.comm.all_reduce(self.fill((5,), torch.bfloat16))
        first = handle.wait().clone()
        check(handle.done(), "done after wait")
        equal(handle.wait(), first, "a second wait changes nothing")
        handle = self.comm.all_gather(self.fill((5,)))
        until = time.monotonic() + 20
        while not handle.done():
            check(time.monotonic() < until, "done() becomes true without wait()")
        check(handle.done(), "done stays")

    def case_handle_owns_buffers(self) -> None:
        handles = [self.comm.all_reduce(self.fill((50_000,), salt=i)) for i in range(12)]
        gathers = [self.comm.all_gather(self.fill((20_000,), salt=i)) for i in range(4)]
        # Whatever was freed too early is overwritten here.
        junk = [torch.full((50_000,), -1.0, device=self.device) for _ in range(40)]
        for i, handle in enumerate(handles):
            equal(handle.wait(), torch.stack(self.every((50_000,), salt=i)).sum(0), f"sum {i}")
        for i, handle in enumerate(gathers):
            equal(handle.wait(), torch.cat(self.every((20_000,), salt=i)), f"gather {i}")
        del junk
        for i in range(4):
            self.comm.all_reduce(self.fill((30_000,), salt=i))  # handle and tensor dropped at once
        self.comm.barrier()

    def case_progress_without_polling(self) -> None:
        # The background thread must finish it while this rank does something else.
        if self.size == 1:
            return
        self.comm.barrier()
        handle = self.comm.all_reduce(self.fill((LARGE,)))
        time.sleep(1.0)  # a hundred times what it takes, because test machines are busy
        waited = self.comm.counters.wait_s
        handle.wait()
        check(self.comm.counters.wait_s - waited < 0.3, "moved in the background")

    # -- groups and order ---------------------------------------------------------------------------------------------

    def case_group_ring(self) -> None:
        if self.size == 1:
            with self.comm.group():
                handle = self.comm.all_reduce(self.fill((3,)))
            equal(handle.wait(), self.fill((3,)), "group of one")
            return
        ahead, behind = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        for length in (1, 10_000, LARGE):
            target = torch.empty(length, device=self.device)
            with self.comm.group():
                sent = self.comm.send(self.fill((length,)), ahead)
                received = self.comm.recv(target, behind)
            sent.wait()
            equal(received.wait(), self.fill((length,), rank=behind), f"ring of {length}")

    def case_two_communicators(self) -> None:
        other = self.make("second")
        a = self.comm.all_reduce(self.fill((100,)))
        b = other.all_gather(self.fill((3,)))
        # Waited for in opposite orders on even and odd ranks: each must make progress without the other.
        for handle in (a, b) if self.rank % 2 else (b, a):
            handle.wait()
        equal(a.wait(), torch.stack(self.every((100,))).sum(0), "first")
        equal(b.wait(), torch.cat(self.every((3,))), "second")
        other.close()

    def case_strict_deadlock_hits_deadline(self) -> None:
        if not self.strict or self.size == 1:
            return
        comm = self.make("deadlock", deadline_s=1.0)
        began = time.monotonic()
        message = ""
        if self.rank < 2:
            peer = 1 - self.rank
            sent = comm.send(self.fill((1,)), peer, label="head to head")
            received = comm.recv(torch.empty(1, device=self.device), peer)
            try:
                received.wait()
            except CommunicationError as error:
                message = str(error)
        self.comm.barrier()  # or the first to clean up would let the other one's operations go on
        if self.rank < 2:
            check(time.monotonic() - began < 5, "within its deadline")
            for part in ("deadline of 1 s", "not started", "send (head to head)", "4 bytes", f"peer {peer}", "host"):
                check(part in message, f"{part!r} in {message!r}")
            raises(comm.check, "after a deadline the communicator says so")
            comm.abort()
            raises(sent.wait, "aborted")
        self.comm.barrier()
        # MPI still holds the unmatched sends: take them off, or finalize would wait for them.
        self.drain(comm)

    def drain(self, comm: Communicator) -> None:
        """Receive what `case_strict_deadlock_hits_deadline` left unmatched."""
        if self.rank < 2:
            self.take_unmatched(comm, 1 - self.rank)

    def take_unmatched(self, comm: Communicator, peer: int) -> None:
        """Overridden by implementations that must clean up behind an abort."""

    def case_missing_peer_hits_deadline(self) -> None:
        if self.size == 1:
            return
        comm = self.make("absent", deadline_s=0.5)
        if self.rank == 0:
            began = time.monotonic()
            handle = comm.all_reduce(self.fill((2,)), label="layer 3 mlp")
            text = self.overdue(comm, handle)
            check(0.4 < time.monotonic() - began < 5, "at its deadline")
            for part in ("all_reduce", "'absent", "layer 3 mlp", "8 bytes", "rank 0", "host", "other ranks"):
                check(part in text, f"{part!r} in {text!r}")
            raises(lambda: comm.all_reduce(self.fill((2,))), "a failed communicator takes nothing more")
        else:
            time.sleep(1.0)
            comm.all_reduce(self.fill((2,))).wait()

    def overdue(self, comm: Communicator, handle: Handle) -> str:
        """The error of a transfer in which nobody else takes part, when its deadline has passed."""
        return raises(handle.wait, "nobody else takes part")

    # -- misuse and counters ------------------------------------------------------------------------------------------

    def case_misuse(self) -> None:
        comm, good = self.comm, self.fill((2 * self.size, 3))
        raises(lambda: comm.all_reduce([1.0]), "not a tensor")
        raises(lambda: comm.all_reduce(torch.zeros(3, dtype=torch.complex64, device=self.device)), "a dtype")
        raises(lambda: comm.all_reduce(good.t()), "not contiguous")
        raises(lambda: comm.all_reduce(good.to("meta")), "another device")
        raises(lambda: comm.all_reduce(good, "mean"), "an unknown reduction")
        raises(lambda: comm.all_gather(torch.zeros((), device=self.device)), "no dim to gather on")
        raises(lambda: comm.broadcast(good, self.size), "a root past the end")
        raises(lambda: comm.send(good, -1), "a negative peer")
        raises(lambda: comm.send(good, self.rank), "oneself")
        raises(lambda: comm.recv(good, self.rank), "oneself")
        raises(lambda: comm.all_to_all(good, [1] * (self.size + 1), [1] * self.size), "too many counts")
        raises(lambda: comm.all_to_all(good, [0] * self.size, [0] * self.size), "counts that do not add up")
        if self.size > 1:
            raises(lambda: comm.reduce_scatter(self.fill((self.size + 1, 2))), "rows that do not divide")
        equal(comm.all_reduce(good).wait(), torch.stack(self.every((2 * self.size, 3))).sum(0), "still works")

    def case_group_misuse(self) -> None:
        if self.size == 1:
            return
        with self.comm.group():
            handle = self.comm.all_reduce(self.fill((2,)))
            raises(handle.wait, "waiting inside the group")
            check(not handle.done(), "not done inside the group")
        handle.wait()
        try:
            with self.comm.group():
                lost = self.comm.all_reduce(self.fill((2,)))
                raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        raises(lost.wait, "a group that was left by an exception has issued nothing")
        self.comm.all_reduce(self.fill((2,))).wait()

    def case_short_message(self) -> None:
        if self.size == 1 or not self.notices_short_messages:
            return
        if self.rank == 0:
            self.comm.send(self.fill((3,)), 1).wait()
        elif self.rank == 1:
            handle = self.comm.recv(torch.empty(5, device=self.device), 0)
            check("12 bytes" in raises(handle.wait, "fewer elements than expected"), "says how many came")

    def case_counters(self) -> None:
        check(self.comm.counters.operations == 0, "starts at zero")
        self.comm.all_reduce(self.fill((10,))).wait()
        self.comm.all_gather(self.fill((3,), torch.bfloat16)).wait()
        if self.size > 1:
            check(self.comm.counters.operations == 2, f"{self.comm.counters}")
            check(self.comm.counters.bytes == 46, f"{self.comm.counters}")
            if self.rank == 1:
                time.sleep(0.3)
            waited = self.comm.counters.wait_s
            self.comm.barrier()
            if self.rank == 0:
                check(self.comm.counters.wait_s - waited > 0.1, f"{self.comm.counters}")

    def case_warmup_and_close(self) -> None:
        self.comm.warmup()
        self.comm.check()
        if self.size > 1:
            handle = self.comm.all_reduce(self.fill((LARGE,)))
            del handle
        self.comm.close()  # and again by run(): closing twice is no error


def check(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def equal(found: torch.Tensor, expected: torch.Tensor, message: str) -> None:
    """Exact: every value of the suite is a small whole number."""
    found = found.cpu()
    check(found.dtype == expected.dtype, f"{message}: dtype {found.dtype}, expected {expected.dtype}")
    check(found.shape == expected.shape, f"{message}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    if not torch.equal(found, expected.cpu()):
        where = (found != expected.cpu()).nonzero()
        raise AssertionError(f"{message}: {len(where)} of {found.numel()} values differ, first at {where[0].tolist()}")


def raises(call: Callable[[], object], message: str) -> str:
    try:
        call()
    except CommunicationError as error:
        return str(error)
    raise AssertionError(f"no CommunicationError: {message}")
