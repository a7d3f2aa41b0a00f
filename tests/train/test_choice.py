"""A run's result is the best of its evaluated models, and it ends where none gets better."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from rankpo_fast.config import EvaluationConfig, TrainingConfig
from rankpo_fast.errors import InputError, TrainingStopped
from rankpo_fast.retrieval.evaluate import Evaluation
from rankpo_fast.train import checkpoint as checkpoints
from rankpo_fast.train import loop
from rankpo_fast.train.choice import Choice
from rankpo_fast.train.result import TrainingResult
from support import rank_runs

BOTH = {"metric_for_best_model": ["ndcg@20", "alignment"], "metric_weights": [2.0, 1.0]}


def choice(state=None, **flags):
    return Choice(TrainingConfig("unused", **flags), state)


def test_the_score_is_the_weighted_sum_and_a_tie_is_no_gain():
    chosen = choice(**BOTH, patience=2)
    assert chosen.consider(10, {"ndcg@20": 0.5, "alignment": 0.4, "mrr@1": 0.0})
    assert chosen.best.score == pytest.approx(1.4)
    assert not chosen.consider(20, {"ndcg@20": 0.4, "alignment": 0.6})  # as much
    assert chosen.consider(30, {"ndcg@20": 0.6, "alignment": 0.3})
    assert chosen.best.step == 30 and not chosen.over
    assert not chosen.consider(40, {"ndcg@20": 0.6, "alignment": 0.2})
    assert not chosen.over
    assert not chosen.consider(50, {"ndcg@20": 0.1, "alignment": 0.9})
    assert chosen.over and chosen.evaluated == 50


def test_its_state_goes_through_json():
    one = choice(**BOTH, patience=3)
    one.consider(10, {"ndcg@20": 0.1 + 0.2, "alignment": 1 / 3})
    one.consider(20, {"ndcg@20": 0.0, "alignment": 0.0})
    other = choice(json.loads(json.dumps(one.state())), **BOTH, patience=3)
    assert other.best == one.best and other.state() == one.state()
    assert choice().state() is None and not choice().wanted


@pytest.mark.parametrize(
    "flags, named",
    [
        ({"metric_weights": [1.0]}, "--metric_weights needs --metric_for_best_model"),
        ({"patience": 2}, "--patience needs --metric_for_best_model"),
        ({**BOTH, "metric_weights": [1.0]}, "--metric_weights must be 2 finite numbers > 0"),
        ({**BOTH, "metric_weights": [1.0, -1.0]}, "--metric_weights must be 2 finite"),
        ({**BOTH, "patience": 0}, "--patience must be >= 1"),
        ({"metric_for_best_model": ["alignment"] * 2}, "must be names, each once"),
    ],
)
def test_settings_that_mean_nothing_are_refused(flags, named):
    with pytest.raises(InputError, match=named):
        TrainingConfig("unused", **flags)


@pytest.mark.parametrize(
    "flags, named",
    [
        ({"eval_steps": 2}, "needs something to measure"),
        ({"preference_data": ["rows"]}, "needs --eval_steps"),
        ({"preference_data": ["rows"], "eval_steps": 2}, "ndcg@20 is not measured here; there are"),
    ],
)
def test_what_no_evaluation_measures_is_refused(
    flags, named, tiny_llama_dir, run_stage, preference_file, tmp_path
):
    if "preference_data" in flags:
        flags = {**flags, "preference_data": [preference_file]}
    with pytest.raises(InputError, match=named):
        run_stage("rankpo", tiny_llama_dir, "out", metric_for_best_model=["ndcg@20"], **flags)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def scores(monkeypatch):
    """Figures of evaluations in their order, in the place of measured ones; the weights then."""

    def give(*alignments):
        seen, left = [], list(alignments)

        def measure(encoder, **_):
            seen.append({n: p.detach().clone() for n, p in encoder.backbone.named_parameters()})
            return Evaluation({"alignment": left.pop(0)})

        monkeypatch.setattr(loop, "measure", measure)
        return seen

    return give


@pytest.fixture
def run(run_stage, tiny_bert_dir, preference_file):
    """With an evaluation every second step, and dropout."""

    def start(name, **flags):
        usual = {"eval_steps": 2, "metric_for_best_model": ["alignment"], "max_steps": 9,
                 "preference_data": [preference_file], "save_total_limit": 1}  # fmt: skip
        return run_stage("rankpo", tiny_bert_dir, name, **{**usual, **flags})

    return start


def weights(path):
    return load_file(path / "model.safetensors")


def same(path, seen):
    found = weights(path)
    return all(torch.equal(found[name], tensor) for name, tensor in seen.items())


def test_the_result_is_the_best_model_with_its_figures(run, scores, read_metrics, capsys):
    """Of five evaluated, the last of which is of the last step; other checkpoints go."""
    seen = scores(0.3, 0.6, 0.5, 0.6, 0.4)
    path = run("out", save_steps=1)
    assert len(seen) == 5 and same(path, seen[1]) and not same(path, seen[4])
    assert [p.name for p in sorted((path / "checkpoints").iterdir())] == [
        "step-00000004", "step-00000009"
    ]  # fmt: skip
    result = TrainingResult.of(path, None)
    assert result.figures == {"alignment": 0.6} and result.steps == 9
    assert read_metrics(path)[-1] == {
        "step": 9, "best/step": 4, "best/score": 0.6, "best/alignment": 0.6
    }  # fmt: skip
    said = capsys.readouterr().err
    assert "the model of the evaluated step with the highest alignment" in said
    assert "the result is the model of step 4, of score 0.6000" in said
    assert "0.6000" in (path / "README.md").read_text()


def test_the_run_ends_after_as_many_evaluations_without_gain(run, scores, read_metrics, capsys):
    seen = scores(0.3, 0.6, 0.5, 0.6)
    path = run("out", patience=2, max_steps=50)
    assert len(seen) == 4 and same(path, seen[1])
    assert max(line["step"] for line in read_metrics(path)) == 8
    assert "step 8 is the last: no gain since step 4, alignment 0.6000" in capsys.readouterr().err


@pytest.mark.parametrize(
    "stop, first, then",
    [
        pytest.param(3, [0.3], [0.6, 0.5, 0.6], id="before-the-best"),
        pytest.param(4, [0.3], [0.6, 0.5, 0.6], id="at-the-best-not-yet-evaluated"),
        pytest.param(7, [0.3, 0.6, 0.5], [0.6], id="after-the-best"),
        pytest.param(8, [0.3, 0.6, 0.5], [0.6], id="before-the-last-evaluation"),
    ],
)
def test_a_run_that_goes_on_chooses_as_if_it_had_never_stopped(
    stop, first, then, run, scores, stop_after, monkeypatch, read_metrics
):
    seen = scores(0.3, 0.6, 0.5, 0.6)
    straight = run("straight", patience=2, max_steps=50)
    before = scores(*first)
    stop_after(stop)
    with pytest.raises(TrainingStopped):
        run("stopped", patience=2, max_steps=50)
    monkeypatch.undo()
    after = scores(*then)
    torch.manual_seed(12345)
    stopped = run("stopped", patience=2, max_steps=50, resume="newest")
    assert len(before) == len(first) and len(after) == len(then)
    assert same(straight, seen[1]) and same(stopped, seen[1])

    def figures(path):
        names = ("step", "loss", "eval/alignment", "best/step")
        return [{k: line[k] for k in names if k in line} for line in read_metrics(path)]

    assert figures(stopped) == figures(straight)


def test_what_decides_the_choice_cannot_change(run, scores, stop_after, monkeypatch, tmp_path):
    scores(0.3, 0.6)
    stop_after(5)
    with pytest.raises(TrainingStopped):
        run("out")
    monkeypatch.undo()
    for changed, named in (
        ({"eval_steps": 3}, "--eval_steps was 2, is 3"),
        ({"patience": 3}, "--patience was None, is 3"),
        ({"metric_weights": [2.0]}, "--metric_weights was"),
        ({"cutoffs": [5]}, "--cutoffs was"),
    ):
        with pytest.raises(InputError, match=named):
            run("out", resume="newest", **changed)
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-00000004")
    with pytest.raises(InputError, match="step 4 was the best until then, and its checkpoint is"):
        run("out", resume="newest")


def test_a_best_model_that_the_disk_refuses_is_not_the_result(run, scores, monkeypatch, capsys):
    """The one before it is, and that is said."""
    seen, save = scores(0.3, 0.6, 0.2, 0.2, 0.2), checkpoints.save

    def refuse(directory, state, **more):
        if state.step == 4:
            raise OSError("no space left on device")
        return save(directory, state, **more)

    monkeypatch.setattr(checkpoints, "save", refuse)
    path = run("out", save_steps=6)
    assert same(path, seen[0])
    assert "step 4 is the best so far, but could not be kept" in capsys.readouterr().err


def test_without_a_metric_nothing_changes(run, scores):
    """The last model is the result, whatever was measured."""
    seen = scores(0.9, 0.1, 0.1, 0.1, 0.1)
    path = run("out", metric_for_best_model=[])
    assert same(path, seen[-1]) and TrainingResult.of(path, None).figures == {"alignment": 0.1}


@pytest.mark.long
@pytest.mark.parametrize("shard", ["none", "full"])
def test_ranks_agree_on_the_best(shard, tiny_llama_dir, preference_file, tmp_path):
    """Real figures, of which the first rank alone has any; the result is an evaluated model's."""
    flags = {"stage": "rankpo", "model_name_or_path": str(tiny_llama_dir), "eval_steps": 1,
             "train_data": [preference_file], "preference_data": [preference_file], "shard": shard,
             "metric_for_best_model": ["alignment"], "patience": 1, "max_steps": 8,
             "learning_rate": 3e-2, "cache_dir": str(tmp_path / "cache"),
             "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 2,
             "save_total_limit": 0}  # fmt: skip
    ended = rank_runs.start(2, tmp_path / "ranks", rank_runs.train, **flags).ended()
    assert [rank.code for rank in ended] == [0, 0], ended
    lines = [json.loads(x) for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    best = lines[-1]
    scores = {line["step"]: line["eval/alignment"] for line in lines if "eval/alignment" in line}
    assert best["best/alignment"] == max(scores.values()) == scores[best["best/step"]]


def test_every_figure_that_is_measured_can_be_asked_for():
    from rankpo_fast.train.choice import check_choice

    names = ["ndcg@5", "mrr@5", "recall@5", "alignment"]
    evaluation = EvaluationConfig(query_data="q", corpus_data="c", preference_data=["p"],
                                  cutoffs=[5])  # fmt: skip
    check_choice(TrainingConfig("x", metric_for_best_model=names, eval_steps=1), evaluation)
