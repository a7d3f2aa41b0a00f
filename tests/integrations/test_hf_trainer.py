"""transformers' Trainer with our losses: losses, gradients and evaluations of plain torch."""

import copy
import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from transformers import AutoModel, AutoModelForCausalLM, LlamaPreTrainedModel

from rankpo_fast import InfoNCELoss, info_nce_loss
from rankpo_fast.integrations.hf_trainer import HFContrastiveTrainer, HFRankPOTrainer
from rankpo_fast.model.pooling import pool_padded
from support.gates import in_fp64
from support.hf_runs import (
    IN_ORDER,
    OPTIONS,
    Collator,
    Plain,
    PlainRankPO,
    arguments,
    contrastive,
    gradients,
    pair_arguments,
    preferences,
    rankpo,
    triplets,
)

# --- one batch ---


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("backbone", "pooling", "side"),
    [
        pytest.param("llama", "last", "right", id="as-the-original"),
        pytest.param("llama", "last", "left", id="padded-left"),
        pytest.param("bert", "mean", "right", id="encoder"),
        pytest.param("bert", "cls", "left", id="encoder-padded-left"),
    ],
)
def test_loss_and_gradients_are_the_definitions(
    stage, backbone, pooling, side, request, tmp_path, tiny_tokenizer, other, equal
):
    model = AutoModel.from_pretrained(request.getfixturevalue(f"tiny_{backbone}_dir")).eval()
    trainer, rows = contrastive(model, tiny_tokenizer, tmp_path, pooling=pooling), triplets(5)
    definition = Plain.loss
    if stage == 2:
        trainer, rows = rankpo(model, tiny_tokenizer, tmp_path, pooling=pooling), preferences(5)
        definition = PlainRankPO(model, arguments(tmp_path)).loss
    batch = Collator(tiny_tokenizer, side)(rows)
    loss = trainer.compute_loss(model, batch)
    ours = loss, gradients(loss, model)
    with in_fp64(model):
        loss = definition(model, batch, pooling)
    exact = loss, gradients(loss, model)
    name = "HFRankPOTrainer" if stage == 2 else "HFContrastiveTrainer"
    logits = OPTIONS["beta"] / OPTIONS["temperature"] if stage == 2 else 1 / 0.02
    equal(f"transformers {name}", pooling, ours, exact, logits)


@pytest.mark.parametrize(
    ("more", "weights"),
    [
        pytest.param({}, (1.0, 0.0), id="sigmoid"),
        pytest.param({"loss_type": "hinge"}, (1.0, 0.0), id="hinge"),
        pytest.param({"sft_weight": 0.5}, (1.0, 0.5), id="with-sft"),
        pytest.param({"sft_weight": 2.0, "rankpo_weight": 0.0}, (0.0, 2.0), id="sft-alone"),
    ],
)
def test_every_term_of_the_second_stage_is_logged_as_the_original_does(
    more, weights, tmp_path, tiny_tokenizer, llama, other
):
    rows = preferences(6)
    trainer = rankpo(llama, tiny_tokenizer, tmp_path, reference=other, eval_dataset=rows, **more)
    theirs = PlainRankPO(llama, arguments(tmp_path))
    theirs.reference, theirs.hinge = other, "loss_type" in more
    logs, batch = trainer.evaluate(), Collator(tiny_tokenizer)(rows)
    with torch.no_grad():
        scores, reference = theirs.scores(llama, batch), theirs.scores(other, batch)
        expected = {"loss": None, "rankpo_loss": (1.0, 0.0), "sft_loss": (0.0, 1.0)}
        for name, of in expected.items():
            theirs.weights = weights if of is None else of
            expected[name] = theirs.loss(llama, batch)
    if not weights[0]:
        expected.pop("rankpo_loss")
    if not weights[1]:
        expected.pop("sft_loss")
    rewards = OPTIONS["beta"] * (scores - reference)
    for name, values in (("rewards", rewards), ("scores", scores)):
        expected[f"{name}/chosen"], expected[f"{name}/rejected"] = values.mean(0)
        expected[f"{name}/margins"] = (values[:, 0] - values[:, 1]).mean()
    expected["rewards/accuracies"] = (rewards[:, 0] > rewards[:, 1]).float().mean()
    speed = ("runtime", "per_second", "preparation_time")
    got = {name[5:]: x for name, x in logs.items() if not name.endswith(speed) and name != "epoch"}
    assert got == pytest.approx({name: x.item() for name, x in expected.items()}, abs=1e-5)


def test_the_collator_can_tell_which_passages_are_the_same_text(tmp_path, tiny_tokenizer, llama):
    """Such are false negatives."""
    trainer, batch = (
        contrastive(llama, tiny_tokenizer, tmp_path),
        Collator(tiny_tokenizer)(triplets(4)),
    )
    ids = torch.tensor([0, 1, 0, 2, 3, 4, 5, 6])
    loss, (q, p) = trainer.compute_loss(llama, batch | {"passage_ids": ids}, return_outputs=True)
    assert abs(loss - info_nce_loss(q, p, passage_ids=ids)) < 1e-6
    assert loss < trainer.compute_loss(llama, batch) - 1e-3


def test_a_step_asks_the_device_for_no_number(tmp_path, tiny_tokenizer, llama, other):
    class Refusing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function is not torch.ops.aten._local_scalar_dense.default, "a host sync"
            return function(*args, **kwargs or {})

    class Tokens(nn.Module):
        """Transformers' models ask themselves whether a mask is all ones."""

        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(320, 8)

        def forward(self, input_ids, **_):
            return SimpleNamespace(last_hidden_state=self.table(input_ids))

    model = Tokens()
    one, two = (
        contrastive(model, tiny_tokenizer, tmp_path),
        rankpo(model, tiny_tokenizer, tmp_path, reference=model),
    )
    batches = [
        one.data_collator(triplets(4)),
        two.data_collator([two.train_dataset[i] for i in (0, 1)]),
    ]
    with Refusing():
        for trainer, batch in zip((one, two), batches, strict=True):
            for _ in range(2):
                trainer.compute_loss(model, batch).backward()


# --- evaluation ---


def test_evaluation_counts_every_row_once(tmp_path, tiny_tokenizer, llama):
    """The last batch has 2 of 10 rows; predictions are the similarities."""
    rows, seen = preferences(10), {}

    def metrics(evaluated):
        seen["scores"], seen["labels"] = map(torch.tensor, evaluated)
        return {"first": 1.0}

    more = {"eval_dataset": {"dev": rows}, "per_device_eval_batch_size": 4}
    trainer = rankpo(llama, tiny_tokenizer, tmp_path, compute_metrics=metrics, **more)
    logs = trainer.evaluate()
    theirs, batch = PlainRankPO(llama, arguments(tmp_path)), Collator(tiny_tokenizer)(rows)
    with torch.no_grad():
        loss, scores = theirs.loss(llama, batch), theirs.scores(llama, batch)
    assert logs["eval_dev_loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert logs["eval_dev_rankpo_loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert logs["eval_dev_first"] == 1.0 and not seen["labels"].any()
    torch.testing.assert_close(seen["scores"], scores, rtol=0, atol=1e-5)


def test_evaluation_of_the_first_stage_does_not_disturb_its_log(tmp_path, tiny_tokenizer, llama):
    more = {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 2, "max_steps": 2}
    trainer = contrastive(llama, tiny_tokenizer, tmp_path, eval_dataset=triplets(6), **more)
    trainer.train()
    logs = trainer.state.log_history
    first, last = [log for log in logs if "eval_loss" in log]
    (train,) = [log for log in logs if "loss" in log]
    assert {"eval_accuracy", "eval_positive_similarity"} <= first.keys()
    assert {"accuracy", "hardest_negative_similarity"} <= train.keys()
    batch = Collator(tiny_tokenizer)(triplets(6))
    with torch.no_grad():
        assert last["eval_loss"] == pytest.approx(Plain.loss(llama, batch).item(), abs=1e-5)
    assert trainer.predict(triplets(6)).predictions.shape == (6, 2)


def test_new_rows_of_texts_are_evaluated_and_predicted(tmp_path, tiny_tokenizer, llama):
    rows, batch = preferences(4), Collator(tiny_tokenizer)(preferences(4))
    trainer = rankpo(llama, tiny_tokenizer, tmp_path)
    with torch.no_grad():
        loss = PlainRankPO(llama, arguments(tmp_path)).loss(llama, batch)
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert trainer.predict(rows).predictions.shape == (4, 2)
    with pytest.raises(ValueError, match="rows have no reference: give them as eval_dataset to"):
        rankpo(llama, tiny_tokenizer, tmp_path, reference=llama).evaluate(rows)


def test_a_second_training_does_not_log_rows_of_the_first(tmp_path, tiny_tokenizer, llama):
    """Its third step comes after its last log."""
    trainer = contrastive(llama, tiny_tokenizer, tmp_path, max_steps=3, logging_steps=2, **IN_ORDER)
    logs = []
    for _ in range(2):
        trainer.train()
        logs.append(trainer.state.log_history[0]["positive_similarity"])
    assert logs[1] == pytest.approx(logs[0], abs=1e-6)


# --- models of other kinds ---


def test_the_reference_is_computed_once_and_handed_back(tmp_path, tiny_tokenizer, llama, other):
    other.train().layers[0].eval()
    calls = []
    other.register_forward_hook(lambda *_: calls.append(other.training))
    trainer = rankpo(llama, tiny_tokenizer, tmp_path, reference=other, rows=6, max_steps=3)
    assert calls == [False] * 2  # queries and passages of one batch
    assert other.training and other.layers[1].training and not other.layers[0].training
    trainer.train()
    assert len(calls) == 2
    batch = Collator(tiny_tokenizer)(preferences(6))
    with torch.no_grad():
        scores = PlainRankPO.scores(other.eval(), batch)
    torch.testing.assert_close(torch.tensor(trainer.train_dataset["reference"][:]), scores)
    rows = [trainer.train_dataset[i] for i in range(2)]
    assert not trainer.data_collator(rows)["reference"].is_floating_point()  # for DeepSpeed


def test_an_adapter_is_trained_against_the_model_beneath_it(tmp_path, tiny_tokenizer, llama):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(target_modules=["q_proj"], r=2)
    more = {
        "reference": llama,
        "peft_config": adapter,
        "max_steps": 2,
        "eval_dataset": preferences(4),
    }
    trainer = rankpo(llama, tiny_tokenizer, tmp_path, **more)
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(0, abs=1e-6)
    trainer.train()
    assert trainer.evaluate()["eval_rewards/margins"] != 0
    trained = [name for name, x in trainer.model.named_parameters() if x.requires_grad]
    assert trained and all("lora" in name for name in trained)


def test_dropout_of_a_model_is_off_in_the_second_stage(
    tmp_path, tiny_tokenizer, tiny_bert_dir, tiny_llama_dir
):
    def fresh():
        return AutoModel.from_pretrained(tiny_bert_dir)

    for on, wanted in ((True, {0.0}), (False, {0.1})):
        args = pair_arguments(tmp_path, disable_dropout=on)
        rows = {"train_dataset": preferences(4), "tokenizer": tiny_tokenizer}
        trainers = (
            HFRankPOTrainer(fresh(), args=args, **rows),
            HFRankPOTrainer(model_init=fresh, args=args, **rows),
        )
        for trainer in trainers:
            assert {m.p for m in trainer.model.modules() if isinstance(m, nn.Dropout)} == wanted
            assert not any(x.requires_grad for x in trainer.model.pooler.parameters())
        assert {
            m.p for m in trainer.call_model_init().modules() if isinstance(m, nn.Dropout)
        } == wanted
    llama = AutoModel.from_pretrained(tiny_llama_dir, attention_dropout=0.5)  # has no nn.Dropout
    trainer = rankpo(llama, tiny_tokenizer, tmp_path, rows=4)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    losses = [trainer.compute_loss(llama.train(), batch) for _ in range(2)]
    assert losses[0] == losses[1]


def test_options_follow_a_search_over_hyper_parameters(tmp_path, tiny_tokenizer, llama):
    trainer = rankpo(llama, tiny_tokenizer, tmp_path, rows=4)
    trainer.args.beta = 3.0  # as it sets them
    theirs = PlainRankPO(llama, arguments(tmp_path))
    theirs.options = OPTIONS | {"beta": 3.0}
    batch = Collator(tiny_tokenizer)(preferences(4))
    assert abs(trainer.compute_loss(llama, batch) - theirs.loss(llama, batch)) < 1e-5


def test_a_model_may_pool_itself_or_embed_be_overridden(tmp_path, tiny_tokenizer, llama):
    class Pooled(LlamaPreTrainedModel):
        def __init__(self):
            super().__init__(llama.config)
            self.pooler = llama

        def forward(self, input_ids, attention_mask, **_):
            states = self.pooler(input_ids=input_ids, attention_mask=attention_mask)
            return pool_padded(states.last_hidden_state, attention_mask, "mean")

    class Own(HFContrastiveTrainer):
        def embed(self, model, features):
            states = model(**features).last_hidden_state
            return pool_padded(states, features["attention_mask"], "mean")

    batch, model = Collator(tiny_tokenizer)(triplets(4)), Pooled()
    expected = Plain.loss(llama, batch, "mean")
    trainers = [contrastive(model, tiny_tokenizer, tmp_path), Own(llama, arguments(tmp_path))]
    for trainer, of in zip(trainers, (model, llama), strict=True):
        assert abs(trainer.compute_loss(of, batch) - expected) < 1e-5
    assert all(x.requires_grad for x in model.parameters())


# --- what is wrong ---


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"preferred": "C"}, "row 2: 'preferred' must be 'A' or 'B', got 'C'"),
        ({"passage2": None}, "row 2: 'passage2' must be a text, got None"),
        ({"query": None}, "row 2: 'query' must be a text, got None"),
    ],
    ids=["preferred", "passage", "query"],
)
def test_a_bad_row_is_named(row, message, tmp_path, tiny_tokenizer, llama):
    rows = preferences(3)
    rows[2] = {k: v for k, v in (rows[2] | row).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        HFRankPOTrainer(
            llama, args=pair_arguments(tmp_path), train_dataset=rows, tokenizer=tiny_tokenizer
        )


def test_what_does_not_go_together_is_refused(tmp_path, tiny_tokenizer, tiny_llama_dir, llama):
    args, own = pair_arguments(tmp_path), pair_arguments(tmp_path, reference_free=False)
    dispatching = pair_arguments(tmp_path, accelerator_config={"dispatch_batches": True})
    rows, unpadded = preferences(3), copy.deepcopy(tiny_tokenizer)
    unpadded.pad_token = None
    full = {"tokenizer": tiny_tokenizer, "train_dataset": rows}
    refused = [
        (dict(model="a/name", args=args, **full), r"AutoModel.from_pretrained\('a/name'\)"),
        (dict(model=llama, args=args, train_dataset=rows), "tokenizer is missing"),
        (dict(model=llama, args=args, tokenizer=unpadded), "tokenizer.pad_token is None: set it"),
        (
            dict(model=llama, args=args, tokenizer=tiny_tokenizer, train_dataset={"a": rows}),
            "train_dataset is a dict: only eval_dataset may be",
        ),
        (dict(model=llama, args=dispatching, **full), "dispatch_batches=True cuts passages"),
        (dict(model=llama, args=own, **full), "ref_model goes with reference_free=False"),
        (dict(model=llama, ref_model=llama, args=args, **full), "ref_model goes with reference_fr"),
        (
            dict(model=llama, args=arguments(tmp_path), **full),
            "have their reference_free, beta, temp",
        ),
        (dict(model=llama, args=args, pooling="max", **full), "pooling must be one of last, mean"),
        (dict(model=llama, args=pair_arguments(tmp_path, beta=0.0), **full), "beta must be > 0"),
        (dict(args=args, model_init=lambda: llama, peft_config=1, **full), "goes with model, not"),
    ]
    for arguments_, message in refused:
        with pytest.raises(ValueError, match=message):
            HFRankPOTrainer(**arguments_)
    learnt = InfoNCELoss(learn_temperature=True)
    summed = InfoNCELoss(reduction="sum")
    for loss, message in (("info_nce", "an InfoNCELoss, got str"), (learnt, "learns its temp"),
                          (summed, "must have reduction='mean'")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            HFContrastiveTrainer(llama, arguments(tmp_path), loss=loss)
    with pytest.warns(UserWarning, match="no effect with loss_type='hinge'"):
        more = {"loss_type": "hinge", "label_smoothing": 0.1}
        HFRankPOTrainer(llama, args=pair_arguments(tmp_path, **more), **full)


def test_batches_and_models_that_do_not_serve_are_named(
    tmp_path, tiny_tokenizer, tiny_llama_dir, llama
):
    trainer, batch = (
        contrastive(llama, tiny_tokenizer, tmp_path),
        Collator(tiny_tokenizer)(triplets(4)),
    )
    with pytest.raises(ValueError, match=r"batch has no passage, only \['query'\]"):
        trainer.compute_loss(llama, {"query": batch["query"]})
    with pytest.raises(ValueError, match="any of labels, weights, .*, guide: no idx"):
        trainer.compute_loss(llama, batch | {"idx": torch.arange(4)})
    causal = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    with pytest.raises(ValueError, match="CausalLMOutputWithPast of the model has no last_hidden"):
        trainer.compute_loss(causal, batch)
    one = {"query": batch["query"], "passage": batch["query"]}
    with pytest.raises(ValueError, match="batch of 4 queries has 4 passages, not chosen and rej"):
        rankpo(llama, tiny_tokenizer, tmp_path).compute_loss(llama, one)


def test_another_version_of_the_library_is_refused(monkeypatch):
    from importlib import metadata

    monkeypatch.setattr(metadata, "version", lambda name: "4.57.0")
    monkeypatch.delitem(sys.modules, "rankpo_fast.integrations.hf_trainer")
    with pytest.raises(ImportError, match="transformers >= 5 .* and 4.57.0 is installed"):
        importlib.import_module("rankpo_fast.integrations.hf_trainer")
