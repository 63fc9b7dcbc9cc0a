"""Write texts, hyperparameters and histograms to TensorBoard; define the tags of its scalars (docs/metrics.md lists
them).
"""

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
    "planned_step_time_s": "speed/planned_step_time_s", "planned_memory_gib": "memory/planned_gib",
    "expert_load": "experts/load", "dead_experts": "experts/dead", "batch_tokens": "train/batch_tokens",
}  # fmt: skip
# Group -> chart -> tags, for TensorBoard's custom scalars. The goodput shares are those since the last start of the
# process. `packspeed goodput` shows all starts together, including work that was lost.
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
    """Writes texts, hyperparameters and histograms with the SummaryWriter of DeepSpeed's monitor.

    Scalars are written with engine.monitor.write_events instead, so that wandb, csv_monitor and comet get them too. The
    hparams page compares runs by the numbers, strings and booleans in the sections model and train of config.yaml.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def begin(self, folder: Path) -> None:
        """Write what does not change during a run: the layout of the charts, both configuration files and the
        hyperparameters.
        """
        self.writer.add_custom_scalars(LAYOUT)
        for name in ("config.yaml", "ds_config.json"):
            self.text(name, "```\n" + (folder / name).read_text(encoding="utf-8") + "\n```", 0)
        self._hparams(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))

    def _hparams(self, config: JsonObject) -> None:
        """Write the hyperparameters of a run, given the content of its config.yaml, for TensorBoard's hparams page."""
        from torch.utils.tensorboard.summary import hparams

        candidates = {
            key: value for key, value in flatten(config).items() if key.startswith(("deepspeed", "model.", "train."))
        }
        settings = {key: value for key, value in candidates.items() if isinstance(value, (bool, int, float, str))}
        # Two of the three summaries that hparams returns: the session's start and the names of the metrics to compare.
        # TensorBoard reads their values from the scalars in the same folder.
        for summary in hparams(  # type: ignore[no-untyped-call]
            settings, dict.fromkeys(COMPARED, 0.0)
        )[:2]:
            self.writer.file_writer.add_summary(summary)

    def text(self, name: str, content: str, step: int) -> None:
        """Show a markdown text under this name on TensorBoard's text page."""
        self.writer.add_text(name, content, step)

    def norms(self, step: int, norms: dict[str, dict[str, float]]) -> None:
        """Write histograms of L2 norms, over all parameters and for each layer.

        `norms` is {"gradient": {parameter: norm}, "weight": {parameter: norm}}.
        """
        import numpy as np

        for what, by_name in norms.items():
            layers: dict[str, list[float]] = {"all": list(by_name.values())}
            for name, value in by_name.items():
                layers.setdefault(layer_of(name), []).append(value)
            for layer, values in layers.items():
                self.writer.add_histogram(f"{what}_norms/{layer}", np.array(values), step)


def layer_of(name: str) -> str:
    """Return the layer of a parameter: "blocks.03" for blocks.3.attn.qkv.weight.

    For a parameter outside the blocks, it is the first part of the name.
    """
    parts = name.split(".")
    return f"{parts[0]}.{int(parts[1]):02d}" if len(parts) > 1 and parts[1].isdigit() else parts[0]
