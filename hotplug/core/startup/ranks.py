"""Several ranks of one engine: whether a configuration can have them, and which device each is on."""

from __future__ import annotations

from collections.abc import Mapping

from hotplug.core.config import EngineConfig
from hotplug.core.errors import FeatureError
from hotplug.core.models.decoder import Decoder
from hotplug.core.models.families import MODELS
from hotplug.core.models.split import split_faults
from hotplug.core.ops.packed_linear import GROUP
from hotplug.core.platform.base import DeviceInfo
from hotplug.core.platform.optional import HasShare
from hotplug.core.platform.select import Selection
from hotplug.core.quant.packed_scheme import PackedScheme
from hotplug.core.startup.weight_format import WeightFormat
from hotplug.core.weights.config import ModelConfig


def check_ranks(
    config: EngineConfig,
    model: ModelConfig,
    models: Mapping[str, type[Decoder]],
    asked: WeightFormat | None,
    selection: Selection,
    *,
    observed: bool,
) -> None:
    """Raises FeatureError with every reason why an engine cannot have `config.tensor_parallel_size` ranks.

    `models` are the architectures that are installed, `asked` the weight format that the configuration names;
    `observed` says that somebody looks at every call of an op.
    """
    ranks = config.tensor_parallel_size
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
    if len(_devices(selection)) < ranks and not isinstance(selection.platform, HasShare):
        faults.append(f"{len(_devices(selection))} devices from {selection.platform.name}:{selection.device.index} on")
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


def device_of_rank(selection: Selection, rank: int, ranks: int) -> tuple[Selection, int]:
    """What a rank runs on, and how many ranks share that.

    The selected device is rank 0's; the others have those after it, or the same where there are not as many.
    """
    devices = _devices(selection)
    if ranks == 1 or len(devices) < ranks:
        return selection, ranks
    return Selection(selection.platform, devices[rank], selection.reason), 1


def _devices(selection: Selection) -> list[DeviceInfo]:
    """The selected device and those after it."""
    found = list(selection.platform.probe())
    at = [device.index for device in found].index(selection.device.index)
    return found[at:]
