"""The communicator interface: what carries tensors between the ranks of one mesh axis.

Every verb issues its transfer and returns a `Handle` at once; `handle.wait()` gives the result. Blocking use is
`comm.all_reduce(x).wait()`. Layers leave a handle pending by yielding it (see `pipeline.schedule`), so the same layer
code runs blocking, overlapped, on MPI or on NCCL.

Rules that every implementation keeps and every caller may rely on:
- Transfers of one communicator happen in the order in which they were issued, and all its ranks must issue the same
  collectives in the same order: another order gives silently wrong sums.
- A handle owns every buffer of its transfer until `wait()` has returned; the caller must neither write a buffer that
  is being sent nor read one that is being received before that.
- Tensors are contiguous and live on the communicator's device. Misuse raises CommunicationError before anything is
  sent.
"""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch

from hpcinfer.errors import CommunicationError

DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16,
    torch.int64, torch.int32, torch.uint8,
)
REDUCTIONS = ("sum", "max", "min")


@dataclasses.dataclass(slots=True)
class Counters:
    """What a communicator has done since it was made. The run summary adds them up over communicators."""

    operations: int = 0
    """Operations issued by this rank."""
    bytes: int = 0
    """Bytes of this rank's own tensors in them (the tensor handed in, before any padding or copies)."""
    wait_s: float = 0.0
    """Seconds that callers spent blocked in `wait()` or `barrier()`: the exposed communication."""


class Handle(ABC):
    """A transfer in flight."""

    label: str = ""
    """What the caller called it."""

    @abstractmethod
    def wait(self) -> torch.Tensor | None:
        """Finish the transfer and return its result (None for a send). May be called again; it then returns at once.

        On a GPU the host does not wait: what the calling thread computes from now on does.

        Raises:
            CommunicationError: the transfer failed or its deadline passed. On a GPU the watchdog finds that out.
        """

    @abstractmethod
    def done(self) -> bool:
        """True when `wait()` would return at once. Never blocks."""


class FinishedHandle(Handle):
    """A transfer that was over when it was issued (a communicator of one rank)."""

    def __init__(self, result: torch.Tensor | None, label: str = "") -> None:
        self._result = result
        self.label = label

    def wait(self) -> torch.Tensor | None:
        return self._result

    def done(self) -> bool:
        return True


class Communicator(ABC):
    """Collectives and point-to-point transfers among `size` ranks; this one is `rank`.

    Args:
        name: the mesh axis or link it serves ("tp", "pp 0>1", "tokens"), for records and error reports.
        rank: this rank's number in the communicator, 0 to size - 1.
        size: number of ranks.
        device: where its tensors live.
    """

    def __init__(self, name: str, rank: int, size: int, device: torch.device) -> None:
        self.name = name
        self.rank = rank
        self.size = size
        self.device = device
        self.counters = Counters()

    # -- collectives: all ranks must call ---------------------------------------------------------------------------

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum", *, label: str = "") -> Handle:
        """Reduce `tensor` (any shape) over all ranks, in place. Result: the same tensor.

        bfloat16 and float16 are summed in float32 and rounded once on MPI, at each addition on NCCL.
        """
        self._check(tensor, "all_reduce")
        if op not in REDUCTIONS:
            raise self._misuse("all_reduce", f"op={op!r}", f"one of {', '.join(REDUCTIONS)}")
        return self._all_reduce(tensor, op, label)

    def all_gather(self, tensor: torch.Tensor, *, label: str = "") -> Handle:
        """Concatenate every rank's `tensor` [n, ...] (equal shapes) over dim 0 by rank. Result: [size * n, ...]."""
        self._check(tensor, "all_gather", min_dim=1)
        return self._all_gather(tensor, label)

    def reduce_scatter(self, tensor: torch.Tensor, *, label: str = "") -> Handle:
        """Sum `tensor` [size * n, ...] over all ranks; rank r keeps rows r*n to (r+1)*n. Result: [n, ...]."""
        self._check(tensor, "reduce_scatter", min_dim=1)
        if tensor.shape[0] % self.size:
            raise self._misuse("reduce_scatter", f"{tensor.shape[0]} rows", f"a multiple of {self.size} rows")
        return self._reduce_scatter(tensor, label)

    def broadcast(self, tensor: torch.Tensor, root: int, *, label: str = "") -> Handle:
        """Copy rank `root`'s tensor into every rank's `tensor` (equal shapes), in place. Result: the same tensor."""
        self._check(tensor, "broadcast")
        self._check_peer(root, "broadcast")
        return self._broadcast(tensor, root, label)

    def all_to_all(
        self, tensor: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], *, label: str = ""
    ) -> Handle:
        """Send `send_counts[r]` rows of `tensor` [sum(send_counts), ...] to each rank r, in rank order.

        Result: [sum(recv_counts), ...], the rows from rank 0 first. `recv_counts[r]` must be what rank r sends here.
        """
        self._check(tensor, "all_to_all", min_dim=1)
        if len(send_counts) != self.size or len(recv_counts) != self.size:
            found = f"{len(send_counts)} and {len(recv_counts)} counts"
            raise self._misuse("all_to_all", found, f"{self.size} of each")
        if sum(send_counts) != tensor.shape[0] or min(*send_counts, *recv_counts) < 0:
            found = f"send_counts {list(send_counts)} for {tensor.shape[0]} rows"
            raise self._misuse("all_to_all", found, "counts that add up to the rows")
        return self._all_to_all(tensor, list(send_counts), list(recv_counts), label)

    @abstractmethod
    def barrier(self) -> None:
        """Return when all ranks have called it."""

    # -- point to point ----------------------------------------------------------------------------------------------

    def send(self, tensor: torch.Tensor, peer: int, *, label: str = "") -> Handle:
        """Send `tensor` to rank `peer`, which must post a `recv` of the same shape and dtype. Result: None."""
        self._check(tensor, "send")
        self._check_peer(peer, "send")
        return self._send(tensor, peer, label)

    def recv(self, tensor: torch.Tensor, peer: int, *, label: str = "") -> Handle:
        """Receive from rank `peer` into `tensor`, which fixes shape and dtype. Result: the same tensor."""
        self._check(tensor, "recv")
        self._check_peer(peer, "recv")
        return self._recv(tensor, peer, label)

    @contextlib.contextmanager
    def group(self) -> Iterator[None]:
        """Transfers issued inside start together when it ends (NCCL's group call): the way to exchange with a peer.

        Their handles may be waited for only after the group has ended.
        """
        yield

    # -- life ---------------------------------------------------------------------------------------------------------

    def warmup(self, *, link: bool = False) -> None:
        """Connect everything that the first real transfer would otherwise connect: every verb towards every rank. Collective.

        Args:
            link: two ranks of which 0 only sends to 1.
        """
        self.barrier()

    def reserve(self, num_bytes: int) -> None:
        """Set aside memory for `memory`, for tensors of at most `num_bytes`. Collective. Does nothing where memory is all alike."""

    def memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """Memory that `all_reduce` works on without a copy, for a result that is reduced next; None where there is none to spare.

        It is given away again some calls after the handle of its reduction was waited for: use the sum at once.
        """
        return None

    def check(self) -> None:
        """Raise CommunicationError if a transfer has failed in the background. Never blocks."""

    def abort(self) -> None:
        """Give up whatever is in flight, after a failure. Not collective."""

    def close(self) -> None:
        """Finish what is in flight and release what the communicator holds. Collective. Closing again does nothing."""

    # -- for implementations: arguments have been checked --------------------------------------------------------------

    @abstractmethod
    def _all_reduce(self, tensor: torch.Tensor, op: str, label: str) -> Handle: ...

    @abstractmethod
    def _all_gather(self, tensor: torch.Tensor, label: str) -> Handle: ...

    @abstractmethod
    def _reduce_scatter(self, tensor: torch.Tensor, label: str) -> Handle: ...

    @abstractmethod
    def _broadcast(self, tensor: torch.Tensor, root: int, label: str) -> Handle: ...

    @abstractmethod
    def _all_to_all(
        self, tensor: torch.Tensor, send_counts: list[int], recv_counts: list[int], label: str
    ) -> Handle: ...

    @abstractmethod
    def _send(self, tensor: torch.Tensor, peer: int, label: str) -> Handle: ...

    @abstractmethod
    def _recv(self, tensor: torch.Tensor, peer: int, label: str) -> Handle: ...

    # -- checks -------------------------------------------------------------------------------------------------------

    def _check(self, tensor: torch.Tensor, verb: str, min_dim: int = 0) -> None:
        if not isinstance(tensor, torch.Tensor):
            raise self._misuse(verb, f"a {type(tensor).__name__}", "a torch tensor")
        if tensor.dtype not in DTYPES:
            raise self._misuse(verb, str(tensor.dtype), ", ".join(str(d).removeprefix("torch.") for d in DTYPES))
        if tensor.device.type != self.device.type or (
            self.device.index is not None and tensor.device.index != self.device.index
        ):
            raise self._misuse(verb, f"a tensor on {tensor.device}", f"a tensor on {self.device}")
        if not tensor.is_contiguous():
            raise self._misuse(verb, f"strides {tensor.stride()} of shape {tuple(tensor.shape)}", "a contiguous tensor")
        if tensor.dim() < min_dim:
            raise self._misuse(verb, f"shape {tuple(tensor.shape)}", f"at least {min_dim} dim")

    def _check_peer(self, peer: int, verb: str) -> None:
        if not 0 <= peer < self.size:
            raise self._misuse(verb, f"rank {peer}", f"a rank from 0 to {self.size - 1}")

    def _misuse(self, verb: str, found: str, wanted: str) -> CommunicationError:
        return CommunicationError(
            f"{verb} on communicator {self.name!r} (rank {self.rank} of {self.size})", found=found, fix=f"give {wanted}"
        )
