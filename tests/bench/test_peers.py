"""Every peer computes the loss it is compared at, or says what it lacks."""

import sys

import pytest
import torch
import torch.nn.functional as F

from bench import peers
from bench.cases import loss
from bench.measure import NeedsGPU, Unfit, noting, relative_error
from bench.peers import PEERS
from bench.questions import EXCUSES, Row

M, N, D = 64, 128, 48  # tiles of others; N: two passages a query, and chunks, as N > D
ON_THE_CPU = [name for name in PEERS if name.startswith(("torch", "sentence"))]
ON_THE_CPU.append("cut-cross-entropy, torch_compile")
# Of loss and gradients; in bf16 most keep logits in it.
ON_A_GPU = torch.bfloat16, 0.05
DTYPE, TOLERANCE = (
    ON_A_GPU if torch.cuda.is_available() else (torch.float32, loss.GATE[torch.float32])
)


@pytest.fixture(autouse=True)
def without_compilers():
    """What is compiled is the same, and takes half a minute on a CPU."""
    with torch.compiler.set_stance("default" if torch.cuda.is_available() else "force_eager"):
        yield


def run(peer, q, p, labels, symmetric):
    """Three times the loss, as of a loss with a weight: nobody may take its gradient to be 1."""
    value = 3 * peer(q, p, labels, symmetric=symmetric)
    return value.detach(), *torch.autograd.grad(value, (q, p))


@pytest.mark.gpu
@pytest.mark.parametrize("symmetric", [False, True], ids=["one-directional", "symmetric"])
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_is_the_loss_in_fp64_and_leaves_its_inputs(name, symmetric):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    q, p, labels = loss.draw(M, N, D, device, DTYPE)
    if device == "cpu" and name not in ON_THE_CPU:
        with pytest.raises(NeedsGPU):
            PEERS[name](q, p, labels, symmetric=symmetric)
        return
    kept = [x.detach().clone() for x in (q, p, labels)]
    exact = run(peers.cross_entropy, *loss.exact([q, p]), labels, symmetric)
    notes = {}
    with noting(name, notes):
        got = run(PEERS[name], q, p, labels, symmetric)
        alone = 3 * PEERS[name](q.detach(), p.detach(), labels, symmetric=symmetric)
    if notes:
        assert any(excuse in notes[name] for excuse in EXCUSES), notes
        pytest.skip(notes[name])
    assert relative_error(got, exact) < TOLERANCE
    assert relative_error([alone], exact[:1]) < TOLERANCE
    for now, before in zip((q, p, labels), kept, strict=True):
        assert torch.equal(now, before)


def test_one_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", None)
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)  # as before torch 2.13
    notes = {}
    for name in ("cut-cross-entropy, torch_compile", "torch linear_cross_entropy"):
        with noting(name, notes):
            PEERS[name](*loss.draw(8, 8, 16, "cpu", torch.float32), symmetric=False)
    assert list(notes.values()) == ["cut_cross_entropy not installed", "torch 2.13 not installed"]


@pytest.mark.parametrize(
    ("name", "sizes", "dtype", "says"),
    [
        ("cut-cross-entropy", (64, 64, 16), torch.float32, "does not take float32"),
        ("quack-kernels", (64, 64, 16), torch.float32, "does not take float32"),
        ("inf-cl", (64, 64, 24), torch.bfloat16, "D=24, which is no multiple of 16"),
        ("inf-cl", (96, 96, 16), torch.bfloat16, "M=96, which is no multiple of 64"),
        ("sentence-transformers", (64, 96, 16), torch.float32, "96 passages for 64 queries"),
    ],
    ids=["fp32-asserted-against", "fp32-not-in-its-GEMMs", "heads-are-powers-of-two",
         "reads-beyond-the-queries", "columns-of-one-length"],
)  # fmt: skip
def test_what_it_does_not_take_is_said_before_anything_is_launched(
    name, sizes, dtype, says, monkeypatch
):
    monkeypatch.setattr(peers, "_on_a_gpu", lambda x: None)
    q, p = (torch.randn(n, sizes[2], dtype=dtype) for n in sizes[:2])
    with pytest.raises(Unfit):
        PEERS[name](q, p, torch.arange(len(q)), symmetric=False)
    notes = {}
    with noting(name, notes):
        PEERS[name](q, p, torch.arange(len(q)), symmetric=False)
    assert says in notes[name] and not Row(name, notes[name]).red
