"""llama.cpp by its C interface, batched by hand: prompts of all requests in one batch, then a token each.

It has no prefix cache across sequences that arrive together; `share` copies the common prefix's cells, as one would.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import llama_cpp
import numpy as np

CONTEXT, BATCH = 16 * 640, 2048


class LlamaCpp:
    """Options: model, a GGUF file; weights; threads; micro_batch, in tokens; flash_attention, left to it by default."""

    def __init__(self, options: dict[str, Any]) -> None:
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(options["model"].encode(), parameters)
        if not self._model:
            raise RuntimeError(f"{options['model']} does not load")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_seq_max = CONTEXT, BATCH, 16
        context.n_ubatch = options.get("micro_batch", 512)
        if options.get("flash_attention"):
            context.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        context.kv_unified = True
        context.n_threads = context.n_threads_batch = options["threads"]
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.about = f"llama.cpp (llama-cpp-python {llama_cpp.__version__}), {options['weights']}"

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Run (token, position, sequence, scored) entries; the best tokens of those scored."""
        found = []
        for begin in range(0, len(entries), BATCH):
            part, batch = entries[begin : begin + BATCH], self._batch
            batch.n_tokens = len(part)
            for i, (token, position, sequence, scored) in enumerate(part):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, scored
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            if code := llama_cpp.llama_decode(self._context, batch):
                raise RuntimeError(f"llama_decode answers {code}")
            for i, (*_, scored) in enumerate(part):
                if scored:
                    logits = llama_cpp.llama_get_logits_ith(self._context, i)
                    values = np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self._vocab,))
                    found.append(int(values.argmax()))
        return found

    def generate(self, prompts: list[list[int]], new_tokens: int, *, share: bool) -> list[list[float]]:
        llama_cpp.llama_memory_clear(self._memory, True)
        times: list[list[float]] = [[] for _ in prompts]
        begin = time.perf_counter()
        common = _common(prompts) if share and len(prompts) > 1 else 0
        if common:
            self._decode([(token, i, 0, False) for i, token in enumerate(prompts[0][:common])])
            for sequence in range(1, len(prompts)):
                llama_cpp.llama_memory_seq_cp(self._memory, 0, sequence, 0, common)
        tokens = self._decode([
            (token, i, sequence, i == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts) for i, token in enumerate(prompt) if i >= common
        ])  # fmt: skip
        for step in range(new_tokens):
            now = time.perf_counter() - begin
            for own in times:
                own.append(now)
            if step < new_tokens - 1:
                tokens = self._decode([
                    (token, len(prompts[i]) + step, i, True) for i, token in enumerate(tokens)
                ])  # fmt: skip
        return times


def _common(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with."""
    equal = (len(set(tokens)) == 1 for tokens in zip(*prompts, strict=False))
    return next((i for i, same in enumerate(equal) if not same), min(map(len, prompts)))


def start(options: dict[str, Any]) -> LlamaCpp:
    return LlamaCpp(options)
