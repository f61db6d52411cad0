"""transformers' `generate`: a batch of equal lengths at once, every prefix computed for each request."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers


class Transformers:
    """Options: model, a Hugging Face folder; dtype, float32 by default."""

    def __init__(self, options: dict[str, Any]) -> None:
        dtype = options.get("dtype", "float32")
        self._model = transformers.AutoModelForCausalLM.from_pretrained(options["model"], dtype=dtype)
        self._model.generation_config.eos_token_id = None
        dtype = str(self._model.dtype).removeprefix("torch.")
        self.about = f"transformers {transformers.__version__}, {dtype}, torch {torch.__version__}"

    def generate(self, prompts: list[list[int]], new_tokens: int, *, share: bool) -> list[list[float]]:
        ids = torch.tensor(prompts)
        clock = _Clock()
        with torch.inference_mode():
            self._model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
                                 stopping_criteria=[clock])  # fmt: skip
        return [clock.times for _ in prompts]


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
