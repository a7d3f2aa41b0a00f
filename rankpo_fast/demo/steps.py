"""The steps of the demo, each by the project's own functions and files.

A step leaves files in the output directory that the next ones read: data/*.jsonl, and a directory
for each model on the way.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankpo_fast.config import (
    NO_REPLAY,
    ComputeConfig,
    ContrastiveDataConfig,
    ContrastiveLossConfig,
    EvaluationConfig,
    ModelConfig,
    RankPODataConfig,
    RankPOLossConfig,
    ReplayConfig,
    TrainingConfig,
)
from rankpo_fast.demo import world
from rankpo_fast.demo.world import Split, SplitSize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from rankpo_fast.model.encoder import Encoder

CUTOFF = 20
CANDIDATES = 20  # of each job come before the judge, in pairs
PAIRS_PER_JOB = 8
NEGATIVES_PER_JOB = 5  # random ones, and as many mined ones
MINING_RANGE = (0, 50)
MAX_LENGTH = 96  # tokens, which hardly a text of the world exceeds
MAX_TOKENS = 4096  # of a micro-batch: what a CPU's cache likes
VOCABULARY = 2400

UNTRAINED, RANDOM, STAGE1 = "untrained", "stage1_random_negatives", "stage1"
NEGATIVES = {RANDOM: 1, STAGE1: 2}  # of a job in a batch, besides the batch's other talents
# Stage 2's objectives. Temperatures and beta are the paper's, in both stages.
RANKPO: dict[str, Any] = {"loss_type": "hinge", "reference_free": False}
REPLAY = "rankpo_replay"  # of the rows that stage 1 was last trained on
SIMRANKPO = "simrankpo"
METHODS: dict[str, dict[str, Any]] = {
    "sft": {"sft_weight": 1.0, "rankpo_weight": 0.0},
    SIMRANKPO: {"loss_type": "hinge"},
    "rankpo": RANKPO,
    REPLAY: RANKPO,
}


@dataclass(frozen=True)
class Scale:
    """Sizes, lengths and rates; those of stage 2 are the same for all its methods."""

    splits: dict[str, SplitSize]
    methods: tuple[str, ...]  # of stage 2, in their order
    hidden_size: int
    random_steps: int  # of stage 1, with random negatives
    mined_steps: int  # of stage 1, with random and mined negatives
    alignment_steps: int  # of stage 2
    threads: int | None = None  # of torch; None: as many as suit the machine
    queries: int = 64  # in a batch of stage 1
    pairs: int = 32  # in a batch of stage 2
    replayed: int | None = None  # rows of stage 1 in a batch of stage 2; None: as many as pairs
    random_rate: float = 2e-3
    mined_rate: float = 1e-3
    alignment_rate: float = 1e-4
    replay_weight: float = 0.1
    gradient_filter: float = 0.0  # in stage 1
    evaluations: int = 6  # on the validation split, in each training


SPLITS = {
    "train": SplitSize(1000, 1500),
    "validation": SplitSize(100, 500),
    "test": SplitSize(300, 800),
}
# The rates were chosen on the validation split of seed 1 (the demo's own is 0).
# SHORT, for two cores and two minutes: random_rate by nDCG@20, which falls apart at 6e-3;
# alignment_rate, of 4e-4 and 6e-4, by the mean of nDCG@20 * alignment over its methods.
SHORT = Scale(
    SPLITS, (SIMRANKPO, "rankpo", REPLAY),
    hidden_size=64, random_steps=120, mined_steps=60, alignment_steps=200,
    random_rate=3e-3, mined_rate=2e-3, alignment_rate=4e-4, replay_weight=0.3, replayed=16,
    evaluations=5,
    threads=1,  # matrices as narrow gain nothing from a second: 118 s, and 135 s with two
)  # fmt: skip
# FULL, the study: random_rate by nDCG@20, alignment_rate by the mean of nDCG@20 * alignment over
# the three methods without replay, and then replay_weight by that product.
FULL = Scale(
    SPLITS, tuple(METHODS),
    hidden_size=128, random_steps=120, mined_steps=60, alignment_steps=300,
)  # fmt: skip
QUICK = Scale(
    splits={
        "train": SplitSize(60, 200),
        "validation": SplitSize(20, 80),
        "test": SplitSize(30, 80),
    },
    methods=SHORT.methods,
    hidden_size=32, random_steps=6, mined_steps=4, alignment_steps=6, queries=16, pairs=16,
    evaluations=2,
)  # fmt: skip


class Demo:
    """The steps, each of which leaves files that the next ones read."""

    def __init__(self, path: Path, seed: int, scale: Scale):
        self.path, self.seed, self.scale = path, seed, scale
        self.compute = ComputeConfig("cpu", MAX_TOKENS, cache_dir=str(path / "cache"))
        self.models = (UNTRAINED, RANDOM, STAGE1, *scale.methods)
        self.world: dict[str, Split] = {}
        self.labels: dict[str, world.Labels] = {}
        self.training_seconds = 0.0

    def make_world(self) -> None:
        """Records of every split, and what `rankpo_fast.label` makes of them by the rules."""
        from rankpo_fast.data.rows import write_jsonl

        self.world = world.make_world(self.seed, self.scale.splits)
        for name, split in self.world.items():
            write_jsonl(self._data(f"{name}_jobs"), world.job_records(split.jobs))
            write_jsonl(self._data(f"{name}_talents"), world.talent_records(split.talents))
            self.labels[name] = self._labels(name)
        train, labels = self.world["train"], self.labels["train"]
        rows = world.contrastive_rows(
            train, labels, num_negatives=NEGATIVES_PER_JOB, seed=self.seed
        )
        write_jsonl(self._data(RANDOM), rows)
        for name in ("validation", "test"):
            queries, corpus = world.retrieval_rows(self.world[name], self.labels[name])
            write_jsonl(self._data(f"{name}_queries"), queries)
            write_jsonl(self._data(f"{name}_corpus"), corpus)
        write_untrained_model(
            self.path / UNTRAINED,
            [*(job.text for job in train.jobs), *(talent.text for talent in train.talents)],
            self.scale.hidden_size,
        )

    def _labels(self, split: str) -> world.Labels:
        from rankpo_fast.label.run import rules_met

        rules = self.path / "data" / "rules.yaml"
        rules.write_text(world.RULES, encoding="utf-8")
        return rules_met(rules, self._data(f"{split}_jobs"), self._data(f"{split}_talents"))

    def example(self) -> tuple[str, str]:
        """A job and a talent who fits it."""
        train = self.world["train"]
        for job, met in zip(train.jobs, self.labels["train"], strict=True):
            for row in world.positives(met):
                return job.text, train.talents[row].text
        raise AssertionError("nobody fits any job")

    def train_with_random_negatives(self) -> None:
        steps, rate = self.scale.random_steps, self.scale.random_rate
        self._contrastive(UNTRAINED, RANDOM, steps, rate)

    def train_with_mined_negatives(self) -> None:
        from rankpo_fast.data.rows import read_contrastive, write_jsonl
        from rankpo_fast.retrieval.draw import Drawing
        from rankpo_fast.retrieval.mining import mine

        mined = mine(
            self.load(RANDOM),
            read_contrastive(self._data(RANDOM)),
            [talent.text for talent in self.world["train"].talents],
            search_range=MINING_RANGE,
            num_negatives=NEGATIVES_PER_JOB,
            drawing=Drawing(seed=self.seed),
            keep=True,
            max_tokens=MAX_TOKENS,
            progress=True,
        )
        write_jsonl(self._data(STAGE1), mined.rows)
        self._contrastive(RANDOM, STAGE1, self.scale.mined_steps, self.scale.mined_rate)

    def judge_candidates(self) -> None:
        """For every split: of what stage 1 retrieves for its jobs among its talents."""
        from rankpo_fast.data.rows import write_jsonl

        encoder = self.load(STAGE1)
        for number, (name, split) in enumerate(self.world.items()):
            rows = world.preference_rows(
                split,
                self.labels[name],
                _retrieve(encoder, split, name),
                pairs_per_job=PAIRS_PER_JOB,
                seed=1000 * self.seed + number,
            )
            write_jsonl(self._data(f"{name}_preferences"), rows)

    def align(self, method: str) -> None:
        from rankpo_fast.train.rankpo import train_rankpo

        scale = self.scale
        with self._timed():
            train_rankpo(
                self._trained(STAGE1),
                RankPODataConfig([str(self._data("train_preferences"))]),
                RankPOLossConfig(**METHODS[method]),
                self._training(method, scale.alignment_steps, scale.alignment_rate, scale.pairs),
                self._evaluation("validation", preferences=True),
                self.compute,
                self._replay() if method == REPLAY else NO_REPLAY,
            )

    def measure(self) -> dict[str, Any]:
        """nDCG@20 and alignment of every model on the test split."""
        from rankpo_fast.progress import progress

        lines = self._data("test_preferences").read_text(encoding="utf-8").splitlines()
        figures = {}
        with progress("measuring", len(self.models), "model") as advance:
            for name in self.models:
                figures[name] = self.evaluate(name, "test")
                advance(1)
        ceiling = world.judge_ceiling([json.loads(line) for line in lines])
        return {**figures, "judge_ceiling": ceiling, "test_pairs": len(lines)}

    # --- the project's own functions, with the demo's settings ---

    def _contrastive(self, start: str, name: str, steps: int, rate: float) -> None:
        from rankpo_fast.train.contrastive import train_contrastive

        with self._timed():
            train_contrastive(
                self._untrained() if start == UNTRAINED else self._trained(start),
                ContrastiveDataConfig([str(self._data(name))], num_negatives=NEGATIVES[name]),
                ContrastiveLossConfig(gradient_filter=self.scale.gradient_filter),
                self._training(name, steps, rate, self.scale.queries),
                self._evaluation("validation", preferences=False),
                self.compute,
            )

    def _replay(self) -> ReplayConfig:
        return ReplayConfig(
            [str(self._data(STAGE1))],
            replay_weight=self.scale.replay_weight,
            replay_batch_size=self.scale.replayed,
            replay_num_negatives=NEGATIVES[STAGE1],
        )

    def _untrained(self) -> ModelConfig:
        return ModelConfig(
            str(self.path / UNTRAINED), from_scratch=True, pooling="mean",
            max_query_length=MAX_LENGTH, max_passage_length=MAX_LENGTH,
            bf16=False, gradient_checkpointing=False,
        )  # fmt: skip

    def _trained(self, name: str) -> ModelConfig:
        return ModelConfig(str(self.path / name), bf16=False, gradient_checkpointing=False)

    def _training(self, name: str, steps: int, rate: float, batch_size: int) -> TrainingConfig:
        return TrainingConfig(
            str(self.path / name),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=1,
            learning_rate=rate,
            eval_steps=max(1, steps // self.scale.evaluations),
            seed=self.seed,
            overwrite_output_dir=True,
        )

    def _evaluation(self, split: str, *, preferences: bool) -> EvaluationConfig:
        return EvaluationConfig(
            str(self._data(f"{split}_queries")),
            str(self._data(f"{split}_corpus")),
            [str(self._data(f"{split}_preferences"))] if preferences else None,
            cutoffs=[CUTOFF],
        )

    def evaluate(self, name: str, split: str) -> dict[str, float]:
        from rankpo_fast.retrieval.evaluate import measure, read_evaluation_data

        data = read_evaluation_data(self._evaluation(split, preferences=True))
        figures = measure(
            self.load(name),
            retrieval=data.retrieval,
            preferences=data.preferences,
            cutoffs=[CUTOFF],
            max_tokens=MAX_TOKENS,
        ).figures
        return {axis: figures[axis] for axis in (f"ndcg@{CUTOFF}", "alignment")}

    def load(self, name: str) -> "Encoder":
        from rankpo_fast.model.load import load_encoder

        config = self._untrained() if name == UNTRAINED else self._trained(name)
        return load_encoder(config, device=self.compute.torch_device(), seed=self.seed)

    def _data(self, name: str) -> Path:
        return self.path / "data" / f"{name}.jsonl"

    def curve(self, name: str) -> list[dict[str, float]]:
        """A training's evaluations: step, ndcg@20 and, in stage 2, alignment."""
        lines = (self.path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [
            {key.removeprefix("eval/"): value for key, value in line.items()}
            for line in map(json.loads, lines)
            if f"eval/ndcg@{CUTOFF}" in line
        ]

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.training_seconds += time.perf_counter() - began


def learn_tokenizer(texts: Sequence[str], max_length: int) -> "PreTrainedTokenizerFast":
    """Byte-level BPE of VOCABULARY tokens: `<s> text </s>`, nothing is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    ends = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        model_max_length=max_length,
    )  # fmt: skip


def write_untrained_model(
    directory: Path, texts: Sequence[str], hidden_size: int, max_length: int = MAX_LENGTH
) -> None:
    """What `--from_scratch` reads, no weights: a tokenizer learnt from `texts`, and the config of a
    one-layer Llama, both for texts of up to `max_length` tokens."""
    from transformers import LlamaConfig

    tokenizer = learn_tokenizer(texts, max_length)
    tokenizer.save_pretrained(directory)
    LlamaConfig(
        architectures=["LlamaModel"],
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=max_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    ).save_pretrained(directory)


def _retrieve(encoder: "Encoder", split: Split, name: str) -> list[list[int]]:
    """For each job the rows of the talents nearest to it."""
    from rankpo_fast.model.encode import encode_texts
    from rankpo_fast.retrieval.search import search

    jobs = encoder.tokenize_queries([job.text for job in split.jobs])
    talents = encoder.tokenize_passages([talent.text for talent in split.talents])
    queries, corpus = (
        encode_texts(encoder, table, max_tokens=MAX_TOKENS, progress=f"{name} {kind}")
        for kind, table in (("jobs", jobs), ("talents", talents))
    )
    return search(queries, corpus, CANDIDATES)[1].tolist()
