"""torch's profiler for `packspeed bench --profile DIR`: a Chrome trace per rank and a table of the slowest operations.

The worker profiles one round of steps after the warm-up and before the measured rounds, so the profiler does not slow
the measured steps. Open a trace in chrome://tracing or https://ui.perfetto.dev.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from packspeed.launch.trials.bench_setup import TrainingLoop

TABLE_ROWS = 15
NAME_WIDTH = 52


def profile_round(loop: TrainingLoop, steps: int, prefix: Path, rank: int, device: torch.device) -> None:
    """Take `steps` steps of the loop under torch's profiler, and write the trace PREFIX-rankN.json of this rank.

    Rank 0 also writes the table PREFIX.txt. Every rank must call it.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            loop.step()
        if on_gpu:
            torch.cuda.synchronize(device)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(f"{prefix}-rank{rank}.json")
    if rank == 0:
        Path(f"{prefix}.txt").write_text(operations_table(profiler, steps, on_gpu))


def operations_table(profiler: profile, steps: int, on_gpu: bool) -> str:
    """Return a table of the 15 operations that take the most time, without the time of the operations that they call.

    The time is per step: time on the GPU if `on_gpu` is True, else CPU time.
    """
    events = [
        (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event)
        for event in profiler.key_averages()
    ]
    events.sort(key=lambda pair: -pair[0])
    total = sum(own for own, _ in events) or 1.0
    lines = [f"{'operation':<{NAME_WIDTH}} {'calls/step':>10} {'ms/step':>9} {'share':>6}"]
    for own, event in events[:TABLE_ROWS]:
        name = event.key if len(event.key) <= NAME_WIDTH else event.key[: NAME_WIDTH - 3] + "..."
        lines.append(
            f"{name:<{NAME_WIDTH}} {event.count / steps:>10.1f} {own / 1000 / steps:>9.2f} {own / total:>6.1%}"
        )
    return "\n".join(lines)
