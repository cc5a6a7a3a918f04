"""The penalties' and FGM's kernels for the GPU, without one: bytes, launches, races, stray accesses, spills, widths."""

import gc
import weakref
from collections import OrderedDict
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import fastreg
from fastreg import _plan, penalties
from tests.machine import (
    gpu_kernels,
    needs_cpu_kernels,
    needs_cuda,
    needs_interpreter,
    needs_nvcc,
    needs_ptxas,
    no_sync,
)
from tests.proving import cubin, cudahost

LAUNCHERS = ("lp_norms", "lp_penalty_backward", "fgm_attack", "fgm_restore")


def kernels():
    return cudahost.load("csrc/cuda/penalties.cu", [f"fastreg::cuda::{name}" for name in LAUNCHERS])


# The CUDA kernels on the host, called as the operators; tensors in `behind` stand at the tables' addresses.
behind: list[torch.Tensor] = []


def lp_norms(table, chunks, chunk, p, squared, wide):
    tensors = len(table)
    parts, terms, norms = (torch.empty(n, dtype=torch.float64) for n in ((len(chunks), 2), tensors, (tensors, 2)))
    penalty = torch.empty((), dtype=torch.float64 if wide else torch.float32)
    kernels().lp_norms(
        table, chunks, len(chunks), chunk, tensors, p, squared, parts, terms, norms,
        None if wide else penalty, penalty if wide else None, *behind,
    )  # fmt: skip
    return penalty, norms


def lp_penalty_backward(table, chunks, chunk, outs, norms, grad, p, squared, add):
    kernels().lp_penalty_backward(table, chunks, len(chunks), chunk, outs, norms, grad, p, squared, add, *behind)


def fgm_attack(table, chunks, chunk, epsilon, wide):
    parts, norms = (torch.empty(n, 2, dtype=torch.float64) for n in (len(chunks), len(table)))
    kernels().fgm_attack(table, chunks, len(chunks), chunk, len(table), epsilon, parts, norms, *behind)


def fgm_restore(table, chunks, chunk):
    kernels().fgm_restore(table, chunks, len(chunks), chunk, *behind)


def put_on_host(monkeypatch):
    """The CUDA kernels in place of the C++ ones."""
    for attribute, kernel in (
        ("_norms", lp_norms), ("_backward", lp_penalty_backward),
        ("_attack_kernels", fgm_attack), ("_restore_kernels", fgm_restore),
    ):  # fmt: skip
        monkeypatch.setitem(getattr(penalties, attribute), "cpu", kernel)


ours = gpu_kernels(put_on_host)


@pytest.fixture(autouse=True)
def nothing_behind():
    yield
    behind.clear()


SIZES = (1, 64, 1001, 5000)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_one_read_forward_and_one_read_and_write_backward(ours, p):
    from tests.proving.traffic import traffic

    tensors = [nn.Parameter(torch.randn(n)) for n in SIZES] + [nn.Parameter(torch.randn(300).bfloat16())]
    weights = [t.detach() for t in tensors]
    behind[:] = weights
    with traffic() as log:
        penalty = fastreg.lp_penalty(tensors, p)
    assert len(log) == 3
    for w in weights:
        assert log.reads(w).eq(1).all() and log.writes(w).eq(0).all()
    penalty.backward()
    for t in tensors:
        t.grad.zero_()
    grads = [t.grad for t in tensors]
    behind[:] = weights + grads
    with traffic() as log:
        fastreg.lp_penalty_backward_(tensors, p, weight=0.5)
    assert len(log) == 4
    backward = log[-1]
    for w, g in zip(weights, grads):
        assert backward.reads(w).eq(1).all() and backward.reads(g).eq(1).all() and backward.writes(g).eq(1).all()


def test_attack_touches_the_blocks_with_a_gradient_alone(ours):
    from tests.proving.traffic import traffic

    model = nn.ModuleDict({"emb": nn.Embedding(100, 48)})
    weight = model["emb"].weight.detach()
    before = weight.clone()
    grad = model["emb"].weight.grad = torch.zeros_like(weight)
    grad[[3, 77]] = torch.randn(2, 48)
    fgm = fastreg.FGM(model)
    behind[:] = [weight, grad]
    with traffic() as log:
        fgm.attack()
    assert len(log) == 3
    touched = torch.zeros(4800, dtype=torch.int64)
    for row in (3, 77):
        touched[row * 48 // 64 * 64 : -(-(row + 1) * 48 // 64) * 64] = 1
    assert torch.equal(log.writes(weight).flatten(), touched) and torch.equal(log.reads(weight).flatten(), touched)
    assert log.reads(grad).eq(2).all()  # for its norm, and for the step
    with traffic() as log:
        fgm.restore()
    assert len(log) == 1 and torch.equal(log.writes(weight).flatten(), touched) and torch.equal(weight, before)


@needs_interpreter
def test_no_stray_access_and_no_race():
    from tests.proving.sanitizer import sanitize

    base = torch.randn(20000)
    parts = [base[a:b].requires_grad_() for a, b in ((0, 1), (3, 70), (100, 2148), (3001, 9000))]
    grads = torch.zeros(20000)
    for part, (a, b) in zip(parts, ((0, 1), (3, 70), (100, 2148), (3001, 9000))):
        part.grad = grads[a:b]
    with fastreg.use_backend("triton"), sanitize(also=[base, grads]):
        fastreg.lp_penalty_backward_(parts, 1.5)
    assert grads[9000:].eq(0).all() and grads[1:3].eq(0).all() and grads[2148:3001].eq(0).all()


def cuda_calls():
    """What the sanitizers watch."""
    patch = pytest.MonkeyPatch()
    put_on_host(patch)
    with fastreg.use_backend("cpu"):
        for dtype in (torch.float32, torch.float16, torch.float64):
            model = nn.ParameterDict({f"emb{n}": nn.Parameter(torch.randn(n).to(dtype)) for n in SIZES})
            for p in (1.0, 2.0, 2.5):
                fastreg.lp_penalty(list(model.values()), p).backward()
                fastreg.lp_penalty_backward_(list(model.values()), p)
            fgm = fastreg.FGM(model)
            fgm.attack()
            fgm.restore()
    patch.undo()


@needs_nvcc
@pytest.mark.slow
def test_cuda_kernels_do_not_spill():
    for facts in cubin.nvcc_facts("csrc/cuda/penalties.cu"):
        assert facts.spills == 0, facts
        if not facts.kernel.startswith(("norm_tensors", "add_terms")):
            assert facts.loads.get(128), facts


def compile_all():
    from tritonkernels import penalties as triton_kernels

    tensors = [torch.empty(1 << 20, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    plan = penalties._penalty_plan(tensors)
    outs, grad = penalties._addresses(tensors, torch.device("cpu")), torch.ones((), dtype=torch.float64)
    for p in (1.0, 2.0, 3.0):
        _, norms = triton_kernels.lp_norms(plan.table, plan.chunks, plan.chunk, p, False, p == 2)
        triton_kernels.lp_penalty_backward(plan.table, plan.chunks, plan.chunk, outs, norms, grad, p, False, p == 1)
    compile_fgm()


def compile_fgm():
    from tritonkernels import penalties as triton_kernels

    rows, chunks = torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64)
    triton_kernels.fgm_attack(rows, chunks, 2048, 1.0, False)
    triton_kernels.fgm_restore(rows, chunks, 2048)


@needs_ptxas
def test_triton_writes_marks_when_every_warp_has_read_them():
    """The interpreter has no warps: there a mark cannot be gone before the last of them looks for it."""
    (launches,) = cubin.launch_facts("tests.test_penalties_gpu:compile_fgm", architectures=[90]).values()
    seen = {facts.kernel: facts for facts in launches}
    for kernel in ("_attacks", "_restores"):
        assert seen[kernel].barriers > 0 and seen[kernel].unguarded == 0, seen[kernel]


@needs_ptxas
@pytest.mark.slow
def test_triton_kernels_do_not_spill():
    (launches,) = cubin.launch_facts("tests.test_penalties_gpu:compile_all").values()
    for facts in launches:
        assert facts.spills == 0, facts
        if facts.kernel in ("_norm_chunks", "_gradients", "_attacks", "_restores"):
            assert facts.loads.get(128), facts


# ---- on a GPU --------------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_nothing_waits_for_the_device(backend):
    tensors = [torch.randn(n, device="cuda", requires_grad=True) for n in SIZES]
    model = nn.ParameterDict({f"emb{i}": nn.Parameter(t.detach()) for i, t in enumerate(tensors)})
    for param in model.values():
        param.grad = torch.randn_like(param)
    fgm = fastreg.FGM(model)

    def step():
        fastreg.lp_penalty(tensors).backward()
        fastreg.lp_penalty_backward_(tensors)
        fgm.attack()
        fgm.restore()

    with fastreg.use_backend(backend):
        step()
        with no_sync():
            step()


@pytest.mark.parametrize("capturing", [True, False])
def test_what_a_captured_copy_reads_stays(capturing, monkeypatch):
    """A graph's replay reads the table of addresses from pinned memory again: nobody else may get that memory."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(_plan, "_captured", [])
    place = weakref.ref(_plan._pinned(torch.arange(3)))
    gc.collect()
    assert (place() is not None) == capturing


@pytest.fixture
def graph(monkeypatch):
    """`graph(True)`: from here on as if a CUDA graph were captured. What is made then is written by a replay alone, so
    the tables are zeros here."""
    state, made = SimpleNamespace(on=False), _plan._to_device
    monkeypatch.setattr(_plan, "capturing", lambda device: state.on)
    monkeypatch.setattr(_plan, "_to_device", lambda *args: made(*args).zero_() if state.on else made(*args))
    monkeypatch.setattr(_plan, "_captured", [])
    monkeypatch.setattr(_plan, "_plans", OrderedDict())
    return lambda on: setattr(state, "on", on)


@pytest.mark.parametrize("warm", [True, False])
def test_a_plan_of_a_graph_is_not_used_outside_and_one_that_a_graph_uses_stays(warm, graph):
    tensors, made, cpu = [torch.randn(5)], [], torch.device("cpu")

    def plan():
        made.append(
            _plan.plan_for("test", tensors, lambda: _plan.Plan.make(np.ones((1, 1), int), np.ones(1, int), cpu))
        )
        return made[-1]

    if warm:
        plan()
    graph(True)
    plan()
    graph(False)
    assert plan().table.item() == 1
    assert (made[0] is made[1]) == warm and (_plan._captured == made[:1]) == warm


def test_caps_of_a_graph_are_not_used_outside(graph):
    constants = import_module("fastreg.max_norm")._constants
    for caps in ((123.0,), (123.0, 124.0)):
        graph(True)
        assert constants(caps, torch.device("cpu"))[0].tolist() == [0.0] * len(caps)
        graph(False)
        assert tuple(constants(caps, torch.device("cpu"))[0].tolist()) == caps


@needs_cpu_kernels
@pytest.mark.parametrize("warm", [True, False])
def test_an_attack_in_a_graph_leaves_nothing_behind_and_what_it_uses_stays(warm, graph, monkeypatch):
    launches = []
    for kernels in (penalties._attack_kernels, penalties._restore_kernels):
        run = kernels["cpu"]
        monkeypatch.setitem(kernels, "cpu", lambda *args, run=run: launches.append(args) if captured else run(*args))
    model = torch.nn.ModuleDict({"emb": torch.nn.Embedding(10, 8)})
    weight, fgm, captured = model["emb"].weight, fastreg.FGM(model), False
    weight.grad = torch.ones_like(weight)
    kept = weight.detach().clone()

    def step():
        fgm.attack()
        moved = not torch.equal(weight, kept)
        fgm.restore()
        return moved and torch.equal(weight, kept)

    with fastreg.use_backend("cpu"):
        assert not warm or step()
        graph(captured := True)
        step()
        graph(captured := False)
        assert len(launches) == 2
        assert step()
        ready = [kept for kept in _plan._captured if isinstance(kept, penalties._Ready)]
        assert len(ready) == 1 and (ready[0] is fgm._perturbation._ready) == warm
