"""Plain torch.distributed.checkpoint reads what four ranks wrote."""

import io
import pickle
import warnings

import pytest
import torch

from tests.checkpoint_doubles import blank, even_shards, save_shards, some_state
from windlass.dist.box import Box
from windlass.dist.dcp_format import DcpItem, DcpTensor, dcp_metadata


@pytest.fixture
def saved(tmp_path):
    state = some_state()
    return state, save_shards(tmp_path, 1, even_shards(state, 4)).folder


def test_load_fills_plain_tensors_in_a_single_process(saved):
    import torch.distributed.checkpoint as dcp

    state, folder = saved
    found = blank(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(found, storage_reader=dcp.FileSystemReader(folder))
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_conversion_to_a_torch_save_file_keeps_names(saved, tmp_path):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    state, folder = saved
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(folder, tmp_path / "whole.pt")
    found = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_each_item_is_an_archive_that_torch_loads(saved):
    state, folder = saved
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index, place = next((i, p) for i, p in metadata.storage_data.items() if i.fqn == "model.embed.weight")
    data = (folder / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
    piece = torch.load(io.BytesIO(data), weights_only=True)
    low = index.offset[0]
    assert torch.equal(piece, state["model.embed.weight"][low : low + piece.shape[0], : piece.shape[1]])


def test_metadata_equals_what_torch_itself_would_pickle():
    from torch.distributed.checkpoint import filesystem, metadata

    boxes = [Box((0, 0), (1, 3)), Box((1, 0), (1, 2))]
    items = [DcpItem(box, f"__{i}_0.distcp", 64 << 30 * i, 1000 + i) for i, box in enumerate(boxes)]
    tensors = {"model.x": DcpTensor((2, 3), torch.bfloat16, items), "é": DcpTensor((), torch.int64, [])}

    def tensor(shape, dtype, chunks):
        chunks = [metadata.ChunkStorageMetadata(torch.Size(b.offsets), torch.Size(b.sizes)) for b in chunks]
        return metadata.TensorStorageMetadata(metadata.TensorProperties(dtype), torch.Size(shape), chunks)

    expected = metadata.Metadata(
        state_dict_metadata={"model.x": tensor((2, 3), torch.bfloat16, boxes), "é": tensor((), torch.int64, [])},
        planner_data={"model.x": ("model.x",), "é": ("é",)},
        storage_data={
            metadata.MetadataIndex("model.x", (0, 0), 0): filesystem._StorageInfo("__0_0.distcp", 64, 1000),
            metadata.MetadataIndex("model.x", (1, 0), 1): filesystem._StorageInfo("__1_0.distcp", 64 << 30, 1001),
        },
    )
    found = pickle.loads(dcp_metadata(tensors))
    assert found == expected
    assert [index.index for index in found.storage_data] == [0, 1]
    assert isinstance(found.state_dict_metadata["model.x"].size, torch.Size)
