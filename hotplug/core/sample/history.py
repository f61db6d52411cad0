"""Which tokens occurred in the prompt and how often in the output, for the rows that have penalties.

Two [slots, vocab] tables on the device, grown when more rows need them than ever before; most requests
have no penalty and take no slot.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hotplug.core.ops.plan import Plan


class TokenHistory:
    """Owns the occurrence tables and the slot of each penalized row."""

    def __init__(self, plan: Plan, max_rows: int, vocab: int, device: torch.device) -> None:
        self._penalties = plan.bind("penalties", "penalties", "float32", vocab=vocab)
        self._vocab = vocab
        self._device = device
        self._slot = np.full(max_rows, -1, np.int64)
        self._free: list[int] = []
        self._prompt_seen = torch.zeros((0, vocab), dtype=torch.bool, device=device)
        self._counts = torch.zeros((0, vocab), dtype=torch.int32, device=device)

    @property
    def active(self) -> bool:
        """Whether any row has a slot."""
        return len(self._free) < len(self._counts)

    def admit(self, row: int, token_ids: npt.NDArray[np.int32], num_prompt_tokens: int) -> None:
        """Give `row` a slot that knows its prompt and the tokens generated so far."""
        if not self._free:
            self._grow()
        slot = self._slot[row] = self._free.pop()
        tokens = torch.from_numpy(token_ids.astype(np.int64)).to(self._device, non_blocking=True)
        self._prompt_seen[slot] = False
        self._prompt_seen[slot, tokens[:num_prompt_tokens]] = True
        self._counts[slot] = torch.bincount(tokens[num_prompt_tokens:], minlength=self._vocab)

    def release(self, row: int) -> None:
        """Give the row's slot back, if it has one."""
        if self._slot[row] >= 0:
            self._free.append(int(self._slot[row]))
            self._slot[row] = -1

    def penalize(self, logits: Tensor, rows: npt.NDArray[np.int32], params: dict[str, Tensor]) -> Tensor:
        """`logits` [S, vocab] with the penalties of the rows that have them; a new tensor if any has."""
        which = np.flatnonzero(self._slot[rows] >= 0)
        if not len(which):
            return logits
        entry, row, slot = (
            torch.from_numpy(a.astype(np.int64)).to(self._device, non_blocking=True)
            for a in (which, rows[which], self._slot[rows[which]])
        )
        adjusted = logits.clone()
        adjusted[entry] = self._penalties(
            logits[entry],
            self._prompt_seen[slot],
            self._counts[slot],
            params["repetition_penalty"][row],
            params["presence_penalty"][row],
            params["frequency_penalty"][row],
        )
        return adjusted

    def append(self, rows: npt.NDArray[np.int32], tokens: Tensor) -> None:
        """Count the step's `tokens` [S] of `rows` [S]."""
        which = np.flatnonzero(self._slot[rows] >= 0)
        if len(which):
            slot = torch.from_numpy(self._slot[rows[which]]).to(self._device, non_blocking=True)
            self._counts[slot, tokens[torch.from_numpy(which).to(self._device, non_blocking=True)]] += 1

    def _grow(self) -> None:
        old = len(self._counts)
        new = max(4, 2 * old)
        for name in ("_prompt_seen", "_counts"):
            table: Tensor = getattr(self, name)
            grown = torch.zeros((new, self._vocab), dtype=table.dtype, device=self._device)
            grown[:old] = table
            setattr(self, name, grown)
        self._free.extend(range(new - 1, old - 1, -1))
