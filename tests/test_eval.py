"""Evaluation against references: transformers on the exported model, the harness's backend, the training's losses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from packspeed.data.errors import UsageError
from packspeed.data.prepare.prepare import prepare
from packspeed.launch.convert.export import export_hf
from packspeed.launch.convert.import_weights import import_hf
from packspeed.launch.inference.perplexity import Span, evaluate, spans
from support.commands import runs_cli
from support.ranks import train
from support.workspace import Workspace

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A random Llama over bytes, far from uniform: as a run folder, and as transformers has it."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.3)
    folder = tmp_path_factory.mktemp("eval")
    theirs.save_pretrained(folder / "hf")
    import_hf(folder / "hf", folder / "run")
    return folder / "run", theirs


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A dataset of a few documents, not all ASCII, and those documents."""
    folder = tmp_path_factory.mktemp("text")
    documents = [f"Übung {i}: " + "häufig geprüft, 你好! " * (i % 7 + 1) for i in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    prepare([str(folder / "text.jsonl")], folder / "tokens", "bytes", val_fraction=0.0)
    return folder / "tokens", documents


def reference(theirs: Any, ids: list[int], seq_len: int, stride: int) -> float:
    """Sum of nats over ids, window by window, one at a time; end-of-text comes first."""
    total, done = 0.0, 0
    stream = torch.tensor([256, *ids])
    while done < len(ids):
        first = max(0, done - (seq_len - stride))
        last = min(len(ids), first + seq_len)
        with torch.no_grad():
            log_p = theirs(stream[None, first:last]).logits[0].double().log_softmax(-1)
        labels = stream[first + 1 : last + 1]
        total -= float(log_p.gather(1, labels[:, None])[done - first :].sum())
        done = last
    return total


@pytest.mark.parametrize(("seq_len", "stride"), [(64, 64), (48, 16), (30, 1)])
def test_perplexity_and_bits_per_byte(
    model: tuple[Path, Any], text: tuple[Path, list[str]], seq_len: int, stride: int
) -> None:
    run, theirs = model
    dataset, documents = text
    ids = [i for document in documents for i in [*document.encode(), 256]]
    ids = ids if stride > 1 else ids[:300]
    arguments = ["--data", str(dataset), "--split", "train", "--seq-len", str(seq_len), "--stride", str(stride)]
    found = json.loads(runs_cli(["eval", str(run), *arguments, "--max-tokens", str(len(ids)), "--json"]))
    (result,) = found["results"]
    nats = reference(theirs, ids, seq_len, stride)
    assert result["tokens"] == len(ids)
    assert result["bytes"] == sum(1 for i in ids if i != 256)
    assert result["loss"] == pytest.approx(nats / len(ids), abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nats / len(ids)), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / result["bytes"], rel=1e-5)


def test_every_token_counts_once() -> None:
    for tokens, seq_len, stride in ((1, 8, 8), (8, 8, 8), (100, 8, 3), (101, 7, 1), (50, 64, 32)):
        scored = [label for each in spans(tokens, seq_len, stride) for label in range(each.scored, each.last)]
        assert scored == list(range(tokens))
        assert all(each.last - each.first <= seq_len for each in spans(tokens, seq_len, stride))
    assert list(spans(10, 8, 4)) == [Span(0, 0, 8), Span(4, 8, 10)]


def test_bytes_are_those_of_the_text_whatever_the_tokenizer(text: tuple[Path, list[str]], tmp_path: Path) -> None:
    from packspeed.data.dataset import TokenDataset
    from packspeed.data.text.tokenizer import load_from_dataset
    from packspeed.launch.inference.perplexity import text_bytes

    source = text[0].parent / "text.jsonl"
    prepare([str(source)], tmp_path / "gpt2", "gpt2", val_fraction=0.0)
    dataset = TokenDataset(tmp_path / "gpt2")
    found = text_bytes(dataset, load_from_dataset(tmp_path / "gpt2"), "train", dataset.tokens("train"))
    assert found == sum(len(document.encode()) for document in text[1])


@pytest.mark.launch
def test_a_runs_validation_loss_is_that_of_its_training(workspace: Workspace, tmp_path: Path) -> None:
    """The same windows, so the number that the trainer wrote; with documents kept apart too."""
    name = "evaluated"
    sets = ("train.steps=2", "eval.every_steps=2", "eval.windows=100000", "data.document_mask=true")
    done = train(*workspace.arguments(name, *sets))
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(line for line in workspace.metrics(name) if "val_loss" in line)
    (result,) = evaluate(workspace.folder / "runs" / name)["results"]
    # The trainer's windows leave out the stream's first token and its last, partial window.
    assert result["tokens"] - line["val_tokens"] <= 33
    assert result["loss"] == pytest.approx(line["val_loss"], abs=2e-3)
    with pytest.raises(UsageError, match="There is no tokenizer 'mine'"):
        evaluate(workspace.folder / "runs" / name, tokenizer="mine", max_tokens=64)


@pytest.mark.launch
def test_another_tokenizers_dataset_is_refused(
    workspace: Workspace, text: tuple[Path, list[str]], tmp_path: Path
) -> None:
    prepare([str(text[0].parent / "text.jsonl")], tmp_path / "gpt2", "gpt2", val_fraction=0.0)
    run = str(workspace.folder / "runs" / "evaluated")
    assert "the token ids have other meanings" in runs_cli(["eval", run, "--data", str(tmp_path / "gpt2")], code=2)
    assert "no val split" in runs_cli(["eval", run, "--data", str(text[0])], code=2)
    assert "--stride 99" in runs_cli(["eval", run, "--stride", "99"], code=2)


TASKS = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "local_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "local_writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{written}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three local tasks of 12 questions, one for each question that the harness asks a model."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "question": f"Count {i} and then",
            "choices": [" stop", " go on with it", " é"],
            "answer": i % 3,
            "text": f"Once there were {i} things. " * (i + 1),
            "written": "x",
        }
        for i in range(12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, "test_split": "test", **task}))
    return folder


@pytest.mark.launch
def test_the_harness_finds_what_its_own_backend_finds(model: tuple[Path, Any], tasks: Path, tmp_path: Path) -> None:
    """`packspeed eval --tasks` on the run, and lm_eval's command with transformers on the exported model."""
    run, _ = model
    export_hf(run, tmp_path / "hf", tokenizer="bytes")
    code = f"""
import json, lm_eval
from lm_eval.tasks import TaskManager
from packspeed.launch.inference.lm_eval_adapter import run_tasks
from pathlib import Path
names, include = {list(TASKS)!r}, {str(tasks)!r}
ours = run_tasks(Path({str(run)!r}), names, include_path=include, tokenizer="bytes")["results"]
theirs = lm_eval.simple_evaluate(
    "hf", model_args="pretrained={tmp_path}/hf,dtype=float32", tasks=names, device="cpu", batch_size=1,
    task_manager=TaskManager(include_path=include), log_samples=False,
)["results"]
print("\\n" + json.dumps([ours, theirs], default=str))
"""
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = json.loads(done.stdout.strip().splitlines()[-1])
    for task in TASKS:
        assert ours[task].keys() == theirs[task].keys()
        for metric, value in theirs[task].items():
            if isinstance(value, float):
                assert ours[task][metric] == pytest.approx(value, rel=1e-4), (task, metric)
    assert ours["local_text"]["bits_per_byte,none"] > 1
