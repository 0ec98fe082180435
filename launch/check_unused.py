"""Refuses a setting that would have no effect: whoever gives one expects something of it."""

from __future__ import annotations

from windlass.dist.errors import ConfigError
from windlass.launch.job import Loaded


def unused(loaded: Loaded, path: str, why: str) -> None:
    """Refuse a key that the user has given.

    Raises:      ConfigError saying where it was given and `why` it has no effect
    """
    if path in loaded.given:
        raise ConfigError(f"{loaded.at(path)}: has no effect {why}. Remove it, or change that.")
