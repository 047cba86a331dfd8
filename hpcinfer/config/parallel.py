"""The parallel layout a job asks for, and whether a model fits it."""

from __future__ import annotations

import dataclasses

from hpcinfer.config.model import ModelConfig
from hpcinfer.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """The `[parallel]` section. World size = dp x pp x sp x tp."""

    tp: int = 1
    """Tensor parallel ranks: each layer's heads and MLP columns are split over them. Default 1."""
    pp: int = 1
    """Pipeline stages: the layers are split over them. Default 1."""
    dp: int = 0
    """Replicas, each a whole model. Default 0: as many as the ranks allow."""
    layer_split: tuple[int, ...] = ()
    """Layers of each stage, first to last. Default (): split by cost, the head counted."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_split", tuple(self.layer_split))
        for name, least in (("tp", 1), ("pp", 1), ("dp", 0)):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"parallel.{name} = {value}", fix=f"give {least} or more")
        if self.layer_split and (len(self.layer_split) != self.pp or min(self.layer_split) < 1):
            raise ConfigError(
                f"parallel.layer_split = {list(self.layer_split)} for {self.pp} stages",
                fix=f"give {self.pp} numbers of at least one layer each",
            )

    @property
    def replica_size(self) -> int:
        """Ranks of one replica."""
        return self.pp * self.tp


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
