"""Which key did the user mean? Spelling, a key in another group, or the name another framework uses."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

# Names of torchtitan, Megatron-LM, DeepSpeed and Hugging Face for what is called otherwise here.
ELSEWHERE = {
    "learning_rate": "optimizer.lr",
    "max_grad_norm": "optimizer.clip_norm",
    "gradient_clipping": "optimizer.clip_norm",
    "clip_grad": "optimizer.clip_norm",
    "max_norm": "optimizer.clip_norm",
    "max_steps": "train.steps",
    "train_iters": "train.steps",
    "batch_size": "train.micro_batch",
    "micro_batch_size": "train.micro_batch",
    "local_batch_size": "train.micro_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "global_batch_size": "train.global_batch",
    "train_batch_size": "train.global_batch",
    "gradient_accumulation_steps": "train.global_batch",
    "accumulation": "train.global_batch",
    "seq_length": "train.seq_len",
    "output_dir": "train.run_dir",
    "dtype": "precision.param",
    "param_dtype": "precision.param",
    "reduce_dtype": "precision.reduce",
    "zero_stage": "zero.stage",
    "zero_optimization": "zero",
    "data_parallel_replicate_degree": "parallelism.dp_replicate",
    "data_parallel_shard_degree": "parallelism.dp_shard",
    "reshard_after_forward": "zero.reshard",
    "activation_checkpoint": "activation.policy",
    "gradient_checkpointing": "activation.policy",
    "pipeline_parallel_degree": "parallelism.pp",
    "pipeline_model_parallel_size": "parallelism.pp",
    "pipeline_parallel_schedule": "pipeline.schedule",
    "num_stages": "parallelism.pp",
    "num_workers": "launch.workers",
    "nproc_per_node": "launch.workers",
    "save_interval": "checkpoint.every",
    "scheduler": "lr_scheduler",
    "lr_schedule": "lr_scheduler",
    "dataset": "data",
    "training": "train",
    "optim": "optimizer",
    "logging": "metrics",
}


def nearest_key(path: str, known: Iterable[str]) -> str | None:
    """Return the known key that was most likely meant by an unknown one, if any is likely."""
    names = list(known)
    last = path.rpartition(".")[2]
    same_name = [k for k in names if k.rpartition(".")[2] == last]
    if len(same_name) == 1:
        return same_name[0]
    if ELSEWHERE.get(last) in names:
        return ELSEWHERE[last]
    close = get_close_matches(path, names, n=1, cutoff=0.6)
    if close:
        return close[0]
    by_name = {k.rpartition(".")[2]: k for k in names}
    close = get_close_matches(last, list(by_name), n=1, cutoff=0.7)
    return by_name[close[0]] if close else None
