"""`import windlass` is light and offers the public names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import windlass


@pytest.mark.parametrize("name", windlass.__all__)
def test_every_public_name_is_what_its_home_module_calls_so(name: str) -> None:
    found = getattr(windlass, name)
    assert found.__name__ == name and found.__module__.startswith("windlass.")
    assert name in dir(windlass)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = windlass.nonsense


def test_importing_windlass_imports_nothing_heavy() -> None:
    code = "import sys, windlass; print(sorted({'torch', 'ray', 'pyarrow', 'transformers'} & set(sys.modules)))"
    root = Path(windlass.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout == "[]\n"
