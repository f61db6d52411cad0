"""The few-row linear kernel for Hopper against cuBLAS and `skinny`: checked, timed alone, and in a decoder layer.

    python ci/gpu/bench_hopper.py [--rows 64,16] [--out FILE.json]

Everything runs in a child process that is killed when a task takes 20 s, so that a kernel that hangs costs only that.
"""

from __future__ import annotations

import argparse
import json
import selectors
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import compile_ahead, copies_past_l2, graph_time

from hotplug.platforms.cuda.kernels import linear, linear_hopper
from hotplug.platforms.cuda.kernels.dense import add_rms_norm, rms_norm, silu_mul
from hotplug.platforms.cuda.kernels.linear_few import skinny
from hotplug.platforms.cuda.kernels.linear_hopper import compile_for, stream

SMS = 132
SHAPES = [  # name, outputs, inputs, gated
    ("8b.qkv", 6144, 4096, False), ("8b.out", 4096, 4096, False), ("8b.gate_up", 14336, 4096, True),
    ("8b.down", 4096, 14336, False), ("1b.qkv", 3072, 2048, False), ("1b.out", 2048, 2048, False),
    ("1b.gate_up", 8192, 2048, True), ("1b.down", 2048, 8192, False), ("8b.head", 128256, 4096, False),
]  # fmt: skip
LAYER = SHAPES[:4]
CHECKS = [  # rows of x, outputs, inputs, gated, float32 out, bias; then rows, cols, stages, programs, warps, overlap
    (64, 6144, 4096, False, False, False, (128, 64, 8, 132, 4, False)),
    (64, 6144, 4096, False, False, True, (128, 64, 8, 132, 4, True)),
    (33, 1003, 1032, False, False, True, (64, 64, 6, 132, 4, True)),
    (16, 4096, 4096, False, True, False, (64, 128, 8, 128, 4, True)),
    (5, 1000, 2048, False, True, False, (64, 256, 4, 264, 4, True)),
    (1, 2048, 8192, False, False, False, (128, 64, 8, 132, 8, True)),
    (64, 14336, 4096, True, False, False, (64, 64, 8, 112, 4, True)),
    (64, 1003, 1032, True, False, True, (128, 64, 5, 132, 8, True)),
    (33, 4096, 1024, True, True, False, (64, 128, 4, 132, 4, False)),
    (16, 8192, 2048, True, False, True, (64, 64, 6, 264, 4, True)),
    (64, 8192, 2048, False, True, False, (256, 64, 5, 132, 8, True)),
]
NAMES = ("rows", "cols", "stages", "programs", "warps", "overlap")
WATCHDOG_S = 20.0


def options(config: Any) -> dict[str, Any]:
    return dict(zip(NAMES, config, strict=True))


def even(tiles: int, most: int) -> int:
    """Programs, up to `most`, of which each tile has as many as the others or each program as many tiles; or 0."""
    waves = -(-tiles // most)
    return tiles * (most // tiles) if tiles <= most else (tiles // waves if tiles % waves == 0 else 0)


def streams(n: int, gated: bool, m: int, wide: bool = False) -> list[tuple[Any, ...]]:
    """Configurations worth timing; `wide`: of float32 results, whose transposition takes shared memory too."""
    if gated:
        shapes = [(64, 64, 8, 4), (64, 64, 4, 4), (64, 128, 4, 4), (128, 64, 5, 8)] if m > 16 else [
            (64, 64, 11, 4), (64, 128, 5, 4), (64, 64, 5, 4), (128, 64, 5, 8)]  # fmt: skip
    else:
        shapes = [(128, 64, 8, 4), (128, 64, 4, 4), (128, 128, 4, 8), (64, 128, 6, 4), (64, 64, 6, 4), (256, 64, 5, 8)
                  ] if m > 16 else [(128, 64, 11, 4), (64, 128, 10, 4), (64, 64, 10, 4), (64, 256, 5, 4)]  # fmt: skip
    found = {}
    for rows, cols, stages, warps in shapes:
        tiles = -(-n // rows)
        half = 2 * stages * cols * 2 * (rows * (2 if gated else 1) + max(m, 16)) < 215_000  # two programs an SM
        for programs in (SMS, even(tiles, SMS), *((2 * SMS, even(tiles, 2 * SMS)) if half and tiles > 32 else ())):
            if programs >= 90 and not (wide and rows == 256):
                found[(rows, cols, stages, programs, warps, True)] = None
    return list(found)


def skinnies(n: int, gated: bool, m: int) -> list[dict[str, int]]:
    """What was best of `skinny` on these shapes."""
    shapes = ((64, 128, 4, 4), (128, 128, 4, 8)) if m > 16 else ((64, 128, 5, 4), (64, 256, 4, 4))
    return [
        {"rows": rows, "cols": cols, "programs": programs, "stages": stages, "warps": warps}
        for rows, cols, stages, warps in shapes
        for programs in (SMS, -(-n // rows))
        if stages * cols * 2 * (rows * (2 if gated else 1) + m) < 225_000 and not (gated and rows > 64)
    ]


def call(kind: str, config: Any, x: Any, w: Any, gated: bool, dtype: torch.dtype, bias: Any = None) -> Any:
    if kind == "cublas":
        return silu_mul(F.linear(x, w)) if gated else F.linear(x, w).to(dtype)
    if kind == "now":  # what the platform picks today
        return (linear.linear_silu_mul if gated else linear.linear)(x, w, None)
    if kind == "skinny":
        return skinny(x, w, bias, gated=gated, dtype=dtype, **config)
    return stream(x, w, bias, gated=gated, dtype=dtype, **options(config))


class Worker:
    """The child's side: one method a task, arguments and answer are JSON."""

    def __init__(self) -> None:
        self.key: Any = None
        self.weights: list[Any] = []
        self.layers: list[list[Any]] = []

    def check(self, m: int, n: int, k: int, gated: bool, wide: bool, biased: bool, config: Any) -> str:
        torch.manual_seed(0)
        dtype = torch.float32 if wide else torch.bfloat16
        total = 2 * n if gated else n
        x = torch.randn((m, k), device="cuda").bfloat16()
        w = torch.randn((total, k), device="cuda").bfloat16() / k**0.5
        bias = torch.randn(total, device="cuda").bfloat16() if biased else None
        want = F.linear(x.double(), w.double(), None if bias is None else bias.double())
        if gated:
            want = F.silu(want[:, :n]) * want[:, n:]
        got = [call("stream", config, x, w, gated, dtype, bias) for _ in range(3)]
        error = float((got[0].double() - want).norm() / want.norm())
        same = all(torch.equal(got[0], other) for other in got)
        if error < 1e-2 and same and got[0].dtype is dtype and got[0].shape == want.shape:
            return ""
        return f"relative error {error:.3g}, {'the same' if same else 'not the same'} each time"

    def time(self, n: int, k: int, gated: bool, m: int, wide: bool, kind: str, config: Any) -> float:
        size = n * k * (4 if gated else 2)
        if self.key != (n, k, gated):
            self.weights.clear()
            self.layers.clear()
            self.key = (n, k, gated)
            self.weights.extend(torch.randn((2 * n if gated else n, k), dtype=torch.bfloat16, device="cuda").mul_(0.02)
                                for _ in range(copies_past_l2(size)))  # fmt: skip
        torch.manual_seed(1)
        x = torch.randn((m, k), dtype=torch.bfloat16, device="cuda")
        dtype = torch.float32 if wide else torch.bfloat16
        want = call("cublas", None, x, self.weights[0], gated, dtype).float()
        error = float((call(kind, config, x, self.weights[0], gated, dtype).float() - want).norm() / want.norm())
        if error > 2e-2:
            raise ValueError(f"relative error {error:.3g}")
        return graph_time([lambda w=w: call(kind, config, x, w, gated, dtype) for w in self.weights])

    def chain(self, m: int, kinds: Any) -> float:
        """A decoder layer's kernels but for the attention, for which a norm of the queries stands."""
        if not self.layers:
            self.weights.clear()
            self.key = None
            self.layers.extend([torch.randn((2 * n if gated else n, k), dtype=torch.bfloat16, device="cuda").mul_(0.02)
                                for _, n, k, gated in LAYER] for _ in range(3))  # fmt: skip
        ones, head = (torch.ones(size, dtype=torch.bfloat16, device="cuda") for size in (4096, 128))
        start = torch.randn((m, 4096), dtype=torch.bfloat16, device="cuda")
        state = [start, start]

        def layer(weights: list[Any]) -> None:
            products = [
                (lambda x, kind=kind, config=config, w=w, gated=gated: call(kind, config, x, w, gated, torch.bfloat16))
                for (kind, config), w, (_, _, _, gated) in zip(kinds, weights, LAYER, strict=True)
            ]
            x, residual = add_rms_norm(*state, ones, 1e-5)
            queries = products[0](x)[:, :4096].view(m, 32, 128)
            x = products[1](rms_norm(queries, head, 1e-5).view(m, 4096))
            x, residual = add_rms_norm(x, residual, ones, 1e-5)
            state[:] = products[3](products[2](x)), residual

        return graph_time([lambda weights=weights: layer(weights) for weights in self.layers * 4], least=0)


def serve() -> None:
    worker = Worker()
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            reply = {"value": getattr(worker, name)(*arguments)}
            torch.cuda.synchronize()
        except Exception as e:
            reply = {"error": f"{type(e).__name__} {str(e)[:160]}"}
            with suppress(Exception):  # a wrong kernel may have left its counters anyhow
                linear_hopper._counters(torch.device("cuda", 0)).zero_()
        print("\nREPLY " + json.dumps(reply), flush=True)


class Child:
    """The parent's side: asks, and starts another child when one does not answer or has died."""

    def __init__(self) -> None:
        self.process: Any = None
        self.lost = 0

    def ask(self, name: str, *arguments: Any) -> Any:
        """The task's answer, or a string that begins with `!`."""
        if self.lost >= 3:
            return "! not run: three tasks before hung or died"
        limit = WATCHDOG_S
        if self.process is None:
            limit += 40  # for the imports and the first use of the device
            self.process = subprocess.Popen([sys.executable, __file__, "--serve"], stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, bufsize=0)  # fmt: skip
        self.process.stdin.write((json.dumps([name, arguments]) + "\n").encode())
        text, end = b"", time.monotonic() + limit
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while time.monotonic() < end:
                if not selector.select(max(end - time.monotonic(), 0)):
                    break
                got = self.process.stdout.read(65536)
                text += got
                for line in text.decode(errors="replace").split("\n")[:-1]:
                    if line.startswith("REPLY "):
                        reply = json.loads(line[6:])
                        if "CUDA" in reply.get("error", "") or "Accelerator" in reply.get("error", ""):
                            return self._drop(f"! {reply['error']}")  # its context is unusable from now on
                        return reply.get("value", f"! {reply.get('error')}")
                if not got:
                    return self._drop("! DIED")
        return self._drop(f"! HUNG for {limit:.0f} s")

    def _drop(self, why: str) -> str:
        self.lost += 1
        self.process.kill()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.lost = 3  # the driver does not let go of it: no other process will fare better
        self.process = None
        return why

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait(30)


def compile_one(item: Any) -> None:
    n, k, gated, m, wide, biased, kind, config = item
    x = torch.empty((m, k), dtype=torch.bfloat16, device="cuda")
    w = torch.empty((2 * n if gated else n, k), dtype=torch.bfloat16, device="cuda")
    dtype = torch.float32 if wide else torch.bfloat16
    if kind == "stream":
        bias = w[:, 0].contiguous() if biased else None
        compile_for(x, w, bias, gated=gated, dtype=dtype, **options(config))
    else:
        call(kind, config, x, w, gated, dtype)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", default="64,16")
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", action="store_true")
    args = parser.parse_args()
    if args.serve:
        serve()
        return
    started = time.monotonic()
    counts = [int(m) for m in args.rows.split(",")]
    cells = [(shape, m, shape[0].endswith("head")) for shape in SHAPES if args.only in shape[0] for m in counts]
    work: dict[str, Any] = {}
    for m, n, k, gated, wide, biased, config in CHECKS:
        work[json.dumps([m, n, k, gated, wide, biased, config])] = (n, k, gated, m, wide, biased, "stream", config)
    for (_, n, k, gated), m, wide in cells:
        for config in streams(n, gated, m, wide):
            parted = -(-n // config[0]) % config[3] > 0  # the workspace's dtype is the output's where there is none
            work[json.dumps([m, k, gated, wide, parted, config])] = (n, k, gated, m, wide, False, "stream", config)
        for small in skinnies(n, gated, m):
            work[json.dumps([m, k, gated, wide, small])] = (n, k, gated, m, wide, False, "skinny", small)
    compile_ahead(compile_one, list(work.values()))
    print(f"{len(work)} kernels compiled in {time.monotonic() - started:.0f} s", flush=True)

    child, results = Child(), []
    for check in CHECKS:
        answer = child.ask("check", *check)
        if answer:
            print("CHECK", *check, answer, flush=True)
    print(f"{len(CHECKS)} checks done at {time.monotonic() - started:.0f} s", flush=True)
    best: dict[tuple[str, int], list[tuple[str, Any]]] = {}
    for (name, n, k, gated), m, wide in cells:
        timed = []
        tasks = [("cublas", None), *(("skinny", c) for c in skinnies(n, gated, m)),
                 *(("stream", c) for c in streams(n, gated, m, wide))]  # fmt: skip
        for kind, config in tasks:
            us = child.ask("time", n, k, gated, m, wide, kind, config)
            if isinstance(us, str):
                print(name, m, kind, config, us, flush=True)
            else:
                timed.append((us, kind, config))
                results.append({"shape": name, "m": m, "kind": kind, "config": config, "us": us})
        timed.sort(key=lambda one: one[0])
        floor = n * k * (4 if gated else 2) / 4.2e6
        first = {kind: min((us for us, other, _ in timed if other == kind), default=float("nan"))
                 for kind in ("cublas", "skinny", "stream")}  # fmt: skip
        own = [(us, config) for us, kind, config in timed if kind == "stream"]
        best[name, m] = [("stream", config) for _, config in own]
        print(f"{name:10} m={m:<3} read {floor:6.1f} | " + " ".join(f"{k} {us:6.1f}" for k, us in first.items()) + " | "
              + "; ".join(f"{us:.1f} {','.join(map(str, c[:5]))}" for us, c in own[:5]), flush=True)  # fmt: skip
    for m in counts if not args.only else ():
        chain(child, m, best, results)
    child.close()
    print(f"{time.monotonic() - started:.0f} s in all")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))


def chain(child: Child, m: int, best: Any, results: list[Any]) -> None:
    """Whole layers, then each product's next best configurations in the layer with the others as they are."""
    read = sum(n * k * (4 if gated else 2) for _, n, k, gated in LAYER) / 4.2e6
    own = [best[name, m] for name, *_ in LAYER]
    rows = [("cublas", [("cublas", None)] * 4), ("now", [("now", None)] * 4)]
    for i in range(2):
        rows.append((f"skinny {i}", [("skinny", skinnies(n, gated, m)[i]) for _, n, _, gated in LAYER]))
    if all(own):
        rows.append(("stream, best alone", [configs[0] for configs in own]))
    shown, current, least = [], None, float("inf")
    for name, kinds in rows:
        us = child.ask("chain", m, kinds)
        shown.append(f"{name} {us if isinstance(us, str) else format(us, '.1f')}")
        results.append({"shape": "layer", "m": m, "kind": name, "config": kinds, "us": us})
        if name.startswith("stream") and not isinstance(us, str):
            current, least = list(kinds), us
    if current is not None:
        for place, configs in enumerate(own):
            for config in (*configs[1:6], ("cublas", None)):
                tried = [*current[:place], config, *current[place + 1 :]]
                us = child.ask("chain", m, tried)
                results.append({"shape": "layer", "m": m, "kind": "mixed", "config": tried, "us": us})
                if not isinstance(us, str) and us < least:
                    current, least = tried, us
        names = (f"{kind} {','.join(map(str, config[:5])) if config else ''}".strip() for kind, config in current)
        shown.append(f"best found {least:.1f}: " + " / ".join(names))
    print(f"layer      m={m:<3} read {read:6.1f} | " + "; ".join(shown), flush=True)


if __name__ == "__main__":
    main()
