"""A DeepSpeed configuration as a job: every key, what it becomes, and what is refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from windlass.dist.errors import ConfigError
from windlass.launch.check import check_job
from windlass.launch.config import load_job
from windlass.launch.deepspeed_import import Imported, import_deepspeed
from windlass.launch.deepspeed_keys import KEYS
from windlass.launch.deepspeed_translation import DIFFERS, FILLED, MISSING, SAME, UNNEEDED
from windlass.launch.job import Loaded
from windlass.parallel.optim import OptimizerConfig, ScheduleConfig, learning_rate

BATCH = {"train_micro_batch_size_per_gpu": 2}
# What the documentation of transformers recommends for state on nvme.
TRAINER: dict[str, Any] = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "nvme", "nvme_path": "/", "pin_memory": True, "buffer_count": 4},
        "offload_param": {"device": "nvme", "nvme_path": "/", "buffer_count": 5, "buffer_size": 1e8, "max_in_cpu": 1e9},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "aio": {"block_size": 262144, "queue_depth": 32, "single_submit": False, "overlap_events": True},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def load(imported: Imported, folder: Path) -> Loaded:
    path = folder / "job.yaml"
    path.write_text(imported.yaml("ds.json"))
    return load_job(path)


def values(config: dict[str, Any], world: int = 0) -> dict[str, Any]:
    return dict(import_deepspeed(BATCH | config, world).values)


def fates(config: dict[str, Any], world: int = 0) -> dict[str, str]:
    return {row.key: row.fate for row in import_deepspeed(BATCH | config, world).rows}


def zero(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, **keys}}


def test_the_trainers_configuration_becomes_a_job_that_loads(tmp_path: Path) -> None:
    imported = import_deepspeed(TRAINER)
    loaded = load(imported, tmp_path)
    assert {key: loaded.value(key) for key in imported.values if key != "optimizer.betas"} == {
        "train.micro_batch": 8,
        "train.global_batch": 0,
        "zero.stage": 3,
        "offload.policy": "zero-infinity",
        "cluster.nvme_paths": ["/"],
        "optimizer.clip_norm": 1.0,
        "optimizer.name": "adamw",
        "optimizer.lr": 5e-5,
        "optimizer.eps": 1e-8,
        "optimizer.weight_decay": 0.0,
        "lr_scheduler.kind": "constant",
        "lr_scheduler.warmup_steps": 0,
        "precision.param": "fp32",
        "metrics.log_every": 2000,
    }
    assert loaded.config.optimizer.betas == (0.9, 0.999)
    assert not imported.losses and loaded.config.data.path is None
    check_job(loaded, 1, to_run=False)


def test_what_is_left_out_becomes_deepspeeds_default_not_ours() -> None:
    ours = values({"optimizer": {"type": "Adam"}})
    assert ours["optimizer.clip_norm"] == 1.0 and ours["optimizer.lr"] == 1e-3 and ours["optimizer.weight_decay"] == 0
    assert ours["optimizer.betas"] == [0.9, 0.999] and ours["lr_scheduler.kind"] == "constant"
    assert ours["precision.param"] == "fp32" and ours["zero.stage"] == 0
    torch = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}
    assert values(torch)["optimizer.weight_decay"] == 0.01


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"gradient_clipping": 0}, {"optimizer.clip_norm": 0.0}),
        ({"bf16": {"enabled": True}}, {"precision.param": "bf16", "precision.reduce": "bf16"}),
        ({"bfloat16": {"enabled": True}}, {"precision.param": "bf16"}),
        (
            {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
            {"precision.param": "bf16", "precision.reduce": "fp32"},
        ),
        ({"bf16": {"enabled": True}, "communication_data_type": "fp32"}, {"precision.reduce": "fp32"}),
        ({"fp16": {"enabled": True}}, {"precision.param": "bf16"}),
        ({"steps_per_print": 10}, {"metrics.log_every": 10}),
        ({"steps_per_print": float("inf")}, {"metrics.log_every": 1000}),
        ({"tensorboard": {"enabled": False}}, {"metrics.tensorboard": False}),
        ({"vocabulary_size": 50304}, {"model.vocab_size": 50304}),
        (
            {"flops_profiler": {"enabled": True, "profile_step": 4}},
            {"profiler.start_step": 4, "profiler.num_steps": 1},
        ),
        ({"activation_checkpointing": {"partition_activations": True}}, {"activation.policy": "recompute"}),
        ({"zero_optimization": True}, {"zero.stage": 1}),
        (zero(stage3_prefetch_bucket_size=0), {"zero.prefetch": 0}),
        (zero(prefetch_bucket_size=0), {"zero.prefetch": 0}),
        (zero(zero_hpz_partition_size=1), {"zero.stage": 3}),
        ({"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}}, {"optimizer.momentum": 0.9}),
        (
            {"pipeline": {"stages": 4, "activation_checkpoint_interval": 1}},
            {"parallelism.pp": 4, "activation.policy": "recompute"},
        ),
    ],
)
def test_a_key_with_a_counterpart_becomes_it(config: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    found = values(config)
    assert {key: found[key] for key in expected} == expected
    ranks = found.get("launch.workers", 1)
    check_job(load(import_deepspeed(BATCH | config), tmp_path), ranks, to_run=False)


@pytest.mark.parametrize("param", ["none", "cpu", "nvme"])
@pytest.mark.parametrize("optimizer", ["none", "cpu", "nvme"])
def test_state_rests_where_deepspeed_puts_it(param: str, optimizer: str, tmp_path: Path) -> None:
    tiers = {"none": "device", "cpu": "host", "nvme": "nvme"}
    config = zero(
        offload_param={"device": param, "nvme_path": str(tmp_path)},
        offload_optimizer={"device": optimizer, "nvme_path": str(tmp_path)},
    )
    job = load(import_deepspeed(BATCH | config), tmp_path).config
    policy = job.offload.resolved()
    assert (policy.param, policy.optimizer) == (tiers[param], tiers[optimizer])
    assert policy.grad == ("host" if optimizer != "none" else "device") and policy.when == "after"
    assert job.cluster.nvme_paths == ([str(tmp_path)] if "nvme" in (param, optimizer) else [])
    assert job.offload.active == ((param, optimizer) != ("none", "none"))


def test_what_else_is_said_about_offloading_becomes_shares_records_and_engines() -> None:
    section = {"device": "nvme", "nvme_path": "/a", "ratio": 0.7, "buffer_count": 32}
    config = zero(
        offload_optimizer=section,
        offload_param={"device": "nvme", "nvme_path": "/b"},
        sub_group_size=1e8,
    ) | {"aio": {"use_gds": True}, "optimizer": {"type": "DeepSpeedCPUAdam"}}
    found = {key: value for key, value in values(config).items() if key.startswith(("offload.", "cluster."))}
    assert found == {
        "offload.policy": "zero-infinity",
        "offload.device_share": 0.3,
        "offload.chunk": 10**8,
        "offload.slabs": 8,
        "offload.engine": "gds",
        "offload.adam": "deepspeed",
        "cluster.nvme_paths": ["/b", "/a"],
    }


def test_a_folder_named_twice_is_one_drive() -> None:
    twice = zero(
        offload_param={"device": "nvme", "nvme_path": "/a/"}, offload_optimizer={"device": "nvme", "nvme_path": "/a"}
    )
    assert values(twice)["cluster.nvme_paths"] == ["/a"]


def test_offloading_that_deepspeed_would_not_do_is_not_done() -> None:
    cpu = {"device": "cpu"}
    assert "offload.policy" not in values({"zero_optimization": {"stage": 0, "offload_optimizer": cpu}})
    lower = values({"zero_optimization": {"stage": 2, "offload_optimizer": cpu, "offload_param": cpu}})
    assert lower["offload.policy"] == "zero-offload" and "offload.param" not in lower
    old = values({"zero_optimization": {"stage": 2, "cpu_offload": True}})
    assert old["offload.policy"] == "zero-offload"


@pytest.mark.parametrize(
    ("name", "params", "expected"),
    [
        ("WarmupLR", {"warmup_num_steps": 100}, {"kind": "constant", "warmup_steps": 100}),
        ("WarmupDecayLR", {"total_num_steps": 5000}, {"kind": "linear", "min_ratio": 0.0, "warmup_steps": 1000}),
        (
            "WarmupCosineLR",
            {"total_num_steps": 900, "warmup_num_steps": 9, "cos_min_ratio": 0.2},
            {"kind": "cosine", "min_ratio": 0.2, "warmup_steps": 9},
        ),
    ],
)
def test_a_schedule_becomes_its_shape(
    name: str, params: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    config = BATCH | {
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-4}},
        "scheduler": {"type": name, "params": params | {"warmup_type": "linear"}},
    }
    imported = import_deepspeed(config)
    assert {key: imported.values[f"lr_scheduler.{key}"] for key in expected} == expected
    # Without warmup_max_lr only WarmupDecayLR has a peak of its own.
    assert imported.values["optimizer.lr"] == (1e-3 if name == "WarmupDecayLR" else 2e-4)
    assert imported.values.get("train.steps") == params.get("total_num_steps")
    check_job(load(imported, tmp_path), 1, to_run=False)


def test_a_warm_up_as_long_as_our_default_run_makes_the_run_longer(tmp_path: Path) -> None:
    imported = import_deepspeed(BATCH | {"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "linear"}}})
    assert imported.values["lr_scheduler.warmup_steps"] == 1000 and imported.values["train.steps"] == 10000
    check_job(load(imported, tmp_path), 1, to_run=False)


def test_deepspeeds_warm_up_is_two_steps_behind() -> None:
    def deepspeed(step: int, warmup: int) -> float:
        # The optimizer's rate is warmup_min_lr when the engine starts; the schedule's own step 0 follows the first
        # update. Source: WarmupLR._get_gamma
        done = step - 1
        return 0.0 if done < 0 else min(1.0, done / warmup)

    schedule = ScheduleConfig(kind="constant", warmup_steps=50)
    for step in range(100):
        assert learning_rate(OptimizerConfig(lr=1.0), schedule, step, 1000) == pytest.approx(deepspeed(step + 2, 50))


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_the_product_of_the_batch_sizes_holds_whichever_is_left_out(micro: int, steps: int, world: int) -> None:
    total = micro * steps * world
    given = {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
    }
    for left_out in (None, *given):
        config = {key: value for key, value in given.items() if key != left_out}
        found = import_deepspeed(config, world).values
        assert found["train.micro_batch"] == micro
        assert found["train.global_batch"] in ((total,) if steps > 1 else (total, 0))
        assert found.get("launch.workers", 1) == world
    known = import_deepspeed(given).values  # the three give the number of ranks
    assert known["train.global_batch"] == total and known.get("launch.workers", 1) == world


@pytest.mark.parametrize(
    ("config", "world", "words"),
    [
        ({}, 0, "neither train_batch_size nor train_micro_batch_size_per_gpu"),
        ({"train_batch_size": 8}, 0, "--world N"),
        ({"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4}, 0, "--world N"),
        ({"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4}, 0, "Use 8 or 12"),
        ({"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4}, 2, "Use 8 or 16"),
        ({"train_batch_size": 7}, 2, "= 3 x 1 x 2 = 6"),
        (
            {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4},
            0,
            "= 2 x 4 x 1 = 8. Use 8 or 16",
        ),
        ({"train_micro_batch_size_per_gpu": "many"}, 0, "must be a number"),
        ({"train_micro_batch_size_per_gpu": 1.5}, 0, "must be a whole number of 1 or more"),
        ({"train_micro_batch_size_per_gpu": 1, "data_parallel_size": 4}, 2, "--world says 2"),
    ],
)
def test_batch_sizes_that_cannot_be_are_refused_with_what_would_work(
    config: dict[str, Any], world: int, words: str
) -> None:
    with pytest.raises(ConfigError) as error:
        import_deepspeed(config, world)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"zero_optimisation": {"stage": 3}}, "did you mean 'zero_optimization'?"),
        ({"grad_clip": 1.0}, "did you mean 'gradient_clipping'?"),
        ({"stage": 3}, "did you mean 'zero_optimization.stage'?"),
        (zero(offload_optimiser={"device": "cpu"}), "did you mean 'zero_optimization.offload_optimizer'?"),
        (zero(offload_param={"devise": "cpu"}), "did you mean 'zero_optimization.offload_param.device'?"),
        (
            zero(offload_optimizer={"device": "nvme", "nvme_pth": "/x"}),
            "did you mean 'zero_optimization.offload_optimizer.nvme_path'?",
        ),
        ({"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1}}}, "did you mean 'gradient_clipping'?"),
        ({"optimizer": {"type": "AdamW", "params": {"beta": [0.9, 0.9]}}}, "did you mean 'optimizer.params.betas'?"),
        ({"aio": {"queue_dept": 1}}, "did you mean 'aio.queue_depth'?"),
        ({"wandb": {"enabled": True, "projet": "x"}}, "did you mean 'wandb.project'?"),
        ({"optimizer": {"type": "AdmW"}}, "did you mean 'AdamW'?"),
        ({"optimizer": {"type": "Lamb", "params": {"max_coeff": 1}}}, "optimizer.name = adamw or sgd"),
        ({"scheduler": {"type": "WarmupDecay"}}, "did you mean 'WarmupDecayLR'?"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "one of the two"),
        ({"bf16": True}, "must be a mapping of keys"),
        ({"bf16": {"enabled": "yes"}}, "must be true or false"),
        ({"communication_data_type": "fp8"}, "must be one of fp32, bf16, fp16"),
        (zero(stage=4), "must be 0, 1, 2 or 3"),
        (zero(offload_param={"device": "disk"}), "must be none, cpu or nvme"),
        (zero(offload_param={"device": "nvme"}), "nvme_path is missing"),
        (zero(offload_optimizer={"device": "cpu", "ratio": 2}), "must be from 0 to 1"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9]}}}, "must be two numbers"),
        (zero(prefetch_bucket_size=1, stage3_prefetch_bucket_size=2), "given twice, under two names"),
    ],
)
def test_mistakes_are_refused_where_deepspeed_may_be_silent(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        import_deepspeed(BATCH | config)
    assert words in str(error.value)


def test_all_unknown_keys_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        import_deepspeed(BATCH | {"grad_clip": 1} | zero(stge=3))
    assert "grad_clip" in str(error.value) and "zero_optimization.stge" in str(error.value)


@pytest.mark.parametrize(
    ("config", "key", "fate"),
    [
        ({"fp16": {"enabled": True}}, "fp16.enabled", DIFFERS),
        ({"torch_autocast": {"enabled": True, "dtype": "bf16"}}, "torch_autocast.enabled", DIFFERS),
        ({"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 1}}}, "scheduler.type", MISSING),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}},
            "scheduler.params.warmup_type",
            DIFFERS,
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False, "weight_decay": 0.1}}},
            "optimizer.params.adam_w_mode",
            DIFFERS,
        ),
        ({"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}}, "optimizer.params.amsgrad", MISSING),
        (
            {"optimizer": {"type": "AdamW", "params": {"bias_correction": False}}},
            "optimizer.params.bias_correction",
            MISSING,
        ),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size", MISSING),
        ({"sequence_parallel_size": 1}, "sequence_parallel_size", UNNEEDED),
        ({"tensor_parallel": {"autotp_size": 4}}, "tensor_parallel", MISSING),
        ({"tensor_parallel": {"autotp_size": 1}}, "tensor_parallel", UNNEEDED),
        ({"expert_parallel": {"enabled": True}}, "expert_parallel", MISSING),
        ({"wandb": {"enabled": False}}, "wandb", UNNEEDED),
        ({"amp": {"enabled": False, "opt_level": "O1"}}, "amp", UNNEEDED),
        ({"amp": {"enabled": True}}, "amp", MISSING),
        ({"sparse_gradients": True}, "sparse_gradients", MISSING),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op", MISSING),
        (zero(zenflow={"topk_ratio": 0.1}), "zero_optimization.zenflow", MISSING),
        (zero(zero_quantized_gradients=True), "zero_optimization.zero_quantized_gradients", MISSING),
        (zero(zero_hpz_partition_size=8), "zero_optimization.zero_hpz_partition_size", DIFFERS),
        (zero(reduce_bucket_size=5e8), "zero_optimization.reduce_bucket_size", UNNEEDED),
        (zero(overlap_comm=False), "zero_optimization.overlap_comm", UNNEEDED),
        ({"gradient_clipping": 0.5}, "gradient_clipping", SAME),
        ({"gradient_clipping": "auto"}, "gradient_clipping", FILLED),
        ({}, "gradient_clipping", FILLED),
    ],
)
def test_what_is_lost_is_told_apart_from_what_is_not_needed(config: dict[str, Any], key: str, fate: str) -> None:
    assert fates(config)[key] == fate


def test_a_secondary_partition_becomes_replicas_of_shard_groups() -> None:
    found = values(zero(zero_hpz_partition_size=8), world=32)
    assert (found["parallelism.dp_shard"], found["parallelism.dp_replicate"]) == (8, 4)
    with pytest.raises(ConfigError, match="must divide the 12 ranks"):
        import_deepspeed(BATCH | zero(zero_hpz_partition_size=8), 12)


SAMPLES: dict[str, list[Any]] = {
    "optimizer.type": ["AdamW", "Adam", "SGD"],
    "optimizer.params.betas": ["auto", [0.8, 0.9]],
    "scheduler.type": ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle"],
    "scheduler.params.warmup_type": ["linear", "log"],
    "scheduler.params.warmup_num_steps": [20],
    "scheduler.params.total_num_steps": [2000],
    "zero_optimization.offload_param.device": ["none", "cpu", "nvme"],
    "zero_optimization.offload_optimizer.device": ["none", "cpu", "nvme"],
    "zero_optimization.stage": [0, 1, 2, 3],
    "zero_optimization.offload_optimizer.ratio": [0.5, 1.0],
    "zero_optimization.zero_hpz_partition_size": [1],
    "data_types.grad_accum_dtype": ["fp32", "bf16"],
    "communication_data_type": ["fp32", "bf16", "fp16"],
    "pipeline.stages": ["auto", 1],
    "data_parallel_size": [2],
    "train_batch_size": [24],
    "train_micro_batch_size_per_gpu": [3],
    "gradient_accumulation_steps": [4, "auto"],
    "vocabulary_size": [512],
    "steps_per_print": [5],
    "flops_profiler.profile_step": [3],
    "fp16.enabled": [False, "auto"],
    "zero_optimization.offload_param.nvme_path": ["/"],
    "zero_optimization.offload_optimizer.nvme_path": ["/"],
    "optimizer.params.momentum": [0.9, "auto"],
}
SWITCHES = ("cpu_offload", "cpu_offload_param", "enabled", "use_gds", "activations", "optimization", "checkpointing")


@pytest.mark.parametrize("seed", range(15))
def test_every_given_key_is_accounted_for_and_the_job_loads_to_what_is_said(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    always = ("train_batch_size", "train_micro_batch_size_per_gpu", "data_parallel_size")
    paths = [key for key in KEYS if key in always or draw.random() < 0.5 or key.endswith("nvme_path")]
    config: dict[str, Any] = {}
    for path in paths:
        *heads, name = path.split(".")
        node = config
        for head in heads:
            node = node.setdefault(head, {})
        default = [True, False] if path.endswith(SWITCHES) or "adam" in path else [1, "auto"]
        node[name] = draw.choice(SAMPLES.get(path, default))
    imported = import_deepspeed(config, 2)
    assert {row.key for row in imported.rows} >= set(paths)
    assert all(row.why or row.became for row in imported.rows)
    loaded = load(imported, tmp_path)
    for key, value in imported.values.items():
        found = loaded.value(key)
        assert (list(found) if isinstance(found, tuple) else found) == value
    check_job(loaded, loaded.config.launch.workers, to_run=False)
