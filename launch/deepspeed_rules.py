"""How the keys of a DeepSpeed configuration become keys of a job, section by section.

DeepSpeed's defaults are written into the job where they differ from ours, so that leaving a key out there and importing
means the same. Must not know: files, which keys exist. Source: DeepSpeed 0.19.8, runtime/config.py, runtime/engine.py,
runtime/lr_schedules.py, runtime/zero/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from windlass.dist.errors import ConfigError
from windlass.launch.deepspeed_translation import DIFFERS, FILLED, MISSING, Translation
from windlass.launch.deepspeed_zero import offload, zero
from windlass.launch.job import TrainConfig, show_value

CPU_ADAM = ("cpuadam", "deepspeedcpuadam")
OPTIMIZERS = {"adam": "adamw", "adamw": "adamw", "fusedadam": "adamw", **dict.fromkeys(CPU_ADAM, "adamw"), "sgd": "sgd"}
DTYPES = {
    **dict.fromkeys(("fp32", "float32", "float", "torch.float32"), "fp32"),
    **dict.fromkeys(("bf16", "bfloat16", "torch.bfloat16"), "bf16"),
    **dict.fromkeys(("fp16", "float16", "half", "torch.float16"), "fp16"),
}
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def check_optimizer_type(config: Mapping[str, Any]) -> None:
    """Refuse an optimizer that a job cannot have.

    Raises: ConfigError
    """
    section = config.get("optimizer")
    name = section.get("type") if isinstance(section, Mapping) else None
    if name is None or str(name).lower() in OPTIMIZERS:
        return
    match = get_close_matches(str(name), ["AdamW", "Adam", "SGD"], n=1)
    raise ConfigError(
        f"optimizer.type = {show_value(name)}: a job has optimizer.name = adamw or sgd"
        + (f", did you mean '{match[0]}'?" if match else ".")
        + " Use AdamW, Adam or SGD with the parameters that go with it."
    )


# -- batch -------------------------------------------------------------------------------------------------------------


def _ranks(t: Translation) -> None:
    ranks = t.count("data_parallel_size", 0)
    if ranks and t.world and ranks != t.world:
        raise ConfigError(f"data_parallel_size = {ranks}: --world says {t.world}. Leave one of the two out.")
    t.world = t.world or ranks


def _batch(t: Translation) -> None:
    """train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x data-parallel ranks."""
    total_key, micro_key, steps_key = BATCH
    total, micro = t.count(total_key, least=1), t.count(micro_key, least=1)
    steps = t.count(steps_key, least=1) if t.has(steps_key) or total is None else None
    if total is None and micro is None:
        raise ConfigError(
            f"neither {total_key} nor {micro_key} is given, without which DeepSpeed does not start. Give one of them."
        )
    if micro is None:
        if not t.world:
            raise ConfigError(
                f"{total_key} = {total}: without {micro_key} the rows per rank follow from the number of ranks. "
                "Give it with --world N."
            )
        micro = total // (t.world * (steps or 1))
        if micro * t.world * (steps or 1) != total:
            raise ConfigError(_batch_text(total, max(micro, 1), steps or 1, t.world))
        t.put(total_key, "train.micro_batch", micro, f"{total} / ({steps or 1} accumulated x {t.world} ranks)")
    else:
        t.put(micro_key, "train.micro_batch", micro)
    if total is None:
        _total_from_parts(t, micro, steps)
        return
    if steps is not None and not t.world:
        t.world = total // (micro * steps)
    if total % (micro * (steps or 1) * max(t.world, 1)) or (steps and total != micro * steps * t.world):
        raise ConfigError(_batch_text(total, micro, steps or 1, t.world))
    t.put(total_key, "train.global_batch", total, "sequences per step over all ranks")
    if steps_key in t.given:
        count = f": {steps} x {micro} x {t.world} ranks = {total}" if steps else ""
        t.note(steps_key, f"follows from train.global_batch{count}")


def _total_from_parts(t: Translation, micro: int, steps: int | None) -> None:
    total_key, _, steps_key = BATCH
    if steps in (None, 1):
        t.derive(total_key, "train.global_batch", 0, "micro_batch x data-parallel ranks, without accumulation")
        if steps_key in t.given:
            t.note(steps_key, "no accumulation: train.global_batch is one micro-batch per rank")
    elif t.world:
        why = f"{micro} x {steps} accumulated x {t.world} ranks"
        t.derive(steps_key, "train.global_batch", micro * int(steps or 1) * t.world, why)
        if total_key in t.given:
            t.note(total_key, "auto: the product of the others")
    else:
        raise ConfigError(
            f"{steps_key} = {steps}: a job says sequences per step over all ranks (train.global_batch), so the number "
            "of data-parallel ranks is needed. Give it with --world N."
        )


def _batch_text(total: int, micro: int, steps: int, world: int) -> str:
    unit = micro * steps * max(world, 1)
    below = total // unit * unit
    legal = f"{below} or {below + unit}" if below else str(unit)
    return (
        f"{BATCH[0]} = {total}: must be {BATCH[1]} x {BATCH[2]} x ranks = {micro} x {steps} x {max(world, 1)} = {unit}"
        f"{' or a multiple' if not world else ''}. Use {legal}."
    )


def _workers(t: Translation) -> None:
    stages = t.count("pipeline.stages", 1, least=1)
    if stages > 1:
        t.put("pipeline.stages", "parallelism.pp", stages, "blocks are cut evenly, see docs/pipelines.md")
    elif "pipeline.stages" in t.given:
        t.note("pipeline.stages", "no pipeline: parallelism.pp = 1")
    if max(t.world, 1) * stages > 1:
        why = "of this machine; on several hosts torchrun or Ray bring their own number"
        t.derive("data_parallel_size", "launch.workers", max(t.world, 1) * stages, why)


# -- optimizer and schedule --------------------------------------------------------------------------------------------


def _clipping(t: Translation) -> None:
    why = "1.0 since DeepSpeed's pull request 8068 of June 2026; in earlier releases 0, which is off"
    limit = t.number("gradient_clipping", 1.0)
    t.put("gradient_clipping", "optimizer.clip_norm", float(limit), "" if "gradient_clipping" in t.given else why)


def _optimizer(t: Translation) -> None:
    params = "optimizer.params"
    kind = t.text("optimizer.type").lower()
    if not kind:
        t.note("optimizer", "made by the training script: set optimizer.lr, betas, weight_decay as it does", FILLED)
        return
    name = OPTIMIZERS[kind]
    coupled = kind == "adam" and f"{params}.adam_w_mode" in t.given and not t.flag(f"{params}.adam_w_mode")
    # torch's AdamW, which torch_adam asks for, is the only one that decays by default.
    decay = t.number(f"{params}.weight_decay", 0.01 if t.flag(f"{params}.torch_adam") and not coupled else 0.0)
    why = "DeepSpeed's Adam is AdamW unless adam_w_mode is false" if kind == "adam" else ""
    t.put("optimizer.type", "optimizer.name", name, why)
    t.put(f"{params}.lr", "optimizer.lr", float(t.number(f"{params}.lr", 1e-3)))
    if name == "adamw":
        betas = t.given.get(f"{params}.betas")
        if betas in (None, "auto"):
            betas = (0.9, 0.999)
        if not (
            isinstance(betas, (list, tuple)) and len(betas) == 2 and all(isinstance(b, (int, float)) for b in betas)
        ):
            raise ConfigError(f"{params}.betas = {show_value(betas)}: must be two numbers, as in [0.9, 0.999].")
        t.put(f"{params}.betas", "optimizer.betas", list(betas))
        t.put(f"{params}.eps", "optimizer.eps", float(t.number(f"{params}.eps", 1e-8)))
    else:
        t.put(f"{params}.momentum", "optimizer.momentum", float(t.number(f"{params}.momentum", 0.0)))
    only = "of tensors with two or more dims, which is how the Trainer groups them; DeepSpeed takes the script's groups"
    t.put(f"{params}.weight_decay", "optimizer.weight_decay", float(decay), only if decay else "")
    if f"{params}.adam_w_mode" in t.given:
        if coupled and decay:
            t.note(f"{params}.adam_w_mode", "weight decay is decoupled here (AdamW), not part of the gradient", DIFFERS)
        else:
            t.note(f"{params}.adam_w_mode", "optimizer.name = adamw")


def _schedule(t: Translation) -> None:
    kinds = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
    name = t.text("scheduler.type")
    if not name:
        why = "no scheduler here: DeepSpeed keeps the rate, unless the script brings its own (the Trainer: linear)"
        t.put("scheduler.type", "lr_scheduler.kind", "constant", why, FILLED)
        return
    if name not in kinds:
        match = get_close_matches(name, kinds, n=1, cutoff=0.8)
        if match:
            raise ConfigError(f"scheduler.type = {show_value(name)}: no such schedule, did you mean '{match[0]}'?")
        t.put("scheduler.type", "lr_scheduler.kind", "constant", "no such shape; see lr_scheduler.kind", MISSING)
        return
    t.put("scheduler.type", "lr_scheduler.kind", kinds[name], "after the warm-up")
    if name == "WarmupDecayLR":
        t.put("scheduler.type", "lr_scheduler.min_ratio", 0.0, "it decays to 0")
    if name == "WarmupCosineLR":
        floor = t.number("scheduler.params.cos_min_ratio", 1e-4)
        t.put("scheduler.params.cos_min_ratio", "lr_scheduler.min_ratio", float(floor))
    _warmup(t, name)
    _peak(t, name)


def _warmup(t: Translation, name: str) -> None:
    key, total_key = "scheduler.params.warmup_num_steps", "scheduler.params.total_num_steps"
    steps = t.count(key, 1000)
    behind = "DeepSpeed's rate is two steps behind: it starts at 0, twice" if steps > 1 else ""
    t.put(key, "lr_scheduler.warmup_steps", steps, behind)
    if steps > 1 and t.text("scheduler.params.warmup_type", "log") != "linear":
        t.note(
            "scheduler.params.warmup_type", "the warm-up is linear here; DeepSpeed's default is logarithmic", DIFFERS
        )
    elif "scheduler.params.warmup_type" in t.given:
        t.note("scheduler.params.warmup_type", "the warm-up is always linear")
    for start in ("warmup_min_lr", "warmup_min_ratio"):
        if t.number(f"scheduler.params.{start}", 0):
            t.note(f"scheduler.params.{start}", "the warm-up begins at peak / warmup_steps", DIFFERS)
        elif f"scheduler.params.{start}" in t.given:
            t.note(f"scheduler.params.{start}", "the warm-up begins at peak / warmup_steps, next to nothing")
    total = t.count(total_key, least=1)
    if total is not None:
        t.put(total_key, "train.steps", total)
    elif steps >= TrainConfig().steps:
        why = "how long the run is is not said: ten warm-ups, set it as you need"
        t.put(total_key, "train.steps", 10 * steps, why, FILLED)
    elif total_key in t.given:
        t.note(total_key, "auto: the Trainer's number of steps; set train.steps", FILLED)


def _peak(t: Translation, name: str) -> None:
    key, own = "scheduler.params.warmup_max_lr", "optimizer.params.lr"
    peak = t.number(key, None if name != "WarmupDecayLR" else 1e-3)
    if name == "WarmupCosineLR" or peak is None:
        return
    if t.given.get(key) == "auto" and t.has(own):
        t.note(key, "auto: optimizer.params.lr", FILLED)
        return
    why = f"the schedule's peak replaces {own}" if t.has(own) and t.number(own) != peak else ""
    t.put(key, "optimizer.lr", float(peak), why)


# -- number formats ----------------------------------------------------------------------------------------------------


def _precision(t: Translation) -> None:
    bf16, fp16 = t.flag("bf16.enabled"), t.flag("fp16.enabled")
    if bf16 and fp16:
        raise ConfigError("bf16.enabled and fp16.enabled: DeepSpeed takes one of the two. Set fp16.enabled to false.")
    if bf16:
        t.put("bf16.enabled", "precision.param", "bf16", "master weights and moments stay fp32")
    elif fp16:
        why = "fp16 and its loss scaling are not there; bf16 has the range of fp32"
        t.put("fp16.enabled", "precision.param", "bf16", why, DIFFERS)
    elif t.flag("torch_autocast.enabled"):
        why = "all of compute in bf16 with fp32 master weights, instead of chosen operators"
        t.put("torch_autocast.enabled", "precision.param", "bf16", why, DIFFERS)
    else:
        asked = next((k for k in ("bf16.enabled", "fp16.enabled") if k in t.given), "bf16.enabled")
        auto = "with --bf16 there, set precision.param=bf16 here" if t.given.get(asked) == "auto" else ""
        t.put(asked, "precision.param", "fp32", auto)
    _reduce(t, low=t.values["precision.param"] == "bf16")
    for key in ("bf16.enabled", "fp16.enabled", "torch_autocast.enabled"):
        if key in t.given and key not in t.seen:
            t.note(key, f"precision.param = {t.values['precision.param']}")


def _reduce(t: Translation, low: bool) -> None:
    """DeepSpeed keeps and moves gradients in two formats, each by default that of the parameters."""
    keys = ("data_types.grad_accum_dtype", "communication_data_type")
    names = {key: t.text(key, "") for key in keys}
    for key, name in names.items():
        if name and name not in DTYPES:
            raise ConfigError(f"{key} = {show_value(name)}: must be one of fp32, bf16, fp16.")
    formats = {key: DTYPES[name] if name else "bf16" if low else "fp32" for key, name in names.items()}
    wide = "fp32" in formats.values() if low else list(formats.values()) == ["fp32", "fp32"]
    reduce = "fp32" if wide else "bf16"
    source = next((key for key in keys if names[key]), keys[0])
    if low or any(names.values()):
        exact = all(f in (reduce, "fp16" if low else reduce) for f in formats.values())
        why = "gradients are kept and moved in one format, summed in fp32"
        if low and reduce == "bf16" and not any(names.values()):
            why += "; precision.reduce=fp32 is more exact and twice the bytes"
        t.put(source, "precision.reduce", reduce, why, "" if exact or reduce == "fp32" else DIFFERS)
    for key in keys:
        if key in t.given and key not in t.seen:
            t.note(key, f"precision.reduce = {reduce}: one format for keeping and moving gradients")


# -- activations and reports -------------------------------------------------------------------------------------------


def _activations(t: Translation) -> None:
    group = "activation_checkpointing"
    switches = [f"{group}.{name}" for name in ("partition_activations", "contiguous_memory_optimization")]
    used = [key for key in switches if t.flag(key)]
    if t.count(f"{group}.number_checkpoints", 0):
        used.append(f"{group}.number_checkpoints")
    if t.flag(f"{group}.cpu_checkpointing"):
        used.append(f"{group}.cpu_checkpointing")
        t.note(used[-1], "the inputs of blocks stay on the device", MISSING)
    every = t.count("pipeline.activation_checkpoint_interval", 0)
    if every:
        t.put("pipeline.activation_checkpoint_interval", "activation.policy", "recompute")
        if every > 1:
            why = "one block in so many is recomputed; DeepSpeed recomputes all, in runs of so many"
            t.put("pipeline.activation_checkpoint_interval", "activation.every", every, why, DIFFERS)
    elif used:
        t.put(used[0], "activation.policy", "recompute", "the model that uses this section recomputes its blocks")
    for key in (*switches, f"{group}.number_checkpoints", "pipeline.activation_checkpoint_interval"):
        if key in t.given and key not in t.seen:
            policy = t.values.get("activation.policy", "keep")
            what = "set recompute if the model calls deepspeed.checkpointing" if policy == "keep" else "block by block"
            t.note(key, f"activation.policy = {policy}: {what}")


def _reports(t: Translation) -> None:
    every = t.number("steps_per_print")
    if every is not None:
        last = every == float("inf")
        shown = max(t.values.get("train.steps", TrainConfig().steps), 1) if last else t.count("steps_per_print")
        t.put(
            "steps_per_print", "metrics.log_every", max(shown, 1), "never: only the first and last step" if last else ""
        )
    elif "steps_per_print" in t.given:
        t.note("steps_per_print", "metrics.log_every = 1", FILLED)
    if "tensorboard.enabled" in t.given:
        t.put("tensorboard.enabled", "metrics.tensorboard", t.flag("tensorboard.enabled"))
    if t.flag("flops_profiler.enabled"):
        step = t.count("flops_profiler.profile_step", 1, least=1)
        t.put("flops_profiler.profile_step", "profiler.start_step", step, "recorded with its operators into RUN/traces")
        t.put("flops_profiler.profile_step", "profiler.num_steps", 1)
        t.note("flops_profiler.enabled", "profiler.start_step > 0")
    else:
        for key in ("flops_profiler.enabled", "flops_profiler.profile_step"):
            if key in t.given:
                t.note(key, "profiler.start_step = 0: nothing is recorded")
    if t.has("vocabulary_size"):
        t.put("vocabulary_size", "model.vocab_size", t.count("vocabulary_size", least=1))


# In this order: the number of ranks and the stage are needed by what follows.
RULES: tuple[Callable[[Translation], None], ...] = (
    _ranks,
    _batch,
    _workers,
    zero,
    offload,
    _clipping,
    _optimizer,
    _schedule,
    _precision,
    _activations,
    _reports,
)
