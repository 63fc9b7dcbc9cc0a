"""Measure the memory of a step on a CPU: bytes between steps, and the peak, with torch's fake process group.

    python tests/support/step_memory.py WORLD CASE ...      prints one JSON object for each CASE

A CASE is STAGE,PRECISION,FAMILY,RECOMPUTE,OFFLOAD,ACCUMULATION, such as 2,bf16,llama,full,no,1, and may end with a
parallel size: 2,bf16,llama,full,no,1,tensor=2. Tensors that live
between steps are counted as in state_bytes.py, and what a step allocates by torch's profiler. The run is a list of
settings that launch/planner reads too, so both see the same buckets.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt": {"n_layer": 3, "n_head": 8, "d_model": 128},
    "llama": {
        "n_layer": 3, "n_head": 4, "n_kv_head": 2, "d_model": 128, "d_ff": 384, "position": "rope", "mlp": "swiglu",
        "norm": "rmsnorm", "bias": False, "tie_embeddings": False,
    },
    "mixed": {
        "n_layer": 3, "n_head": 4, "n_kv_head": 2, "d_model": 128, "d_ff": 384, "position": "rope", "mlp": "swiglu",
        "norm": "rmsnorm", "bias": False, "attention_gate": "headwise", "value_residual": True,
    },
    "moe": {
        "n_layer": 2, "n_head": 4, "d_model": 128, "d_expert": 128, "n_expert": 4, "position": "rope", "mlp": "swiglu",
        "norm": "rmsnorm", "bias": False,
    },
}  # fmt: skip
FAMILIES["mtp"] = FAMILIES["llama"] | {"n_layer": 2, "mtp": {"depth": 2}}
SEQ_LEN, MICRO_BATCH, VOCABULARY = 128, 4, 1024


def run_values(case: str, world: int) -> dict[str, Any]:
    """Return the content of the run file for a CASE (see the top of this file)."""
    _, precision, family, recompute, _, accumulation, *parallel = case.split(",")
    sizes = {axis: int(size) for axis, size in (text.split("=") for text in parallel)}
    model = FAMILIES[family] | {"kernels": "eager", "activation_checkpointing": recompute}
    rows = world // (sizes.get("tensor", 1) * sizes.get("sequence", 1))
    tokens = SEQ_LEN * MICRO_BATCH * int(accumulation) * rows
    train = {"steps": 2, "global_batch_tokens": tokens, "micro_batch": MICRO_BATCH, "precision": precision}
    return {
        "name": "bytes", "runs_dir": "/nowhere", "model": model, "train": train | {"optimizer": {"lr": 1e-3}},
        "data": {"path": "/nowhere", "seq_len": SEQ_LEN}, "parallel": sizes,
    }  # fmt: skip


def deepspeed_values(case: str) -> dict[str, Any]:
    """Return the content of the DeepSpeed JSON for a CASE (see the top of this file)."""
    stage, _, _, _, offload, *_ = case.split(",")
    zero: dict[str, Any] = {"stage": int(stage)}
    if stage == "3":
        zero["stage3_param_persistence_threshold"] = 0
    if offload == "yes":
        zero["offload_optimizer"] = {"device": "cpu"}
    adam = {} if offload == "yes" else {"optimizer": {"params": {"torch_adam": True}}}
    return {"zero_optimization": zero, "fp16": {"initial_scale_power": 0}, **adam}


def allocated(function: Callable[[], None]) -> tuple[int, int]:
    """Call a function. Return by how many bytes its allocations exceed what it frees: at the peak, and at the end."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    events: Any = profiled.profiler
    sizes = sorted((e.start_ns(), e.nbytes()) for e in events.kineto_results.events() if e.name() == "[memory]")
    now = peak = 0
    for _, size in sizes:
        now += size
        peak = max(peak, now)
    return peak, now


def measure(case: str, world: int) -> dict[str, float]:
    """Return the bytes between two steps (`kept`) and at the peak of a step (`peak`) on one of `world` ranks."""
    from state_bytes import live_bytes

    from packspeed.launch.config.batch import plan_batch
    from packspeed.launch.config.deepspeed_json import resolve_ds_config
    from packspeed.launch.config.run_file import RunFile
    from packspeed.launch.engine.build import build_engine
    from packspeed.launch.engine.distributed import Topology
    from packspeed.launch.engine.patches.gradient_norm import GradientNormHook
    from packspeed.model.moe import moe_layers
    from packspeed.model.mtp import future_labels

    run = RunFile.model_validate(run_values(case, world))
    plan, config = plan_batch(run, world), run.gpt_config(VOCABULARY)
    gc.collect()
    before = live_bytes()
    ds_config = resolve_ds_config(run, deepspeed_values(case), plan, case.split(",")[1], config)
    topology = Topology(0, 0, 1, torch.device("cpu"), plan.layout)
    engine = build_engine(config, run, ds_config, topology=topology)
    for layer in moe_layers(engine.module):
        if layer.part is not None:  # a fake exchange would return no counts
            layer.part = dataclasses.replace(layer.part, all_to_all=lambda received, sent, *sizes: received.copy_(sent))
    part = topology.sequence(SEQ_LEN)
    if part is not None:
        part = dataclasses.replace(part, all_to_all=lambda received, sent, *sizes: received.zero_())
    hook = GradientNormHook(engine, lambda norm, agreed: False)

    def step() -> None:
        for _ in range(plan.accumulation):
            tokens = torch.randint(0, VOCABULARY, (MICRO_BATCH, SEQ_LEN))
            more: dict[str, Any] = {} if part is None else {"sequence": part}
            if config.mtp:
                more = {"reduction": "sum", "future": future_labels(tokens, config.extra_heads)}
            tokens = tokens if part is None else part.cut(tokens)
            loss = engine(tokens, tokens, **more)
            loss = loss[0] if config.mtp else loss
            engine.backward(loss)
            del loss
            hook.agree(torch.zeros(1, dtype=torch.float64))
            engine.step()

    step()
    gc.collect()
    kept = live_bytes() - before
    peak, _ = allocated(step)
    return {"kept": kept, "peak": kept + peak}


def main() -> int:
    """Measure every case that the arguments name. Each has a process of its own, because engines leave tensors."""
    from deepspeed.runtime.zero import partition_parameters
    from state_bytes import fill_with_zeros, start_fake_group

    from packspeed.model import linear

    linear.CPU_HAS_BF16 = True  # the planner does not count the fp32 copies that a CPU without bf16 multiplies
    world, *cases = sys.argv[1:]
    start_fake_group(int(world))
    for name in ("empty", "empty_like"):
        fill_with_zeros(name)
    partition_parameters._orig_torch_empty = torch.empty
    for case in cases:
        print("BYTES", json.dumps({"case": case} | measure(case, int(world))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
