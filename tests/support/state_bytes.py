"""Measure the bytes per parameter that one rank of many holds: DeepSpeed's engine with torch's fake process group.

    python tests/support/state_bytes.py WORLD [STAGE,PRECISION[,EXPERT] ...]      prints one JSON object

If EXPERT is given, the model has experts, and EXPERT ranks share them.

A fake group answers every collective at once and moves nothing, so that one process is rank 0 of 8 or 1,024. Tensors
are counted by their storages: those that Python can reach, and their gradients.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

MODEL = {"n_layer": 4, "n_head": 4, "d_model": 256, "position": "rope", "mlp": "swiglu", "norm": "rmsnorm"}
RUN_FILE = """\
name: bytes
runs_dir: /nowhere
model: {model}
data: {{path: /nowhere, seq_len: 16}}
train: {{steps: 2, global_batch_tokens: {tokens}, micro_batch: 1, precision: {precision}, optimizer: {{lr: 1e-3}}}}
"""
EXPERTS = {"bias": "false", "n_expert": 16, "d_expert": 192, "n_expert_active": 2}
ACCUMULATION = 2


def live_bytes() -> int:
    """Return the bytes of all tensors on the CPU. Each storage is counted once."""
    storages: dict[int, int] = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor) and found.device.type == "cpu":
            for tensor in (found, found.grad if found.is_leaf else None):
                if tensor is not None:
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def start_fake_group(world: int) -> None:
    """Make this process rank 0 of `world`, for torch and for DeepSpeed."""
    import deepspeed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from packspeed.launch.engine.ops import prepare_for_ops

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world), LOCAL_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", OMP_NUM_THREADS="1")
    prepare_for_ops()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    deepspeed.init_distributed("gloo", verbose=False, dist_init_required=False)


def measure(stage: int, precision: str, world: int, expert: int | None = None) -> dict[str, float]:
    """Return bytes per parameter: `kept` between steps, and `gradients`, the bytes added when all gradients exist.

    The result also has `one_matrix`, the bytes of the embedding's gradient in fp32. expert: the number of ranks that
    share the experts; then the result has `experts`, the share of the parameters that belong to experts. All bytes are
    per parameter of the complete model.
    """
    from packspeed.launch.config.batch import BatchPlan
    from packspeed.launch.config.deepspeed_json import resolve_ds_config
    from packspeed.launch.config.layout import Layout
    from packspeed.launch.config.loading import load_run_file
    from packspeed.launch.engine.build import build_engine
    from packspeed.launch.engine.distributed import Topology
    from packspeed.launch.engine.patches.gradient_norm import GradientNormHook
    from packspeed.launch.planner.engine_memory import expert_parameters
    from packspeed.model.config import largest_parameter, num_parameters
    from packspeed.model.moe import moe_layers

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        shape = MODEL | (EXPERTS if expert else {})
        text = RUN_FILE.format(model=shape, tokens=16 * world * ACCUMULATION, precision=precision).replace("'", "")
        path.write_text(text)
        run = load_run_file(path)
    config = run.gpt_config(2048)
    # Buckets that hold little beside the model, so that they do not count.
    raw: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 2, "allgather_bucket_size": 2}
    raw |= {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    layout = Layout(world, expert=expert or 1)
    plan = BatchPlan(1, ACCUMULATION, layout)
    torch_adam = {"params": {"torch_adam": True}}
    given = {"zero_optimization": raw, "optimizer": torch_adam, "fp16": {"initial_scale_power": 0}}
    ds_config = resolve_ds_config(run, given, plan, precision, config)
    gc.collect()
    before = live_bytes()
    topology = Topology(0, 0, 1, torch.device("cpu"), layout)
    engine = build_engine(config, run, ds_config, topology=topology)
    for layer in moe_layers(engine.module):
        if layer.part is not None:  # a fake exchange would return no counts
            layer.part = dataclasses.replace(layer.part, all_to_all=lambda received, sent, *sizes: received.copy_(sent))
    hook = GradientNormHook(engine, lambda norm, agreed: False)
    held: dict[str, float] = {}
    for _ in range(2):
        held["gradients"] = 0
        for _ in range(ACCUMULATION):
            tokens = torch.zeros(1, 16, dtype=torch.long)
            loss = engine(tokens, tokens)
            engine.backward(loss)
            del loss
            gc.collect()
            held["gradients"] = max(held["gradients"], live_bytes() - before)
            hook.agree(torch.zeros(1, dtype=torch.float64))
            engine.step()
        gc.collect()
        held["kept"] = live_bytes() - before
    held["gradients"] -= held["kept"]
    held["one_matrix"] = 4 * largest_parameter(config)
    parameters = num_parameters(config, padded=True)
    if expert:
        held["experts"] = expert_parameters(config)
    return {key: round(value / parameters, 5) for key, value in held.items()}


def fill_with_zeros(name: str) -> None:
    """Let torch.empty or torch.empty_like, whichever `name` is, return zeros.

    A fake group writes nothing into the tensors that collectives should fill. Gradients would be whatever the memory
    held before, and a step with a gradient that is not finite is dropped, before the optimizer has allocated its state.
    """
    original = getattr(torch, name)

    def filled(*arguments: Any, **options: Any) -> torch.Tensor:
        with torch.no_grad():
            tensor: torch.Tensor = original(*arguments, **options)
            return tensor.zero_()

    setattr(torch, name, filled)


def main() -> int:
    """Measure every stage and precision that the arguments name, in this process."""
    import many_runs
    from deepspeed.runtime.zero import partition_parameters

    world, *rows = sys.argv[1:]
    many_runs.let_fp16_run()
    start_fake_group(int(world))
    for name in ("empty", "empty_like"):
        fill_with_zeros(name)
    partition_parameters._orig_torch_empty = torch.empty  # where DeepSpeed keeps the function for ZeRO-3
    for row in rows:
        stage, precision, *expert = row.split(",")
        found = measure(int(stage), precision, int(world), *map(int, expert))
        print("BYTES", json.dumps({"row": row} | found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
