"""Models out and in: transformers and nanoGPT compute what we do; what nothing may change stays bit for bit."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from packspeed.data.errors import DataError
from packspeed.data.prepare.prepare import prepare
from packspeed.data.text.bpe import train_tokenizer
from packspeed.data.text.ranks import BytesTokenizer, TiktokenTokenizer
from packspeed.data.text.ranks_to_json import tokenizer_json
from packspeed.data.text.tokenizer import Tokenizer, load_tokenizer
from packspeed.launch.checkpoint.manifest import dump_manifest, read_manifest
from packspeed.launch.config.errors import ConfigError, UserError
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.config.run_data import make_run_loader, open_data
from packspeed.launch.convert.export import export_hf
from packspeed.launch.convert.import_weights import import_hf, import_nanogpt
from packspeed.launch.inference.load_model import find_checkpoint, load_model
from support.commands import runs_cli
from support.ranks import run_many
from support.workspace import Workspace, text_of_python

pytestmark = pytest.mark.timeout(900)

ONE_STEP = ("train.steps=1", "eval.every_steps=0", "train.precision=fp32")
LLAMA = (
    "model={n_layer: 2, n_head: 4, n_kv_head: 2, d_model: 32, norm: rmsnorm, position: rope, mlp: swiglu, bias: false"
)
MODELS = {  # run -> (its DeepSpeed file, what it trains, the class that it exports as)
    "out-gpt2": ("zero0", "model={n_layer: 2, n_head: 2, d_model: 32}", "GPT2LMHeadModel"),
    "out-nobias": ("zero1", "model={n_layer: 2, n_head: 2, d_model: 32, bias: false, mlp: gelu}", "GPT2LMHeadModel"),
    "out-llama": ("zero2", LLAMA + ", tie_embeddings: false}", "LlamaForCausalLM"),
    "out-llama-bias": ("zero2_offload", LLAMA.replace("bias: false", "bias: true") + ", d_ff: 96}", "LlamaForCausalLM"),
    "out-qwen2": ("zero1", LLAMA.replace("bias: false", "bias: qkv") + "}", "Qwen2ForCausalLM"),
    "out-qwen3": ("zero3", LLAMA + ", qk_norm: true, head_dim: 16, vocab_size: 300}", "Qwen3ForCausalLM"),
    "out-qwen3-next": (
        "zero2",
        LLAMA + ", qk_norm: true, attention_gate: elementwise, vocab_size: 300}",
        "Qwen3NextForCausalLM",
    ),
    "out-glm4": (
        "zero3",
        LLAMA + ", n_expert: 4, d_expert: 32, n_shared_expert: 1, first_dense: 1, balance_rate: 0.3, vocab_size: 300}",
        "Glm4MoeForCausalLM",
    ),
    "out-mixtral": ("zero0", LLAMA + ", n_expert: 4, gate: softmax, balance_rate: 0}", "MixtralForCausalLM"),
}
BIG = "model={n_layer: 8, n_head: 4, d_model: 256}"  # 26 MB of fp32 weights, at most 1 MB in a matrix
STAGES = ("zero0", "zero1", "zero2", "zero3")


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=256, eos_token_id=256
    )
    return transformers.GPT2LMHeadModel(config)


def llama(**fields: Any) -> Any:
    shape: dict[str, Any] = {
        "vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "rope_theta": 50_000.0,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**shape, **fields}))


def qwen2() -> Any:
    shape: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape))


def nanogpt_state(bias: bool) -> dict[str, Any]:
    """A ckpt.pt as nanoGPT's train.py saves it, compiled: its names, Linear layers and not Conv1D."""
    d, state, torch_generator = 32, dict[str, Any](), torch.Generator().manual_seed(1)
    shapes = {"transformer.wte": (300, d), "transformer.wpe": (64, d), "transformer.ln_f": (d,)}
    for i in range(2):
        h = f"transformer.h.{i}"
        shapes |= {f"{h}.ln_1": (d,), f"{h}.attn.c_attn": (3 * d, d), f"{h}.attn.c_proj": (d, d), f"{h}.ln_2": (d,)}
        shapes |= {f"{h}.mlp.c_fc": (4 * d, d), f"{h}.mlp.c_proj": (d, 4 * d)}
    for name, shape in shapes.items():
        state[f"_orig_mod.{name}.weight"] = torch.randn(shape, generator=torch_generator)
        if bias and name not in ("transformer.wte", "transformer.wpe"):
            state[f"_orig_mod.{name}.bias"] = torch.randn(shape[:1], generator=torch_generator)
    state["_orig_mod.lm_head.weight"] = state["_orig_mod.transformer.wte.weight"]
    shape_arguments = {"n_layer": 2, "n_head": 2, "n_embd": d, "block_size": 64, "vocab_size": 300}
    arguments = {**shape_arguments, "bias": bias, "dropout": 0.0}
    return {"model": state, "optimizer": {}, "model_args": arguments, "iter_num": 5, "best_val_loss": torch.tensor(3.0)}


PACKED = {"out-masked": "document_mask: true", "out-best-fit": "packing: best_fit"}


def prepare_documents(folder: Path) -> Path:
    """A dataset of many short documents."""
    text = text_of_python()[:40_000]
    lines = (json.dumps({"text": text[i : i + 10 + i % 20]}) for i in range(0, len(text), 30))
    (folder / "documents.jsonl").write_text("\n".join(lines))
    prepare([str(folder / "documents.jsonl")], folder / "documents", "bytes", val_fraction=0.05)
    return folder / "documents"


@pytest.fixture(scope="module")
def runs(workspace: Workspace) -> Workspace:
    """Everything trained in one launch on two ranks: fresh models of each family, and imported ones with lr 0."""
    folder, tokens = workspace.folder, str(workspace.folder / "tokens")
    torch.manual_seed(0)
    gpt2().save_pretrained(folder / "hf-gpt2")
    for name, model in (("hf-llama", llama()), ("hf-qwen2", qwen2())):
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        model.save_pretrained(folder / name, max_shard_size="20KB")
        assert len(list((folder / name).glob("*.safetensors"))) > 2
    torch.save(nanogpt_state(bias=False), folder / "ckpt.pt")
    import_hf(folder / "hf-gpt2", folder / "runs" / "in-gpt2", tokens)
    import_hf(folder / "hf-llama", folder / "runs" / "in-llama", tokens)
    import_hf(folder / "hf-qwen2", folder / "runs" / "in-qwen2", tokens)
    import_nanogpt(folder / "ckpt.pt", folder / "runs" / "in-nanogpt", tokens)
    jobs = [
        workspace.arguments(name, *ONE_STEP, "train.steps=2", "eval.every_steps=1", model, f"deepspeed={stage}")
        for name, (stage, model, _) in MODELS.items()
    ]
    documents = prepare_documents(folder)
    jobs += [
        workspace.arguments(name, *ONE_STEP, LLAMA + "}", f"data={{path: {documents}, seq_len: 32, {key}}}")
        for name, key in PACKED.items()
    ]
    jobs += [workspace.arguments(f"out-big-{stage}", *ONE_STEP, BIG, f"deepspeed={stage}") for stage in STAGES]
    still = (*ONE_STEP, "train.optimizer.lr=0", "train.schedule.name=constant", "train.schedule.warmup_steps=0")
    still += ("train.global_batch_tokens=128", "data.seq_len=32")
    for name, stage in (("in-gpt2", "zero2"), ("in-llama", "zero3"), ("in-nanogpt", "zero0"), ("in-qwen2", "zero1")):
        sets = [part for text in (*still, f"deepspeed={stage}") for part in ("--set", text)]
        jobs.append(["--config", str(folder / "runs" / name / "run.yaml"), *sets])
    codes, output = run_many(folder / "export", jobs)
    assert codes == [0] * len(jobs), output[-6000:]
    assert output.count("resuming from") == 4
    return workspace


def load(folder: Path) -> Any:
    """The model as users load it."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.launch
@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same(runs: Workspace, name: str, tmp_path: Path) -> None:
    run = runs.folder / "runs" / name
    found = export_hf(run, tmp_path / "hf")
    assert found["architecture"] == MODELS[name][2]
    theirs, tokenizer = load(tmp_path / "hf"), AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (type(theirs).__name__, theirs.dtype) == (MODELS[name][2], torch.float32)
    ours, _ = load_model(find_checkpoint(run))
    text = text_of_python()[:2000]
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    tokens = torch.tensor(ids[: 32 * 8]).view(8, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=1e-5, atol=1e-5)
    prompt = tokenizer("def f", return_tensors="pt")
    written = theirs.generate(**prompt, max_new_tokens=20, do_sample=False, pad_token_id=256)
    result = runs_cli(
        ["generate", str(run), "--prompt", "def f", "--temperature", "0", "--max-new-tokens", "20", "--json"]
    )
    assert tokenizer.decode(written[0], skip_special_tokens=True) == "def f" + json.loads(result)["text"]


@pytest.mark.launch
@pytest.mark.parametrize("name", PACKED)
def test_a_run_with_packed_documents_goes_out(runs: Workspace, name: str, tmp_path: Path) -> None:
    """transformers computes the same on any row, and on each document alone what training computed inside a row."""
    export_hf(runs.folder / "runs" / name, tmp_path / "hf")
    assert "tokens attended only to their own document" in (tmp_path / "hf" / "README.md").read_text()
    ours, theirs = load_model(find_checkpoint(runs.folder / "runs" / name))[0], load(tmp_path / "hf")
    run = load_run_file(runs.folder / "runs" / name / "config.yaml")
    batch = make_run_loader(run, open_data(run)).batch(0, 0, 1)
    assert batch.documents is not None
    assert len(batch.documents) > 4
    rows = torch.from_numpy(batch.inputs.astype(np.int64))
    positions, lengths = torch.from_numpy(batch.positions).long(), batch.documents.tolist()
    with torch.no_grad():
        torch.testing.assert_close(theirs(rows).logits, ours(rows), rtol=1e-5, atol=1e-5)
        packed = ours(rows, positions=positions, documents=lengths).flatten(0, 1).split(lengths)
        for document, logits in zip(rows.flatten().split(lengths), packed, strict=True):
            torch.testing.assert_close(theirs(document[None]).logits[0], logits, rtol=1e-5, atol=1e-5)


@pytest.mark.launch
def test_imported_models_come_back_bit_for_bit(runs: Workspace, tmp_path: Path) -> None:
    """Through one step with learning rate 0 on two ranks, ZeRO-1, ZeRO-2 and ZeRO-3."""
    for name, source in (("in-gpt2", "hf-gpt2"), ("in-llama", "hf-llama"), ("in-qwen2", "hf-qwen2")):
        run = runs.folder / "runs" / name
        assert read_manifest(find_checkpoint(run))["step"] == 1
        assert len(runs.losses(name)) == 1
        for step in (0, 1):
            export_hf(run, tmp_path / f"{name}{step}", step=step, tokenizer="bytes")
            before, after = load(runs.folder / source), load(tmp_path / f"{name}{step}")
            assert type(before) is type(after)
            old, new = before.state_dict(), after.state_dict()
            assert old.keys() == new.keys()
            for key, value in old.items():
                assert np.array_equal(value.numpy().view(np.int32), new[key].numpy().view(np.int32)), (name, step, key)


@pytest.mark.launch
def test_an_imported_llama_has_its_loss_at_once(runs: Workspace) -> None:
    """The first step's loss is what transformers computes on the same tokens."""
    run = load_run_file(runs.folder / "runs" / "in-llama" / "config.yaml")
    window = torch.from_numpy(make_run_loader(run, open_data(run)).batch(0, 0, 1).tokens.astype(np.int64))
    model = load(runs.folder / "hf-llama")
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(window[:, :-1]).logits.flatten(0, 1), window[:, 1:].flatten())
    assert runs.losses("in-llama")[0] == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.launch
def test_nanogpt_comes_in(runs: Workspace, tmp_path: Path) -> None:
    """Its own forward pass, written out in plain torch, gives the logits of what was imported, trained and exported."""
    export_hf(runs.folder / "runs" / "in-nanogpt", tmp_path / "hf")
    theirs, tokens = load(tmp_path / "hf"), torch.arange(40).view(2, 20)
    state = {k.removeprefix("_orig_mod."): v for k, v in nanogpt_state(bias=False)["model"].items()}
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, nanogpt_logits(state, tokens), rtol=1e-4, atol=1e-4)
    torch.save(nanogpt_state(bias=True), tmp_path / "biased.pt")
    import_nanogpt(tmp_path / "biased.pt", tmp_path / "biased")
    state = {k.removeprefix("_orig_mod."): v for k, v in nanogpt_state(bias=True)["model"].items()}
    ours, _ = load_model(find_checkpoint(tmp_path / "biased"))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), nanogpt_logits(state, tokens), rtol=1e-4, atol=1e-4)


def nanogpt_logits(state: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
    """nanoGPT's model.py as a function of its state dict: 2 layers, 2 heads, exact GELU."""
    F = torch.nn.functional

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state.get(f"{name}.bias"), 1e-5)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    x = state["transformer.wte.weight"][tokens] + state["transformer.wpe.weight"][: tokens.size(1)]
    for i in range(2):
        h = f"transformer.h.{i}"
        q, k, v = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").split(32, dim=2)
        q, k, v = (y.view(*tokens.shape, 2, 16).transpose(1, 2) for y in (q, k, v))
        scores = (q @ k.transpose(2, 3) / 4).masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{h}.attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")), f"{h}.mlp.c_proj")
    return linear(norm(x, "transformer.ln_f"), "lm_head")


class Memory:
    """The most resident memory of this process while the block runs, mapped files included, less what it began with."""

    def __enter__(self) -> Memory:
        self.start = self.peak = self._now()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.done.wait(0.001):
            self.peak = max(self.peak, self._now())

    def _now(self) -> int:
        return psutil.Process().memory_info().rss

    @property
    def grown(self) -> int:
        return self.peak - self.start


@pytest.mark.launch
@pytest.mark.parametrize("stage", STAGES)
def test_memory_stays_near_one_shard(runs: Workspace, tmp_path: Path, stage: str) -> None:
    run, shard = runs.folder / "runs" / f"out-big-{stage}", 8_000_000
    export_hf(run, tmp_path / "first")  # what is imported and allocated once
    with Memory() as memory:
        found = export_hf(run, tmp_path / "hf", shard_bytes=shard)
    assert found["bytes"] > 3 * shard
    assert memory.grown < 2 * shard, "one shard, and what the allocator keeps"
    files = {name: load_file(tmp_path / "hf" / name) for name in found["files"]}
    assert all((tmp_path / "hf" / name).stat().st_size < shard + 10_000 for name in files)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == found["bytes"]
    assert index["weight_map"] == {tensor: name for name, content in files.items() for tensor in content}
    single_file = load_file(tmp_path / "first" / "model.safetensors")
    assert single_file.keys() == index["weight_map"].keys()
    for name, value in load(tmp_path / "hf").state_dict().items():
        if name in single_file:
            assert torch.equal(value, single_file[name])


@pytest.mark.launch
def test_other_precisions_and_older_checkpoints(runs: Workspace, tmp_path: Path) -> None:
    run = runs.folder / "runs" / "out-llama"
    for dtype, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        out = runs_cli(["export", str(run), "--to", "hf", str(tmp_path / dtype), "--dtype", dtype, "--json"])
        assert json.loads(out)["dtype"] == dtype
        model, exact = load(tmp_path / dtype), load_model(find_checkpoint(run))[0]
        assert model.dtype == kind
        assert torch.equal(model.lm_head.weight, exact.lm_head.weight[:257].to(kind))
    assert "there is no checkpoint of step 1. Steps with one: 2." in runs_cli(
        ["export", str(run), str(tmp_path / "x"), "--checkpoint", "1"], code=2
    )
    assert not (tmp_path / "x").exists()


@pytest.mark.launch
def test_the_card_tells_where_the_model_comes_from(runs: Workspace, tmp_path: Path) -> None:
    run = runs.folder / "runs" / "out-gpt2"
    export_hf(run, tmp_path / "card")
    card = (tmp_path / "card" / "README.md").read_text()
    manifest = read_manifest(find_checkpoint(run))
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "transformers"
    dataset = manifest["datasets"][0]
    for fact in (dataset["fingerprint"], "python.txt", "| training tokens | 512 |", str(manifest["commit"])):
        assert fact in card
    losses = runs.metrics("out-gpt2")
    assert f"{losses[0]['loss']:.4f}" in card
    assert f"{losses[1]['val_loss']:.4f}" in card
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0]) == manifest["config"]
    assert "<polyline" in (tmp_path / "card" / "training_curve.svg").read_text()


@pytest.mark.launch
def test_export_refusals(runs: Workspace, tmp_path: Path) -> None:
    run = runs.folder / "runs" / "out-gpt2"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    assert "exists already" in runs_cli(["export", str(run), str(tmp_path / "full")], code=2)
    shutil.copytree(find_checkpoint(run), tmp_path / "step")
    for name, expected in (("mlp", "mlp = 'swiglu'"), ("norm", "norm = 'rmsnorm'")):
        manifest = read_manifest(tmp_path / "step")
        manifest["config"]["model"][name] = expected.split("'")[1]
        (tmp_path / "step" / "packspeed.json").write_text(dump_manifest(manifest))
        assert expected in runs_cli(["export", str(tmp_path / "step"), str(tmp_path / "no")], code=2)
    weights = tmp_path / "step" / "mp_rank_00_model_states.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert "was changed: its hash" in runs_cli(["export", str(tmp_path / "step"), str(tmp_path / "no")], code=1)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("out", [".", "..", "/", "sub/.."])
def test_the_current_folder_and_those_above_are_no_new_folders(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have no name to rename a finished folder to."""
    (tmp_path / "here/sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    if out == ".":
        (tmp_path / "here/sub").rmdir()
    with pytest.raises(ConfigError, match="exists already"):
        export_hf(Path("no run"), Path(out))


@pytest.mark.launch
def test_a_damaged_import_is_refused_everywhere(runs: Workspace, tmp_path: Path) -> None:
    import_hf(runs.folder / "hf-gpt2", tmp_path / "damaged", str(runs.folder / "tokens"))
    victim = next((tmp_path / "damaged").rglob("embed.weight.safetensors"))
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(UserError, match="no complete checkpoint"):
        export_hf(tmp_path / "damaged", tmp_path / "no")
    codes, output = run_many(tmp_path / "go", [["--config", str(tmp_path / "damaged" / "run.yaml")]], ranks=1)
    assert codes == [1]
    assert "imported weights are damaged" in output


@pytest.mark.launch
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0, "rope_theta": 1e4}}, "rope_parameters"),
        ({"rope_scaling": {"type": "dynamic"}, "rope_parameters": None}, "rope_scaling"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "missing"),
        ({"model_type": "mamba"}, "model_type = 'mamba'"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"intermediate_size": 64}, "but [64, 32] according"),
    ],
)
def test_import_refusals(runs: Workspace, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    shutil.copytree(runs.folder / "hf-llama", tmp_path / "hf")
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**raw, **fields}))
    assert message in runs_cli(["import", "hf", str(tmp_path / "hf"), "--out", str(tmp_path / "run")], code=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.launch
def test_another_model_than_the_imported_is_refused(runs: Workspace, tmp_path: Path) -> None:
    import_hf(runs.folder / "hf-gpt2", tmp_path / "other", str(runs.folder / "tokens"))
    sets = ("--set", "model.mlp=gelu", "--set", "model.dropout=0.1")
    codes, output = run_many(tmp_path / "go", [["--config", str(tmp_path / "other" / "run.yaml"), *sets]], ranks=1)
    assert codes == [2]
    assert "model.mlp is 'gelu_tanh' there, 'gelu' in the run file." in output


def test_import_of_what_is_no_model(tmp_path: Path) -> None:
    assert "config.json" in runs_cli(["import", "hf", str(tmp_path), "--out", str(tmp_path / "x")], code=2)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert "neither model.safetensors" in runs_cli(
        ["import", "hf", str(tmp_path), "--out", str(tmp_path / "x")], code=2
    )
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    assert "cannot be read" in runs_cli(["import", "hf", str(tmp_path), "--out", str(tmp_path / "x")], code=1)
    (tmp_path / "ckpt.pt").write_bytes(b"nonsense")
    assert "nanoGPT" in runs_cli(["import", "nanogpt", str(tmp_path / "ckpt.pt"), "--out", str(tmp_path / "x")], code=1)


def test_files_of_the_bare_model_and_16_bits_come_in(tmp_path: Path) -> None:
    """The Hub's own gpt2 has no `transformer.` in its names, and buffers among its weights."""
    model = gpt2()
    model.save_pretrained(tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    bare = {name.removeprefix("transformer."): value.bfloat16() for name, value in weights.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(bare, tmp_path / "hf" / "model.safetensors")
    import_hf(tmp_path / "hf", tmp_path / "run")
    ours, _ = load_model(find_checkpoint(tmp_path / "run"))
    assert torch.equal(ours.embed.weight[:300], model.transformer.wte.weight.bfloat16().float())


# ---- tokenizers

CL100K = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"""
    r"""|\s*[\r\n]|\s+(?!\S)|\s"""
)


@pytest.fixture(scope="module")
def tokenizers_both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Any]]:
    """Tokenizers of ours and the same as AutoTokenizer loads them."""
    folder = tmp_path_factory.mktemp("tokenizers")
    trained = train_tokenizer([text_of_python()[:100_000]], 500, folder / "trained.json")
    known: dict[str, Tokenizer] = {"gpt2": load_tokenizer("gpt2"), "bytes": BytesTokenizer(), "trained": trained}
    ranks = known["gpt2"].as_ranks()[0]  # type: ignore[attr-defined]
    known["cl100k"] = TiktokenTokenizer("cl100k-like", ranks, CL100K, 50256, 50257)
    both = {}
    for name, tokenizer in known.items():
        (folder / name).mkdir()
        content, eot = tokenizer_json(tokenizer)
        (folder / name / "tokenizer.json").write_bytes(content)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": eot,
            "clean_up_tokenization_spaces": False,
        }
        (folder / name / "tokenizer_config.json").write_text(json.dumps(settings))
        both[name] = (tokenizer, AutoTokenizer.from_pretrained(folder / name))
    return both


TEXTS = st.text() | st.lists(
    st.sampled_from(
        ["a", "the", " ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "12345", "é", "e\u0301", "中文", "😀", "==", "ſ"]
    )
).map("".join)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_identical_tokens_on_fuzzed_text(tokenizers_both: dict[str, tuple[Tokenizer, Any]], text: str) -> None:
    text = text.replace("<|endoftext|>", "")
    for name, (ours, theirs) in tokenizers_both.items():
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids, name
        assert theirs.decode(ids) == text, name


@pytest.mark.slow
def test_identical_tokens_on_real_text(tokenizers_both: dict[str, tuple[Tokenizer, Any]]) -> None:
    text = text_of_python()
    for name, (ours, theirs) in tokenizers_both.items():
        assert theirs(text, verbose=False)["input_ids"] == ours.encode(text), name
        assert theirs.eos_token_id == ours.eot_id


@pytest.mark.slow
def test_gpt2s_merges_are_the_published_ones() -> None:
    """One merge for each of 50,000 tokens, the first and last as in OpenAI's vocab.bpe."""
    content, _ = tokenizer_json(load_tokenizer("gpt2"))
    merges = [" ".join(pair) for pair in json.loads(content)["model"]["merges"]]
    assert len(merges) == 50_000
    assert merges[:3] == ["Ġ t", "Ġ a", "h e"]
    assert merges[-1] == "Ġg azed"
    from packspeed.data.text.json_tokenizer import JsonTokenizer

    assert JsonTokenizer("gpt2", content).as_ranks() is not None


@pytest.mark.slow
def test_a_pattern_that_means_something_else_is_refused() -> None:
    ranks = load_tokenizer("gpt2").as_ranks()[0]  # type: ignore[attr-defined]
    odd = TiktokenTokenizer("odd", ranks, r"[\p{L}--[a-e]]+|[a-e]+|[^\p{L}]", 50256, 50257)  # Rust's set difference
    with pytest.raises(DataError, match="splits some texts differently"):
        tokenizer_json(odd)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ConfigError, match="--dtype int4"):
        export_hf(Path("x"), Path("y"), dtype="int4")
