"""Grades and a teacher's scores beside the pairs of stage 2, or without any: what a step computes,
and that a run of all of them resumes, shares out and refuses as any other."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch

from rankpo_fast import RankPOTrainer, distill_kl_loss, margin_mse_loss, rankpo_group_loss
from rankpo_fast.config import GradedConfig, RankPOLossConfig, TeacherConfig
from rankpo_fast.data.group_batches import GroupData
from rankpo_fast.data.groups import GroupRow
from rankpo_fast.errors import InputError
from rankpo_fast.ops.options import DistillKLOptions, MarginMSEOptions, RankPOGroupOptions
from rankpo_fast.train.supervision import graded_task, teacher_task
from support import rank_runs

LEVELS = ["chief", "senior", "junior", "former"]  # graded 3 to 0
SMALL = {"graded_batch_size": 5, "graded_group_size": 3}
OF_TEACHER = {"teacher_batch_size": 7, "teacher_group_size": 3}


@pytest.fixture(scope="session")
def group_files(contrastive_file, tmp_path_factory) -> tuple[str, str]:
    """24 graded rows and 24 rows of scores: the higher the level of a person the better."""
    folder = tmp_path_factory.mktemp("groups")
    rows = {"grades": [], "scores": []}
    for number, line in enumerate(Path(contrastive_file).read_text().splitlines()):
        query = json.loads(line)["query"]
        who = query.removeprefix("we are looking for a ")
        passages = [f"{level} {who}" for level in LEVELS]
        rows["grades"].append({"query": query, "passages": passages, "grades": [3, 2, 1, 0]})
        scores = [6.5, 3.0, -1.0, -8.0 + number / 24]
        rows["scores"].append({"query": query, "passages": passages, "scores": scores})
    paths = []
    for name, own in rows.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in own))
        paths.append(str(path))
    return tuple(paths)


ROWS = [
    GroupRow("q0", ("a", "b", "c"), (2.0, 0.0, 1.0), 0.5),
    GroupRow("q1", ("c", "d"), (0.0, 1.0)),
    GroupRow("q0", ("d", "a", "e", "f"), (1.0, 1.0, 0.0, 3.0), 2.0),
]
TASKS = {
    "pairs": (GradedConfig(["x"], graded_form="pairs"), {"form": "pairs"}),
    "hinge": (GradedConfig(["x"]), {"loss_type": "hinge", "gamma_beta_ratio": 0.1}),
    "plackett-luce": (
        GradedConfig(["x"], graded_form="plackett_luce"),
        {"form": "plackett_luce", "beta": 1.5},
    ),
    "lambda": (GradedConfig(["x"], graded_form="lambda"), {"form": "lambda", "temperature": 0.3}),
    "kl": (TeacherConfig(["x"], student_temperature=0.1, teacher_temperature=2.0), {}),
    "margin-mse": (
        TeacherConfig(["x"], teacher_loss="margin_mse", teacher_pairs="first"),
        {"pairs": "first"},
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_step_is_the_loss_that_the_settings_say(name):
    """Of texts that rows share, against the public function on vectors laid out by hand."""
    config, options = TASKS[name]
    graded = isinstance(config, GradedConfig)
    data = GroupData(ROWS, batch_size=3, group_size=9, seed=0, graded=graded)
    generator = torch.Generator().manual_seed(0)
    queries, passages = (
        torch.randn(len(texts), 6, generator=generator, dtype=torch.float64).requires_grad_()
        for texts in (data.query_texts, data.passage_texts)
    )
    reference = torch.rand(9, generator=generator) - 0.5
    if graded:
        data = data.with_reference(reference)
        loss = RankPOLossConfig(**{k: v for k, v in options.items() if k != "form"})
        task = graded_task(config, loss, data, None)
    else:
        task = teacher_task(config, data, None)
    batch = data.batch(0, 0)
    with torch.no_grad():
        output = task.loss(queries[batch.query_texts], passages[batch.passage_texts], batch)

    by_text = dict(zip(data.passage_texts, passages, strict=True))
    of_query = dict(zip(data.query_texts, queries, strict=True))
    q = torch.stack([of_query[row.query] for row in ROWS])
    nothing = passages.new_zeros(6)
    p, values, ref, done = [], [], [], 0
    for row in ROWS:
        pad = 4 - len(row.passages)
        p.append(torch.stack([*(by_text[text] for text in row.passages), *[nothing] * pad]))
        values.append([*row.values, *[torch.nan] * pad])
        ref.append([*reference[done : done + len(row.passages)].tolist(), *[0.0] * pad])
        done += len(row.passages)
    p, values, ref = torch.stack(p), torch.tensor(values), torch.tensor(ref)
    weights = torch.tensor([row.weight for row in ROWS])
    if graded:
        want = rankpo_group_loss(
            q, p, values, reference_similarities=ref, weights=weights, **options
        )
    elif name == "kl":
        want = distill_kl_loss(
            q, p, values, temperature=0.1, teacher_temperature=2.0, weights=weights
        )
    else:
        want = margin_mse_loss(q, p, values, weights=weights, **options)
    torch.testing.assert_close(output.loss, want.detach())
    want.backward()
    torch.testing.assert_close(output.d_queries, queries.grad[batch.query_texts])
    torch.testing.assert_close(output.d_passages, passages.grad[batch.passage_texts])


def test_every_option_of_the_losses_is_a_setting_or_has_no_place_in_training():
    elsewhere = {"normalize", "reduction"}  # cosines, and means, always

    def names(*records):
        return {field.name for record in records for field in dataclasses.fields(record)}

    assert names(RankPOGroupOptions) - names(RankPOLossConfig) == {"form", *elsewhere}
    assert "graded_form" in names(GradedConfig)
    of_teacher = {"temperature": "student_temperature", "pairs": "teacher_pairs"}
    renamed = {of_teacher.get(n, n) for n in names(DistillKLOptions, MarginMSEOptions)}
    assert renamed - names(TeacherConfig) == elsewhere


def given(files, stage="graded"):
    grades, scores = files
    return {"graded": {"graded_data": [grades]}, "teacher": {"teacher_data": [scores]}}[stage]


@pytest.mark.parametrize("free", [True, False], ids=["free", "reference"])
def test_the_loss_is_the_sum_of_its_parts(free, tiny_llama_dir, run_stage, read_metrics,
                                          contrastive_file, group_files):  # fmt: skip
    """With all rows in a batch, and passages whole, runs of single parts say what each is."""
    whole = {"max_steps": 1, "per_device_train_batch_size": 24, "gradient_accumulation_steps": 1,
             "reference_free": free}  # fmt: skip
    forms = {"graded_weight": 0.5, "graded_form": "lambda"}
    follows = {"teacher_weight": 0.25, "teacher_loss": "margin_mse"}
    parts = {
        "pairs": {},
        "graded": {"train_data": [], **given(group_files), **forms},
        "teacher": {"train_data": [], **given(group_files, "teacher"), **follows},
    }
    if not free:  # which would mean nothing to a teacher alone
        parts["teacher"]["reference_free"] = True
    lines = {}
    for name, flags in parts.items():
        [lines[name]] = read_metrics(run_stage("rankpo", tiny_llama_dir, name, **whole | flags))
    together = {k: v for flags in parts.values() for k, v in flags.items()}
    together |= {"replay_data": [contrastive_file], "reference_free": free}
    del together["train_data"]
    [both] = read_metrics(run_stage("rankpo", tiny_llama_dir, "all", **whole | together))
    loss = sum(line["loss"] for line in lines.values()) + 0.1 * both["replay/loss"]
    assert both["loss"] == pytest.approx(loss, rel=1e-5)
    assert lines["graded"]["loss"] == pytest.approx(0.5 * lines["graded"]["graded/loss"])
    for name in ("graded", "teacher"):
        for figure in ("loss", "accuracy"):
            assert both[f"{name}/{figure}"] == pytest.approx(lines[name][f"{name}/{figure}"])


def test_resumed_run_gives_the_same_weights_bit_by_bit(
    tiny_bert_dir, goes_on_bit_by_bit, contrastive_file, group_files
):
    """Of all four kinds, stopped in the middle of everybody's epoch, with dropout on and passages
    drawn."""
    refused = (
        ({"graded_weight": 0.5}, "--graded_weight was 1.0, is 0.5"),
        ({"teacher_group_size": 4}, "--teacher_group_size was 3, is 4"),
        ({"teacher_data": [contrastive_file]}, "no scores: a teacher's row has"),
        ({"graded_data": [group_files[0]] * 2}, "content of --graded_data differs: 1 files became"),
    )
    goes_on_bit_by_bit(
        "rankpo", tiny_bert_dir, ("loss", "graded/loss", "teacher/accuracy"), refused=refused,
        replay_data=[contrastive_file], max_steps=5, **given(group_files),
        **given(group_files, "teacher"), **SMALL, **OF_TEACHER,
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(
    "stage, more",
    [
        pytest.param("graded", {"graded_form": "plackett_luce", "reference_free": False}, id="PL"),
        pytest.param("graded", {"graded_form": "lambda", "graded_group_size": 3}, id="lambda"),
        pytest.param("teacher", {"teacher_group_size": 3}, id="teacher"),
    ],
)
def test_ranks_take_the_steps_of_one_process(
    stage, more, tiny_llama_dir, group_files, preference_file, tmp_path
):
    """Of three, so that neither rows nor texts come out even; texts go to whoever has room."""
    of = {"stage": "rankpo", "model_name_or_path": str(tiny_llama_dir), "max_steps": 3,
          "train_data": [preference_file], "cache_dir": str(tmp_path / "cache"),
          "max_tokens_per_micro_batch": 100, **given(group_files, stage), **more}  # fmt: skip
    size = {"per_device_train_batch_size": 3, f"{stage}_batch_size": 2}
    started = rank_runs.start(
        3, tmp_path / "ranks", rank_runs.descend, output_dir=str(tmp_path / "many"), **of, **size
    )
    ended = started.ended()
    assert [rank.code for rank in ended] == [0] * 3, ended
    size = {name: 3 * rows for name, rows in size.items()}
    gradients, losses, _ = rank_runs.descend(output_dir=str(tmp_path / "one"), **of, **size)
    for rank in ended:
        ours, our_losses, _ = rank.answer
        torch.testing.assert_close(torch.tensor(our_losses), torch.tensor(losses))
        for got, want in zip(ours, gradients, strict=True):
            assert got.keys() == want.keys()
            off = torch.stack([(got[i] - want[i]).norm() for i in want]).norm()
            assert off < 1e-10 * torch.stack([x.norm() for x in want.values()]).norm()


@pytest.mark.long
@pytest.mark.parametrize("name", ["pairs", "plackett_luce", "lambda", "kl", "margin_mse"])
def test_what_is_learnt_holds_for_other_queries(name, tiny_bert_dir, group_files, tmp_path):
    """Grades or scores of 16 queries; of 8 with other trades every two levels are told apart."""
    grades, scores = (
        [json.loads(line) for line in Path(file).read_text().splitlines()] for file in group_files
    )
    pairs = [
        {"query": row["query"], "passage1": better, "passage2": worse, "preferred": "A"}
        for row in grades[16:]
        for better, worse in itertools.combinations(row["passages"], 2)
    ]
    teach = {"graded_data": grades[:16], "graded_form": name}
    if name in ("kl", "margin_mse"):
        teach = {"teacher_data": scores[:16], "teacher_loss": name}
    trainer = RankPOTrainer(
        str(tiny_bert_dir), output_dir=tmp_path / "out", max_steps=60, learning_rate=3e-3,
        per_device_train_batch_size=8, bf16=False, device="cpu", preference_data=pairs,
        no_cache=True, **teach,
    )  # fmt: skip
    before = trainer.evaluate().figures["alignment"]
    figures = trainer.train().figures
    assert before < 0.7 and figures["alignment"] > 0.9


REFUSED = [
    ({"train_data": []}, "nothing to train on: give --train_data, --graded_data or --teacher_data"),
    ({"graded_weight": 2.0}, "--graded_weight needs --graded_data"),
    ({"teacher_temperature": 2.0}, "--teacher_temperature needs --teacher_data"),
    ({"train_data": [], "sft_weight": 1.0, "graded": 1}, "--sft_weight needs --train_data"),
    ({"train_data": [], "beta": 1.0, "teacher": 1}, "--beta needs --train_data or --graded_data"),
    (
        {"train_data": [], "loss_type": "hinge", "graded": 1, "graded_form": "plackett_luce"},
        "--loss_type is not of --graded_form plackett_luce",
    ),
    ({"train_data": [], "use_confidence": True, "graded": 1}, "--use_confidence needs --train_d"),
    ({"graded": 1, "graded_split": "train"}, "--graded_split needs --graded_data to be a BEIR"),
    ({"graded": 1, "graded_group_size": 1}, "--graded_group_size must be >= 2, got 1"),
    ({"teacher": 1, "teacher_pairs": "first"}, "--teacher_pairs needs --teacher_loss margin_mse"),
    ({"teacher": 1, "teacher_loss": "mse"}, "--teacher_loss must be one of margin_mse, kl"),
]


@pytest.mark.parametrize(("flags", "named"), REFUSED, ids=[named[:40] for _, named in REFUSED])
def test_what_would_do_nothing_is_refused(flags, named, tiny_llama_dir, run_stage, group_files,
                                          tmp_path):  # fmt: skip
    for stage in ("graded", "teacher"):
        if flags.pop(stage, None):
            flags |= given(group_files, stage)
    with pytest.raises(InputError, match=named):
        run_stage("rankpo", tiny_llama_dir, "out", **flags)
    assert not (tmp_path / "out").exists()


def test_rows_of_equal_tokens_are_counted(tiny_llama_dir, run_stage, tmp_path, capsys):
    """What differs beyond the limit counts once; a row of which nothing is left is out."""
    rows = [
        {"query": "a nurse", "passages": ["a b c", "a b d", "x y z"], "grades": [2, 1, 0]},
        {"query": "a cook", "passages": ["a b c", "a b d"], "grades": [1, 0]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"train_data": [], "graded_data": [str(tmp_path / "rows.jsonl")], "max_steps": 1}
    with pytest.warns(UserWarning, match="--graded_data: 1 of 2 rows are left out: passages"):
        run_stage("rankpo", tiny_llama_dir, "out", max_passage_length=3, **flags)
    assert "1 at a time of 1 rows, up to 8 passages each, 2 equal pass" in capsys.readouterr().err


def test_batches_of_other_numbers_of_processes_are_told_apart():
    """A batch size of one kind of rows is of each process, as that of all is."""
    from rankpo_fast.train import resume

    def settings(processes, rows, replayed):
        return {"processes": processes, "--per_device_train_batch_size": rows, "device": "cpu",
                "--shard": "none", "--replay_batch_size": replayed}  # fmt: skip

    was = settings(2, 4, 3)
    for now, same in ((settings(1, 8, 6), True), (settings(1, 8, 3), False)):
        assert (resume._of_ranks(was, now) == now) == same


def test_what_is_drawn_of_a_group_can_be_compared():
    """Of graded rows two grades at least, of a teacher's the first; anew every epoch."""
    row = GroupRow("q", tuple(f"p{i}" for i in range(40)), (1.0, *[0.0] * 39))
    for graded in (True, False):
        data = GroupData([row], batch_size=1, group_size=4, seed=0, graded=graded)
        drawn = [data.batch(epoch, 0) for epoch in range(20)]
        assert all(batch.values.shape == (1, 4) for batch in drawn)
        assert all(batch.values.max() == 1.0 for batch in drawn)
        assert len({tuple(batch.passage_texts.tolist()) for batch in drawn}) > 15
        again = data.batch(7, 0)
        assert torch.equal(again.passage_texts, drawn[7].passage_texts)


def test_the_card_names_what_was_learnt(tiny_llama_dir, run_stage, group_files):
    output = run_stage("rankpo", tiny_llama_dir, "out", max_steps=1, train_data=[],
                       **given(group_files), **given(group_files, "teacher"))  # fmt: skip
    card = (output / "README.md").read_text()
    assert f"`{group_files[0]}` (--graded_data)" in card
    assert "1 * KL, temperature 0.02" in card and "RankPO of graded passages (all pairs" in card
