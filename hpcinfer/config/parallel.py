"""The parallel layout a job asks for, and whether a model fits it."""

from __future__ import annotations

import dataclasses
import re

from hpcinfer.config.model import ModelConfig
from hpcinfer.errors import ConfigError


SEQUENCE_PHASES = ("prefill",)
MOST_IN_FLIGHT = 16
"""Steps in flight for each stage, at most: a page that was freed rests for as many ticks."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """The `[parallel]` section. World size = dp x pp x sp x tp."""

    tp: int = 1
    """Tensor parallel ranks: each layer's heads and MLP columns are split over them. Default 1."""
    pp: int = 1
    """Pipeline stages: the layers are split over them. Default 1."""
    sp: int = 1
    """Sequence parallel lanes: in prefill a long prompt's tokens are split over them, in decode each lane has sequences of its
    own. Weights are replicated over lanes. For long prompts, and to spread experts wide (ep = sp * tp). Default 1."""
    ep: int = 1
    """Ranks of a stage over which experts are spread: 1 (each expert is split over tp like any MLP), tp, or sp * tp. Only for
    mixtures of experts. Default 1."""
    dp: int = 0
    """Replicas, each a whole model. Default 0: as many as the ranks allow."""
    layer_split: tuple[int, ...] = ()
    """Layers of each stage, first to last. Default (): split by cost, embedding and head counted."""
    microbatches: int = 0
    """Steps in flight at once. More than pp hides the transfers between stages, at the price of smaller steps. Default 0: pp."""
    sequence_form: bool = False
    """Tensor parallel ranks keep the residual stream in token shards: reduce-scatter and all-gather instead of all-reduce, norms
    computed once, pp sends 1/tp of the activations. The same numbers. Default false."""
    two_batch: str = "auto"
    """Two-batch overlap: a step with at least this many tokens is divided in two, and one half's transfers run while the other
    computes. A number of tokens, "off", or "auto": measured at the start, on where it gains. Default "auto"."""
    sp_min_tokens: int = 512
    """Prompts shorter than this are prefilled by one lane alone. Default 512."""
    sp_phase: str = "prefill"
    """The phase that lanes split a sequence in: "prefill", the only one there is."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_split", tuple(self.layer_split))
        object.__setattr__(self, "two_batch", str(self.two_batch))
        for name, least in (
            ("tp", 1), ("pp", 1), ("sp", 1), ("ep", 1), ("dp", 0), ("microbatches", 0), ("sp_min_tokens", 1),
        ):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"parallel.{name} = {value}", fix=f"give {least} or more")
        if self.layer_split and (len(self.layer_split) != self.pp or min(self.layer_split) < 1):
            raise ConfigError(
                f"parallel.layer_split = {list(self.layer_split)} for {self.pp} stages",
                fix=f"give {self.pp} numbers of at least one layer each",
            )
        check_ep(self.ep, sp=self.sp, tp=self.tp)
        if self.microbatches > MOST_IN_FLIGHT * self.pp:
            raise ConfigError(
                f"parallel.microbatches = {self.microbatches} with {self.pp} stages",
                fix=f"give at most {MOST_IN_FLIGHT * self.pp}; two or three a stage hide the transfers between stages",
            )
        if self.sequence_form and self.tp == 1:
            raise ConfigError(
                "parallel.sequence_form without tensor parallelism", found="parallel.tp = 1",
                fix="set parallel.tp to 2 or more, or leave sequence_form out",
            )
        if self.sp_phase not in SEQUENCE_PHASES:
            raise ConfigError(
                f"parallel.sp_phase = {self.sp_phase!r}: sequence parallelism splits prompts in prefill only",
                found="a decode has one token a sequence, so there is nothing to split; gathering its keys and values from "
                "other lanes would put a transfer into every layer of every token",
                fix='leave sp_phase at "prefill": in decode every lane works on sequences of its own',
            )
        if not re.fullmatch(r"auto|off|[0-9]{1,9}", self.two_batch):
            raise ConfigError(
                f"parallel.two_batch = {self.two_batch!r}", fix='give "auto", "off" or the smallest number of tokens'
            )

    @property
    def replica_size(self) -> int:
        """Ranks of one replica."""
        return self.pp * self.sp * self.tp

    @property
    def replica_layout(self) -> str:
        """The sizes of a replica, in words."""
        return f"pp {self.pp} x sp {self.sp} x tp {self.tp}, ep {self.ep}"

    @property
    def num_in_flight(self) -> int:
        """Steps in flight at once: tick n uses the results up to tick n minus this."""
        return self.microbatches or self.pp


def check_ep(ep: int, *, sp: int, tp: int) -> None:
    """Raise ConfigError unless experts can be spread over `ep` ranks of a stage of sp * tp."""
    if ep not in (allowed := sorted({1, tp, sp * tp})):
        raise ConfigError(
            f"parallel.ep = {ep} with sp = {sp} and tp = {tp}",
            fix=f"ep must be 1, tp or sp * tp: one of {', '.join(map(str, allowed))}",
        )


def check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raise ConfigError, with the nearest valid choice, where the model cannot be split as asked."""
    model.check_tp(parallel.tp)
    if parallel.pp > model.num_layers:
        raise ConfigError(
            f"parallel.pp = {parallel.pp} asks for more stages than there are layers",
            found=f"{model.num_layers} layers",
            fix=f"set parallel.pp = {model.num_layers} or less",
        )
    if parallel.layer_split and sum(parallel.layer_split) != model.num_layers:
        raise ConfigError(
            f"parallel.layer_split = {list(parallel.layer_split)} does not add up to the layers",
            found=f"{sum(parallel.layer_split)} in the split, {model.num_layers} in the model",
            fix="leave layer_split out to split by cost",
        )
    if parallel.ep > 1 and not model.num_experts:
        raise ConfigError(
            f"parallel.ep = {parallel.ep} for a model without experts", found=model.family, fix="set parallel.ep = 1"
        )
    if parallel.ep > max(model.num_experts, 1):
        raise ConfigError(
            f"parallel.ep = {parallel.ep} leaves ranks without an expert", found=f"{model.num_experts} experts",
            fix=f"set parallel.ep = {parallel.tp if 1 < parallel.tp <= model.num_experts else 1}, or lower parallel.tp or sp",
        )
