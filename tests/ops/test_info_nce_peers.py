"""InfoNCE equals the losses of other libraries: CLIP's, and those of sentence-transformers."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from rankpo_fast import info_nce_loss
from rankpo_kernels.problem import HARDNESS_MODES, PP, PQ, QP, QQ
from support.gates import pass_the_gates
from support.info_nce_options import STATIC, World


def test_symmetric_partitions_are_the_two_cross_entropies_of_clip():
    world = World(N=7)
    q, p = (F.normalize(x, dim=1) for x in (world.q, world.p))
    logits, diagonal = 5 * q @ p.T, torch.arange(7)
    want = (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2
    got = info_nce_loss(world.q, world.p, scale=5, **STATIC["symmetric"])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


ST_NAMES = {"query_to_doc": QP, "doc_to_query": PQ, "query_to_query": QQ, "doc_to_doc": PP}
ST_GRID = [
    (("query_to_doc", *others), "joint")
    for count in range(4)
    for others in itertools.combinations(list(ST_NAMES)[1:], count)
] + [(("query_to_doc",), "per_direction"), (("query_to_doc", "doc_to_query"), "per_direction")]


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize(("directions", "partition"), ST_GRID, ids=str)
def test_equals_sentence_transformers(directions, partition, negatives):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    theirs = MultipleNegativesRankingLoss(
        None, scale=5.0, directions=directions, partition_mode=partition
    )
    M, columns = 6, 1 + negatives
    world = World(M=M, N=M * columns)
    q, p = world.q.requires_grad_(), world.p.requires_grad_()
    want = theirs.compute_loss_from_embeddings([q.double(), *p.double().split(M)], None)
    got = info_nce_loss(
        q, p, torch.arange(M), scale=5.0, curated=torch.arange(M).repeat(columns),
        directions=[ST_NAMES[name] for name in directions], partition=partition,
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(loss, (q, p)) for loss in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-13)
    # our own layout: groups of a query, positive first
    by_query = p.unflatten(0, (columns, M)).transpose(0, 1).flatten(0, 1)
    grouped = info_nce_loss(
        q, by_query, scale=5.0, directions=[ST_NAMES[name] for name in directions],
        partition=partition,
    )  # fmt: skip
    torch.testing.assert_close(grouped, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("mode", HARDNESS_MODES)
@pytest.mark.parametrize(("directions", "partition"), ST_GRID, ids=str)
def test_hardness_equals_that_of_sentence_transformers(directions, partition, mode, negatives):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    options = {"scale": 20.0, "hardness_mode": mode, "hardness_strength": 9.0}
    theirs = MultipleNegativesRankingLoss(
        None, directions=directions, partition_mode=partition, **options
    )
    M, columns = 6, 1 + negatives
    world = World(M=M, N=M * columns, dtype=torch.float32)
    q, p = world.q.requires_grad_(), world.p.requires_grad_()
    want = theirs.compute_loss_from_embeddings([q.double(), *p.double().split(M)], None)
    options |= {"directions": [ST_NAMES[name] for name in directions], "partition": partition}
    owner = torch.arange(M).repeat(columns)
    got = info_nce_loss(q, p, torch.arange(M), curated=owner, **options)
    grads = [torch.autograd.grad(loss, (q, p)) for loss in (got, want)]
    pass_the_gates([got, *grads[0]], [want, *grads[1]], logits=20 + 9)
    if negatives:  # our own layout: groups of a query, positive first
        by_query = p.unflatten(0, (columns, M)).transpose(0, 1).flatten(0, 1)
        pass_the_gates([info_nce_loss(q, by_query, **options)], [want], logits=20 + 9)


@pytest.mark.parametrize("negatives", [False, True], ids=["pairs", "triplets"])
@pytest.mark.parametrize("margin_type", ["absolute", "relative"])
def test_margin_and_guide_equal_those_of_gist(margin_type, negatives, monkeypatch):
    from sentence_transformers.sentence_transformer.losses import gist_embed

    M, columns = 8, 2 if negatives else 1
    world = World(M=M, N=M * columns)
    q, p = world.q.requires_grad_(), world.p.requires_grad_()
    guide = world.normal(M, 5), world.normal(M * columns, 5)
    # Without its two models: what they would embed is given.
    theirs = gist_embed.GISTEmbedLoss.__new__(gist_embed.GISTEmbedLoss)
    torch.nn.Module.__init__(theirs)
    theirs.model, theirs.guide = [q, *p.split(M)], [guide[0], *guide[1].split(M)]
    theirs.similarity_fct, theirs.cross_entropy_loss = (
        torch.nn.CosineSimilarity(dim=-1), torch.nn.CrossEntropyLoss(),
    )  # fmt: skip
    theirs.temperature, theirs.margin, theirs.margin_strategy = 0.2, 0.1, margin_type
    theirs.contrast_anchors = theirs.contrast_positives = True
    theirs.must_retokenize = theirs.gather_across_devices = False
    monkeypatch.setattr(gist_embed, "embed_columns", lambda model, features: model)
    want = theirs([], None)
    got = info_nce_loss(
        q, p, torch.arange(M), temperature=0.2, guide=guide, false_negative_margin=0.1,
        margin_type=margin_type, directions=(QP, QQ, PP),
        # their negatives may be masked, and are not compared with positives
        curated=torch.tensor([-1, -2]).repeat_interleave(M)[: len(p)],
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(loss, (q, p)) for loss in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-13)
    unguided = info_nce_loss(q, p, torch.arange(M), temperature=0.2, directions=(QP, QQ))
    assert abs(unguided - want) > 1e-3
