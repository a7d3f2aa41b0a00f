"""Stage 1 with every option of InfoNCE: what a flag says is what a step computes."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rankpo_fast import cli, info_nce_loss
from rankpo_fast.config import ContrastiveLossConfig, EncoderConfig, ModelConfig
from rankpo_fast.data.batches import ContrastiveData
from rankpo_fast.data.rows import ContrastiveRow
from rankpo_fast.errors import InputError
from rankpo_fast.ops.options import InfoNCELossOptions
from rankpo_fast.train import frozen
from rankpo_fast.train.contrastive import ContrastiveTask
from rankpo_kernels.problem import DIRECTIONS

D, G, SCALE = 8, 5, 20.0
# Two rows of one query, one with a further positive; a negative of two rows; one that is another's
# positive; a row without any.
ROWS = [
    ContrastiveRow("nurse", ("p0", "p1"), ("n0", "n1", "n2")),
    ContrastiveRow("nurse", ("p1",), ("n2", "n3", "p2")),
    ContrastiveRow("cook", ("p2",), ("n0", "n4")),
    ContrastiveRow("pilot", ("p3",), ()),
]


@pytest.fixture
def problem():
    """Data of one batch with all rows, vectors of all their texts by two models."""
    generator = torch.Generator().manual_seed(0)

    def make(**options):
        data = ContrastiveData(ROWS, batch_size=4, num_negatives=3, seed=1, **options)
        made = [
            {text: torch.randn(dims, generator=generator.manual_seed(i), dtype=torch.float64)
             for i, text in enumerate(texts)}
            for dims in (D, G) for texts in (data.query_texts, data.passage_texts)
        ]  # fmt: skip
        return data, *made

    return make


def step(data, queries, passages, config, log_scale=None):
    """The task's output on the batch, and the batch; vectors by text."""
    batch = data.batch(0, 0)
    task = ContrastiveTask(data, None, config, log_scale)
    q = torch.stack([queries[data.query_texts[i]] for i in batch.query_texts])
    p = torch.stack([passages[data.passage_texts[i]] for i in batch.passage_texts])
    return task.loss(q, p, batch), batch


def drawn(data, batch):
    """(query, positive, negatives) of each row of the batch, as texts: all that a row has."""
    rows = [ROWS[row] for row in batch.rows.tolist()]
    candidates = batch.passage_texts
    if batch.candidates is not None:
        candidates = candidates[batch.candidates]
    for row, label in zip(rows, batch.labels, strict=True):
        negatives = [text for text in row.negatives if text not in KNOWN[row.query]]
        yield row.query, data.passage_texts[candidates[label]], negatives


def cosine(a, b):
    return F.cosine_similarity(a, b, dim=0)


KNOWN = {"nurse": {"p0", "p1"}, "cook": {"p2"}, "pilot": {"p3"}}
OPTIONS = {
    "plain": {},
    "own": {"own_negatives": True},
    "margin": {"false_negative_margin": 0.1},
    "relative": {"false_negative_margin": 0.2, "margin_type": "relative"},
    "own-margin": {"own_negatives": True, "false_negative_margin": 0.1},
    "guide": {"false_negative_margin": 0.0, "guide_model_name_or_path": "guide"},
    "own-guide": {
        "own_negatives": True, "false_negative_margin": 0.0, "guide_model_name_or_path": "guide",
    },
    "hard": {"hardness_mode": "hard_negatives", "hardness_strength": 3.0},
    "own-hard": {
        "own_negatives": True, "hardness_mode": "hard_negatives", "hardness_strength": 3.0,
    },
    "in-batch": {"hardness_mode": "in_batch_negatives", "hardness_strength": 3.0},
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_step_is_the_loss_that_its_options_say(options, problem):
    """Against loops over texts, and gradients against autograd through them."""
    config = ContrastiveLossConfig(1 / SCALE, **options)
    data, queries, passages, guide_queries, guide_passages = problem(
        own_negatives=config.own_negatives
    )
    if config.guide_model_name_or_path:
        data = data.with_guide(
            torch.stack([guide_queries[text] for text in data.query_texts]),
            torch.stack([guide_passages[text] for text in data.passage_texts]),
        )
    output, batch = step(data, queries, passages, config)
    queries, passages = (
        {text: vector.clone().requires_grad_() for text, vector in vectors.items()}
        for vectors in (queries, passages)
    )
    judges = (queries, passages)
    if config.guide_model_name_or_path:
        judges = guide_queries, guide_passages
    rows = list(drawn(data, batch))
    first_row: dict[str, int] = {}
    for i, (_, _, negatives) in enumerate(rows):
        for text in negatives:
            first_row.setdefault(text, i)
    losses = []
    for i, (query, positive, negatives) in enumerate(rows):
        limit = None
        if (margin := config.false_negative_margin) is not None:
            best = cosine(judges[0][query], judges[1][positive])
            limit = best - margin * (best.abs() if config.margin_type == "relative" else 1)
        others = {p for _, p, _ in rows}
        if not config.own_negatives:
            others |= {text for _, _, texts in rows for text in texts}
        others -= {positive, *KNOWN[query]}
        # Own negatives that are others' positives too are met by all, and the first row's.
        met = {p for _, p, _ in rows} if config.own_negatives else {*negatives}
        chosen = {text for text in negatives if text not in met or first_row[text] == i}
        others -= chosen
        if limit is not None:
            others = {t for t in others if cosine(judges[0][query], judges[1][t]) <= limit}
        total = 0
        for text in sorted(others | chosen):
            similarity = cosine(queries[query], passages[text])
            mode, strength = config.hardness_mode, config.hardness_strength
            weighs = mode == ("hard_negatives" if text in chosen else "in_batch_negatives")
            more = strength * similarity.detach() if weighs else 0
            total = total + (SCALE * similarity + more).exp()
        positive_score = SCALE * cosine(queries[query], passages[positive])
        losses.append(torch.log1p(total / positive_score.exp()))
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(output.loss, expected.detach())
    expected.backward()
    for texts, ids, vectors, grads in [
        (data.query_texts, batch.query_texts, queries, output.d_queries),
        (data.passage_texts, batch.passage_texts, passages, output.d_passages),
    ]:
        wanted = [vectors[texts[i]].grad for i in ids]
        wanted = [torch.zeros(D, dtype=torch.float64) if g is None else g for g in wanted]
        torch.testing.assert_close(grads, torch.stack(wanted))


PASSED_ON = {
    "smoothing": {"label_smoothing": 0.1},
    "symmetric": {"directions": ["query_to_passage", "passage_to_query"],
                  "partition": "per_direction"},
    "gte": {"directions": list(DIRECTIONS)},
    "matryoshka": {"matryoshka_dims": [2, D], "matryoshka_weights": [0.5, 1.0]},
}  # fmt: skip


@pytest.mark.parametrize("options", PASSED_ON.values(), ids=PASSED_ON)
def test_options_that_need_nothing_else_reach_the_loss(options, problem):
    data, queries, passages, *_ = problem()
    output, batch = step(data, queries, passages, ContrastiveLossConfig(0.05, **options))
    plain, _ = step(data, queries, passages, ContrastiveLossConfig(0.05))
    q = torch.stack([queries[data.query_texts[i]] for i in batch.query_texts[batch.query_rows]])
    p = torch.stack([passages[data.passage_texts[i]] for i in batch.passage_texts])
    curated = batch.chosen_for if "passage_to_passage" in options.get("directions", []) else None
    wanted = info_nce_loss(
        q, p, batch.labels, temperature=0.05, curated=curated,
        excluded=(batch.excluded_offsets, batch.excluded_columns), **options,
    )  # fmt: skip
    torch.testing.assert_close(output.loss, wanted)
    assert output.loss != plain.loss
    assert not torch.equal(output.d_passages, plain.d_passages)


def test_every_option_of_the_loss_is_a_setting_or_has_no_place_in_training():
    # Vectors are compared by cosine and losses are means; the rest is of kernels and ranks.
    elsewhere = {
        "normalize",
        "reduction",
        "workspace_bytes",
        "backend",
        "precision",
        "process_group",
        "exchange",
    }
    options = {field.name for field in dataclasses.fields(InfoNCELossOptions)}
    settings = {field.name for field in dataclasses.fields(ContrastiveLossConfig)}
    assert options - settings == elsewhere
    assert ContrastiveLossConfig().options().keys() == options - elsewhere


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"label_smoothing": 1.0}, r"--label_smoothing must lie in \[0, 1\), got 1.0"),
        ({"directions": ["passage"]}, "--directions must be distinct and of query_to_passage"),
        ({"directions": []}, "--directions must be distinct"),
        ({"hardness_mode": "hard_negatives"}, "--hardness_mode and a hardness_strength > 0 go"),
        ({"hardness_mode": "hard"}, "--hardness_mode must be one of in_batch_negatives, hard_neg"),
        ({"matryoshka_weights": [1.0]}, "--matryoshka_weights .* without matryoshka_dims"),
        ({"false_negative_margin": -1.0}, "--false_negative_margin must be >= 0"),
        ({"guide_model_name_or_path": "x"}, "needs --false_negative_margin"),
        ({"gradient_filter": 1e-3, "label_smoothing": 0.1}, "--gradient_filter goes with"),
        ({"gradient_filter": 1e-3, "own_negatives": True}, "--gradient_filter and --own_negatives"),
        ({"own_negatives": True, "directions": "passage_to_query"}, "needs query_to_passage among"),
        ({"temperature_learning_rate": 0.0}, "--temperature_learning_rate must be > 0"),
    ],
)
def test_options_that_cannot_be_are_named(options, said):
    with pytest.raises(InputError, match=said):
        ContrastiveLossConfig(**options)


def test_all_options_on_the_command_line(tiny_bert_dir, contrastive_file, tmp_path, capsys):
    flags = (
        "--directions query_to_passage passage_to_query --partition per_direction "
        "--label_smoothing 0.1 --matryoshka_dims 8 32 --matryoshka_weights 0.5 1 --own_negatives "
        "--false_negative_margin 0.1 --margin_type relative --hardness_mode all_negatives "
        "--hardness_strength 1 --temperature 0.05 --temperature_learning_rate 0.01"
    )
    command = [
        "contrastive", "--model_name_or_path", str(tiny_bert_dir), "--train_data", contrastive_file,
        "--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--device", "cpu", "--no_cache",
        *flags.split(),
    ]  # fmt: skip
    assert cli.main(command) == 0
    said = capsys.readouterr().err
    said = " ".join(said.split())
    assert "loss InfoNCE, temperature 0.05, which is learnt, label_smoothing 0.1, dire" in said
    assert "negatives its own and the positives of its batch of 24 rows" in said


def test_a_guide_reads_texts_as_its_own_files_say(tiny_bert_dir, tiny_llama_dir, monkeypatch):
    asked = []
    monkeypatch.setattr(frozen, "load_encoder", lambda config, device: asked.append(config))
    model = ModelConfig(str(tiny_bert_dir), pooling="cls", query_prefix="task: ", packing=False)
    cpu = torch.device("cpu")
    frozen.ask_frozen("--guide", str(tiny_llama_dir), model, cpu, lambda _: 0, alike=False)
    assert asked == [EncoderConfig(str(tiny_llama_dir), packing=False, bf16="auto")]


def test_dims_beyond_the_model_are_refused_before_training(tiny_bert_dir, run_stage, tmp_path):
    with pytest.raises(InputError, match="--matryoshka_dims 999: the model has 32 dims"):
        run_stage("contrastive", tiny_bert_dir, "out", matryoshka_dims=[8, 999])


# --- what needs more than the loss ---


def test_the_temperature_is_learnt_and_saved_in_checkpoints(
    tiny_bert_dir, run_stage, read_metrics, tmp_path
):
    flags = {"temperature": 0.05, "temperature_learning_rate": 0.1, "save_steps": 2}
    whole = run_stage("contrastive", tiny_bert_dir, "whole", **flags)
    temperatures = [line["temperature"] for line in read_metrics(whole)]
    assert temperatures[0] == pytest.approx(0.05) and len({*temperatures}) == len(temperatures)
    run_stage("contrastive", tiny_bert_dir, "twice", **flags)
    (tmp_path / "twice" / "config.json").unlink()
    newest = max((tmp_path / "twice" / "checkpoints").iterdir())
    (newest / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="skipped a broken checkpoint"):
        again = run_stage("contrastive", tiny_bert_dir, "twice", **flags, resume="newest")
    assert [line["temperature"] for line in read_metrics(again)] == temperatures


def test_its_gradient_is_that_of_the_loss_and_it_stays_where_losses_are_exact(problem):
    data, queries, passages, *_ = problem()
    config = ContrastiveLossConfig(0.05, temperature_learning_rate=1e-2)
    log_scale = nn.Parameter(torch.tensor(math.log(20.0), dtype=torch.float64))
    output, _ = step(data, queries, passages, config, log_scale)
    [(parameter, gradient)] = output.others
    assert parameter is log_scale
    losses = []
    for change in (-1e-4, 1e-4):
        moved = nn.Parameter(log_scale.detach() + change)
        losses.append(step(data, queries, passages, config, moved)[0].loss)
    torch.testing.assert_close(gradient, (losses[1] - losses[0]) / 2e-4, rtol=1e-6, atol=1e-9)
    low = nn.Parameter(torch.tensor(9.0, dtype=torch.float64))
    step(data, queries, passages, config, low)
    assert low.item() == pytest.approx(math.log(100))


def test_a_guide_is_asked_once_and_decides(tiny_bert_dir, tiny_llama_dir, run_stage, read_metrics,
                                           contrastive_file, tmp_path):  # fmt: skip
    """A margin that nothing passes leaves the rows' own negatives: in another loss."""
    flags = {"false_negative_margin": 1.9, "cache_dir": str(tmp_path / "cache"), "max_steps": 2}
    plain = run_stage("contrastive", tiny_bert_dir, "plain", **flags)
    flags["guide_model_name_or_path"] = str(tiny_llama_dir)
    guided = run_stage("contrastive", tiny_bert_dir, "guided", **flags)
    [kept] = (tmp_path / "cache").glob("guide*")
    losses = [read_metrics(run)[0]["loss"] for run in (plain, guided)]
    assert losses[0] == losses[1]  # both leave out all of other rows
    record = json.loads((guided / "training.json").read_text())["settings"]
    assert "content of --guide_model_name_or_path" in record
    with pytest.raises(InputError, match="--guide_model_name_or_path no.where: no such"):
        run_stage(
            "contrastive", tiny_bert_dir, "no", **{**flags, "guide_model_name_or_path": "no/where"}
        )
