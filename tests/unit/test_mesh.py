"""The mesh: coordinates, views and what the configuration may ask for."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from windlass.dist.errors import PlanError
from windlass.dist.mesh import AXES, Mesh, ParallelismConfig, plan_mesh

meshes = st.fixed_dictionaries({axis: st.integers(1, 3) for axis in AXES}).map(Mesh)


@given(meshes)
def test_coordinates_and_ranks_are_inverse_and_inner_axes_vary_fastest(mesh: Mesh) -> None:
    coords = [mesh.coords(rank) for rank in range(mesh.world_size)]
    assert [mesh.rank_at(c) for c in coords] == list(range(mesh.world_size))
    assert [tuple(c.values()) for c in coords] == sorted(tuple(c.values()) for c in coords)


@given(meshes, st.sets(st.sampled_from(AXES), min_size=1))
def test_the_groups_along_axes_cut_the_world_into_equal_parts(mesh: Mesh, axes: set[str]) -> None:
    names = tuple(axes)
    groups = {mesh.ranks_along(names, rank) for rank in range(mesh.world_size)}
    assert sorted(r for group in groups for r in group) == list(range(mesh.world_size))
    assert {len(group) for group in groups} == {mesh.size(names)} == {math.prod(mesh.sizes[a] for a in names)}
    assert all(mesh.ranks_along(names, r)[mesh.index_along(names, r)] == r for r in range(mesh.world_size))


def test_data_parallel_is_a_view_of_two_axes() -> None:
    mesh = Mesh({"pp": 2, "dp_replicate": 2, "dp_shard": 3})
    assert mesh.ranks_along("dp", 7) == mesh.ranks_along(("dp_replicate", "dp_shard"), 7) == (6, 7, 8, 9, 10, 11)
    assert mesh.ranks_along("dp_shard", 7) == (6, 7, 8) and mesh.ranks_along("dp_replicate", 7) == (7, 10)
    assert mesh.ranks_along("world", 0) == tuple(range(12)) and str(mesh) == "pp=2 x dp_replicate=2 x dp_shard=3"


@given(st.integers(1, 64))
def test_every_divisor_of_the_world_makes_a_mesh(world_size: int) -> None:
    for pp in divisors(world_size):
        for replicate in divisors(world_size // pp):
            mesh = plan_mesh(ParallelismConfig(pp=pp, dp_replicate=replicate), world_size)
            assert (mesh.sizes["pp"], mesh.sizes["dp_replicate"]) == (pp, replicate)
            assert mesh.size("dp") * pp == mesh.world_size == world_size


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def test_the_ranks_of_a_pipeline_are_as_far_apart_as_there_are_data_parallel_ranks() -> None:
    mesh = plan_mesh(ParallelismConfig(pp=2, dp_replicate=2), 8)
    assert str(mesh) == "pp=2 x dp_replicate=2 x dp_shard=2"
    assert mesh.ranks_along("pp", 1) == (1, 5) and mesh.ranks_along("dp", 5) == (4, 5, 6, 7)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ParallelismConfig(dp_replicate=4), r"dp_replicate = 4 does not divide the 6 ranks.*Use one of \[1, 2, 3, 6\]"),
        (
            ParallelismConfig(dp_replicate=2, dp_shard=2),
            "2 x 2 = 4, but the job has 6 ranks. Use 1 x 6 or 2 x 3 or 3 x 2",
        ),
        (ParallelismConfig(dp_shard=0), "1 x 0 = 0, but the job has 6 ranks"),
        (ParallelismConfig(pp=4), r"parallelism.pp = 4 does not divide the 6 ranks.*Use one of \[1, 2, 3, 6\]"),
        (
            ParallelismConfig(pp=2, dp_replicate=2),
            r"dp_replicate = 2 does not divide the 3 data-parallel ranks \(6 / parallelism.pp = 2\).*one of \[1, 3\]",
        ),
        (
            ParallelismConfig(pp=3, dp_shard=3),
            r"1 x 3 = 3, but the job has 2 data-parallel ranks \(6 / parallelism.pp = 3\). Use 1 x 2 or 2 x 1",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_names_what_would(config: ParallelismConfig, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        plan_mesh(config, 6)


def test_unknown_axes_and_ranks_are_refused() -> None:
    with pytest.raises(PlanError, match="unknown mesh axes"):
        Mesh({"tp": 2})
    with pytest.raises(PlanError, match="at least one rank"):
        Mesh({"pp": 0})
    with pytest.raises(PlanError, match="rank 2 is outside the mesh dp_shard=2 of 2 ranks"):
        Mesh({"dp_shard": 2}).coords(2)
    with pytest.raises(PlanError, match="distinct names"):
        Mesh({"dp_shard": 2}).ranks_along(("dp", "dp_shard"), 0)
