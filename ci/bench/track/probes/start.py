"""A start, from nothing to a first token: `python -m track.probes.start MODEL [CORE]`.

Prints {"rss_mib"}, the peak of the process' memory, as soon as the token is there; who started it has the clock.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main() -> None:
    if len(sys.argv) > 2:
        os.sched_setaffinity(0, {int(sys.argv[2])})
    from hotplug import LLM, SamplingParams

    llm = LLM(sys.argv[1], device="cpu", max_model_len=2048)
    llm.generate([[1000, 1001, 1002, 1003]], SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True),
                 progress=False)  # fmt: skip
    print(json.dumps({"rss_mib": peak_kib() / 1024}), flush=True)
    os._exit(0)  # how it ends is not measured


def peak_kib() -> int:
    """Of this process. Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
