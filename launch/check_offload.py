"""What the group `offload` must fulfil beyond the range of each key, before anything is built.

Must not know: bytes, which plan comes of it.
"""

from __future__ import annotations

from windlass.dist.errors import ConfigError
from windlass.launch.check_unused import unused
from windlass.launch.job import Loaded, show_value
from windlass.launch.suggest import nearest_key
from windlass.offload.policy import OffloadConfig, Policy

LANES = ("h2d", "d2h", "file read", "file write", "cpu update", "device update")
ALWAYS = ("offload.device_bytes", "offload.tile")  # have an effect whether or not anything is offloaded


def check_offload(loaded: Loaded, *, to_run: bool) -> None:
    """Check the combinations of offload keys with one another and with the rest of the job.

    Raises: ConfigError naming the keys and a value that works
    """
    config = loaded.config.offload
    given = sorted(key for key in loaded.given if key.startswith("offload."))
    _check_tiles(loaded)
    if not config.active:
        for key in given:
            if key not in ALWAYS:
                raise ConfigError(
                    f"{loaded.at(key)}: has no effect with offload.policy = 'none', which offloads nothing. Remove it, "
                    "or choose a policy."
                )
        return
    _check_numbers(loaded, config)
    if config.policy == "auto":
        _check_stage(loaded, "device", "device", config)
        return
    policy = config.resolved()
    rows = config.table
    params = {policy.param, *(row.get("param", "device") for row in rows)}
    grads = {policy.grad, *(row.get("grad", "device") for row in rows)}
    optimizers = {policy.optimizer, *(row.get("optimizer", "device") for row in rows)}
    _check_stage(loaded, _slowest(params), _slowest(grads), config)
    _check_policy(loaded, policy)
    on_nvme = "nvme" in params | grads | optimizers
    if on_nvme and to_run and not loaded.config.cluster.nvme_paths:
        raise ConfigError(
            f"{loaded.at('offload.policy')}: state is to rest on nvme, but cluster.nvme_paths is empty. Give a folder "
            "on a local drive, such as cluster.nvme_paths=[/mnt/nvme], or keep it in host memory: offload.param=host "
            "offload.optimizer=host."
        )
    if not on_nvme:
        for key in ("engine", "io_threads", "checksums", "nvme_bytes", "host_share"):
            unused(loaded, f"offload.{key}", "when nothing rests on nvme")
    if "nvme" not in optimizers:
        for key in ("cache", "host_share"):
            unused(loaded, f"offload.{key}", "when the optimizer does not rest on nvme")
    if optimizers == {"device"} and params == {"device"}:
        for key in ("device_share", "stride", "chunk", "slabs", "update", "clip", "order"):
            unused(loaded, f"offload.{key}", "when the optimizer rests on the device")
    if policy.when == "backward":
        unused(loaded, "offload.order", "when updates begin during backward, as gradients arrive")
    if loaded.config.optimizer.name != "adamw":
        unused(loaded, "offload.adam", f"with optimizer.name = '{loaded.config.optimizer.name}'")
    if config.adam == "deepspeed" and loaded.config.precision.param == "fp64":
        raise ConfigError(f"{loaded.at('offload.adam')}: updates fp32 weights only. Use offload.adam=torch with fp64.")
    if loaded.config.parallelism.pp > 1 and config.lookahead[1] == 0 and config.lookahead[0] > 0:
        raise ConfigError(
            f"{loaded.at('offload.lookahead')}: a pipeline's schedule brings whole stages, and what was read ahead of "
            "them without being copied on could hold all slabs. Use a second number of 1 or more."
        )
    if params == {"device"}:
        for key in ("param_device_share", "lookahead", "window"):
            unused(loaded, f"offload.{key}", "when parameters rest on the device")


def _slowest(tiers: set[str]) -> str:
    return next(tier for tier in ("nvme", "host", "device") if tier in tiers)


def _check_numbers(loaded: Loaded, config: OffloadConfig) -> None:
    nvme, host, gather = config.lookahead
    if not nvme >= host >= gather >= 0:
        raise ConfigError(
            f"{loaded.at('offload.lookahead')}: parameters leave nvme first, then the host, and are gathered last: "
            "the numbers must not rise and not be negative, such as [3, 2, 1]."
        )
    for lane, rate in config.throttle.items():
        if lane not in LANES:
            match = nearest_key(lane, LANES)
            guess = f", did you mean '{match}'?" if match else "."
            raise ConfigError(
                f"offload.throttle = {show_value(config.throttle)}: there is no lane '{lane}'{guess} Lanes: "
                f"{', '.join(LANES)}."
            )
        if rate <= 0:
            raise ConfigError(f"offload.throttle: the rate of '{lane}' is {rate}. Give bytes per second above 0.")
    if config.stride and "offload.device_share" in loaded.given:
        raise ConfigError(
            f"{loaded.at('offload.stride')}: offload.device_share = {config.device_share} says it differently. Give "
            "one of the two."
        )


def _check_tiles(loaded: Loaded) -> None:
    config = loaded.config
    if config.offload.tile and config.zero.stage < 3:
        raise ConfigError(
            f"{loaded.at('offload.tile')}: tiles are gathered one after another, which needs zero.stage = 3; with "
            f"{config.zero.stage} every rank holds whole weights. Use zero.stage=3, or offload.tile=0. With a single "
            "rank it costs nothing."
        )


def _check_stage(loaded: Loaded, param: str, grad: str, config: OffloadConfig) -> None:
    stage = loaded.config.zero.stage
    alone = "With a single rank it costs nothing."
    if param != "device" and stage < 3:
        raise ConfigError(
            f"{loaded.at('offload.policy')}: parameters that rest on {param} are fetched by the rank that owns them, "
            f"which needs zero.stage = 3 (it is {stage}). Use zero.stage=3, or offload.param=device. {alone}"
        )
    if grad != "device" and stage < 2:
        raise ConfigError(
            f"{loaded.at('offload.policy')}: with zero.stage = {stage} gradients stay whole on the device until the "
            f"step is over and cannot rest on {grad}. Use zero.stage=2 or 3, or offload.grad=device. {alone}"
        )
    if stage == 0:
        raise ConfigError(
            f"{loaded.at('offload.policy')}: zero.stage = 0 keeps a copy of all state on every rank, which is not "
            f"worth moving about. Use zero.stage=1 or more. {alone}"
        )


def _check_policy(loaded: Loaded, policy: Policy) -> None:
    if policy.when == "backward" and policy.clip != "speculate":
        raise ConfigError(
            f"{loaded.at('offload.clip')}: updates that begin during backward do not know the norm yet, so a clipped "
            "or non-finite step could not be undone. Use offload.clip=speculate, or offload.update=after."
        )
    if policy.cache > 0 and policy.clip == "speculate":
        raise ConfigError(
            f"{loaded.at('offload.cache')}: with offload.clip = 'speculate' every step ends whole on nvme, so nothing "
            "is kept back. Use offload.host_share for records that stay in host memory for good, or "
            "offload.clip=two_pass."
        )
