"""Times of the native CPU products at the shapes of SmolLM2-135M, beside PyTorch's float32 product in the same run.

    python ci/bench/cpu_linear.py [--rows 1,16] [--formats Q4_1,float32] [--isa avx2] [--threads 2] [--markdown]

Every call has weights of its own that no cache holds, as in a decode step, unless they are more rows than it takes to
pay for reading them. A cell is the median of several rounds, in which the formats and PyTorch take turns. GB/s are of
weights read, GOP/s two operations a weight and row; the ratio is PyTorch's time over ours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import gguf
import torch
import torch.nn.functional as F

from hotplug.platforms.cpu.native import linear as native
from hotplug.platforms.cpu.native.library import load

SHAPES = {
    "qkv": (576, 960),
    "out": (576, 576),
    "gate+up": (576, 3072),
    "gate+up, gated": (576, 3072),
    "down": (1536, 576),
    "head": (576, 49152),
}
"""Inputs and outputs."""
ROWS = (1, 4, 16, 128, 1024)
FORMATS = ("Q4_0", "Q4_1", "Q8_0", "float32")
FEW_ROWS = 16
"""Up to here the float32 product of the library is used."""
COLD_BYTES = 64 << 20
"""Weights that a series of calls goes through, more than the caches of a core hold."""

Call = Callable[[], object]


def calls(shape: str, rows: int, names: list[str]) -> dict[str, tuple[Call, int]]:
    """For each format a call that walks over copies of a weight, and the bytes of one; "torch" among them."""
    cols, outs = SHAPES[shape]
    gated = shape.endswith("gated")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, cols, generator=generator)
    weight = torch.randn(outs, cols, generator=generator)

    def walk(copies: list[object], product: Callable[[object], object]) -> Call:
        turn: Iterator[object] = iter(())

        def call() -> object:
            nonlocal turn
            if (copy := next(turn, None)) is None:
                turn = iter(copies)
                copy = next(turn)
            return product(copy)

        return call

    def torch_product(w: object) -> object:
        both = F.linear(x, w)
        if not gated:
            return both
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate) * up

    found: dict[str, tuple[Call, int]] = {}
    for name in [*names, "torch"]:
        if name in native.KINDS:
            raw = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[name])
            first = native.pack(name, raw, outs, cols)
            size = first.tiles.nbytes
            copies = [native.Packed(name, outs, cols, first.tiles.clone()) for _ in range(copies_of(size, rows))]
            product = native.linear_silu_mul if gated else native.linear
            found[name] = walk(copies, lambda w, product=product: product(x, w)), size
        elif name == "torch" or (rows <= FEW_ROWS and not gated):
            size = weight.nbytes
            copies = [weight.clone() for _ in range(copies_of(size, rows))]
            one = torch_product if name == "torch" else lambda w: native.linear_float32(x, w)
            found[name] = walk(copies, one), size
    return found


def copies_of(size: int, rows: int) -> int:
    return 1 if rows > FEW_ROWS else max(1, COLD_BYTES // size)


def measure(found: dict[str, tuple[Call, int]], seconds: float, rounds: int) -> dict[str, float]:
    """Median over the rounds of each format's mean time in seconds."""
    times: dict[str, list[float]] = {name: [] for name in found}
    counts = {}
    for name, (call, _) in found.items():
        call()
        begin = time.perf_counter()
        call()
        counts[name] = max(1, int(seconds / rounds / (time.perf_counter() - begin)))
    for _ in range(rounds):
        for name, (call, _) in found.items():
            call()  # whatever ran before has its threads awake for a while
            begin = time.perf_counter()
            for _ in range(counts[name]):
                call()
            times[name].append((time.perf_counter() - begin) / counts[name])
    return {name: statistics.median(series) for name, series in times.items()}


def in_turn(calls_each: int = 300) -> str:
    """One row of gate and up by itself and in turn with a product of PyTorch, whose threads want the same cores."""
    x, weight = torch.randn(1, 576), torch.randn(1024, 576)
    packed = native.Packed("Q4_1", 3072, 576, torch.zeros(native.packed_shape("Q4_1", 3072, 576), dtype=torch.uint8))

    def series(*products: Call) -> str:
        times = []
        for _ in range(calls_each):
            for product in products:
                begin = time.perf_counter()
                product()
            times.append((time.perf_counter() - begin) * 1e6)  # of the last
        return f"{statistics.median(times):.0f} us (90th percentile {statistics.quantiles(times, n=10)[-1]:.0f})"

    def ours() -> object:
        return native.linear(x, packed)

    after = series(lambda: F.linear(x, weight), ours)
    return f"Q4_1 576->3072, cached: {series(ours)}; after a product of PyTorch: {after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda s: [int(n) for n in s.split(",")], default=list(ROWS))
    parser.add_argument("--shapes", type=lambda s: s.split(";"), default=list(SHAPES), help="separated by ;")
    parser.add_argument("--formats", type=lambda s: s.split(","), default=list(FORMATS))
    parser.add_argument("--isa", help="another instruction set than the best")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each cell")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    library = load()
    if args.isa:
        library.use(args.isa)
    if args.threads:
        library.set_threads(args.threads)
        torch.set_num_threads(args.threads)
    print(f"{library.instruction_set}, {library.threads} threads; torch {torch.__version__}, {torch.get_num_threads()}")
    print("| product | rows | format | us | GB/s | GOP/s | x torch float32 |\n|---|---|---|---|---|---|---|")
    for shape in args.shapes:
        cols, outs = SHAPES[shape]
        for rows in args.rows:
            if shape == "head" and rows > 128:
                continue  # a prompt's scored rows only
            found = calls(shape, rows, args.formats)
            times = measure(found, args.seconds, args.rounds)
            for name, (_, size) in found.items():
                t = times[name]
                print(
                    f"| {shape} {cols}->{outs} | {rows} | {name} | {t * 1e6:.1f} | {size / t / 1e9:.1f} "
                    f"| {2 * rows * cols * outs / t / 1e9:.0f} | {times['torch'] / t:.2f} |",
                    flush=True,
                )
    print(in_turn())


if __name__ == "__main__":
    main()
