"""Which bytes of which member of a redundancy group protect each other.

A group of n members survives the loss of k. The data of each member, thought to be padded with zeros to n-k equal
blocks, is spread over n stripes. In stripe j the members j, j+1, .. j+k-1 (mod n) hold parity, and each other member
contributes one block of its data: so every block is used once, every member holds k parity blocks, and whichever
members go, the work of rebuilding is spread over the others. Coding is bytewise, so equal ranges of the blocks of a
stripe decode alone. Blocks are whole chunks, so a range that is whole chunks of one block is that of all.

    n = 4, k = 1      member 0   member 1   member 2   member 3
      stripe 0         parity    block 0    block 1    block 2
      stripe 1        block 2     parity    block 0    block 1
      stripe 2        block 1    block 2     parity    block 0
      stripe 3        block 0    block 1    block 2     parity

Must not know: how blocks are combined (codes.py), where bytes are (encode.py, decode.py).
Source: RAID-5 rotation over nodes: REFT (arXiv:2310.12670), SCR/redset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from windlass.dist.errors import PlanError

DATA, PARITY = "data", "parity"


@dataclass(frozen=True)
class Block:
    """Bytes of a segment that are one block of a stripe: `length` of them from `start`, the rest of the block is zero.

    Units: bytes
    """

    rank: int
    role: str  # DATA or PARITY: which segment of the rank
    start: int
    length: int


@dataclass(frozen=True)
class Stripes:
    """The stripes of one group: `ranks[m]` is member m and has `sizes[m]` bytes of data.

    Units: bytes
    """

    ranks: tuple[int, ...]
    sizes: tuple[int, ...]
    k: int
    chunk_bytes: int

    def __post_init__(self) -> None:
        if not 1 <= self.k < len(self.ranks) or len(self.sizes) != len(self.ranks):
            raise PlanError(
                f"group {self.ranks} with {len(self.sizes)} sizes and {self.k} parity blocks: needs a size for each "
                f"member and 1 to {len(self.ranks) - 1} parity blocks"
            )

    @property
    def n(self) -> int:
        return len(self.ranks)

    @property
    def num_data(self) -> int:
        """Return the number of data blocks of a stripe, and of a member."""
        return self.n - self.k

    @cached_property
    def block_bytes(self) -> int:
        """Return the length of every block: whole chunks."""
        blocks = -(-max(self.sizes) // self.num_data)
        return -(-blocks // self.chunk_bytes) * self.chunk_bytes

    @property
    def parity_bytes(self) -> int:
        """Return what the parity segment of each member holds."""
        return self.k * self.block_bytes

    def stripe(self, number: int) -> list[Block]:
        """Return the blocks of a stripe: n-k data blocks in the order of the code, then k parity blocks."""
        data = [self._data(number, index) for index in range(self.num_data)]
        return data + [self._parity(number, index) for index in range(self.k)]

    def _data(self, stripe: int, index: int) -> Block:
        member = (stripe + self.k + index) % self.n
        start = index * self.block_bytes
        return Block(self.ranks[member], DATA, start, min(max(self.sizes[member] - start, 0), self.block_bytes))

    def _parity(self, stripe: int, index: int) -> Block:
        return Block(self.ranks[(stripe + index) % self.n], PARITY, index * self.block_bytes, self.block_bytes)

    def stripe_of_data(self, rank: int, block: int) -> int:
        """Return the stripe which a data block of a member is part of; its place in it is `block`."""
        return (self.ranks.index(rank) - self.k - block) % self.n

    def stripe_of_parity(self, rank: int, block: int) -> int:
        """Return the stripe of a parity block (0 to k-1) that a member holds; its place in it is n-k+`block`."""
        return (self.ranks.index(rank) - block) % self.n

    def wards(self, rank: int) -> list[int]:
        """Return the k members before this one: it keeps what must be known of them if they are lost.

        Invariant: of any k lost members, each is the ward of one that is not
        """
        member = self.ranks.index(rank)
        return [self.ranks[(member - back) % self.n] for back in range(1, self.k + 1)]

    def xor_sources(self, rank: int) -> Sequence[Block]:
        """Return what a member of a group with k = 1 combines: its parity is the XOR of these, each laid at offset 0.

        Empty blocks are left out; the first is not always the longest.
        """
        if self.k != 1:
            raise PlanError(f"group {self.ranks} has {self.k} parity blocks: only one of them can be an XOR")
        blocks = self.stripe(self.stripe_of_parity(rank, 0))[: self.num_data]
        return [block for block in blocks if block.length]
