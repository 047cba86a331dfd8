"""A slow network on one machine: network namespaces, one rank in each, joined by rate-limited links to a bridge.

Every rank has an anonymous namespace, and the bridge has one, each held open by a sleeping process that the kernel kills with this
one: however this process ends, nothing stays behind, and the machine's own network is never touched. `tc tbf` limits what leaves
each rank and what comes to it. It needs root and the programs in PROGRAMS; where that is missing, ranks talk over loopback.

Both forms make MPICH use TCP and take its ranks for ranks of different nodes; it would share memory otherwise,
namespaces or not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence

from hpcinfer.errors import LaunchError
from hpcinfer.launch.process import die_with_parent
from hpcinfer.launch.start import find_mpiexec, mpiexec_command, mpiexec_vendor, rank_program

PROGRAMS = ("ip", "tc", "nsenter", "unshare", "mount")
NUM_RANKS = 2
_DEVICE = "hpcinfer0"
_BRIDGE = "hpcinfer-bridge"
_NETWORK = "10.77.0"
_LATENCY_MS = 50
"""How long a packet may queue before it is dropped."""
_BURST_BYTES = 2**18
_START_S = 10.0
_TCP_ENVIRONMENT = {"UCX_TLS": "tcp,self", "MPIR_CVAR_NOLOCAL": "1"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """What ranks talk over, and how to start them there."""

    description: str
    """For people: what kind of link, or why it is only loopback."""
    prefixes: tuple[tuple[str, ...], ...]
    """For each rank, what comes before its program on the command line."""
    environment: dict[str, str]
    """Variables of all ranks."""


@contextlib.contextmanager
def rate_limited_link(rate_bits_per_s: float) -> Iterator[Link]:
    """Two namespaces with a link of so many bits per second in each direction, for as long as the context lasts.

    Raises:
        LaunchError: it cannot be made here; `found` has the reason.
    """
    with rate_limited_network([rate_bits_per_s] * NUM_RANKS) as link:
        yield dataclasses.replace(
            link, description=f"rate-limited {rate_bits_per_s / 1e9:g} Gbit/s veth between two network namespaces"
        )


@contextlib.contextmanager
def rate_limited_network(rates_bits_per_s: Sequence[float]) -> Iterator[Link]:
    """A namespace for each rate, whose rank sends and receives so many bits per second, for as long as the context lasts.

    Raises:
        LaunchError: it cannot be made here; `found` has the reason.
    """
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if os.geteuid() != 0 or missing:
        reason = f"no {', '.join(missing)} on PATH" if missing else "not root"
        raise _unavailable(reason)
    holders: list[subprocess.Popen] = []
    try:
        try:
            _make(holders, rates_bits_per_s)
        except (OSError, subprocess.SubprocessError) as cause:
            raise _unavailable((getattr(cause, "stderr", "") or str(cause)).strip()) from cause
        yield Link(
            description=f"{len(rates_bits_per_s)} network namespaces at a bridge",
            prefixes=tuple(_enter(holder) for holder in holders[1:]),
            environment={**_TCP_ENVIRONMENT, "UCX_NET_DEVICES": _DEVICE},
        )
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def loopback(reason: str) -> Link:
    """TCP inside this machine, as fast as it goes. `reason`: why it is not a slower one."""
    return Link(
        description=f"loopback: {reason}", prefixes=((),) * NUM_RANKS, environment=dict(_TCP_ENVIRONMENT)
    )


@contextlib.contextmanager
def open_link(kind: str, rate_bits_per_s: float) -> Iterator[Link]:
    """The link that a benchmark asked for.

    Args:
        kind: "namespaces", "loopback", or "auto": namespaces where this process may make them.
        rate_bits_per_s: of the link between namespaces, in each direction.

    Raises:
        LaunchError: namespaces were asked for and cannot be made.
    """
    with contextlib.ExitStack() as stack:
        if kind == "loopback":
            link = loopback("asked for")
        elif mpiexec_vendor(find_mpiexec()) != "MPICH" and kind == "auto":
            link = loopback("no namespaces here (they are prepared for MPICH)")
        else:
            try:
                link = stack.enter_context(rate_limited_link(rate_bits_per_s))
            except LaunchError as error:
                if kind != "auto":
                    raise
                link = loopback(f"no namespaces here ({error.found})")
        yield link


def run_on_link(link: Link, argv: Sequence[str]) -> int:
    """Start a rank of `hpcinfer *argv` at each end of the link and wait for them. Returns their exit code."""
    mpiexec = find_mpiexec()
    command = mpiexec_command(
        len(link.prefixes), [], os.environ, mpiexec=mpiexec, vendor=mpiexec_vendor(mpiexec),
        num_cores=len(os.sched_getaffinity(0)), is_root=os.geteuid() == 0,
    )
    line = command.argv[: command.argv.index("-n")]
    for rank, prefix in enumerate(link.prefixes):
        line += [":"] if rank else []
        line += ["-n", "1", *prefix, *rank_program(argv)]
    process = subprocess.Popen(
        line, env={**command.env, **link.environment}, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent
    )
    try:
        return process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise


def _unavailable(reason: str) -> LaunchError:
    return LaunchError(
        "network namespaces cannot be made here", found=reason,
        fix="run as root with iproute2 and util-linux installed, or use --link loopback",
    )


def _make(holders: list[subprocess.Popen], rates_bits_per_s: Sequence[float]) -> None:
    """Add to `holders` that of the bridge's namespace, then one for each rate, joined to it. Raises OSError or SubprocessError."""
    for _ in range(1 + len(rates_bits_per_s)):
        holders.append(_hold_namespace())
    for holder in holders:
        _wait_until(lambda holder=holder: _has_own_namespace(holder), "a new network namespace")
    _join(holders[0], holders[1:], rates_bits_per_s)


def _hold_namespace() -> subprocess.Popen:
    return subprocess.Popen(
        ["unshare", "--net", "sleep", "infinity"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, preexec_fn=die_with_parent,
    )


def _has_own_namespace(holder: subprocess.Popen) -> bool:
    if holder.poll() is not None:
        raise OSError(f"unshare --net ended with {holder.returncode}")
    return os.readlink(_namespace(holder)) != os.readlink("/proc/self/ns/net")


def _namespace(holder: subprocess.Popen) -> str:
    return f"/proc/{holder.pid}/ns/net"


def _enter(holder: subprocess.Popen) -> tuple[str, ...]:
    """Of a rank: its namespace, and a view of /sys that shows its devices, where UCX looks for them."""
    show_devices = 'mount -t sysfs sysfs /sys && exec "$@"'
    return ("nsenter", f"--net={_namespace(holder)}", "unshare", "--mount", "sh", "-c", show_devices, "rank")


def _join(bridge: subprocess.Popen, holders: Sequence[subprocess.Popen], rates_bits_per_s: Sequence[float]) -> None:
    _inside(bridge, "ip", "link", "add", _BRIDGE, "type", "bridge")
    _inside(bridge, "ip", "link", "set", _BRIDGE, "up")
    for number, (holder, rate) in enumerate(zip(holders, rates_bits_per_s, strict=True), start=1):
        port = f"{_DEVICE}-{number}"
        _inside(holder, "ip", "link", "add", _DEVICE, "type", "veth", "peer", "name", port, "netns", str(bridge.pid))
        _inside(bridge, "ip", "link", "set", port, "master", _BRIDGE, "up")
        _inside(holder, "ip", "address", "add", f"{_NETWORK}.{number}/24", "dev", _DEVICE)
        for device in ("lo", _DEVICE):
            _inside(holder, "ip", "link", "set", device, "up")
        for end, device in ((holder, _DEVICE), (bridge, port)):
            _inside(
                end, "tc", "qdisc", "add", "dev", device, "root", "tbf", "rate", f"{round(rate)}bit",
                "burst", str(_BURST_BYTES), "latency", f"{_LATENCY_MS}ms",
            )
    for holder in holders:
        # UCX takes a device only once it has a carrier, which comes a moment after both ends are up.
        _wait_until(
            lambda holder=holder: "state UP" in _inside(holder, "ip", "link", "show", _DEVICE), "the link's carrier"
        )


def _inside(holder: subprocess.Popen, *command: str) -> str:
    line = ["nsenter", f"--net={_namespace(holder)}", *command]
    return subprocess.run(line, check=True, capture_output=True, text=True, timeout=_START_S).stdout


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + _START_S
    while not condition():
        if time.monotonic() > end:
            raise OSError(f"waited {_START_S:g} s for {what}")
        time.sleep(0.01)
