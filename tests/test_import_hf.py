"""`packspeed import hf`: what transformers computes, or one paragraph and nothing under the final name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from packspeed.data.remote import open_dataset
from packspeed.launch.checkpoint.manifest import dump_manifest, read_manifest
from packspeed.launch.convert.export import export_hf
from packspeed.launch.convert.import_weights import import_hf
from packspeed.launch.inference.generate import SamplingSettings, TextGenerator
from packspeed.launch.inference.load_model import find_checkpoint, load_model
from packspeed.model.config import GPTConfig
from packspeed.model.gpt import GPT
from packspeed.model.hf import CHOOSING_BIAS, to_hf_state_dict
from support.commands import runs_cli

pytestmark = pytest.mark.slow  # more than `make check` has time for

SHAPE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "sliding_window": None,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-attention-bias": {"model_type": "llama", "attention_bias": True},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-yarn": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "rope_theta": 1e4,
        },
    },
    "mistral": {},
    "mistral-window": {"model_type": "mistral", "sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_next": {
        "head_dim": 16, "num_experts": 0, "layer_types": ["full_attention"] * 2, "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
    },
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0], "head_dim": 16,
        "attention_bias": True,
    },
    "glm4_moe": {
        "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
        "n_shared_experts": 2, "routed_scaling_factor": 1.8, "use_qk_norm": True, "attention_bias": True,
        "num_mtp_layers": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
    },
    "glm4_moe-plain": {
        "model_type": "glm4_moe", "n_routed_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 16,
        "first_k_dense_replace": 0, "norm_topk_prob": False, "partial_rotary_factor": 1.0, "num_mtp_layers": 0,
    },
}  # fmt: skip


def save_model(folder: Path, kind: str = "llama", **fields: Any) -> Any:
    """Save a random model of transformers, biases included."""
    settings = {"model_type": kind, **SHAPE, **KINDS.get(kind, {}), **fields}
    config = transformers.CONFIG_MAPPING[settings.pop("model_type")](**settings)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.1)
    for name, buffer in model.named_buffers():
        if name.endswith(CHOOSING_BIAS):
            torch.nn.init.normal_(buffer, std=0.1)
    model.save_pretrained(folder)
    return model.eval()


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def assert_same_logits(run: Path, theirs: Any) -> None:
    ours, _ = load_model(find_checkpoint(run))
    tokens = torch.randint(0, 300, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def refusal(folder: Path, code: int) -> str:
    """The error of an import that fails and leaves nothing behind."""
    out = folder.parent / "refused"
    before = set(folder.parent.iterdir())
    error = runs_cli(["import", "hf", str(folder), "--out", str(out)], code=code)
    assert set(folder.parent.iterdir()) == before
    assert len(error.strip().splitlines()) == 1, error
    return error


@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_in_and_go_out_bit_for_bit(tmp_path: Path, kind: str) -> None:
    theirs = save_model(tmp_path / "hf", kind)
    import_hf(tmp_path / "hf", tmp_path / "run")
    assert_same_logits(tmp_path / "run", theirs)
    found = export_hf(tmp_path / "run", tmp_path / "out", tokenizer="bytes")
    before, after = load_file(tmp_path / "hf" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():  # 1 is added to the norms of Qwen3-Next, which rounds them
        rounding = 2**-23 if kind == "qwen3_next" and "norm." in name else 0.0
        torch.testing.assert_close(after[name], value, rtol=0.0, atol=rounding, msg=name)
    assert_same_logits(tmp_path / "run", load(tmp_path / "out"))
    family = "llama" if kind == "mistral" else kind.split("-")[0].replace("_", "")
    assert found["architecture"].lower() == f"{family}forcausallm"


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "glm4_moe", "glm4_moe-plain"])
def test_gradients_of_experts_equal_transformers(tmp_path: Path, kind: str) -> None:
    """Theirs are saved in the place of the weights, so that both are compared under the names in files."""
    theirs = save_model(tmp_path / "hf", kind)
    import_hf(tmp_path / "hf", tmp_path / "run")
    ours, _ = load_model(find_checkpoint(tmp_path / "run"))
    ours.requires_grad_(True)
    window = torch.randint(0, 300, (3, 33))
    logits = theirs(window[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten()).backward()
    ours(window[:, :-1], window[:, 1:]).backward()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(p.grad)
    theirs.save_pretrained(tmp_path / "gradients")
    gradients = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    biases = {n: torch.zeros_like(b) for n, b in ours.named_buffers()}
    mapped = to_hf_state_dict(gradients | biases, ours.config)
    for name, gradient in load_file(tmp_path / "gradients" / "model.safetensors").items():
        if not name.endswith(CHOOSING_BIAS):
            torch.testing.assert_close(mapped[name], gradient, rtol=1e-5, atol=1e-5, msg=f"{name}: {{}}".format)


def test_a_bias_that_the_class_lacks_is_refused() -> None:
    shape: dict[str, Any] = {
        "n_layer": 1,
        "n_head": 2,
        "d_model": 16,
        "vocab_size": 50,
        "max_seq_len": 8,
        "bias": False,
    }
    llama: dict[str, Any] = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu"}
    config = GPTConfig(**shape, **llama, n_expert=4, gate="softmax", balance_rate=0.0)
    model = GPT(config)
    to_hf_state_dict(model.state_dict(), config)
    model.blocks[0].mlp.router.bias[1] = 1e-3
    with pytest.raises(ValueError, match=r"router\.bias is not 0"):
        to_hf_state_dict(model.state_dict(), config)


def edit(folder: Path, **fields: Any) -> None:
    """Set fields of config.json; None removes one."""
    raw = {**json.loads((folder / "config.json").read_text()), **fields}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))


def edit_weights(folder: Path, **changes: Any) -> None:
    """Replace tensors of model.safetensors, names with _ for dots; None removes one."""
    weights = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        key = next((known for known in weights if known.replace(".", "_") == name), name)
        weights.pop(key, None)
        if value is not None:
            weights[key] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_tied_config_with_another_head_is_imported_untied(tmp_path: Path) -> None:
    save_model(tmp_path / "hf")
    edit(tmp_path / "hf", tie_word_embeddings=True)
    output = runs_cli(["import", "hf", str(tmp_path / "hf"), "--out", str(tmp_path / "run")])
    assert "a different lm_head.weight" in output
    assert_same_logits(tmp_path / "run", load(tmp_path / "hf"))
    export_hf(tmp_path / "run", tmp_path / "out", tokenizer="bytes")
    assert_same_logits(tmp_path / "run", load(tmp_path / "out"))


@pytest.mark.parametrize("left_out", ["lm_head.weight", "model.embed_tokens.weight", ""])
def test_a_tied_weight_is_stored_under_either_name_or_both(tmp_path: Path, left_out: str) -> None:
    save_model(tmp_path / "hf", tie_word_embeddings=True)
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights.pop(left_out, None)
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    assert import_hf(tmp_path / "hf", tmp_path / "run")["tied"]
    assert_same_logits(tmp_path / "run", load(tmp_path / "hf"))


def test_one_file_wins_over_an_index_as_in_transformers(tmp_path: Path) -> None:
    theirs = save_model(tmp_path / "hf")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    output = runs_cli(["import", "hf", str(tmp_path / "hf"), "--out", str(tmp_path / "run")])
    assert "and the files of model.safetensors.index.json were ignored" in output
    assert_same_logits(tmp_path / "run", theirs)


NAN = torch.full((32,), torch.nan)
INFINITE = torch.full((32,), torch.inf)


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"model_norm_weight": NAN}, 1, "model.norm.weight has values that are NaN or infinite"),
        ({"model_norm_weight": INFINITE}, 1, "model.norm.weight has values that are NaN or infinite"),
        ({"model_norm_weight": torch.ones(32).double()}, 2, "model.norm.weight has the type F64"),
        ({"model_norm_weight": torch.ones(32).to(torch.float8_e4m3fn)}, 2, "model.norm.weight has the type F8_E4M3"),
        ({"model_norm_weight": torch.ones(32).int()}, 2, "model.norm.weight has the type I32"),
        ({"model_norm_weight": None}, 2, "missing ['model.norm.weight']"),
        ({"score": torch.ones(2)}, 2, "left over ['score']"),
        ({"lm_head_weight": torch.ones(299, 32)}, 2, "lm_head.weight has the shape [299, 32], but [300, 32] accord"),
        ({"lm_head_weight": torch.ones(300, 31)}, 2, "lm_head.weight has the shape [300, 31]"),
        ({"lm_head_weight": torch.ones(300)}, 2, "lm_head.weight has the shape [300]"),
        ({"model_norm_weight": torch.ones(32, 1)}, 2, "model.norm.weight has the shape [32, 1]"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], code: int, message: str
) -> None:
    save_model(tmp_path / "hf")
    edit_weights(tmp_path / "hf", **changes)
    assert message in refusal(tmp_path / "hf", code)


@pytest.mark.parametrize("bytes_left", [0, 5, 100, 3000, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, bytes_left: int) -> None:
    save_model(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:bytes_left])
    assert "cannot be read as a safetensors file" in refusal(tmp_path / "hf", 1)


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    save_model(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in refusal(tmp_path / "hf", 1)


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "whole")
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    first = load_file(shards[0])
    shutil.move(shards[1], tmp_path / "away")
    assert f"1 of {len(shards)} weight files in model.safetensors.index.json are missing: {shards[1].name}" in refusal(
        tmp_path / "hf", 1
    )
    shutil.copy(shards[0], shards[1])  # one shard under two names
    assert f"{next(iter(first))} is also in {shards[0].name}" in refusal(tmp_path / "hf", 1)
    shutil.move(tmp_path / "away", shards[1])
    index = tmp_path / "hf" / "model.safetensors.index.json"
    content = index.read_text()
    for damage in ("", "[1]", "null", '{"weight_map": 3}', '{"weight_map": {"a": {}}}', "[" * 100_000, content[:-20]):
        index.write_text(damage)
        assert "model" in refusal(tmp_path / "hf", 1)
    index.write_text(json.dumps({"weight_map": {"a": "../whole/model.safetensors"}}))
    assert "outside its folder" in refusal(tmp_path / "hf", 1)
    index.write_text(content)
    import_hf(tmp_path / "hf", tmp_path / "run")
    assert_same_logits(tmp_path / "run", model)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", '"gpt2"', "{}", "[" * 100_000, "\ufeff{}", '{"a": 1}'])
def test_what_is_no_config_is_refused(tmp_path: Path, content: str) -> None:
    save_model(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(content)
    assert "config.json: " in refusal(tmp_path / "hf", 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": None}, "has the shape [300, 32], but [300, 4096] according"),
        ({"num_hidden_layers": None}, "config.json has 32 layers"),
        ({"num_hidden_layers": 2**30}, "layers, but the weight files contain only"),
        ({"num_hidden_layers": 3}, "missing ['model.layers.2"),
        ({"vocab_size": None}, "but [32000, 32] according"),
        ({"num_attention_heads": 3}, "n_head"),
        ({"model_type": "gemma"}, "model_type = 'gemma': only models of the types gpt2, llama, mistral, "),
        ({"model_type": "qwen2"}, "missing ['model.layers.0.self_attn.k_proj.bias'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ],
)
def test_configs_of_other_models_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    save_model(tmp_path / "hf")
    edit(tmp_path / "hf", **fields)
    assert message in refusal(tmp_path / "hf", 2)


def test_an_adapter_is_named(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "adapter_config.json").write_text("{}")
    assert "merge it into its base model" in refusal(tmp_path / "hf", 2)


# ---- tokenizers


def save_tokenizer(
    folder: Path, specials: tuple[str, ...] = ("<s>", "</s>"), before: str | None = "<s>", **settings: Any
) -> tokenizers.Tokenizer:
    """Save a byte-level BPE of 300 tokens or more, which puts `before` before a text. settings: of its config."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    made.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 50], trainer)
    made.add_special_tokens(list(specials))
    if before:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{before} $A", pair=f"{before} $A {before} $B", special_tokens=[(before, made.token_to_id(before))]
        )
    made.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return made


def prepared(folder: Path, run: Path, *options: str) -> Path:
    """Prepare a dataset as the run file says."""
    (folder / "text.txt").write_text("the quick brown fox\n" * 50)
    command = ["prepare", str(folder / "text.txt"), "--tokenizer", str(run / "tokenizer" / "tokenizer.json"), *options]
    runs_cli([*command, "--out", str(folder / "tokens"), "--val-fraction", "0"])
    return folder / "tokens"


def use_data(run: Path, tokens: Path) -> None:
    """Let the checkpoint name a dataset, as those of training do."""
    checkpoint = find_checkpoint(run)
    manifest = read_manifest(checkpoint)
    manifest["config"]["data"] = {"path": str(tokens)}
    (checkpoint / "packspeed.json").write_text(dump_manifest(manifest))


@pytest.mark.parametrize("bos", [True, False])
def test_bos_is_where_training_has_it(tmp_path: Path, bos: bool) -> None:
    """Llama's tokenizer puts <s> first. The run, its prompts and its export do, if its documents begin with it."""
    save_model(tmp_path / "hf")
    save_tokenizer(tmp_path / "hf")
    output = runs_cli(["import", "hf", str(tmp_path / "hf"), "--out", str(tmp_path / "run")])
    assert "documents begin with <s> and end with </s>: prepare them with --bos" in output
    assert "tokenizer.json --bos\n" in (tmp_path / "run" / "run.yaml").read_text()
    tokens = prepared(tmp_path, tmp_path / "run", *(["--bos"] if bos else []))
    assert (open_dataset(str(tokens)).read("train", 0, 1)[0] == 0) is np.bool_(bos)
    use_data(tmp_path / "run", tokens)
    export_hf(tmp_path / "run", tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    generator = TextGenerator(tmp_path / "run")
    assert generator.prompt_ids("the dog") == [0] * bos + generator.tokenizer.encode("the dog")
    assert theirs("the dog")["input_ids"] == generator.prompt_ids("the dog")
    assert theirs("", add_special_tokens=False)["input_ids"] == []
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0 if bos else 1, 1)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0 if bos else 1, 1)


def test_an_import_without_data_keeps_bos(tmp_path: Path) -> None:
    save_model(tmp_path / "hf")
    theirs = save_tokenizer(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "run")
    assert TextGenerator(tmp_path / "run").prompt_ids("the dog") == theirs.encode("the dog").ids
    export_hf(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "hf" / "tokenizer.json").read_bytes()


def test_bos_by_the_settings_alone(tmp_path: Path) -> None:
    save_model(tmp_path / "hf")
    save_tokenizer(tmp_path / "hf", before=None, bos_token="<s>", eos_token="</s>", add_bos_token=True)
    assert "documents begin with <s> and end with </s>: prepare them with --bos" in " ".join(
        import_hf(tmp_path / "hf", tmp_path / "run")["notes"]
    )
    export_hf(tmp_path / "run", tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("the dog")["input_ids"] == TextGenerator(tmp_path / "run").prompt_ids("the dog")


def test_other_templates_are_named(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", vocab_size=301)
    made = save_tokenizer(tmp_path / "hf", ("[CLS]",), before=None)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] <s> $A </s>", special_tokens=[("[CLS]", 300), ("<s>", 0), ("</s>", 1)]
    )
    made.save(str(tmp_path / "hf" / "tokenizer.json"))
    notes = import_hf(tmp_path / "hf", tmp_path / "run")["notes"]
    assert "its tokenizer adds [CLS] around a text, but runs and exports do not" in notes
    export_hf(tmp_path / "run", tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("the dog")["input_ids"] == TextGenerator(tmp_path / "run").prompt_ids("the dog")


def test_an_export_has_no_dropout_truncation_or_padding(tmp_path: Path) -> None:
    save_model(tmp_path / "hf")
    made = save_tokenizer(tmp_path / "hf", before=None)
    made.model.dropout = 0.9
    made.enable_truncation(3)
    made.enable_padding(length=50)
    made.save(str(tmp_path / "hf" / "tokenizer.json"))
    import_hf(tmp_path / "hf", tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "out")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), TextGenerator(tmp_path / "run").tokenizer
    text = "the quick brown fox " * 5
    assert theirs(text)["input_ids"] == ours.encode(text)


@pytest.mark.parametrize("where", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_eos_is_what_the_makers_name(tmp_path: Path, where: str) -> None:
    """The tokenizer also has <|endoftext|>, which would be the first guess."""
    save_model(tmp_path / "hf", vocab_size=301, eos_token_id=1 if where == "config.json" else None)
    (tmp_path / "hf" / "generation_config.json").unlink()
    save_tokenizer(tmp_path / "hf", ("<|endoftext|>",), None)
    if where != "config.json":
        name = "eos_token" if where == "tokenizer_config.json" else "eos_token_id"
        (tmp_path / "hf" / where).write_text(json.dumps({name: "</s>" if name == "eos_token" else 1}))
    assert "documents end with </s>" in import_hf(tmp_path / "hf", tmp_path / "run")["notes"]
    tokens = prepared(tmp_path, tmp_path / "run")
    assert open_dataset(str(tokens)).eot_id == 1
    export_hf(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "</s>"


def test_several_eos_ids_end_a_text_and_go_out(tmp_path: Path) -> None:
    """Greedy text is transformers', which stops at each of them."""
    save_model(tmp_path / "hf")
    save_tokenizer(tmp_path / "hf", before=None)
    import_hf(tmp_path / "hf", tmp_path / "plain")
    generator = TextGenerator(tmp_path / "plain")
    greedy = SamplingSettings(max_new_tokens=12, temperature=0)
    (free,) = generator.generate(["the dog"], greedy)
    drawn = load(tmp_path / "hf").generate(torch.tensor([generator.prompt_ids("the dog")]), max_new_tokens=12)[0]
    stop = int(drawn[-4])
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, stop]}))
    import_hf(tmp_path / "hf", tmp_path / "run")
    generator = TextGenerator(tmp_path / "run")
    prompt = torch.tensor([generator.prompt_ids("the dog")])
    theirs = load(tmp_path / "hf").generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.size(1) :].tolist()
    assert theirs[-1] == stop
    (ours,) = generator.generate(["the dog"], greedy)
    assert ours.text == generator.tokenizer.decode(theirs[:-1])
    assert free.tokens > ours.tokens
    export_hf(tmp_path / "run", tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == [1, stop]


def test_rows_without_a_token_have_no_text(tmp_path: Path) -> None:
    """More rows than tokens, as in Qwen's models: such an id may be drawn, and transformers decodes it to nothing."""
    save_model(tmp_path / "hf", vocab_size=320)
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["lm_head.weight"][:300] = 0.0
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(tmp_path / "hf", before=None)
    import_hf(tmp_path / "hf", tmp_path / "run")
    pieces: list[str] = []
    settings = SamplingSettings(max_new_tokens=5, temperature=0)
    (ours,) = TextGenerator(tmp_path / "run").generate(["the dog"], settings, on_text=pieces.append)
    assert (ours.text, ours.tokens, "".join(pieces)) == ("", 5, "")
    export_hf(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 320


def test_a_tokenizer_with_more_ids_than_rows_is_named(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    ids = save_tokenizer(tmp_path / "hf", ("[PAD]",)).get_vocab_size()
    save_model(tmp_path / "hf", vocab_size=ids - 1)
    output = runs_cli(["import", "hf", str(tmp_path / "hf"), "--out", str(tmp_path / "run")])
    assert f"because it has {ids} tokens, but the model only {ids - 1}" in output
    assert not (tmp_path / "run" / "tokenizer").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {}}', "version https://git-lfs.github.com/spec/v1\n"])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    save_model(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text(content)
    output = runs_cli(["import", "hf", str(tmp_path / "hf"), "--out", str(tmp_path / "run")])
    assert "note: its tokenizer was not imported" in output
