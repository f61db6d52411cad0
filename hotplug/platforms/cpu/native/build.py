"""Builds the native library: `python -m hotplug.platforms.cpu.native.build`. Needs a C++17 compiler and nothing else.

Packaging runs this file by its path (`setup.py`), so that it imports the standard library only.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
LIBRARY = Path(__file__).parent / "libhotplug_cpu.so"

COMMON = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra")
LINK = ("-shared", "-pthread", "-static-libstdc++", "-static-libgcc", "-Wl,-s")
"""The C++ runtime goes in, and `exports.map` lets nothing of it show: torch brings its own."""

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512_VNNI = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni")
_AMX = (*_AVX512_VNNI, "-mprfchw", "-mavx512bf16", "-mamx-tile", "-mamx-bf16")
X86 = {
    "attention_amx.cpp": (*_AMX, "-Wno-maybe-uninitialized", "-Wno-uninitialized"),
    "attention_avx2.cpp": _AVX2,
    "attention_avx512.cpp": (*_AVX512_VNNI, "-Wno-maybe-uninitialized", "-Wno-uninitialized"),
    "kernels_avx2.cpp": _AVX2,
    # GCC 12 takes the undefined operand of its own intrinsics for a mistake.
    "kernels_amx.cpp": (*_AMX, "-Wno-maybe-uninitialized", "-Wno-uninitialized"),
    "kernels_avx512_vnni.cpp": (*_AVX512_VNNI, "-Wno-maybe-uninitialized", "-Wno-uninitialized"),
    "rows_avx2.cpp": _AVX2,
    "rows_avx512.cpp": (*_AVX512_VNNI, "-Wno-maybe-uninitialized", "-Wno-uninitialized"),
}
"""Files for one instruction set each, with what turns it on. The others are for the compiler's baseline."""
RECENT = ("attention_amx.cpp", "kernels_amx.cpp")
"""Files that a compiler older than GCC 11 or Clang 12 is not asked for; if it is, HOTPLUG_AMX is defined."""


class BuildError(Exception):
    """There is no compiler, or it failed; the message says which."""


def find_compiler() -> str | None:
    """`$CXX` if set, else the first of g++, clang++ and c++."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((found for name in names if (found := shutil.which(name))), None)


def obstacle() -> str | None:
    """Why nothing can be built here; None if it can."""
    if sys.platform != "linux":
        return f"the native kernels are built on Linux only, not on {sys.platform}"
    if find_compiler() is None:
        return "no C++ compiler found: neither $CXX nor g++, clang++ or c++"
    return None


def up_to_date(library: Path = LIBRARY) -> bool:
    """Whether the library is newer than everything it is made from."""
    inputs = [*SOURCES.iterdir(), Path(__file__)]
    return library.exists() and library.stat().st_mtime >= max(path.stat().st_mtime for path in inputs)


def build(library: Path = LIBRARY) -> Path:
    """Compile every source side by side and link `library`. Raises BuildError."""
    if why := obstacle():
        raise BuildError(why)
    compiler = str(find_compiler())
    x86 = platform.machine() in ("x86_64", "AMD64")
    sources = [path for path in sorted(SOURCES.glob("*.cpp")) if x86 or path.name not in X86]
    recent = x86 and takes(compiler, _AMX)
    sources = [path for path in sources if recent or path.name not in RECENT]
    told = ["-DHOTPLUG_AMX"] if recent else []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]

        def compile_one(source: Path, target: Path) -> None:
            _run([compiler, *COMMON, *told, *X86.get(source.name, ()), "-c", str(source), "-o", str(target)])

        list(pool.map(compile_one, sources, objects))
        linked = Path(folder) / library.name
        script = f"-Wl,--version-script={SOURCES / 'exports.map'}"
        _run([compiler, *map(str, objects), *LINK, script, "-o", str(linked)])
        # In one step, because a process may have the old one loaded.
        staged = library.with_name(f".{library.name}.{os.getpid()}")
        shutil.copyfile(linked, staged)
        staged.replace(library)
    return library


def takes(compiler: str, flags: Sequence[str]) -> bool:
    """Whether the compiler knows these flags."""
    command = [compiler, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the native CPU kernels.")
    parser.add_argument("--output", type=Path, default=LIBRARY, help="where to put the library")
    parser.add_argument("--force", action="store_true", help="even if it is newer than its sources")
    parser.add_argument("--optional", action="store_true", help="where nothing can be built, say so and succeed")
    args = parser.parse_args()
    if not args.force and up_to_date(args.output):
        return
    if args.optional and (why := obstacle()):
        print(f"native CPU kernels not built, PyTorch's serve: {why}", file=sys.stderr)
        return
    try:
        print(f"built {build(args.output)}")
    except BuildError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
