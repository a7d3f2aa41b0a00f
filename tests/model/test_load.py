"""What model directory, flags and seed decide; and what cannot be loaded, said by flag."""

import dataclasses
import json
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from rankpo_fast.config import PAPER_SPECIAL_TOKENS, EncoderConfig, ModelConfig
from rankpo_fast.errors import InputError
from rankpo_fast.model.load import load_encoder

CPU = torch.device("cpu")
ST = "sentence_transformers"
OLD_MODULES = [
    {"idx": 0, "name": "0", "path": "0_Transformer", "type": f"{ST}.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{ST}.models.Pooling"},
]
NEW_MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": f"{ST}.base.modules.transformer.Transformer"},
    {
        "idx": 1,
        "name": "1",
        "path": "1_Pooling",
        "type": f"{ST}.sentence_transformer.modules.pooling.Pooling",
    },
]


def load(directory, *, seed=0, **settings):
    config = ModelConfig(str(directory), bf16=False, **settings)
    return load_encoder(config, device=CPU, seed=seed)


def write_json(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def llama_copy(tiny_llama_dir, tmp_path):
    return shutil.copytree(tiny_llama_dir, tmp_path / "llama")


@pytest.fixture
def bert_copy(tiny_bert_dir, tmp_path):
    return shutil.copytree(tiny_bert_dir, tmp_path / "bert")


# --- pooling, prefixes, lengths ---


def test_causal_backbones_pool_the_last_token_and_others_the_mean(tiny_llama_dir, tiny_bert_dir):
    assert load(tiny_llama_dir).settings.pooling == "last"
    assert load(tiny_bert_dir).settings.pooling == "mean"
    assert load(tiny_bert_dir, pooling="cls").settings.pooling == "cls"


@pytest.mark.parametrize("kind", ["Qwen3", "Mistral", "Gemma3Text", "Bloom"])
def test_the_architecture_not_its_name_says_causal(kind, llama_copy):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, n_layer=1, n_head=4,
    )  # fmt: skip
    config.save_pretrained(llama_copy)
    assert load(llama_copy, from_scratch=True).settings.pooling == "last"
    config.is_causal = False  # transformers then lets every token see all
    config.save_pretrained(llama_copy)
    assert load(llama_copy, from_scratch=True).settings.pooling == "mean"


def test_the_old_sentence_transformers_layout_is_read(llama_copy, tmp_path):
    directory = tmp_path / "old"
    directory.mkdir()
    llama_copy.rename(directory / "0_Transformer")
    write_json(directory / "modules.json", OLD_MODULES)
    write_json(directory / "1_Pooling/config.json", {"pooling_mode_cls_token": True})
    write_json(directory / "0_Transformer/sentence_bert_config.json", {"max_seq_length": 48})
    prompts = {"query": "find: ", "passage": "text: "}
    write_json(directory / "config_sentence_transformers.json", {"prompts": prompts})
    settings = load(directory).settings
    assert settings.pooling == "cls"
    assert (settings.query_prefix, settings.passage_prefix) == ("find: ", "text: ")
    assert (settings.max_query_length, settings.max_passage_length) == (48, 48)
    overridden = load(directory, query_prefix="", max_passage_length=64, pooling="last").settings
    assert (overridden.query_prefix, overridden.max_passage_length) == ("", 64)
    assert (overridden.max_query_length, overridden.pooling) == (48, "last")


@pytest.mark.parametrize("mode", ["lasttoken", ["lasttoken"]])
def test_the_new_sentence_transformers_layout_is_read(bert_copy, mode):
    write_json(bert_copy / "modules.json", NEW_MODULES)
    write_json(bert_copy / "1_Pooling/config.json", {"pooling_mode": mode})
    assert load(bert_copy).settings.pooling == "last"


@pytest.mark.parametrize(
    ("modules", "pooling", "named"),
    [
        pytest.param([], {"pooling_mode": "max"}, "1_Pooling", id="max-pooling"),
        pytest.param([], {"pooling_mode": ["mean", "cls"]}, "1_Pooling", id="two-at-once"),
        pytest.param([], {"include_prompt": False}, "1_Pooling", id="prompt-left-out"),
        pytest.param(
            [{"path": "2_Dense", "type": f"{ST}.models.Dense"}], {}, "models.Dense", id="a-layer"
        ),
    ],
)
def test_steps_that_are_not_ours_are_refused_unless_pooling_is_given(
    bert_copy, modules, pooling, named
):
    write_json(bert_copy / "modules.json", NEW_MODULES + modules)
    write_json(bert_copy / "1_Pooling/config.json", pooling)
    with pytest.raises(InputError, match=f"{named}.*--pooling"):
        load(bert_copy)
    assert load(bert_copy, pooling="cls").settings.pooling == "cls"


def test_lengths_end_at_the_positions_there_are(tiny_bert_dir):
    assert load(tiny_bert_dir).settings.max_passage_length == 512  # the paper's is 4096
    with pytest.raises(InputError, match="--max_query_length 513 .* 512 positions"):
        load(tiny_bert_dir, max_query_length=513)


def test_the_padding_row_of_a_position_table_is_no_position(llama_copy):
    from transformers import RobertaConfig

    config = RobertaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=66, pad_token_id=0,
    )  # fmt: skip
    config.save_pretrained(llama_copy)
    encoder = load(llama_copy, from_scratch=True)
    assert encoder.settings.max_query_length == 65
    encoder.embed(encoder.tokenize_queries(["word " * 100]), max_tokens=65)


@pytest.mark.parametrize("name", ["query_prefix", "passage_prefix"])
def test_backslash_n_in_a_prefix_is_a_newline_and_said_once(name):
    """As shells leave it in single quotes, and YAML in none."""
    with pytest.warns(UserWarning, match=f"--{name}: backslash and n in it .* newline") as warned:
        config = EncoderConfig("m", **{name: "Instruct: find\\nQuery: "})
        again = dataclasses.replace(config, pooling="mean")
    assert getattr(again, name) == "Instruct: find\nQuery: "
    assert len(warned) == 1


# --- weights and tokens ---


def test_lengths_that_would_change_neighbours_are_refused(tiny_tokenizer, tmp_path):
    """With "longrope", a text longer than the original positions turns those of all others."""
    from transformers import Phi3Config

    factors = {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    Phi3Config(
        vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
        original_max_position_embeddings=64, pad_token_id=0, architectures=["Phi3Model"],
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors},
    ).save_pretrained(tmp_path)  # fmt: skip
    tiny_tokenizer.save_pretrained(tmp_path)
    flags = {"from_scratch": True, "max_query_length": 64}
    with pytest.raises(InputError, match="--max_passage_length 512: .* give 64 or less"):
        load_encoder(ModelConfig(str(tmp_path), **flags), device=CPU)
    encoder = load_encoder(ModelConfig(str(tmp_path), max_passage_length=64, **flags), device=CPU)
    assert encoder.packed


def test_layers_that_hand_nothing_on_are_padded(tiny_tokenizer, tmp_path):
    from transformers import NemotronConfig

    NemotronConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, pad_token_id=0,
        architectures=["NemotronModel"],
    ).save_pretrained(tmp_path)  # fmt: skip
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="do not hand on where texts end"):
        encoder = load_encoder(ModelConfig(str(tmp_path), from_scratch=True), device=CPU)
    assert not encoder.packed


def test_random_weights_come_from_the_seed_and_leave_the_generator_alone(tiny_llama_dir):
    state = torch.get_rng_state()
    first, same, other = (
        load(tiny_llama_dir, from_scratch=True, seed=seed).state_dict() for seed in (1, 1, 2)
    )
    assert torch.equal(state, torch.get_rng_state())
    name = "backbone.embed_tokens.weight"
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], load(tiny_llama_dir).state_dict()[name])


def test_special_tokens_become_one_id_each_with_a_seeded_row(tiny_llama_dir):
    plain = load(tiny_llama_dir)
    rows = plain.backbone.get_input_embeddings().weight
    first, same, other = (
        load(tiny_llama_dir, special_tokens=["paper", "<own>"], seed=seed) for seed in (1, 1, 2)
    )
    tokens = [*PAPER_SPECIAL_TOKENS, "<own>"]
    ids = first.tokenizer("".join(tokens), add_special_tokens=False)["input_ids"]
    assert ids == list(range(len(rows), len(rows) + len(tokens)))
    new, again, others = (e.backbone.get_input_embeddings().weight for e in (first, same, other))
    assert torch.equal(new[: len(rows)], rows)
    assert torch.equal(new, again)
    assert not torch.equal(new, others)
    assert len(new.detach().unique(dim=0)) == len(new)


def test_a_second_model_keeps_the_special_tokens_of_the_first(tiny_bert_dir, tmp_path):
    load(tiny_bert_dir, special_tokens=["<one>"]).save(tmp_path / "saved")
    encoder = load(tmp_path / "saved", special_tokens=["<two>"])
    assert set(encoder.tokenizer.extra_special_tokens) == {"<one>", "<two>"}
    assert encoder.backbone.get_input_embeddings().num_embeddings == 322


@pytest.mark.parametrize(
    ("vocabulary", "expected"),
    [
        pytest.param({"</s>": 0, "[PAD]": 1, "a": 2}, "[PAD]", id="one-kept-for-padding"),
        pytest.param({"</s>": 0, "a": 1}, "</s>", id="else-end-of-text"),
    ],
)
def test_a_missing_pad_token_is_chosen_and_saved(llama_copy, tmp_path, vocabulary, expected):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.save_pretrained(llama_copy)
    config = json.loads((llama_copy / "config.json").read_text()) | {"pad_token_id": None}
    write_json(llama_copy / "config.json", config)
    load(llama_copy).save(tmp_path / "saved")
    assert load(tmp_path / "saved").tokenizer.pad_token == expected


def test_a_tokenizer_may_be_another_models_and_grows_a_new_embedding(tiny_llama_dir, llama_copy):
    config = json.loads((llama_copy / "config.json").read_text()) | {"vocab_size": 100}
    write_json(llama_copy / "config.json", config)
    for file in llama_copy.glob("*token*"):
        file.unlink()
    settings = {"from_scratch": True, "tokenizer_name": str(tiny_llama_dir)}
    encoder = load(llama_copy, **settings)
    assert encoder.backbone.get_input_embeddings().num_embeddings == 320
    refused(llama_copy, "--model_name_or_path", "no tokenizer", from_scratch=True)


def test_an_encoder_config_is_enough(tiny_bert_dir):
    encoder = load_encoder(EncoderConfig(str(tiny_bert_dir)), device=CPU)
    assert not encoder.training
    assert encoder.dim == 32


# --- what cannot be loaded ---


def refused(directory, *parts, **settings):
    with pytest.raises(InputError) as error:
        load(directory, **settings)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_an_unknown_name_is_refused_with_the_hubs_reason(monkeypatch):
    def offline(name, **_):
        raise OSError(f"no connection while looking for {name}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refused("nobody/nothing", "--model_name_or_path nobody/nothing", "no connection")


def test_a_missing_path_is_refused_without_asking_the_hub(tmp_path):
    refused(tmp_path / "a/b", "--model_name_or_path", "a/b", "no such directory")


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "../nowhere", "a/b/c"])
def test_a_name_that_only_a_path_can_have_never_goes_to_the_hub(monkeypatch, name):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    refused(name, f"--model_name_or_path {name}: no such directory")


def test_a_file_is_no_model_directory(llama_copy):
    path = llama_copy / "config.json"
    refused(path, f"--model_name_or_path {path}: is a file")
    refused(llama_copy, f"--tokenizer_name {path}: is a file", tokenizer_name=str(path))


@pytest.mark.parametrize(
    "content", ["", "{broken", "[]", "{}", '{"added_tokens": [], "model": {"type": "BPE"}}']
)
def test_a_corrupt_tokenizer_is_blamed_on_the_flag_it_came_by(llama_copy, tiny_llama_dir, content):
    (llama_copy / "tokenizer.json").write_text(content)
    refused(llama_copy, f"--model_name_or_path {llama_copy}: no tokenizer can be loaded")
    name = str(llama_copy)
    refused(tiny_llama_dir, f"--tokenizer_name {name}: no tokenizer", tokenizer_name=name)


def test_a_directory_without_safetensors_is_refused(llama_copy):
    (llama_copy / "model.safetensors").rename(llama_copy / "pytorch_model.bin")
    refused(llama_copy, "--model_name_or_path", "model.safetensors")
    assert load(llama_copy, from_scratch=True).dim == 32


def test_a_directory_without_a_config_is_refused(tmp_path):
    refused(tmp_path, "--model_name_or_path", "no config.json")


@pytest.mark.parametrize("content", ["{broken", '{"model_type": "unheard-of"}', '{"hidden": 1}',
                                     '{"model_type": "llama", "hidden_size": "x"}'])  # fmt: skip
def test_an_unusable_config_is_refused(llama_copy, content):
    (llama_copy / "config.json").write_text(content)
    refused(llama_copy, "--model_name_or_path")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "a/../../m.safetensors"])
def test_a_shard_outside_the_directory_is_never_opened(llama_copy, shard):
    shutil.move(llama_copy / "model.safetensors", llama_copy.parent)
    index = {"metadata": {}, "weight_map": {"norm.weight": shard}}
    write_json(llama_copy / "model.safetensors.index.json", index)
    refused(llama_copy, "index.json", shard, "outside")


def test_shards_inside_are_loaded_and_a_missing_one_is_named(llama_copy):
    (llama_copy / "model.safetensors").rename(llama_copy / "part.safetensors")
    names = load_file(llama_copy / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "part.safetensors")}
    write_json(llama_copy / "model.safetensors.index.json", index)
    assert load(llama_copy).dim == 32
    (llama_copy / "part.safetensors").unlink()
    refused(llama_copy, "part.safetensors", "missing")


def test_weights_that_lack_a_tensor_are_refused_rather_than_drawn(llama_copy):
    weights = load_file(llama_copy / "model.safetensors")
    del weights["layers.1.mlp.up_proj.weight"]
    save_file(weights, llama_copy / "model.safetensors", {"format": "pt"})
    refused(llama_copy, "layers.1.mlp.up_proj.weight")


def test_layers_that_config_leaves_out_are_refused_and_heads_are_not(llama_copy):
    path = llama_copy / "model.safetensors"
    save_file(load_file(path) | {"lm_head.weight": torch.zeros(320, 32)}, path, {"format": "pt"})
    load(llama_copy)
    config = json.loads((llama_copy / "config.json").read_text())
    write_json(llama_copy / "config.json", config | {"num_hidden_layers": 1})
    refused(llama_copy, "fewer layers", "layers.1.")


@pytest.mark.parametrize("content", [[], {}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_an_index_that_names_no_files_is_refused(llama_copy, content):
    (llama_copy / "model.safetensors").unlink()
    write_json(llama_copy / "model.safetensors.index.json", content)
    refused(llama_copy, "index.json: weight_map must name")


def test_truncated_weights_are_refused(llama_copy):
    path = llama_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(llama_copy, "--model_name_or_path")


def test_weights_of_another_shape_are_refused(llama_copy):
    config = json.loads((llama_copy / "config.json").read_text()) | {"intermediate_size": 48}
    write_json(llama_copy / "config.json", config)
    refused(llama_copy, "--model_name_or_path", "mlp")


def test_a_tokenizer_with_more_tokens_than_the_model_embeds_is_refused(bert_copy, tmp_path):
    load(bert_copy, special_tokens=["<more>"]).tokenizer.save_pretrained(tmp_path / "tokenizer")
    name = str(tmp_path / "tokenizer")
    refused(bert_copy, "--tokenizer_name", "321", "320", tokenizer_name=name)


@pytest.mark.parametrize(
    ("file", "kind", "written"),
    [
        ("config.json", "AutoModel", "own.Bidirectional"),
        ("config.json", "AutoModel", "somebody/else--own.Bidirectional"),
        ("tokenizer_config.json", "AutoTokenizer", [None, "own.FastTokenizer"]),
    ],
)
def test_a_models_own_code_is_refused_by_its_class(llama_copy, file, kind, written):
    """The type is known to transformers, which would compute something else in silence."""
    path = llama_copy / file
    content = json.loads(path.read_text())
    write_json(path, content | {"auto_map": {"AutoModelForCausalLM": "own.Head"}})
    load(llama_copy)  # a head, which no vector comes from
    write_json(path, content | {"auto_map": {"AutoModelForCausalLM": "own.Head", kind: written}})
    named = written if isinstance(written, str) else written[1]
    refused(llama_copy, f"--model_name_or_path {path}", named, kind, "without auto_map")
    refused(llama_copy, named, from_scratch=True)


def test_an_encoder_decoder_is_refused(llama_copy):
    write_json(llama_copy / "config.json", {"model_type": "t5", "is_encoder_decoder": True})
    refused(llama_copy, "--model_name_or_path", "encoder-decoder")


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    "name", ["flash_attention_4", "flash_attention_3", "flash_attention_2", "varlen_attn", "none"]
)
def test_an_attention_that_cannot_work_here_is_refused_with_one_that_can(
    tiny_bert_dir, name, packing
):
    refused(tiny_bert_dir, "--attn_implementation", name, "sdpa",
            attn_implementation=name, packing=packing)  # fmt: skip


def test_eager_attention_pads_and_says_so(tiny_bert_dir):
    with pytest.warns(UserWarning, match="padded .* eager attention is for padded texts"):
        encoder = load(tiny_bert_dir, attn_implementation="eager")
    assert (encoder.packed, encoder.attention) == (False, "eager")
    assert encoder.backbone.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["auto", "sdpa"])
def test_packing_is_the_default_and_can_be_declined(tiny_llama_dir, name):
    packing = load(tiny_llama_dir, attn_implementation=name)
    padding = load(tiny_llama_dir, attn_implementation=name, packing=False)
    assert (packing.packed, packing.attention) == (True, "sdpa")
    assert (padding.packed, padding.attention) == (False, "sdpa")


def test_a_backbone_that_cannot_be_packed_is_padded_and_named(llama_copy, recwarn):
    from transformers import BloomConfig

    config = BloomConfig(vocab_size=320, hidden_size=32, n_layer=1, n_head=4)
    config.save_pretrained(llama_copy)
    with pytest.warns(UserWarning, match=f"{llama_copy}: .* similar length .* .--packing false"):
        encoder = load(llama_copy, from_scratch=True)
    assert not encoder.packed
    refused(llama_copy, "--attn_implementation varlen_attn", from_scratch=True,
            attn_implementation="varlen_attn")  # fmt: skip
    recwarn.clear()
    load(llama_copy, from_scratch=True, packing=False)
    assert not [w for w in recwarn if "similar length" in str(w.message)]


def test_softcap_is_never_left_out(llama_copy):
    from transformers import Gemma2Config

    config = Gemma2Config(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    config.save_pretrained(llama_copy)
    assert load(llama_copy, from_scratch=True).attention == "sdpa"  # ours, which has it
    assert load(llama_copy, from_scratch=True, packing=False).attention == "eager"


def test_what_dropout_in_attention_costs_on_a_card_is_said(tiny_bert_dir, monkeypatch):
    from rankpo_fast.model import attention
    from rankpo_fast.model.load import _needs, _warn_of_dropout

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(tiny_bert_dir)
    skeleton = AutoModel.from_config(config)
    needs = _needs(config, ModelConfig(str(tiny_bert_dir)), skeleton, torch.device("cuda"))
    kernels = attention.find_kernels(needs)
    assert needs.dropout and kernels[0].name == "sdpa"
    with pytest.warns(UserWarning, match="--disable_dropout true makes it varlen_attn"):
        _warn_of_dropout(needs, kernels, "auto")


def test_checkpointing_a_backbone_that_has_none_is_refused(llama_copy):
    from transformers import MPNetConfig

    config = MPNetConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    config.save_pretrained(llama_copy)
    settings = {"from_scratch": True, "gradient_checkpointing": True}
    refused(llama_copy, "--gradient_checkpointing false", **settings)
