"""Planning must not slow down the start of a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_planning_without_activations_imports_no_compiler() -> None:
    script = (
        "import sys\n"
        "from windlass.launch.config import load_job\n"
        "from windlass.launch.plan import make_plan\n"
        "for job in ('quickstart', 'pretrain-125m', 'pretrain-7b'):\n"
        "    config = load_job(job).config\n"
        "    make_plan(config, 64, config.cluster, 'cpu', activations=False)\n"
        "config = load_job('pipeline-vocab', ['pipeline.schedule=auto', 'pipeline.vocab=auto']).config\n"
        "make_plan(config, 4, config.cluster, 'cpu', activations=False)\n"
        "print([m for m in ('torch._dynamo', 'sympy') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
