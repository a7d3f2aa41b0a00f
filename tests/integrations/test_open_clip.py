"""open_clip's losses: what theirs and the definition give, without a matrix of scores."""

import functools
import inspect
import re
from argparse import Namespace
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from bench.processes import answered, processes
from rankpo_fast.integrations import open_clip as ours
from rankpo_fast.integrations.open_clip import loss_file as theirs
from support.gates import draw, error, gates, pass_the_gates
from support.open_clip_cases import (
    DEFINITIONS,
    Towers,
    compare,
    compare_compiled,
    compare_dist_impls,
    descend,
    exact,
    inputs,
    refuse,
)

LOSSES = ["ClipLoss", "SigLipLoss"]
needs_theirs = pytest.mark.skipif(not find_spec("open_clip"), reason="open_clip is not installed")
WHOSE = ["definition", pytest.param("open_clip", marks=needs_theirs)]


def losses(name, whose):
    """(ours, what it should be)."""
    want = DEFINITIONS[name] if whose == "definition" else getattr(theirs(), name)()
    return getattr(ours, name)(), want


def results(loss, image_features, text_features, scale, bias=-3.0, autocast=False):
    """(loss, gradients of both features, of scale and of bias)."""
    leaves = [image_features, text_features]
    leaves += [torch.tensor(x, dtype=torch.float64) for x in (scale, bias)]
    if image_features.dtype != torch.float64:
        leaves[2:] = [x.float() for x in leaves[2:]]
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = loss(*leaves)
    return [value, *torch.autograd.grad(value, leaves, allow_unused=True)]


def features(B, D, dtype):
    return [F.normalize(x).to(dtype) for x in draw(B, B, D, torch.float64, False)[:2]]


@pytest.mark.parametrize("whose", WHOSE)
@pytest.mark.parametrize("scale", [10.0, 100.0], ids=["start-of-siglip", "clamp-of-open-clip"])
@pytest.mark.parametrize(
    "B, D", [pytest.param(1, 8, id="one-pair"), pytest.param(67, 24, id="ragged")]
)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_the_same(equal, name, B, D, scale, whose):
    """With theirs ours in fp32, with the definition both in fp64."""
    dtype, (mine, their) = torch.float32, losses(name, whose)
    given = features(B, D, dtype if whose == "open_clip" else torch.float64)
    got, want = results(mine, *given, scale), results(their, *[x.double() for x in given], scale)
    if name == "ClipLoss":  # of a number that falls out
        assert got.pop() == 0 and (want[-1] is None or abs(want[-1]) < 1e-6)
        want.pop()
    agree(equal, whose, f"{name}, scale {scale:g}", got, want, scale)


def agree(equal, whose, option, got, want, scale):
    """Of fp32 with theirs in fp64, of fp64 with the definition."""
    if whose == "open_clip":
        equal("open_clip", option, got, want, scale)
    else:
        assert max(error(a, b) for a, b in zip(got, want, strict=True)) < 1e-12


@pytest.mark.parametrize("name", LOSSES)
def test_what_open_clip_train_passes_and_takes(name):
    """A dict of losses to sum; scale and bias are rows of one with `nonscalar_logit_scale`."""
    numbers = [torch.tensor([x], requires_grad=True) for x in (10.0, -3.0)]
    of_loss = getattr(ours, name)()
    leaves = *features(5, 8, torch.float32), *numbers
    said = of_loss(*leaves, output_dict=True)
    assert said == {"contrastive_loss": of_loss(*leaves)}
    loss = sum(said.values())
    assert loss.shape == () and [x.shape for x in torch.autograd.grad(loss, numbers)] == [(1,)] * 2


@needs_theirs
@pytest.mark.parametrize(
    "name, weights", [("ClipLoss", ()), ("SigLipLoss", ()), ("CoCaLoss", (2.0, 1.0))]
)
def test_they_are_called_as_theirs(name, weights):
    """With the arguments of both versions: use_horovod until 3.3, chunk_size from 4 on."""
    mine, their = getattr(ours, name), getattr(theirs(), name)
    for method in ("__init__", "forward"):
        a, b = (inspect.signature(getattr(x, method)).parameters for x in (mine, their))
        a, b = (
            [
                (x.name, x.default)
                for x in of.values()
                if x.name not in ("use_horovod", "chunk_size")
            ]
            for of in (a, b)
        )
        assert a == b
    assert mine(*weights).state_dict() == their(*weights).state_dict() == {}


@needs_theirs
@pytest.mark.parametrize("name", LOSSES)
def test_a_bias_may_be_a_number(name):
    mine, their = losses(name, "open_clip")
    given = features(5, 8, torch.float32)
    got, want = mine(*given, 10.0, -3.0), their(*[x.double() for x in given], 10.0, -3.0)
    pass_the_gates([got], [want], logits=13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("whose", WHOSE)
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_keeps_the_digits_of_its_features(name, whose, dtype):
    loss, want = losses(name, whose)
    rounded = features(67, 24, dtype)
    exact = results(DEFINITIONS[name], *[x.double() for x in rounded], 30.0)
    got = results(loss, *rounded, 30.0)
    assert got[0].dtype == torch.float32 and got[1].dtype == dtype
    errors = [error(a, b) for a, b in zip(got[:4], exact, strict=False)]
    if whose == "definition":
        of_loss, of_gradient = gates(dtype, 1 / 30)
        assert errors[0] < of_loss and max(errors[1:3]) < of_gradient
    else:  # which has scores of this precision
        with torch.autocast("cpu", dtype):
            plain = results(want, *rounded, 30.0)
        assert all(a < 1.5 * error(b, c) for a, b, c in zip(errors, plain, exact, strict=False))


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_rounds_no_scores(name):
    image_features, text_features = features(67, 24, torch.bfloat16)
    mixed = image_features.float(), text_features  # as a tower with a norm in fp32 leaves them
    exact = results(DEFINITIONS[name], *[x.double() for x in mixed], 30.0)
    got = results(getattr(ours, name)(), *mixed, 30.0, autocast=True)
    assert error(got[0], exact[0]) < gates(torch.float32, 1 / 30)[0]
    assert max(error(a, b) for a, b in zip(got[1:3], exact[1:3], strict=True)) < 5e-3
    assert got[1].dtype == torch.float32 and got[2].dtype == torch.bfloat16


@pytest.mark.parametrize("name", LOSSES)
def test_it_compiles_without_a_graph_break(name):
    loss = getattr(ours, name)()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = *features(5, 8, torch.float32), 10.0
    assert all(map(torch.equal, results(compiled, *leaves), results(loss, *leaves)))


@pytest.mark.parametrize("whose", WHOSE)
@pytest.mark.parametrize("name", LOSSES)
def test_accumulation_with_cached_features(name, whose):
    """open_clip_train's: features of all batches without a graph, then one with a graph at a
    time."""
    batches = [[x[at : at + 4] for x in inputs(12)] for at in (0, 4, 8)]

    def accumulated(loss):
        model = Towers()
        with torch.no_grad():
            cached = [model(*batch) for batch in batches]
        for at, batch in enumerate(batches):
            out = model(*batch)
            for side in ("image_features", "text_features"):
                rows = [x[side] for x in cached]
                out[side] = torch.cat([*rows[:at], out[side], *rows[at + 1 :]])
            value = loss(**out)
            value.backward()
        return value.detach(), {k: x.grad for k, x in model.named_parameters()}

    mine, their = losses(name, whose)
    (loss, grads), (value, want) = accumulated(mine), accumulated(exact(their))
    whole = descend(exact(their), Towers(), *inputs(12))[1]
    of_loss, of_gradient = gates(torch.float32, 1 / 10)
    assert error(loss, value) < of_loss
    for key, gradient in want.items():
        if key.startswith("logit"):  # gets one from every pass, ours as theirs
            most = 0 if gradient is None else of_gradient * max(1, abs(gradient))
            assert gradient is None or abs(grads[key] - gradient) < most
        else:
            assert error(grads[key], gradient) < of_gradient
            assert error(grads[key], whole[key]) < of_gradient


def curve(loss, model, batches):
    """Losses of a training with AdamW, and the scale at its end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    values = []
    for batch in batches:
        value = loss(**model(*batch))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    return torch.tensor([*values, model.logit_scale.item()])


def model_of_theirs(open_clip):
    vision = {"image_size": 8, "patch_size": 4, "width": 16, "layers": 1, "head_width": 8}
    text = {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return open_clip.CLIP(16, vision, text, init_logit_bias=-3.0, output_dict=True)


@pytest.mark.parametrize("whose", WHOSE)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_a_training_are_the_same(name, whose):
    make, batches = Towers, [inputs(16, seed=seed) for seed in (1, 2)]
    if whose == "open_clip":
        make = functools.partial(model_of_theirs, pytest.importorskip("open_clip"))
        draws = torch.Generator().manual_seed(1)
        images = torch.randn(2, 16, 3, 8, 8, generator=draws)
        tokens = torch.randint(1, 20, (2, 16, 6), generator=draws)
        batches = list(zip(images, tokens, strict=True))
    got, want = (curve(loss, make(), batches * 15) for loss in losses(name, whose))
    assert want[29] < 0.8 * want[0]
    assert (got - want).abs().max() < 1e-4


@pytest.mark.parametrize("weight", [2.0, 0], ids=["both-parts", "captions-alone"])
@needs_theirs
def test_captions_of_coca(weight):
    draws = torch.Generator().manual_seed(1)
    logits = torch.randn(9, 5, 11, generator=draws, requires_grad=True)
    tokens = torch.randint(0, 11, (9, 5), generator=draws)
    arguments = *features(9, 8, torch.float32), logits, tokens, torch.tensor(10.0)
    got = ours.CoCaLoss(0.5, weight, pad_id=0)(*arguments, output_dict=True)
    in_fp64 = [x if x is tokens else x.double() for x in arguments]
    want = theirs().CoCaLoss(0.5, weight, pad_id=0)(*in_fp64, output_dict=True)
    assert got.keys() == want.keys()
    of_loss, of_gradient = gates(torch.float32, 1 / 10)
    assert all(error(got[key], want[key]) < of_loss for key in want)
    grads = [torch.autograd.grad(x["caption_loss"], logits)[0] for x in (got, want)]
    assert error(*grads) < of_gradient


def flags(**others):
    return Namespace(
        **{"distill": False, "model": "ViT-B-32", "siglip": False, "horovod": False}
        | {"local_loss": True, "gather_with_grad": False, "rank": 1, "world_size": 2}
        | {"coca_caption_loss_weight": 2.0, "coca_contrastive_loss_weight": 3.0}
        | {"loss_dist_impl": None}
        | others
    )


LOCAL = {"local_loss": True, "gather_with_grad": False}
GATHERED = {"local_loss": False, "gather_with_grad": True}
WEIGHTS = {"caption_loss_weight": 2.0, "clip_loss_weight": 3.0}


@pytest.mark.parametrize("whose", ["rankpo_fast", "open_clip"])
@pytest.mark.parametrize(
    "others, name, settings",
    [
        ({}, "ClipLoss", LOCAL),
        (GATHERED, "ClipLoss", GATHERED),
        ({"siglip": True}, "SigLipLoss", {}),
        ({"model": "coca_base"}, "CoCaLoss", LOCAL | WEIGHTS),
        ({"model": "coca_base"} | GATHERED, "CoCaLoss", GATHERED | WEIGHTS),
    ],
)
def test_flags_choose_the_loss(others, name, settings, whose):
    module = ours if whose == "rankpo_fast" else pytest.importorskip("open_clip")
    loss = module.create_loss(flags(**others))
    assert type(loss).__name__ == name
    settings = settings | {"world_size": 2}
    assert {key: getattr(loss, key) for key in settings} == settings


REFUSED = {
    "numbers": (lambda: ours.ClipLoss()(*pair(3, 6)), "pairs: got (3, 4) and (6, 4)"),
    "numbers-siglip": (lambda: ours.SigLipLoss()(*pair(3, 6), 0.0), "pairs: got (3, 4) and (6, 4)"),
    "dims": (
        lambda: ours.ClipLoss()(torch.ones(3, 5), *pair(3, 3)[1:]), "D=5 but passages have D=4"
    ),
    "devices": (
        lambda: ours.ClipLoss()(torch.ones(3, 4), torch.ones(3, 4, device="meta"), 1.0), "meta"
    ),
    "integers": (lambda: ours.ClipLoss()(*[x.long() for x in pair(3, 3)[:2]], 1.0), "int64"),
    "scales": (lambda: ours.ClipLoss()(*pair(3, 3)[:2], torch.ones(3)), "scale must be one number"),
    "world": (lambda: ours.ClipLoss(world_size=2)(*pair(3, 3)), "torch.distributed has 0 ranks"),
    "horovod": (lambda: ours.create_loss(flags(horovod=True)), "torch.distributed: start with"),
    "horovod-siglip": (
        lambda: ours.create_loss(flags(siglip=True, horovod=True)), "torch.distributed: start with"
    ),
    "way": (lambda: ours.SigLipLoss(dist_impl="ring"), "or gather, got 'ring'"),
    "distillation": (lambda: ours.create_loss(flags(distill=True)), "DistillClipLoss"),
}  # fmt: skip


def pair(B, N):
    return torch.ones(B, 4), torch.ones(N, 4), 10.0


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_named(case):
    call, said = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(said)):
        call()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, start_method):
    """Three, so that in theirs a text has two ways to go, and 1 / 3 is not exact."""
    with processes(3, tmp_path_factory.mktemp("ranks"), start_method) as ask:
        yield ask


OPTIONS = [
    ("ClipLoss", {"local_loss": local, "gather_with_grad": grad})
    for local in (False, True)
    for grad in (False, True)
] + [("SigLipLoss", {"dist_impl": "bidir"})]


@pytest.mark.parametrize("whose", WHOSE)
@pytest.mark.parametrize("name, options", OPTIONS)
def test_ranks_get_the_same_losses_and_gradients(equal, ranks, name, options, whose):
    said = ", ".join(f"{key}={value}" for key, value in options.items())
    for got, want in answered(ranks(compare, name, whose, "even", **options)):
        agree(equal, whose, f"{name}, 3 ranks, {said}", got, want, 10)


@pytest.mark.parametrize("name, options", OPTIONS)
def test_a_last_batch_may_be_uneven_on_the_ranks(equal, ranks, name, options):
    for got, want in answered(ranks(compare, name, "definition", "uneven", **options)):
        agree(equal, "definition", name, got, want, 10)


@needs_theirs
def test_their_ways_of_bringing_texts_are_equal(ranks):
    answered(ranks(compare_dist_impls))


@pytest.mark.long
def test_ranks_compile(ranks):
    answered(ranks(compare_compiled))


def test_a_world_of_another_size_is_refused(ranks):
    for answer in ranks(refuse):
        assert isinstance(answer, ValueError) and "7, but torch.distributed has 3" in str(answer)


def test_the_example_trains(world, monkeypatch, capsys):
    pytest.importorskip("open_clip")
    import train_open_clip as example

    monkeypatch.setattr(example, "small_world", lambda: world)
    example.main()
    first, last = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines())
    assert last < first / 2
