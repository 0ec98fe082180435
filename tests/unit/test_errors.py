"""The error tree: one string each, so that every error crosses a process boundary."""

import pickle

import pytest

from windlass.dist import errors

KINDS = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.WindlassError)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_pickles_with_its_message(kind: type[errors.WindlassError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("what, where, why")))
    assert type(copy) is kind and str(copy) == "what, where, why"


def test_every_error_has_its_own_exit_code_and_place_in_the_tree() -> None:
    codes = [k.exit_code for k in KINDS]
    assert len(set(codes)) == len(codes) and 0 not in codes
    assert all(k.__name__ in (errors.__doc__ or "") for k in KINDS)
