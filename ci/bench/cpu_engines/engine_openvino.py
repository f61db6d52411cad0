"""OpenVINO GenAI's continuous batching, from a GGUF file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai


class OpenVINO:
    """Options: model, a GGUF file in a folder of its own, where the converted model is kept; weights; scheduler, fields
    of `SchedulerConfig`; properties, of the CPU plugin; isa, an instruction set that is not to be exceeded."""

    def __init__(self, options: dict[str, Any]) -> None:
        path = Path(options["model"])
        if not (path.parent / "openvino_model.xml").exists():
            genai.LLMPipeline(str(path), "CPU", enable_save_ov_model=True)
        config = genai.SchedulerConfig()
        for name, value in options.get("scheduler", {}).items():
            setattr(config, name, value)
        # Where the processor has bfloat16 products it would ask for them, whatever oneDNN is held to.
        narrow = {"INFERENCE_PRECISION_HINT": "f32"} if options.get("isa") == "avx2" else {}
        properties = {**options.get("properties", {}), **narrow}
        self._pipeline = genai.ContinuousBatchingPipeline(str(path.parent), config, "CPU", properties)
        self._asked = 0
        self.about = f"OpenVINO GenAI {genai.__version__.split('-')[0]}, {options['weights']}"

    def generate(self, prompts: list[list[int]], new_tokens: int, *, share: bool) -> list[list[float]]:
        config = genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
        tensors = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        times: list[list[float]] = [[] for _ in prompts]
        begin = time.perf_counter()
        handles = []
        for tensor in tensors:
            self._asked += 1
            handles.append(self._pipeline.add_request(self._asked, tensor, config))
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            now = time.perf_counter() - begin
            for handle, own in zip(handles, times, strict=True):
                while handle.can_read():
                    for output in handle.read().values():
                        own += [now] * len(output.generated_ids)
        return times


def start(options: dict[str, Any]) -> OpenVINO:
    return OpenVINO(options)
