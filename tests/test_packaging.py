"""What an installation looks like from outside: names, import cost, what a wheel holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _python(code: str, cwd: Path | None = None, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd or Path(sys.executable).parent,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_transformers_imports_with_the_repository_root_on_the_path():
    """From the root, nothing of ours may be taken for the package `kernels`."""
    code = """
import importlib, json, sys
sys.path.insert(0, ".")
import transformers, transformers.integrations.hub_kernels
found = {}
for name in ("kernels.fused", "kernels.maxsim", "kernels.bag_pool"):
    try:
        found[name] = importlib.import_module(name).__name__
    except ImportError:
        pass
module = sys.modules.get("kernels")
print(json.dumps([found, getattr(module, "__file__", None)]))
"""
    found, origin = json.loads(_python(code, cwd=ROOT))
    assert origin is None, "kernels/ has become an importable package"
    assert "kernels.maxsim" not in found and "kernels.bag_pool" not in found


def test_our_kernels_are_bagformer_kernels():
    assert (
        _python("import bagformer.kernels as k; print(k.__name__)").strip() == "bagformer.kernels"
    )


def test_import_is_quick_and_needs_no_triton():
    """At most 2 s past torch's own import, with triton made unimportable."""
    code = """
import sys, time
sys.modules["triton"] = None
import torch
start = time.perf_counter()
import bagformer
bagformer.maxsim, bagformer.BagSegmenter
print(time.perf_counter() - start)
"""
    assert min(float(_python(code)) for _ in range(3)) < 2.0


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """An sdist of this checkout, and the wheel built from that sdist alone."""
    out = tmp_path_factory.mktemp("dist")
    backend = "import setuptools.build_meta as b, sys; print(b.{0}(sys.argv[1]))"
    run = [sys.executable, "-c"]
    subprocess.run(
        [*run, backend.format("build_sdist"), str(out)], cwd=ROOT, check=True, capture_output=True
    )
    sdist = next(out.glob("*.tar.gz"))
    with tarfile.open(sdist) as archive:
        archive.extractall(out / "unpacked", filter="data")
    source = next((out / "unpacked").iterdir())
    subprocess.run(
        [*run, backend.format("build_wheel"), str(out)], cwd=source, check=True, capture_output=True
    )
    return sdist, next(out.glob("*.whl"))


@pytest.mark.slow
def test_sdist_to_wheel_holds_the_whole_package_and_nothing_else(built):
    names = zipfile.ZipFile(built[1]).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"bagformer"}
    assert any(name.startswith("bagformer/_C.") for name in names)
    assert "bagformer/kernels/__init__.py" in names and "bagformer/py.typed" in names
    assert any(
        name.startswith("bagformer/assets/") and name.endswith(".safetensors") for name in names
    )


@pytest.mark.slow
def test_wheel_works_where_the_checkout_is_not(built, tmp_path):
    """The unpacked wheel, ahead of everything else on the path, scores and segments."""
    zipfile.ZipFile(built[1]).extractall(tmp_path)
    code = """
import torch, bagformer, bagformer._C, bagformer.kernels
bags = bagformer.BagSegmenter([(5, 6)])(torch.tensor([[4, 5, 6, 7]]))
scores = bagformer.maxsim(torch.eye(3)[None], torch.eye(3)[None])
print(bagformer.__file__, bags.spans(0), scores.text_to_image.item())
"""
    # -I would hide the test environment's torch; a path entry first is what an installation is
    out = _python(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}")
    assert str(tmp_path) in out and "[(0, 1), (1, 3), (3, 4)] 3.0" in out
