"""At which address a host tells the others that it can be reached, with hosts that are played; how ranks meet."""

from __future__ import annotations

import socket
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from windlass.dist import rendezvous
from windlass.dist.env import ProcessEnv
from windlass.dist.errors import CommError
from windlass.dist.rendezvous import Facts, address_for_peers, meet

Address = namedtuple("Address", "family address")
OURS = {
    "lo": [Address(socket.AF_INET, "127.0.0.1")],
    "eth0": [Address(socket.AF_PACKET, "02:42:00:00:00:01"), Address(socket.AF_INET, "10.0.0.5")],
    "ib0": [Address(socket.AF_INET, "10.1.0.5"), Address(socket.AF_INET6, "fe80::1%ib0")],
    "down0": [Address(socket.AF_PACKET, "02:42:00:00:00:02")],
}
HERE = ["the network of this host", "10.0.0.5", ""]
THERE = ["another one", "10.0.0.7", ""]


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Play a host; return its routes, which a test may change."""
    routes = {"node-a": "10.0.0.5", "10.0.0.7": "10.0.0.5", "myself": "127.0.1.1"}

    def towards(target: str, port: int = 1) -> str:
        if target not in routes:
            raise socket.gaierror(f"no route to {target}")
        return routes[target]

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(rendezvous, "_address_towards", towards)
    monkeypatch.setattr(rendezvous, "network_key", lambda: HERE[0])
    monkeypatch.setattr("psutil.net_if_addrs", lambda: OURS)
    return routes


def found(master: str, *others: list[str], problems: tuple[str, ...] = ()) -> str:
    """Return what rank 0 finds beside these other ranks."""
    env = ProcessEnv(0, 0, 1 + len(others), 1, 0, master_addr=master, master_port=29500, launcher="torchrun")
    rounds = iter([list(others), list(problems) or [""] * len(others)])

    def gather(mine: Any) -> list[Any]:
        return [mine, *next(rounds)]

    return address_for_peers(env, gather)


def test_on_one_host_any_address_will_do_also_with_several_emulated_nodes() -> None:
    assert found("myself", HERE, HERE) == ""


def test_between_hosts_it_is_the_address_on_the_way_to_rank_0() -> None:
    assert found("node-a", THERE) == "10.0.0.5"


def test_a_host_whose_own_name_is_a_loopback_address_asks_for_the_way_to_another_host() -> None:
    assert found("myself", THERE) == "10.0.0.5"


def test_the_interface_that_the_user_names_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert found("node-a", THERE) == "10.1.0.5"


@pytest.mark.parametrize("name", ["eth7", "down0", "lo"])
def test_an_interface_that_leads_nowhere_is_an_error_that_names_those_there_are(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", name)
    with pytest.raises(CommError, match=rf"GLOO_SOCKET_IFNAME={name} on .*down0, eth0, ib0, lo"):
        found("node-a", THERE)


def test_where_nothing_tells_the_error_names_what_to_set(host: dict[str, str]) -> None:
    with pytest.raises(CommError, match=r"knows itself as myself only.*Set GLOO_SOCKET_IFNAME"):
        found("myself", ["another one", "", "it has none either"])
    host.clear()
    with pytest.raises(CommError, match="Set GLOO_SOCKET_IFNAME"):
        found("", THERE)


def test_what_another_rank_cannot_find_is_an_error_on_every_rank() -> None:
    with pytest.raises(CommError, match="node-b knows itself as localhost only"):
        found("node-a", THERE, problems=("node-b knows itself as localhost only",))


def test_the_real_routing_table_gives_an_address_of_this_host() -> None:
    env = ProcessEnv(0, 0, 1, 1, 0, master_addr="127.0.0.1", master_port=29500, launcher="torchrun")
    assert address_for_peers(env, lambda mine: [mine]) == ""


# -- meeting in a store that an earlier attempt has used ---------------------------------------------------------------


def attempt(store: Any, number: int, ranks: list[int], timeout_s: float = 60.0) -> list[tuple[list[Facts], Any]]:
    """Have ranks of a world of three meet, each a little after the one before it."""

    def come(rank: int) -> tuple[list[Facts], Any]:
        env = ProcessEnv(rank, rank, 3, 3, 0, master_addr="127.0.0.1", master_port=1, launcher="torchrun")
        mine = Facts(rank, "host", "host", 7, "cpu", "auto", f"address {number} of rank {rank}", "")
        return meet(stores[rank], env, mine, timeout_s)

    stores = {rank: store() for rank in ranks}
    with ThreadPoolExecutor(3) as pool:
        waiting = [(pool.submit(come, rank), time.sleep(0.05))[0] for rank in ranks]
        return [future.result() for future in waiting]


@pytest.fixture
def tcp_store() -> Iterator[Callable[[], Any]]:
    server = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
    yield lambda: dist.TCPStore("127.0.0.1", server.port, None, False, timedelta(seconds=60))


@pytest.mark.parametrize("came", [[0, 1, 2], [0, 1], [1, 2], [2]])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]])
def test_nothing_that_an_earlier_attempt_has_left_in_the_store_is_believed(
    tcp_store: Callable[[], Any], came: list[int], order: list[int]
) -> None:
    if came == [0, 1, 2]:
        attempt(tcp_store, 1, came)
    else:
        with pytest.raises(CommError, match="did not form"):
            attempt(tcp_store, 1, came, timeout_s=0.7)
    for number in (2, 3):
        met = attempt(tcp_store, number, order)
        expected = [f"address {number} of rank {rank}" for rank in range(3)]
        assert all([f.shm_address for f in facts] == expected for facts, _ in met)
        met[0][1].set("key", str(number))
        assert [here.get("key").decode() for _, here in met] == [str(number)] * 3


def test_the_ranks_that_do_not_come_are_named(tcp_store: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous.secrets, "token_hex", lambda num_bytes: "now")
    dist.PrefixStore("now", tcp_store()).set("facts/1", "rank 1 is here, before the time of rank 0 begins")
    with pytest.raises(CommError, match=r"missing ranks \[2\]"):
        attempt(tcp_store, 1, [0], timeout_s=0.7)
