"""Windlass: train models far larger than device memory, on one GPU or a cluster, without losing work.

The root folders of a checkout are sub-packages of `windlass` (`dist/` is `windlass.dist`). An installed wheel gets
them from the package mapping in pyproject.toml; in a source tree they lie beside this folder, hence the path below.

The names in `__all__` are the public API, loaded when they are first used:

    import windlass
    loaded = windlass.load_job("quickstart", ["data.path=tokens", "zero.stage=3"])
    windlass.check_job(loaded, world_size=1)
    with windlass.build_run(loaded.config, windlass.read_process_env()) as run:
        windlass.Trainer(run).train()
"""

import os as _os
from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if _os.path.isfile(_os.path.join(_root, "pyproject.toml")):
    __path__.append(_root)

__version__ = "0.1.0"

_HOMES = {
    "Batch": "data.batch",
    "BlockModel": "model.protocol",
    "Comm": "dist.comm",
    "Engine": "parallel.engine",
    "HfReader": "model.hf_read",
    "Init": "model.protocol",
    "JobConfig": "launch.config",
    "Loader": "data.loader",
    "ModelConfig": "model.config",
    "Plan": "launch.plan",
    "Run": "launch.run",
    "StepReport": "parallel.engine",
    "Trainer": "launch.trainer",
    "WindlassError": "dist.errors",
    "build_model": "model.build",
    "build_run": "launch.run",
    "check_job": "launch.config",
    "export_hf": "model.hf_write",
    "load_job": "launch.config",
    "make_plan": "launch.plan",
    "prepare": "data.prepare",
    "read_process_env": "dist.env",
    "run_worker": "launch.run",
}
__all__ = [*_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> _Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'windlass' has no attribute '{name}'")
    value = getattr(_import_module(f"windlass.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


if _TYPE_CHECKING:
    from windlass.data.batch import Batch as Batch
    from windlass.data.loader import Loader as Loader
    from windlass.data.prepare import prepare as prepare
    from windlass.dist.comm import Comm as Comm
    from windlass.dist.env import read_process_env as read_process_env
    from windlass.dist.errors import WindlassError as WindlassError
    from windlass.launch.config import JobConfig as JobConfig
    from windlass.launch.config import check_job as check_job
    from windlass.launch.config import load_job as load_job
    from windlass.launch.plan import Plan as Plan
    from windlass.launch.plan import make_plan as make_plan
    from windlass.launch.run import Run as Run
    from windlass.launch.run import build_run as build_run
    from windlass.launch.run import run_worker as run_worker
    from windlass.launch.trainer import Trainer as Trainer
    from windlass.model.build import build_model as build_model
    from windlass.model.config import ModelConfig as ModelConfig
    from windlass.model.hf_read import HfReader as HfReader
    from windlass.model.hf_write import export_hf as export_hf
    from windlass.model.protocol import BlockModel as BlockModel
    from windlass.model.protocol import Init as Init
    from windlass.parallel.engine import Engine as Engine
    from windlass.parallel.engine import StepReport as StepReport
