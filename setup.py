"""Adds the compiled CPU kernels to what pyproject.toml says.

A compiler that is missing or fails is no reason to refuse the installation: quantizing and GPUs need no CPU kernels.
It is said, and said again when a server starts without them.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDER = Path(__file__).resolve().parent / "kernels" / "bitsmoe_kernels" / "_cpu"
spec = importlib.util.spec_from_file_location("bitsmoe_cpu_build", FOLDER / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


class BuildLibrary(build_ext):
    """Compiles a plain shared library where setuptools would make a Python extension."""

    def get_ext_filename(self, fullname):
        """The name has no version of Python in it."""
        return str(Path(*fullname.split(".")[:-1]) / build.LIBRARY)

    def build_extension(self, ext):
        """Compile, or say why there will be no CPU kernels."""
        try:
            build.compile_library(Path(self.get_ext_fullpath(ext.name)).resolve())
        except build.CompileError as e:
            print(f"bitsmoe-vllm: NO CPU KERNELS, serving on a CPU will be very slow: {e}", file=sys.stderr)


class WheelForAnyPython(bdist_wheel):
    """The library is bound to the machine, not to a version of Python."""

    def get_tag(self):
        """Python 3 of any version, this machine."""
        return "py3", "none", super().get_tag()[2]


setup(
    # The sources are the package's data, and `build.py` knows which of them a machine needs.
    ext_modules=[Extension("bitsmoe_kernels._cpu.library_file", [], optional=True)],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": WheelForAnyPython},
)
