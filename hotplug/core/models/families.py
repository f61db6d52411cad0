"""The architectures that are built in, by their name in config.json."""

from __future__ import annotations

from hotplug.core.models import gemma3
from hotplug.core.models.decoder import Decoder, Qwen3Decoder, Qwen3MoeDecoder
from hotplug.core.weights.hf_config import ConfigReader

MODELS: dict[str, type[Decoder]] = {
    "LlamaForCausalLM": Decoder,
    "MistralForCausalLM": Decoder,
    "Qwen2ForCausalLM": Decoder,
    "Qwen3ForCausalLM": Qwen3Decoder,
    "Qwen3MoeForCausalLM": Qwen3MoeDecoder,
    gemma3.ARCHITECTURE: gemma3.Gemma3Decoder,
}
CONFIG_READERS: dict[str, ConfigReader] = {gemma3.ARCHITECTURE: gemma3.read_config}
"""Of the architectures whose config.json the shared reader does not understand."""
