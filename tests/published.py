"""What the paper on vocabulary parallelism measured, and the same step in the simulator.

Source:  Yeung et al. 2024, arXiv:2411.05288: 1F1B with micro-batches of one sequence, 128 per step, on A100.
         8 GPUs: settings and figures of the artifact in github.com/sail-sg/VocabularyParallelism (full-exp.txt).
         32 GPUs: figures of table 5, whose model is given as 21B. 64 layers of width 5120 are derived: the 4B model is
         32 layers of 3072, and 12 * 64 * 5120^2 = 20.1B parameters without the vocabulary.
         V-Half, table 6: only the smallest and the largest gain are given here, from the paper's summary.
Assumed: every part runs at one FLOP rate, so that only ratios of FLOPs count (table 4); 10 us and 20 GB/s between
         ranks. The slowdown of cut matrices (table 3) is left out, so that gains at 32 GPUs are on the high side.
         The models of table 6: one layer per stage and the widths that make 7B, 16B and 30B parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from windlass.parallel.pipeline.builders import build
from windlass.parallel.pipeline.costs import Costs, transformer_parts
from windlass.parallel.pipeline.passes import lower
from windlass.parallel.pipeline.simulate import simulate

NUM_MICRO_BATCHES = 128
FLOPS_PER_S = 0.6 * 312e12


@dataclass(frozen=True)
class Published:
    """A model, a pipeline, and the percentage of peak FLOPs by vocabulary: (whole head on one rank, algorithm 1, 2)."""

    schedule: str

    num_ranks: int
    layers: int
    hidden: int
    sequence: int
    mfu: tuple[tuple[int, tuple[float, float, float]], ...]

    def cases(self) -> list[tuple[int, int, float]]:
        """Return vocabulary, algorithm and how many times faster than without it."""
        return [(vocab, n, row[n] / row[0]) for vocab, row in self.mfu for n in (1, 2)]


ONE_NODE = Published(
    schedule="1f1b",
    num_ranks=8,
    layers=32,
    hidden=3072,
    sequence=4096,
    mfu=(
        (32_000, (52.82, 58.52, 58.23)),
        (64_000, (45.78, 58.22, 57.94)),
        (128_000, (37.13, 57.87, 57.40)),
        (256_000, (27.63, 57.31, 56.61)),
    ),
)
FOUR_NODES = Published(
    schedule="1f1b",
    num_ranks=32,
    layers=64,
    hidden=5120,
    sequence=2048,
    mfu=(
        (32_000, (42.8, 45.9, 45.5)),
        (64_000, (37.3, 45.9, 45.9)),
        (128_000, (29.0, 45.9, 45.9)),
        (256_000, (20.9, 46.1, 46.2)),
    ),
)
# V-Half with algorithm 1 against V-Half without, over all cells of table 6: the smallest and the largest gain.
V_HALF_RANGE = (1.072, 2.43)
V_HALF = tuple(
    Published("vhalf", num_ranks, layers, hidden, sequence, mfu=())
    for num_ranks, layers, hidden in ((16, 32, 4096), (24, 48, 5120), (32, 64, 6144))
    for sequence in (2048, 4096)
)


def simulated_gain(case: Published, vocab: int, algorithm: int) -> float:
    """Return how many times faster a step is with vocabulary parallelism than with the whole head on the last rank."""
    return _step_s(case, vocab, 0) / _step_s(case, vocab, algorithm)


@cache
def _step_s(case: Published, vocab: int, algorithm: int) -> float:
    layout = build(case.schedule, case.num_ranks, 1, vocab=algorithm).layout
    block, head, embedding = transformer_parts(
        hidden=case.hidden, sequence=case.sequence, vocab=vocab, flops_per_s=FLOPS_PER_S
    )
    costs = Costs.from_parts(
        layout,
        [block * (case.layers / layout.num_stages)] * layout.num_stages,
        head=head,
        embedding=embedding,
        hidden_bytes=2.0 * case.sequence * case.hidden,
        statistics_bytes=12.0 * case.sequence,
        latency_s=10e-6,
        bytes_per_s=20e9,
    )
    schedule = build(case.schedule, case.num_ranks, NUM_MICRO_BATCHES, vocab=algorithm, costs=costs)
    return simulate(lower(schedule), costs).total_s
