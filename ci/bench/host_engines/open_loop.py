"""Time to the first token of streamed chats at a fixed rate: `python open_loop.py OPTIONS`.

OPTIONS is JSON: url, model, rate (requests a second), requests, warm_up. An open loop: requests are sent when their
time has come, at random intervals, however long the others take. Prints {"ttft_ms": [of each request], "late_ms": how
late this process was to send, "errors": [..]}; those of the warm-up are left out.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from typing import Any

import aiohttp

OUTPUT, WORDS = 16, 60
VOCABULARY = (
    "river", "stone", "light", "garden", "music", "winter", "paper", "mountain", "silver", "window", "morning",
    "letter", "ocean", "bread", "forest", "summer", "travel", "number", "kitchen", "bridge", "story", "market",
    "engine", "flower", "history", "island",
)  # fmt: skip


async def first_token(session: aiohttp.ClientSession, url: str, model: str, content: str) -> float:
    """Milliseconds from sending a chat to the first event with text. Raises RuntimeError where none comes."""
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": OUTPUT,
            "temperature": 0.0, "ignore_eos": True, "stream": True}  # fmt: skip
    begin, first, rest = time.perf_counter(), 0.0, b""
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        if answer.status != 200:
            raise RuntimeError(f"status {answer.status}: {(await answer.text())[:100]}")
        async for data in answer.content.iter_any():
            if first:
                continue
            now = time.perf_counter()
            *events, rest = (rest + data).split(b"\n\n")
            for event in events:
                if event.startswith(b"data: {"):
                    choices = json.loads(event[6:])["choices"]
                    if choices and choices[0]["delta"].get("content"):
                        first = now
                        break
    if not first:
        raise RuntimeError("the stream had no text")
    return (first - begin) * 1e3


async def run(url: str, model: str, rate: float, requests: int, warm_up: int) -> dict[str, Any]:
    draw = random.Random(0)
    found: list[float] = []
    late: list[float] = []
    errors: list[str] = []

    async def one(session: aiohttp.ClientSession, content: str, counts: bool) -> None:
        try:
            value = await first_token(session, url, model, content)
        except (RuntimeError, aiohttp.ClientError) as e:
            errors.append(str(e))
            return
        if counts:
            found.append(value)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        due, tasks = time.perf_counter() + 0.1, []
        for i in range(warm_up + requests):
            due += draw.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            late.append((time.perf_counter() - due) * 1e3)
            content = f"{i} " + " ".join(draw.choices(VOCABULARY, k=WORDS))
            tasks.append(asyncio.create_task(one(session, content, i >= warm_up)))
        await asyncio.gather(*tasks)
    return {"ttft_ms": found, "late_ms": sorted(late)[len(late) // 2], "errors": errors}


def main() -> None:
    print(json.dumps(asyncio.run(run(**json.loads(sys.argv[1])))))


if __name__ == "__main__":
    main()
