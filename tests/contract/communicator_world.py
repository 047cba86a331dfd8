"""A rank of a world that runs the communicator contract: on MPI, strict and not, on NCCL's stand-in, or on NCCL and GPUs.

    mpiexec -n 3 python -m tests.contract.communicator_world mpi|nccl|gpu

After each case all ranks exchange their outcome on a channel of its own, so that a failure on one rank is reported by
all and cannot hang the rest.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable

import torch

from hpcinfer.comm.bootstrap import World, split, start_world
from hpcinfer.comm.communicator import Communicator, Handle
from hpcinfer.comm.mpi import MpiCommunicator
from hpcinfer.comm.mpi_library import describe_mpi
from hpcinfer.errors import CommunicationError
from tests.contract.communicator_suite import CommunicatorSuite, check


class MpiCommunicatorSuite(CommunicatorSuite):
    """MPI's own needs: an abandoned synchronous send must be matched before MPI can be finalised."""

    def take_unmatched(self, comm: Communicator, peer: int) -> None:
        comm._comm.Recv(torch.empty(1).numpy(), peer)


class NcclCommunicatorSuite(CommunicatorSuite):
    """NCCL rounds at each addition, does not notice short messages, and never lets the host wait for a transfer."""

    rounds_once = False
    notices_short_messages = False

    def overdue(self, comm: Communicator, handle: Handle) -> str:
        until = time.monotonic() + 10
        while time.monotonic() < until:
            try:
                comm.check()
            except CommunicationError as error:
                return str(error)
            time.sleep(0.01)
        raise AssertionError("no CommunicationError from check()")

    def case_reserved_memory(self) -> None:
        """Sums in set-aside memory: the same few addresses, none of them twice in flight."""
        self.comm.reserve(64)
        if self.size == 1:
            return
        taken = []
        for round_ in range(3):
            handles = []
            for i in range(2):
                memory = self.comm.memory((3, 2), torch.float32)
                memory.copy_(self.fill((3, 2), salt=i + round_))
                taken.append(memory.data_ptr())
                handles.append((self.comm.all_reduce(memory), torch.stack(self.every((3, 2), salt=i + round_)).sum(0)))
            for handle, expected in handles:
                check(torch.equal(handle.wait(), expected), "sum in set-aside memory")
        check(len(set(taken)) == 4, f"four addresses in turns: {taken}")
        check(self.comm.memory((2000,), torch.float32) is None, "too large for it")
        pending = [self.comm.all_reduce(self.comm.memory((2,), torch.float32).zero_()) for _ in range(4)]
        check(self.comm.memory((2,), torch.float32) is None, "all of it is in flight")
        # The watchdog may see that one is over before it is waited for.
        until = time.monotonic() + 10
        while self.comm._queue._in_flight and time.monotonic() < until:
            self.comm.check()
        for handle in pending:
            handle.wait()
        for _ in range(4):
            memory = self.comm.memory((2,), torch.float32)
            check(memory is not None, "free again")
            self.comm.all_reduce(memory.zero_()).wait()


class StandInSuite(NcclCommunicatorSuite):
    """What can be asked of streams of our own making."""

    def case_captured(self) -> None:
        """Inside a graph there are collectives and no links, and nobody asks for the end of anything."""
        if self.size == 1:
            return
        streams = self.comm._streams
        streams.capturing = True
        try:
            handle = self.comm.all_reduce(self.fill((3,)))
            check(not self.comm._queue._in_flight, "a captured operation is not polled")
            handle.wait()
            for verb in (self.comm.send, self.comm.recv):
                try:
                    verb(self.fill((3,)), 1 - self.rank % 2)
                except CommunicationError as error:
                    check("graph" in str(error), str(error))
                else:
                    raise AssertionError(f"{verb} was captured")
        finally:
            streams.capturing = False


def mpi_suites(world: World) -> list[tuple[str, CommunicatorSuite]]:
    def make(strict: bool) -> Callable[..., Communicator]:
        def made(name: str, *, deadline_s: float = 20.0) -> MpiCommunicator:
            return MpiCommunicator(
                world.mpi_comm.Dup(), name, progress=world.progress, strict=strict, deadline_s=deadline_s
            )

        return made

    return [(f"strict={strict}", MpiCommunicatorSuite(make(strict), strict=strict)) for strict in (True, False)]


def nccl_suites(world: World) -> list[tuple[str, CommunicatorSuite]]:
    from tests.nccl_stand_in import use_stand_in

    use_stand_in(world)

    def make(name: str, *, deadline_s: float = 20.0) -> Communicator:
        world.deadline_s = deadline_s
        return split(world, list(range(world.size)), name)

    return [("on the stand-in", StandInSuite(make))]


def gpu_suites(world: World) -> list[tuple[str, CommunicatorSuite]]:
    world.watch(lambda error: print(error, flush=True))
    world.use_device("cuda", share_gpu=True)

    def make(name: str, *, deadline_s: float = 60.0) -> Communicator:
        world.deadline_s = deadline_s
        return split(world, list(range(world.size)), name)

    return [(f"on NCCL {world.nccl_settings.get('version', '')}", NcclCommunicatorSuite(make, device=world.device))]


def run_world(kind: str) -> int:
    """Be one rank: run all cases and agree on every outcome."""
    world = start_world(deadline_s=60)
    if world.rank == 0:
        print(f"{describe_mpi()}, {world.size} ranks, torch threads {torch.get_num_threads()}", flush=True)
    failed = ran = 0
    for title, suite in {"mpi": mpi_suites, "nccl": nccl_suites, "gpu": gpu_suites}[kind](world):
        for name in suite.cases():
            problem = ""
            began = time.monotonic()
            try:
                suite.run(name)
            except Exception:
                problem = traceback.format_exc()
            outcomes = world.channel.all_gather(problem)
            ran += 1
            failed += any(outcomes)
            if world.rank == 0:
                for rank, text in enumerate(outcomes):
                    if text:
                        print(f"FAILED {name} {title} on rank {rank} of {world.size}:\n{text}", flush=True)
                if not any(outcomes):
                    print(f"ok {name} {title} {time.monotonic() - began:.2f} s", flush=True)
    if world.rank == 0:
        print(f"{ran - failed} of {ran} cases passed", flush=True)
    world.close()
    return 1 if failed else 0


if __name__ == "__main__":
    code = run_world(sys.argv[1])
    if code:
        # Failed cases may have left operations behind, and finalize would wait for them.
        from mpi4py import MPI

        sys.stdout.flush()
        MPI.COMM_WORLD.Abort(code)
    sys.exit(code)
