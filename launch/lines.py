"""Lines for people, from whoever starts and watches workers. What cannot be shown must not end what it tells of.

Must not know: who says what.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TextIO


def say(text: str, stream: TextIO | None = None) -> None:
    """Write lines to a stream, by default stderr, in one go: workers may write there too.

    What its encoding lacks is written as an escape. On a full disk, or where nobody reads any more, they are lost.

    Invariant:   never raises
    """
    target = sys.stderr if stream is None else stream
    if target is None:  # closed before this process began
        return
    encoding = target.encoding or "utf-8"
    with contextlib.suppress(OSError):
        target.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        target.flush()
