"""A stage of a start: weights into the built model, each rank its part."""

from __future__ import annotations

from hotplug.core.models.loader import load_weights
from hotplug.core.models.repack import repack_weights
from hotplug.core.platform.base import ExecMode
from hotplug.core.platform.optional import HasWeights
from hotplug.core.runner import memory_guard
from hotplug.core.runner.memory_guard import MemoryGuard
from hotplug.core.startup.bind import Bound


def load(bound: Bound) -> None:
    """Fill the model from its checkpoint, as the kernels that read it want it, and let go of the files.

    Raises OutOfMemoryError, ModelError.
    """
    platform, model = bound.placement.platform, bound.model.decoder
    as_stored = bound.kernels.observed or bound.options.resolved.exec_mode is ExecMode.COMPILE  # others read them too
    with MemoryGuard("loading the weights", bound.placement.selection, memory_guard.WEIGHTS):
        load_weights(model, bound.checkpoint)
        if isinstance(platform, HasWeights) and not as_stored:
            repack_weights(model, bound.kernels.plan, platform, bound.checkpoint)
        bound.checkpoint.release()
