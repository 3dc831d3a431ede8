"""Builds the C++ extension; everything else about the package is in pyproject.toml."""

import os
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

ROOT = Path(__file__).parent
ParallelCompile("BAGFORMER_BUILD_JOBS", default=os.cpu_count() or 1).install()


def extension() -> Pybind11Extension:
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))
    compile_args, link_args = ["-O3", "-fvisibility=hidden", "-Wall", "-Wextra"], []
    if sys.platform == "win32":
        compile_args = ["/O2", "/openmp"]
    elif sys.platform != "darwin":  # Apple's clang ships no OpenMP; kernels then run on one thread
        compile_args.append("-fopenmp")
        link_args.append("-fopenmp")
    # The baseline stays plain x86-64 or aarch64. Files of one instruction set raise it themselves,
    # function by function, and are entered only after a run-time check of the processor.
    return Pybind11Extension(
        "bagformer._C",
        sources,
        include_dirs=["csrc"],
        depends=headers,
        cxx_std=20,
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )


setup(
    packages=[*find_packages(include=["bagformer", "bagformer.*"]), "bagformer.kernels"],
    # kernels/ itself must never be importable: `kernels` is another project's top-level name.
    package_dir={"bagformer.kernels": "kernels/fused"},
    ext_modules=[extension()],
    cmdclass={"build_ext": build_ext},
)
