"""Cost of a streamed token in the front end, without HTTP: message in, text found, its consumer woken and served.

    python ci/bench/front_end.py [--model smollm2] [--streams 64 256 1024] [--steps 300] [--profile]

"take" is what runs between the message and the mailboxes (the bar: 3 us a token); "served" is that and an asyncio task
a stream that gets each chunk. "merged" is "take" while nobody reads. Microseconds a token.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import time
from pathlib import Path

import numpy as np

from hotplug.core.client.mailbox import Mailbox
from hotplug.core.client.streams import Streams
from hotplug.core.client.submission import Submission
from hotplug.core.engine import messages
from hotplug.core.request import EngineStats, SamplingParams
from hotplug.core.scheduler.tokens import StepTokens
from hotplug.core.text.tokenizer import Tokenizer
from hotplug.core.text.tokenizer_files import load_tokenizer
from hotplug.core.weights.source import resolve
from hotplug.server.metrics import EngineMetrics


async def measure(tokenizer: Tokenizer, count: int, steps: int, *, read: bool, stop: tuple[str, ...]) -> list[float]:
    """Microseconds a token: (take, all together), over `steps` steps of `count` streams."""
    streams, metrics = Streams(0), EngineMetrics()
    params = SamplingParams(stop=stop)
    submissions = [Submission(str(i), [1, 2, 3], params, tokenizer, (), tags=streams.tags) for i in range(count)]
    mailboxes = [streams.open(submission) for submission in submissions]
    tags = np.array([s.requests[0].tag for s in submissions])
    words = np.array(tokenizer.encode(Path(__file__).read_text(encoding="utf-8")), np.int32)
    none = np.empty(0, np.object_)
    data = [
        messages.encode(messages.Outputs.of(StepTokens(tags, np.resize(np.roll(words, i), count), none), EngineStats()))
        for i in range(steps)
    ]

    async def consume(mailbox: Mailbox) -> None:
        while True:
            await mailbox.get()

    tasks = [asyncio.create_task(consume(mailbox)) for mailbox in mailboxes] if read else []
    await asyncio.sleep(0)
    taken, whole = np.empty(steps), np.empty(steps)
    for i, message in enumerate(data):
        begin = time.perf_counter()
        outputs = messages.decode_from_engine(message)
        assert isinstance(outputs, messages.Outputs)
        streams.take(outputs, time.monotonic(), metrics)
        taken[i] = time.perf_counter() - begin
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        whole[i] = time.perf_counter() - begin
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return [float(np.median(part) * 1e6 / count) for part in (taken, whole)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    tokenizer = load_tokenizer(resolve(args.model))
    print("streams".rjust(10) + "".join(name.rjust(14) for name in ("take", "served", "with stop", "merged")))
    profile = cProfile.Profile()
    for count in args.streams:
        if args.profile:
            profile.enable()
        take, served = asyncio.run(measure(tokenizer, count, args.steps, read=True, stop=()))
        profile.disable()
        stopping, _ = asyncio.run(measure(tokenizer, count, args.steps, read=True, stop=("\n\n###", "Observation:")))
        merged, _ = asyncio.run(measure(tokenizer, count, args.steps, read=False, stop=()))
        print(str(count).rjust(10) + "".join(f"{value:14.2f}" for value in (take, served, stopping, merged)))
    if args.profile:
        profile.print_stats("tottime")


if __name__ == "__main__":
    main()
