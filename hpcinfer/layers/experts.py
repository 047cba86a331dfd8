"""The experts that a rank holds: gated MLPs, computed for the tokens that are sent to them.

Shape letters: T tokens, D model, k experts of a token, E experts of the model, L of them on this rank, I intermediate size
of an expert on this rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hpcinfer.config.model import ModelConfig
from hpcinfer.errors import ConfigError
from hpcinfer.kernels.experts import ExpertWeights, expert_outputs
from hpcinfer.kernels.gate import Gate
from hpcinfer.kernels.mxfp4 import BLOCK_BYTES, BLOCK_VALUES
from hpcinfer.layers.shard import check_shape, copy_shard, part_range, part_size
from hpcinfer.parallel.expert import expert_range


class Experts:
    """Some whole experts, or a slice of the intermediate dim of all of them.

    Args:
        config: sizes, biases, activation.
        ranks, rank: over how many ranks the experts are spread, and which of them this is; it holds
            expert_range(E, ranks, rank), which may be none.
        slices, slice_rank: over how many ranks each expert's intermediate dim is split, and which part is here. The
            bias of the down projection is on slice 0 alone, so that the sum over slices has it once.
        dtype, device: of the weights.

    Raises:
        ConfigError: experts are to stay packed, and are split or not packed in the checkpoint.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        ranks: int,
        rank: int,
        slices: int,
        slice_rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.first, end = expert_range(config.num_experts, ranks, rank)
        self.num_local = end - self.first
        """L."""
        self.size = part_size(config.expert_size, slices)
        """I, padding included."""
        self.dtype = dtype
        self._whole = (config.num_experts, config.expert_size, config.hidden_size)
        self._columns = part_range(config.expert_size, slices, slice_rank)

        def zeros(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
            return torch.zeros(self.num_local, *shape, dtype=of, device=device)

        hidden = config.hidden_size
        self.gate_up = self.down = self.packed = None
        if config.packed_experts:
            check_packed(config, slices)
            self.packed = {
                "gate_up": _packed_zeros(zeros, 2 * self.size, hidden), "down": _packed_zeros(zeros, hidden, self.size)
            }
            """Of both projections: blocks uint8 [L, rows, columns / 32, 16], scales uint8 [L, rows, columns / 32]."""
        else:
            self.gate_up = zeros(2 * self.size, hidden)
            """[L, 2I, D]: gate, then up."""
            self.down = zeros(hidden, self.size)
            """[L, D, I]."""
        self.gate_up_bias = zeros(2 * self.size) if config.expert_bias else None
        self.down_bias = zeros(hidden) if config.expert_bias and slice_rank == 0 else None
        self._weights = ExpertWeights(
            num_experts=config.num_experts, first=self.first, num_local=self.num_local, size=self.size, hidden=hidden,
            gate_up=self.gate_up if self.packed is None else self.packed["gate_up"],
            down=self.down if self.packed is None else self.packed["down"],
            gate_up_bias=self.gate_up_bias, down_bias=self.down_bias,
            gate=Gate(activation=config.hidden_act, limit=config.swiglu_limit),
        )

    # -- loading: `expert` is a number in the whole model, of one that is here ---------------------------------------

    @property
    def held(self) -> range:
        """Numbers of the experts that are here."""
        return range(self.first, self.first + self.num_local)

    def load_gate(self, full: torch.Tensor, expert: int) -> None:
        """Take this rank's rows of an expert's gate projection, whole [intermediate, D]."""
        self._load_input(full, expert, 0)

    def load_up(self, full: torch.Tensor, expert: int) -> None:
        """Take this rank's rows of an expert's up projection, whole [intermediate, D]."""
        self._load_input(full, expert, self.size)

    def load_down(self, full: torch.Tensor, expert: int) -> None:
        """Take this rank's columns of an expert's down projection, whole [D, intermediate]."""
        _, size, hidden = self._whole
        check_shape(full, (hidden, size), "expert weight")
        copy_shard(self.down[expert - self.first], full, 1, *self._columns)

    def load_biases(self, gate: torch.Tensor, up: torch.Tensor, expert: int) -> None:
        """Take an expert's gate and up biases, whole [intermediate] each."""
        for full, offset in ((gate, 0), (up, self.size)):
            check_shape(full, (self._whole[1],), "expert bias")
            copy_shard(self.gate_up_bias[expert - self.first].narrow(0, offset, self.size), full, 0, *self._columns)

    def load_down_bias(self, full: torch.Tensor, expert: int) -> None:
        """Take an expert's down bias [D] where it is kept; the other slices drop it."""
        check_shape(full, (self._whole[2],), "expert bias")
        if self.down_bias is not None:
            self.down_bias[expert - self.first].copy_(full)

    def load_packed(self, part: str, blocks: torch.Tensor, scales: torch.Tensor, expert: int) -> None:
        """Take an expert's blocks and scales of `part`: "gate_up" with gate's rows before up's, or "down"."""
        kept_blocks, kept_scales = self.packed[part]
        kept_blocks[expert - self.first].copy_(blocks)
        kept_scales[expert - self.first].copy_(scales)

    def _load_input(self, full: torch.Tensor, expert: int, offset: int) -> None:
        _, size, hidden = self._whole
        check_shape(full, (size, hidden), "expert weight")
        copy_shard(self.gate_up[expert - self.first].narrow(0, offset, self.size), full, 0, *self._columns)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the outputs of the experts that are here, zero for a token that is sent to none of them.

        Args:
            x: [T, D].
            ids: int64 [T, k], numbers in the whole model; a negative one is nobody.
            weights: float32 [T, k].

        Returns:
            [T, D] in x's dtype, summed in float32 and rounded once.
        """
        return expert_outputs(x, ids, weights, self._weights)


def _packed_zeros(zeros: Callable[..., torch.Tensor], rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    groups = columns // BLOCK_VALUES
    return zeros(rows, groups, BLOCK_BYTES, of=torch.uint8), zeros(rows, groups, of=torch.uint8)


def check_packed(config: ModelConfig, slices: int) -> None:
    """Raise ConfigError unless experts of which each is split over `slices` ranks can stay packed."""
    if config.expert_format != "mxfp4":
        raise ConfigError(
            'model.experts = "packed"', found=f"{config.family} with plain expert weights",
            fix='use a checkpoint with MXFP4 experts, or model.experts = "unpacked"',
        )
    if slices > 1:
        raise ConfigError(
            'model.experts = "packed" where each expert is split over ranks',
            found=f"tp = {slices} with ep = 1: a block of 32 values would be cut",
            fix=f'set parallel.ep = {slices} or parallel.tp = 1, or model.experts = "unpacked"',
        )
