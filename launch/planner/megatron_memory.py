"""Memory of a Megatron-LM rank, to compare with the tables of its functional tests.

    megatron_memory(read_case(row)).peak      bytes of a rank of the last pipeline stage

Every term but the last is a count of bytes, with no constant that was fitted:

    states        18 bytes per parameter: bf16 weight, fp32 gradient, fp32 copy and AdamW's moments. The distributed
                  optimizer shares 12 of them among data-parallel ranks; Muon has one moment for matrices
    activations   per token of a block: norms, residual, dropout masks, qkv, attention's output, MLP; unfused attention
                  adds 5 bytes per head and pair of tokens. Times the micro batches in flight
    logits        6 bytes per token and row of the vocabulary: bf16 from the product, fp32 for the loss
    workspace     what CUDA libraries allocate through torch (cuBLAS, Transformer Engine): one number for each GPU,
                  megatron_workspaces.yaml

Rows lack some settings that decide memory. UNTOLD lists words in the names of test cases that show that such
a setting was used. MissingColumn is raised for these rows, and for rows in which a needed column is empty.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from pathlib import Path

from packspeed.launch.config.parsing import parse_yaml, read_text
from packspeed.launch.planner.machine import GIB
from packspeed.launch.planner.published import MissingColumn, Row
from packspeed.launch.planner.work import Layout

# A word of a test case's name -> the setting that it announces and that has no column.
UNTOLD = {
    "defer_embedding_wgrad": "defer_embedding_wgrad_compute",
    "cross_entropy_loss_fusion": "cross_entropy_loss_fusion",
    "tunable_overlap": "overlap_param_gather_with_optimizer_step and its sizes",
    "multi_dist_optimizer": "num_distributed_optimizer_instances",
    "uneven_pipeline": "decoder_last_pipeline_num_layers",
    "mtp": "mtp_num_layers",
    "mla": "the ranks of multi-latent attention",
    "cudagraph": "the scope of CUDA graphs",
    "fsdp": "data_parallel_sharding_strategy",
    "op_fuser": "use_transformer_engine_op_fuser",
    "selective_recompute": "recompute_modules",
    "uninstall_te": "the norm that replaces Transformer Engine's",
    "modelopt": "what ModelOpt changes",
    "inference": "the batch of an inference",
    "grpo": "the batch of GRPO",
    "reruns": "the state of the rerun state machine",
    "tp_overlap": "the buffers of overlapped tensor parallelism",
    "deepseek": "the first dense layers and the shared experts",
}
FAMILIES = ("gpt", "moe", "mixtral")
DEFAULT_VOCABULARY = 50_257  # GPT-2's, of every test case that names no other tokenizer
TOP_K = 2  # moe_router_topk's default
FULL_WIDTH = 4096  # the test cases of at least this width train without dropout


@dataclasses.dataclass(frozen=True)
class MegatronMemory:
    """Bytes of a rank at the peak of a step, by kind."""

    states: float
    activations: float
    logits: float
    workspace: float

    @property
    def peak(self) -> float:
        """Return the sum over all kinds, to compare with torch.cuda.max_memory_allocated."""
        return self.states + self.activations + self.logits + self.workspace


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the table (a test of Megatron-LM) as numbers. An empty column has Megatron-LM's default."""

    row: Row
    layout: Layout
    layers: int
    width: int
    heads: int
    groups: int
    ff: int
    vocabulary: int
    seq_len: int
    micro_batch: int
    experts: int

    def true(self, column: str) -> bool:
        """Return whether a column says True."""
        return self.row[column] == "True"

    @property
    def unfused(self) -> bool:
        """Return whether attention keeps its matrix of probabilities."""
        return self.row["attn_backend"] in ("unfused", "local") or self.row["transformer_impl"] == "local"

    @property
    def tokens(self) -> float:
        """Return the number of tokens of a micro batch on one rank."""
        return self.seq_len / self.layout.context * self.micro_batch

    @property
    def rank_layers(self) -> float:
        """Return the number of layers of a pipeline rank."""
        return self.layers / self.layout.pipeline

    @property
    def attention_weights(self) -> int:
        """Return the number of weights in the attention of one layer."""
        return self.width * (2 * self.width + 2 * self.groups * (self.width // self.heads))

    @property
    def mlp_weights(self) -> int:
        """Return the number of weights in the MLP of one layer, or in one expert."""
        return self.width * self.ff * (3 if self.true("swiglu") else 2)


def read_case(row: Row) -> Case:
    """Return a row as a Case. Raises MissingColumn if a setting that decides memory is not in it."""
    name = row["test_case"]
    if row["family"] not in FAMILIES:
        raise MissingColumn(f"family: the columns do not describe the layers of {row['family']!r}")
    for word, setting in UNTOLD.items():
        if word in name:
            raise MissingColumn(f"{setting}: the test case sets it, but the table has no column for it")
    for column in ("gpu", "mem_max_allocated_gib", "num_layers", "hidden", "heads", "seq_len", "micro_batch"):
        if not row[column]:
            raise MissingColumn(f"{column}: empty")
    if row["gpu"] not in _workspaces():
        raise MissingColumn(f"workspaces: megatron_workspaces.yaml has no GPU {row['gpu']!r}")
    if row["dist_optimizer"] == "True" and not row["n_gpus"]:
        raise MissingColumn("n_gpus: empty, so a rank's share of the optimizer states is unknown")
    if "memory_speed" in name and row["pp"] not in ("", "1"):
        raise MissingColumn(
            "num_layers_per_virtual_pipeline_stage: the test case sets it, but the table has no column for it"
        )
    if not row["attn_backend"] and row["transformer_impl"] != "local" and row["env"] == "lts":
        raise MissingColumn("attn_backend: empty, and with env = lts the same test ran with two backends")
    try:
        return _numbers(row)
    except (ValueError, OverflowError, ZeroDivisionError) as error:
        raise MissingColumn(f"a number: {error}") from None


def _numbers(row: Row) -> Case:
    """Return a row as a Case. Raises ValueError if a column is not a number."""
    for column in ("mem_max_allocated_gib", "num_layers", "hidden", "heads", "seq_len", "micro_batch"):
        if not 0 < float(row[column]) < math.inf:
            raise ValueError(f"{column} is {row[column]}")
    width, swiglu = int(row["hidden"]), row["swiglu"] == "True"
    heads, layout = int(row["heads"]), _layout(row)
    ff = int(float(row["ffn_hidden"] or 0)) or (int(4 * width * 2 / 3 / 64) * 64 if swiglu else 4 * width)
    rows = 128 * layout.tensor
    vocabulary = -(-int(float(row["vocab"] or DEFAULT_VOCABULARY)) // rows) * rows
    return Case(
        row, layout, int(row["num_layers"]), width, heads, int(float(row["kv_groups"] or heads)), ff, vocabulary,
        int(row["seq_len"]), int(row["micro_batch"]), int(float(row["num_experts"] or 0)),
    )  # fmt: skip


def _layout(row: Row) -> Layout:
    """Return the ranks' layout. For virtual stages and the tensor ranks of experts there is no column; they are read
    from the name of the test case.
    """
    tensor, pipeline, context, expert = (int(float(row[key] or 1)) for key in ("tp", "pp", "cp", "ep"))
    name = row["test_case"]
    stage_layers = re.search(r"vp(\d)", name)
    chunks = int(row["num_layers"] or 1) // pipeline // int(stage_layers[1]) if stage_layers and pipeline > 1 else 1
    expert_tensor = re.search(r"etp(\d)", name)
    return Layout(
        ranks=int(float(row["n_gpus"] or 8)), tensor=tensor, pipeline=pipeline, context=context, expert=expert,
        chunks=max(1, chunks), expert_tensor=int(expert_tensor[1]) if expert_tensor and row["num_experts"] else None,
        sequence_sharded=row["sp"] == "True" and tensor > 1,
    )  # fmt: skip


def megatron_memory(case: Case) -> MegatronMemory:
    """Return the bytes of a rank of the last pipeline stage, by kind."""
    logits = 6 * case.tokens * case.vocabulary / case.layout.tensor
    return MegatronMemory(_states(case), _activations(case), logits, _workspace(case))


def _states(case: Case) -> float:
    """Return the bytes of weights, gradients and optimizer."""
    layout, layers = case.layout, case.rank_layers
    norms = 4 * case.width
    matrices = layers * (case.attention_weights + (0 if case.experts else case.mlp_weights)) / layout.tensor
    untied = case.true("untied") and layout.pipeline == 1
    table = case.vocabulary * case.width / layout.tensor * (2 if untied else 1)
    positions = case.seq_len * case.width if layout.pipeline == 1 else 0
    other = layers * (norms + case.width * case.experts) + table + positions
    experts = layers * case.experts * case.mlp_weights / layout.expert / layout.expert_tensor_ranks
    shards, expert_shards = (1, 1) if not case.true("dist_optimizer") else (
        layout.data * layout.context, layout.expert_data
    )  # fmt: skip
    moments = 8 if case.row["optimizer"] == "muon" else 12
    return matrices * (6 + moments / shards) + other * (6 + 12 / shards) + experts * (6 + moments / expert_shards)


def _activations(case: Case) -> float:
    """Return the bytes kept for the backward pass, of all micro batches in flight."""
    layout, tokens = case.layout, case.tokens
    head = case.width // case.heads
    share = 1 / layout.tensor
    full = share if layout.sequence_sharded else 1.0
    # Without dropout no masks; with tensor parallelism alone, the sums over ranks are kept as well.
    light = case.width >= FULL_WIDTH and (layout.tensor == 1 or layout.sequence_sharded)
    outer = tokens * case.width * (8 if light else 10) * full
    attention = tokens * head * (4 * case.heads + 4 * case.groups) * share
    mlp = tokens * case.ff * (6 if case.true("swiglu") else 4) * share
    if case.experts:
        mlp = TOP_K * (mlp + 4 * tokens * case.width * full)
    pairs = 5 * case.heads * case.seq_len / layout.context * case.seq_len * case.micro_batch * share
    block = outer + attention + mlp + (pairs if case.unfused else 0)
    if case.row["recompute"] == "full":
        return case.rank_layers * tokens * case.width * 2 * full + block
    chunk = case.rank_layers / layout.chunks
    in_flight = (layout.chunks - 1) * layout.pipeline + 1
    return chunk * in_flight * block


@functools.cache
def _workspaces() -> dict[str, dict[str, float]]:
    """Return {GPU: {kind of test case: GiB that CUDA libraries allocate through torch}}."""
    path = Path(__file__).parent / "megatron_workspaces.yaml"
    parsed, _ = parse_yaml(read_text(path, "workspaces"), path)
    return {gpu: {name: float(value) for name, value in sizes.items()} for gpu, sizes in parsed["gib"].items()}


def _workspace(case: Case) -> float:
    """Return the bytes that CUDA libraries, such as cuBLAS, allocate through torch."""
    sizes = _workspaces()[case.row["gpu"]]
    if case.row["transformer_impl"] == "local" and case.row["precision"] == "bf16":
        return sizes["local_bf16"] * GIB
    if case.layout.context > 1 and not case.experts:
        return sizes["context_parallel"] * GIB
    return sizes["any"] * GIB
