"""The README is the front door: its code runs as printed, its commands and links exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


@pytest.mark.parametrize("block", _blocks("python"), ids=lambda text: text.strip().splitlines()[-1])
def test_python_blocks_run_as_printed(block: str, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    promised = re.findall(r"^print\(.*\)\s+# (.*)$", block, re.M)
    assert printed.splitlines()[: len(promised)] == promised


def test_make_verbs_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for verb in re.findall(r"^make (\w+)", "\n".join(_blocks("bash")), re.M):
        assert re.search(rf"^{verb}:", makefile, re.M), verb


def test_command_verbs_exist():
    from bagformer.cli.main import VERBS

    named = re.findall(r"^bagformer ([\w-]+)", "\n".join(_blocks("bash")), re.M)
    assert set(named) <= set(VERBS) and named


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_figures_are_those_of_the_committed_files():
    render = ROOT / "benchmarks" / "render_readme.py"
    done = subprocess.run([sys.executable, render, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, f"run python benchmarks/render_readme.py {done.stderr}"
