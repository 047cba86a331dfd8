"""What `bench overlap` measures: options, and for every scenario the variants that are compared. Torch-free."""

from __future__ import annotations

import dataclasses

from hpcinfer.config.model import ModelConfig
from hpcinfer.errors import UsageError

NUM_RANKS = 2
LAYOUTS = ("tp", "pp")
_DECODE_PROMPT_TOKENS = 16
_DECODE_BATCH_TOKENS = 1024
_TP_PROMPTS = 2
"""Prefill steps in a run of tp2, where one step does not influence the next."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OverlapOptions:
    """What is measured."""

    hidden: int = 2048
    """Hidden size of the random model."""
    layers: int = 4
    """Its layers, at least 2."""
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    prefill: str = "512"
    """Tokens of a prefill step, separated by commas."""
    sequences: int = 64
    """Sequences of a decode step."""
    microbatches: str = "1,2,4"
    """Steps in flight with pp2, separated by commas; the first is what the others are compared with."""
    output_tokens: int = 12
    """Tokens that every sequence decodes."""
    prompts: int = 8
    """Prefill steps in a run of pp2; filling the pipeline limits the gain to about 2 * prompts / (prompts + 1)."""
    repeats: int = 5
    """Repetitions after a warm-up, variants alternating; medians count."""
    layouts: str = "tp,pp"
    """Which layouts to measure."""
    link: str = "auto"
    """namespaces (rate-limited, needs root), loopback, or auto."""
    rate_gbit: float = 1.0
    """Rate of the link between namespaces, in Gbit/s each way."""
    out: str = ""
    """A file that gets the JSON object too."""
    trace: str = ""
    """A folder that gets records of the last run of every variant; `hpcinfer trace FOLDER --start NAME` reads them."""

    def __post_init__(self) -> None:
        for name in ("prefill", "microbatches"):
            if not all(word.isdecimal() and int(word) > 0 for word in getattr(self, name).split(",")):
                raise UsageError(f"--{name} {getattr(self, name)}", fix="give numbers separated by commas")
        for name, least in (
            ("hidden", 16), ("layers", 2), ("sequences", 2), ("output_tokens", 8), ("prompts", 1), ("repeats", 1),
        ):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}", fix=f"give {least} or more")
        if self.in_flight[0] != 1:
            raise UsageError(f"--microbatches {self.microbatches}", fix="begin with 1: the others are compared with it")
        if not set(self.layouts.split(",")) <= set(LAYOUTS):
            raise UsageError(f"--layouts {self.layouts}", fix=f"some of {', '.join(LAYOUTS)}, separated by commas")
        if self.rate_gbit <= 0:
            raise UsageError(f"--rate-gbit {self.rate_gbit:g}", fix="give a number above 0")

    @property
    def prefill_sizes(self) -> list[int]:
        return [int(word) for word in self.prefill.split(",")]

    @property
    def in_flight(self) -> list[int]:
        return [int(word) for word in self.microbatches.split(",")]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One setting of the scheduler, and the work that it is measured on."""

    name: str
    num_sequences: int
    lag: int = 1
    """Steps in flight."""
    two_batch_tokens: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """Variants that are compared with the first of them."""

    name: str
    layout: str
    prompt_tokens: int
    output_tokens: int
    """1 is prefill alone."""
    batch_tokens: int
    """Most tokens of a step."""
    variants: tuple[Variant, ...]


def scenarios(options: OverlapOptions) -> list[Scenario]:
    """Everything that is measured."""
    size, lags = options.sequences, options.in_flight
    decode = {
        "prompt_tokens": _DECODE_PROMPT_TOKENS, "output_tokens": options.output_tokens + 1,
        "batch_tokens": max(_DECODE_BATCH_TOKENS, size),
    }

    def prefill(layout: str, tokens: int, variants: list[Variant]) -> Scenario:
        return Scenario(
            name=f"{layout}2 prefill {tokens}", layout=layout, prompt_tokens=tokens, output_tokens=1,
            batch_tokens=tokens, variants=tuple(variants),
        )

    def two_batch(num_sequences: int) -> list[Variant]:
        return [
            Variant(name="off", num_sequences=num_sequences),
            Variant(name="two-batch", num_sequences=num_sequences, two_batch_tokens=2),
        ]

    found = [prefill("tp", tokens, two_batch(_TP_PROMPTS)) for tokens in options.prefill_sizes]
    found.append(Scenario(name=f"tp2 decode {size}", layout="tp", variants=tuple(two_batch(size)), **decode))
    chunks = [Variant(name=f"{lag} in flight", lag=lag, num_sequences=options.prompts) for lag in lags]
    found += [prefill("pp", tokens, chunks) for tokens in options.prefill_sizes]
    kept = [Variant(name=f"{lag} in flight", lag=lag, num_sequences=lag * size) for lag in lags]
    halves = [Variant(name=f"{lag} in flight", lag=lag, num_sequences=size) for lag in lags]
    halves += [Variant(name=f"t({size // lag})", num_sequences=size // lag) for lag in lags if 1 < lag <= size]
    found.append(Scenario(name=f"pp2 decode {size} each", layout="pp", variants=tuple(kept), **decode))
    found.append(Scenario(name=f"pp2 decode {size} divided", layout="pp", variants=tuple(halves), **decode))
    return [scenario for scenario in found if scenario.layout in options.layouts.split(",")]


def random_config(options: OverlapOptions) -> ModelConfig:
    """A Llama-like model: grouped heads of 128 (of 16 where it is tiny), an MLP of 2.75 times the hidden size."""
    head_dim = 128 if options.hidden >= 512 else 16
    heads = max(2 * NUM_RANKS, options.hidden // head_dim)
    return ModelConfig.from_dict({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 4096, "hidden_size": options.hidden,
        "intermediate_size": options.hidden * 11 // 4, "num_hidden_layers": options.layers,
        "num_attention_heads": heads, "num_key_value_heads": heads // 2, "head_dim": head_dim,
        "max_position_embeddings": 65536, "rope_theta": 1e4, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    })
