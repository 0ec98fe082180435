"""Layouts: what lies where among the bytes of a rank, as a document that names itself."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from windlass.checkpoint.memory.layout import Fragment, Layout
from windlass.dist.box import Box
from windlass.dist.errors import CheckpointError

WEIGHT = Fragment("model.weight", "float32", (4, 6), Box((1, 0), (2, 6)), 0, 48)
BIAS = Fragment("model.bias", "bfloat16", (6,), Box((0,), (6,)), 64, 12)
LAYOUT = Layout((WEIGHT, BIAS), 128, {"pieces": "opaque"})


def test_a_layout_returns_from_its_document_unchanged():
    back = Layout.parse(LAYOUT.dump(), LAYOUT.digest)
    assert back == LAYOUT and back.digest == LAYOUT.digest and len(back.digest) == 32


def test_layouts_that_differ_anywhere_have_different_names():
    others = [
        replace(LAYOUT, num_bytes=192),
        replace(LAYOUT, frames=None),
        replace(LAYOUT, fragments=(WEIGHT,)),
        replace(LAYOUT, fragments=(WEIGHT, replace(BIAS, key="model.bias2"))),
        replace(LAYOUT, fragments=(WEIGHT, replace(BIAS, dtype="float16"))),
    ]
    assert len({LAYOUT.digest, *(o.digest for o in others)}) == 1 + len(others)


@given(st.integers(0, len(LAYOUT.dump()) - 1), st.integers(1, 255))
def test_a_changed_byte_is_never_taken_for_the_layout(at, change):
    data = bytearray(LAYOUT.dump())
    data[at] ^= change
    with pytest.raises(CheckpointError, match="layout"):
        Layout.parse(bytes(data), LAYOUT.digest)


@given(st.integers(0, len(LAYOUT.dump()) - 1))
def test_a_truncated_document_is_refused(length):
    with pytest.raises(CheckpointError, match="layout"):
        Layout.parse(LAYOUT.dump()[:length])


WRONG: dict[str, Layout] = {
    "overlap": Layout((WEIGHT, replace(BIAS, offset=0)), 128),
    "unaligned": Layout((replace(WEIGHT, offset=8),), 128),
    "outside its tensor": Layout((replace(WEIGHT, box=Box((3, 0), (2, 6))),), 128),
    "another number of dimensions": Layout((replace(WEIGHT, box=Box((1,), (2,))),), 128),
    "bytes that fit no format": Layout((replace(WEIGHT, num_bytes=47),), 128),
    "bytes without elements": Layout((replace(WEIGHT, box=Box((1, 0), (0, 6))),), 128),
    "beyond the end": Layout((WEIGHT, BIAS), 70),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_layout_that_contradicts_itself_is_refused_by_name(name):
    layout = WRONG[name]
    with pytest.raises(CheckpointError, match=r"the layout is wrong"):
        Layout.parse(layout.dump(), layout.digest)


CHANGES: list[dict[str, Any]] = [
    {"version": 2},
    {"fragments": [1]},
    {"fragments": None},
    {"num_bytes": "x"},
    {"fragments": [[1] * 7]},
]


@pytest.mark.parametrize("change", CHANGES)
def test_json_that_is_no_layout_is_refused(change):
    document: dict[str, Any] = {**json.loads(LAYOUT.dump()), **change}
    with pytest.raises(CheckpointError, match="cannot be read"):
        Layout.parse(json.dumps(document).encode())


def test_tensors_without_elements_keep_their_name():
    layout = Layout((Fragment("model.none", "float32", (0, 3), Box((0, 0), (0, 3)), 0, 0), WEIGHT), 64)
    assert Layout.parse(layout.dump()).fragments[0].key == "model.none"
