"""What `pyproject.toml` cannot say: a wheel carries the native CPU kernels, if there is a compiler to build them with.

Without one, and in an editable installation, nothing is compiled: `make` or
`python -m hotplug.platforms.cpu.native.build` does it, and until then PyTorch's kernels serve.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

NATIVE = Path("hotplug", "platforms", "cpu", "native")

# By its path: hotplug itself cannot be imported before what it needs is installed.
_spec = importlib.util.spec_from_file_location("hotplug_native_build", Path(__file__).parent / NATIVE / "build.py")
assert _spec is not None and _spec.loader is not None
native = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(native)


class BuildWithNative(build_py):
    """Builds the library beside the modules of a wheel."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        try:
            native.build(Path(self.build_lib) / NATIVE / native.LIBRARY.name)
        except native.BuildError as error:
            print(f"hotplug is packaged without native CPU kernels: {error}", file=sys.stderr)


class PlatformDistribution(Distribution):
    """Of one platform where the library can be built, although there is no extension module."""

    def has_ext_modules(self) -> bool:
        return native.obstacle() is None


class PlatformWheel(bdist_wheel):
    """For every Python: the library knows nothing of it."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(cmdclass={"build_py": BuildWithNative, "bdist_wheel": PlatformWheel}, distclass=PlatformDistribution)
