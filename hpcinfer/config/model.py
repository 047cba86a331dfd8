"""What a model is: the facts of a Hugging Face folder's config.json and generation_config.json, torch-free.

Read once by `ModelConfig.from_folder`; everything that later depends on the model (layers, memory arithmetic, planner)
takes a `ModelConfig` and never looks at the JSON again.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcinfer.errors import CheckpointError, ConfigError

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
DTYPES = ("float32", "bfloat16", "float16")


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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """One decoder-only language model. Sizes are those of the whole model, never of a shard."""

    family: str
    """The architecture name of config.json, for example LlamaForCausalLM."""
    vocab_size: int
    """V: rows of the embedding. The tokenizer may know fewer."""
    hidden_size: int
    """D: width of the residual stream."""
    intermediate_size: int
    """Width of the MLP."""
    num_layers: int
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key/value heads; divides num_heads (grouped-query attention)."""
    head_dim: int
    """H: width of a head; num_heads * head_dim need not be hidden_size."""
    rms_norm_eps: float = 1e-6
    rope: RopeConfig | None = RopeConfig()
    """None: the family has learned positions."""
    max_position_embeddings: int = 2048
    """Longest sequence, prompt and output together, in tokens."""
    tie_word_embeddings: bool = False
    """The head uses the embedding's weight."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each query and key head before the rotary embedding (Qwen3)."""
    sliding_window: tuple[int | None, ...] = ()
    """One entry a layer: query i sees keys j with i - window < j <= i, with None all j <= i. Empty: None everywhere."""
    hidden_act: str = "silu"
    """Activation of the gated MLP: silu, gelu, gelu_tanh or relu."""
    dtype: str = "float32"
    """What the checkpoint says its weights are: float32, bfloat16 or float16 (`dtype = "auto"` uses it)."""
    eos_token_ids: tuple[int, ...] = ()
    """Ids that end a generation: those of config.json and generation_config.json together."""
    bos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if not self.sliding_window:
            object.__setattr__(self, "sliding_window", (None,) * self.num_layers)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
                     "head_dim", "max_position_embeddings"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise CheckpointError(f"model config: {name} = {value!r}", fix="it must be a whole number of 1 or more")
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                "model config: query heads do not divide over key/value heads",
                found=f"{self.num_heads} query heads, {self.num_kv_heads} key/value heads",
                fix="num_attention_heads must be a multiple of num_key_value_heads",
            )
        if self.head_dim % 2:
            raise CheckpointError(f"model config: head_dim = {self.head_dim}", fix="rotary embedding needs an even one")
        if len(self.sliding_window) != self.num_layers:
            raise CheckpointError(
                "model config: sliding_window (layer_types) does not fit the layers",
                found=f"{len(self.sliding_window)} entries, {self.num_layers} layers",
            )
        if any(window is not None and window < 1 for window in self.sliding_window):
            raise CheckpointError(
                f"model config: sliding_window = {min(w for w in self.sliding_window if w is not None)}",
                fix="it must be 1 or more, or null",
            )
        _one_of("hidden_act", self.hidden_act, ACTIVATIONS)
        _one_of("rope type", self.rope.type, ROPE_TYPES)
        _one_of("dtype", self.dtype, DTYPES)

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Read config.json and, where there is one, generation_config.json of a Hugging Face folder.

        Raises:
            CheckpointError: no such folder or file, not JSON, or a feature that is not supported (named).
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(
                f"no model folder {str(folder)!r}", fix="give a Hugging Face folder with a config.json in it"
            )
        raw = _read_json(folder / "config.json")
        generation_file = folder / "generation_config.json"
        generation = _read_json(generation_file) if generation_file.exists() else {}
        return cls.from_dict(raw, generation, source=str(folder / "config.json"))

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None, *, source: str = "config.json"
    ) -> ModelConfig:
        """Make a config from the contents of config.json and generation_config.json.

        Args:
            source: named in errors.

        Raises:
            CheckpointError: a key is missing or a feature is not supported.
        """
        generation = generation or {}
        family = _family(raw, source)
        quantization = raw.get("quantization_config")
        if quantization:
            method = quantization.get("quant_method", "unnamed") if isinstance(quantization, Mapping) else quantization
            raise CheckpointError(
                f"{source}: quantization_config is not supported", found=f"quant_method {method!r}",
                fix="use the checkpoint in float32, bfloat16 or float16",
            )
        try:
            return _read_decoder(family, raw, generation)
        except KeyError as error:
            raise CheckpointError(f"{source}: the key {error.args[0]!r} is missing") from None
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {error.problem}", found=error.found, fix=error.fix) from None
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{source}: a value is not what it should be", found=str(error)) from None

    def check_tp(self, tp: int) -> None:
        """Raise ConfigError unless the heads can be split over `tp` ranks. Other sizes are padded and always fit."""
        heads_per_rank(self.num_heads, self.num_kv_heads, tp)


def heads_per_rank(num_heads: int, num_kv_heads: int, tp: int) -> tuple[int, int]:
    """Query and key/value heads that each of `tp` ranks holds.

    Query heads are split evenly. Key/value heads are split evenly too or, where there are more ranks than heads, each
    head is kept by tp / num_kv_heads neighbouring ranks.

    Raises:
        ConfigError: they do not divide; names the valid sizes nearest to `tp`.
    """
    if _heads_fit(num_heads, num_kv_heads, tp):
        return num_heads // tp, max(num_kv_heads // tp, 1)
    valid = [n for n in range(1, num_heads + 1) if _heads_fit(num_heads, num_kv_heads, n)]
    below = max((n for n in valid if n < tp), default=None)
    above = min((n for n in valid if n > tp), default=None)
    nearest = " or ".join(str(n) for n in (below, above) if n is not None)
    raise ConfigError(
        f"tp = {tp} does not divide the attention heads",
        found=f"{num_heads} query heads, {num_kv_heads} key/value heads",
        fix=f"nearest valid tp: {nearest} (all: {', '.join(map(str, valid))})",
    )


def _heads_fit(num_heads: int, num_kv_heads: int, tp: int) -> bool:
    return tp >= 1 and num_heads % tp == 0 and (num_kv_heads % tp == 0 or tp % num_kv_heads == 0)


# -- reading ---------------------------------------------------------------------------------------------------------

_FAMILY_OF_MODEL_TYPE = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
}
FAMILIES = tuple(_FAMILY_OF_MODEL_TYPE.values())

_ACTIVATION_NAMES = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh",
}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no {path.name} in {str(path.parent)!r}", fix="give a Hugging Face folder") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}", found=str(error)) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"cannot read {path}", found=f"a JSON {type(content).__name__}, not an object")
    return content


def _family(raw: Mapping[str, Any], source: str) -> str:
    names = list(raw.get("architectures") or [])
    if not names and raw.get("model_type") in _FAMILY_OF_MODEL_TYPE:
        names = [_FAMILY_OF_MODEL_TYPE[raw["model_type"]]]
    for name in names:
        if name in FAMILIES:
            return name
    raise CheckpointError(
        f"{source}: the architecture is not supported",
        found=", ".join(map(str, names)) or f"no architectures, model_type {raw.get('model_type')!r}",
        fix=f"supported: {', '.join(FAMILIES)}",
    )


_DEFAULT_CONTEXT = {
    "LlamaForCausalLM": 2048, "MistralForCausalLM": 131072, "Qwen2ForCausalLM": 32768, "Qwen3ForCausalLM": 32768,
}
_DEFAULT_KV_HEADS = {"MistralForCausalLM": 8, "Qwen2ForCausalLM": 32, "Qwen3ForCausalLM": 32}


def _read_decoder(family: str, raw: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
    """The Llama family. Defaults for missing keys are those of the transformers config class of the family."""
    num_heads = raw["num_attention_heads"]
    attention_bias = bool(raw.get("attention_bias", False))
    default_head_dim = 128 if family == "Qwen3ForCausalLM" else raw["hidden_size"] // num_heads
    activation = raw.get("hidden_act", "silu")
    return ModelConfig(
        family=family,
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=raw.get("num_key_value_heads", _DEFAULT_KV_HEADS.get(family)) or num_heads,
        head_dim=raw.get("head_dim") or default_head_dim,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope=_read_rope(raw),
        max_position_embeddings=raw.get("max_position_embeddings", _DEFAULT_CONTEXT[family]),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        # Which projections have biases is fixed in the code of Mistral and Qwen2 and a setting in Llama and Qwen3.
        qkv_bias={"MistralForCausalLM": False, "Qwen2ForCausalLM": True}.get(family, attention_bias),
        o_bias={"MistralForCausalLM": False, "Qwen2ForCausalLM": False}.get(family, attention_bias),
        mlp_bias=family == "LlamaForCausalLM" and bool(raw.get("mlp_bias", False)),
        qk_norm=family == "Qwen3ForCausalLM",
        sliding_window=_read_windows(family, raw),
        hidden_act=_ACTIVATION_NAMES.get(activation, activation),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
        eos_token_ids=_ids(raw.get("eos_token_id"), generation.get("eos_token_id")),
        bos_token_id=_first_id(generation.get("bos_token_id", raw.get("bos_token_id"))),
        pad_token_id=_first_id(generation.get("pad_token_id", raw.get("pad_token_id"))),
    )


def _read_windows(family: str, raw: Mapping[str, Any]) -> tuple[int | None, ...]:
    """One window a layer, by the rules of the transformers config classes."""
    num_layers, window = raw["num_hidden_layers"], raw.get("sliding_window", 4096)
    types = raw.get("layer_types")
    is_mistral = family == "MistralForCausalLM"
    if window is None or not (is_mistral or (family.startswith("Qwen") and raw.get("use_sliding_window", False))):
        return (None,) * num_layers
    if types is None and is_mistral:
        return (window,) * num_layers
    if types is None:
        first = raw.get("max_window_layers", 28)
        return tuple(window if i >= first else None for i in range(num_layers))
    known = {"sliding_attention": window, "full_attention": None}
    for name in types:
        _one_of("layer_types entry", name, tuple(known))
    return tuple(known[name] for name in types)


def _read_rope(raw: Mapping[str, Any]) -> RopeConfig:
    """transformers 5 writes `rope_parameters`; older folders have `rope_theta` beside `rope_scaling`."""
    # A folder that has both was given scaling by hand: transformers then takes that alone.
    values = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    if any(isinstance(value, Mapping) for value in values.values()):
        raise CheckpointError("rope parameters that differ by layer type are not supported", found=", ".join(values))
    kind = values.get("rope_type") or values.get("type") or "default"
    _one_of("rope type", kind, ROPE_TYPES)
    partial = values.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise CheckpointError(f"partial_rotary_factor = {partial} is not supported", fix="only 1.0 is")
    original = values.get("original_max_position_embeddings") or raw.get("max_position_embeddings", 2048)
    factor = values["factor"] if kind in ("linear", "llama3") else values.get("factor")
    if kind == "yarn" and factor is None:
        factor = raw["max_position_embeddings"] / original
    fields = {
        name: float(values[name])
        for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow") if values.get(name) is not None
    }
    return RopeConfig(
        theta=float(values.get("rope_theta") or raw.get("rope_theta") or 10000.0),
        type=kind,
        factor=float(factor or 1.0),
        original_max_position_embeddings=int(original),
        truncate=bool(values.get("truncate", True)),
        attention_factor=_yarn_attention_factor(values, float(factor)) if kind == "yarn" else 1.0,
        **fields,
    )


def _yarn_attention_factor(values: Mapping[str, Any], factor: float) -> float:
    """Section 3.4 of the YaRN paper, with DeepSeek's mscale variant, as transformers computes it."""
    if values.get("attention_factor") is not None:
        return float(values["attention_factor"])

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if values.get("mscale") and values.get("mscale_all_dim"):
        return mscale(values["mscale"]) / mscale(values["mscale_all_dim"])
    return mscale(1.0)


def _ids(*values: int | list[int] | None) -> tuple[int, ...]:
    """Every id once, in order of appearance."""
    found: list[int] = []
    for value in values:
        found.extend(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return tuple(dict.fromkeys(int(i) for i in found))


def _first_id(value: int | list[int] | None) -> int | None:
    ids = _ids(value)
    return ids[0] if ids else None


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise CheckpointError(f"{name} {value!r} is not supported", fix=f"supported: {', '.join(allowed)}")
