"""The rotary position embedding of a model, as plain numbers."""

from __future__ import annotations

import dataclasses

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021) and how it is stretched to longer contexts."""

    theta: float = 10000.0
    """Base of the geometric series of wavelengths."""
    type: str = "default"
    """default, linear (positions divided by `factor`), llama3 (Llama 3.1's smooth division of long wavelengths) or yarn
    (Peng et al. 2023)."""
    factor: float = 1.0
    """Stretch of the context; unused by default."""
    original_max_position_embeddings: int = 0
    """Context of the pretraining; used by llama3 and yarn."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original / low_freq_factor are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original / high_freq_factor stay as they are."""
    beta_fast: float = 32.0
    """yarn: dims with more rotations than this over the original context stay as they are."""
    beta_slow: float = 1.0
    """yarn: dims with fewer rotations than this are divided by `factor`."""
    truncate: bool = True
    """yarn: round the two bounds outwards to whole dims."""
    attention_factor: float = 1.0
    """yarn: multiplies cos and sin (it stands for a temperature of the attention)."""
