"""The choice of a backend, and of an instruction set."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.makers import features

import bagformer
from bagformer import bag_pool, explain_backend, l2_normalize, maxsim, maxsim_topk
from bagformer.ops import _native, _triton, backend
from bagformer.ops.backend import OPERATORS, choose_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_argument_beats_environment_beats_default(monkeypatch):
    assert choose_backend("maxsim", CPU, torch.float32).backend == "cpu"
    monkeypatch.setenv("BAGFORMER_BACKEND", "reference")
    assert choose_backend("maxsim", CPU, torch.float32).backend == "reference"
    assert choose_backend("maxsim", CPU, torch.float32, "torch").backend == "torch"


@pytest.fixture
def a_gpu(monkeypatch):
    """As if Triton were installed and the GPU, if it is looked at, were an H100."""
    monkeypatch.setattr(_triton, "available", lambda: True)
    monkeypatch.setattr(_triton, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.delenv("BAGFORMER_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_serves_cuda_tensors(a_gpu, dtype):
    choice = choose_backend("maxsim", CUDA, dtype)
    assert choice.backend == "triton"
    assert choice.reason == f"{dtype} tensors on cuda and triton is installed"
    assert choose_backend("maxsim", CUDA, dtype, "torch").backend == "torch"
    assert choose_backend("maxsim", CUDA, dtype, "triton").reason == "backend='triton' asks for it"


def test_what_triton_does_not_serve_goes_to_torch(a_gpu, monkeypatch):
    choice = choose_backend("maxsim", CUDA, torch.float64)
    assert choice.backend == "torch"
    assert choice.reason == (
        "the Triton kernels take float32, bfloat16 and float16, got torch.float64"
    )
    choice = choose_backend("maxsim", torch.device("mps"), torch.float32)
    assert choice.backend == "torch" and "no kernels of our own for mps" in choice.reason
    monkeypatch.setattr(_triton, "_capability", lambda device: (7, 5))
    choice = choose_backend("maxsim", CUDA, torch.float32)
    assert choice.backend == "torch" and "need compute capability 8.0" in choice.reason
    monkeypatch.setattr(torch.version, "hip", "6.4")
    choice = choose_backend("maxsim", CUDA, torch.float32)
    assert choice.backend == "torch" and "written for NVIDIA GPUs" in choice.reason


def test_without_triton_cuda_tensors_go_to_torch(a_gpu, monkeypatch):
    monkeypatch.setattr(_triton, "available", lambda: False)
    choice = choose_backend("maxsim", CUDA, torch.float32)
    assert choice.backend == "torch" and "triton is not installed" in choice.reason
    with pytest.raises(ImportError, match=r"backend='triton': triton is not installed \(python -m"):
        choose_backend("maxsim", CUDA, torch.float32, "triton")


def test_triton_takes_cpu_tensors_in_the_interpreter_alone(a_gpu, monkeypatch):
    refusal = r"backend='triton': the Triton kernels need CUDA tensors, got tensors on cpu"
    for call in (
        lambda: maxsim(features(1, 2, 3), features(1, 2, 3), backend="triton"),
        lambda: maxsim_topk(features(1, 2, 3), features(1, 2, 3), 1, backend="triton"),
        lambda: l2_normalize(features(2, 3), backend="triton"),
        lambda: bag_pool(features(1, 2, 3), torch.tensor([[0, 2]]), backend="triton"),
    ):
        with pytest.raises(ValueError, match=refusal):
            call()
    with pytest.raises(ValueError, match=r"backend='triton': .* got torch.float64"):
        choose_backend("maxsim", CUDA, torch.float64, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("maxsim", CPU, torch.float32, "triton").backend == "triton"
    assert choose_backend("maxsim", CPU, torch.float32).backend == "cpu"
    monkeypatch.setenv("BAGFORMER_BACKEND", "triton")
    assert choose_backend("maxsim", CPU, torch.float32).backend == "triton"
    with pytest.raises(ValueError, match=r"BAGFORMER_BACKEND='triton': .* on meta"):
        choose_backend("maxsim", torch.device("meta"), torch.float32)


def test_an_installed_triton_is_found_without_importing_it():
    _triton.available.cache_clear()
    assert _triton.available() == (importlib.util.find_spec("triton") is not None)


LAZY = """
import sys
sys.modules["torch.utils.flop_counter"] = type(sys)("flop_counter")  # it imports triton itself
sys.modules["torch.utils.flop_counter"].register_flop_formula = lambda op: lambda formula: formula
import torch, bagformer
text = torch.ones(1, 2, 3, requires_grad=True)
bagformer.maxsim(text, torch.ones(1, 4, 3)).text_to_image.sum().backward()
bagformer.maxsim_topk(text, text.detach(), 1)
bagformer.l2_normalize(text)
bagformer.bag_pool(text, torch.tensor([[0, 2]]))
bagformer.explain_backend("maxsim", text, text)
assert "bagformer.kernels" not in sys.modules and "triton" not in sys.modules
"""


def test_nothing_of_triton_is_imported_before_it_runs():
    subprocess.run([sys.executable, "-c", LAZY], check=True)


def test_impossible_choices(monkeypatch):
    with pytest.raises(ValueError, match="backend='cpu' needs CPU tensors, got tensors on cuda"):
        choose_backend("maxsim", CUDA, torch.float32, "cpu")
    monkeypatch.setenv("BAGFORMER_BACKEND", "quick")
    with pytest.raises(ValueError, match=r"BAGFORMER_BACKEND must be one of auto, .* got 'quick'"):
        maxsim(features(1, 2, 3), features(1, 2, 3))


def test_explanation_names_backend_reason_and_instruction_set(monkeypatch):
    text = features(1, 2, 3)
    monkeypatch.setenv("BAGFORMER_CPU_ISA", "scalar")
    line = explain_backend("maxsim", text)
    assert "backend 'cpu'" in line and "instruction set scalar" in line
    assert f"{torch.get_num_threads()} threads" in line
    line = explain_backend("bag_pool", text, backend="torch")
    assert "backend 'torch' (backend='torch' asks for it)" in line
    monkeypatch.setenv("BAGFORMER_BACKEND", "torch")
    assert "BAGFORMER_BACKEND='torch' asks for it" in explain_backend("maxsim", text)
    with pytest.raises(ValueError, match=r"op must be one of bag_pool, .* got 'softmax'"):
        explain_backend("softmax", text)
    with pytest.raises(ValueError, match="at least one of the operator's tensors"):
        explain_backend("maxsim")


def public_operators():
    """Functions of the package whose callers may choose a backend."""
    found = {name: getattr(bagformer, name) for name in bagformer.__all__}
    functions = {name: one for name, one in found.items() if inspect.isfunction(one)}
    return {
        name
        for name, one in functions.items()
        if "backend" in inspect.signature(one).parameters and one is not explain_backend
    }


def test_every_public_operator_can_be_explained():
    assert {"maxsim_pairs", "maxsim_topk_screened"} <= public_operators()
    # maxsim_candidates is what maxsim calls for images [Nt, K, P, D]
    assert public_operators() | {"maxsim_candidates"} == set(OPERATORS)
    assert list(OPERATORS) == sorted(OPERATORS)
    for op in OPERATORS:
        assert f"``{op}``" in explain_backend.__doc__
        assert explain_backend(op, torch.ones(1)).startswith(f"{op} on cpu torch.float32: backend")


CALLS = {
    "bag_pool": lambda x, **how: bag_pool(x, torch.tensor([[0, 2], [1, 2]]), **how),
    "l2_normalize": l2_normalize,
    "maxsim": lambda x, **how: maxsim(x, x, **how),
    "maxsim_candidates": lambda x, **how: maxsim(x, x[:, None], **how),
    "maxsim_pairs": lambda x, **how: bagformer.maxsim_pairs(x, x, **how),
    "maxsim_quantized": lambda x, **how: bagformer.maxsim_quantized(
        x, bagformer.quantize_features(x), **how
    ),
    "maxsim_topk": lambda x, **how: maxsim_topk(x, x, 1, **how),
    "maxsim_topk_screened": lambda x, **how: bagformer.maxsim_topk_screened(
        x, bagformer.screen_images(x), 1, **how
    ),
}


@pytest.mark.parametrize("op", list(CALLS))
@pytest.mark.parametrize("asked", ["auto", "cpu", "torch", "reference"])
def test_an_explanation_is_what_a_call_does(op, asked, monkeypatch):
    chosen = []

    def watched(op, *rest):
        chosen.append((op, choose_backend(op, *rest).backend))
        return choose_backend(op, *rest)

    ops = [one for name, one in sys.modules.items() if name.startswith("bagformer.ops.")]
    for module in ops:
        if module is not backend and hasattr(module, "choose_backend"):
            monkeypatch.setattr(module, "choose_backend", watched)
    CALLS[op](features(2, 2, 3), backend=asked)
    line = explain_backend(op, features(2, 2, 3), backend=asked)
    assert chosen and all(f"backend '{ran}'" in line for _, ran in chosen)
    if op != "maxsim_topk":  # it calls maxsim for each block, which goes without saying
        assert all(re.search(rf"\b{called}\b", line) for called, _ in chosen)


def test_a_screen_is_for_cpu_tensors_and_kernels_of_int8(a_gpu, monkeypatch):
    there = torch.empty(1, device="meta")
    with pytest.raises(ValueError, match=r"needs CPU tensors, got tensors on meta; maxsim_topk"):
        explain_backend("maxsim_topk_screened", there)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    text = features(1, 2, 3)
    assert "backend 'triton'" in explain_backend("maxsim_topk", text, backend="triton")
    for call in (explain_backend, lambda op, x, **how: CALLS[op](x, **how)):
        with pytest.raises(ValueError, match=r"backend='triton': .* got torch.int8"):
            call("maxsim_topk_screened", text, backend="triton")


def test_instruction_set_is_validated(monkeypatch):
    monkeypatch.setenv("BAGFORMER_CPU_ISA", "mmx")
    levels = _native.load().cpu_isas()
    names = ", ".join(levels[:-1]) + f" or {levels[-1]}"
    with pytest.raises(ValueError, match=f"must be {names}; got 'mmx'"):
        maxsim(features(1, 2, 3), features(1, 2, 3))
    monkeypatch.setenv("BAGFORMER_CPU_ISA", "scalar")
    assert _native.load().cpu_isa() == "scalar"
    monkeypatch.delenv("BAGFORMER_CPU_ISA")
    assert _native.load().cpu_isa() == _native.load().best_cpu_isa()


def test_a_missing_instruction_set_is_an_error(monkeypatch):
    best = _native.load().cpu_isas()[-1]
    if _native.load().best_cpu_isa() == best:
        pytest.skip("this processor has every instruction set that can be asked for")
    monkeypatch.setenv("BAGFORMER_CPU_ISA", best)
    with pytest.raises(
        ValueError, match=f"asks for {best}, but this processor or build has at most"
    ):
        maxsim(features(1, 2, 3), features(1, 2, 3))


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(_native, "extension", None)
    monkeypatch.setattr(_native, "LOAD_ERROR", ImportError("no such file"))
    choice = choose_backend("maxsim", CPU, torch.float32)
    assert choice.backend == "torch" and "not built" in choice.reason
    assert l2_normalize(torch.tensor([3.0, 4.0])).tolist() == pytest.approx([0.6, 0.8])
    with pytest.raises(ImportError, match=r"pip install -e \..*backend='torch'.*no such file"):
        maxsim(features(1, 2, 3), features(1, 2, 3), backend="cpu")


PRECISION_PROBE = """
import torch, bagformer
{setting}
text, image = torch.randn(3, 5, 64), torch.randn(2, 9, 64)
ours = bagformer.maxsim(text, image, backend="torch")
exact = bagformer.maxsim(text.double(), image.double())
assert (ours.text_to_image - exact.text_to_image).abs().max() < 1e-4
assert {getter} == {value!r}
"""


@pytest.mark.parametrize(
    "setting,getter,value",
    [
        (
            "torch.set_float32_matmul_precision('medium')",
            "torch.get_float32_matmul_precision()",
            "medium",
        ),
        (
            "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
            "torch.backends.mkldnn.matmul.fp32_precision",
            "bf16",
        ),
    ],
    ids=["legacy", "new"],
)
def test_a_users_global_precision_is_neither_used_nor_changed(setting, getter, value):
    # in a process of its own: PyTorch forbids mixing the two ways to set it
    code = PRECISION_PROBE.format(setting=setting, getter=getter, value=value)
    subprocess.run([sys.executable, "-c", code], check=True)


FORKED = """
import os, torch, bagformer
text, image = torch.randn(8, 3, 4), torch.randn(8, 5, 4)
torch.set_num_threads(2)
bagformer.maxsim(text, image)  # starts threads, which a fork does not copy
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    bagformer.maxsim(text, image)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_worker_with_one_thread_does_not_hang():
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=120)


def test_the_operators_work_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, bagformer\n"
        "assert bagformer.maxsim(torch.ones(1, 2, 3), torch.ones(1, 4, 3))[0].item() == 6\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_explanation_wants_tensors():
    with pytest.raises(TypeError, match=r"tensors\[1\] must be a torch.Tensor, got list"):
        explain_backend("maxsim", features(1, 2, 3), [1.0])


FORK = """
import os, sys, time, torch
from bagformer import maxsim
from bagformer.bags import BagSegmenter
torch.set_num_threads(2)
segmenter, ids = BagSegmenter([[1, 2]]), torch.ones(4096, 3, dtype=torch.int64)
features = torch.ones(8, 4, 16)
bags, scores = segmenter(ids), maxsim(features, features)
child = os.fork()
if child == 0:
    same = torch.equal(segmenter(ids, n_threads=2).offsets, bags.offsets)
    same = same and torch.equal(maxsim(features, features)[0], scores[0])
    os._exit(0 if same else 1)
deadline = time.monotonic() + 20
done, status = 0, -1
while not done and time.monotonic() < deadline:
    done, status = os.waitpid(child, os.WNOHANG)
    time.sleep(0.02)
if not done:
    os.kill(child, 9)
sys.exit(0 if done and status == 0 else 1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_does_not_wait_for_threads_that_it_lacks():
    assert subprocess.run([sys.executable, "-c", FORK], timeout=120).returncode == 0


CHANGING_ENVIRONMENT = """
import os, threading, torch
from bagformer import maxsim, maxsim_quantized, quantize_features

torch.set_num_threads(1)
text = image = torch.ones(1, 2, 4)
stored, done = quantize_features(image), threading.Event()

def change():
    turn = 0
    while not done.is_set():
        for name in range(3000):
            os.environ[f"BAGFORMER_TEST_{name}"] = "x" * (turn % 50)
            turn += 1
        for name in range(3000):
            del os.environ[f"BAGFORMER_TEST_{name}"]

thread = threading.Thread(target=change)
thread.start()
for turn in range(10000):
    maxsim_quantized(stored, stored) if turn % 2 else maxsim(text, image)
done.set()
thread.join()
"""


def test_the_environment_is_read_under_the_gil():
    """The C library moves the environment when it grows. Kernels run without the GIL."""
    sources = Path(__file__).resolve().parent.parent / "csrc"
    readers = [
        path.name
        for path in sorted(sources.rglob("*.cpp"))
        if re.search(r"getenv|active_isa\(\)", path.read_text(encoding="utf-8"))
    ]
    assert readers == ["bindings_cpu.cpp", "dispatch.cpp"]


def test_another_thread_may_change_the_environment():
    """As above, by trial: without the GIL about every third run of this crashed."""
    command = [sys.executable, "-c", CHANGING_ENVIRONMENT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
