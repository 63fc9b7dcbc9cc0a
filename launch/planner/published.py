"""Rows of tables that others published, as inputs of the planner. Formats and rules: docs/planner.md, "Evaluation".

A throughput table has the columns model, gpu, n_gpus, seq_len, micro_batch, global_batch_tokens, precision, parallelism
(words such as "FSDP FULL_SHARD; grad_accum=4; act_ckpt=True" or "TP8 PP2 DP48") and a measured value:
tokens_per_s_per_gpu or tflops_per_gpu. `read_speed_row` raises MissingColumn if a row lacks a value that the formulas
need, and accepts all other rows.
"""

from __future__ import annotations

import dataclasses
import math
import re

from packspeed.launch.planner.work import Layout, Work
from packspeed.model.config import GPTConfig, preset

Row = dict[str, str]


class MissingColumn(Exception):
    """A row lacks what the formulas need. The message names the column and says what is missing."""


@dataclasses.dataclass(frozen=True)
class SpeedRow:
    """A published throughput, and the training step that it measured."""

    work: Work
    machine: str
    tokens_per_s: float  # of one GPU, measured
    stack: tuple[str, ...]  # the table, GPU and software: rows of one stack share a calibrating row
    offload: bool  # AdamW's state is in host memory


def _model(layers: int, width: int, head: int, vocab: int, **more: object) -> GPTConfig:
    """Return a model with heads of `head` channels, learned positions and a GELU, unless `more` says otherwise."""
    fields = {"n_layer": layers, "d_model": width, "n_head": max(1, width // head), "vocab_size": vocab}
    return GPTConfig(**{**fields, "max_seq_len": 2048, **more})  # type: ignore[arg-type]


def _llama3(layers: int, width: int, d_ff: int, vocab: int = 128_256, kv_heads: int = 8) -> GPTConfig:
    more = {"n_kv_head": kv_heads, "d_ff": d_ff, "mlp": "swiglu", "norm": "rmsnorm", "position": "rope"}
    return _model(layers, width, 128, vocab, bias=False, tie_embeddings=False, **more)


# Shapes of published models by the name in the column `model`, in lower case. Sources: llm-foundry's yamls, the Llama 3
# paper (https://arxiv.org/abs/2407.21783), Mixtral's paper (https://arxiv.org/abs/2401.04088), OLMo 2 and Qwen3's
# configurations on Hugging Face.
SHAPES: dict[str, GPTConfig] = {
    **{
        f"mpt-{name}": _model(layers, width, head, 50_368, bias=False, position="learned")
        for name, layers, width, head in (
            ("125m", 12, 768, 64), ("350m", 24, 1024, 64), ("760m", 24, 1536, 128), ("1b", 24, 2048, 128),
            ("3b", 32, 2560, 128), ("7b", 32, 4096, 128), ("13b", 40, 5120, 128), ("30b", 48, 7168, 128),
            ("70b", 80, 8192, 128),
        )
    },
    "llama3-8b": _llama3(32, 4096, 14_336),
    "llama3.1-8b": _llama3(32, 4096, 14_336),
    "llama3-70b": _llama3(80, 8192, 28_672),
    "llama3.1-70b": _llama3(80, 8192, 28_672),
    "llama3.1-405b": _llama3(126, 16_384, 53_248),
    "mixtral-8x7b": dataclasses.replace(_llama3(32, 4096, 14_336, vocab=32_000), n_expert=8, n_expert_active=2),
    "qwen3-8b": _llama3(36, 4096, 12_288, vocab=151_936),
    "llama2-7b": _llama3(32, 4096, 11_008, vocab=32_000, kv_heads=32),
    "llama2-13b": _llama3(40, 5120, 13_824, vocab=32_000, kv_heads=40),
    "llama2-70b": _llama3(80, 8192, 28_672, vocab=32_000),
    "olmo2-13b": _llama3(40, 5120, 13_824, vocab=100_352, kv_heads=40),
    "olmo2-32b": _llama3(64, 5120, 27_648, vocab=100_352),
    "olmo2-7b": _llama3(32, 4096, 11_008, vocab=100_352, kv_heads=32),
    "gpt2": preset("gpt2-124m"),
    "gpt2-medium": preset("gpt2-355m"),
    "gpt2-large": preset("gpt2-774m"),
    "gpt2-xl": preset("gpt2-1.5b"),
}  # fmt: skip

# The first pattern found in the column `gpu` names the calibration file.
GPUS = {
    "h100": "h100-80gb", "h200": "h200", "gb200": "b200", "b200": "b200", "a100_40gb": "a100-40gb",
    "a100": "a100-80gb", "l40s": "l40s", "4090": "rtx-4090", "v100": "v100-32gb",
}  # fmt: skip

# Words of the column `parallelism` that name software: tables that compare several have a calibrating row for each.
SOFTWARE = ("eager", "compile", "async", "ddp")


def read_speed_row(row: Row) -> SpeedRow:
    """Return a row of a throughput table as a step and its measured speed.

    Raises MissingColumn if the row lacks a value, or has one that cannot be used.
    """
    try:
        return _speed_row(row)
    except (ValueError, OverflowError, ZeroDivisionError) as error:
        raise MissingColumn(f"a number: {error}") from None


def _speed_row(row: Row) -> SpeedRow:
    """Return a row as a step and its speed. Raises MissingColumn, or ValueError if a column is not a number."""
    words = row["parallelism"]
    machine = gpu_machine(row["gpu"])
    model = published_model(row["model"])
    seq_len, ranks = _number(row, "seq_len"), _number(row, "n_gpus")
    if not row["precision"]:
        raise MissingColumn("precision: empty")
    layout = published_layout(words, ranks)
    if layout.expert > 1 and model.n_expert is None:
        raise MissingColumn("number of experts: the table does not give it")
    # A pipeline divides a batch into single samples. Otherwise only ZeRO-3, which gathers weights in every micro batch,
    # needs to know its size.
    stated = bool(row["micro_batch"]) or layout.stage == 3
    micro_batch = _number(row, "micro_batch") if stated and layout.pipeline == 1 else 1
    accumulation = _accumulation(row, layout, seq_len * micro_batch)
    offload = "offload" in words.lower() and "act_cpu_offload=False" not in words
    work = Work(
        model=dataclasses.replace(model, max_seq_len=max(seq_len, 1)) if model.position == "learned" else model,
        seq_len=seq_len, micro_batch=micro_batch, accumulation=accumulation, layout=layout,
        precision=published_precision(row["precision"]), recomputed=published_recompute(words),
        gather_bytes=2.0 if "SHARD_GRAD_OP" in words else 4.0, reduce_bytes=2.0 if "mp_mode=PURE" in words else 4.0,
    )  # fmt: skip
    software = tuple(word for word in SOFTWARE if word in words.lower())
    stack = (row["source_repo"], row["source_path"], row["gpu"], row["precision"], *software)
    return SpeedRow(work, machine, measured_tokens_per_s(row, work), stack, offload)


def gpu_machine(gpu: str) -> str:
    """Return the name of the calibration file of a GPU in a table. Raises MissingColumn if there is none."""
    for pattern, name in GPUS.items():
        if pattern in gpu.lower():
            return name
    raise MissingColumn("gpu: " + (f"{gpu!r} is no GPU with a calibration file" if gpu else "empty"))


def published_model(name: str) -> GPTConfig:
    """Return the shape of the model with this name.

    The name is in SHAPES ("llama3.1-8b"), or it contains the shape: "GPT-7.1B (L30 h4096 a32 vocab131072)". Otherwise,
    raises MissingColumn.
    """
    known = SHAPES.get(name.lower().replace(" ", "-").replace("llama-", "llama"))
    if known is not None:
        return known
    layers, width = re.search(r"\bL(\d+)\b", name), re.search(r"\bh(\d+)\b", name)
    if layers is None or width is None or "moe" in name.lower() or re.search(r"\d+x\d+b", name.lower()):
        raise MissingColumn("model: the name does not give layers and widths, and no published shape has that name")
    vocab = re.search(r"vocab(\d+)", name)
    return _model(int(layers[1]), int(width[1]), 128, int(vocab[1]) if vocab else 50_257)


def published_layout(words: str, ranks: int) -> Layout:
    """Return the layout that words such as "FSDP32xTP8", "TP8 PP2 DP48" or "ZeRO-3" describe."""
    names = ("TP", "PP", "CP", "EP")
    sizes = {name: int(found[1]) for name in names if (found := re.search(rf"(?:\b|x){name}\s?(\d+)", words))}
    sharded = re.search(r"ZeRO-?(\d)", words)
    stage = int(sharded[1]) if sharded else 3 if re.search(r"FSDP|ZeRO\+\+|FPDT", words) else 1
    return Layout(
        ranks=ranks, stage=stage, tensor=sizes.get("TP", 1), pipeline=sizes.get("PP", 1), context=sizes.get("CP", 1),
        expert=sizes.get("EP", 1), sequence_sharded=sizes.get("TP", 1) > 1,
        chunks=2 if "Interleaved" in words else 1,
    )  # fmt: skip


def _accumulation(row: Row, layout: Layout, tokens: int) -> int:
    """Return the micro batches per step: stated in the column `parallelism`, or computed from the global batch.

    tokens: of a micro batch of one model replica. Raises MissingColumn if the row does not say enough.
    """
    if found := re.search(r"(?:grad_accum=|GAS=?)(\d+)", row["parallelism"]):
        return int(found[1])
    if layout.pipeline > 1 and re.search(r"memory is LAST rank", row["parallelism"]):
        raise MissingColumn("layers per virtual stage: without this column the number of pipeline chunks is unknown")
    if not row["global_batch_tokens"]:
        raise MissingColumn("global_batch_tokens: empty, and the row gives no number of accumulated micro batches")
    return max(1, round(float(row["global_batch_tokens"]) / tokens / layout.data))


def published_precision(text: str) -> str:
    """Return the precision that the text names: "fp8" or "fp16"; any other text gives "bf16"."""
    lower = text.lower()
    return "fp8" if "fp8" in lower else "fp16" if "fp16" in lower else "bf16"


def published_recompute(words: str) -> float:
    """Return the share of the blocks that the words say are recomputed. Selective recompute counts as none."""
    full = re.search(r"act_ckpt=True|\bfull AC\b|\bact ckpt\b|\bAC\b(?! none)", words)
    selective = re.search(r"selective|SAC|AC none|act_ckpt=False", words)
    return 1.0 if full and not selective else 0.0


def measured_tokens_per_s(row: Row, work: Work) -> float:
    """Return the measured tokens per second of a GPU. Raises MissingColumn if the row has no measured value."""
    if "read off" in row["parallelism"]:
        raise MissingColumn("tokens_per_s_per_gpu: the source shows the value in a chart only")
    if row["tokens_per_s_per_gpu"]:
        return _measured(row["tokens_per_s_per_gpu"])
    flops = _measured(row["tflops_per_gpu"]) * 1e12 if row["tflops_per_gpu"] else 0.0
    if not flops and row["mfu_pct"]:
        raise MissingColumn("tokens_per_s_per_gpu: empty; mfu_pct is not used, as sources define MFU differently")
    if not flops:
        raise MissingColumn("tokens_per_s_per_gpu: empty, and so is tflops_per_gpu")
    model = work.model
    passes = 8 if "HFU" in row["parallelism"] else 6  # 8 with the passes of the recompute
    blocks = model.n_layer * (work.block_products + work.seq_len * work.queries)
    return flops / (passes * blocks + 6 * model.padded_vocab_size * model.d_model)


def _measured(text: str) -> float:
    """Return a measured value. Raises ValueError if it is not a positive number."""
    if not 0 < float(text) < math.inf:
        raise ValueError(f"the measured value is {text}")
    return float(text)


def _number(row: Row, key: str) -> int:
    """Return the positive whole number in a column. Raises MissingColumn if there is none."""
    try:
        value = int(float(row[key]))
    except (ValueError, OverflowError):  # OverflowError: inf
        value = 0
    if value < 1:
        raise MissingColumn(f"{key}: " + (f"{row[key]!r} is not a number" if row[key] else "empty"))
    return value
