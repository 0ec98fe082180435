"""cuFile moves device memory to and from a state file; host memory takes the other way into the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.state_files import Drive, pages
from windlass.dist.errors import OffloadError
from windlass.offload.engines import BLOCK_BYTES, PAGE, build_engine, page_buffer
from windlass.offload.extents import Extent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
COUNT = BLOCK_BYTES // PAGE + 3


@pytest.mark.parametrize("checksums", [False, True])
def test_what_a_device_wrote_is_read_by_device_and_host(tmp_path: Path, checksums: bool) -> None:
    try:
        engine = build_engine("gds")
    except OffloadError as error:
        pytest.skip(str(error))
    with Drive(tmp_path) as drive:
        file = drive.create([Extent("k", COUNT * PAGE)], engine=engine, checksums=checksums)
        data = pages(COUNT)
        file.write("k", 0, 0, data.cuda())
        file.read("k", 0, 0, on_device := torch.zeros(COUNT * PAGE, dtype=torch.uint8, device="cuda"))
        file.read("k", 0, 0, on_host := page_buffer(COUNT * PAGE))
        assert torch.equal(on_device.cpu(), data) and torch.equal(on_host, data)
