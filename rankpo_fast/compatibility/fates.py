"""What becomes of flags that are no mere other names of ours.

RULES    flags of the RankPO authors' scripts, of transformers' TrainingArguments, and of other
         trainers: asked for a flag that the command does not have
VALUES   other trainers' values of flags that we have
A value is text as on the command line; a switch without one is "true". To add a flag, add a line:
`unneeded(why)` takes it and says why it does nothing, `only(values, why, instead)` takes it where
we do the same anyway, `refused(instead)` takes it where it is off; else a rule in `rules`.
"""

from rankpo_fast.compatibility import rules
from rankpo_fast.compatibility.rules import Line, Reading, Rule, only, refused, renamed, unneeded

_BY_TOKENS = "texts go through the model by tokens, see --max_tokens_per_micro_batch"
_CACHED = "token ids are made once and cached, and batches are ready in time"
_LOGGED = "it is in every line of metrics.jsonl"
_MESSAGES = "messages are few and come from the first process"
_ONE_HOME = "the model stays in --output_dir: upload that directory yourself"
_PRECISION = "--bf16 computes in half precision; weights and losses stay fp32"
_RANKS = "torchrun says it, and gradients are summed without DistributedDataParallel"
_LAST = "the last weights are the model; --eval_steps shows which were better"
_CLUSTERS = "acts only with --method cluster, which is not offered: --method sample or topk"

RULES: dict[str, Rule] = {
    # the authors' own
    "deepspeed": rules.deepspeed,
    "normalize_embeddings": only("true", "vectors have length 1", "vectors always have length 1"),
    "use_inbatch_neg": only(
        "true", "the batch's other passages are negatives",
        "the batch's other passages are always negatives; rankpo with --sft_weight 1 "
        "--rankpo_weight 0 sees a row's own passages only",
    ),
    "negatives_cross_device": only(
        "true", "all processes share their negatives",
        "all processes always share their negatives; for less of them run fewer processes",
    ),
    "dataset_num_proc": unneeded(_CACHED),
    "generate_during_eval": refused("an encoder writes no text"),
    "use_fast_tokenizer": only("true", "it is a fast one", "only fast tokenizers are used"),
    "config_name": refused("the config is that of --model_name_or_path"),
    "dtype": only("float32 fp32 auto", "weights are fp32", _PRECISION),
    "torch_dtype": only("float32 fp32 auto", "weights are fp32", _PRECISION),
    "token": refused("set the variable HF_TOKEN, or log in with `hf auth login`"),
    "trust_remote_code": refused("code of model directories is never run"),
    "evaluate_all_checkpoints": only(
        "false", "one model is evaluated", "it is read on the command line of evaluate only"
    ),
    "k": rules.k,
    "index_factory": only("flat", "the search is exact", "the search is always exact"),
    "save_index": refused("`rankpo-fast encode` writes the vectors"),
    "load_index": refused("there is no index to load: vectors are made anew"),
    "output_prefix": rules.output_prefix,
    "num_clusters": unneeded(_CLUSTERS),
    "alpha": unneeded(_CLUSTERS),
    "lambda_": refused(_CLUSTERS),
    # when a command has no flag of that name
    "batch_size": unneeded(_BY_TOKENS),
    "bs": unneeded(_BY_TOKENS),
    "inference_batch_size": unneeded(_BY_TOKENS),
    "output_dir": rules.evaluate_output,
    "overwrite_output_dir": unneeded("the file of --output is replaced"),
    "wandb_project": rules.wandb_project,
    "run_name": rules.run_name,
    "label_smoothing_factor": refused("the loss of stage 1 has no label smoothing"),
    # transformers: how long, how fast
    "warmup_steps": rules.warmup_steps,
    "warmup": rules.warmup_steps,
    "lr_scheduler_kwargs": refused("the course is --lr_scheduler_type with --warmup_ratio"),
    "optim": rules.optimizer,
    "optimizer": rules.optimizer,
    "optim_args": refused("--adam_beta1, --adam_beta2, --adam_epsilon, --weight_decay"),
    "optim_target_modules": refused("the optimizer is AdamW on all weights"),
    "average_tokens_across_devices": unneeded("losses are means over queries, not tokens"),
    "neftune_noise_alpha": refused("no noise is added"),
    "auto_find_batch_size": unneeded("the micro-batch is found, the batch is never cut"),
    "torch_empty_cache_steps": unneeded("micro-batches are of one size, so memory is reused"),
    "grad_cache": only("true", "it is part of each step", "a batch is always cut to fit"),
    "dropout": rules.dropout,
    "scale": rules.scale,
    "train_group_size": rules.group_size,
    "data_seed": refused("--seed is that of the row order too"),
    "full_determinism": refused("--seed fixes a run on one machine"),
    # precision
    "fp16": refused("--bf16 computes in half precision; fp16 is not offered"),
    "half": refused("--bf16 computes in half precision; fp16 is not offered"),
    "mixed_precision": rules.precision,
    "amp": refused("--bf16 computes in half precision"),
    "tf32": refused("set torch.backends.cuda.matmul in your own script; --bf16 is faster"),
    "bf16_full_eval": refused(_PRECISION),
    "fp16_full_eval": refused(_PRECISION),
    "fp16_backend": only("auto", "--bf16 says it", _PRECISION),
    "half_precision_backend": only("auto", "--bf16 says it", _PRECISION),
    "gradient_checkpointing_kwargs": unneeded("layers are recomputed the non-reentrant way"),
    "activation_checkpointing_kwargs": unneeded("layers are recomputed the non-reentrant way"),
    "torch_compile_backend": only("inductor", "it is inductor", "--torch_compile uses inductor"),
    "torch_compile_mode": only("default", "it is default", "--torch_compile uses the default"),
    "liger_kernel_config": refused("--use_liger_kernel takes all that fit the model"),
    "use_cache": refused("an encoder keeps no keys and values"),
    "lora": refused("all weights are trained; LoRA is not offered"),
    "use_lora": refused("all weights are trained; LoRA is not offered"),
    "use_peft": refused("all weights are trained; LoRA is not offered"),
    # logs
    "logging_strategy": only("steps", "--logging_steps says when", "--logging_steps says when"),
    "logging_first_step": unneeded("--logging_steps 1 shows every step"),
    "logging_nan_inf_filter": unneeded("a loss that is not finite stops the run"),
    "log_level": unneeded(_MESSAGES),
    "log_level_replica": unneeded(_MESSAGES),
    "log_on_each_node": unneeded(_MESSAGES),
    "verbose": unneeded(_MESSAGES),
    "disable_tqdm": unneeded("a bar is shown on a terminal only"),
    "include_num_input_tokens_seen": unneeded(_LOGGED),
    "include_tokens_per_second": unneeded(_LOGGED),
    "skip_memory_metrics": unneeded(_LOGGED),
    "trackio_space_id": refused("nothing is sent to a space"),
    "trackio_bucket_id": refused("nothing is sent to a bucket"),
    "trackio_static_space_id": refused("nothing is sent to a space"),
    "debug": refused("--profile_steps shows where time goes"),
    # evaluation in training
    "eval_strategy": rules.eval_strategy,
    "evaluation_strategy": rules.eval_strategy,
    "do_train": only("true", "contrastive and rankpo train", "use `rankpo-fast evaluate`"),
    "do_eval": unneeded("evaluated is what --query_data or --preference_data names"),
    "do_predict": refused("use `rankpo-fast encode`"),
    "eval_delay": refused("--eval_steps says when"),
    "eval_on_start": refused("`rankpo-fast evaluate` measures the model before training"),
    "per_device_eval_batch_size": unneeded(_BY_TOKENS),
    "eval_batch_size": unneeded(_BY_TOKENS),
    "eval_accumulation_steps": unneeded(_BY_TOKENS),
    "eval_do_concat_batches": unneeded(_BY_TOKENS),
    "eval_use_gather_object": unneeded(_BY_TOKENS),
    "batch_eval_metrics": unneeded(_BY_TOKENS),
    "prediction_loss_only": unneeded("evaluation gives nDCG, MRR, recall and alignment"),
    "include_for_metrics": refused("evaluation gives nDCG, MRR, recall and alignment"),
    "load_best_model_at_end": refused(_LAST),
    "metric_for_best_model": refused(_LAST),
    "greater_is_better": refused(_LAST),
    # what is left on disk
    "save_strategy": rules.save_strategy,
    "save_only_model": unneeded(
        "--output_dir holds the model alone, checkpoints also what --resume needs"
    ),
    "save_safetensors": only("true", "it is the format", "weights are always safetensors"),
    "save_on_each_node": refused("the first process writes"),
    "enable_jit_checkpoint": unneeded("SIGTERM saves a checkpoint and stops"),
    "resume_from_checkpoint": rules.resume,
    "resume_from": rules.resume,
    "ignore_data_skip": refused("--resume goes on exactly where the run was"),
    "restore_callback_states_from_checkpoint": unneeded("--resume restores all there is"),
    "push_to_hub": refused(_ONE_HOME),
    "hub_token": refused(_ONE_HOME),
    "hub_private_repo": refused(_ONE_HOME),
    "hub_model_id": refused(_ONE_HOME),
    "hub_strategy": only("every_save", "nothing is uploaded", _ONE_HOME),
    "hub_always_push": refused(_ONE_HOME),
    "hub_revision": refused(_ONE_HOME),
    # data
    "dataloader_drop_last": only(
        "true", "rows that fill no batch wait for the next epoch's order",
        "rows that fill no batch always wait for the next epoch's order",
    ),
    "dataloader_num_workers": unneeded(_CACHED),
    "dataloader_pin_memory": unneeded(_CACHED),
    "dataloader_persistent_workers": unneeded(_CACHED),
    "dataloader_prefetch_factor": unneeded(_CACHED),
    "dataloader_multiprocessing_context": unneeded(_CACHED),
    "dataloader_in_order": unneeded(_CACHED),
    "preprocessing_num_workers": unneeded(_CACHED),
    "num_workers": unneeded(_CACHED),
    "num_proc": unneeded(_CACHED),
    "remove_unused_columns": unneeded("of a row, what the stage needs is read"),
    "label_names": refused("rows hold no labels: see the help of --train_data"),
    "train_sampling_strategy": only(
        "random group_by_length", "rows come in random order, texts of any length are packed",
        "rows come in random order",
    ),
    "group_by_length": unneeded("texts are packed end to end, so lengths need not be alike"),
    "length_column_name": unneeded("lengths are counted"),
    "shuffle": only("true", "rows come in random order", "rows always come in random order"),
    "encode_is_query": rules.encode_is_query,
    # processes and devices
    "use_cpu": rules.cpu,
    "no_cuda": rules.cpu,
    "local_rank": unneeded(_RANKS),
    "ddp_find_unused_parameters": unneeded(_RANKS),
    "ddp_bucket_cap_mb": unneeded(_RANKS),
    "ddp_broadcast_buffers": unneeded(_RANKS),
    "ddp_static_graph": unneeded(_RANKS),
    "ddp_backend": only("nccl gloo", "it is NCCL on cards, else gloo", "NCCL on cards, else gloo"),
    "ddp_timeout": unneeded("torch's own time limit holds"),
    "fsdp": refused("each process holds the whole model"),
    "fsdp_config": refused("each process holds the whole model"),
    "accelerator_config": refused("accelerate is not used"),
    "parallelism_config": refused("accelerate is not used"),
}  # fmt: skip

VALUES: dict[str, Rule] = {
    "device": rules.device,
    "cutoffs": rules.cutoffs,
    "max_steps": rules.max_steps,
    "logging_steps": rules.steps,
    "eval_steps": rules.steps,
    "save_steps": rules.steps,
    "method": rules.method,
    "run_name": rules.run_name,
    "lr_scheduler_type": renamed("lr_scheduler_type", {
        "constant_with_warmup": "constant", "linear_with_warmup": "linear",
        "cosine_with_warmup": "cosine", "warmuplinear": "linear", "warmupcosine": "cosine",
    }),
    "pooling": renamed("pooling", {
        "last_token": "last", "lasttoken": "last", "eos": "last", "avg": "mean", "average": "mean",
        "first": "cls", "CLS": "cls",
    }),
}  # fmt: skip


def reading(name: str, values: list[str], line: Line) -> Reading | None:
    """What flag `name` with these values is to us; None for as it stands, or not known here.

    Raises InputError, without the flag's name, where it is refused.
    """
    rule = (VALUES if name in line.known else RULES).get(name)
    return None if rule is None else rule(values, line)
