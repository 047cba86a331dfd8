"""Who has which tokens and which experts: cases for ExpertDispatch, in one process and on real ranks."""

from __future__ import annotations

import dataclasses

import torch

from hpcinfer.comm.communicator import Communicator
from hpcinfer.parallel.expert import ExpertDispatch, expert_range
from hpcinfer.parallel.segments import Segments

WIDTH = 6
CASES = {
    "one rank": {"rows": (5,), "num_experts": 3},
    "even": {"rows": (4, 4), "num_experts": 4},
    "a rank without tokens": {"rows": (5, 0, 3), "num_experts": 6},
    "one rank has all tokens": {"rows": (0, 9, 0, 0), "num_experts": 8},
    "no tokens at all": {"rows": (0, 0, 0), "num_experts": 3},
    "7 experts on 4 ranks": {"rows": (3, 1, 6, 2), "num_experts": 7},
    "5 experts on 4 ranks: the last has none": {"rows": (3, 1, 6, 2), "num_experts": 5},
    "fewer experts than ranks": {"rows": (2, 3, 1, 4), "num_experts": 2, "per_token": 1},
    "all to one expert": {"rows": (7, 2, 5), "num_experts": 6, "per_token": 1, "only": 4},
    "all to the experts of one rank": {"rows": (7, 0, 5), "num_experts": 6, "only": 2},
}


@dataclasses.dataclass
class Tokens:
    """Random tokens of every rank, the same in every process, and experts that are plain matrices."""

    rows: tuple[int, ...]
    num_experts: int
    per_token: int = 2
    only: int | None = None
    """All tokens go to the experts from this one on."""
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(sum(self.rows) + self.num_experts)
        total = sum(self.rows)
        self.matrices = torch.randn(self.num_experts, WIDTH, WIDTH, generator=generator)
        self.x = torch.randn(total, WIDTH, generator=generator).to(self.dtype)
        order = torch.rand(total, self.num_experts, generator=generator).argsort(dim=1)
        self.ids = order[:, : self.per_token].contiguous()
        if self.only is not None:
            self.ids = torch.arange(self.only, self.only + self.per_token).repeat(total, 1)
        self.weights = 0.5 + torch.rand(total, self.per_token, generator=generator)

    @property
    def size(self) -> int:
        return len(self.rows)

    def forward(self, ep: Communicator, *, gathered: bool) -> Segments:
        """The dispatch of rank `ep.rank`."""
        held = range(*expert_range(self.num_experts, self.size, ep.rank))
        dispatch = ExpertDispatch(ep, num_experts=self.num_experts, label="experts")
        x, ids, weights = (t.split(self.rows)[ep.rank] for t in (self.x, self.ids, self.weights))

        def compute(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return self._sum(x, ids, weights, held)

        return dispatch.forward(x, ids, weights, compute, rows=self.rows, gathered=gathered)

    def check(self, rank: int, got: torch.Tensor) -> None:
        """Compare a rank's result with the sum over all experts, which is never zero where there are tokens."""
        x, ids, weights = (t.split(self.rows)[rank] for t in (self.x, self.ids, self.weights))
        wanted = self._sum(x.float(), ids, weights, range(self.num_experts))
        assert got.dtype == self.dtype and got.shape == (self.rows[rank], WIDTH)
        assert not len(wanted) or wanted.abs().amax(dim=1).min() > 0.1
        atol = 1e-5 if self.dtype == torch.float32 else 0.1
        torch.testing.assert_close(got.float(), wanted, rtol=0, atol=atol)

    def _sum(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, held: range) -> torch.Tensor:
        total = torch.zeros(x.shape)
        for token in range(len(x)):
            for slot, expert in enumerate(ids[token].tolist()):
                if expert in held:
                    total[token] += weights[token, slot] * (x[token].float() @ self.matrices[expert])
        return total.to(x.dtype)
