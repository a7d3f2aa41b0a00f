"""Other names of our flags and commands, as people and other trainers write them.

ALIASES and COMMANDS   ours: the names that mean it; of several flags the first that the command has
HINTS, COMMAND_HINTS   names that could mean several things: what the error then says
Names have underscores; dashes are read as these. To add a name, add it to its line.
"""

import re
from collections.abc import Set

from rankpo_fast.errors import InputError

ALIASES = {
    "base_model_name_or_path": "base base_model",
    "model_name_or_path": "model model_name model_path model_id model_dir base_model encoder "
    "pretrained_model_name_or_path embedder_name_or_path checkpoint_path",
    "tokenizer_name": "tokenizer tokenizer_path tokenizer_name_or_path",
    "train_data": "data train train_file train_files train_path train_data_path train_dataset "
    "train_dir dataset dataset_path data_path input input_file training_data",
    "input": "input_file in data file texts input_path encode_in_path",
    "output_dir": "out output out_dir save_dir output_path save_path",
    "output": "out output_file output_path result_file results",
    "output_file": "out output output_path encoded_save_path",
    "per_device_train_batch_size": "bs batch_size batch train_batch_size per_device_batch_size "
    "per_gpu_train_batch_size",
    "gradient_accumulation_steps": "grad_accum grad_accum_steps gradient_accumulation accum "
    "accumulation_steps accumulate_grad_batches",
    "num_train_epochs": "epoch epochs num_epochs n_epochs max_epochs train_epochs",
    "max_steps": "steps train_steps num_steps total_steps num_train_steps max_train_steps",
    "learning_rate": "lr max_lr peak_lr",
    "lr_scheduler_type": "scheduler lr_scheduler lr_schedule scheduler_type",
    "warmup_ratio": "warmup_fraction warmup_proportion",
    "optim": "optimizer",
    "weight_decay": "wd",
    "max_grad_norm": "grad_clip clip_grad_norm gradient_clip_val max_norm clip grad_norm",
    "temperature": "temp tau",
    "num_negatives": "negatives n_negatives num_neg num_hard_negatives hard_negatives "
    "negatives_per_query negative_number num_negatives_per_query",
    "max_query_length": "query_max_len query_max_length max_query_len q_max_len query_length "
    "embedder_query_max_length",
    "max_passage_length": "passage_max_len passage_max_length max_passage_len p_max_len "
    "embedder_passage_max_length passage_length max_doc_length max_document_length doc_max_length",
    "query_prefix": "query_instruction query_instruction_for_retrieval query_prompt",
    "passage_prefix": "passage_instruction passage_instruction_for_retrieval passage_prompt "
    "document_prefix doc_prefix corpus_prefix",
    "pooling": "pooler pooling_mode pooling_method sentence_pooling_method pooling_strategy",
    "append_eos": "append_eos_token",
    "bf16": "use_bf16",
    "device": "devices",
    "lora_rank": "lora_r",
    "lora_targets": "lora_target_modules target_modules",
    "lora_modules_to_save": "modules_to_save",
    "lora_dora": "use_dora dora",
    "special_tokens": "additional_special_tokens",
    "gradient_checkpointing": "grad_checkpointing activation_checkpointing grad_ckpt",
    "torch_compile": "compile",
    "use_liger_kernel": "liger use_liger",
    "max_tokens_per_micro_batch": "max_tokens token_budget mini_batch_num_tokens",
    "logging_steps": "log_every log_steps log_interval logging_interval print_freq",
    "eval_steps": "eval_every eval_freq eval_interval",
    "save_steps": "save_every save_freq checkpoint_every",
    "save_total_limit": "keep_checkpoints max_checkpoints",
    "overwrite_output_dir": "overwrite force",
    "report_to": "reporter report_with log_with",
    "project": "project_name",
    "run_name": "wandb_name wandb_run_name experiment_name exp_name",
    "seed": "random_seed",
    "deterministic": "full_determinism determinism",
    "query_data": "queries query_file",
    "corpus_data": "corpus corpus_file candidate_pool",
    "cutoffs": "ks k_values eval_k",
    "search_range": "range_for_sampling ranks",
    "text_key": "text_field text_column column field content_key",
    "loss_type": "loss",
    "reference_model_name_or_path": "reference_model ref_model ref_model_name_or_path",
    "guide_model_name_or_path": "guide guide_model guide_name_or_path",
    "matryoshka_dims": "matryoshka matryoshka_dimensions nested_dims",
}

HINTS = {
    "max_length max_len max_seq_length max_seq_len seq_len seq_length model_max_length "
    "cutoff_len": "--max_query_length and --max_passage_length",
    "prefix prompt instruction prompts": "--query_prefix and --passage_prefix",
    "warmup_epochs": "--warmup_ratio, a share of all steps",
    "eval_data dev_data test_data eval_file eval_dataset validation_data validation_file "
    "eval_path": "--query_data (with --corpus_data) or --preference_data",
    "mini_batch_size sub_batch_size chunk_size micro_batch_size gc_chunk_size gc_q_chunk_size "
    "gc_p_chunk_size": "--max_tokens_per_micro_batch, in tokens, or leave it to be found",
    "top_k topk": "--cutoffs to measure; --search_range and --num_negatives to mine",
    "checkpoint ckpt": "--model_name_or_path for weights to start from, --resume for a run to go "
    "on with",
    "learnable_temperature learn_temperature trainable_temperature logit_scale "
    "learnable_scale": "--temperature_learning_rate, the peak rate at which it is learnt",
    "symmetric bidirectional": "--directions query_to_passage passage_to_query --partition "
    "per_direction",
    "margin_strategy absolute_margin relative_margin": "--false_negative_margin and --margin_type",
    "name": "--model_name_or_path, --run_name or --output_dir",
    "betas": "--adam_beta1 and --adam_beta2",
    "eps": "--adam_epsilon",
    "gamma margin": "--gamma_beta_ratio (gamma / beta) in rankpo",
}

COMMANDS = {
    "label": "labels labelling labeling",
    "contrastive": "run_contrastive stage1 stage_1 info_nce infonce",
    "rankpo": "run_rankpo stage2 stage_2 simrankpo align",
    "evaluate": "eval evaluation test run_evaluate",
    "mine": "mining mine_hard_negatives hard_negatives get_hard_negatives hn_mine",
    "encode": "embed embeddings encode_texts",
    "merge": "soup interpolate lerp slerp merge_models wise_ft",
    "bench": "benchmark",
}
COMMAND_HINTS = {
    "train fit finetune fine_tune training trainer run":
        "which stage? contrastive trains on queries with passages (stage 1), rankpo on preferences "
        "(stage 2)",
    "sft": "use rankpo --sft_weight 1 --rankpo_weight 0",
    "dpo simpo orpo kto preference": "an encoder is aligned by rankpo, from pairs of passages",
    "index search retrieve": "encode writes vectors, which any search takes; evaluate searches",
    "predict inference infer": "encode writes vectors, evaluate measures them",
    "get_random_negatives": "mine --search_range 0-N draws from the N best ranked passages",
    "rerank": "rank passages by the vectors that encode writes",
    "export push upload save":
        "--output_dir of a run loads in transformers and sentence-transformers as it is",
}  # fmt: skip


def alias(name: str, known: Set[str]) -> str | None:
    """The flag among `known` that is called `name` elsewhere."""
    return next((ours for ours in _OURS.get(name, ()) if ours in known), None)


def hint(name: str, known: Set[str]) -> str | None:
    """The flags, some of them among `known`, that could be meant by `name`."""
    text = _HINTS.get(name)
    return text if text and known & set(re.findall(r"--(\w+)", text)) else None


def meant_command(name: str) -> str | None:
    """Our command that others call `name`; an InputError where it could be several."""
    key = name.lower().replace("-", "_").removesuffix(".py")
    if key in _COMMAND_HINTS:
        raise InputError(f"there is no command {name}: {_COMMAND_HINTS[key]}")
    return _COMMANDS.get(key)


def _by_name(table: dict[str, str]) -> dict[str, str]:
    """{"a b": "x"} -> {"a": "x", "b": "x"}."""
    return {name: text for names, text in table.items() for name in names.split()}


_HINTS, _COMMAND_HINTS = _by_name(HINTS), _by_name(COMMAND_HINTS)
_COMMANDS = {name: ours for ours, names in COMMANDS.items() for name in names.split()}
_OURS: dict[str, list[str]] = {}
for _ours, _names in ALIASES.items():
    for _name in _names.split():
        _OURS.setdefault(_name, []).append(_ours)
