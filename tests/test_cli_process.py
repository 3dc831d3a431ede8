"""The command as a process: locale, pipes, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

COMMAND = [sys.executable, "-m", "bagformer.cli"]


def start(*arguments, **environment):
    """A real process; its environment knows no UTF-8, and Ctrl-C reaches it even where the tests
    run in the background of a shell, which has it ignored."""
    return subprocess.Popen(
        [*COMMAND, *map(os.fsencode, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "LANG": "C", **environment},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_chinese_goes_in_and_out_of_a_locale_that_knows_none(place):
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = start("segment", "--json", "--model", str(place.model), "高领毛衣", **ascii_only)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    row = json.loads(out.decode("utf-8"))["texts"][0]
    assert (row["text"], row["bags"]) == ("高领毛衣", ["高领", "毛衣"])


def test_an_argument_that_is_not_utf8_is_an_error(place):
    process = start("segment", "--model", str(place.model), "背包".encode("gbk"))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, b"")
    assert err.startswith(b"bagformer segment: error: TEXT: not UTF-8 at byte 0")


def test_a_reader_that_goes_away_is_not_a_traceback(place):
    process = start("segment", "--model", str(place.model))
    process.stdout.close()
    try:
        process.stdin.write("红色毛衣\n".encode() * 20_000)
        process.stdin.close()
    except BrokenPipeError:
        pass
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(place, closed):
    command = f"exec {sys.executable} -m bagformer.cli segment --model {place.model} {closed}"
    process = subprocess.run(["sh", "-c", command], input=b"", capture_output=True, timeout=60)
    assert (process.returncode, process.stdout, process.stderr) == (0, b"", b"")


def test_ctrl_c_gives_130(place):
    process = start("segment", "--model", str(place.model))
    guard = threading.Timer(60, process.kill)
    guard.start()
    process.stdin.write("背包\n".encode() * 256)
    process.stdin.flush()
    # an answer means that it now waits for more lines
    assert process.stdout.read(1)
    guard.cancel()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == b"bagformer segment: error: interrupted\n"
