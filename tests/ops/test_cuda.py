"""The losses on a GPU against fp64 on the CPU, with kernels compiled; skipped where there is no
GPU."""

import subprocess
import sys
import textwrap

import pytest
import torch

from bench.cost import count
from bench.launch import SYMMETRIC, launch
from rankpo_fast import (
    info_nce_loss,
    info_nce_loss_and_grads,
    rankpo_group_loss,
    rankpo_loss,
    rankpo_loss_and_grads,
)
from rankpo_kernels.problem import DIRECTIONS
from rankpo_kernels.triton import info_nce as module
from support.gates import draw, error, gates
from support.info_nce_problems import GRID
from support.launcher import LOW, TIGHT, assert_equals_definition, option_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOTH_WAYS = {"directions": DIRECTIONS[:2], "partition": "per_direction"}
FORMS = {"exact": (False, {}), "stored": (True, {}), "both-ways": (False, BOTH_WAYS)}
forms = pytest.mark.parametrize("form", FORMS)


def choose(monkeypatch, stored: bool) -> None:
    """The pipeline for bf16, whatever the size."""
    monkeypatch.setattr(module, "against_storing", lambda *sizes: "" if stored else "not asked")


def gradients(function, tensors, loss_scale):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    loss = function(*leaves)
    upstream = torch.tensor(loss_scale, dtype=loss.dtype, device=loss.device)
    return loss.detach(), *(
        g.double() / loss_scale for g in torch.autograd.grad(loss, leaves, upstream)
    )


def check(function, tensors, dtype, temperature):
    """`function` on the GPU passes the gates against itself in fp64 on the CPU, whose own gates
    hold."""
    exact = gradients(function, [x.double() for x in tensors], 1.0)
    loss_scale = min(2.0**110, 2.0 ** -exact[1].abs().amax().log2().round().item())
    got = [x.cpu() for x in gradients(function, [x.cuda() for x in tensors], loss_scale)]
    loss_gate, grad_gate = gates(dtype, temperature)
    assert error(got[0], exact[0]) < loss_gate
    assert max(error(a, b) for a, b in zip(got[1:], exact[1:], strict=True)) < grad_gate


@pytest.mark.parametrize("converged", [False, True], ids=["fresh", "converged"])
@pytest.mark.parametrize("temperature", [0.1, 0.02])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("M", "N", "D"),
    [
        pytest.param(65, 129, 100, id="nothing-round"),
        pytest.param(128, 640, 384, id="minilm-with-four-negatives"),
    ],
)
def test_info_nce_passes_the_gates_on_the_gpu(M, N, D, dtype, temperature, converged):
    q, p, labels = draw(M, N, D, dtype, converged)
    ids = torch.arange(N) // 2

    def loss(q, p):
        return info_nce_loss(
            q, p, labels.to(q.device), temperature=temperature, passage_ids=ids.to(q.device),
            workspace_bytes=50 * 8 * N,
        )  # fmt: skip

    check(loss, (q, p), dtype, temperature)


@pytest.mark.parametrize(
    ("M", "N", "D", "rows"),
    [
        pytest.param(300, 1100, 384, 999, id="tiles-in-one-chunk"),
        pytest.param(400, 1100, 384, 140, id="four-chunks"),
        pytest.param(260, 4200, 1000, 256, id="parts-summed-by-a-launch"),
    ],
)
@pytest.mark.parametrize("temperature", [0.02, 0.01])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@forms
def test_every_pipeline_passes_the_gates(form, dtype, temperature, M, N, D, rows, monkeypatch):
    stored, options = FORMS[form]
    if stored and dtype != torch.bfloat16:
        pytest.skip("stored in bf16 alone")
    choose(monkeypatch, stored)
    q, p, labels = draw(M, N, D, dtype, converged=True)

    def loss(q, p):
        return info_nce_loss(
            q, p, labels.to(q.device), temperature=temperature, workspace_bytes=rows * 4 * N,
            **options,
        )  # fmt: skip

    check(loss, (q, p), dtype, temperature)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in GRID for dtype in DTYPES[:2]]
    + [("plain", torch.float16), ("everything-joint", torch.float16)],
)
def test_every_option_at_the_shipped_tiles(name, dtype):
    assert_equals_definition(option_case(name, dtype), LOW.get(dtype, TIGHT), tiles=None)


@pytest.mark.parametrize("name", ["ids", "excluded", "margin", "relative-margin", "guide"])
def test_every_mask_where_exponentials_are_stored(name):
    dtype = torch.bfloat16
    assert_equals_definition(option_case(name, dtype), LOW[dtype], tiles=None, stored=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "D"), [(33, 100), pytest.param(64, 384, id="minilm")])
def test_rankpo_passes_the_gates_on_the_gpu(B, D, dtype):
    q, c, _ = draw(B, B, D, dtype, converged=True)
    r = c.flip(0).contiguous()
    check(lambda *x: rankpo_loss(*x, temperature=1.0), (q, c, r), dtype, 1.0)


def test_rankpo_does_not_wait_for_the_device():
    q, c, r = torch.randn(3, 256, 384, device="cuda", dtype=torch.bfloat16)

    def run():
        return rankpo_loss_and_grads(q, c, r)

    run()  # compiled by now
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, again = run(), run()
        assert torch.equal(first.loss, again.loss)
        assert all(map(torch.equal, first.grads, again.grads))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("form", ["pairs", "plackett_luce"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "K", "D"), [(33, 7, 100), pytest.param(8, 64, 384, id="large")])
def test_rankpo_of_groups_passes_the_gates_on_the_gpu(B, K, D, dtype, form):
    q, p, _ = draw(B, B * K, D, dtype, converged=True)
    grades = (torch.arange(B * K).view(B, K) % 5).float()
    grades[::2, -1] = torch.nan

    def loss(q, p):
        return rankpo_group_loss(q, p, grades.to(q.device), form=form, temperature=1.0)

    check(loss, (q, p.view(B, K, D)), dtype, 1.0)


# What only a GPU can tell


def inputs(M: int, N: int, D: int, dtype=torch.bfloat16):
    q, p, labels = (x.cuda() for x in draw(M, N, D, dtype, converged=False))
    return q.requires_grad_(), p.requires_grad_(), labels


@forms
def test_twenty_runs_are_bitwise_equal(form, monkeypatch):
    stored, options = FORMS[form]
    choose(monkeypatch, stored)
    q, p, labels = inputs(1000, 3000, 384)

    def run():
        loss, grads, _ = info_nce_loss_and_grads(
            q, p, labels, workspace_bytes=3000 * 4 * 300, **options
        )
        return loss, grads.queries, grads.passages, grads.scale

    first = run()
    for _ in range(19):
        assert all(map(torch.equal, first, run()))


@pytest.mark.parametrize("form", ["exact", "stored"])
def test_a_cuda_graph_replays_on_new_embeddings(form, monkeypatch):
    choose(monkeypatch, FORMS[form][0])
    q, p, _ = (x.detach() for x in inputs(4096, 4096, 1024))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and makes cuBLAS' workspace
        info_nce_loss_and_grads(q, p)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = info_nce_loss_and_grads(q, p)
    for x in (q, p):
        x.copy_(torch.randn_like(x))
    graph.replay()
    eager = info_nce_loss_and_grads(q, p)
    for got, want in zip((captured.loss, *captured.grads), (eager.loss, *eager.grads), strict=True):
        assert got is want is None or torch.equal(got, want) or error(got, want) < 1e-6
    assert all(map(torch.equal, captured.stats, eager.stats))


@forms
def test_the_host_waits_for_nothing(form, monkeypatch):
    stored, options = FORMS[form]
    choose(monkeypatch, stored)
    q, p, labels = inputs(512, 1024, 384)

    def run():
        torch.autograd.grad(info_nce_loss(q, p, labels, **options), (q, p))
        info_nce_loss_and_grads(q, p, labels, **options)

    run()  # compiled by now
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@forms
def test_compiles_without_a_break_and_to_the_same_numbers(form, monkeypatch):
    stored, options = FORMS[form]
    choose(monkeypatch, stored)
    q, p, labels = inputs(256, 512, 384)

    def loss(q, p):
        return info_nce_loss(2 * q, p, labels, **options)

    eager = loss(q, p)
    compiled = torch.compile(loss, fullgraph=True)(q, p)
    assert error(compiled, eager) < 1e-6
    for got, want in zip(*(torch.autograd.grad(x, (q, p)) for x in (compiled, eager)), strict=True):
        assert error(got, want) < 1e-3


def test_labels_out_of_range_fail_at_the_next_sync():
    """In a process of its own, since the context dies."""
    script = """
        import torch
        from rankpo_fast import info_nce_loss
        q = torch.randn(4, 32, device="cuda")
        info_nce_loss(q, q, torch.tensor([0, 1, 2, 99], device="cuda"))
        print("launched")
        torch.cuda.synchronize()
        print("synced")
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and done.stdout == "launched\n", done.stdout + done.stderr
    assert "assert" in done.stderr


@forms
def test_memory_stays_in_the_workspace_beside_embeddings_and_gradients(form, monkeypatch):
    stored, options = FORMS[form]
    choose(monkeypatch, stored)
    M = N = 32768
    D, workspace = 256, 64 << 20
    q, p, labels = inputs(M, N, D)
    torch.autograd.grad(info_nce_loss(q[:256], p[:256]), (q, p))  # cuBLAS' workspace
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = info_nce_loss(q, p, labels, workspace_bytes=workspace, **options)
    grads = torch.autograd.grad(loss, (q, p))
    peak = torch.cuda.max_memory_allocated() - before
    embeddings = (M + N) * D * q.element_size()
    vectors = 64 * 4 * (M + N)  # losses, norms, statistics of columns a chunk ...
    # gradients as they are returned and as they are summed up, in fp32
    assert peak < workspace + 4 * embeddings + vectors < M * N * q.element_size(), peak >> 20
    assert grads[0].shape == q.shape


@pytest.mark.parametrize("inner", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(inner):
    q, p, labels = inputs(100, 300, 384, torch.float32)
    runs = []
    for enabled in (False, True):
        with torch.autocast("cuda", dtype=inner, enabled=enabled):
            loss = info_nce_loss(q, p, labels)
            runs.append((loss, *torch.autograd.grad(loss, (q, p))))
    assert all(map(torch.equal, *runs)) and runs[1][0].dtype == torch.float32


@pytest.mark.parametrize(
    ("pipeline", "how"),
    [
        ("exact", {"stored": False, "few": False}),
        ("few launches", {"stored": False, "few": True}),
        ("stored", {"stored": True}),
        ("forward", {"grads": False}),
        ("symmetric", {"options": SYMMETRIC}),
    ],
)
def test_kernels_at_4k_are_those_of_the_cost_model(pipeline, how):
    M = N = 4096
    q, p, labels = (x.detach() for x in inputs(M, N, 1024))
    launch(q, p, labels, **how)
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        launch(q, p, labels, **how)
        torch.cuda.synchronize()
    on_gpu = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    if not on_gpu:
        pytest.skip("the profiler sees no kernels on this machine")
    names = [e.name for e in sorted(on_gpu, key=lambda e: e.time_range.start)]
    expected = [name for name, _, _ in count(pipeline, M, N, 1024).launches]
    ours = [name for name in names if name in expected and name.endswith("_kernel")]
    listed = "\n".join(names)
    assert ours == [name for name in expected if name.endswith("_kernel")], listed
    # a sort or an index_put is several; cuBLAS may sum the parts of a product in one of its own
    assert len(names) <= len(expected) + 2, listed
