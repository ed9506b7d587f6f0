"""Hosts on one machine: network namespaces, each with an address and a host name of its own, at one switch.

They share the files, the clock and the processor. Needs root, ``ip`` and ``unshare``.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

SWITCH = "mmm-switch"
NETWORK = "10.77.0"
NAMES = Path("/run/mmm-hosts")  # files like /etc/hosts
NEEDED = {
    "ip": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "tc": "iproute2",
}  # command -> package of Debian


def missing(needed: Mapping[str, str] = NEEDED) -> list[str]:
    """Packages of Debian whose commands are not there."""
    return sorted({package for command, package in needed.items() if shutil.which(command) is None})


def _ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=not check)


@dataclass
class Host:
    number: int
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"mmm-host{self.number}"

    @property
    def address(self) -> str:
        return f"{NETWORK}.{self.number + 1}"

    def command(self, arguments: Sequence[str]) -> list[str]:
        """``arguments`` on this host: its network, its name, and its view of the others' names. `ip netns exec` would
        hide the cgroups, which Slurm needs."""
        inside = 'mount --bind "$1" /etc/hosts && hostname "$0" && shift && exec "$@"'
        names = ["unshare", "--uts", "--mount", "sh", "-c", inside, self.name, str(NAMES / self.name), *arguments]
        return ["nsenter", f"--net=/run/netns/{self.name}", *names]

    def start(self, arguments: Sequence[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Starts a command, whose output is added to ``log``."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                self.command(arguments), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env={**os.environ, **environment}, start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def run(self, arguments: Sequence[str], seconds: float, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(arguments), capture_output=True, text=True, timeout=seconds, check=False,
                              stdin=subprocess.DEVNULL, env={**os.environ, **environment})  # fmt: skip

    @property
    def pids(self) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        return [int(line) for line in found.stdout.split()]

    def kill(self) -> None:
        """As if its power had failed: no process says goodbye, and none answers any more."""
        self.cut()
        while pids := self.pids:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            for process in self.started:
                process.wait()
        self.started.clear()

    def cut(self) -> None:
        """Nothing reaches it, and nothing leaves it; its processes go on."""
        _ip("-n", SWITCH, "link", "set", f"port{self.number}", "down")

    def join(self) -> None:
        """Undoes ``cut``."""
        _ip("-n", SWITCH, "link", "set", f"port{self.number}", "up")

    def slow(self, mbit: float) -> None:
        """Limits what it sends."""
        shape = ["tbf", "rate", f"{mbit}mbit", "burst", "32kb", "latency", "50ms"]
        subprocess.run(["tc", "-n", self.name, "qdisc", "add", "dev", "eth0", "root", *shape], check=True)


def own_disk(folder: Path, size: str) -> list[str]:
    """What to put before a command that finds a disk of ``size`` at ``folder``, which other commands do not see."""
    return ["sh", "-c", 'mount -t tmpfs -o size="$0" none "$1" && shift && exec "$@"', size, str(folder)]


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """``count`` hosts; at the end their processes are killed and their networks removed."""
    made = [Host(number) for number in range(count)]
    _remove(made)
    try:
        _ip("netns", "add", SWITCH)
        _ip("-n", SWITCH, "link", "add", "bridge", "type", "bridge")
        _ip("-n", SWITCH, "link", "set", "bridge", "up")
        names = "".join(f"{host.address} {host.name}\n" for host in made)
        for host in made:
            _ip("netns", "add", host.name)
            NAMES.mkdir(exist_ok=True)
            (NAMES / host.name).write_text(f"127.0.0.1 localhost\n{names}")
            port = f"port{host.number}"
            _ip("link", "add", port, "netns", SWITCH, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            _ip("-n", SWITCH, "link", "set", port, "master", "bridge", "up")
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.name, "link", "set", "eth0", "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
        yield made
    finally:
        _remove(made)


def _remove(made: Sequence[Host]) -> None:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    names = {line.split()[0] for line in listed.splitlines() if line.strip()}
    for host in made:
        if host.name in names:
            host.kill()
            _ip("netns", "delete", host.name)
        (NAMES / host.name).unlink(missing_ok=True)
    if SWITCH in names:
        _ip("netns", "delete", SWITCH)


def variables(made: Sequence[Host], number: int, port: int = 29500) -> Mapping[str, str]:
    """What ``launch/torchrun.sh`` needs on a host."""
    return {
        "NNODES": str(len(made)),
        "NODE_RANK": str(number),
        "MASTER_ADDR": made[0].address,
        "MASTER_PORT": str(port),
    }
