"""What a user may say about the pipeline: the policy dataclass of the group `pipeline`.

Must not know: models, what a schedule is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from windlass.parallel.pipeline.builders import BUILDERS

ALGORITHMS = {"off": 0, "1": 1, "2": 2}  # pipeline.vocab -> Layout.vocab


@dataclass(frozen=True)
class PipelineConfig:
    """How the pipeline ranks (`parallelism.pp`) share the model and in which order they work."""

    schedule: str = field(
        default="auto",
        metadata={
            "help": f"order of work: {', '.join(BUILDERS)}, or a schedule file (.json or text); auto: the one with the "
            "shortest simulated step that fits"
        },
    )
    vocab: str = field(
        default="auto",
        metadata={
            "help": "cut embedding and head by vocabulary rows over all pipeline ranks. off: no; 1, 2: with this "
            "algorithm (2 keeps one micro-batch less in flight); auto: chosen together with the schedule",
            "choices": ("auto", *ALGORITHMS),
        },
    )
    chunks: int = field(
        default=2, metadata={"help": "schedule interleaved: stages on every rank", "unit": "stages", "ge": 2}
    )
    cut: list[int] = field(
        default_factory=list,
        metadata={"help": "number of blocks of every stage, first to last (empty: so that the slowest is quickest)"},
    )
    speeds: list[float] = field(
        default_factory=list,
        metadata={"help": "relative speed of every pipeline rank, for mixed clusters (empty: all the same)"},
    )
    measured: str | None = field(
        default=None,
        metadata={
            "help": "run folder whose profiler recorded a step of this model: cut and schedule follow what its parts "
            "took (null: their FLOPs)"
        },
    )
    vocab_shares: list[float] = field(
        default_factory=list,
        metadata={"help": "share of the vocabulary of every pipeline rank (empty: in proportion to speeds)"},
    )
    vocab_chunk: int = field(
        default=0,
        metadata={
            "help": "vocabulary rows of a shard whose logits exist at one time (0: all)",
            "unit": "rows",
            "ge": 0,
        },
    )
