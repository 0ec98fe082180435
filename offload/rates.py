"""How fast every lane of one rank is: measured facts of a cluster, and what is assumed where one is missing.

Must not know: plans, what is moved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from windlass.dist.cluster import ClusterConfig

# Lanes that move bytes, and the lane that shares their link.
PARTNER = {"h2d": "d2h", "d2h": "h2d", "file read": "file write", "file write": "file read"}


@dataclass(frozen=True)
class Rates:
    """Rates of one rank. 0: not known; a lane takes its partner's rate then, or no time if that is not known either.

    Units:  bytes/s of a copy alone; `duplex` and `file_mixed` sums of both directions at once; `cpu_update`,
            `device_update` and `cpu_cast` elements/s; `host_memory` bytes read and written per second
    Differs: a missing `duplex` is the sum of both, because links are full-duplex; a missing `file_mixed` their mean,
             because drives are not
    """

    h2d: float = 0.0
    d2h: float = 0.0
    duplex: float = 0.0
    file_read: float = 0.0
    file_write: float = 0.0
    file_mixed: float = 0.0
    cpu_update: float = 0.0
    device_update: float = 0.0
    cpu_cast: float = 0.0
    host_memory: float = 0.0

    @staticmethod
    def of(cluster: ClusterConfig, ranks_per_host: int = 1) -> Rates:
        """Return the rates of one rank, which shares its host's memory, drives and cores with the others."""
        share = 1.0 / max(1, ranks_per_host)
        return Rates(
            h2d=cluster.h2d_bytes_per_s,
            d2h=cluster.d2h_bytes_per_s,
            duplex=cluster.duplex_bytes_per_s,
            file_read=cluster.nvme_read_bytes_per_s * share,
            file_write=cluster.nvme_write_bytes_per_s * share,
            file_mixed=cluster.nvme_mixed_bytes_per_s * share,
            cpu_update=cluster.cpu_update_per_s * share,
            device_update=cluster.device_update_per_s,
            cpu_cast=cluster.cpu_cast_per_s * share,
            host_memory=cluster.host_memory_bytes_per_s * share,
        )

    @property
    def unknown(self) -> list[str]:
        """Names of the rates that nothing is known about."""
        known = {f.name for f in fields(self) if getattr(self, f.name)}
        links = ({"h2d", "d2h", "duplex"}, {"file_read", "file_write", "file_mixed"})
        missing = [name for group in links if not known & group for name in sorted(group)]
        return missing + [n for n in ("cpu_update", "device_update", "cpu_cast", "host_memory") if n not in known]

    def alone(self, lane: str) -> float:
        """Return the bytes/s of a copy lane whose partner is idle; infinite if not known."""
        match lane:
            case "h2d":
                return self.h2d or self.d2h or self.duplex or math.inf
            case "d2h":
                return self.d2h or self.h2d or self.duplex or math.inf
            case "file read":
                return self.file_read or self.file_mixed or self.file_write or math.inf
            case "file write":
                return self.file_write or self.file_mixed or self.file_read or math.inf
        return math.inf

    def together(self, lane: str) -> float:
        """Return the bytes/s of a copy lane while its partner is busy: its part of what both have, by their speeds."""
        own, other = self.alone(lane), self.alone(PARTNER[lane])
        if math.isinf(own) or math.isinf(other):
            return own
        if lane in ("h2d", "d2h"):
            both = self.duplex or own + other
        else:
            both = self.file_mixed or (own + other) / 2
        return min(own, both * own / (own + other))

    def update_s(self, elements: int, casts: int = 0, copies: int = 0) -> float:
        """Return the seconds that the CPU takes to update elements, cast some of them, and copy bytes beside it."""
        parts = ((elements, self.cpu_update), (casts, self.cpu_cast), (copies, self.host_memory))
        return sum(amount / rate for amount, rate in parts if rate)

    def device_s(self, elements: int) -> float:
        """Return the seconds that the device takes to update elements."""
        return elements / self.device_update if self.device_update else 0.0

    @property
    def cpu_s_per_element(self) -> float:
        """Seconds to update one element on the CPU and cast it."""
        return self.update_s(1, 1)

    @property
    def assumed(self) -> Rates:
        """These rates with cautious values for what is not known: a slow link, one slow drive, a few cores."""
        links = ({"h2d": 10e9}, {"file_read": 2e9, "file_write": 1e9})
        values = {"cpu_update": 1e9, "device_update": 20e9, "cpu_cast": 4e9}
        for group in links:
            if set(group) & set(self.unknown):
                values |= group
        return replace(self, **{name: value for name, value in values.items() if not getattr(self, name)})
