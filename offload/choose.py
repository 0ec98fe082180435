"""Chooses what a user left open: the policy, and every number that is to be planned from measured rates and budgets.

A candidate is a policy with shares: none of what could stay, as much as fits, and what the linear program says. What
fits is decided by the bytes that the runtime would take; of what fits, the shortest simulated step wins.
Must not know: models, ranks, devices. The answer depends on its arguments only, so all ranks choose the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from windlass.dist.errors import PlanError
from windlass.offload.compile import build_program
from windlass.offload.costs import best_device_share
from windlass.offload.linear import Problem, solve
from windlass.offload.placement import TIERS, OffloadPlan, Sizes, plan_offload
from windlass.offload.plan_bytes import footprints, gather_buffers, gradients_under_way, slab_bytes
from windlass.offload.policy import POLICIES, OffloadConfig
from windlass.offload.rates import Rates
from windlass.offload.simulate import StepTimeline, simulate
from windlass.offload.workload import Workload, kept_parts

PAPER_SHARE = 0.5  # of updates on the device where rates are not known: every second, as Deep Optimizer States
MOST_RECORDS = 250  # of a simulated step: more are taken together
# Which goes first among equals: what moves least.
ORDER = (
    "none",
    "deep-optimizer-states",
    "zero-offload",
    "superpipeline",
    "mlp-offload",
    "fuyou",
    "zero-infinity",
)


@dataclass(frozen=True)
class Choice:
    """What was chosen; `plan` is None if nothing is offloaded, `seconds` a simulated step where there was a choice."""

    config: OffloadConfig
    plan: OffloadPlan | None
    seconds: float | None = None
    notes: tuple[str, ...] = ()


def choose(
    config: OffloadConfig,
    work: Workload,
    sizes: Sizes,
    rates: Rates,
    budgets: Mapping[str, int] | None = None,
    *,
    drives: bool = True,
) -> Choice:
    """Replace policy auto and every number that is to be planned; without `drives`, auto puts nothing on nvme.

    Units:   bytes of one rank by tier; what is missing or 0 is not known, and does not bind
    Raises:  PlanError if no policy fits: with what each tier needs at least
    """
    if not config.active:
        return Choice(config, None)
    known = {tier: n for tier, n in (budgets or {}).items() if n}
    chooser = _Chooser(config, work, sizes, rates, known, drives)
    return chooser.best() if config.policy == "auto" else chooser.settled(config)


def simulated(config: OffloadConfig, work: Workload, sizes: Sizes, rates: Rates) -> StepTimeline | None:
    """Simulate a step of a settled configuration, many records taken together as one; None if nothing is offloaded."""
    plan = _planned(coarse(config, work), work, sizes)
    return None if plan is None else simulate(build_program(plan, work), rates, comm_per_s=work.comm_per_s)


def coarse(config: OffloadConfig, work: Workload, most: int = MOST_RECORDS) -> OffloadConfig:
    """Return a configuration with larger records, as much of them in slabs, for a simulation of a few of them."""
    records = sum(math.ceil(unit.numel / config.chunk) for unit in work.units if unit.trainable)
    factor = math.ceil(records / most)
    if factor == 1:
        return config
    slabs = max(2, math.ceil(config.slabs / factor))
    return replace(config, chunk=config.chunk * factor, slabs=slabs, cache=max(config.cache, 0) // factor)


def excess(held: Mapping[str, int], budgets: Mapping[str, int]) -> dict[str, int]:
    """Return by tier the bytes by which a plan is over its budget; a missing or zero budget does not bind."""
    return {tier: n - budgets[tier] for tier, n in held.items() if budgets.get(tier) and n > budgets[tier]}


def admit(plan: OffloadPlan, work: Workload, budgets: Mapping[str, int]) -> None:
    """Check a plan against budgets.

    Raises:  PlanError naming every tier that is too small, what the plan takes there, and what no plan can avoid
    """
    held = footprints(plan, work)
    over = excess(held, budgets)
    if over:
        tiers = "; ".join(
            f"{tier}: {held[tier]:,} bytes of {budgets[tier]:,} (offload.{tier}_bytes={held[tier]} holds it)"
            for tier in TIERS
            if tier in over
        )
        raise PlanError(f"offload: the plan does not fit. {tiers}. {least_on_device(plan, work)}")


def least_on_device(plan: OffloadPlan, work: Workload) -> str:
    """Say what the largest part of the model takes on the device while it runs."""
    largest = max(range(len(plan.units)), key=lambda u: plan.units[u].numel)
    numel = plan.units[largest].numel
    whole = numel * work.num_shards * plan.sizes.param * gather_buffers(plan, work).get(numel * work.num_shards, 1)
    grads = numel * plan.sizes.reduce * gradients_under_way(plan, work).get(numel, 1)
    return (
        f"The largest unit, {plan.units[largest].name}, takes {whole:,} bytes for parameters in use or ahead and "
        f"{grads:,} for gradients on the device"
    )


def _planned(config: OffloadConfig, work: Workload, sizes: Sizes) -> OffloadPlan | None:
    return plan_offload(config, work.units, sizes, clips=work.clips, accumulates=work.accumulates)


class _Chooser:
    def __init__(
        self,
        config: OffloadConfig,
        work: Workload,
        sizes: Sizes,
        rates: Rates,
        budgets: Mapping[str, int],
        drives: bool,
    ) -> None:
        self._config, self._work, self._sizes, self._budgets = config, work, sizes, budgets
        self._drives = drives
        self._rates = rates.assumed
        self._unknown = [name for name in rates.unknown if name != "host_memory"]  # nothing is assumed for it

    def settled(self, config: OffloadConfig) -> Choice:
        """Give numbers to what the policy or the user left to be planned."""
        policy = config.resolved()
        notes: list[str] = []
        changes: dict[str, float | int] = {"device_share": policy.device_share, "window": policy.window}
        if policy.device_share < 0 and not config.stride:
            changes["device_share"] = self._device_share(notes)
        changes["device_share"] = max(changes["device_share"], 0.0)
        bare = replace(config, cache=0, **changes)  # type: ignore[arg-type]
        plan = _planned(bare, self._work, self._sizes)
        cache = policy.cache if policy.cache >= 0 else self._cache(plan, notes)
        if plan is None or not cache:
            return Choice(bare, plan, notes=tuple(notes))
        return Choice(replace(bare, cache=cache), replace(plan, cache=cache), notes=tuple(notes))

    def _device_share(self, notes: list[str]) -> float:
        if {"h2d", "cpu_update"} & set(self._unknown):
            notes.append(
                f"offload.device_share={PAPER_SHARE}: the rates of updates and of the link are not known; measure them "
                "with `windlass bench tiers`"
            )
            return PAPER_SHARE
        return round(best_device_share(self._rates), 3)

    def _cache(self, plan: OffloadPlan | None, notes: list[str]) -> int:
        """Return how many records fit into what host memory has left."""
        if plan is None or plan.shadowed:
            return 0
        size = slab_bytes(plan)
        if not size:
            return 0
        if "host" not in self._budgets:
            notes.append("offload.cache=0: the memory of the host is not known; give offload.host_bytes")
            return 0
        records = sum(c.tier == "nvme" for u in plan.units for c in u.chunks)
        return max(0, min(records, (self._budgets["host"] - footprints(plan, self._work)["host"]) // size))

    # -- policy auto -------------------------------------------------------------------------------------------------

    def best(self) -> Choice:
        """Return the candidate with the shortest step of those that fit."""
        found: list[tuple[float, int, Choice]] = []
        least: dict[str, int] = {}
        smallest: OffloadPlan | None = None
        for number, choice in enumerate(self._candidates()):
            held = self._footprints(choice)
            for tier, num_bytes in held.items():
                if tier not in least or num_bytes < least[tier]:
                    least[tier] = num_bytes
                    smallest = choice.plan if tier == "device" and choice.plan is not None else smallest
            if excess(held, self._budgets) or (held["nvme"] and not self._drives):
                continue
            found.append((self._seconds(choice), number, choice))
        if not found:
            raise PlanError(self._nothing_fits(least, smallest))
        # What differs by less than a simulation can tell is equal: then what comes first moves least.
        shortest = min(seconds for seconds, _, _ in found)
        seconds, _, choice = min((f for f in found if f[0] <= 1.005 * shortest), key=lambda f: f[1])
        why = f"offload.policy=auto: {choice.config.policy}, the shortest of {len(found)} plans that fit"
        notes = (why, *self._assumptions(), *choice.notes)
        return replace(choice, seconds=seconds, notes=notes)

    def _assumptions(self) -> list[str]:
        if not self._unknown:
            return []
        return [f"cautious rates were assumed for {', '.join(self._unknown)}: measure them with `windlass bench tiers`"]

    def _footprints(self, choice: Choice) -> dict[str, int]:
        if choice.plan is not None:
            return footprints(choice.plan, self._work)
        sizes, work = self._sizes, self._work
        trained = sum(u.numel for u in work.units if u.trainable)
        params = sum(u.numel * (1 if u.sharded else work.num_shards) for u in work.units) * sizes.param
        states = trained * sizes.master * (sizes.num_states + (0 if sizes.one_copy else 1))
        return {"device": params + trained * sizes.reduce + states, "host": 0, "nvme": 0}

    def _seconds(self, choice: Choice) -> float:
        work = self._work
        if choice.plan is None:
            compute = sum(part.forward_s + part.backward_s for part in work.parts) * work.num_micro_batches
            return compute + self._rates.device_s(sum(u.numel for u in work.units if u.trainable))
        timeline = simulated(choice.config, work, self._sizes, self._rates)
        assert timeline is not None
        return timeline.total_s

    def _candidates(self) -> Iterator[Choice]:
        """Yield every policy with the shares worth trying, once each."""
        assert set(ORDER) == set(POLICIES)
        given = any(
            t not in ("auto", "device") for t in (self._config.param, self._config.grad, self._config.optimizer)
        )
        for name in ORDER:
            if name == "none" and not given and not self._config.table:
                yield Choice(replace(self._config, policy="none", device_share=1.0, cache=0, window=0), None)
                continue
            base = self.settled(replace(self._config, policy=name))
            if base.plan is None:
                continue
            seen = set()
            for host, param in self._shares(base):
                shares = round(math.floor(host * 1000) / 1000, 3), round(math.floor(param * 1000) / 1000, 3)
                if shares not in seen:
                    seen.add(shares)
                    config = replace(self._config, policy=name, host_share=shares[0], param_device_share=shares[1])
                    yield self.settled(config) if shares != (0.0, 0.0) else base

    def _shares(self, base: Choice) -> Iterator[tuple[float, float]]:
        """Yield (records in host memory, parameters on the device): none, what fits, what the linear program says."""
        config, plan = base.config, base.plan
        assert plan is not None
        yield config.host_share, config.param_device_share
        policy = config.resolved()
        held = footprints(plan, self._work)
        free = {tier: self._budgets.get(tier, math.inf) - held[tier] for tier in TIERS}
        states = sum(plan.record_bytes(c) for u in plan.units for c in u.chunks if c.tier == "nvme")
        states *= 2 if plan.shadowed else 1
        params = sum(u.numel for u in plan.units if u.param != "device") * self._sizes.param
        host = _fitting(free["host"], states) if policy.optimizer == "nvme" else 0.0
        param = _fitting(free["device"], params)
        if host or param:
            yield host, 0.0
            yield 0.0, param
            yield host, param
        solution = solve(self._problem(config, plan, free))
        if solution is not None:
            yield min(solution.host, host), min(solution.param_device, param)

    def _problem(self, config: OffloadConfig, plan: OffloadPlan, free: Mapping[str, float]) -> Problem:
        policy, work, sizes = config.resolved(), self._work, self._sizes
        m = work.num_micro_batches
        parts = len(work.parts)
        return Problem(
            params=float(sum(u.numel for u in work.units)),
            forward_s=m * sum(part.forward_s for part in work.parts),
            backward_s=m * sum(part.backward_s for part in work.parts),
            rates=self._rates,
            param_tier=policy.param,
            state_tier=policy.optimizer,
            gradients_leave=policy.grad != "device",
            in_backward=policy.when == "backward",
            fetches=m * (2 * parts - len(kept_parts(work, plan.window))) / max(parts, 1),
            param_bytes=sizes.param,
            reduce_bytes=sizes.reduce,
            state_bytes=sizes.master * (1 + sizes.num_states),
            slots=2 if plan.shadowed else 1,
            device_free=free["device"],
            # What rests there already is counted in the budget: the program adds it again.
            host_free=math.inf if policy.optimizer != "nvme" else max(free["host"], 0.0),
            fixed={"device_update": max(config.device_share, 0.0)},
        )

    def _nothing_fits(self, least: Mapping[str, int], smallest: OffloadPlan | None) -> str:
        tiers = "; ".join(
            f"{tier}: at least {least[tier]:,} bytes, {self._budgets[tier]:,} there"
            for tier in TIERS
            if tier in self._budgets
        )
        tiers += "" if self._drives else "; nvme: nothing, because cluster.nvme_paths is empty"
        part = "" if smallest is None else f" {least_on_device(smallest, self._work)}."
        return (
            f"offload.policy=auto: no policy fits into the budgets of a rank. {tiers} (the least of any policy, not "
            f"of one on all tiers).{part} Raise offload.device_bytes, offload.host_bytes or offload.nvme_bytes, use "
            "more ranks with zero.stage=3, or a smaller offload.chunk"
        )


def _fitting(free: float, wanted: int) -> float:
    """Return the share of something that fits into what is free."""
    return 0.0 if not wanted or free <= 0 else 1.0 if free >= wanted else free / wanted
