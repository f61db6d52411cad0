"""The mesh of an engine's ranks: groups along its axes cover it, and axes that are not built are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_platforms import FakePlatform, candidates
from hypothesis import given
from hypothesis import strategies as st

from hotplug.core.config import EngineConfig
from hotplug.core.errors import FeatureError
from hotplug.core.parallel.mesh import AXES, Mesh
from hotplug.core.platform.rank_group import RankGroup
from hotplug.core.startup.bind import bind

SIZES = st.integers(1, 4)
MESHES = st.builds(Mesh, tp=SIZES, pp=SIZES, ep=SIZES, dp=SIZES)


@given(MESHES)
def test_along_every_axis_each_rank_is_in_one_group_of_its_length(mesh: Mesh) -> None:
    assert mesh.size == mesh.tp * mesh.pp * mesh.ep * mesh.dp
    for axis in AXES:
        groups = mesh.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.size))
        assert {len(group) for group in groups} == {mesh.length(axis)}


@given(MESHES, st.data())
def test_all_ranks_of_a_group_see_the_same_group_each_from_its_own_place(mesh: Mesh, data: st.DataObject) -> None:
    rank, axis = data.draw(st.integers(0, mesh.size - 1)), data.draw(st.sampled_from(AXES))
    group = mesh.group(axis, rank)
    assert (group.name, group.rank, group.ranks[group.position], group.size) == (axis, rank, rank, mesh.length(axis))
    for other in group:
        assert mesh.group(axis, other).ranks == group.ranks


@given(MESHES, st.data())
def test_groups_along_two_axes_share_one_rank_alone(mesh: Mesh, data: st.DataObject) -> None:
    """So that places along all axes name a rank."""
    rank = data.draw(st.integers(0, mesh.size - 1))
    for axis in AXES:
        for other in AXES:
            if axis != other:
                assert set(mesh.group(axis, rank)) & set(mesh.group(other, rank)) == {rank}
    assert len({tuple(mesh.group(axis, one).position for axis in AXES) for one in range(mesh.size)}) == mesh.size


def test_ranks_of_a_tensor_group_are_next_to_each_other() -> None:
    mesh = Mesh(tp=2, pp=2, dp=2)
    assert mesh.groups("tp") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert mesh.groups("pp") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert mesh.groups("dp") == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_a_group_is_the_sequence_of_its_ranks() -> None:
    group = RankGroup("tp", (4, 5, 6), 5)
    assert (list(group), len(group), group[1:], 6 in group) == ([4, 5, 6], 3, (5, 6), True)


def test_axes_that_are_not_built_are_refused_by_name_before_anything_is_read() -> None:
    config = EngineConfig(model="/no/such/model", device="acme", pipeline_parallel_size=2, data_parallel_size=3)
    with pytest.raises(FeatureError) as caught:
        bind(config, meta=True, candidates=candidates(FakePlatform()))
    for part in ("--pipeline-parallel-size", "pipeline parallelism over 2 ranks is not built", "--data-parallel-size"):
        assert part in str(caught.value)
    assert "expert" not in str(caught.value)


def test_one_rank_is_a_mesh_too(tiny_model: Path) -> None:
    found = bind(
        EngineConfig(model=str(tiny_model), load_format="dummy", device="acme"),
        meta=True,
        candidates=candidates(FakePlatform()),
    )
    assert found.placement.tensor_group == RankGroup("tp", (0,), 0)
    assert (found.model.context.rank, found.model.context.ranks) == (0, 1)
