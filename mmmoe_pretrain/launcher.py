"""torchrun on this machine, alone or as one of many: ``launch/torchrun.sh`` runs it.

``python -m mmmoe_pretrain.launcher PROCESSES MAX_RESTARTS COMMAND...``, on many machines with the variables NNODES,
NODE_RANK, MASTER_ADDR, MASTER_PORT and JOIN_TIMEOUT of the environment.

torchrun's c10d rendezvous lets machines that are started again join, and restarts all when one fails. What it lacks:
 - A machine's own name often means 127.0.1.1 (Debian, containers), where no other machine is. Here each machine's
   address and interface are those of its route to node 0.
 - Its client of node 0's store waits without a limit where node 0's machine has failed or is cut off. Here a machine
   that has no workers for too long ends.
 - Its errors are tracebacks. Here they are a line.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from mmmoe_pretrain import exit_codes

SIOCGIFADDR = 0x8915
ANYWHERE = "192.0.2.1"  # reserved for documentation (RFC 5737); nothing is sent there
TOLD_EVERY = 30.0  # seconds of waiting
TRY = 5.0  # seconds that a connection may take
MARGIN = 60.0  # seconds more than JOIN_TIMEOUT without workers before a machine ends
PATIENCE = 30.0  # seconds without workers before a machine that was asked to stop ends; torchrun may start some again
MOST_PROCESSES = 1024  # of a machine: torchrun makes lists of them


@dataclass(frozen=True)
class Nodes:
    """The machines of a job, and which of them this one is. ``join``: seconds that they wait for each other."""

    count: int = 1
    rank: int = 0
    host: str = ""  # of node 0
    port: int = 29500
    join: int = 600

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Nodes:
        """Raises ValueError that names the variable and the remedy."""
        count = _number(environment, "NNODES", "the number of machines, e.g. NNODES=2", "1")
        if count == 1:
            return cls()
        if count < 1:
            raise ValueError(f"NNODES is {count}; set it to the number of machines, e.g. NNODES=2")
        rank = _number(
            environment, "NODE_RANK", "the number of this machine: 0 on MASTER_ADDR, 1, 2, ... on the others"
        )
        if rank >= count:
            raise ValueError(f"NODE_RANK is {rank}, and NNODES is {count}: set it to 0 to {count - 1}, once each")
        host = environment.get("MASTER_ADDR", "")
        if not host:
            raise ValueError(
                f"MASTER_ADDR is not set; set it on all {count} machines, to the address of the one with NODE_RANK=0"
            )
        meaning = f"a port that is free on {host}, from 1 to 65535, e.g. MASTER_PORT=29500"
        port = _number(environment, "MASTER_PORT", meaning, "29500")
        if not 1 <= port <= 65535:
            raise ValueError(f"MASTER_PORT is {port}; set it to {meaning}")
        join = _number(environment, "JOIN_TIMEOUT", "a number of seconds, e.g. JOIN_TIMEOUT=600", "600")
        return cls(count, rank, host, port, join)

    @property
    def place(self) -> str:
        return f"node 0 at {self.host}:{self.port}"


def _number(environment: Mapping[str, str], name: str, meaning: str, default: str = "") -> int:
    value = environment.get(name) or default
    if not (value.isascii() and value.isdigit()):  # int takes signs, blanks and underscores
        raise ValueError(f"{name} is {value or 'not set'}; set it to {meaning}")
    return int(value)


def wait_for(nodes: Nodes, stop_file: Path | None) -> bool:
    """Until node 0 listens. False once ``stop_file`` exists. Raises TimeoutError after ``nodes.join`` seconds."""
    begun = told = time.monotonic()
    while not (stop_file is not None and stop_file.exists()):
        try:
            socket.create_connection((nodes.host, nodes.port), timeout=TRY).close()
            return True
        except (OSError, UnicodeError) as error:  # the latter of a name that none can have
            reason = getattr(error, "strerror", None) or str(error)
            if isinstance(error, socket.gaierror):
                reason = f"this machine does not know that name: {reason}"
        now = time.monotonic()
        if now - begun > nodes.join:
            raise TimeoutError(
                f"{nodes.place} does not listen ({reason}), waited {nodes.join} s (JOIN_TIMEOUT); has it "
                f"started, and do MASTER_ADDR, MASTER_PORT and the firewall let this machine reach it?"
            )
        if now - told > TOLD_EVERY:
            told = now
            _say(f"waiting for {nodes.place} ({reason})")
        time.sleep(1.0)
    return False


def own_address(nodes: Nodes) -> str:
    """The address of this machine for the others. Raises ValueError where it has none."""
    try:
        address = _address_towards(nodes.host, nodes.port)
        if nodes.rank == 0 and ip_address(address).is_loopback and nodes.host != "localhost":
            with suppress(OSError):  # its own name means 127.0.1.1; without another network, so be it
                address = _address_towards(ANYWHERE, nodes.port)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"no way from this machine to MASTER_ADDR {nodes.host} ({reason}); set it to an address of node 0 that "
            f"all machines reach"
        ) from error
    return address


def is_own(host: str) -> bool:
    """Whether ``host`` means an address of this machine; one behind which a router translates addresses does not."""
    for family, kind, protocol, _, place in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
        with closing(socket.socket(family, kind, protocol)) as listener, suppress(OSError):
            listener.bind(place)
            return True
    return False


def _address_towards(host: str, port: int) -> str:
    """The address from which this machine sends to ``host``. Connecting a datagram socket sends nothing."""
    family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with closing(socket.socket(family, kind, protocol)) as sender:
        sender.connect(place)
        return str(sender.getsockname()[0])


def interface_of(address: str) -> str:
    """The network interface that has the IPv4 ``address``; empty where none has, and for IPv6."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as asked:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no IPv4 address
                answer = fcntl.ioctl(asked, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return ""


def arguments(nodes: Nodes, processes: int, restarts: int, address: str) -> list[str]:
    """Those of torchrun, before the command."""
    found = ["--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
    found += ["--signals-to-handle", "SIGHUP,SIGQUIT"]  # requests to stop are not its business
    if nodes.count == 1:
        return ["--standalone", *found]
    job = os.environ.get("SLURM_JOB_ID", "mmmoe")
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{nodes.host}:{nodes.port}", "--rdzv-id", job]
    settings = ["--rdzv-conf", f"is_host={int(nodes.rank == 0)},join_timeout={nodes.join}"]
    return ["--nnodes", str(nodes.count), *where, *settings, "--local-addr", address, *found]


class Guard(threading.Thread):
    """Ends this process where it has had no workers for ``seconds``: it waits for a node 0 that does not answer.
    Where it was asked to stop meanwhile, it ends sooner."""

    def __init__(self, nodes: Nodes, seconds: float, tick: float = 5.0) -> None:
        super().__init__(name="guard", daemon=True)
        self._nodes, self._seconds, self._tick = nodes, seconds, tick

    def run(self) -> None:
        alone, worked = 0.0, False
        while alone < self._seconds:
            time.sleep(self._tick)
            working = _has_workers()
            worked = worked or working
            alone = 0.0 if working else alone + self._tick
            if alone and alone % TOLD_EVERY < self._tick:
                _say(f"waits for the other machines of {self._nodes.count}, up to {self._nodes.join} s")
            if alone and _asked_to_stop() and alone >= (PATIENCE if worked else 0.0):
                self._stop()
        code = exit_codes.recorded()
        if code in (exit_codes.DONE, exit_codes.STOPPED):  # this machine's ranks had ended well
            os._exit(exit_codes.DONE)
        _say(f"no answer from {self._nodes.place} for {self._seconds:.0f} s: its machine or the network has failed")
        os._exit(exit_codes.FAULT)

    def _stop(self) -> None:
        if exit_codes.recorded() in (exit_codes.DONE, exit_codes.STOPPED):  # the other machines' ranks had not
            os._exit(exit_codes.DONE)
        _say("asked to stop while it waited for the other machines: there is nothing to save")
        os._exit(exit_codes.STOPPED)


def _asked_to_stop() -> bool:
    path = os.environ.get(exit_codes.STOP_FILE)
    return path is not None and Path(path).exists()


def _has_workers() -> bool:
    """Whether this process has a child that runs: torchrun does not collect those that ended while it waits."""
    own = str(os.getpid())
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:2]
            if parent == own and state != "Z":
                return True
    return False


def _say(text: str) -> None:
    print(f"torchrun.sh: {text}", file=sys.stderr, flush=True)


def launch(nodes: Nodes, processes: int, restarts: int, command: Sequence[str]) -> int:
    """Runs torchrun to its end; its exit code."""
    address = ""
    if nodes.count > 1:
        stop_file = os.environ.get(exit_codes.STOP_FILE)
        if nodes.rank and not wait_for(nodes, Path(stop_file) if stop_file else None):
            return exit_codes.STOPPED
        address = own_address(nodes)
        if nodes.rank == 0 and not is_own(nodes.host):
            _say(f"MASTER_ADDR {nodes.host} is no address of this machine, which has NODE_RANK=0: is it another's?")
        if interface := interface_of(address):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)  # else it asks what this machine's name means
        os.environ[exit_codes.RENDEZVOUS] = f"{nodes.host}:{nodes.port}"
        Guard(nodes, nodes.join + MARGIN).start()

    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import api

    failed = False  # a rank, and not only its wait for other machines
    try:
        torchrun.run(torchrun.parse_args([*arguments(nodes, processes, restarts, address), *command]))
    except ChildFailedError as error:
        failed = True
        rank, failure = error.get_first_failure()
        _say(f"rank {rank} failed with exit code {failure.exitcode}, after {restarts} restarts")
    except api.RendezvousTimeoutError:
        _say(f"not all of {nodes.count} machines joined within {nodes.join} s (JOIN_TIMEOUT)")
    except api.RendezvousClosedError:
        _say("another machine has ended, and its log tells why")
    except api.RendezvousError as error:
        _say(f"{nodes.place}: {_told(error)}")
    except SignalException as error:  # SIGHUP: Ctrl-C twice
        _say(f"ended by {error.sigval.name} without saving")
        return exit_codes.FAULT
    else:
        return exit_codes.DONE
    return exit_codes.STOPPED if _asked_to_stop() and not failed else exit_codes.FAULT


def _told(error: Exception) -> str:
    """A line of torchrun's error; its own says little where another caused it."""
    text = str(error.__cause__ or error) or type(error).__name__
    hint = "; another job has it: set MASTER_PORT to another on all machines" if "EADDRINUSE" in text else ""
    return text.splitlines()[0] + hint


def main(processes: str, restarts: str, *command: str) -> int:
    exit_codes.end_with_parent()
    try:
        if int(processes) > MOST_PROCESSES:
            raise ValueError(f"{processes} processes are too many for a machine; give {MOST_PROCESSES} at most")
        count = _number({"MAX_RESTARTS": restarts}, "MAX_RESTARTS", "a number of restarts, e.g. MAX_RESTARTS=3")
        return launch(Nodes.of(os.environ), int(processes), count, command)
    except (TimeoutError, ValueError) as error:
        _say(str(error))
        return exit_codes.FAULT if isinstance(error, TimeoutError) else exit_codes.USER_ERROR


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
