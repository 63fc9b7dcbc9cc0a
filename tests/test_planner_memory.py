"""The planner's account of memory, against DeepSpeed's engine under a fake group and torch's profiler on a CPU."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from packspeed.launch.config.batch import plan_batch
from packspeed.launch.config.deepspeed_json import load_ds_config, resolve_ds_config
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.planner.engine_memory import (
    EngineSpec,
    attention_bytes,
    block_bytes,
    engine_memory,
    hidden_bytes,
    multiplied_weights,
    states,
)
from packspeed.launch.planner.machine import load_machine
from packspeed.launch.planner.plan import Job, engine_spec, job_of
from packspeed.launch.planner.this_cpu import this_cpu
from packspeed.model.config import GPTConfig, Kernels
from packspeed.model.gpt import GPT, gpt_without_weights
from packspeed.model.sequence import SequencePart
from packspeed.model.tensor import TensorPart
from support import ROOT, prefork
from support.ranks import environment
from support.step_memory import VOCABULARY, deepspeed_values, run_values

LLAMA: dict[str, Any] = {
    "n_head": 4, "d_model": 128, "position": "rope", "mlp": "swiglu", "norm": "rmsnorm", "bias": False,
}  # fmt: skip

# STAGE,PRECISION,FAMILY,RECOMPUTE,OFFLOAD,ACCUMULATION and a parallel size. Without offload, states of every stage and
# precision at 8 and 1,024 ranks are in test_memory.py, and the planner uses the same table. So these cases have the
# buckets, the offload, and one of each layout, recompute, family and accumulation at a stage.
CASES = {
    8: (
        "0,fp32,gpt,none,no,1,tensor=4", "1,fp32,gpt,none,no,2,tensor=2", "1,bf16,gpt,full,no,2",
        "2,bf16,llama,none,no,1,sequence=2", "3,fp32,mixed,full,no,1", "1,bf16,moe,none,no,1,expert=2",
        "1,bf16,mtp,none,no,1",
    ),
    64: ("2,bf16,gpt,none,yes,1", "3,bf16,llama,none,yes,1,sequence=2", "1,bf16,gpt,none,no,2,tensor=8"),
    1024: (
        "2,fp32,llama,full,yes,2,tensor=2", "3,fp32,gpt,full,yes,1", "3,bf16,gpt,full,no,1,tensor=8",
        "2,bf16,moe,none,no,1,expert=4",
    ),
}  # fmt: skip


def job(case: str, world: int) -> Job:
    """What the planner reads of a case."""
    run = RunFile.model_validate(run_values(case, world))
    return job_of(run, deepspeed_values(case), this_cpu(), world, VOCABULARY)


@pytest.mark.launch
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", CASES)
def test_states_and_the_peak_of_a_step_are_those_of_the_engine(world: int) -> None:
    script = ROOT / "tests" / "support" / "step_memory.py"
    for case in CASES[world]:  # a process each, because an engine leaves tensors behind
        done = prefork.run(script, [str(world), case], [environment()])
        found = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("BYTES ")]
        assert len(found) == 1, done.stdout[-2000:] + done.stderr[-2000:]
        spec = dataclasses.replace(engine_spec(job(case, world)), adam_copies="yes" not in case)
        account = engine_memory(spec)
        host = sum(account.host.values())
        assert sum(account.kept.values()) + host == pytest.approx(found[0]["kept"], rel=0.01), case
        within = 0.05 if "yes" in case else 0.03
        assert account.peak.total + host == pytest.approx(found[0]["peak"], rel=within), (case, account.peak)


SHAPES: dict[str, dict[str, Any]] = {
    "gpt": {"n_head": 4, "d_model": 128, "bias": False, "mlp": "gelu"},
    "llama": LLAMA | {"n_kv_head": 2, "d_ff": 384},
    "qk_norm": LLAMA | {"n_kv_head": 1, "head_dim": 48, "d_ff": 384, "qk_norm": True},
    "headwise": LLAMA | {"d_ff": 384, "attention_gate": "headwise"},
    "elementwise": LLAMA | {"qk_norm": True, "attention_gate": "elementwise", "value_embeddings": 1},
    "experts": LLAMA | {"n_expert": 4, "d_expert": 96},
    "shared": LLAMA | {"n_expert": 8, "d_expert": 96, "n_expert_active": 3, "n_shared_expert": 1},
}


def kept_by_a_block(
    shape: str, precision: str, tensor: int = 1, sequence: int = 1, kernels: Kernels = "eager"
) -> float:
    """Bytes per token that autograd keeps for one more block, parameters aside. autocast: bf16 over fp32 weights.

    tensor, sequence: as rank 0 of that many, whose exchanges move nothing.
    """
    rows, length = 2, 64

    def kept(layers: int) -> int:
        config = GPTConfig(n_layer=layers, vocab_size=128, max_seq_len=length, kernels=kernels, **SHAPES[shape])
        model = GPT(config, TensorPart(0, tensor))
        model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages: dict[int, torch.UntypedStorage] = {}

        def note(saved: torch.Tensor) -> torch.Tensor:
            storages[saved.untyped_storage().data_ptr()] = saved.untyped_storage()
            return saved

        part = SequencePart(0, sequence, length, lambda received, *_: None) if sequence > 1 else None
        tokens = torch.zeros(rows, length // sequence, dtype=torch.int64)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast")
        with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved), autocast:
            loss = model(tokens, tokens, sequence=part)
        del loss
        return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in parameters)

    return (kept(2) - kept(1)) * sequence / (rows * length)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's RMSNorm under autocast
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_block_keeps_what_is_counted(shape: str, precision: str) -> None:
    model = GPTConfig(n_layer=2, vocab_size=128, max_seq_len=64, kernels="eager", **SHAPES[shape])
    spec = EngineSpec(
        model=model, seq_len=64, micro_batch=2, accumulation=1, ranks=8, stage=0 if precision == "autocast" else 1,
        precision="fp32" if precision == "fp32" else "bf16", kernels="eager", device="cpu",
    )  # fmt: skip
    copies = 2 * multiplied_weights(spec) / 128 if precision == "autocast" else 0
    assert block_bytes(spec) + copies == pytest.approx(kept_by_a_block(shape, precision), rel=0.005)


@pytest.mark.parametrize(("tensor", "sequence"), [(2, 1), (1, 2), (1, 4), (2, 2)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", ["gpt", "llama", "qk_norm"])
def test_a_block_keeps_what_is_counted_if_ranks_share_it(
    shape: str, precision: str, tensor: int, sequence: int
) -> None:
    if shape == "qk_norm" and tensor > 1:
        tensor = 1  # it has one key head
    model = GPTConfig(n_layer=2, vocab_size=128, max_seq_len=64, kernels="eager", **SHAPES[shape])
    spec = EngineSpec(
        model=model, seq_len=64, micro_batch=2, accumulation=1, ranks=8, stage=1, precision=precision, kernels="eager",
        device="cpu", tensor=tensor, sequence=sequence,
    )  # fmt: skip
    assert block_bytes(spec) == pytest.approx(kept_by_a_block(shape, precision, tensor, sequence), rel=0.005)


@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_a_tensor_rank_has_the_parameters_that_are_counted(tensor: int) -> None:
    """Divided matrices, and the norms, positions, biases and scales that every rank has."""
    for changes in (
        {"bias": True}, {"bias": "attention", "qk_norm": True, "position": "rope"},
        {"bias": "qkv", "mlp": "swiglu", "norm": "rmsnorm", "tie_embeddings": False, "residual_scale": True},
        {"attention_gate": "headwise", "value_embeddings": 1, "value_residual": True, "position": "rope"},
        {"attention_gate": "elementwise", "n_kv_head": 8, "value_embeddings": 2},
    ):  # fmt: skip
        model = GPTConfig(n_layer=2, n_head=8, d_model=128, vocab_size=5000, max_seq_len=4096, **changes)
        spec = EngineSpec(
            model=model, seq_len=64, micro_batch=2, accumulation=1, ranks=8, stage=1, precision="bf16", tensor=tensor,
        )  # fmt: skip
        sizes = [parameter.numel() for parameter in gpt_without_weights(model, TensorPart(0, tensor)).parameters()]
        assert (spec.parameters, spec.largest) == (sum(sizes), max(sizes))


@pytest.mark.parametrize("shape", ["gpt", "llama", "shared"])
def test_native_kernels_keep_no_activation_of_an_mlp(shape: str) -> None:
    """The eager ones keep it, and SwiGLU's SiLU too."""
    model = GPTConfig(n_layer=2, vocab_size=128, max_seq_len=64, kernels="eager", **SHAPES[shape])
    eager = EngineSpec(
        model=model, seq_len=64, micro_batch=2, accumulation=1, ranks=8, stage=1, precision="fp32", kernels="eager",
        device="cpu",
    )  # fmt: skip
    native = dataclasses.replace(eager, kernels="native")
    spared = hidden_bytes(eager) - hidden_bytes(native)
    found = kept_by_a_block(shape, "fp32") - kept_by_a_block(shape, "fp32", kernels="native")
    attention = attention_bytes(eager) - attention_bytes(native)
    assert found - attention == pytest.approx(spared, rel=0.01)


def test_zero_and_offload_move_memory_where_they_say() -> None:
    on_device, on_host = {}, {}
    for name in ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"):
        run = RunFile.model_validate(run_values("1,bf16,gpt,none,no,1", 64))
        raw = load_ds_config(name)
        spec = engine_spec(job_of(run, raw, load_machine("h100-80gb"), 64, VOCABULARY))
        device, host = states(dataclasses.replace(spec, reduce_bucket=0))
        on_device[name], on_host[name] = sum(device.values()), sum(host.values())
    assert on_device["zero3"] < on_device["zero2"] == on_device["zero1"]
    assert on_host["zero1"] == on_host["zero2"] == on_host["zero3"] == 0
    assert on_device["zero3_offload"] < on_device["zero3"]
    assert min(on_host["zero3_offload"], on_host["zero2_offload"]) > 0


def test_buckets_are_those_of_the_final_deepspeed_configuration() -> None:
    run = RunFile.model_validate(run_values("3,bf16,gpt,none,no,1", 8))
    config = run.gpt_config(VOCABULARY)
    final = resolve_ds_config(run, load_ds_config("zero3"), plan_batch(run, 8), "bf16", config)
    spec = engine_spec(job_of(run, load_ds_config("zero3"), load_machine("h100-80gb"), 8, VOCABULARY))
    assert spec.reduce_bucket == final["zero_optimization"]["reduce_bucket_size"]
    assert engine_memory(spec).kept["buckets"] == 4 * spec.reduce_bucket


def test_sharing_rows_weights_and_experts_divides_their_parts() -> None:
    run = RunFile.model_validate(run_values("1,bf16,moe,none,no,1", 8))
    one = engine_spec(job_of(run, load_ds_config("zero1"), load_machine("h100-80gb"), 8, VOCABULARY))
    rows, experts = (dataclasses.replace(one, **{key: 2}) for key in ("sequence", "expert"))
    assert engine_memory(rows).peak.kinds["activations"] < engine_memory(one).peak.kinds["activations"]
    assert rows.parameters == one.parameters
    assert experts.parameters < one.parameters
    assert experts.divided == one.divided
