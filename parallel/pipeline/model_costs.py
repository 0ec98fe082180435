"""What a model costs as a pipeline sees it: every block, the head and the embedding as parts, before anything exists.

FLOPs follow `model.flops`; bytes of state are those of `parallel.memory`; activations are the inputs and outputs of
every matrix product, which is within a fifth of what `parallel.footprint` finds but needs no trial run.
Must not know: schedules, how many pipeline ranks there are.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

from windlass.model.flops import attention_flops_per_token
from windlass.model.protocol import BlockModel
from windlass.parallel.memory import state_bytes
from windlass.parallel.optim import OptimizerConfig
from windlass.parallel.pipeline.costs import Part
from windlass.parallel.precision import PrecisionConfig
from windlass.parallel.units import plan_units
from windlass.parallel.zero import ZeroConfig

# Where the cluster's rates are not known: sending hidden states, as a share of one block's forward. On GPUs with their
# interconnects as on CPUs with shared memory it is 2 to 16 %.
ASSUMED_MESSAGE = 0.05
ASSUMED_LATENCY_S = 20e-6  # of any message, where rates are known

_NOTHING = Part(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class ModelCosts:
    """One micro-batch of a model on a rank of speed 1, part by part; head and embedding of the whole vocabulary.

    Units:  seconds, or forwards of a mean block if the rate of a rank is not known; bytes; `limit_bytes` is what a rank
            may hold of these
    """

    blocks: tuple[Part, ...]
    block_state_bytes: tuple[int, ...]
    head: Part = _NOTHING  # in three passes, as vocabulary parallelism runs it
    embedding: Part = _NOTHING
    head_state_bytes: int = 0
    embedding_state_bytes: int = 0
    hidden_bytes: float = 0.0
    statistics_bytes: float = 0.0
    chunk_bytes: float = 0.0  # logits that exist at one time in a head that is not cut
    num_shards: int = 1
    latency_s: float = 0.0
    bytes_per_s: float = math.inf
    limit_bytes: float = math.inf
    in_seconds: bool = False
    source: str = ""  # the run that measured the seconds; empty: they follow from FLOPs

    @property
    def whole_head(self) -> Part:
        """The head as the last stage runs it: the loss forms both gradients in its forward and keeps them."""
        h = self.head
        seconds = h.forward_s + h.input_gradient_s + h.weight_gradient_s
        return Part(seconds, 0.0, 0.0, self.hidden_bytes + h.parameter_bytes, h.parameter_bytes)

    @classmethod
    def uniform(cls, num_blocks: int) -> ModelCosts:
        """Return blocks that are all alike under a head and an embedding that cost next to nothing."""
        block = Part(1.0, 1.0, 1.0, activation_bytes=1.0)
        return cls((block,) * num_blocks, (0,) * num_blocks, head=Part(0.01, 0.01, 0.01))


def model_costs(
    model: BlockModel,
    *,
    micro_batch: int,
    seq_len: int,
    loss_chunk_tokens: int,
    zero: ZeroConfig,
    precision: PrecisionConfig,
    optimizer: OptimizerConfig,
    num_shards: int,
    flops_per_s: float = 0.0,
    bytes_per_s: float = 0.0,
    limit_bytes: float = math.inf,
) -> ModelCosts:
    """Work out the costs of a model whose parameters are on the meta device; rates of 0 are not known."""
    tokens = micro_batch * seq_len
    itemsize, exact = precision.param_dtype.itemsize, precision.master_dtype.itemsize
    sizes = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    attention = attention_flops_per_token(model, seq_len) * tokens
    rate = flops_per_s or attention + 2.0 * tokens * sum(sizes) / len(sizes)
    blocks = []
    for block, numel in zip(model.blocks, sizes, strict=True):
        linear_s, attention_s = 2.0 * tokens * numel / rate, attention / rate
        kept = sum(sum(p.shape) for p in block.parameters() if p.dim() == 2) * tokens * itemsize
        # Attention has no weights: its backward is twice its forward, all of it for the input.
        blocks.append(Part(linear_s + attention_s, linear_s + 2 * attention_s, linear_s, kept, numel * itemsize))
    matrices = [p for part in (model.head, model.embed) for p in part.parameters() if p.dim() == 2]
    vocab, width = max((tuple(p.shape) for p in matrices), default=(0, 0), key=math.prod)
    product_s, lookup_s = 2.0 * tokens * vocab * width / rate, tokens * width / rate
    units = plan_units(model, num_shards)
    states: Counter[str] = Counter()
    for unit in units.units:
        held = state_bytes(replace(units, units=(unit,)), zero, precision, optimizer)
        states[unit.name.removesuffix(".frozen")] += sum(held.values())
    hidden_bytes = float(tokens * width * itemsize)
    forward_s = sum(block.forward_s for block in blocks) / len(blocks)
    latency_s, rate_between = link(hidden_bytes, forward_s, bytes_per_s if flops_per_s else 0.0)
    return ModelCosts(
        blocks=tuple(blocks),
        block_state_bytes=tuple(states[f"blocks.{i}"] for i in range(len(blocks))),
        head=Part(product_s, product_s, product_s, float(tokens * vocab * itemsize), vocab * width * itemsize),
        embedding=Part(lookup_s, 0.0, 2 * lookup_s, 0.0, vocab * width * itemsize),
        head_state_bytes=states["head"],
        embedding_state_bytes=states["embed"],
        hidden_bytes=hidden_bytes,
        statistics_bytes=2.0 * tokens * exact,
        chunk_bytes=float(min(tokens, loss_chunk_tokens or tokens) * vocab * (itemsize + exact)),
        num_shards=num_shards,
        latency_s=latency_s,
        bytes_per_s=rate_between,
        limit_bytes=limit_bytes,
        in_seconds=flops_per_s > 0,
    )


def link(hidden_bytes: float, forward_s: float, bytes_per_s: float) -> tuple[float, float]:
    """Return latency and rate of messages between ranks; a rate that is not known (0) follows a block's forward."""
    if bytes_per_s:
        return ASSUMED_LATENCY_S, bytes_per_s
    return 0.0, hidden_bytes / (ASSUMED_MESSAGE * forward_s)
