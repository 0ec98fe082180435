"""Construction without weights: parameters on the meta device, initialisers skipped.

Must not know: what is constructed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _SkipInitialisers(TorchFunctionMode):
    # On the meta device torch.nn.init computes nothing, but its random functions import torch's compiler first: seconds
    # of every start.

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def weightless() -> Iterator[None]:
    """Let modules built inside have their parameters and buffers on the meta device, unless they name another."""
    with torch.device("meta"), _SkipInitialisers():
        yield
