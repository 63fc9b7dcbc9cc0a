"""The planner's account of memory, against DeepSpeed's engine under a fake group and torch's profiler on a CPU."""

from __future__ import annotations

import dataclasses
import json

import pytest

from packspeed.launch.config.batch import plan_batch
from packspeed.launch.config.deepspeed_json import load_ds_config, resolve_ds_config
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.planner.engine_memory import engine_memory, states
from packspeed.launch.planner.machine import load_machine
from packspeed.launch.planner.plan import Job, engine_spec, job_of
from packspeed.launch.planner.this_cpu import this_cpu
from support import ROOT, prefork
from support.ranks import environment
from support.step_memory import VOCABULARY, deepspeed_values, run_values

# STAGE,PRECISION,FAMILY,RECOMPUTE,OFFLOAD,ACCUMULATION. States of every stage and precision at 8 and 1,024 ranks are in
# test_memory.py: the planner uses the same table.
CASES = {
    8: (
        "0,fp32,gpt,none,no,1", "1,bf16,gpt,full,no,2", "2,bf16,llama,none,no,1", "3,fp32,llama,full,no,1",
        "1,bf16,moe,none,no,1",
    ),
    64: ("2,bf16,gpt,none,yes,1", "3,bf16,llama,none,yes,1"),
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
