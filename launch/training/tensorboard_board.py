"""What TensorBoard shows besides scalars, and the tags of the scalars (docs/metrics.md lists them)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.run_folder.folder import flatten

TAGS = {
    "loss": "train/loss", "lr": "train/lr", "grad_norm": "train/grad_norm", "val_loss": "eval/loss",
    "tokens_per_s": "speed/tokens_per_s", "mfu": "speed/mfu", "step_time_s": "speed/step_time_s",
    "data_wait_s": "speed/data_wait_s", "memory_gib": "memory/rank0_gib",
}  # fmt: skip
# group -> chart -> tags; goodput's shares are those of this process life, `packspeed goodput` knows the lost work too.
LAYOUT: dict[str, dict[str, list[Any]]] = {
    "training": {
        "loss": ["Multiline", ["train/loss", "eval/loss"]],
        "learning rate": ["Multiline", ["train/lr"]],
        "gradient norm before clipping": ["Multiline", ["train/grad_norm"]],
    },
    "speed": {
        "tokens per second": ["Multiline", ["speed/tokens_per_s"]],
        "model FLOPs utilisation": ["Multiline", ["speed/mfu"]],
        "seconds per step": ["Multiline", ["speed/step_time_s", "speed/data_wait_s"]],
    },
    "memory": {"GiB on rank 0": ["Multiline", ["memory/rank0_gib"]]},
    "goodput": {"share of the wall time": ["Multiline", ["goodput/.*"]]},
}
COMPARED = ("train/loss", "eval/loss", "speed/tokens_per_s", "speed/mfu")


class Board:
    """Writes texts, hparams and histograms through the SummaryWriter of DeepSpeed's monitor.

    Scalars go through engine.monitor.write_events instead, so that wandb, csv_monitor and comet get them too. The
    hparams page compares runs by every number, string and boolean of config.yaml about model and training.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def begin(self, folder: Path) -> None:
        """Write what a run has once: the layout of the custom scalars, its two configuration files, its hparams."""
        self.writer.add_custom_scalars(LAYOUT)
        for name in ("config.yaml", "ds_config.json"):
            self.text(name, "```\n" + (folder / name).read_text(encoding="utf-8") + "\n```", 0)
        self._hparams(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))

    def _hparams(self, config: JsonObject) -> None:
        from torch.utils.tensorboard.summary import hparams

        candidates = {
            key: value for key, value in flatten(config).items() if key.startswith(("deepspeed", "model.", "train."))
        }
        settings = {key: value for key, value in candidates.items() if isinstance(value, (bool, int, float, str))}
        # Session start and the metrics to compare. Their values are the scalars in the same folder.
        for summary in hparams(  # type: ignore[no-untyped-call]
            settings, dict.fromkeys(COMPARED, 0.0)
        )[:2]:
            self.writer.file_writer.add_summary(summary)

    def text(self, name: str, content: str, step: int) -> None:
        """Show a text (markdown) on the text page."""
        self.writer.add_text(name, content, step)

    def norms(self, step: int, norms: dict[str, dict[str, float]]) -> None:
        """Histograms of L2 norms, over all parameters and per layer. norms: {"gradient" or "weight": {name: norm}}."""
        import numpy as np

        for what, by_name in norms.items():
            layers: dict[str, list[float]] = {"all": list(by_name.values())}
            for name, value in by_name.items():
                layers.setdefault(layer_of(name), []).append(value)
            for layer, values in layers.items():
                self.writer.add_histogram(f"{what}_norms/{layer}", np.array(values), step)


def layer_of(name: str) -> str:
    """`blocks.3.attn.qkv.weight` -> `blocks.03`; a parameter outside the blocks keeps its first word."""
    parts = name.split(".")
    return f"{parts[0]}.{int(parts[1]):02d}" if len(parts) > 1 and parts[1].isdigit() else parts[0]
