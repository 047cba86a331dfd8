"""Which experts a token is sent to, and how much each one's output counts.

Shape letters: T tokens, D model, E experts of the model, k experts of a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hpcinfer.config.model import ModelConfig
from hpcinfer.kernels.routing import Choice, choose_experts
from hpcinfer.layers.shard import check_shape


class Router:
    """A linear layer over the experts and the choice of the k best. Replicated on all ranks.

    Args:
        config: sizes and the kind of router.
        rounded: weights are rounded to `dtype`, as most families of transformers do.
        dtype, device: of the matrix; softmax is float32.
    """

    def __init__(self, config: ModelConfig, *, rounded: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.num_experts = config.num_experts
        self.experts_per_token = config.experts_per_token
        self.weight = torch.zeros(config.num_experts, config.hidden_size, dtype=dtype, device=device)
        self.bias = torch.zeros(config.num_experts, dtype=dtype, device=device) if config.router_bias else None
        self._choice = Choice(
            num_chosen=config.experts_per_token, softmax_first=config.router == "softmax_topk",
            normalize=config.normalize_topk, rounded=rounded,
        )

    def load_weight(self, full: torch.Tensor) -> None:
        """Take the matrix [E, D]."""
        check_shape(full, tuple(self.weight.shape), "router weight")
        self.weight.copy_(full)

    def load_bias(self, full: torch.Tensor) -> None:
        """Take the bias [E]."""
        check_shape(full, tuple(self.bias.shape), "router bias")
        self.bias.copy_(full)

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, D] -> experts int64 [T, k] and their weights float32 [T, k] (float64 where x is).

        `valid`, bool [T], is False for tokens of padding, which are sent to nobody.
        """
        return choose_experts(F.linear(x, self.weight, self.bias), self._choice, valid)
