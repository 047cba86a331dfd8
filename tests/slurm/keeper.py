"""The parent of a test cluster's daemons: when it ends, for whatever reason, nothing of the cluster is left.

    python -m tests.slurm.keeper PLAN.json        # what `cluster.Cluster.start` writes

It starts the controller and a slurmd for each node, prints "started" and waits until its standard input closes, which also
happens when the process that started it is killed. Everything that daemons and jobs leave behind becomes its child (it is
a subreaper), and is killed with SIGKILL. With namespaces it is itself in a network namespace of its own, where the bridge
is, so that bridge, links and addresses go away with the last process.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time

from hpcinfer.launch.process import die_with_parent
from tests.mpi import descendants

PR_SET_CHILD_SUBREAPER = 36
BRIDGE = "cluster0"
NETWORK = "10.77.0"
CONTROLLER_ADDRESS = f"{NETWORK}.254"

# Runs in the namespaces of a node; waits for its link before the daemon replaces it. Whoever asks for the boot id, our ledger and UCX
# among them, takes nodes for different machines.
_NODE = """
hostname "$1" && mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs tmpfs "$3" && cat /proc/sys/kernel/random/uuid >/dev/shm/boot_id &&
mount --bind /dev/shm/boot_id /proc/sys/kernel/random/boot_id && echo ready && read -r &&
ip link set lo up && ip address add "$2/24" dev eth0 && ip link set eth0 up && shift 3 && exec "$@"
"""


def node_address(index: int) -> str:
    """Address of a node (0, 1, ...) in its own network namespace."""
    return f"{NETWORK}.{index + 1}"


def main() -> int:
    with open(sys.argv[1], encoding="utf-8") as file:
        plan = json.load(file)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        start_daemons(plan)
        print("started", flush=True)
        sys.stdin.read()
    finally:
        kill_descendants()
        shutil.rmtree(plan["folder"], ignore_errors=True)
    return 0


def start_daemons(plan: dict) -> None:
    """The controller first, then the nodes."""
    if plan["namespaces"]:
        _ip("link", "set", "lo", "up")
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("address", "add", f"{CONTROLLER_ADDRESS}/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
    _daemon(plan["controller"], plan["log"])
    for index, node in enumerate(plan["nodes"]):
        if plan["namespaces"]:
            _node_in_namespaces(index, node, plan["log"])
        else:
            _daemon(node["command"], plan["log"])


def _node_in_namespaces(index: int, node: dict, log: str) -> None:
    script = ["bash", "-c", _NODE, "node", node["name"], node_address(index), node["local"], *node["command"]]
    with open(log, "ab") as file:
        process = subprocess.Popen(
            ["unshare", "--net", "--mount", "--uts", "--ipc", *script],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, preexec_fn=die_with_parent,
        )
    process.stdout.readline()
    link = link_name(node["name"])
    _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
    _ip("link", "set", link, "master", BRIDGE, "up")
    process.stdin.write(b"go\n")
    process.stdin.close()


def link_name(node: str) -> str:
    """The end of a node's link that is at the bridge."""
    return f"to-{node}"


def _daemon(command: list[str], log: str) -> None:
    with open(log, "ab") as file:
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, preexec_fn=die_with_parent)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=30)


def kill_descendants() -> None:
    """SIGKILL whatever is below this process, until nothing is."""
    while True:
        for pid in descendants(os.getpid()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main())
