"""What a job must fulfil beyond the type of each key: ranges, combinations, settings that would have no effect.

All of it happens before any process starts, and every message names the keys and a value that works.
Deliberately allowed: `precision.reduce=bf16` with fp32 parameters (lossy in the sums, halves the gradient bytes), and
`train.seq_len` beyond `model.max_seq_len` with rotary positions (they extrapolate).
Must not know: YAML, models beyond their configuration, devices beyond whether CUDA is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin

from windlass.data.facts import check_vocab, read_facts
from windlass.data.mixture import check_data_config
from windlass.dist.device import pick_device
from windlass.dist.errors import ConfigError
from windlass.dist.mesh import Mesh, plan_mesh
from windlass.launch.check_offload import check_offload
from windlass.launch.check_recovery import check_recovery
from windlass.launch.check_unused import unused
from windlass.launch.drives import missing_folder
from windlass.launch.job import Key, Loaded, job_keys, show_value
from windlass.launch.suggest import nearest_key
from windlass.model.config import check_model
from windlass.parallel.pipeline.builders import BUILDERS

_LIMITS: tuple[tuple[str, Callable[[Any, Any], bool], str], ...] = (
    ("gt", lambda value, limit: value > limit, "greater than"),
    ("ge", lambda value, limit: value >= limit, "at least"),
    ("lt", lambda value, limit: value < limit, "less than"),
    ("le", lambda value, limit: value <= limit, "at most"),
)


def check_values(loaded: Loaded) -> None:
    """Check every value against the choices and range of its own key.

    Raises: ConfigError naming the key, where it was given, and what it may be
    """
    for key in job_keys().values():
        value = loaded.value(key.path)
        if value is None:
            continue
        if key.choices and value not in key.choices:
            raise ConfigError(f"{loaded.at(key.path)}: must be one of {', '.join(map(str, key.choices))}.")
        numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, float)]
        if not all(map(math.isfinite, numbers)):
            raise ConfigError(f"{loaded.at(key.path)}: must be a finite number.")
        if any(name in key.metadata and not holds(value, key.metadata[name]) for name, holds, _ in _LIMITS):
            raise ConfigError(f"{loaded.at(key.path)}: must be {range_text(key)}.")


def range_text(key: Key) -> str:
    """Say the range of a key in words; empty when it has none."""
    text = " and ".join(f"{words} {key.metadata[name]}" for name, _, words in _LIMITS if name in key.metadata)
    return f"{text} {key.metadata['unit']}" if text and "unit" in key.metadata else text


def type_text(key: Key) -> str:
    """Say the type of a key in words."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    origin, inner = get_origin(key.type), get_args(key.type)
    if origin is tuple:
        text = f"a list of {len(inner)} numbers"
    elif origin is list:
        text = "a list of " + ("mappings" if get_origin(inner[0]) is dict else f"{names[inner[0]]} values")
    else:
        text = "a mapping" if origin is dict else names[key.type]
    return text + (" or null" if key.optional else "")


def check_job(loaded: Loaded, world_size: int, *, to_run: bool = True) -> Mesh:
    """Check everything that involves more than one key, and return the mesh. With `to_run` also what only a run needs:
    data, the device, a checkpoint to resume.

    Raises: ConfigError for combinations that cannot work and for settings without effect; PlanError if the mesh does
            not fit the world size; DataError for a data folder that cannot be used
    """
    mesh = plan_mesh(loaded.config.parallelism, world_size)
    check_model(loaded.config.model, {k.removeprefix("model.") for k in loaded.given if k.startswith("model.")})
    _check_batch(loaded, mesh)
    _check_pipeline(loaded, mesh)
    _check_schedule(loaded)
    _check_optimizer(loaded)
    _check_precision(loaded)
    _check_zero(loaded, mesh)
    check_offload(loaded, to_run=to_run)
    check_recovery(loaded, mesh, to_run=to_run)
    _check_unused(loaded)
    _check_cluster(loaded, to_run)
    if to_run:
        _check_run(loaded)
        if mesh.sizes["pp"] > 1:
            _check_stages(loaded, mesh.world_size)
    return mesh


def _check_batch(loaded: Loaded, mesh: Mesh) -> None:
    train, model = loaded.config.train, loaded.config.model
    ranks = mesh.size("dp")
    unit = train.micro_batch * ranks
    if train.global_batch % unit:
        below, above = train.global_batch // unit * unit, -(-train.global_batch // unit) * unit
        legal = f"{below} or {above}" if below else str(above)
        raise ConfigError(
            f"{loaded.at('train.global_batch')}: must be a multiple of train.micro_batch x data-parallel ranks = "
            f"{train.micro_batch} x {ranks} = {unit}. Use {legal}."
        )
    if model.positions == "learned" and train.seq_len > model.max_seq_len:
        raise ConfigError(
            f"{loaded.at('train.seq_len')}: learned positions end at model.max_seq_len = {model.max_seq_len}. "
            f"Use train.seq_len={model.max_seq_len} or model.max_seq_len={train.seq_len}."
        )


def _check_pipeline(loaded: Loaded, mesh: Mesh) -> None:
    pipeline, pp = loaded.config.pipeline, mesh.sizes["pp"]
    if pp == 1:
        for path in sorted(loaded.given):
            if path.startswith("pipeline."):
                unused(loaded, path, "with parallelism.pp = 1, which is no pipeline")
        return
    name = pipeline.schedule
    if name not in ("auto", *BUILDERS) and not Path(name).is_file():
        match = nearest_key(name, BUILDERS)
        raise ConfigError(
            f"{loaded.at('pipeline.schedule')}: no such schedule and no such file"
            + (f", did you mean '{match}'?" if match else ".")
            + f" Use auto, {', '.join(BUILDERS)} or a schedule file."
        )
    if name not in ("auto", "interleaved"):
        unused(loaded, "pipeline.chunks", f"with pipeline.schedule = '{name}', only with interleaved")
    if pipeline.vocab == "off":
        for key in ("vocab_shares", "vocab_chunk"):
            unused(loaded, f"pipeline.{key}", "with pipeline.vocab = 'off'")
    per_rank: tuple[tuple[str, str, Callable[[list[float]], bool]], ...] = (
        ("speeds", "positive numbers", lambda values: min(values) > 0),
        ("vocab_shares", "numbers of 0 or more, not all 0", lambda values: min(values) >= 0 < sum(values)),
    )
    for key, words, holds in per_rank:
        values = getattr(pipeline, key)
        if values and not (len(values) == pp and all(map(math.isfinite, values)) and holds(values)):
            raise ConfigError(
                f"{loaded.at(f'pipeline.{key}')}: must be {pp} {words}, one per pipeline rank (parallelism.pp = {pp}), "
                f"such as {show_value([1.0] * (pp - 1) + [0.5])}."
            )
    if (
        pipeline.measured is not None
        and Path(pipeline.measured).resolve() == Path(loaded.config.train.run_dir).resolve()
    ):
        raise ConfigError(
            f"{loaded.at('pipeline.measured')}: this run writes into that folder. Give one of an earlier run, or "
            "another train.run_dir."
        )
    if any(count < 1 for count in pipeline.cut):
        raise ConfigError(f"{loaded.at('pipeline.cut')}: every stage needs a block. Use numbers of 1 or more.")


def _check_schedule(loaded: Loaded) -> None:
    schedule, steps = loaded.config.lr_scheduler, loaded.config.train.steps
    if schedule.warmup_steps >= steps and schedule.warmup_steps:
        raise ConfigError(
            f"{loaded.at('lr_scheduler.warmup_steps')}: must be less than train.steps = {steps}, or the peak rate is "
            f"never reached. Use {max(steps // 10, 0)}."
        )
    if schedule.kind != "wsd":
        unused(loaded, "lr_scheduler.decay_steps", f"with lr_scheduler.kind = '{schedule.kind}', only with wsd")
    elif schedule.warmup_steps + schedule.decay_steps > steps:
        raise ConfigError(
            f"{loaded.at('lr_scheduler.decay_steps')}: with lr_scheduler.warmup_steps = {schedule.warmup_steps} it is "
            f"longer than train.steps = {steps}. Use at most {steps - schedule.warmup_steps}."
        )
    if schedule.kind == "constant":
        unused(loaded, "lr_scheduler.min_ratio", "with lr_scheduler.kind = 'constant'")


def _check_optimizer(loaded: Loaded) -> None:
    optimizer = loaded.config.optimizer
    if optimizer.name == "sgd":
        for name in ("betas", "eps"):
            unused(loaded, f"optimizer.{name}", "with optimizer.name = 'sgd'")
    else:
        unused(loaded, "optimizer.momentum", f"with optimizer.name = '{optimizer.name}', which has optimizer.betas")
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        raise ConfigError(
            f"{loaded.at('optimizer.betas')}: both must be at least 0 and less than 1, as in [0.9, 0.95]."
        )
    if optimizer.nonfinite != "skip":
        unused(loaded, "optimizer.max_skips", f"with optimizer.nonfinite = '{optimizer.nonfinite}'")


def _check_precision(loaded: Loaded) -> None:
    precision = loaded.config.precision
    legal = ("auto", "fp64") if precision.param == "fp64" else ("auto", "fp32", "bf16")
    if precision.reduce not in legal:
        raise ConfigError(
            f"{loaded.at('precision.reduce')}: with precision.param = '{precision.param}' it must be one of "
            f"{', '.join(legal)}."
        )


def _check_zero(loaded: Loaded, mesh: Mesh) -> None:
    zero, sizes = loaded.config.zero, mesh.sizes
    if zero.stage != 3:
        for name in ("reshard", "prefetch"):
            unused(loaded, f"zero.{name}", f"with zero.stage = {zero.stage}, only with 3")
    elif zero.reshard == ("run" if sizes["pp"] == 1 else "turnaround"):
        alone = sizes["pp"] == 1
        why = "is for pipelines, and parallelism.pp = 1" if alone else "cannot be: other work comes between"
        legal = "auto, each, turnaround or never" if alone else "auto, run, each or never"
        raise ConfigError(f"{loaded.at('zero.reshard')}: {why}. Use {legal}.")
    if zero.stage == 0 and sizes["dp_replicate"] > 1:
        raise ConfigError(
            f"{loaded.at('parallelism.dp_replicate')}: zero.stage = 0 keeps everything on every rank anyway. "
            "Use parallelism.dp_replicate=1, or zero.stage=1 or more to shard within replicas."
        )
    if zero.stage > 0 and sizes["dp_shard"] == 1 and sizes["dp_replicate"] > 1:
        raise ConfigError(
            f"{loaded.at('zero.stage')}: nothing is sharded over parallelism.dp_shard = 1. Use zero.stage=0 with "
            f"parallelism.dp_replicate=1, or parallelism.dp_shard={mesh.size('dp')}."
        )


def _check_unused(loaded: Loaded) -> None:
    config = loaded.config
    if config.activation.policy != "recompute":
        unused(
            loaded, "activation.every", f"with activation.policy = '{config.activation.policy}', only with recompute"
        )
    if not config.checkpoint.every and not config.checkpoint.at_end:
        unused(loaded, "checkpoint.keep", "when nothing is saved (checkpoint.every = 0, checkpoint.at_end = false)")
    if not config.profiler.start_step:
        for path in loaded.given:
            if path.startswith("profiler."):
                unused(loaded, path, "with profiler.start_step = 0, which records nothing")
    elif config.profiler.start_step > config.train.steps:
        raise ConfigError(
            f"{loaded.at('profiler.start_step')}: the run ends at train.steps = {config.train.steps}. Use at most that."
        )
    if config.checkpoint.every > config.train.steps:
        raise ConfigError(
            f"{loaded.at('checkpoint.every')}: more than train.steps = {config.train.steps}, so none is ever saved "
            "along the way. Use 0 to save at the end only."
        )
    if config.train.device == "cuda" and config.parallelism.transport == "shm":
        raise ConfigError(
            f"{loaded.at('parallelism.transport')}: shared memory is between CPU ranks. With train.device = 'cuda' use "
            "auto or group."
        )


def _check_cluster(loaded: Loaded, to_run: bool) -> None:
    cluster = loaded.config.cluster
    paths, weights = cluster.nvme_paths, cluster.nvme_weights
    if not paths:
        unused(loaded, "cluster.nvme_weights", "without cluster.nvme_paths")
    elif weights and not (len(weights) == len(paths) and all(math.isfinite(w) and w > 0 for w in weights)):
        raise ConfigError(
            f"{loaded.at('cluster.nvme_weights')}: must be {len(paths)} positive numbers, one per folder of "
            f"cluster.nvme_paths, such as {show_value([1.0] * len(paths))}; or empty, for equal shares."
        )
    if len({Path(path).absolute() for path in paths}) < len(paths):
        raise ConfigError(f"{loaded.at('cluster.nvme_paths')}: a folder stands there twice. Give each of them once.")
    for path in paths if to_run else ():
        problem = missing_folder(path)
        if problem:
            raise ConfigError(f"{loaded.at('cluster.nvme_paths')}: '{path}': {problem}.")


def _check_stages(loaded: Loaded, world_size: int) -> None:
    """Plan the stages once here, so that what cannot work is said before any worker starts."""
    from windlass.launch.plan import make_plan  # builds the model, so only where there is a pipeline

    make_plan(loaded.config, world_size, loaded.config.cluster, activations=False)


def _check_run(loaded: Loaded) -> None:
    data = loaded.config.data
    check_data_config(data)
    folders = [data.path] if data.path is not None else [member["path"] for member in data.mixture]
    if not folders:
        raise ConfigError(
            "data.path = null: no data. Give a folder written by 'windlass data prepare': data.path=FOLDER, or several "
            "in data.mixture."
        )
    for folder in folders:
        check_vocab(read_facts(folder), loaded.config.model.vocab_size)
    resume = loaded.config.checkpoint.resume
    if resume not in ("auto", "never") and "://" not in resume and not Path(resume).is_dir():
        raise ConfigError(f"{loaded.at('checkpoint.resume')}: no such folder. Use auto, never or a checkpoint folder.")
    if loaded.config.train.device == "cuda":
        pick_device("cuda")
