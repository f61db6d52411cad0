"""The mesh: how the ranks of an engine are laid out, and which of them form a group along each of its axes.

Arithmetic alone: it knows no process and no device. Ranks are numbered along the axes, the tensor axis fastest, since
its groups talk most and the devices next to each other are joined best:

    rank = ((dp * PP + pp) * EP + ep) * TP + tp
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from hotplug.core.config import EngineConfig
from hotplug.core.errors import FeatureError
from hotplug.core.platform.rank_group import RankGroup

AXES = ("tp", "ep", "pp", "dp")
"""The axes, the one along which ranks are numbered fastest first."""
NOT_BUILT = {"pp": "pipeline", "ep": "expert", "dp": "data"}
"""Axes that no engine runs along yet, with their names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """Sizes by axis; a rank is a place in their grid."""

    tp: int = 1
    """Ranks that split every layer."""
    pp: int = 1
    """Stages that have some layers each."""
    ep: int = 1
    """Ranks that have some experts each."""
    dp: int = 1
    """Replicas with requests of their own."""

    @classmethod
    def of(cls, config: EngineConfig) -> Mesh:
        """The mesh that a configuration asks for. Raises FeatureError for an axis that is not built."""
        mesh = cls(tp=config.tensor_parallel_size, pp=config.pipeline_parallel_size, ep=config.expert_parallel_size,
                   dp=config.data_parallel_size)  # fmt: skip
        asked = {axis: name for axis, name in NOT_BUILT.items() if mesh.length(axis) > 1}
        if asked:
            raise FeatureError(
                "an engine cannot be split that way yet",
                where=", ".join(f"--{name}-parallel-size" for name in asked.values()),
                why=[f"{name} parallelism over {mesh.length(axis)} ranks is not built" for axis, name in asked.items()],
                hint="Leave them out. --tensor-parallel-size splits a model over several devices.",
            )
        return mesh

    @property
    def size(self) -> int:
        """All ranks of the engine."""
        return prod(self.length(axis) for axis in AXES)

    def length(self, axis: str) -> int:
        """The ranks along an axis: the size of each of its groups."""
        return {"tp": self.tp, "ep": self.ep, "pp": self.pp, "dp": self.dp}[axis]

    def group(self, axis: str, rank: int) -> RankGroup:
        """The ranks that differ from `rank` along `axis` alone, and itself, in the order of their numbers."""
        stride = prod(self.length(inner) for inner in AXES[: AXES.index(axis)])
        place = rank // stride % self.length(axis)
        first = rank - place * stride
        return RankGroup(axis, tuple(first + i * stride for i in range(self.length(axis))), rank)

    def groups(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """All groups along `axis`; every rank is in one of them."""
        return tuple(dict.fromkeys(self.group(axis, rank).ranks for rank in range(self.size)))
