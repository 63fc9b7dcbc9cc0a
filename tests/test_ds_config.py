"""The DeepSpeed JSON: its keys against DeepSpeed's own, what is refused, and what the engine gets."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from packspeed.launch.config.batch import BatchPlan
from packspeed.launch.config.deepspeed_json import DS_CONFIGS, load_ds_config, resolve_ds_config
from packspeed.launch.config.deepspeed_keys import KEYS
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.config.run_file import RunFile

PLAN = BatchPlan(micro_batch=2, accumulation=1, dp_size=2)


@pytest.fixture
def run(tmp_path: Path) -> RunFile:
    path = tmp_path / "run.yaml"
    path.write_text(
        "name: t\nmodel: {n_layer: 2, n_head: 2, d_model: 32}\ndata: {path: x, seq_len: 16}\n"
        "train: {steps: 10, global_batch_tokens: 64, optimizer: {lr: 1e-3}}\n"
    )
    return load_run_file(path)


def write(folder: Path, content: dict[str, Any]) -> str:
    path = folder / "ds.json"
    path.write_text(json.dumps(content, indent=1))
    return str(path)


SHIPPED = sorted(DS_CONFIGS.glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_files_parse_and_resolve(path: Path, run: RunFile) -> None:
    final = resolve_ds_config(run, load_ds_config(path.stem), PLAN, "bf16")
    assert '"auto"' not in json.dumps(final)
    assert final["gradient_clipping"] == 1.0
    assert re.search(rf"\| {path.name} \|", (DS_CONFIGS / "README.md").read_text()), "a row in ds_configs/README.md"


def test_keys_are_those_of_the_installed_deepspeed() -> None:
    """Every pydantic model of DeepSpeed, field by field: a key it gains or loses shows here."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zenflow.zenflow_config import ZenFlowConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    zero = KEYS["zero_optimization"]
    pairs: list[tuple[dict[str, Any], Any]] = [
        (zero, DeepSpeedZeroConfig),
        (zero["offload_param"], DeepSpeedZeroOffloadParamConfig),
        (zero["offload_optimizer"], DeepSpeedZeroOffloadOptimizerConfig),
        (zero["zenflow"], ZenFlowConfig),
        (zero["leaf_module"], DeepSpeedZeroLeafModuleConfig),
        (KEYS["bf16"], DeepSpeedBF16Config),
        (KEYS["fp16"], DeepSpeedFP16Config),
        (KEYS["tensorboard"], TensorBoardConfig),
        (KEYS["wandb"], WandbConfig),
        (KEYS["csv_monitor"], CSVConfig),
        (KEYS["comet"], CometConfig),
        (KEYS["compile"], CompileConfig),
        (KEYS["comms_logger"], CommsLoggerConfig),
        (KEYS["timers"]["throughput"], DeepSpeedThroughputTimerConfig),
    ]
    for ours, model in pairs:
        theirs = set(model.model_fields) | {f.alias for f in model.model_fields.values() if f.alias}
        assert set(ours) == theirs, model.__name__


def test_top_level_keys_are_in_deepspeeds_sources() -> None:
    """DeepSpeed reads its top level key by key; each of ours appears there as a string constant."""
    import deepspeed

    root = Path(deepspeed.__file__).parent
    source = "".join(path.read_text() for folder in ("runtime", "monitor", "comm", "compile", "utils", "profiling",
                     "autotuning", "datastates") for path in (root / folder).rglob("*.py"))  # fmt: skip
    for key in KEYS:
        assert re.search(rf"[\"']{key}[\"']", source), key


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimisation": {"stage": 3}}, r"ds.json:2: unknown key 'zero_optimisation'; .* 'zero_optimization'"),
        ({"gradient_clipp1ng": 1}, r"unknown key 'gradient_clipp1ng'; did you mean 'gradient_clipping'"),
        ({"zero_optimization": {"stage": 1, "overlap_com": True}}, r"ds.json:4: .*'zero_optimization.overlap_com'"),
        ({"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}, r"devise'; did you mean 'device'"),
        ({"activation_checkpointing": {"cpu_checkpoint": True}}, r"did you mean 'cpu_checkpointing'"),
        ({"flops_profiler": {"enable": True}}, r"did you mean 'enabled'"),
        ({"zero_optimization": {"stage": "auto"}}, r"stage must be 0, 1, 2 or 3, not 'auto'"),
        ({"zero_optimization": {"stage": 4}}, r"stage must be 0, 1, 2 or 3, not 4"),
        ({"zero_optimization": 3}, r"zero_optimization must be a block"),
        ({"steps_per_print": "auto"}, r"steps_per_print: \"auto\" is only valid"),
    ],
)
def test_mistakes_are_refused_with_their_line(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_ds_config(write(tmp_path, content))


def test_missing_name_and_broken_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"deepspeed: zero_1: .* did you mean 'zero1'"):
        load_ds_config("zero_1")
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 1,}}')
    with pytest.raises(ConfigError, match=r"ds.json:1: this is not valid JSON"):
        load_ds_config(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_batch_size": 8}, r"train_batch_size = 8, but the run file makes it 4"),
        ({"gradient_clipping": 0.5}, r"gradient_clipping = 0.5, but the run file makes it 1.0"),
        ({"optimizer": {"type": "Lion"}}, r"optimizer.type = 'Lion', but the run file's .* gives 'AdamW'"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}, r"optimizer.params.lr = 0.1, but the run file"),
        ({"scheduler": {"type": "WarmupLR"}}, r"scheduler: the learning rate is the run file's"),
        ({"fp16": {"enabled": True}}, r"fp16.enabled = True, but train.precision is bf16"),
    ],
)
def test_contradictions_name_both_places(tmp_path: Path, run: RunFile, content: dict[str, Any], message: str) -> None:
    name = write(tmp_path, content)
    chosen = run.model_copy(update={"deepspeed": name})
    with pytest.raises(ConfigError, match=message):
        resolve_ds_config(chosen, load_ds_config(name), PLAN, "bf16")


def test_auto_and_equal_values_are_fine_and_extras_stay(tmp_path: Path, run: RunFile) -> None:
    name = write(
        tmp_path,
        {
            "train_batch_size": "auto",
            "gradient_accumulation_steps": 1,
            "bf16": {"enabled": "auto"},
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
            "zero_optimization": {"stage": 2},
            "wandb": {"enabled": False},
        },
    )
    final = resolve_ds_config(run, load_ds_config(name), PLAN, "bf16")
    assert final["optimizer"]["params"]["torch_adam"] is True
    assert final["bf16"] == {"enabled": True}
    assert final["data_types"]["grad_accum_dtype"] == "fp32"
    assert final["wandb"] == {"enabled": False}
    assert '"auto"' not in json.dumps(final)


@pytest.mark.parametrize(("device", "stage", "refused"), [("cpu", 1, True), ("cuda", 0, True), ("cuda", 3, False)])
def test_deepcompile_is_refused_where_deepspeed_would_go_on_without_it(device: str, stage: int, refused: bool) -> None:
    from packspeed.launch.engine.build import wants_deepcompile

    ds_config: dict[str, Any] = {"zero_optimization": {"stage": stage}, "compile": {"deepcompile": True}}
    if refused:
        with pytest.raises(ConfigError, match=f"ZeRO-{stage} on {device}"):
            wants_deepcompile(ds_config, device)
    else:
        assert wants_deepcompile(ds_config, device)
    assert not wants_deepcompile({**ds_config, "compile": {"deepcompile": False}}, device)
