"""Every key of a DeepSpeed configuration, and for those that nothing here corresponds to, why not and if that matters.

A table beside DeepSpeed, so that a configuration can be read where DeepSpeed is not installed; a test compares it with
the sources of the installed package. Must not know: how a key is translated. Source: DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VERSION = "0.19.8"


@dataclass(frozen=True)
class Known:
    """A key. Without `why` it is translated.

    `off`: values with which nothing is lost by leaving the key out; None: with any. `members`: the names one level
    below (none: whatever is there), where the value is a mapping that is judged as a whole: by its member `switch`, or
    by being there at all.
    """

    why: str = ""
    off: tuple[Any, ...] | None = None
    members: frozenset[str] | None = None
    switch: str = "enabled"

    def loses(self, value: Any) -> bool:
        """Return whether leaving the key out changes what the job does."""
        if self.off is None:
            return False
        if self.switch and isinstance(value, Mapping):
            value = value.get(self.switch)
        return value is not None and value != "auto" and value not in self.off


OFF = (False, 0, 0.0)
TRANSLATED = Known()


def _under(group: str, names: str, known: Known = TRANSLATED) -> dict[str, Known]:
    return {f"{group}.{name}" if group else name: known for name in names.split()}


def _section(why: str, members: str, switch: str = "enabled", off: tuple[Any, ...] | None = OFF) -> Known:
    return Known(why, off, frozenset(members.split()), switch)


_UNITS = "gathers and reductions go by units (the embedding, each block, the head), in flat buffers of their own size"
_OURS = "a choice inside DeepSpeed's engine"
_SIZED = "sizes follow from the model and the budgets offload.host_bytes and offload.device_bytes"
_BLOCKS = "files are read and written in 8 MiB blocks past the page cache by threads (offload.engine)"
_HYPERPARAMETERS = "no such term in the update"
_COMMITTED = "every rank writes what it owns, at once; a manifest with checksums commits the whole"

_ZERO = {
    **_under("zero_optimization", "stage zero_hpz_partition_size cpu_offload cpu_offload_param"),
    **_under("zero_optimization", "stage3_prefetch_bucket_size sub_group_size"),
    **_under("zero_optimization.offload_param", "device nvme_path"),
    **_under("zero_optimization.offload_optimizer", "device nvme_path buffer_count ratio"),
    **_under(
        "zero_optimization",
        "contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce allgather_partitions "
        "allgather_bucket_size round_robin_gradients parameter_alignment module_granularity_threshold "
        "stage3_module_granularity_threshold use_all_reduce_for_fetch_params stage3_use_all_reduce_for_fetch_params "
        "allgather_sequential stage3_allgather_sequential leaf_module.classes leaf_module.names "
        "leaf_module.name_suffixes",
        Known(_UNITS),
    ),
    **_under(
        "zero_optimization",
        "param_persistence_threshold stage3_param_persistence_threshold model_persistence_threshold "
        "stage3_model_persistence_threshold",
        Known("small parameters travel in the unit of their block, so they cost no message of their own"),
    ),
    **_under(
        "zero_optimization",
        "max_live_parameters stage3_max_live_parameters max_reuse_distance stage3_max_reuse_distance",
        Known("zero.reshard says when gathered parameters are released; zero.prefetch how many units are ahead"),
    ),
    **_under(
        "zero_optimization",
        "gather_16bit_weights_on_model_save stage3_gather_16bit_weights_on_model_save "
        "stage3_gather_fp16_weights_on_model_save",
        Known("`windlass checkpoint export --to hf` writes whole weights from any checkpoint, afterwards"),
    ),
    **_under(
        "zero_optimization",
        "load_from_fp32_weights elastic_checkpoint pipeline_loading_checkpoint",
        Known("checkpoints hold the fp32 master weights by name and load at any number of ranks and stage"),
    ),
    **_under(
        "zero_optimization",
        "overlap_comm",
        Known("transfers overlap compute under every stage; there is nothing to switch on"),
    ),
    **_under(
        "zero_optimization",
        "compute_grad_norm legacy_stage1 memory_efficient_linear override_module_apply log_trace_cache_warnings "
        "enable_sanity_checks ignore_unused_parameters save_muon_momentum_buffer_in_memory",
        Known(_OURS),
    ),
    **_under(
        "zero_optimization",
        "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients",
        Known("parameters and gradients travel in precision.param and precision.reduce, never quantised", OFF),
    ),
    "zero_optimization.zenflow": _section(
        "ZenFlow updates with gradients of earlier steps; here every update uses all of its own step's",
        "topk_ratio select_strategy select_interval update_interval overlap_step offload auto_ratio "
        "full_warm_up_rounds pt_reserved_cores_perc steps_per_epoch",
        switch="",
        off=(),
    ),
    **_under(
        "zero_optimization",
        "cpu_offload_use_pin_memory offload_param.pin_memory offload_optimizer.pin_memory",
        Known("host memory is registered with the driver at its exact size when a GPU is used, never otherwise"),
    ),
    **_under("zero_optimization.offload_param", "buffer_count buffer_size max_in_cpu", Known(_SIZED)),
    **_under(
        "zero_optimization.offload_optimizer",
        "pipeline_read pipeline_write",
        Known("reading, updating and writing always overlap"),
    ),
    **_under(
        "zero_optimization.offload_optimizer",
        "fast_init",
        Known("state is created where it rests, one record at a time"),
    ),
    **_under(
        "zero_optimization.offload_optimizer",
        "super_offload cpuadam_cores_perc",
        Known("only speed: see offload.policy=fuyou (updates inside backward) and launch.threads"),
    ),
    "zero_optimization.mics_shard_size": Known("removed from DeepSpeed; see parallelism.dp_shard", (*OFF, -1)),
    "zero_optimization.mics_hierarchical_params_gather": Known("removed from DeepSpeed", OFF),
    "zero_optimization.zeropp_loco_param": Known("removed from DeepSpeed", ()),
}

_OPTIMIZER = {
    **_under("optimizer", "type"),
    "optimizer.legacy_fusion": Known(_OURS),
    **_under("optimizer.params", "lr betas eps weight_decay momentum adam_w_mode"),
    **_under("optimizer.params", "torch_adam foreach fused capturable differentiable set_grad_none", Known(_OURS)),
    **_under("optimizer.params", "amsgrad nesterov maximize dampening", Known(_HYPERPARAMETERS, OFF)),
    "optimizer.params.bias_correction": Known("Adam's moments are always corrected for their bias", (True, 1)),
    "optimizer.params.fp32_optimizer_states": Known("moments are always kept in fp32", (True, 1)),
    **_under("scheduler", "type"),
    **_under(
        "scheduler.params",
        "warmup_min_lr warmup_max_lr warmup_num_steps warmup_type total_num_steps warmup_min_ratio cos_min_ratio",
    ),
    **_under(
        "scheduler.params",
        "lr_range_test_min_lr lr_range_test_step_size lr_range_test_step_rate lr_range_test_staircase cycle_min_lr "
        "cycle_max_lr decay_lr_rate cycle_first_step_size cycle_second_step_size cycle_first_stair_count "
        "cycle_second_stair_count decay_step_size cycle_momentum cycle_min_mom cycle_max_mom decay_mom_rate",
        Known("belongs to a schedule that has no counterpart"),
    ),
    "scheduler.params.last_batch_iteration": Known("a resumed run knows its step", (-1,)),
}

_PRECISION = {
    **_under("bf16", "enabled"),
    **_under("bf16", "immediate_grad_update", Known(_OURS)),
    "bf16.check_grad_overflow": Known("a step with a non-finite gradient norm is always skipped (optimizer.nonfinite)"),
    **_under(
        "bf16",
        "bf16_master_weights_and_grads bf16_optimizer_states",
        Known("master weights and moments are always kept in fp32", OFF),
    ),
    **_under("fp16", "enabled"),
    **_under(
        "fp16",
        "auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis min_loss_scale "
        "fp16_master_weights_and_grads fused_mode",
        Known("bf16 has the range of fp32 and needs no loss scale"),
    ),
    **_under("torch_autocast", "enabled"),
    **_under("torch_autocast", "dtype lower_precision_safe_modules", Known("see torch_autocast.enabled")),
    **_under("data_types", "grad_accum_dtype"),
    **_under(
        "data_types",
        "param_dtype buffer_dtype keep_in_fp32_modules",
        Known("precision.param is that of all parameters"),
    ),
    **_under("", "communication_data_type"),
}

_TRAINING = {
    **_under("", "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping"),
    **_under("", "steps_per_print vocabulary_size data_parallel_size"),
    "managed_gradient_accumulation": Known("accumulation follows from train.global_batch"),
    "prescale_gradients": Known("gradients are summed in fp32 and divided once, so there is nothing to scale"),
    "gradient_predivide_factor": Known("gradients are summed in fp32 and divided once, so there is nothing to scale"),
    "gradient_allreduce_op": Known("a loss is the mean over the tokens of the global batch", ("mean", "MEAN")),
    "sequence_parallel_size": Known("sequences are not cut over ranks", (*OFF, 1)),
    **_under(
        "",
        "seq_parallel_communication_data_type seq_parallel_comm_data_type",
        Known("sequences are not cut over ranks"),
    ),
    **_under("activation_checkpointing", "partition_activations contiguous_memory_optimization number_checkpoints"),
    "activation_checkpointing.cpu_checkpointing": Known("kept activations stay on the device", OFF),
    **_under("activation_checkpointing", "synchronize_checkpoint_boundary profile", Known(_OURS)),
    **_under("pipeline", "stages activation_checkpoint_interval"),
    **_under("pipeline", "partition seed_layers pipe_partitioned grad_partitioned", Known("see docs/pipelines.md")),
    **_under("", "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer", Known(_OURS)),
    **_under("aio", "block_size queue_depth intra_op_parallelism single_submit overlap_events", Known(_BLOCKS)),
    **_under("aio", "use_gds"),
    **_under("", "disable_allgather dump_state disable_python_gc log_level", Known(_OURS)),
    **_under("", "use_data_before_expert_parallelism", Known(_OURS)),
    "dataloader_drop_last": Known("documents are packed into rows without end, so no batch is incomplete"),
}

_REPORTS = {
    **_under("", "wall_clock_breakdown", Known("RUN/metrics.jsonl has the seconds of every phase of every step")),
    **_under("", "memory_breakdown", Known("RUN/metrics.jsonl has the bytes of every tier")),
    **_under("tensorboard", "enabled"),
    **_under("tensorboard", "output_path job_name", Known("scalars are written to RUN/tensorboard (train.run_dir)")),
    **_under("flops_profiler", "enabled profile_step"),
    **_under(
        "flops_profiler",
        "recompute_fwd_factor module_depth top_modules detailed output_file",
        Known("step lines show TFLOP/s; the operators of a recorded step are in RUN/traces"),
    ),
    "csv_monitor": _section(
        "RUN/metrics.jsonl has every number of every step", "enabled output_path job_name", off=None
    ),
    "comms_logger": _section(
        "bytes between ranks are in every step's metrics, single messages in RUN/traces",
        "enabled prof_all prof_ops verbose debug",
        off=None,
    ),
    "timers": _section("steps are always timed", "throughput", off=None),
    "wandb": _section("not sent anywhere; RUN/metrics.jsonl and RUN/tensorboard", "enabled group team project"),
    "comet": _section(
        "not sent anywhere; RUN/metrics.jsonl and RUN/tensorboard",
        "enabled samples_log_interval project workspace api_key experiment_name experiment_key online mode",
    ),
    **_under("checkpoint", "tag_validation checkpoint_serialization", Known(_COMMITTED)),
    "checkpoint.parallel_write": _section(_COMMITTED, "pipeline_stage", off=None),
    "checkpoint.writer": _section(
        _COMMITTED,
        "type decoupled io_buffer_size io_buffer_double show_statistics data_parallel io_multiplier",
        off=None,
    ),
    "checkpoint.load_universal": Known("every checkpoint loads at any number of ranks"),
    "checkpoint.use_node_local_storage": Known("checkpoints go to train.run_dir, which all hosts must see", OFF),
    "datastates_ckpt": _section("checkpoints are written by the step that makes them", "", switch=""),
}

_SECTIONS = {
    "autotuning": _section(
        "`windlass plan` and offload.policy=auto choose from measured rates, without trial runs",
        "enabled fast results_dir exps_dir overwrite start_profile_step end_profile_step metric_path tuner_type "
        "tuner_early_stopping tuner_num_trials arg_mappings max_train_batch_size min_train_batch_size "
        "max_train_micro_batch_size_per_gpu min_train_micro_batch_size_per_gpu num_tuning_micro_batch_sizes "
        "mp_size metric model_info model_info_path",
        off=None,
    ),
    "compile": _section(
        "blocks run as written; placement is offload.policy's",
        "deepcompile autoep_non_moe free_activation free_activation_threshold offload_activation "
        "offload_activation_pin_memory offload_opt_states double_buffer symmetric_memory debug_log "
        "offload_parameters sync_before_reduce sync_after_reduce sync_before_allgather sync_after_allgather "
        "keep_int_input_tensors keep_all_input_tensors passes",
        off=None,
    ),
    "data_efficiency": _section(
        "no curriculum and no token dropping: windlass data prepare, data.mixture",
        "enabled seed data_sampling data_routing",
    ),
    "expert_parallel": _section(
        "no expert parallelism",
        "enabled autoep_size expert_tensor_parallel_size validate_folding_routing async_split_plan preset_model "
        "moe_layer_pattern expert_pattern router_pattern use_grouped_mm disable_triton_grouped_mm route_norm "
        "route_scale score_apply combine_impl row_weighting_impl gate_up_impl comm_backend comm_num_sm comm_qp_margin "
        "comm_max_tokens_per_rank num_expert_groups num_limited_groups score_func top_k load_balance_coeff "
        "routed_scaling_factor expert_w1 expert_w2 expert_w3 num_experts_attr top_k_attr has_shared_experts "
        "shared_experts_pattern shared_experts_gate_pattern expert_activation",
    ),
    "hybrid_engine": _section(
        "training only, no generation",
        "enabled max_out_tokens inference_tp_size release_inference_cache pin_parameters tp_gather_partition_size "
        "enable_cuda_graph",
    ),
    "tensor_parallel": _section(
        "layers are not cut over ranks; zero.stage=3 or parallelism.pp spread a model",
        "dtype autotp_size tp_overlap_comm vocab_parallel_lm_head vocab_parallel_ce_backend tensor_parallel tp "
        "injection_policy_tuple partition_config preset_model keep_module_on_host replace_with_kernel_inject "
        "kernel_inject",
        "autotp_size",
        (*OFF, 1),
    ),
    "weight_quantization": _section(
        "weights are not quantised",
        "enabled num_bits q_type q_groups quantized_initialization post_init_quant",
        switch="",
        off=({"enabled": False},),
    ),
}

# Sections of earlier releases that DeepSpeed itself refuses by now.
REMOVED = (
    *("nebula", "compression_training", "amp", "quantize_training", "sparse_gradients", "eigenvalue"),
    *("sparse_attention", "elasticity", "graph_harvesting", "curriculum_learning", "progressive_layer_drop"),
)

KEYS: Mapping[str, Known] = {
    **_TRAINING,
    **_OPTIMIZER,
    **_PRECISION,
    **_ZERO,
    **_REPORTS,
    **_SECTIONS,
    **{name: _section("removed from DeepSpeed, too", "") for name in REMOVED},
}
GROUPS = frozenset(path.rpartition(".")[0] for path in KEYS if "." in path) | {"zero_optimization"}

# DeepSpeed's other name -> the one used below.
ALIASES = {
    "bfloat16": "bf16",
    "zero_optimization.prefetch_bucket_size": "zero_optimization.stage3_prefetch_bucket_size",
}
