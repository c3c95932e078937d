"""How the machines of one run find each other, again after each failure.

On every machine one process starts those of its GPUs. Before each attempt they meet in a store and
tell each other how many processes they start; the first machine also says where its rank 0 will
listen, and whether the run goes on from a checkpoint:

    fixed machines      `--nodes 2 --node-rank 1 --master HOST:PORT`: the store is with machine 0,
                        and the machines may have unequal numbers of GPUs
    any machines        `--nodes 2:4 --rendezvous HOST:PORT`: torch's c10d rendezvous; machines may
                        come and go, each attempt runs with those that are there

A machine that comes back after a failure joins the next attempt. The store is torch's TCPStore; it
holds names and numbers, never tensors.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from nibble.errors import ConfigError, PlacementError
from nibble.launch.environment import DEFAULT_PORT, LOOPBACK, Launch

T = TypeVar("T")
POLL_S = 0.1
FAREWELL_S = 5.0
"""How long the machine with the store waits at the end for the others to leave it."""


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The machines of a run, as a person names them on each one.

    `least` to `most` of them; `rank` is this one's number among fixed ones, None with `meet` at a
    rendezvous. `host`:`port` is where they meet.
    """

    least: int
    most: int
    rank: int | None
    host: str
    port: int


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What the machines agreed on: the first rank here, all ranks, where rank 0 listens."""

    node: int
    num_nodes: int
    first_rank: int
    world: int
    master: str
    port: int
    resume: bool


def read_nodes(
    *, nodes: str | None, node_rank: int | None, master: str | None, rendezvous: str | None
) -> Nodes | None:
    """The machines that the words of a command line name; None when they name none.

    Raises ConfigError for words that do not go together.
    """
    if nodes is None and node_rank is None and master is None and rendezvous is None:
        return None
    if nodes is None:
        raise ConfigError("how many machines? Give --nodes N with --master or --rendezvous")
    first, _, last = nodes.partition(":")
    if not first.isdecimal() or (last and not last.isdecimal()):
        raise ConfigError(f"--nodes {nodes}: give a number, or LEAST:MOST with --rendezvous")
    least, most = int(first), int(last or first)
    if not 1 <= least <= most:
        raise ConfigError(
            f"--nodes {nodes}: give at least one machine, and the smaller number first"
        )
    if (master is None) == (rendezvous is None):
        raise ConfigError(
            "give either --master HOST:PORT with --node-rank, or --rendezvous HOST:PORT"
        )
    if rendezvous is not None:
        if node_rank is not None:
            raise ConfigError("--node-rank goes with --master: at a rendezvous ranks are given out")
        host, port = _address(rendezvous, "--rendezvous")
        return Nodes(least=least, most=most, rank=None, host=host, port=port)
    assert master is not None
    if least != most:
        raise ConfigError(f"--nodes {nodes}: a range of machines needs --rendezvous HOST:PORT")
    if node_rank is None or not 0 <= node_rank < most:
        raise ConfigError(
            f"--node-rank {node_rank}: give this machine's number, from 0 to {most - 1}"
        )
    host, port = _address(master, "--master")
    return Nodes(least=most, most=most, rank=node_rank, host=host, port=port)


def nodes_of(launch: Launch) -> Nodes:
    """The machines on which a launcher started one process each."""
    return Nodes(
        least=launch.world, most=launch.world, rank=launch.rank, host=launch.master,
        port=launch.port,
    )  # fmt: skip


def _address(text: str, word: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon:
        host, port = text, str(DEFAULT_PORT)
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"{word} {text}: give HOST:PORT, such as gpu01:{DEFAULT_PORT}")
    return host.strip("[]"), int(port)


class Meeting:
    """This machine's way to the others; `again` before each attempt, `close` at the end.

    Calls wait for the other machines at most `timeout_s`, look at `stopped` meanwhile (and raise
    KeyboardInterrupt then), and raise PlacementError that says who is missing.
    """

    def __init__(self, nodes: Nodes, *, timeout_s: float, stopped: Callable[[], bool]) -> None:
        self.nodes = nodes
        self._timeout_s = timeout_s
        self._stopped = stopped
        self._store: Any = None
        self._handler: Any = None
        self._node = nodes.rank

    def again(self, *, num_processes: int, resume: bool) -> Attempt:
        """Meet the others for an attempt with this many processes here."""
        where = f"{self.nodes.host}:{self.nodes.port}"
        store, node, num_nodes = self._wait(self._join, f"for the others at {where}")
        self._store, self._node = store, node
        turn = (store.add("arrivals", 1) - 1) // num_nodes
        store.set(f"{turn}/count/{node}", str(num_processes))
        if node == 0:
            here = own_address(self.nodes.host, self.nodes.port)
            told = f"{here} {free_port()} {int(resume)}"
            store.set(f"{turn}/first", told)
        counts = [int(self._get(f"{turn}/count/{i}", f"for machine {i}")) for i in range(num_nodes)]
        master, port, going_on = self._get(f"{turn}/first", "for machine 0").split(" ")
        return Attempt(
            node=node,
            num_nodes=num_nodes,
            first_rank=sum(counts[:node]),
            world=sum(counts),
            master=master,
            port=int(port),
            resume=going_on == "1",
        )

    def others_wait(self) -> bool:
        """Whether machines wait to join (only at a rendezvous): a new attempt can take them in."""
        return self._handler is not None and self._handler.num_nodes_waiting() > 0

    def close(self) -> None:
        """Leave; the machine that holds the store does so last."""
        if self._store is None:
            return
        with suppress(RuntimeError):
            left = self._store.add("left", 1)
            until = time.monotonic() + FAREWELL_S
            while self._node == 0 and left < self.nodes.least and time.monotonic() < until:
                time.sleep(POLL_S)
                left = self._store.add("left", 0)
        if self._handler is not None:
            self._handler.shutdown()
        self._store = None

    def _join(self) -> tuple[Any, int, int]:
        """The store, this machine's number and how many there are."""
        if self.nodes.rank is None:
            return self._rendezvous()
        if self._store is None:
            from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

            self._store = PrefixStore(
                "nibble-machines",
                TCPStore(
                    self.nodes.host,
                    self.nodes.port,
                    None,
                    self.nodes.rank == 0,
                    timedelta(seconds=self._timeout_s),
                    wait_for_workers=False,
                ),
            )
        return self._store, self.nodes.rank, self.nodes.most

    def _rendezvous(self) -> tuple[Any, int, int]:
        if self._handler is None:
            here = _is_here(self.nodes.host)
            try:
                self._handler = self._make_handler(holds_store=here)
            except Exception:  # the library's, of many kinds
                if not here:
                    raise
                # Another process of this machine holds the store already.
                self._handler = self._make_handler(holds_store=False)
        found = self._handler.next_rendezvous()
        return found.store, found.rank, found.world_size

    def _make_handler(self, *, holds_store: bool) -> Any:
        from torch.distributed.elastic.rendezvous import RendezvousParameters
        from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

        nodes = self.nodes
        return get_rendezvous_handler(
            RendezvousParameters(
                backend="c10d",
                endpoint=f"{nodes.host}:{nodes.port}",
                run_id="nibble",
                min_nodes=nodes.least,
                max_nodes=nodes.most,
                local_addr=own_address(nodes.host, nodes.port),
                join_timeout=max(1, int(self._timeout_s)),
                is_host=holds_store,
            )
        )

    def _get(self, key: str, what: str) -> str:
        until = time.monotonic() + self._timeout_s
        try:
            while not self._store.check([key]):
                self._look(until, what)
            return str(self._store.get(key).decode())
        except RuntimeError as error:
            raise PlacementError(
                f"machine {self._node} lost the store at {self.nodes.host}:{self.nodes.port}: the "
                f"machine that holds it has gone ({_first_line(error)})"
            ) from None

    def _wait(self, action: Callable[[], T], what: str) -> T:
        """Do what may block outside of Python in a thread, so that Ctrl-C is heard."""
        done: list[T] = []
        failed: list[Exception] = []

        def work() -> None:
            try:
                done.append(action())
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        until = time.monotonic() + self._timeout_s + 5.0
        while thread.is_alive():
            self._look(until, what)
        if failed:
            raise self._explained(failed[0]) from failed[0]
        return done[0]

    def _look(self, until: float, what: str) -> None:
        if self._stopped():
            raise KeyboardInterrupt
        if time.monotonic() > until:
            raise PlacementError(
                f"waited {self._timeout_s:g} s {what} (place.timeout_s): start the same command "
                "on every machine"
            )
        time.sleep(POLL_S)

    def _explained(self, error: Exception) -> PlacementError:
        text = str(error)
        where = f"{self.nodes.host}:{self.nodes.port}"
        if "EADDRINUSE" in text or "address already in use" in text.lower():
            return PlacementError(f"{where} is taken by another program: choose another port")
        return PlacementError(
            f"the machines of the run did not meet at {where} within {self._timeout_s:g} s: "
            f"{_first_line(error)}"
        )


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    lines = str(cause).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def own_address(host: str, port: int) -> str:
    """The address under which this machine is seen by one that is reached at `host`; sends
    nothing.
    """
    if host in LOOPBACK:
        return "127.0.0.1"
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise PlacementError(f"{host} cannot be reached from here: {error}") from None


def _is_here(host: str) -> bool:
    """Whether `host` is this machine: an address can be bound only where it lives."""
    if host in LOOPBACK:
        return True
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def interface_of(address: str) -> str | None:
    """The network interface that has this IPv4 address, such as eth0; None if none has."""
    get_address = 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with suppress(OSError):
                found = fcntl.ioctl(probe.fileno(), get_address, request)[20:24]
                if socket.inet_ntoa(found) == address:
                    return name
    return None


def with_interface(environment: Mapping[str, str], master: str, port: int) -> dict[str, str]:
    """The environment with the interface for gloo named, unless somebody did.

    Left alone, gloo takes the address that this machine's own name stands for, which on many
    machines is a loopback address that the others cannot reach.
    """
    if "GLOO_SOCKET_IFNAME" in environment:
        return dict(environment)
    name = interface_of(own_address(master, port))
    return {**environment, **({"GLOO_SOCKET_IFNAME": name} if name else {})}
