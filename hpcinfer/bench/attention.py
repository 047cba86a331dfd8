"""Attention alone, backend by backend: decodes at several contexts, prefill of whole prompts.

Limited by: in decode, the memory bandwidth (every key and value is read once); in prefill, the matrix rate (4 N H operations
for each pair of a query and a key that it sees). Pages lie in random order, and calls take turns over as many sets of
sequences as make their keys and values several times larger than the cache. On a GPU, decodes of a backend that can be
captured are timed in a CUDA graph, as a run executes them; other calls are queued one behind another.

Shape letters: N query heads, K key/value heads, H head dim, T tokens, L keys.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable

import numpy as np
import torch

from hpcinfer.attention.base import AttentionBackend, AttentionQuery, AttentionSpec
from hpcinfer.attention.matrix import EXAMPLE
from hpcinfer.attention.metadata import AttentionMetadata, build_metadata
from hpcinfer.attention.registry import AttentionChoice, attention_query, explain_backends, select_backend
from hpcinfer.batch import MicroBatch
from hpcinfer.bench.limits import MachineLimits, machine_limits, seconds_of
from hpcinfer.errors import ConfigError, UsageError
from hpcinfer.launch.host_memory import available_host_bytes
from hpcinfer.units import format_bytes

_CACHE_SIZES = 4
"""Keys and values of all sets together, in sizes of the last cache."""
_CPU_CACHE_BYTES = 2**26
_MOST_SETS = 16
_MEMORY_SHARE = 0.5
"""Of free memory: larger cases are left out."""
_GRAPH_CALLS = 16
"""Calls between two events: a launch alone takes longer than a short kernel."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttentionOptions:
    """What is measured."""

    backends: str = "auto"
    """Names, separated by commas; auto: the one that a run would take; all: every one that does not refuse."""
    device: str = "auto"
    """cpu, cuda, or auto: the GPU where there is one."""
    dtype: str = "bfloat16"
    """float32, bfloat16 or float16."""
    heads: int = 32
    """N."""
    kv_heads: int = 8
    """K."""
    head_dim: int = 128
    """H."""
    block_size: int = 0
    """Tokens in a page; 0: what the backend prefers."""
    window: int = 0
    """Sliding window in tokens; 0: none."""
    sinks: bool = False
    """With attention sinks."""
    contexts: str = "1024,8192,65536"
    """Tokens of each sequence in decode, separated by commas."""
    sequences: str = "1,16,64,256"
    """Sequences that decode at once, separated by commas."""
    prefill: str = "2048,8192"
    """Tokens of a whole prompt in prefill, separated by commas."""
    repeats: int = 20
    """Timed calls after a warm-up; medians count."""

    def __post_init__(self) -> None:
        for name in ("contexts", "sequences", "prefill"):
            _numbers(name, getattr(self, name))
        for name in ("heads", "kv_heads", "head_dim", "repeats"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}", fix="give 1 or more")
        if self.heads % self.kv_heads:
            raise UsageError(f"--heads {self.heads} over --kv-heads {self.kv_heads}", fix="give a multiple of the key/value heads")
        for name in ("block_size", "window"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}", fix="give 0 or more")


def run_attention(options: AttentionOptions) -> dict:
    """Measure. Returns the figures: `cases`, one for each backend and size, and `left_out`, those that could not be run."""
    device = _device(options.device)
    model = dataclasses.replace(
        EXAMPLE, num_heads=options.heads, num_kv_heads=options.kv_heads, head_dim=options.head_dim,
        sliding_window=(options.window or None,) * EXAMPLE.num_layers, attention_sinks=options.sinks,
    )
    query = attention_query(
        model, tp=1, block_size=options.block_size, dtype=getattr(torch, options.dtype), device=device
    )
    limits = machine_limits(options.dtype, device)
    cases, left_out = [], []
    with torch.inference_mode():
        for name in _names(options.backends, query):
            try:
                choice = select_backend(query, setting=name)
            except ConfigError as error:
                left_out.append({"backend": name, "reason": error.found or error.problem})
                continue
            for phase, tokens, sequences in _sizes(options):
                figures = {"backend": choice.backend.name, "block_size": choice.block_size, "phase": phase, "tokens": tokens}
                figures["sequences"] = sequences
                needed = 2 * sequences * tokens * options.kv_heads * options.head_dim * query.dtype.itemsize
                room = _MEMORY_SHARE * _free_bytes(device)
                if needed > room:
                    reason = f"keys and values of {format_bytes(needed)}, room for {format_bytes(room)}"
                    left_out.append({**figures, "reason": reason})
                    continue
                # No name is kept for it: its pages must be gone before the next one's are made.
                cases.append({**figures, **_Case(options, choice, device, phase, tokens, sequences, room).measure(limits)})
    return {
        "benchmark": "attention",
        **dataclasses.asdict(options),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cases": cases,
        "left_out": left_out,
        "limits": dataclasses.asdict(limits),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def table(figures: dict) -> str:
    """The figures for people."""
    lines = [f"{'backend':<15} {'phase':<8} {'sequences':>9} {'tokens':>7} {'us':>11}  share of limit"]
    for case in figures["cases"]:
        limit = "bandwidth" if case["phase"] == "decode" else "matrix rate"
        lines.append(
            f"{case['backend']:<15} {case['phase']:<8} {case['sequences']:>9} {case['tokens']:>7} {case['microseconds']:>11.1f}"
            f"  {case['share']:.1%} of the {limit}"
        )
    for case in figures["left_out"]:
        size = f" {case['phase']} of {case['sequences']} x {case['tokens']}" if "phase" in case else ""
        lines.append(f"{case['backend']:<15}{size} left out: {case['reason']}")
    return "\n".join(lines)


class _Case:
    """One size of one phase on one backend: its pages, and as many sets of sequences as the cache cannot hold."""

    def __init__(
        self, options: AttentionOptions, choice: AttentionChoice, device: torch.device, phase: str, tokens: int, sequences: int,
        room: float,
    ) -> None:  # fmt: skip
        self._options, self._device, self._phase = options, device, phase
        self._backend: AttentionBackend = choice.backend
        dtype = getattr(torch, options.dtype)
        query_len = 1 if phase == "decode" else tokens
        read = min(tokens, options.window or tokens)
        self._pairs = sequences * (read if phase == "decode" else _pairs(tokens, options.window))
        self._kv_bytes = 2 * sequences * read * options.kv_heads * options.head_dim * dtype.itemsize
        sets = min(-(-_CACHE_SIZES * _cache_bytes(device) // self._kv_bytes), _MOST_SETS)
        pages = -(-tokens // choice.block_size)
        per_set = sequences * pages
        layout = choice.backend.kv_layout(choice.block_size, options.kv_heads, options.head_dim)
        sets = max(1, min(sets, int(room // (per_set * layout.bytes_per_block(dtype.itemsize)))))
        num_blocks = 1 + sets * per_set
        self._caches = [torch.empty(layout.shape(num_blocks), dtype=dtype, device=device).normal_() for _ in range(2)]
        blocks = np.random.default_rng(0).permutation(np.arange(1, num_blocks, dtype=np.int32)).reshape(sets, sequences, pages)
        self._metadata = [
            build_metadata(_microbatch(tables, query_len, tokens), choice.block_size, device) for tables in blocks
        ]
        shape = (sequences * query_len, options.heads, options.head_dim)
        self._q = torch.randn(shape, device=device).to(dtype)
        self._k, self._v = torch.randn((2, shape[0], options.kv_heads, options.head_dim), device=device).to(dtype)
        for metadata in self._metadata:
            choice.backend.write(self._k, self._v, *self._caches, metadata.slot_mapping)
        self._spec = AttentionSpec(
            num_heads=options.heads, num_kv_heads=options.kv_heads, head_dim=options.head_dim, scale=options.head_dim**-0.5,
            sliding_window=options.window or None, sinks=torch.zeros(options.heads, dtype=dtype, device=device) if options.sinks else None,
        )

    def measure(self, limits: MachineLimits) -> dict:
        """Median time of a call, and its share of what the machine can do."""
        for metadata in self._metadata:  # plans are made once a step, not in every layer
            self._call(metadata)
        calls = max(_GRAPH_CALLS, len(self._metadata)) if self._device.type == "cuda" else 1
        timed = self._timed(calls)
        seconds = statistics.median(seconds_of(timed, self._device) / calls for _ in range(self._options.repeats))
        if self._phase == "decode":
            work, least = {"bytes": self._kv_bytes}, self._kv_bytes / limits.read_bytes_per_s
        else:
            flops = 4 * self._options.heads * self._options.head_dim * self._pairs
            work, least = {"flops": flops}, flops / limits.matmul_flops_per_s
        return {"microseconds": 1e6 * seconds, **work, "share": least / seconds, "sets": len(self._metadata)}

    def _timed(self, calls: int) -> Callable[[], None]:
        """What is timed: so many calls, a different set of sequences in each."""
        turn = 0

        def run() -> None:
            nonlocal turn
            for _ in range(calls):
                self._call(self._metadata[turn % len(self._metadata)])
                turn += 1

        if self._device.type == "cpu" or self._phase != "decode" or not self._backend.capturable:
            return run
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def _call(self, metadata: AttentionMetadata) -> None:
        self._backend.forward(self._q, self._k, self._v, *self._caches, metadata, self._spec)


def _microbatch(tables: np.ndarray, query_len: int, tokens: int) -> MicroBatch:
    """Sequences of `tokens` each, of which the last `query_len` are computed; tables [sequences, pages]."""
    count = len(tables)
    return MicroBatch(
        tick=0, is_prefill=query_len > 1, sequence_ids=tuple(range(count)), token_ids=np.zeros(count * query_len, np.int32),
        query_lens=np.full(count, query_len, np.int32), context_lens=np.full(count, tokens - query_len, np.int32),
        block_tables=tables, samples=np.ones(count, bool),
    )


def _pairs(tokens: int, window: int) -> int:
    """Pairs of a query and a key that it sees, in a prompt of so many tokens."""
    seen = np.arange(1, tokens + 1)
    return int(np.minimum(seen, window or tokens).sum())


def _sizes(options: AttentionOptions) -> list[tuple[str, int, int]]:
    decodes = [
        ("decode", context, count)
        for context in _numbers("contexts", options.contexts) for count in _numbers("sequences", options.sequences)
    ]
    return decodes + [("prefill", tokens, 1) for tokens in _numbers("prefill", options.prefill)]


def _numbers(name: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = [0]
    if any(number < 1 for number in numbers):
        raise UsageError(f"--{name} {text}", fix="give whole numbers above 0, separated by commas")
    return numbers


def _names(text: str, query: AttentionQuery) -> list[str]:
    if text == "all":
        return [name for name, reason in explain_backends(query).items() if reason is None]
    return [name.strip() for name in text.split(",")]


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda", found="no CUDA device is visible", fix="use --device cpu, or run on a machine with a GPU")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return available_host_bytes(1)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _cache_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else _CPU_CACHE_BYTES
