"""The bound plan, asked of the engine: once for all who wait for it, and again where the answer was lost on its way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from hotplug.core.errors import HotplugError, NotReadyError


class PlanQuestion:
    """One front end's. Everyone who waits gets the plan or an error, whatever becomes of the engine."""

    def __init__(self, ask: Callable[[], None]) -> None:
        """`ask` sends the question to the engine."""
        self.owed = False
        """Whether the engine has been asked and has not answered."""
        self._ask = ask
        self._waiting: list[asyncio.Future[dict[str, Any]]] = []

    async def answer(self, patience: float) -> dict[str, Any]:
        """The plan as plain data. Raises NotReadyError after `patience` seconds, and what `fail` is given."""
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        if not self.owed:
            self._send()
        try:
            return await asyncio.wait_for(future, patience)
        except TimeoutError:
            raise NotReadyError(f"the engine has not answered for {patience:.0f} s") from None
        finally:
            if future in self._waiting:
                self._waiting.remove(future)

    def answered(self, report: dict[str, Any], error: str) -> None:
        """The engine tells the plan, or with an `error` why it cannot."""
        if error:
            self.fail(HotplugError("the plan cannot be told", why=error))
            return
        for future in self._take():
            future.set_result(report)

    def fail(self, error: HotplugError) -> None:
        for future in self._take():
            future.set_exception(error)

    def lost(self) -> None:
        """Messages were lost, maybe the answer among them."""
        self.owed = False
        if self._waiting:
            self._send()

    def _send(self) -> None:
        self.owed = True
        self._ask()

    def _take(self) -> list[asyncio.Future[dict[str, Any]]]:
        """Those who wait, without those whose caller was cancelled; they wait no more."""
        self.owed = False
        waiting, self._waiting = self._waiting, []
        return [future for future in waiting if not future.done()]
