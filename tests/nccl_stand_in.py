"""A stand-in for `cupy.cuda.nccl` and for a GPU's streams, so that NcclCommunicator runs where there is no GPU.

It takes what CuPy takes (addresses, counts, codes, a raw stream) and moves the real bytes at those addresses between the
processes over MPI. Like NCCL it works in issue order on a stream, in the background; a send or a receive blocks its stream
until the other side has come, unless they are grouped; a collective is over when all ranks have come. Unlike NCCL it notices
misuse: another verb, count, dtype, reduction or root on another rank, and an operation that is not ordered behind what the
computing stream did before. Such an error is raised where the operation's event is asked for or waited for.
"""

from __future__ import annotations

import ctypes
import itertools
import pickle
import random
import time

import numpy as np
import torch
from mpi4py import MPI

from hpcinfer.comm.bootstrap import World
from hpcinfer.comm.nccl_library import Nccl
from hpcinfer.comm.watchdog import Watchdog
from tests.fake_streams import FakeStream, FakeStreams, StandInError

# ncclDataType_t -> torch dtype, as nccl.h has them.
DTYPES = {
    0: torch.int8, 1: torch.uint8, 2: torch.int32, 4: torch.int64, 6: torch.float16, 7: torch.float32, 8: torch.float64,
    9: torch.bfloat16,
}
REDUCE = {0: torch.add, 2: torch.maximum, 3: torch.minimum}
PAUSE_S = 0.0002
_READY, _DATA, _COLLECTIVE = 0, 1, 2


def bytes_at(address: int, count: int, code: int) -> np.ndarray:
    """The memory itself."""
    size = count * DTYPES[code].itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8) if size else np.empty(0, np.uint8)


def as_tensor(raw: np.ndarray, code: int) -> torch.Tensor:
    return torch.from_numpy(raw.copy()).view(DTYPES[code])


class Send:
    """Waits for the receiver's word, checks that it means the same, and sends."""

    def __init__(self, comm, address: int, count: int, code: int, peer: int) -> None:
        self.comm, self.what, self.peer = comm, ("send", count, code), peer
        self.memory = bytes_at(address, count, code)
        self.request = None

    def poll(self) -> bool:
        if self.request is None:
            word = take(self.comm, self.peer, _READY)
            if word is None:
                return False
            wanted = pickle.loads(word)
            if wanted != self.what[1:]:
                raise StandInError(f"send of count, dtype {self.what[1:]}, and the receiver expects {wanted}")
            self.request = self.comm.Isend(self.memory, self.peer, _DATA)
        return self.request.Test()


class Receive:
    """Says what it expects, and receives it."""

    def __init__(self, comm, address: int, count: int, code: int, peer: int) -> None:
        self.memory = bytes_at(address, count, code)
        self.word = pickle.dumps((count, code))
        self.start = lambda: (comm.Isend([self.word, MPI.BYTE], peer, _READY), comm.Irecv(self.memory, peer, _DATA))
        self.requests = None

    def poll(self) -> bool:
        self.requests = self.requests or self.start()
        return all([request.Test() for request in self.requests])


class Collective:
    """Everybody sends everybody what it does and its bytes; then `finish` has the bytes of all."""

    def __init__(self, comm, what: tuple, payload: np.ndarray, finish) -> None:
        self.comm, self.what, self.finish = comm, what, finish
        self.payload = payload
        self.received: dict[int, np.ndarray] = {}
        self.requests = None

    def poll(self) -> bool:
        rank, size = self.comm.Get_rank(), self.comm.Get_size()
        if self.requests is None:
            self.received[rank] = self.payload.copy()
            self.message = pickle.dumps((self.what, self.received[rank]))
            self.requests = [self.comm.Isend([self.message, MPI.BYTE], other, _COLLECTIVE) for other in range(size) if other != rank]
        for other in range(size):
            if other not in self.received and (message := take(self.comm, other, _COLLECTIVE)) is not None:
                what, self.received[other] = pickle.loads(message)
                if what != self.what:
                    raise StandInError(f"rank {rank} does {self.what}, and rank {other} does {what}")
        if len(self.received) < size or not all([request.Test() for request in self.requests]):
            return False
        self.finish([self.received[other] for other in range(size)])
        return True


def take(comm, source: int, tag: int) -> bytes | None:
    """The next message of `source` with this tag; None where none has come."""
    status = MPI.Status()
    message = comm.Improbe(source, tag, status)
    if message is None:
        return None
    buffer = bytearray(status.Get_count(MPI.BYTE))
    message.Recv([buffer, MPI.BYTE])
    return bytes(buffer)


class StandInNccl:
    """The functions of `cupy.cuda.nccl` that are used, for one rank.

    Args:
        streams: of this rank; raw streams are looked up in it.
        delay_s: operations start up to so much later than they could, so that a missing wait shows.
    """

    def __init__(self, streams: FakeStreams, *, delay_s: float = 0.001) -> None:
        self.streams = streams
        self.calls: list[str] = []
        self._random = random.Random(MPI.COMM_WORLD.Get_rank())
        self._delay_s = delay_s
        self._depth = 0
        self._grouped: list = []
        self._serial = itertools.count()

    available = True

    def get_version(self) -> int:
        return 22809

    def get_unique_id(self) -> tuple[int, int]:
        """Who made it and a number: enough for the members to find each other."""
        return (MPI.COMM_WORLD.Get_rank(), next(self._serial))

    def groupStart(self) -> None:
        self._depth += 1

    def groupEnd(self) -> None:
        self._depth -= 1
        if self._depth == 0 and self._grouped:
            stream = self._grouped[0][0]
            assert all(other is stream for other, _ in self._grouped), "a group on one stream"
            self._enqueue(stream, [make for _, make in self._grouped])
            self._grouped = []

    def NcclCommunicator(self, ndev: int, unique_id: tuple[int, int], rank: int) -> StandInCommunicator:  # CuPy's name
        return StandInCommunicator(self, ndev, unique_id, rank)

    def add(self, verb: str, raw_stream: int, make) -> None:
        """An operation on a stream; `make` makes it when its turn comes."""
        stream = self.streams.by_number[raw_stream]
        if stream.ordered_behind != self.streams.host.clock:
            raise StandInError(f"{verb} is not ordered behind the computing stream")
        self.calls.append(verb)
        if self._depth:
            self._grouped.append((stream, make))
        else:
            self._enqueue(stream, [make])

    def _enqueue(self, stream: FakeStream, makes: list) -> None:
        delay_s = self._random.uniform(0, self._delay_s)

        def work() -> None:
            time.sleep(delay_s)
            pending = [make() for make in makes]
            while pending := [operation for operation in pending if not operation.poll()]:
                time.sleep(PAUSE_S)

        stream.enqueue(work)


class StandInCommunicator:
    """CuPy's NcclCommunicator, as far as it is used."""

    def __init__(self, nccl: StandInNccl, ndev: int, unique_id: tuple[int, int], rank: int) -> None:
        maker, serial = unique_id
        world, tag = MPI.COMM_WORLD, 100 + serial % 1000
        if rank == 0:
            members = {0: world.Get_rank()}
            while len(members) < ndev:
                other, place = world.recv(tag=tag)
                members[other] = place
            for other, place in members.items():
                if other:
                    world.send(members, place, tag + 1000)
        else:
            world.send((rank, world.Get_rank()), maker, tag)
            members = world.recv(source=maker, tag=tag + 1000)
        group = world.Get_group().Incl([members[other] for other in range(ndev)])
        self._comm = world.Create_group(group, tag + 2000)
        assert self._comm.Get_rank() == rank and self._comm.Get_size() == ndev
        self._nccl = nccl
        self.comm = id(self)

    def _collective(self, verb: str, stream: int, what: tuple, payload: tuple, finish) -> None:
        comm = self._comm
        self._nccl.add(verb, stream, lambda: Collective(comm, (verb, *what), bytes_at(*payload), finish))

    def allReduce(self, sendbuf, recvbuf, count, datatype, op, stream) -> None:
        def finish(parts: list[np.ndarray]) -> None:
            total = as_tensor(parts[0], datatype)
            for part in parts[1:]:  # rounded at each addition, as rings do
                total = REDUCE[op](total, as_tensor(part, datatype))
            bytes_at(recvbuf, count, datatype)[:] = total.view(torch.uint8).numpy()

        self._collective("allReduce", stream, (count, datatype, op), (sendbuf, count, datatype), finish)

    def allGather(self, sendbuf, recvbuf, count, datatype, stream) -> None:
        def finish(parts: list[np.ndarray]) -> None:
            bytes_at(recvbuf, count * len(parts), datatype)[:] = np.concatenate(parts)

        self._collective("allGather", stream, (count, datatype), (sendbuf, count, datatype), finish)

    def reduceScatter(self, sendbuf, recvbuf, recvcount, datatype, op, stream) -> None:
        size, rank = self._comm.Get_size(), self._comm.Get_rank()

        def finish(parts: list[np.ndarray]) -> None:
            mine = [as_tensor(part, datatype)[rank * recvcount : (rank + 1) * recvcount] for part in parts]
            total = mine[0]
            for part in mine[1:]:
                total = REDUCE[op](total, part)
            bytes_at(recvbuf, recvcount, datatype)[:] = total.contiguous().view(torch.uint8).numpy()

        self._collective(
            "reduceScatter", stream, (recvcount, datatype, op), (sendbuf, recvcount * size, datatype), finish
        )

    def broadcast(self, sendbuf, recvbuf, count, datatype, root, stream) -> None:
        def finish(parts: list[np.ndarray]) -> None:
            bytes_at(recvbuf, count, datatype)[:] = parts[root]

        self._collective("broadcast", stream, (count, datatype, root), (sendbuf, count, datatype), finish)

    def send(self, sendbuf, count, datatype, peer, stream) -> None:
        self._nccl.add("send", stream, lambda: Send(self._comm, sendbuf, count, datatype, peer))

    def recv(self, recvbuf, count, datatype, peer, stream) -> None:
        self._nccl.add("recv", stream, lambda: Receive(self._comm, recvbuf, count, datatype, peer))

    def check_async_error(self) -> None:
        return None

    def destroy(self) -> None:
        self._nccl.calls.append("destroy")
        self._comm.Free()


def use_stand_in(world: World, on_failure=lambda error: None) -> StandInNccl:
    """Let the communicators of `world` be NcclCommunicators over a stand-in, on CPU tensors."""
    streams = FakeStreams()
    library = StandInNccl(streams)
    if world.watchdog is None:
        world.watchdog = Watchdog(on_failure, deadline_s=world.deadline_s)
    world.nccl = Nccl(library=library, streams=streams, watchdog=world.watchdog)
    return library
