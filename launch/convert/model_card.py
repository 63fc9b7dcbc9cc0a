"""Write the model card of an exported model: README.md with data, tokens, losses, commit and config, and a plot as SVG.

All facts come from the checkpoint's manifest, the run folder and the manifest of the dataset. Facts whose source no
longer exists are left out. Hugging Face's format: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from packspeed.data.errors import DataError
from packspeed.data.storage.manifest import load_manifest
from packspeed.launch.checkpoint.manifest import Manifest
from packspeed.launch.config.batch import token_sizes
from packspeed.model.config import GPTConfig, num_parameters

ROWS = 20  # largest number of rows in the table of losses
CURVE = "training_curve.svg"

Points = list[tuple[int, float]]  # (step, loss)


def write_card(folder: Path, name: str, checkpoint: Path, manifest: Manifest, config: GPTConfig) -> None:
    """Write README.md into the folder of an exported model and, if the run has metrics, the plot of its losses.

    `name` is the title.
    """
    train, valid = curve(checkpoint.resolve().parents[1] / "metrics.jsonl", manifest["step"])
    sections = [_head(name, manifest, config), _use(), _data(manifest), _tokenizer_note(manifest)]
    if train:
        (folder / CURVE).write_text(curve_svg(train, valid), encoding="utf-8")
        sections.append(_curve_section(train, valid))
    sections.append(_origin(checkpoint, manifest))
    (folder / "README.md").write_text("\n".join(sections), encoding="utf-8")


def curve(metrics: Path, until: int) -> tuple[Points, Points]:
    """Return (training losses, validation losses) up to step `until`, as lists of (step, loss), from metrics.jsonl.

    Both are empty if the file does not exist.
    """
    train: Points = []
    valid: Points = []
    text = metrics.read_text(encoding="utf-8") if metrics.is_file() else ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # cut off by a crash
            continue
        if record.get("step", until + 1) <= until:
            for points, key in ((train, "loss"), (valid, "val_loss")):
                if record.get(key) is not None:
                    points.append((record["step"], record[key]))
    return train, valid


def _head(name: str, manifest: Manifest, config: GPTConfig) -> str:
    """Return the card's beginning: metadata, title and a table of facts about the model."""
    train = manifest["config"].get("train")  # imported weights have none
    tokens = token_sizes(train).start(manifest["step"]) if train else 0
    rows = {
        "parameters": f"{num_parameters(config):,}",
        "layers, width": f"{config.n_layer}, {config.d_model}",
        "heads": f"{config.n_head}, of keys and values {config.kv_heads}",
        "vocabulary": f"{config.vocab_size:,}",
        "longest sequence": f"{config.max_seq_len:,} tokens",
        "training steps": f"{manifest['step']:,}",
        "training tokens": f"{tokens:,}",
    }
    if config.n_expert is not None:
        rows["experts"] = f"{config.n_expert} per layer, {config.n_expert_active} per token"
        rows["parameters per token"] = f"{num_parameters(config, active=True):,}"
    if "imported" in manifest:
        rows["weights from"] = manifest["imported"]["source"]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    front = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- packspeed\n---\n"
    return f"{front}\n# {name}\n\nA causal language model pretrained with Packspeed.\n\n| | |\n|---|---|\n{table}\n"


def _use() -> str:
    """Return the card's section that shows how to load the model."""
    return """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50, do_sample=True)[0]))
```
"""


def _data(manifest: Manifest) -> str:
    """Return the card's section about the training data."""
    lines = ["## Training data\n"]
    for dataset in manifest.get("datasets") or []:
        tokens = sum(shard[1] for shard in dataset["shards"])
        made = f"tokenizer {dataset['tokenizer'][0]}, fingerprint `{dataset['fingerprint']}`"
        lines.append(f"- `{dataset['path']}`: {tokens:,} tokens, {made}")
        try:
            source = load_manifest(dataset["path"]).source
        except (DataError, OSError):  # the dataset is at a URL, or was deleted
            continue
        names = ", ".join(f"`{name}`" for name in source.names[:10]) + (" ..." if len(source.names) > 10 else "")
        lines.append(f"  from {names}: {source.documents:,} documents, {source.text_bytes:,} bytes of text")
    if len(lines) == 1:
        lines.append("Unknown, because the weights were imported and not trained with Packspeed.")
    return "\n".join(lines) + "\n"


def _tokenizer_note(manifest: Manifest) -> str:
    """Return the card's notes about how documents and special tokens were treated in training."""
    note = (
        "In the training data, the end-of-text token separates documents. If a document contained the characters of a\n"
        "special token, they were encoded as ordinary text. The tokenizer in this folder encodes them as the special\n"
        "token, which is the default of transformers (`split_special_tokens=True` changes that).\n"
    )
    data = manifest["config"].get("data") or {}
    if data.get("document_mask") or data.get("packing", "stream") != "stream":
        note += (
            "\nIn training, tokens attended only to their own document, and positions began at 0 in each document. "
            "The\nmodel classes of transformers have no such mask. For the same results, give each document its own "
            "row.\n"
        )
    return note


def _curve_section(train: Points, valid: Points) -> str:
    """Return the card's section with the plot of the losses and a table of at most ROWS steps."""
    at = dict(valid)
    steps = sorted({*[step for step, _ in valid], train[0][0], train[-1][0]})
    steps = steps if len(steps) <= ROWS else [steps[round(i * (len(steps) - 1) / (ROWS - 1))] for i in range(ROWS)]
    losses = dict(train)
    rows = [
        f"| {step:,} | {losses.get(step, float('nan')):.4f} | {f'{at[step]:.4f}' if step in at else ''} |"
        for step in steps
    ]
    table = "\n".join(["| step | training loss | validation loss |", "|---|---|---|", *rows])
    return f"## Training curve\n\n![loss over steps]({CURVE})\n\n{table}\n\nLoss in nats per token.\n"


def curve_svg(train: Points, valid: Points) -> str:
    """Return the text of an SVG of 640 x 320 pixels with training and validation losses over the steps.

    It shows fewer than 2,000 points of the training loss.
    """
    train = train[:: max(1, len(train) // 1000)]
    steps, losses = [s for s, _ in train + valid], [v for _, v in train + valid]
    low, high, last = min(losses), max(losses), max(steps)

    def path(points: Points) -> str:
        scale = max(high - low, 1e-9)
        return " ".join(f"{60 + 560 * s / last:.1f},{20 + 260 * (high - v) / scale:.1f}" for s, v in points)

    text = '<text x="{}" y="{}" font-family="sans-serif" font-size="12" text-anchor="{}">{}</text>'
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="640" height="320">',
        '<rect width="640" height="320" fill="white"/>',
        '<path d="M60 20 V280 H620" fill="none" stroke="#888"/>',
        f'<polyline points="{path(train)}" fill="none" stroke="#1f77b4"/>',
        f'<polyline points="{path(valid)}" fill="none" stroke="#d62728" stroke-width="2"/>' if valid else "",
        text.format(55, 25, "end", f"{high:.2f}"),
        text.format(55, 284, "end", f"{low:.2f}"),
        text.format(620, 298, "end", f"step {last:,}"),
        text.format(340, 314, "middle", "training loss (blue), validation loss (red), nats per token"),
        "</svg>",
    ]
    return "\n".join(line for line in lines if line) + "\n"


def _origin(checkpoint: Path, manifest: Manifest) -> str:
    """Return the card's section about the checkpoint, the software and the run file."""
    versions = ", ".join(f"{name} {version}" for name, version in (manifest.get("versions") or {}).items())
    facts = [
        f"- checkpoint `{checkpoint.name}`, saved {manifest.get('saved_at', 'at an unknown time')}",
        f"- Packspeed {manifest.get('packspeed', '')}, commit `{manifest.get('commit') or 'unknown'}`",
        f"- {versions}" if versions else "",
    ]
    config = yaml.safe_dump(manifest["config"], sort_keys=False)
    head = "\n".join(fact for fact in facts if fact)
    return f"## Origin\n\n{head}\n\nThe run file, with every default written out:\n\n```yaml\n{config}```\n"
