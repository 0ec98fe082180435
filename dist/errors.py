"""Every error that Windlass raises on purpose.

    WindlassError
      ConfigError        a key, value or combination in the job's configuration
      PlanError          the job cannot run on this cluster
      DataError          input text, token shards or batches
      ModelError         a model folder, preset or user model
      CommError          bytes between ranks: mismatch, timeout, lost peer
      OffloadError       tiers, budgets, NVMe
        TierOutOfMemory  more was asked of a tier than its budget
      CheckpointError    saving, verifying, restoring
        DamagedError     what was kept is not what was written
      NumericsError      non-finite loss or gradient
        SpikeError       the loss jumped: the run goes back and on without some samples
      WorkerError        a rank failed; carries who and the first cause

A message says what, where, why, and the value that would work. Every error is built from one string, so it pickles.
The command line prints the message without a traceback and exits with `exit_code`.
"""

from __future__ import annotations


class WindlassError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1


class ConfigError(WindlassError):
    """A configuration key, value or combination that cannot work."""

    exit_code = 2


class PlanError(WindlassError):
    """The job cannot run on the given cluster."""

    exit_code = 3


class DataError(WindlassError):
    """Input text, token shards or batches are missing, damaged or do not fit the model."""

    exit_code = 4


class ModelError(WindlassError):
    """A model folder, preset or user model that cannot be used."""

    exit_code = 5


class CommError(WindlassError):
    """A collective was called wrongly, timed out, or lost a peer."""

    exit_code = 6


class OffloadError(WindlassError):
    """A tier, budget or NVMe operation failed."""

    exit_code = 7


class TierOutOfMemory(OffloadError):
    """More was asked of a tier than its budget holds."""

    exit_code = 11


class CheckpointError(WindlassError):
    """State could not be saved, verified or restored."""

    exit_code = 8


class DamagedError(CheckpointError):
    """What was kept is not what was written, and never will be again."""

    exit_code = 13


class NumericsError(WindlassError):
    """A loss or gradient is not finite."""

    exit_code = 9


class SpikeError(NumericsError):
    """The loss jumped: the run goes back, and on without the samples that it met there."""

    exit_code = 12


class WorkerError(WindlassError):
    """One or more ranks failed."""

    exit_code = 10
