"""transformers: `generate`, a batch of equal lengths at once with every prefix computed for each request, or
`generate_batch`, its continuous batching."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from transformers.generation import ContinuousBatchingConfig, GenerationConfig


class Transformers:
    """Options: model, a Hugging Face folder; dtype; continuous, whether to batch continuously."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._continuous: bool = options.get("continuous", False)
        more = {"attn_implementation": "sdpa"} if self._continuous else {}
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            options["model"], dtype=options.get("dtype", "float32"), **more
        )
        self._model.generation_config.eos_token_id = None
        dtype = str(self._model.dtype).removeprefix("torch.")
        self.about = f"transformers {transformers.__version__}, {dtype}, torch {torch.__version__}"

    def generate(self, prompts: list[list[int]], new_tokens: int, *, share: bool) -> list[list[float]]:
        return (self._batch if self._continuous else self._together)(prompts, new_tokens)

    def _together(self, prompts: list[list[int]], new_tokens: int) -> list[list[float]]:
        ids = torch.tensor(prompts)
        clock = _Clock()
        with torch.inference_mode():
            self._model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
                                 stopping_criteria=[clock])  # fmt: skip
        return [clock.times for _ in prompts]

    def _batch(self, prompts: list[list[int]], new_tokens: int) -> list[list[float]]:
        wanted = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        begin = time.perf_counter()
        found = self._model.generate_batch(
            prompts, wanted, continuous_batching_config=ContinuousBatchingConfig(max_memory_percent=0.05),
            record_timestamps=True, progress_bar=False, persistent_manager=True,
        )  # fmt: skip
        outputs = sorted(found.values(), key=lambda output: int(output.request_id.rpartition("_")[2]))
        return [[stamp - begin for stamp in output.timestamps][: len(output.generated_tokens)] for output in outputs]


class _Clock(transformers.StoppingCriteria):  # type: ignore[misc]
    """Called after each token of the batch; never stops it."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter() - self._begin)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def start(options: dict[str, Any]) -> Transformers:
    return Transformers(options)
