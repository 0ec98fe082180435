"""Several datasets as one, in exact shares, and how a `DataConfig` becomes a dataset.

Which member serves a sample is a closed form of the sample's number, so a mixture has no state. Must not know: ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from windlass.data.config import DataConfig
from windlass.data.dataset import Row, Samples, TokenDataset, new_row, permutation
from windlass.data.facts import check_same_tokenizer, read_facts
from windlass.dist.errors import ConfigError

BLOCK = 64  # samples whose members are permuted together


class Mixture:
    """Samples of several datasets by weight.

    Of the first n * BLOCK samples, member k serves its share rounded to less than one sample per member before it.
    Within a block the order is permuted, so no rank's stride meets one member only.
    """

    def __init__(self, members: Sequence[tuple[Samples, float]], *, seed: int = 0) -> None:
        self.members = [dataset for dataset, _ in members]
        self.seq_len = self.members[0].seq_len
        self._seed = seed
        weights = [Fraction(str(weight)) for _, weight in members]
        # Each member takes its part of what the members before it left: counts stay monotone, and exact in integers.
        self._parts = [weight / sum(weights[k:]) for k, weight in enumerate(weights)]
        self.shares = [weight / sum(weights) for weight in weights]
        self._block_order = lru_cache(maxsize=8)(self._permute_block)

    @property
    def num_samples(self) -> int:
        """Rows of one epoch of every member together."""
        return sum(member.num_samples for member in self.members)

    @property
    def bytes_per_token(self) -> float:
        """Text bytes per labelled token as drawn."""
        return sum(float(share) * m.bytes_per_token for share, m in zip(self.shares, self.members, strict=True))

    def check_vocab(self, vocab_size: int) -> None:
        for member in self.members:
            member.check_vocab(vocab_size)

    def counts(self, num: int) -> list[int]:
        """Return how many of the first `num` draws each member serves."""
        counts = []
        for part in self._parts:
            counts.append(num * part.numerator // part.denominator)
            num -= counts[-1]
        return counts

    def locate(self, sample: int) -> tuple[int, int]:
        """Return (member, number of the sample within that member)."""
        block, offset = divmod(sample, BLOCK)
        draw = block * BLOCK + self._block_order(block)[offset]
        before, after = self.counts(draw), self.counts(draw + 1)
        member = next(k for k in range(len(before)) if after[k] > before[k])
        return member, before[member]

    def _permute_block(self, block: int) -> list[int]:
        return permutation(BLOCK, seed=self._seed, epoch=block, stream=2**63).tolist()

    def sample(self, sample: int) -> Row:
        """Return sample number `sample`."""
        row = new_row(self.seq_len)
        self.fill(sample, row)
        return row

    def fill(self, sample: int, row: Row) -> None:
        member, number = self.locate(sample)
        self.members[member].fill(number, row)


def check_data_config(config: DataConfig) -> None:
    """Raise ConfigError when the keys of `data` cannot work together."""
    if config.path is not None and config.mixture:
        raise ConfigError("data.path and data.mixture are both set: use path for one folder, mixture for several")
    for k, member in enumerate(config.mixture):
        key = f"data.mixture[{k}]"
        unknown = [name for name in member if name not in ("path", "weight")]
        if unknown:
            raise ConfigError(f"{key}.{unknown[0]}: unknown key; a member is {{path: FOLDER, weight: NUMBER}}")
        if not isinstance(member.get("path"), str):
            raise ConfigError(f"{key}.path: a folder written by `windlass data prepare` is needed")
        weight = member.get("weight", 1)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise ConfigError(f"{key}.weight = {weight!r}: a number above 0 is needed")


def open_data(config: DataConfig, split: str, seq_len: int) -> TokenDataset | Mixture | None:
    """Open the samples of a split; None if no data is configured, or if no folder holds anything of this split.

    Raises: DataError if a folder is missing or damaged, members have different tokenizers, or the split is too small.
    """
    check_data_config(config)
    members = [(m["path"], m.get("weight", 1)) for m in config.mixture] or [(config.path, 1)]
    members = [(path, weight) for path, weight in members if path is not None]
    facts = [read_facts(path) for path, _ in members]
    if facts:
        check_same_tokenizer(facts)
    opened = [
        (TokenDataset(path, split, seq_len, seed=config.seed, shuffle_window=config.shuffle_window), weight)
        for (path, weight), known in zip(members, facts, strict=True)
        if known.splits[split].documents
    ]
    if not opened:
        return None
    return opened[0][0] if len(opened) == 1 else Mixture(opened, seed=config.seed)
