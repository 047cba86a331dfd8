"""The layouts that parity is shown in, and which of them a checkpoint runs through.

Each has its number of ranks and the `[parallel]` settings; where it says so also whether decode steps are captured,
`[engine]` settings, pages a lane, and the counters that must be above zero in place of chunked prefills and preemptions.
"""

from __future__ import annotations

ON = {"two_batch": "2"}
"""Two-batch overlap from two tokens on: every step that can be divided is."""
OFF = {"two_batch": "off"}
LANES = {"sp_min_tokens": 12, **OFF}
"""Prompts of 12 tokens and more are spread over the lanes; the shorter ones of the rows are not."""
AHEAD = {"engine": {"run_ahead": "on"}, "counters": ("chunked_prefills", "preemptions", "tokens_ahead")}
"""Each step is queued before the tokens of the one before it are known."""
CAPTURED = {"captured": True}
"""Decode steps are captured and replayed, padded to the next bucket."""
FEW = 16
"""Pages a lane where several lanes share the rows: one sequence of 49 tokens takes 13, and max_context 16."""

DENSE = {
    "tp1": {"ranks": 1, "layout": OFF},
    "tp2": {"ranks": 2, "layout": {"tp": 2, **OFF}},
    "pp2": {"ranks": 2, "layout": {"pp": 2, **OFF}},
    "pp3": {"ranks": 3, "layout": {"pp": 3, **OFF}},
    "dp2": {"ranks": 2, "layout": OFF},
    "tp2 x pp2": {"ranks": 4, "layout": {"tp": 2, "pp": 2, **OFF}},
    "dp2 x tp2": {"ranks": 4, "layout": {"tp": 2, **OFF}},
    "tp2, two-batch": {"ranks": 2, "layout": {"tp": 2, **ON}},
    "tp2, sequence form": {"ranks": 2, "layout": {"tp": 2, "sequence_form": True, **OFF}},
    "tp3": {"ranks": 3, "layout": {"tp": 3, **OFF}},
    "tp4, sequence form, two-batch": {"ranks": 4, "layout": {"tp": 4, "sequence_form": True, **ON}},
    "pp2, 3 microbatches": {"ranks": 2, "layout": {"pp": 2, "microbatches": 3, **OFF}},
    "tp2 x pp2, sequence form, two-batch": {"ranks": 4, "layout": {"tp": 2, "pp": 2, "sequence_form": True, **ON}},
    "pp2, 1 microbatch, batch of 1": {
        "ranks": 2, "layout": {"pp": 2, "microbatches": 1, **OFF}, "engine": {"max_sequences": 1}, "counters": ("chunked_prefills",),
    },
    "tp2 x pp2, all rows in one batch": {
        "ranks": 4, "layout": {"tp": 2, "pp": 2, **ON}, "num_blocks": 200,
        "engine": {"max_sequences": 64, "max_batch_tokens": 512}, "counters": (),
    },
    "tp2, two-batch, batch of 5": {"ranks": 2, "layout": {"tp": 2, **ON}, "engine": {"max_sequences": 5}},
    "tp1, run ahead": {"ranks": 1, "layout": OFF, **AHEAD},
    "tp2, run ahead, two-batch": {"ranks": 2, "layout": {"tp": 2, **ON}, **AHEAD},
    "sp2 x tp2, run ahead": {"ranks": 4, "layout": {"sp": 2, "tp": 2, **LANES}, "num_blocks": FEW, **AHEAD},
    "tp2, captured": {"ranks": 2, "layout": {"tp": 2, **OFF}, **CAPTURED},
    "tp2, captured, two-batch, run ahead": {"ranks": 2, "layout": {"tp": 2, **ON}, **AHEAD, **CAPTURED},
    "tp2 x pp2, captured": {"ranks": 4, "layout": {"tp": 2, "pp": 2, **OFF}, **CAPTURED},
    "tp2, sequence form, captured": {"ranks": 2, "layout": {"tp": 2, "sequence_form": True, **OFF}, **CAPTURED},
    "sp2, captured": {"ranks": 2, "layout": {"sp": 2, **LANES}, "num_blocks": FEW, **CAPTURED},
    "sp2": {"ranks": 2, "layout": {"sp": 2, **LANES}, "num_blocks": FEW},
    "sp3": {"ranks": 3, "layout": {"sp": 3, **LANES}, "num_blocks": FEW, "counters": ("chunked_prefills",)},
    "sp2 x tp2, two-batch": {"ranks": 4, "layout": {"sp": 2, "tp": 2, **LANES, **ON}, "num_blocks": FEW},
    "pp2 x sp2": {"ranks": 4, "layout": {"pp": 2, "sp": 2, **LANES}, "num_blocks": FEW},
    "pp2 x sp2 x tp2, sequence form": {
        "ranks": 8, "layout": {"pp": 2, "sp": 2, "tp": 2, "sequence_form": True, **LANES}, "num_blocks": FEW,
    },
    "dp2 x sp2 x tp2": {"ranks": 8, "layout": {"sp": 2, "tp": 2, **LANES}, "num_blocks": FEW, "counters": ("chunked_prefills",)},
}
EXPERTS = {
    "tp2 ep2": {"ranks": 2, "layout": {"tp": 2, "ep": 2, **OFF}},
    "tp2 ep2, sequence form, two-batch": {"ranks": 2, "layout": {"tp": 2, "ep": 2, "sequence_form": True, **ON}},
    "tp2 x pp2 ep2": {"ranks": 4, "layout": {"tp": 2, "pp": 2, "ep": 2, **OFF}},
    "sp2 ep2": {"ranks": 2, "layout": {"sp": 2, "ep": 2, **LANES}, "num_blocks": FEW},
    "sp2 ep1": {"ranks": 2, "layout": {"sp": 2, **LANES}, "num_blocks": FEW},
    "sp2 x tp2 ep2": {"ranks": 4, "layout": {"sp": 2, "tp": 2, "ep": 2, **LANES}, "num_blocks": FEW},
    "sp2 x tp2 ep4": {"ranks": 4, "layout": {"sp": 2, "tp": 2, "ep": 4, **LANES}, "num_blocks": FEW},
    "sp2 x tp2 ep4, sequence form, two-batch": {
        "ranks": 4, "layout": {"sp": 2, "tp": 2, "ep": 4, "sequence_form": True, **LANES, **ON}, "num_blocks": FEW,
    },
    "sp3 ep3, two-batch": {
        "ranks": 3, "layout": {"sp": 3, "ep": 3, **LANES, **ON}, "num_blocks": FEW, "counters": ("chunked_prefills",),
    },
    "sp2 x tp2 ep4, captured, run ahead": {
        "ranks": 4, "layout": {"sp": 2, "tp": 2, "ep": 4, **LANES}, "num_blocks": FEW, **AHEAD, **CAPTURED,
    },
    "tp2 ep2, captured, two-batch": {"ranks": 2, "layout": {"tp": 2, "ep": 2, **ON}, **CAPTURED},
    "sp2 x tp2 ep4, run ahead": {"ranks": 4, "layout": {"sp": 2, "tp": 2, "ep": 4, **LANES}, "num_blocks": FEW, **AHEAD},
    "pp2 x sp2 x tp2 ep4": {
        "ranks": 8, "layout": {"pp": 2, "sp": 2, "tp": 2, "ep": 4, **LANES}, "num_blocks": FEW,
    },
    "pp2 x sp2 ep2, two-batch": {
        "ranks": 4, "layout": {"pp": 2, "sp": 2, "ep": 2, **LANES, **ON}, "num_blocks": FEW,
    },
    "dp2 x sp2 x tp2 ep4": {
        "ranks": 8, "layout": {"sp": 2, "tp": 2, "ep": 4, **LANES}, "num_blocks": FEW, "counters": ("chunked_prefills",),
    },
}
LAYOUTS = {**DENSE, **EXPERTS}

_CORE = ("tp1", "tp2", "pp2", "tp2 x pp2", "tp2, two-batch", "tp2, sequence form", "sp2", "sp2 x tp2, two-batch")
_EXPERT_CORE = (
    "tp1", "tp2", "pp2", "tp2 ep2", "tp2 ep2, sequence form, two-batch", "sp2 ep2", "sp2 x tp2 ep4",
    "sp2 x tp2 ep4, sequence form, two-batch",
)
_EXPERT_FAMILIES = ("mixtral", "qwen3-moe", "gpt-oss")


def layouts_of(variant: str) -> tuple[str, ...]:
    """The layouts that a checkpoint of `tests.checkpoints.VARIANTS` runs through: all for one of each kind, else the core."""
    if variant == "llama":
        return tuple(name for name in DENSE if name != "tp3")  # its 4 heads do not divide by 3
    if variant == "mixtral":
        return ("tp1", "tp2", "pp2", "tp2 x pp2", "tp2, two-batch", *EXPERTS)
    if variant.startswith(_EXPERT_FAMILIES):
        return _EXPERT_CORE
    return (*_CORE, "tp3") if variant.startswith("gpt2") else _CORE
