"""The table of DeepSpeed's keys against the sources of the installed package, read as text, never imported."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from windlass.launch.deepspeed_keys import ALIASES, GROUPS, KEYS, REMOVED
from windlass.launch.deepspeed_translation import AUTO


def _root(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.origin).parent


@cache
def _tree(package: str, path: str) -> ast.Module:
    return ast.parse((_root(package) / path).read_text(encoding="utf-8"))


def _class(path: str, name: str) -> ast.ClassDef:
    tree = _tree("deepspeed", path)
    return next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == name)


def _fields(path: str, name: str) -> set[str]:
    """Return the fields of a pydantic class and their aliases."""
    names = set()
    for node in _class(path, name).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
            for call in ast.walk(node):
                if isinstance(call, ast.keyword) and call.arg == "alias" and isinstance(call.value, ast.Constant):
                    names.add(str(call.value.value))
    return names


@cache
def _constants(*paths: str) -> dict[str, object]:
    return {
        target.id: node.value.value
        for path in paths
        for node in ast.walk(_tree("deepspeed", path))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _below(group: str) -> set[str]:
    """Return the names known directly below a group or inside a section."""
    if group in KEYS:
        return set(KEYS[group].members or ())
    paths = {*KEYS, *GROUPS, *ALIASES}
    return {path.removeprefix(f"{group}.").split(".")[0] for path in paths if path.startswith(f"{group}.")}


SECTIONS = {
    "zero_optimization.offload_param": ("runtime/zero/offload_config.py", "DeepSpeedZeroOffloadParamConfig"),
    "zero_optimization.offload_optimizer": ("runtime/zero/offload_config.py", "DeepSpeedZeroOffloadOptimizerConfig"),
    "zero_optimization.zenflow": ("runtime/zenflow/zenflow_config.py", "ZenFlowConfig"),
    "zero_optimization.leaf_module": ("runtime/zero/leaf_module_config.py", "DeepSpeedZeroLeafModuleConfig"),
    "bf16": ("runtime/precision_config.py", "DeepSpeedBF16Config"),
    "tensorboard": ("monitor/config.py", "TensorBoardConfig"),
    "wandb": ("monitor/config.py", "WandbConfig"),
    "csv_monitor": ("monitor/config.py", "CSVConfig"),
    "comet": ("monitor/config.py", "CometConfig"),
    "comms_logger": ("comm/config.py", "CommsLoggerConfig"),
    "compile": ("compile/config.py", "CompileConfig"),
    "hybrid_engine": ("runtime/config.py", "HybridEngineConfig"),
    "tensor_parallel": ("runtime/tensor_parallel/config.py", "TPTrainingConfig"),
}


@pytest.mark.parametrize("group", SECTIONS)
def test_a_section_has_exactly_the_keys_of_its_class(group: str) -> None:
    assert _below(group) == _fields(*SECTIONS[group])


def test_the_zero_section_has_the_keys_of_its_class_and_those_that_were_removed() -> None:
    removed = {"mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"}
    assert _below("zero_optimization") == _fields("runtime/zero/config.py", "DeepSpeedZeroConfig") | removed


def test_the_fp16_section_knows_one_key_of_earlier_releases_more() -> None:
    assert _below("fp16") == _fields("runtime/precision_config.py", "DeepSpeedFP16Config") | {"fused_mode"}


def _read_by(tree: ast.AST, names: dict[str, object], dictionary: str) -> Iterator[str]:
    """Yield the keys that code takes from a dictionary: d.get(K), d[K], K in d, get_scalar_param(d, K, ...)."""
    for node in ast.walk(tree):
        key: ast.expr | None = None
        if isinstance(node, ast.Call) and node.args:
            first = node.args[0]
            if isinstance(node.func, ast.Name) and node.func.id == "get_scalar_param" and len(node.args) > 1:
                key = node.args[1] if isinstance(first, ast.Name) and first.id == dictionary else None
            elif isinstance(node.func, ast.Attribute) and node.func.attr == "get":
                owner = node.func.value
                key = first if isinstance(owner, ast.Name) and owner.id == dictionary else None
        elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == dictionary:
            key = node.slice
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In):
            owner = node.comparators[0]
            key = node.left if isinstance(owner, ast.Name) and owner.id == dictionary else None
        if isinstance(key, ast.Constant):
            yield str(key.value)
        elif isinstance(key, ast.Name) and key.id in names:
            yield str(names[key.id])


def test_every_key_that_deepspeed_reads_at_the_top_is_known() -> None:
    constants = _constants(
        "runtime/constants.py",
        "runtime/data_pipeline/constants.py",
        "runtime/zero/config.py",
        "runtime/config.py",
        "runtime/precision_config.py",
        "runtime/swap_tensor/constants.py",
        "runtime/activation_checkpointing/config.py",
        "profiling/constants.py",
    )
    files = (
        "runtime/config.py",
        "runtime/zero/config.py",
        "runtime/precision_config.py",
        "runtime/swap_tensor/aio_config.py",
        "runtime/activation_checkpointing/config.py",
        "runtime/data_pipeline/config.py",
        "monitor/config.py",
        "profiling/config.py",
    )
    read = {key for path in files for key in _read_by(_tree("deepspeed", path), constants, "param_dict")}
    assert len(read) > 40
    inner = {"allgather_size", "data_sampling", "data_routing", "random_ltd"}  # an old form, and one level below
    inner |= {"curriculum_learning", "dynamic_batching"}
    unknown = {key for key in read - inner if key not in KEYS and key not in GROUPS and key not in ALIASES}
    assert not unknown


@pytest.mark.parametrize(
    ("group", "path", "dictionary"),
    [
        ("aio", "runtime/swap_tensor/aio_config.py", "aio_dict"),
        ("activation_checkpointing", "runtime/activation_checkpointing/config.py", "act_chkpt_config_dict"),
        ("flops_profiler", "profiling/config.py", "flops_profiler_dict"),
        ("autotuning", "autotuning/config.py", "autotuning_dict"),
        ("expert_parallel", "module_inject/auto_ep_config.py", "param_dict"),
        ("checkpoint", "runtime/config.py", "checkpoint_params"),
        ("checkpoint.writer", "runtime/model_checkpointing/config.py", "writer_dict"),
        ("data_types", "runtime/config.py", "data_types_params"),
    ],
)
def test_a_section_read_key_by_key_is_known(group: str, path: str, dictionary: str) -> None:
    constants = _constants(
        "runtime/constants.py",
        "runtime/model_checkpointing/constants.py",
        "runtime/swap_tensor/constants.py",
        "runtime/activation_checkpointing/config.py",
        "profiling/constants.py",
        "autotuning/constants.py",
    )
    read = set(_read_by(_tree("deepspeed", path), constants, dictionary))
    assert read and read <= _below(group)


def test_removed_sections_are_those_that_deepspeed_lists() -> None:
    for node in ast.walk(_tree("deepspeed", "runtime/config.py")):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_REMOVED_TOP_LEVEL_CONFIG_KEYS":
            assert _keys(node.value) == set(REMOVED)
            return
    pytest.fail("the list of removed sections is not where it was")


def _keys(node: ast.expr) -> set[str]:
    assert isinstance(node, ast.Dict)
    return {str(key.value) for key in node.keys if isinstance(key, ast.Constant)}


def test_gradients_are_clipped_at_one_by_default() -> None:
    assert _constants("runtime/constants.py")["GRADIENT_CLIPPING_DEFAULT"] == 1.0


def test_auto_is_what_the_trainer_takes_by_default() -> None:
    defaults = {}
    for node in ast.walk(_tree("transformers", "training_args.py")):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Call):
            for keyword in node.value.keywords:
                if keyword.arg == "default" and isinstance(keyword.value, ast.Constant):
                    defaults[node.target.id] = keyword.value.value
    for value, names in AUTO.values():
        found = tuple(defaults[name] for name in names.split(", ") if name)
        assert found in ((), (value,), value), names
