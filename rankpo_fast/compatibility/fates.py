"""What becomes of flags that are no mere other names of ours.

RULES    flags of the RankPO authors' scripts, of transformers' TrainingArguments, and of other
         trainers: asked for a flag that the command does not have
VALUES   other trainers' values of flags that we have
A value is text as on the command line; a switch without one is "true". To add a flag, add a line,
or its name to that of others with the same fate:
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
_WHOLE = "a file is encoded whole: give parts of it as files of their own"
_CLUSTERS = "--decay is the weight of a candidate for each better one of its cluster"


def _each(names: str, rule: Rule) -> dict[str, Rule]:
    """One fate of several flags."""
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    # the authors' own
    "deepspeed": rules.deepspeed,
    "normalize_embeddings": only("true", "vectors have length 1", "vectors always have length 1"),
    "use_inbatch_neg": only(
        "true", "the batch's other passages are negatives",
        "the batch's other passages are always negatives; rankpo with --sft_weight 1 "
        "--rankpo_weight 0 sees a row's own passages only",
    ),
    **_each("negatives_cross_device negatives_x_device", only(
        "true", "all processes share their negatives",
        "all processes always share their negatives; for less of them run fewer processes",
    )),
    "generate_during_eval": refused("an encoder writes no text"),
    "use_slow_tokenizer": refused("only fast tokenizers are used"),
    "use_fast_tokenizer": only("true", "it is a fast one", "only fast tokenizers are used"),
    "config_name": refused("the config is that of --model_name_or_path"),
    **_each("dtype torch_dtype", only("float32 fp32 auto", "weights are fp32", _PRECISION)),
    "token": refused("set the variable HF_TOKEN, or log in with `hf auth login`"),
    "evaluate_all_checkpoints": only(
        "false", "one model is evaluated", "it is read on the command line of evaluate only"
    ),
    "k": rules.k,
    "index_factory": only("flat", "the search is exact", "the search is always exact"),
    "save_index": refused("`rankpo-fast encode` writes the vectors"),
    "load_index": refused("there is no index to load: vectors are made anew"),
    "output_prefix": rules.output_prefix,
    "num_clusters": rules.num_clusters,
    "alpha": refused(_CLUSTERS),
    "lambda_": refused(_CLUSTERS),
    # when a command has no flag of that name
    **_each("batch_size bs inference_batch_size embedder_batch_size", unneeded(_BY_TOKENS)),
    "output_dir": rules.evaluate_output,
    "overwrite_output_dir": unneeded("the file of --output is replaced"),
    "wandb_project": rules.wandb_project,
    "run_name": rules.run_name,
    "label_smoothing_factor": refused(
        "it smooths labels of classes, which no loss here has; --label_smoothing smooths over the "
        "candidates in contrastive, and is the share of wrong preferences in rankpo"
    ),
    # FlagEmbedding, Tevatron
    **_each("cache_path data_cache_dir",
            unneeded("rows are read as they are, token ids are kept in --cache_dir")),
    "dataset_name": rules.dataset_name,
    "same_dataset_within_batch": rules.same_dataset,
    "small_threshold": refused("each file of --train_data is a dataset of its own"),
    "drop_threshold": refused("no file of --train_data is dropped"),
    "max_example_num_per_dataset": only(
        "100000000", "all rows are read", "all rows are read: give a shorter file"
    ),
    "shuffle_ratio": refused("sentences stay in their order"),
    "positive_passage_no_shuffle": refused("one of a row's positives is drawn each time"),
    "negative_passage_no_shuffle": refused("--num_negatives of them are drawn each time"),
    "passage_field_separator": only("false", "a space joins title and text",
                                    "a space joins title and text"),
    "pad_to_multiple_of": unneeded("texts are packed end to end, and padding changes no vector"),
    **_each("query_instruction_format query_instruction_format_for_retrieval",
            rules.instruction_format("query_prefix")),
    "passage_instruction_format": rules.instruction_format("passage_prefix"),
    "examples_for_task": refused("put them into --query_prefix"),
    "examples_instruction_format": unneeded("acts only with examples, see --query_prefix"),
    "train_n_passages": rules.group_size,
    "knowledge_distillation": refused(
        "scores of a teacher are learned by rankpo, from --teacher_data"
    ),
    "kd_loss_type": unneeded("acts only with knowledge distillation, see --teacher_loss of rankpo"),
    "use_mrl": refused("--matryoshka_dims of contrastive trains vectors cut short"),
    "mrl_dims": unneeded("acts only with use_mrl, for which --matryoshka_dims is here"),
    "normalize": only("true", "vectors have length 1", "vectors always have length 1"),
    "fix_position_embedding": refused("all weights are trained"),
    "untie_encoder": refused("one encoder reads queries and passages"),
    "add_pooler": refused("the vector is the pooled state, without a layer behind it"),
    **_each("projection_in_dim projection_out_dim",
            unneeded("acts only with a layer behind the pooling, which is not there")),
    "target_model_path": refused("--output_dir is where the model goes"),
    "embedder_model_class": unneeded("the architecture is read from config.json"),
    "use_gpu_for_searching": unneeded("the search runs where the model does, see --device"),
    "search_batch_size": unneeded("the search takes as many queries at once as fit"),
    "encode_num_shard": only("1", "the file is encoded whole", _WHOLE),
    "encode_shard_index": only("0", "the file is encoded whole", _WHOLE),
    "do_encode": refused("use `rankpo-fast encode`"),
    # transformers: how long, how fast
    "warmup_steps": rules.warmup_steps,
    "warmup": rules.warmup_steps,
    "lr_scheduler_kwargs": refused("the course is --lr_scheduler_type with --warmup_ratio"),
    "optim_args": refused("--adam_beta1, --adam_beta2, --adam_epsilon, --weight_decay"),
    "optim_target_modules": refused("an optimizer takes all weights that are trained"),
    "average_tokens_across_devices": unneeded("losses are means over queries, not tokens"),
    "neftune_noise_alpha": refused("no noise is added"),
    "auto_find_batch_size": unneeded("the micro-batch is found, the batch is never cut"),
    "torch_empty_cache_steps": unneeded("micro-batches are of one size, so memory is reused"),
    "grad_cache": only("true", "it is part of each step", "a batch is always cut to fit"),
    "dropout": rules.dropout,
    "scale": rules.scale,
    "train_group_size": rules.group_size,
    "data_seed": refused("--seed is that of the row order too"),
    # precision
    **_each("fp16 use_fp16 half",
            refused("--bf16 computes in half precision; fp16 is not offered")),
    "mixed_precision": rules.precision,
    "amp": refused("--bf16 computes in half precision"),
    "tf32": refused("set torch.backends.cuda.matmul in your own script; --bf16 is faster"),
    **_each("bf16_full_eval fp16_full_eval", refused(_PRECISION)),
    **_each("fp16_backend half_precision_backend", only("auto", "--bf16 says it", _PRECISION)),
    **_each("gradient_checkpointing_kwargs activation_checkpointing_kwargs",
            unneeded("layers are recomputed the non-reentrant way")),
    "torch_compile_backend": only("inductor", "it is inductor", "--torch_compile uses inductor"),
    "torch_compile_mode": only("default", "it is default", "--torch_compile uses the default"),
    "liger_kernel_config": refused("--use_liger_kernel takes all that fit the model"),
    "use_cache": refused("an encoder keeps no keys and values"),
    **_each("lora use_lora use_peft", rules.lora),
    **_each("from_peft raw_peft", refused("an adapter's directory is taken as "
                                          "--model_name_or_path, and trained on with --lora_rank")),
    **_each("save_merged_lora_model only_merge_lora_model",
            unneeded("the merged model is saved, and beside it the adapter")),
    "peft_model_path": refused("an adapter's directory is taken as --model_name_or_path"),
    "use_flash_attn": unneeded("--attn_implementation auto takes the fastest that works"),
    # logs
    "logging_strategy": only("steps", "--logging_steps says when", "--logging_steps says when"),
    "logging_first_step": unneeded("--logging_steps 1 shows every step"),
    "logging_nan_inf_filter": unneeded("a loss that is not finite stops the run"),
    **_each("log_level log_level_replica log_on_each_node verbose", unneeded(_MESSAGES)),
    "disable_tqdm": unneeded("a bar is shown on a terminal only"),
    **_each("include_num_input_tokens_seen include_tokens_per_second skip_memory_metrics",
            unneeded(_LOGGED)),
    **_each("trackio_space_id trackio_static_space_id", refused("nothing is sent to a space")),
    "trackio_bucket_id": refused("nothing is sent to a bucket"),
    "debug": refused("--profile_steps shows where time goes"),
    # evaluation in training
    "eval_strategy": rules.eval_strategy,
    "evaluation_strategy": rules.eval_strategy,
    "do_train": only("true", "contrastive and rankpo train", "use `rankpo-fast evaluate`"),
    "do_eval": unneeded("evaluated is what --query_data or --preference_data names"),
    "do_predict": refused("use `rankpo-fast encode`"),
    "eval_delay": refused("--eval_steps says when"),
    "eval_on_start": refused("`rankpo-fast evaluate` measures the model before training"),
    **_each("per_device_eval_batch_size eval_batch_size eval_accumulation_steps "
            "eval_do_concat_batches eval_use_gather_object batch_eval_metrics",
            unneeded(_BY_TOKENS)),
    "prediction_loss_only": unneeded("evaluation gives nDCG, MRR, recall and alignment"),
    "include_for_metrics": refused("evaluation gives nDCG, MRR, recall and alignment"),
    "load_best_model_at_end": refused(
        "--metric_for_best_model and --eval_steps make the best evaluated model the result"
    ),
    "greater_is_better": only("true", "figures are", "figures are the better the higher"),
    "early_stopping_patience": refused("--patience with --metric_for_best_model"),
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
    **_each("push_to_hub hub_token hub_private_repo hub_model_id hub_always_push hub_revision",
            refused(_ONE_HOME)),
    "hub_strategy": only("every_save", "nothing is uploaded", _ONE_HOME),
    # data
    "dataloader_drop_last": only(
        "true", "rows that fill no batch wait for the next epoch's order",
        "rows that fill no batch always wait for the next epoch's order",
    ),
    **_each("dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
            "dataloader_prefetch_factor dataloader_multiprocessing_context "
            "dataloader_in_order preprocessing_num_workers num_workers num_proc "
            "dataset_num_proc dataset_proc_num",
            unneeded(_CACHED)),
    "remove_unused_columns": unneeded("of a row, what the stage needs is read"),
    "label_names": refused("rows hold no labels: see the help of --train_data"),
    "train_sampling_strategy": only(
        "random group_by_length", "rows come in random order, texts of any length are packed",
        "rows come in random order",
    ),
    "group_by_length": unneeded("texts are packed end to end, so lengths need not be alike"),
    "length_column_name": unneeded("lengths are counted"),
    "shuffle": only("true", "rows come in random order", "rows always come in random order"),
    **_each("encode_is_query encode_is_qry", rules.encode_is_query),
    # processes and devices
    "use_cpu": rules.cpu,
    "no_cuda": rules.cpu,
    **_each("local_rank ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
            "ddp_static_graph", unneeded(_RANKS)),
    "ddp_backend": only("nccl gloo", "it is NCCL on GPUs, else gloo", "NCCL on GPUs, else gloo"),
    "ddp_timeout": unneeded("torch's own time limit holds"),
    **_each("fsdp fsdp_config", refused("--shard full (or grad) is FSDP here")),
    **_each("accelerator_config parallelism_config", refused("accelerate is not used")),
}  # fmt: skip

VALUES: dict[str, Rule] = {
    "optim": rules.optimizer,
    "lora_targets": rules.lora_targets,
    "device": rules.device,
    "cutoffs": rules.cutoffs,
    "max_steps": rules.max_steps,
    **_each("logging_steps eval_steps save_steps", rules.steps),
    "method": rules.method,
    "run_name": rules.run_name,
    "lr_scheduler_type": renamed("lr_scheduler_type", {
        "constant_with_warmup": "constant", "linear_with_warmup": "linear",
        "cosine_with_warmup": "cosine", "warmuplinear": "linear", "warmupcosine": "cosine",
    }),
    "pooling": renamed("pooling", {
        "last_token": "last", "lasttoken": "last", "eos": "last", "avg": "mean", "average": "mean",
        "first": "cls",
    }),
}  # fmt: skip


def reading(name: str, values: list[str], line: Line) -> Reading | None:
    """What flag `name` with these values is to us; None for as it stands, or not known here.

    Raises InputError, without the flag's name, where it is refused.
    """
    rule = (VALUES if name in line.known else RULES).get(name)
    return None if rule is None else rule(values, line)
