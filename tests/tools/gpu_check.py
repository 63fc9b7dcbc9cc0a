"""Check on one GPU, in under ten minutes, what cannot be tested without a GPU.

    make gpu-check                                    or: python tests/tools/gpu_check.py [--nanogpt CHECKOUT]
    python tests/tools/gpu_check.py --cpu             the CPU form of every part, as `make test` runs it
    python tests/tools/gpu_check.py --only prove,waits --json

Needs a checkout with its environment and one GPU, neither the internet nor root. The most important parts run first.
Each part is a process with its own time limit. It prints one line per check with what was measured:

    PASS waits zero2 x 8: 1 per step  {"ms_per_step": 61.2}

FAIL: the check has failed, or its part ran out of time or ended in an error, whose last lines follow. SKIP: this
machine cannot run the check, and the line says why. The last line is a summary; the exit code is 0 only if nothing
failed. With --json, stdout gets one object with all lines, and the lines themselves go to stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

TOTAL_S = 570.0
TAIL = 12  # lines of a failed part's output that are shown
CLI = [sys.executable, "-c", "import sys; from packspeed.launch.cli import main; sys.exit(main())"]


@dataclasses.dataclass
class Context:
    """What every part gets. `folder` is shared by the parts: the first one puts the dataset and the run file there."""

    cpu: bool
    folder: Path
    nanogpt: str

    @property
    def patience(self) -> float:
        """Return the factor by which all time limits are multiplied: 5 on a CPU, which may be busy, otherwise 1."""
        return 5.0 if self.cpu else 1.0

    @property
    def run_file(self) -> Path:
        """Return the path of the run file that all parts that train use."""
        return self.folder / "run.yaml"

    def say(self, verdict: str | bool, what: str, **figures: Any) -> None:
        """Print the line of a check. verdict: True, False or "SKIP". what: the check. figures: what was measured."""
        word = {True: "PASS", False: "FAIL"}.get(verdict, "SKIP") if isinstance(verdict, bool) else verdict
        print(word, what, json.dumps(figures, default=str), flush=True)


# The numbers of kernels ---------------------------------------------------------------------------------------------


def distance(found: Any, expected: Any) -> float:
    """Return the L2 norm of the difference, divided by the L2 norm of what was expected."""
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def milliseconds(function: Callable[[], Any], device: Any, repeats: int = 3) -> float:
    """Return the median time of a call in milliseconds. On a GPU the time ends when the GPU has finished."""
    import torch

    times = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[2:])


def outputs_and_gradients(function: Callable[..., Any], inputs: Sequence[Any], dtype: Any) -> list[Any]:
    """Return the outputs of a function and the gradients of its inputs, for fixed output gradients rounded to dtype."""
    import torch

    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    found = function(*leaves)
    outputs = [y for y in (found if isinstance(found, tuple) else (found,)) if y is not None]
    weights = [(torch.arange(y.numel(), device=y.device).double().sin() + 0.25).to(dtype) for y in outputs]
    torch.autograd.backward(outputs, [w.view(y.shape).to(y.dtype) for w, y in zip(weights, outputs, strict=True)])
    return [y.detach() for y in outputs] + [x.grad for x in leaves]


def kernels(context: Context) -> None:
    """Compare every kernel with torch's operations in fp64, check that equal inputs give equal bits, and time both."""
    import torch

    from packspeed.model import reference_ops as eager
    from packspeed.model.kernels import choose
    from packspeed.model.rope import rope_table

    device = torch.device("cpu" if context.cpu else "cuda")
    fast: Any = choose("auto" if context.cpu else "triton", device)
    rows = 16 if context.cpu else 8192
    widths = (96,) if context.cpu else (768, 1600, 4096, 8192)
    heads = ((1, 8, 4, 16),) if context.cpu else ((4, 2048, 32, 128), (8, 1024, 12, 64))
    vocabularies = ((101, 128),) if context.cpu else ((50257, 50304), (32000, 32000), (128256, 128256))
    dtypes = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2} | ({} if context.cpu else {torch.float16: 2e-3})
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=generator, device=device)

    def cases() -> Iterator[tuple[str, Callable[..., Any], list[Any]]]:  # (name, function of ops and inputs, inputs)
        for width, rms in itertools.product(widths, (True, False)):
            bias = [] if rms else [normal(width)]

            def norm(ops: Any, x: Any, branch: Any, weight: Any, *bias: Any, rms: bool = rms) -> Any:
                return ops.add_norm(x, branch, weight, bias[0] if bias else None, 1e-5, rms)

            yield (
                ("rmsnorm" if rms else "layernorm"),
                norm,
                [normal(rows, width), normal(rows, width), normal(width), *bias],
            )
        for batch, length, count, width in heads:
            table = rope_table(torch.arange(length, device=device)[None], width, 10_000.0)

            def rotate(ops: Any, x: Any, table: Any = table, count: int = count) -> Any:
                return ops.rotate(x.clone(), table, [count, 2, 2])  # queries, keys and values; it may overwrite them

            yield "rotate", rotate, [normal(batch, length, count + 4, width)]
        for kind, width in (("gelu", 3072), ("gelu_tanh", 3072), ("swiglu", 2 * 11008)):
            size = 32 if context.cpu else width
            yield kind, (lambda ops, x, kind=kind: ops.activate(x, kind)), [normal(rows, size)]

    def losses(ops: Any, logits: Any, labels: Any, vocabulary: int) -> list[Any]:
        own = logits.clone()  # becomes the gradient
        return [ops.row_losses(own, labels, vocabulary, 1e-4, True), own]

    def record(worst: dict[str, Any], found: Sequence[Any], again: Sequence[Any], expected: Sequence[Any]) -> None:
        worst["error"] = max(worst.get("error", 0.0), *map(distance, found, expected))
        worst["repeatable"] = worst.get("repeatable", True) and all(map(torch.equal, found, again))

    for dtype, bound in dtypes.items():
        report: dict[str, dict[str, Any]] = {}
        for name, function, inputs in cases():
            given = [x.to(dtype) for x in inputs]

            def run(ops: Any, inputs: Any = given, function: Any = function, dtype: Any = dtype) -> list[Any]:
                return outputs_and_gradients(functools.partial(function, ops), inputs, dtype)

            worst = report.setdefault(name, {})
            record(worst, run(fast), run(fast), run(eager, [x.double() for x in given]))
            worst["ms"], worst["eager_ms"] = (milliseconds(lambda ops=ops: run(ops), device) for ops in (fast, eager))
        for vocabulary, padded in vocabularies:
            labels = torch.randint(0, vocabulary, (rows // 4,), generator=generator, device=device)
            logits = (normal(rows // 4, padded) * 3).to(dtype)
            logits[:, vocabulary:] = 0

            def loss(ops: Any, x: Any = logits, labels: Any = labels, vocabulary: int = vocabulary) -> list[Any]:
                return losses(ops, x, labels, vocabulary)

            worst = report.setdefault("cross entropy", {})
            record(worst, loss(fast), loss(fast), loss(eager, logits.double()))
            worst["ms"], worst["eager_ms"] = (milliseconds(lambda ops=ops: loss(ops), device) for ops in (fast, eager))
        for name, worst in report.items():
            good = worst["error"] < bound and worst["repeatable"]
            context.say(good, f"kernels {name} {str(dtype)[6:]}", bound=bound, **rounded(worst))


def varlen(context: Context) -> None:
    """Compare attention inside documents, with and without a window, with one fp32 call per document. Run it twice."""
    import torch
    from torch.nn import functional as F

    from packspeed.model.attention import Documents, varlen_attention
    from packspeed.model.kernels import choose

    device = torch.device("cpu" if context.cpu else "cuda")
    shapes = ((2, 64, 4, 2, 16),) if context.cpu else ((8, 1024, 12, 12, 64), (4, 4096, 32, 8, 128))
    generator = torch.Generator(device=device).manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    for dtype, (batch, length, heads, kv_heads, width), share in itertools.product(
        (torch.bfloat16, torch.float32) if context.cpu else (torch.bfloat16, torch.float16), shapes, (None, 8)
    ):
        window = None if share is None else length // share
        inputs = [
            torch.randn(batch, length, n, width, generator=generator, device=device).to(dtype)
            for n in (heads, kv_heads, kv_heads)
        ]
        lengths: list[int] = []
        while sum(lengths) < batch * length:  # documents of many lengths, none across the end of a row
            lengths.append(min(1 + 37 * len(lengths) ** 2 % length, length - sum(lengths) % length))
        documents = Documents.of(lengths, inputs[0][..., 0, 0])

        def band(length: int, window: int | None = window) -> Any:
            ones = torch.ones(length, length, dtype=torch.bool, device=device)
            return None if window is None else ones.tril().triu(1 - window)

        def each(q: Any, k: Any, v: Any, lengths: list[int] = lengths, band: Callable[[int], Any] = band) -> Any:
            parts = zip(*(x.flatten(0, 1).split(lengths) for x in (q, k, v)), strict=True)
            rows = [
                F.scaled_dot_product_attention(
                    *(x.transpose(0, 1)[None] for x in part),
                    attn_mask=(mask := band(part[0].size(0))),
                    is_causal=mask is None,
                    enable_gqa=q.size(2) != k.size(2),
                )[0].transpose(0, 1)
                for part in parts
            ]
            return torch.cat(rows).view(q.shape)

        attend = choose("auto", device).attend
        run = lambda: outputs_and_gradients(lambda q, k, v: attend(q, k, v, documents, window), inputs, dtype)  # noqa: E731, B023
        first, again = run(), run()
        expected = outputs_and_gradients(each, [x.float() for x in inputs], dtype)
        error = max(distance(a, b.double()) for a, b in zip(first, expected, strict=True))
        same = all(map(torch.equal, first, again))
        figures = {"documents": len(lengths), "error": error, "repeatable": same, "ms": milliseconds(run, device)}
        native = not context.cpu and varlen_attention() is not None
        context.say(
            error < (1e-4 if dtype == torch.float32 else 2e-2) and same,
            f"varlen {(batch, length, heads, kv_heads, width)} {str(dtype)[6:]} window {window or 'none'}",
            one_call=native, **rounded(figures),
        )  # fmt: skip


def experts(context: Context) -> None:
    """Compare the experts' grouped GEMMs with a loop in fp64. Repeat them, and time a dense GEMM too."""
    import torch
    from torch.nn import functional as F

    from packspeed.model.moe import grouped_linear

    device = torch.device("cpu" if context.cpu else "cuda")
    shapes = ((3, 64, 32, 48),) if context.cpu else ((8, 16384, 4096, 14336), (128, 32768, 2048, 768))
    generator = torch.Generator(device=device).manual_seed(0)
    for number, rows, inputs, outputs in shapes:
        x = torch.randn(rows, inputs, generator=generator, device=device).bfloat16()
        weight = torch.randn(number * outputs, inputs, generator=generator, device=device).bfloat16()
        sizes = torch.arange(number).double().pow(1.5).div_(float(torch.arange(number).double().pow(1.5).sum()))
        counts = (sizes * rows).floor().long()  # expert 0 has no rows
        counts[-1] += rows - counts.sum()
        ends = counts.cumsum(0).to(device, torch.int32)

        def loop(x: Any, weight: Any, counts: Any = counts, number: int = number) -> Any:
            parts = zip(x.split(counts.tolist()), weight.chunk(number), strict=True)
            return torch.cat([part @ matrix.t() for part, matrix in parts])

        run = lambda: outputs_and_gradients(lambda a, b: grouped_linear(a, b, ends), [x, weight], torch.bfloat16)  # noqa: E731, B023
        dense = lambda: outputs_and_gradients(F.linear, [x, weight[:outputs]], torch.bfloat16)  # noqa: E731, B023
        first, again = run(), run()
        expected = outputs_and_gradients(loop, [x.double(), weight.double()], torch.bfloat16)
        error = max(distance(a, b) for a, b in zip(first, expected, strict=True))
        same = all(map(torch.equal, first, again))
        figures = {
            "error": error,
            "repeatable": same,
            "times_dense": milliseconds(run, device) / milliseconds(dense, device),
        }
        context.say(error < 1.5e-2 and same, f"experts {(number, rows, inputs, outputs)} bfloat16", **rounded(figures))


# Training -----------------------------------------------------------------------------------------------------------

RUN_FILE = """\
name: check
runs_dir: {folder}/runs
model: {model}
data: {{path: {folder}/tokens, seq_len: {seq_len}}}
train:
  steps: 12
  global_batch_tokens: {tokens}
  micro_batch: {micro_batch}
  precision: bf16
  optimizer: {{lr: 1e-3}}
  schedule: {{warmup_steps: 4}}
eval: {{every_steps: 0}}
checkpoint: {{every_steps: 4, keep: 2}}
monitor: {{log_every_steps: 100, tensorboard: false}}
deepspeed: zero1
"""
GPU_RUN = {"model": "{preset: gpt2-124m}", "seq_len": 1024, "tokens": 65536, "micro_batch": 16}
CPU_RUN = {"model": "{n_layer: 2, n_head: 2, d_model: 32}", "seq_len": 32, "tokens": 256, "micro_batch": 8}


def data(context: Context) -> None:
    """Prepare Python's own library as the dataset, and write the run file."""
    library = sysconfig.get_paths()["stdlib"]
    sources = [f"{library}/argparse.py", f"{library}/typing.py"] if context.cpu else [library, "--include", "*.py"]
    skipped = [] if context.cpu else ["--exclude", "site-packages/*", "--exclude", "*test*"]
    tokenizer = "bytes" if context.cpu else "gpt2"
    command = ["prepare", *sources, *skipped, "--tokenizer", tokenizer, "--val-fraction", "0.05"]
    done = subprocess.run([*CLI, *command, "--out", str(context.folder / "tokens")], capture_output=True, text=True)
    context.run_file.write_text(RUN_FILE.format(folder=context.folder, **(CPU_RUN if context.cpu else GPU_RUN)))
    manifest = context.folder / "tokens" / "manifest.json"
    context.say(done.returncode == 0 and manifest.is_file(), "data prepared", error=done.stderr[-500:])


def train(context: Context, name: str, *sets: str, zero: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Train the run file in this process. Returns the lines of metrics.jsonl. zero: a DeepSpeed configuration."""
    from packspeed.launch.train import main

    if context.cpu:
        from support.many_runs import let_fp16_run

        let_fp16_run()
    path = context.folder / f"{name}.json"
    if zero is not None:
        path.write_text(json.dumps(zero))
        sets = (f"deepspeed={path}", *sets)
    options = [f"name={name}", "checkpoint.every_steps=0", *sets]
    code = main(["--config", str(context.run_file), "--fresh", *(x for text in options for x in ("--set", text))])
    if code:
        raise RuntimeError(f"{name}: exit code {code}")
    shutil.rmtree(context.folder / "runs" / name / "checkpoints")  # 2 GB on a GPU
    gc.unfreeze()  # the loop hides the engine from the collector, which would keep its memory
    gc.collect()
    lines = (context.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def compare(context: Context, what: str, lines: list[dict[str, Any]], base: list[dict[str, Any]], bound: float) -> None:
    """Print PASS if the loss of a run falls and differs from that of the run `base` by at most `bound` in every step.

    lines, base: the lines of both runs' metrics.jsonl. `bound` grows by 0.5 for each step that fp16 skipped, because
    the loss falls by less than that per step.
    """
    skipped = sum("skipped" in line for line in lines)
    bound += 0.5 * skipped
    losses = [line["loss"] for line in lines if line["loss"] is not None]
    pairs = [(a["loss"], b["loss"]) for a, b in zip(lines, base, strict=True) if a["loss"] is not None]
    apart = max((abs(a - b) for a, b in pairs), default=math.inf)
    step_s = statistics.median(line["step_time_s"] for line in lines[3:])
    context.say(
        len(losses) >= len(lines) - 3 and losses[-1] < losses[0] and apart <= bound,
        what,
        loss=[losses[0], losses[-1]], apart=round(apart, 6), bound=bound, skipped_steps=skipped,
        ms_per_step=round(1000 * step_s, 2), mfu=lines[-1]["mfu"], memory_gib=lines[-1]["memory_gib"],
    )  # fmt: skip


def prove(context: Context) -> None:
    """Check that a killed and resumed run equals an uninterrupted one, bit for bit (`packspeed prove`)."""
    # On one GPU there is no resume with other ranks. On a CPU there is none either if nothing else divides the batch.
    odd = ["--set", "train.global_batch_tokens=224", "--set", "train.micro_batch=7"]
    # Four layers on a GPU: a checkpoint of all twelve takes longer than their steps.
    form = ["--steps", "8", *odd] if context.cpu else ["--steps", "12", "--set", "model.n_layer=4"]
    command = ["prove", str(context.run_file), *form, "--ranks", "1", "--seed", "1", "--json"]
    done = subprocess.run([*CLI, *command], capture_output=True, text=True)
    if not done.stdout.strip():
        context.say(False, "prove", error=done.stderr[-1000:])
        return
    for leg in json.loads(done.stdout)["legs"]:
        context.say(leg["first_difference"] is None, f"prove {leg['name']}", **leg)


def precisions(context: Context) -> None:
    """Train in fp32, fp16 and fp8, and compare the losses with those in bf16."""
    import torch

    base = train(context, "bf16")
    compare(context, "precision fp32", train(context, "fp32", "train.precision=fp32"), base, 0.05)
    compare(context, "precision fp16", train(context, "fp16", "train.precision=fp16"), base, 0.05)
    from packspeed.launch.config.errors import PackspeedError
    from packspeed.launch.config.loading import load_run_file

    wide = ("model.d_model=64", "train.fp8_skip_blocks=0") if context.cpu else ()
    try:
        load_run_file(context.run_file, ["train.precision=fp8", *wide])
    except PackspeedError as error:
        context.say("SKIP", "precision fp8", why=str(error))
        return
    if not context.cpu and torch.cuda.get_device_capability() < (8, 9):
        context.say("SKIP", "precision fp8", why=f"{torch.cuda.get_device_name()} has no fp8")
        return
    fp8 = train(context, "fp8", "train.precision=fp8", *wide)
    compare(context, "precision fp8", fp8, train(context, "bf16-wide", *wide) if wide else base, 0.1)


def waits(context: Context) -> None:
    """Check that the host waits for the device at most once per step, as support/host_waits.py counts it."""
    from support import host_waits

    if context.cpu:
        host_waits.pretend_to_be_a_gpu()
    else:
        host_waits.watch_the_gpu()
    rows = (CPU_RUN if context.cpu else GPU_RUN)["micro_batch"]
    for stage, accumulation in itertools.product((0, 1, 2, 3), (1, 8)):
        zero = {"zero_optimization": {"stage": stage, "overlap_comm": stage > 1}}
        path = context.folder / f"waits{stage}.json"
        path.write_text(json.dumps(zero))
        name = f"waits zero{stage} x {accumulation}"
        sets = [
            f"name=waits{stage}-{accumulation}", f"deepspeed={path}", "checkpoint.every_steps=0",
            f"train.micro_batch={max(1, int(rows) // accumulation)}", "train.steps=6", "train.precision=bf16",
            f"train.global_batch_tokens={int((CPU_RUN if context.cpu else GPU_RUN)['seq_len']) * int(rows)}",
        ]  # fmt: skip
        options = ["--config", str(context.run_file), "--fresh", *(x for text in sets for x in ("--set", text))]
        code, steps = host_waits.train(options, "cpu" if context.cpu else "cuda")
        shutil.rmtree(context.folder / "runs" / f"waits{stage}-{accumulation}" / "checkpoints")
        counts = [len(step) for step in steps[2:]]  # stage 3 compares the order of the modules in its first passes
        context.say(code == 0 and max(counts) <= 1, f"{name}: {max(counts)} per step", where=sorted(set(steps[-1])))


def offload(context: Context) -> None:
    """Train with optimizer and weights, or activations, in host memory. Offloading activations must change no bit."""
    base = train(context, "on-device")
    sets = ("model.activation_checkpointing=full", "model.activation_offload=true")
    compare(context, "offload activations", train(context, "activations", *sets), base, 0.0)
    for name in ("zero2_offload", "zero3_offload"):
        compare(context, f"offload {name}", train(context, name, f"deepspeed={name}"), base, 0.05)


def compiled(context: Context) -> None:
    """Train with torch.compile and with DeepSpeed's DeepCompile, and compare the losses with those of neither."""
    base = train(context, "not-compiled", "train.steps=6")
    if context.cpu and shutil.which(os.environ.get("CXX", "c++")) is None:
        context.say("SKIP", "compile", why="no C++ compiler")
    else:
        compare(context, "compile", train(context, "compile", "model.kernels=compile", "train.steps=6"), base, 0.05)
    if context.cpu:
        context.say("SKIP", "DeepCompile", why="DeepSpeed has it on NVIDIA GPUs only")
        return
    zero = {"zero_optimization": {"stage": 1}, "compile": {"deepcompile": True}}
    compare(context, "DeepCompile", train(context, "deepcompile", "train.steps=6", zero=zero), base, 0.05)


def memory(context: Context) -> None:
    """Measure the bytes per parameter between two steps: weights, optimizer states and buckets."""
    import torch

    from packspeed.launch.training import loop

    allocated = tensor_bytes if context.cpu else torch.cuda.memory_allocated
    original, held = loop.train_step, [0.0]

    def measured(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(trainer, *args, **kwargs)
        count = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.engine.module.parameters())
        held[0] = (allocated() - before) / count
        return result

    loop.train_step = measured
    short = ("train.steps=3", "train.schedule.warmup_steps=1")
    small = {"reduce_bucket_size": 262144}  # 1 MB, so that buckets do not show in a model of a GPU
    three = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 262144}
    for stage, more in ((1, {"allgather_bucket_size": 262144}), (2, {"allgather_bucket_size": 262144}), (3, three)):
        gc.unfreeze()  # the loop hides from the collector what was made before it
        gc.collect()
        before = allocated()
        train(context, f"memory{stage}", *short, zero={"zero_optimization": {"stage": stage, **small, **more}})
        # bf16 weights 2, fp32 weights 4, Adam 8, and 4 if a gradient is kept. Buckets show in the CPU's small model.
        bound = 19.0 if stage < 3 else 80.0 if context.cpu else 22.0
        good = 10 < held[0] < bound
        context.say(good, f"memory zero{stage}", bytes_per_parameter=round(held[0], 2), bound=bound)


def tensor_bytes() -> int:
    """Return the bytes of all tensors that Python can reach. Each storage is counted once."""
    import torch

    gc.unfreeze()
    storages = {}
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter) and found.layout == torch.strided:
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def bench(context: Context) -> None:
    """Run `packspeed bench --compare`: speed beside transformers' GPT-2, a bare loop and nanoGPT; MFU for two peaks."""
    rows_file = context.folder / "bench.json"
    quick = (
        ["--rounds", "1", "--steps", "1", "--precision", "bf16"] if context.cpu else ["--rounds", "3", "--steps", "4"]
    )
    command = ["bench", str(context.run_file), "--ranks", "1", "--compare", *quick, "--json", str(rows_file)]
    if not context.cpu:
        command += ["--precision", "autocast,bf16"]
    if context.nanogpt:
        command += ["--nanogpt", context.nanogpt]
    else:
        context.say("SKIP", "bench nanogpt", why="give a checkout: --nanogpt PATH, or NANOGPT in the environment")
    done = subprocess.run([*CLI, *command], capture_output=True, text=True)
    if not rows_file.is_file():
        context.say(False, "bench", error=(done.stdout + done.stderr)[-1000:])
        return
    for row in json.loads(rows_file.read_text()):
        name = f"bench {row['who']} {row['precision'] or ''}".strip()
        if row["error"]:
            context.say(False, name, error=row["error"])
            continue
        figures = {
            "ms_per_step": 1000 * row["step_s"], "tokens_per_s": row["tokens_per_s"], "mfu": row["mfu"],
            "of_bf16_gemm": row["gemm_share"]["bf16"], "memory_gib": row["memory_gib"],
            "times_the_bare_loop": row.get("ratio"), "loss": row["loss"],
        }  # fmt: skip
        context.say(math.isfinite(row["loss"]) and row["tokens_per_s"] > 0, name, **rounded(figures))


def checkpoint_copies(context: Context) -> None:
    """Check that an asynchronous save copies the state exactly. From a GPU it copies through pinned memory."""
    import torch

    from packspeed.launch.checkpoint.writer import snapshot

    device = torch.device("cpu" if context.cpu else "cuda")
    elements = 2**16 if context.cpu else 2**28
    state = {
        "weights": torch.randn(elements, device=device),
        "bits": torch.randn(elements // 4, device=device).bfloat16(),
    }
    kept: list[Any] = []
    snapshot(state, kept)  # maps the memory
    began = time.perf_counter()
    copied = snapshot(state, kept)
    seconds = time.perf_counter() - began
    same = all(torch.equal(copied[key], value.cpu()) for key, value in state.items())
    pinned = all(tensor.is_pinned() for tensor in kept)
    speed = sum(tensor.nbytes for tensor in kept) / seconds / 1e9
    context.say(same and (context.cpu or pinned), "checkpoint copies", gb_per_s=round(speed, 2), pinned=pinned)


def rounded(figures: dict[str, Any]) -> dict[str, Any]:
    """Round all floats to four significant digits."""
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in figures.items()}


# The parts and their order ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
    """A function of this file, and how many seconds its process may take on a GPU."""

    run: Callable[[Context], None]
    limit_s: float
    trains: bool = False  # needs the dataset and the run file


PARTS = {
    part.run.__name__: part
    for part in (
        Part(kernels, 75), Part(varlen, 45), Part(experts, 30), Part(data, 60), Part(prove, 130, True),
        Part(waits, 75, True),
        Part(precisions, 75, True), Part(bench, 110, True), Part(memory, 45, True), Part(offload, 110, True),
        Part(compiled, 110, True), Part(checkpoint_copies, 30),
    )
}  # fmt: skip


@dataclasses.dataclass
class Line:
    """One line of the report."""

    verdict: str
    part: str
    text: str
    figures: dict[str, Any]


def run_part(name: str, context: Context, left_s: float) -> tuple[list[Line], float]:
    """Run a part in its own process, for at most left_s seconds. Return its lines and how many seconds it took.

    If the part has failed or run out of time, the last line is a FAIL with the reason.
    """
    limit_s, began = min(PARTS[name].limit_s * context.patience, left_s), time.monotonic()
    if limit_s < 1:
        return [Line("FAIL", name, f"{name}: out of time before it began", {})], 0.0
    process = start(name, context)
    why = ""
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        out, err = stop(process)
        why = f"{name}: out of time after {limit_s:.0f} s"
    lines = list(parse(name, out))
    if not why and process.returncode:
        why = f"{name}: exit code {process.returncode}"
    if not why and not lines:
        why = f"{name}: it checked nothing"
    if why:
        lines.append(Line("FAIL", name, why, {"output": (out + err).splitlines()[-TAIL:]}))
    return lines, time.monotonic() - began


def start(name: str, context: Context) -> Any:
    """Start this program again in a new process, which runs one part."""
    arguments = ["--part", name, "--folder", str(context.folder), "--nanogpt", context.nanogpt]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch's deterministic mode demands it
    if context.cpu:
        environment.setdefault("OMP_NUM_THREADS", "1")  # two parts at a time, beside other tests
    return subprocess.Popen(
        [sys.executable, __file__, *arguments, *(["--cpu"] if context.cpu else [])],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment,
    )  # fmt: skip


def stop(process: Any) -> tuple[str, str]:
    """Kill the process of a part and all processes that it started. Return its (stdout, stderr)."""
    os.killpg(process.pid, signal.SIGKILL)
    out, err = process.communicate()
    return out, err


def parse(part: str, output: str) -> Iterator[Line]:
    """Yield the PASS, FAIL and SKIP lines in the output of a part."""
    for text in output.splitlines():
        verdict, _, rest = text.partition(" ")
        if verdict in ("PASS", "FAIL", "SKIP") and rest.endswith("}"):
            what, _, figures = rest.partition(" {")
            yield Line(verdict, part, what, json.loads("{" + figures))


def check(names: Sequence[str], context: Context, say: Callable[[str], None]) -> tuple[list[Line], str]:
    """Run the parts in order, on a CPU two at a time, and print lines with say(). Return all lines and the summary."""
    began, lines = time.monotonic(), []

    def part(name: str) -> tuple[str, list[Line], float]:
        return (name, *run_part(name, context, TOTAL_S * context.patience - (time.monotonic() - began)))

    def results(pool: ThreadPoolExecutor) -> Iterator[tuple[str, list[Line], float]]:
        first = names.index("data") + 1 if "data" in names else 0  # the others read what it makes
        yield from map(part, names[:first])
        yield from pool.map(part, names[first:])

    with ThreadPoolExecutor(2 if context.cpu else 1) as pool:
        for name, found, seconds in results(pool):
            lines += found
            for line in found:
                say(f"{line.verdict} {line.text}  {json.dumps(line.figures)}")
            say(f"     {name} took {seconds:.0f} s")
    count = {verdict: sum(line.verdict == verdict for line in lines) for verdict in ("PASS", "FAIL", "SKIP")}
    failed = ", ".join(dict.fromkeys(line.part for line in lines if line.verdict == "FAIL"))
    seconds, place = time.monotonic() - began, "the CPU" if context.cpu else gpu_name()
    verdict, names_failed = ("FAIL", f" ({failed})") if failed else ("PASS", "")
    counts = f"{count['PASS']} passed, {count['FAIL']} failed{names_failed}, {count['SKIP']} skipped"
    return lines, f"{verdict}: {counts} in {seconds:.0f} s on {place}"


def gpu_name() -> str:
    """Return the name of the first GPU from nvidia-smi, because torch would initialise CUDA in this process."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    except OSError:
        return "no NVIDIA GPU"
    return done.stdout.partition(" (UUID")[0].strip() or "no NVIDIA GPU"


def main() -> int:
    """Run all parts, or with --part only one, in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="run a small version of each part on the CPU; default: GPU")
    parser.add_argument("--only", default="", help="comma-separated parts; default: all, " + ",".join(PARTS))
    parser.add_argument(
        "--nanogpt", default=os.environ.get("NANOGPT", ""), help="folder of a nanoGPT checkout to compare with"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout, and the lines to stderr")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        PARTS[args.part].run(Context(args.cpu, Path(args.folder), args.nanogpt))
        return 0
    names = [name for name in PARTS if not args.only or name in args.only.split(",")]
    if unknown := set(filter(None, args.only.split(","))) - set(PARTS):
        parser.error(f"--only: there is no part {', '.join(sorted(unknown))}; choose among {', '.join(PARTS)}")
    if "data" not in names and any(PARTS[name].trains for name in names):
        names.insert(0, "data")
    if importlib.util.find_spec("packspeed") is None:
        parser.error(
            f"run it with the environment of the checkout {ROOT}: make install, then .venv/bin/python {__file__}"
        )
    if not args.cpu and gpu_name() == "no NVIDIA GPU":
        parser.error("nvidia-smi shows no GPU here. Use a machine with a GPU, or add --cpu")
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        context = Context(args.cpu, Path(folder), args.nanogpt)
        lines, summary = check(
            names, context, lambda text: print(text, file=sys.stderr if args.json else sys.stdout, flush=True)
        )
    if args.json:
        print(json.dumps({"lines": [dataclasses.asdict(line) for line in lines], "summary": summary}))
    print(summary, file=sys.stderr if args.json else sys.stdout)
    return 1 if summary.startswith("FAIL") else 0


if __name__ == "__main__":
    sys.exit(main())
