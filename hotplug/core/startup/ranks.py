"""Several ranks of one engine: whether a configuration can have them."""

from __future__ import annotations

from collections.abc import Mapping

from hotplug.core.config import EngineConfig
from hotplug.core.errors import FeatureError
from hotplug.core.models.decoder import Decoder
from hotplug.core.models.families import MODELS
from hotplug.core.models.split import split_faults
from hotplug.core.ops.packed_linear import GROUP
from hotplug.core.quant.packed_scheme import PackedScheme
from hotplug.core.startup.placement import Placement
from hotplug.core.startup.weight_format import WeightFormat
from hotplug.core.weights.config import ModelConfig


def check_ranks(
    config: EngineConfig,
    model: ModelConfig,
    models: Mapping[str, type[Decoder]],
    asked: WeightFormat | None,
    placement: Placement,
    *,
    observed: bool,
) -> None:
    """Raises FeatureError with every reason why an engine cannot have the ranks of `placement.mesh`.

    `models` are the architectures that are installed, `asked` the weight format that the configuration names;
    `observed` says that somebody looks at every call of an op.
    """
    ranks = placement.mesh.size
    if ranks == 1:
        return
    faults = split_faults(model, ranks)
    if models.get(model.architecture) is not MODELS.get(model.architecture):
        faults.append(f"the plugin of {model.architecture} does not say how it is split")
    if asked is not None and asked.scheme is not None:
        if isinstance(asked.scheme, PackedScheme):
            faults += packed_split_faults(model, ranks)
        else:
            faults.append(f"quantization {asked.name} is not split: its scales may span a row")
    if config.kv_connector is not None:
        faults.append("kv_connector keeps whole blocks, and each rank has its part of one")
    if observed:
        faults.append("comparing kernels with references calls a collective twice on one rank")
    if placement.num_devices < ranks and not placement.shares_devices:
        where = f"{placement.platform.name}:{placement.device.index}"  # that of rank 0: all are on it
        faults.append(f"{placement.num_devices} devices from {where} on")
    if faults:
        raise FeatureError(f"the model cannot be split over {ranks} ranks", where="--tensor-parallel-size", why=faults,
                           hint="Choose a number that divides them, or run one rank.")  # fmt: skip


def packed_split_faults(model: ModelConfig, ranks: int) -> list[str]:
    """Why matrices in groups cannot be split: of the two whose columns are, a rank's must be whole groups."""
    if ranks == 1:
        return []
    columns = {"attention's output": model.num_heads * model.head_dim, "feed-forward's output": model.intermediate_size}
    return [
        f"a rank's columns of the {name} matrix ({size}/{ranks}) are no whole groups of {GROUP}"
        for name, size in columns.items()
        if size % (ranks * GROUP)
    ]
