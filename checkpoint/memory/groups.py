"""Which ranks protect each other: groups over failure domains, planned before anything is sent.

Pure functions of who sits where. Must not know: segments, sockets, how parity is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from windlass.checkpoint.memory.codes import MAX_BLOCKS
from windlass.dist.errors import PlanError

AUTO_GROUP = 8  # members; more save little memory and make a second loss in one group likely
Groups = tuple[tuple[int, ...], ...]


def num_parity(scheme: str, k: int, n: int) -> int:
    """Return how many members a group of n can lose, which is also how many parity blocks each of them holds.

    A group smaller than asked for keeps as much as it can: two members hold copies of each other. Replicas of a group
    that is larger than asked for are coded: it survives the same and takes less memory.
    """
    if scheme == "none" or n < 2:
        return 0
    return 1 if scheme == "xor" else min(k, n - 1)


def memory_factor(scheme: str, k: int, n: int) -> float:
    """Return the bytes of memory that a group of n uses per byte of data."""
    return n / (n - num_parity(scheme, k, n))


def failure_units(nodes: Sequence[str], domains: Mapping[str, str]) -> list[str]:
    """Return for each rank what is lost as one: its failure domain, or its node where there is only one domain."""
    found = [domains.get(node, node) for node in nodes]
    return found if len(set(found)) > 1 else list(nodes)


def cross_units(sets: Iterable[Sequence[int]], nodes: Sequence[str], domains: Mapping[str, str]) -> bool:
    """Tell whether each of these sets of ranks is spread over several units, so that its members can protect it."""
    units = failure_units(nodes, domains)
    return all(len({units[rank] for rank in ranks}) > 1 for ranks in sets)


def plan_groups(
    nodes: Sequence[str],
    domains: Mapping[str, str],
    scheme: str,
    group_size: int = 0,
    k: int = 1,
    *,
    within: Iterable[Sequence[int]] | None = None,
    degraded: bool = False,
) -> Groups:
    """Put every rank in a group; `nodes[r]` is the node of rank r, `domains` the failure domain of a node.

    No two members of a group share a failure domain, and the groups differ in size by at most one. `group_size` 0
    takes as many as there are domains, at most 8; for replica it is k+1. Groups are larger than that where smaller ones
    could not survive the loss of k members: nobody is left over. With `within` no group crosses one of these
    sets of ranks (replicas that can make parity of each other's bytes). `degraded` takes what the domains allow
    instead of raising: for a job that goes on with fewer nodes than it was planned for.

    Raises: PlanError if a group cannot be as large as asked for, with the size that can
    """
    if scheme == "none":
        return tuple((rank,) for rank in range(len(nodes)))
    units = failure_units(nodes, domains)
    groups: list[tuple[int, ...]] = []
    for ranks in [range(len(nodes))] if within is None else within:
        here = [units[rank] for rank in ranks]
        available = len(set(here))
        size = _size(scheme, group_size, k, available, degraded)
        wanted = min(-(-len(here) // size), max(len(here) // _least(scheme, k), 1))
        # Dealt out in the order of domains, the ranks of one domain fall into different groups.
        num_groups = max(wanted, *Counter(here).values())
        order = sorted(ranks, key=lambda rank: (units[rank], rank))
        groups += [tuple(sorted(order[i::num_groups])) for i in range(num_groups)]
    if sorted(rank for group in groups for rank in group) != list(range(len(nodes))):
        raise PlanError(f"redundancy groups within {within}: these sets do not hold each of {len(nodes)} ranks once")
    return tuple(sorted(groups))


def groups_of_replicas(
    nodes: Sequence[str],
    domains: Mapping[str, str],
    replicas: Sequence[Sequence[int]],
    scheme: str,
    group_size: int,
    k: int,
    *,
    degraded: bool,
) -> tuple[Groups, bool]:
    """Put every rank in a group as `plan_groups` does, for a job in which these sets of ranks hold the same state; tell
    too whether they make parity from their own copies, without network. Then no group crosses one of the sets.

    Raises: PlanError as `plan_groups`
    """
    local = scheme == "xor" and cross_units(replicas, nodes, domains)
    within = replicas if local else None
    return plan_groups(nodes, domains, scheme, group_size, k, within=within, degraded=degraded), local


def _least(scheme: str, k: int) -> int:
    """Return the members that a group needs to survive what it is asked to."""
    return 2 if scheme == "xor" else k + 1


def _size(scheme: str, group_size: int, k: int, available: int, degraded: bool) -> int:
    """Return the members of a group, given the number of failure domains."""
    wanted = group_size or (k + 1 if scheme == "replica" else max(min(AUTO_GROUP, available), k + 1))
    least = _least(scheme, k)
    most = MAX_BLOCKS if scheme == "reed_solomon" and k > 1 else wanted  # only the library has a limit
    if degraded or available == 1:  # one failure domain: nothing to choose; `weaknesses` says so
        return max(min(wanted, available, most), 1)
    if wanted > most:
        raise PlanError(
            f"snapshot.group = {group_size} with snapshot.redundancy = '{scheme}' and snapshot.parity = {k}: at most "
            f"{most} members can be coded together. Use snapshot.group = {most} or 0 (auto)."
        )
    if wanted > available:
        raise PlanError(
            f"snapshot.redundancy = '{scheme}' with snapshot.group = {group_size} and snapshot.parity = {k} needs "
            f"groups of {wanted} failure domains, but there are {available}. "
            + (f"Use snapshot.group = {available} or 0 (auto)." if available >= least else _fitting(scheme, available))
        )
    if wanted < least:
        raise PlanError(
            f"snapshot.group = {group_size} with snapshot.redundancy = '{scheme}' and snapshot.parity = {k}: a group "
            f"needs at least {least} members. Use snapshot.group = {least} or 0 (auto)."
        )
    return wanted


def _fitting(scheme: str, available: int) -> str:
    parity = "" if scheme == "xor" else f"snapshot.parity = {available - 1} or "
    return f"Use {parity}at least as many nodes in different failure domains."


def weaknesses(groups: Groups, nodes: Sequence[str], domains: Mapping[str, str], scheme: str, k: int) -> list[str]:
    """Say in sentences what the groups do not protect from, for the log; empty if all is as asked for."""
    if scheme == "none":
        return []
    if len(set(nodes)) == 1:
        return [f"snapshot.redundancy = '{scheme}': all ranks are on node {nodes[0]}; nothing survives its loss"]
    found = []
    if len({domains.get(node, node) for node in nodes}) == 1:
        found.append(
            f"snapshot.redundancy = '{scheme}': all nodes are in the failure domain '{domains.get(nodes[0], nodes[0])}'"
            "; snapshots survive the loss of a node, not of the domain"
        )
    alone = [group[0] for group in groups if len(group) == 1]
    if alone:
        found.append(f"snapshot.redundancy = '{scheme}': no other failure domain is left to protect ranks {alone}")
    wanted = 1 if scheme == "xor" else k
    weak = [group for group in groups if len(group) > 1 and num_parity(scheme, k, len(group)) < wanted]
    if weak:
        found.append(f"snapshot.parity = {k}: groups {weak} are too small and survive {len(weak[0]) - 1} lost members")
    return found
