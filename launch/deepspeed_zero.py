"""How DeepSpeed's sections `zero_optimization` and `aio` become the groups `zero`, `parallelism` and `offload`.

Must not know: files, which keys exist. Source: DeepSpeed 0.19.8, runtime/zero/.
"""

from __future__ import annotations

from windlass.dist.errors import ConfigError
from windlass.launch.deepspeed_translation import DIFFERS, Translation
from windlass.launch.job import show_value

ZERO = "zero_optimization"
PARAM, OPTIMIZER = f"{ZERO}.offload_param", f"{ZERO}.offload_optimizer"
TIERS = {"none": "device", "cpu": "host", "nvme": "nvme"}
WHOLE = 10**9  # DeepSpeed's default sub-group: in practice all that a rank holds
RECORD_BYTES = 12  # master weight and two moments of one parameter in fp32

# (parameters, optimizer state) at rest -> keys under `offload`
PLACES: dict[tuple[str, str], dict[str, str]] = {
    ("device", "device"): {},
    ("device", "host"): {"policy": "zero-offload"},
    ("device", "nvme"): {"policy": "zero-infinity", "param": "device"},
    ("host", "device"): {"param": "host"},
    ("host", "host"): {"policy": "zero-offload", "param": "host"},
    ("host", "nvme"): {"policy": "zero-infinity", "param": "host"},
    ("nvme", "device"): {"param": "nvme"},
    ("nvme", "host"): {"policy": "zero-infinity", "optimizer": "host"},
    ("nvme", "nvme"): {"policy": "zero-infinity"},
}


def zero(t: Translation) -> None:
    """Translate the stage and how it is cut."""
    stage = t.count(f"{ZERO}.stage", 0)
    if stage > 3:
        raise ConfigError(f"{ZERO}.stage = {stage}: must be 0, 1, 2 or 3.")
    t.put(f"{ZERO}.stage", "zero.stage", stage)
    ahead = f"{ZERO}.stage3_prefetch_bucket_size"
    if stage == 3 and t.count(ahead, WHOLE) == 0:
        t.put(ahead, "zero.prefetch", 0, "nothing is gathered ahead")
    elif ahead in t.given:
        t.note(ahead, "zero.prefetch counts units gathered ahead: 1 by default")
    cut = f"{ZERO}.zero_hpz_partition_size"
    group = t.count(cut, 1)
    if stage < 3 or group <= 1:
        if cut in t.given:
            t.note(cut, "parameters are cut over all data-parallel ranks")
    elif not t.world:
        why = f"give --world N: then parallelism.dp_shard={group} and dp_replicate=N/{group}"
        t.note(cut, why, DIFFERS)
    else:
        if t.world % group:
            raise ConfigError(f"{cut} = {group}: must divide the {t.world} ranks.")
        why = "all state is cut within a group and held once per group; DeepSpeed does so with parameters only"
        t.put(cut, "parallelism.dp_shard", group, why, DIFFERS)
        t.put(cut, "parallelism.dp_replicate", t.world // group, "", DIFFERS)


def offload(t: Translation) -> None:
    """Translate where state rests."""
    stage = t.values["zero.stage"]
    param = _tier(t, PARAM, "cpu_offload_param")
    optimizer = _tier(t, OPTIMIZER, "cpu_offload")
    if stage < 3 and param != "device":
        t.note(f"{PARAM}.device", "DeepSpeed, too, offloads parameters with stage 3 only")
        param = "device"
    if stage == 0 and optimizer != "device":
        t.note(f"{OPTIMIZER}.device", "DeepSpeed, too, offloads nothing with stage 0")
        optimizer = "device"
    sources = {"param": _source(t, PARAM, "cpu_offload_param"), "policy": _source(t, OPTIMIZER, "cpu_offload")}
    sources["optimizer"] = sources["policy"]
    for name, value in PLACES[param, optimizer].items():
        t.put(sources[name], f"offload.{name}", value, _place_text(name, value))
    if stage == 1 and optimizer != "device":
        t.put(sources["policy"], "offload.grad", "device", "with stage 1 gradients stay whole until the step is over")
    for key in (f"{PARAM}.device", f"{OPTIMIZER}.device", f"{ZERO}.cpu_offload", f"{ZERO}.cpu_offload_param"):
        if key in t.given and key not in t.seen:
            tier = param if "param" in key else optimizer
            t.note(key, f"at rest on the {tier}" + (": the policy's choice" if tier != "device" else ""))
    if optimizer != "device":
        _updates(t)
    _files(t, {PARAM: param, OPTIMIZER: optimizer})


def _tier(t: Translation, section: str, old: str) -> str:
    device = t.text(f"{section}.device", "none")
    if device not in TIERS:
        raise ConfigError(f"{section}.device = {show_value(device)}: must be none, cpu or nvme.")
    return "host" if t.flag(f"{ZERO}.{old}") and device == "none" else TIERS[device]


def _source(t: Translation, section: str, old: str) -> str:
    return f"{ZERO}.{old}" if t.flag(f"{ZERO}.{old}") else f"{section}.device"


def _place_text(name: str, value: str) -> str:
    texts = {
        "zero-offload": "state in host memory, updated on the CPU",
        "zero-infinity": "state on nvme, updated on the CPU; gradients wait in host memory, not on nvme",
    }
    return texts.get(value, f"{name} at rest on the {value}")


def _updates(t: Translation) -> None:
    """Translate what else the section of the optimizer says, once its state rests elsewhere."""
    ratio_key = f"{OPTIMIZER}.ratio"
    ratio = t.number(ratio_key, 1.0)
    if not 0 <= ratio <= 1:
        raise ConfigError(f"{ratio_key} = {ratio}: must be from 0 to 1, the share updated on the CPU.")
    if ratio < 1:
        why = "1 - ratio (Twin-Flow), spread evenly; the state of that share visits the device instead of staying there"
        t.put(ratio_key, "offload.device_share", round(1 - ratio, 6), why)
    size_key = f"{ZERO}.sub_group_size"
    size = t.count(size_key, WHOLE)
    if 0 < size < WHOLE:
        chunk = max(size, 1024)
        why = f"elements of one record, {chunk * RECORD_BYTES / 1e6:,.0f} MB with AdamW; smaller ones overlap better"
        t.put(size_key, "offload.chunk", chunk, why)
    elif size_key in t.given:
        t.note(size_key, "all at once there; here records of offload.chunk elements, so that moves overlap updates")
    count_key = f"{OPTIMIZER}.buffer_count"
    slabs = -(-t.count(count_key, 4) // 4)
    if slabs > 4:
        t.put(count_key, "offload.slabs", slabs, "one slab is a whole record: four of DeepSpeed's buffers")
    elif count_key in t.given:
        t.note(count_key, "offload.slabs = 4 whole records, each of the size of four of DeepSpeed's buffers")
    if t.text("optimizer.type").lower() in ("cpuadam", "deepspeedcpuadam"):
        t.put(
            "optimizer.type", "offload.adam", "deepspeed", "built on the first use; offload.adam=torch needs no build"
        )


def _files(t: Translation, tiers: dict[str, str]) -> None:
    paths: dict[str, str] = {}
    for section, tier in tiers.items():
        key = f"{section}.nvme_path"
        if tier == "nvme":
            path = t.text(key)
            if not path:
                raise ConfigError(f"{section}.device = 'nvme': {section}.nvme_path is missing. Give the folder to use.")
            paths.setdefault(path.rstrip("/") or "/", key)
        elif key in t.given:
            t.note(key, f"nothing of it rests on nvme ({section}.device)")
    if paths:
        why = "must exist on every host: a misspelt folder is an error, not a new folder"
        t.put(next(iter(paths.values())), "cluster.nvme_paths", list(paths), why)
        for section, tier in tiers.items():
            if tier == "nvme" and f"{section}.nvme_path" not in t.seen:
                t.note(f"{section}.nvme_path", "cluster.nvme_paths: all state is spread over all paths")
    if "aio.use_gds" in t.given:
        if t.flag("aio.use_gds") and paths:
            t.put("aio.use_gds", "offload.engine", "gds", "GPUDirect Storage")
        else:
            t.note("aio.use_gds", "offload.engine = threads")
