"""Which running requests speculate in the next step, and with how many tokens.

Asynchronous steps: what follows a token can be proposed only once that token is known. A request that will probably
have proposals then is left out of steps until its last token is known; all others go on overlapping.
"""

from __future__ import annotations

from hotplug.core.errors import RequestError
from hotplug.core.request import Request
from hotplug.core.scheduler.drafter import Drafter, obstacle
from hotplug.core.scheduler.plan import IntArray
from hotplug.core.scheduler.state import SchedulerState

Drafts = dict[int, IntArray]
"""By row: the tokens proposed to follow its last one."""


class Speculator:
    """Asks the requests' drafters, within what a step has room for."""

    def __init__(self, state: SchedulerState) -> None:
        self._state = state
        self._config = state.config.speculation
        self._batch = state.batch
        self._kv = state.kv
        self._max_tokens = state.config.max_num_batched_tokens
        self._most_scored = state.most_scored

    def drafter(self, request: Request) -> Drafter | None:
        """What proposes tokens for a request; None if it does not speculate. Raises RequestError if it asks in vain."""
        asked, config = request.sampling.speculative, self._config
        reason = obstacle(request.sampling)
        if asked and config is None:
            raise RequestError("speculative is refused: the platform does not serve speculative decoding",
                               param="speculative", hint="Leave it out.")  # fmt: skip
        if asked and reason:
            raise RequestError(f"speculative cannot go with {reason}, which depends on each token before",
                               param="speculative", hint="Leave out one of the two.")  # fmt: skip
        if config is None or reason or not (config.by_default if asked is None else asked):
            return None
        return Drafter(config)

    def draft(self, num_prefilling: int) -> tuple[Drafts, list[int]]:
        """Proposals of decoding rows, and the rows to leave out because proposals will probably follow their token.

        Proposals take half at most of what decodes leave of a step, so that prompts go on beside them.
        """
        drafts: Drafts = {}
        waiting: list[int] = []
        if self._config is None or not self._state.num_speculating:
            return drafts, waiting
        batch = self._batch
        if batch.num_running - num_prefilling > self._config.max_requests:
            return drafts, waiting
        rows = batch.decoding()
        spare = min(self._max_tokens - len(rows), self._most_scored - len(rows) - num_prefilling) // 2
        for row in rows.tolist():
            drafter = batch.owner(row).drafter
            most = min(spare, int(batch.limit[row] - batch.computed[row]) - 2)  # one more token follows the proposals
            if drafter is None or most <= 0:
                continue
            tokens = batch.history[row, : batch.known[row]]
            if len(tokens) <= batch.computed[row]:
                if drafter.expects(tokens):
                    waiting.append(row)
                continue
            draft = drafter.draft(tokens, most)
            if len(draft):
                drafts[row] = draft
                spare -= len(draft)
        return drafts, waiting

    def fit(self, rows: IntArray, ends: IntArray, drafts: Drafts) -> Drafts:
        """The proposals, of rows that still run, whose blocks are there: nobody is preempted for them.

        `ends` [n] are the tokens that `rows` [n] have computed after the step; they are moved past what is kept.
        """
        kept = {}
        for i, row in enumerate(rows.tolist()):
            end, draft = ends[i], drafts.get(row)
            for count in range(0 if draft is None else len(draft), 0, -1):
                ends[i] = end + count
                if not self._kv.missing(rows, ends):
                    kept[row] = drafts[row][:count]
                    break
                ends[i] = end
        return kept
