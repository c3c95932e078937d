"""Machines that meet, played by processes of one machine."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from typing import Any

import pytest

from nibble.errors import ConfigError, PlacementError
from nibble.launch.meeting import (
    Meeting,
    Nodes,
    free_port,
    interface_of,
    own_address,
    read_nodes,
    with_interface,
)

WORDS: dict[str, Any] = {"nodes": None, "node_rank": None, "master": None, "rendezvous": None}


def nodes(**words: Any) -> Nodes | None:
    return read_nodes(**{**WORDS, **words})


def test_machines_are_read_from_words() -> None:
    assert nodes() is None
    assert nodes(nodes="2", node_rank=1, master="a:5") == Nodes(
        least=2, most=2, rank=1, host="a", port=5
    )
    assert nodes(nodes="2:4", rendezvous="a") == Nodes(
        least=2, most=4, rank=None, host="a", port=29500
    )
    assert nodes(nodes="2", rendezvous="[::1]:7") == Nodes(
        least=2, most=2, rank=None, host="::1", port=7
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"master": "a:1"}, "how many machines"),
        ({"nodes": "two"}, "give a number"),
        ({"nodes": "0", "rendezvous": "a"}, "at least one"),
        ({"nodes": "3:2", "rendezvous": "a"}, "the smaller number first"),
        ({"nodes": "2"}, "either --master"),
        ({"nodes": "2", "master": "a", "rendezvous": "a"}, "either --master"),
        ({"nodes": "2", "master": "a"}, "from 0 to 1"),
        ({"nodes": "2", "master": "a", "node_rank": 2}, "--node-rank 2"),
        ({"nodes": "1:2", "master": "a", "node_rank": 0}, "a range of machines needs"),
        ({"nodes": "2", "rendezvous": "a", "node_rank": 0}, "--node-rank goes with --master"),
        ({"nodes": "2", "rendezvous": "a:port"}, "give HOST:PORT"),
        ({"nodes": "2", "rendezvous": "a:99999"}, "give HOST:PORT"),
    ],
)
def test_words_that_do_not_go_together(words: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        nodes(**words)


PROGRAM = """
import json, sys
from dataclasses import asdict
from nibble.launch.meeting import Meeting, Nodes
words = json.loads(sys.argv[1])
counts = words.pop("counts")
meeting = Meeting(Nodes(**words), timeout_s=30, stopped=lambda: False)
print(json.dumps([asdict(meeting.again(num_processes=n, resume=i == 1)) for i, n in
                  enumerate(counts)]))
meeting.close()
"""


def meet(*machines: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Attempts of each machine; all start together."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(machine)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for machine in machines
    ]  # fmt: skip
    told = []
    for process in started:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        told.append(json.loads(out.strip().splitlines()[-1]))
    return told


@pytest.mark.dist
@pytest.mark.parametrize("fixed", [True, False])
def test_machines_agree_twice(fixed: bool) -> None:
    """With unequal numbers of GPUs, and again after a failure, going on from a checkpoint."""
    port = free_port()
    base = {"least": 2, "most": 2, "host": "127.0.0.1", "port": port}
    first, second = meet(
        {**base, "rank": 0 if fixed else None, "counts": [3, 3]},
        {**base, "rank": 1 if fixed else None, "counts": [1, 1]},
    )
    for attempt, (a, b) in enumerate(zip(first, second, strict=True)):
        assert {a["node"], b["node"]} == {0, 1}
        assert not fixed or a["node"] == 0
        assert a["world"] == b["world"] == 4
        assert {a["first_rank"], b["first_rank"]} == ({0, 3} if a["node"] == 0 else {0, 1})
        assert (a["master"], a["port"]) == (b["master"], b["port"])
        assert a["master"] == "127.0.0.1" and a["port"] != port
        assert a["resume"] == b["resume"] == (attempt == 1)
    assert first[0]["port"] != first[1]["port"], "nothing of a failed attempt is in the way"


def lonely(port: int, *, timeout_s: float = 0.5, stopped: bool = False) -> Meeting:
    words = Nodes(least=2, most=2, rank=0, host="127.0.0.1", port=port)
    return Meeting(words, timeout_s=timeout_s, stopped=lambda: stopped)


@pytest.mark.dist
def test_who_does_not_come_is_named() -> None:
    with pytest.raises(PlacementError, match=r"waited 0.5 s for machine 1 .*the same command"):
        lonely(free_port()).again(num_processes=1, resume=False)
    with pytest.raises(KeyboardInterrupt):
        lonely(free_port(), timeout_s=60, stopped=True).again(num_processes=1, resume=False)


@pytest.mark.dist
def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PlacementError, match=f"127.0.0.1:{port} is taken by another program"):
            lonely(port).again(num_processes=1, resume=False)


def test_addresses_and_interfaces() -> None:
    assert own_address("localhost", 1) == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.9") is None
    assert with_interface({}, "localhost", 1) == {"GLOO_SOCKET_IFNAME": "lo"}
    assert with_interface({"GLOO_SOCKET_IFNAME": "ib0"}, "localhost", 1) == {
        "GLOO_SOCKET_IFNAME": "ib0"
    }
    with pytest.raises(PlacementError, match=r"nowhere\.invalid cannot be reached"):
        own_address("nowhere.invalid", 1)
