"""What a model is: the facts of a Hugging Face folder's config.json and generation_config.json, torch-free.

Read once by `ModelConfig.from_folder`; everything that later depends on the model (layers, memory arithmetic, planner)
takes a `ModelConfig` and never looks at the JSON again.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcinfer.config.checks import one_of
from hpcinfer.config.families.registry import READERS
from hpcinfer.config.rope import ROPE_TYPES, RopeConfig
from hpcinfer.errors import CheckpointError, ConfigError

FAMILIES = tuple(READERS)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
DTYPES = ("float32", "bfloat16", "float16")
NORMS = ("rms", "layer")
ROUTERS = ("softmax_topk", "topk_softmax")
EXPERT_FORMATS = ("", "mxfp4")


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
    """Width of the MLP of a dense layer."""
    num_layers: int
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key/value heads; divides num_heads (grouped-query attention)."""
    head_dim: int
    """H: width of a head; num_heads * head_dim need not be hidden_size."""
    norm: str = "rms"
    """rms (RMSNorm) or layer (LayerNorm, with bias)."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square or variance, in either kind of norm."""
    rope: RopeConfig | None = RopeConfig()
    """None: no rotary embedding."""
    learned_positions: bool = False
    """A table of max_position_embeddings vectors is added to the token embedding; `rope` is then None."""
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
    attention_sinks: bool = False
    """Every query head has a learned logit that takes part in the softmax over the keys and has no value (gpt-oss)."""
    gated_mlp: bool = True
    """down(act(gate(x)) * up(x)); otherwise down(act(up(x)))."""
    hidden_act: str = "silu"
    """Activation of the MLP: silu, gelu, gelu_tanh or relu."""
    dtype: str = "float32"
    """What the checkpoint says its weights are: float32, bfloat16 or float16 (`dtype = "auto"` uses it)."""
    eos_token_ids: tuple[int, ...] = ()
    """Ids that end a generation: those of config.json and generation_config.json together."""
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    num_experts: int = 0
    """Experts of a mixture layer; 0: every layer has a dense MLP."""
    experts_per_token: int = 0
    """How many of them a token is sent to."""
    expert_size: int = 0
    """Intermediate width of one expert."""
    router: str = ""
    """How logits become weights: softmax_topk (softmax over all experts, then the k largest) or topk_softmax (the k
    largest logits, then a softmax over those). Empty without experts."""
    normalize_topk: bool = False
    """softmax_topk: the k weights are divided by their sum."""
    router_bias: bool = False
    expert_bias: bool = False
    """Both projections of every expert have biases."""
    swiglu_limit: float = 0.0
    """0: act(gate) * up. Above: gate and up are clamped there and the gating is gpt-oss's (alpha 1.702, up + 1)."""
    moe_layers: tuple[bool, ...] = ()
    """One entry a layer: whether it is a mixture. Empty: all are with num_experts > 0, none otherwise."""
    expert_format: str = ""
    """How checkpoints store the experts: plain tensors, or mxfp4 (packed blocks and scales)."""
    packed_experts: bool = False
    """Keep MXFP4 experts packed in memory and unpack one when tokens are sent to it (`model.experts` of a job)."""

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
        if self.rope is not None and self.head_dim % 2:
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
        one_of("hidden_act", self.hidden_act, ACTIVATIONS)
        one_of("norm", self.norm, NORMS)
        if self.rope is not None:
            one_of("rope type", self.rope.type, ROPE_TYPES)
        if (self.rope is not None) == self.learned_positions:
            raise CheckpointError(
                "model config: positions", found=f"rope {self.rope}, learned_positions {self.learned_positions}",
                fix="a model has either a rotary embedding or learned positions",
            )
        one_of("dtype", self.dtype, DTYPES)
        self._check_experts()

    def _check_experts(self) -> None:
        if not self.moe_layers:
            object.__setattr__(self, "moe_layers", (self.num_experts > 0,) * self.num_layers)
        if len(self.moe_layers) != self.num_layers:
            raise CheckpointError(
                "model config: moe_layers does not fit the layers",
                found=f"{len(self.moe_layers)} entries, {self.num_layers} layers",
            )
        one_of("expert format", self.expert_format, EXPERT_FORMATS)
        if self.num_experts == 0 and not any(self.moe_layers):
            return
        for name in ("num_experts", "experts_per_token", "expert_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise CheckpointError(f"model config: {name} = {value!r}", fix="it must be a whole number of 1 or more")
        if self.experts_per_token > self.num_experts:
            raise CheckpointError(
                "model config: a token is sent to more experts than there are",
                found=f"{self.experts_per_token} of {self.num_experts} experts",
            )
        one_of("router", self.router, ROUTERS)
        if not self.swiglu_limit >= 0:
            raise CheckpointError(f"model config: swiglu_limit = {self.swiglu_limit!r}", fix="it must be 0 or more")

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Read config.json and, where there is one, generation_config.json of a Hugging Face folder.

        Raises:
            CheckpointError: no such folder or file, no permission, not JSON, or a feature that is not supported (named).
        """
        folder = Path(folder)
        if not _is_there(folder) or not os.path.isdir(folder):
            raise CheckpointError(
                f"no model folder {str(folder)!r}", fix="give a Hugging Face folder with a config.json in it"
            )
        raw = _read_json(folder / "config.json")
        generation_file = folder / "generation_config.json"
        generation = _read_json(generation_file) if _is_there(generation_file) else {}
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
        reader = READERS[family]
        _refuse_quantization(raw, reader.quantizations, source)
        try:
            return cls(**reader.read(family, raw, generation))
        except KeyError as error:
            raise CheckpointError(f"{source}: the key {error.args[0]!r} is missing") from None
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {error.problem}", found=error.found, fix=error.fix) from None
        except (TypeError, ValueError, MemoryError, ZeroDivisionError) as error:
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

def _is_there(path: Path) -> bool:
    """Whether there is such a file or folder. Raises CheckpointError where one may not look: that is not the same as none."""
    try:
        os.stat(path)
    except PermissionError as error:
        raise CheckpointError(f"no permission to look at {path}", found=str(error), fix="ask the owner of the folder") from None
    except (OSError, ValueError):
        return False
    return True


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no {path.name} in {str(path.parent)!r}", fix="give a Hugging Face folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}", found=str(error)) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"cannot read {path}", found=f"a JSON {type(content).__name__}, not an object")
    return content


def _family(raw: Mapping[str, Any], source: str) -> str:
    names = raw.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{source}: architectures is not a list of names", found=repr(names)[:200])
    if not names:
        names = [name for name, reader in READERS.items() if reader.model_type == raw.get("model_type")]
    for name in names:
        if name in READERS:
            return name
    raise CheckpointError(
        f"{source}: the architecture is not supported",
        found=", ".join(map(str, names)) or f"no architectures, model_type {raw.get('model_type')!r}",
        fix=f"supported: {', '.join(READERS)}",
    )


def _refuse_quantization(raw: Mapping[str, Any], known: tuple[str, ...], source: str) -> None:
    quantization = raw.get("quantization_config")
    if not quantization:
        return
    method = quantization.get("quant_method", "unnamed") if isinstance(quantization, Mapping) else quantization
    if method not in known:
        raise CheckpointError(
            f"{source}: quantization_config is not supported", found=f"quant_method {method!r}",
            fix="use the checkpoint in float32, bfloat16 or float16",
        )
