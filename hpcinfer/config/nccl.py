"""The `[nccl]` section of a site: settings of NCCL by name, checked, because NCCL ignores or misreads what it does not know.

Names and syntax are those of NCCL's documentation (Environment Variables, NCCL 2.30); which algorithm serves which function is in
its tuning model (src/graph/tuning.cc: broadcast and reduce have only Ring, only all-reduce has Tree).
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence

from hpcinfer.config.checks import has_control_characters
from hpcinfer.errors import ConfigError
from hpcinfer.units import parse_bytes

FUNCTIONS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce")
"""NCCL's own words for them are the same without the underscore."""
PROTOCOLS = ("LL", "LL128", "Simple")
ALGORITHMS = ("Ring", "Tree", "CollNetDirect", "CollNetChain", "NVLS", "NVLSTree", "PAT")
GDR_LEVELS = ("LOC", "PIX", "PXB", "PHB", "SYS")
DEBUG_LEVELS = ("VERSION", "WARN", "INFO", "TRACE")
SUBSYSTEMS = (
    "INIT", "COLL", "P2P", "SHM", "NET", "GRAPH", "TUNING", "ENV", "ALLOC", "ALLOC_HOST", "CALL", "PROXY", "NVLS", "BOOTSTRAP",
    "REG", "PROFILE", "RAS", "DESTROY", "ALL",
)  # fmt: skip

_SERVES = {
    "all_reduce": ("Ring", "Tree", "CollNetDirect", "CollNetChain", "NVLS", "NVLSTree"),
    "all_gather": ("Ring", "CollNetDirect", "NVLS", "PAT"),
    "reduce_scatter": ("Ring", "CollNetDirect", "NVLS", "PAT"),
    "broadcast": ("Ring",),
    "reduce": ("Ring",),
}
_LOW_LATENCY = ("Ring", "Tree")
"""The algorithms that have all three protocols; the others have Simple alone."""
_MAX_CHANNELS = 64
_INTERFACES = re.compile(r"\^?=?[\w.@-]{1,15}(,[\w.@-]{1,15})*")
_HCAS = re.compile(r"\^?=?[\w.-]+(:\d*){0,3}(,[\w.-]+(:\d*){0,3})*")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PerFunction:
    """A list of names for all functions, or one for each: `"Ring"`, or a table `{default = "Ring", all_reduce = "Tree,Ring"}`.

    A list is separated by commas; one that begins with ^ means all others. Lists for single functions need NCCL 2.24.
    """

    default: str = ""
    """For the functions that have no list of their own. Default "": NCCL chooses."""
    all_reduce: str = ""
    all_gather: str = ""
    reduce_scatter: str = ""
    broadcast: str = ""
    reduce: str = ""

    @classmethod
    def from_text(cls, text: str) -> PerFunction:
        """One list for all functions."""
        return cls(default=text)

    def of(self, function: str) -> str:
        """The list that counts for a function."""
        return getattr(self, function) or self.default

    def variable(self) -> str:
        """What NCCL_ALGO or NCCL_PROTO is set to: the list without a function first, then `function:list`."""
        parts = [self.default] if self.default else []
        parts += [f"{name.replace('_', '')}:{getattr(self, name)}" for name in FUNCTIONS if getattr(self, name)]
        return ";".join(parts)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NcclSection:
    """The `[nccl]` section. What is left out is left to NCCL, which is right on most clusters."""

    interface: str = ""
    """Network interfaces for sockets, bootstrap included: prefixes ("ib,eth"), exact names ("=ib0"), all but ("^docker,lo")."""
    hca: str = ""
    """InfiniBand adapters, in the same syntax, each with an optional port: "=mlx5_0:1,mlx5_1:1"."""
    gdr_level: str = ""
    """How far a NIC may be from a GPU for GPUDirect RDMA: LOC (never), PIX, PXB, PHB or SYS (always)."""
    protocol: PerFunction = PerFunction()
    """LL, LL128, Simple. LL128 on links without its guarantee corrupts data: name it only where NVLink is."""
    algorithm: PerFunction = PerFunction()
    """Ring, Tree, CollNetDirect, CollNetChain, NVLS, NVLSTree, PAT. Tree is for all_reduce alone."""
    min_channels: int = 0
    """Fewest channels of a collective; 2 to 4 suit small messages. Default 0: NCCL chooses."""
    max_channels: int = 0
    """Most channels of a collective; each takes a block of a GPU's processors. Default 0: NCCL chooses."""
    buffer_size: str = ""
    """Buffer between two GPUs, such as "2 MiB". Default "": NCCL's 4 MiB."""
    collnet: bool = False
    """Reductions in the network's switches (SHARP), through NCCL's CollNet plugin. Default false."""
    debug: str = ""
    """VERSION, WARN, INFO or TRACE. Default "": silent."""
    debug_subsys: str = ""
    """With debug = INFO: which parts, such as "INIT,NET,TUNING"."""
    extra: dict[str, str] = dataclasses.field(default_factory=dict)
    """Other NCCL_* variables, given to NCCL as they are."""

    def __post_init__(self) -> None:
        _check_pattern("interface", self.interface, _INTERFACES, '"ib", "=ib0,ib1" or "^docker,lo"')
        _check_pattern("hca", self.hca, _HCAS, '"mlx5", "=mlx5_0:1,mlx5_1:1" or "^=mlx5_2"')
        for name, allowed in (("gdr_level", GDR_LEVELS), ("debug", DEBUG_LEVELS)):
            if value := getattr(self, name):
                object.__setattr__(self, name, _named(f"nccl.{name}", value, allowed))
        object.__setattr__(self, "protocol", _checked_lists("protocol", self.protocol, PROTOCOLS))
        object.__setattr__(self, "algorithm", _checked_lists("algorithm", self.algorithm, ALGORITHMS))
        _check_combinations(self)
        _check_channels(self)
        if self.buffer_size and parse_bytes(self.buffer_size) < 1:
            raise ConfigError(f"nccl.buffer_size = {self.buffer_size!r}", fix='give a size such as "2 MiB"')
        object.__setattr__(self, "debug_subsys", _checked_subsystems(self.debug_subsys, self.debug))
        _check_extra(self.extra)


def nccl_variables(section: NcclSection) -> dict[str, str]:
    """The NCCL_* variables of a section: name -> value, in a fixed order; what is left out has none."""
    variables = {
        "NCCL_SOCKET_IFNAME": section.interface,
        "NCCL_IB_HCA": section.hca,
        "NCCL_NET_GDR_LEVEL": section.gdr_level,
        "NCCL_PROTO": section.protocol.variable(),
        "NCCL_ALGO": section.algorithm.variable(),
        "NCCL_MIN_NCHANNELS": str(section.min_channels or ""),
        "NCCL_MAX_NCHANNELS": str(section.max_channels or ""),
        "NCCL_BUFFSIZE": str(parse_bytes(section.buffer_size)) if section.buffer_size else "",
        "NCCL_COLLNET_ENABLE": "1" if section.collnet else "",
        "NCCL_DEBUG": section.debug,
        "NCCL_DEBUG_SUBSYS": section.debug_subsys,
        **section.extra,
    }
    return {name: value for name, value in variables.items() if value != ""}


def chosen(text: str, names: Sequence[str]) -> tuple[str, ...]:
    """The names that a list stands for: "" all of them, "^A" all but A, "A,B" these. The list must have been checked."""
    listed = text.removeprefix("^").split(",")
    return tuple(name for name in names if not text or (name in listed) != text.startswith("^"))


def _checked_lists(key: str, lists: PerFunction, names: Sequence[str]) -> PerFunction:
    """The same lists with every name as NCCL writes it. Raises ConfigError for a name that it does not know."""
    fields = {field.name: getattr(lists, field.name) for field in dataclasses.fields(lists)}
    for field, text in fields.items():
        if text:
            inverted = "^" if text.startswith("^") else ""
            listed = [_named(f"nccl.{key}.{field}", each.strip(), names) for each in text.removeprefix("^").split(",")]
            fields[field] = inverted + ",".join(listed)
    return PerFunction(**fields)


def _check_combinations(section: NcclSection) -> None:
    """Every function must be left with an algorithm that serves it, in a protocol that the algorithm has."""
    for function in FUNCTIONS:
        own = getattr(section.algorithm, function)
        if own and not own.startswith("^"):
            for name in own.split(","):
                if name not in _SERVES[function]:
                    raise ConfigError(
                        f"nccl.algorithm.{function} = {own!r}: there is no {name} {function}",
                        fix=f"algorithms of {function}: {', '.join(_SERVES[function])}",
                    )
        algorithms = [name for name in chosen(section.algorithm.of(function), ALGORITHMS) if name in _SERVES[function]]
        if not algorithms:
            raise ConfigError(
                f"nccl.algorithm leaves nothing for {function}", found=f"{section.algorithm.of(function)!r}",
                fix=f'{function} has {", ".join(_SERVES[function])}; give it a list of its own: algorithm = '
                f'{{ default = "Ring", all_reduce = "{section.algorithm.of("all_reduce")}" }}',
            )
        if not section.collnet and all(name.startswith("CollNet") for name in algorithms):
            raise ConfigError(
                f"nccl.algorithm leaves only {', '.join(algorithms)} for {function}", found="nccl.collnet = false",
                fix="set nccl.collnet = true, or allow Ring too",
            )
        protocols = chosen(section.protocol.of(function), PROTOCOLS)
        if "Simple" not in protocols and not any(name in _LOW_LATENCY for name in algorithms):
            raise ConfigError(
                f"nccl.algorithm and nccl.protocol leave nothing for {function}",
                found=f"{', '.join(algorithms)} in {', '.join(protocols) or 'no protocol'}",
                fix="only Ring and Tree have LL and LL128: allow Simple, or one of those",
            )
        if not protocols:
            raise ConfigError(f"nccl.protocol leaves nothing for {function}", fix=f"allow one of {', '.join(PROTOCOLS)}")


def _check_channels(section: NcclSection) -> None:
    for name in ("min_channels", "max_channels"):
        if not 0 <= getattr(section, name) <= _MAX_CHANNELS:
            raise ConfigError(f"nccl.{name} = {getattr(section, name)}", fix=f"give 1 to {_MAX_CHANNELS}, or 0 for NCCL's choice")
    if section.max_channels and section.min_channels > section.max_channels:
        raise ConfigError(
            f"nccl.min_channels = {section.min_channels} is above nccl.max_channels = {section.max_channels}",
            fix=f"set min_channels to {section.max_channels} or less",
        )


def _checked_subsystems(text: str, debug: str) -> str:
    """The same list as NCCL writes it. Raises ConfigError for names that it does not know, and where it would not look at them."""
    listed = [name.strip() for name in text.split(",")] if text else []
    names = ["^" * name.startswith("^") + _named("nccl.debug_subsys", name.removeprefix("^"), SUBSYSTEMS) for name in listed]
    if names and debug not in ("INFO", "TRACE"):
        raise ConfigError(
            f"nccl.debug_subsys = {text!r} has no effect", found=f"nccl.debug = {debug!r}", fix='set nccl.debug = "INFO"'
        )
    return ",".join(names)


def _check_extra(extra: dict[str, str]) -> None:
    own = {
        "NCCL_SOCKET_IFNAME": "interface", "NCCL_IB_HCA": "hca", "NCCL_NET_GDR_LEVEL": "gdr_level", "NCCL_PROTO": "protocol",
        "NCCL_ALGO": "algorithm", "NCCL_MIN_NCHANNELS": "min_channels", "NCCL_MAX_NCHANNELS": "max_channels",
        "NCCL_BUFFSIZE": "buffer_size", "NCCL_COLLNET_ENABLE": "collnet", "NCCL_DEBUG": "debug", "NCCL_DEBUG_SUBSYS": "debug_subsys",
    }  # fmt: skip
    for name, value in extra.items():
        if name in own:
            raise ConfigError(f"nccl.extra.{name}", fix=f"it has a key of its own: nccl.{own[name]}")
        if not re.fullmatch(r"NCCL_[A-Z0-9_]+", name):
            raise ConfigError(f"nccl.extra.{name} is not a variable of NCCL", fix="give names that begin with NCCL_, in capitals")
        if has_control_characters(value):
            raise ConfigError(f"nccl.extra.{name} = {value!r}", fix="leave out line breaks and control characters")


def _check_pattern(key: str, value: str, pattern: re.Pattern, examples: str) -> None:
    if value and not pattern.fullmatch(value):
        raise ConfigError(
            f"nccl.{key} = {value!r}", fix=f"give names separated by commas, ^ or = only before the first: {examples}"
        )


def _named(key: str, value: str, allowed: Sequence[str]) -> str:
    """`value` as `allowed` spells it, whatever its case. Raises ConfigError, with the nearest name."""
    for name in allowed:
        if name.lower() == value.lower():
            return name
    close = difflib.get_close_matches(value.upper(), [name.upper() for name in allowed], n=1, cutoff=0.5)
    hint = f"did you mean {next(name for name in allowed if name.upper() == close[0])}? " if close else ""
    raise ConfigError(f"{key} = {value!r}", fix=f"{hint}valid: {', '.join(allowed)}")
