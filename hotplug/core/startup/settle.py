"""The second stage of a start: what the configuration left open, settled for the device and the model, with reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hotplug.core.config import EngineConfig
from hotplug.core.errors import ConfigError
from hotplug.core.models.decoder import Decoder
from hotplug.core.models.loader import find_model
from hotplug.core.ops.dtypes import TORCH_DTYPES
from hotplug.core.platform.features import Resolved, compute_dtype, resolve
from hotplug.core.startup import mode_record, step_record
from hotplug.core.startup.placement import Placement
from hotplug.core.startup.ranks import check_ranks
from hotplug.core.startup.step_record import StepSize
from hotplug.core.startup.weight_format import WeightFormat
from hotplug.core.weights.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Options:
    """The options of an engine, none of them open."""

    resolved: Resolved
    """Dtypes, block size, execution mode and the size of a step."""
    mode_reason: str
    """Why steps run in `resolved.exec_mode`."""
    step_reason: str
    """Why a step holds as many requests and tokens as `resolved` says."""
    max_model_len: int
    """Tokens of the longest sequence, as asked for or as the model has positions."""


def settle(
    config: EngineConfig,
    placement: Placement,
    model: ModelConfig,
    *,
    models: Mapping[str, type[Decoder]],
    asked: WeightFormat | None,
    observed: bool,
) -> Options:
    """Settle every option for `model`, the whole of it. `models`, `asked` and `observed` are as `check_ranks` has them.

    Raises FeatureError with every reason why the platform cannot serve the configuration, or ConfigError.
    """
    mode = mode_record.choose(config, placement.selection, model, placement.limits.exec_modes)
    step = _step_size(config, placement, model)
    resolved = resolve(
        config,
        placement.limits,
        platform=placement.platform.name,
        checkpoint_dtype=model.dtype,
        fastest=mode.mode,
        step_requests=step.requests,
        step_tokens=step.tokens,
        kv_kinds={spec.kind for spec in find_model(model, models).kv_specs(model)},
    )
    check_ranks(config, model, models, asked, placement, observed=observed)
    return Options(resolved, mode.reason, step.reason, _max_model_len(config, model))


def _step_size(config: EngineConfig, placement: Placement, model: ModelConfig) -> StepSize:
    dtype = TORCH_DTYPES[compute_dtype(config, placement.limits, model.dtype)]
    return step_record.choose(config, placement.selection, model, dtype.itemsize)


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    if config.max_model_len is None:
        return model.max_position
    if config.max_model_len > model.max_position:
        raise ConfigError(
            f"max_model_len {config.max_model_len} is above the model's own {model.max_position} positions",
            hint="Lower --max-model-len or leave it out.",
        )
    return config.max_model_len
