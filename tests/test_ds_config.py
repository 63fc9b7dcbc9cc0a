"""The DeepSpeed JSON: its keys against DeepSpeed's own, what is refused, and what the engine gets."""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from packspeed.launch.config import parsing
from packspeed.launch.config.batch import BatchPlan
from packspeed.launch.config.deepspeed_json import (
    DS_CONFIGS,
    OWNED,
    load_ds_config,
    resolve_ds_config,
)
from packspeed.launch.config.deepspeed_keys import KEYS, LEGACY, Refused, Unused, filed, unused, value_at
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.layout import Layout
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.explain.lenient import REMOVED
from packspeed.model.config import PRESETS, GPTConfig, largest_parameter, num_parameters
from packspeed.model.gpt import gpt_without_weights

PLAN = BatchPlan(micro_batch=2, accumulation=1, layout=Layout(2))


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


# ---- the tree of keys against DeepSpeed's own ----

# The block of the JSON that each pydantic class of DeepSpeed reads.
MODELS = {
    "DeepSpeedZeroConfig": "zero_optimization",
    "DeepSpeedZeroOffloadParamConfig": "zero_optimization.offload_param",
    "DeepSpeedZeroOffloadOptimizerConfig": "zero_optimization.offload_optimizer",
    "ZenFlowConfig": "zero_optimization.zenflow",
    "DeepSpeedZeroLeafModuleConfig": "zero_optimization.leaf_module",
    "DeepSpeedBF16Config": "bf16",
    "DeepSpeedFP16Config": "fp16",
    "TensorBoardConfig": "tensorboard",
    "WandbConfig": "wandb",
    "CSVConfig": "csv_monitor",
    "CometConfig": "comet",
    "CompileConfig": "compile",
    "CommsLoggerConfig": "comms_logger",
    "DeepSpeedThroughputTimerConfig": "timers.throughput",
    "HybridEngineConfig": "hybrid_engine",
    "TPTrainingConfig": "tensor_parallel",
    "TPConfig": "tensor_parallel.tp",
    "DeepSpeedMonitorConfig": "",  # its fields are keys of the top level
}

# The modules that read keys one by one with constants, and the block (or several of one module) they belong to.
READERS = {
    "deepspeed.runtime.config": [
        "", "optimizer", "scheduler", "torch_autocast", "data_types", "checkpoint", "checkpoint.parallel_write",
    ],
    "deepspeed.runtime.zero.config": ["", "zero_optimization"],
    "deepspeed.runtime.precision_config": [""],
    "deepspeed.runtime.model_checkpointing.config": ["", "checkpoint", "checkpoint.writer"],
    "deepspeed.runtime.activation_checkpointing.config": ["", "activation_checkpointing"],
    "deepspeed.runtime.swap_tensor.aio_config": ["", "aio"],
    "deepspeed.profiling.config": ["", "flops_profiler"],
    "deepspeed.autotuning.config": ["", "autotuning"],
    "deepspeed.comm.config": [""],
    "deepspeed.datastates.config": [""],
    "deepspeed.runtime.tensor_parallel.config": ["", "tensor_parallel"],
    "deepspeed.utils.config": ["", "timers"],
    "deepspeed.runtime.data_pipeline.config": ["", "data_efficiency"],
}  # fmt: skip

# Words in those modules that are no keys of the JSON, or keys of the optimizer's parameters.
NO_KEYS = {"dtype", "max_grad_norm", "_tp_plan"}


def filed_as(path: str) -> str | None:
    """works, refused or unused; None if the tree of keys does not have this path. Inside a refused block: refused."""
    node: Any = KEYS
    for key in path.split("."):
        if isinstance(node, (Refused, Unused)):
            break
        if node is None or (key not in node and "*" not in node):
            return None
        node = node.get(key)
    return {Refused: "refused", Unused: "unused"}.get(type(node), "works")


def subclasses(base: type) -> Iterator[type]:
    for child in base.__subclasses__():
        yield child
        yield from subclasses(child)


def test_every_field_of_deepspeeds_classes_is_filed() -> None:
    """And the tree has no other. A class that a new release brings is missing in MODELS."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    models = {m for m in subclasses(DeepSpeedConfigModel) if not m.__module__.startswith("deepspeed.inference")}
    assert {m.__name__ for m in models} == set(MODELS)
    for model in models:
        block = MODELS[model.__name__]
        fields = set(model.model_fields) | {f.alias for f in model.model_fields.values() if f.alias}
        for field in fields:
            assert filed_as(f"{block}.{field}".strip(".")), f"{block}.{field}"
        node: Any = KEYS
        for key in block.split(".") if block else ():
            node = None if isinstance(node, Refused) else node[key]
        if isinstance(node, dict) and block:
            assert set(node) == fields, model.__name__


def keys_read_by(module: ModuleType) -> set[str]:
    """The constants that a module looks up in a dict: get_scalar_param(d, KEY, ...), d.get(KEY), d[KEY], KEY in d."""
    keys = set()
    for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
        key: ast.expr | None = None
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            position = {"get_scalar_param": 1, "get_dict_param": 1, "get_list_param": 1, "get": 0}.get(name, 99)
            key = node.args[position] if position < len(node.args) else None
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In):
            key = node.left
        elif isinstance(node, ast.Subscript):
            key = node.slice
        value = key.value if isinstance(key, ast.Constant) else getattr(module, getattr(key, "id", ""), None)
        keys |= {value} if isinstance(value, str) else set()
    return keys


@pytest.mark.parametrize(("module", "blocks"), READERS.items())
def test_every_constant_that_deepspeed_reads_is_filed(module: str, blocks: list[str]) -> None:
    keys = keys_read_by(importlib.import_module(module)) - NO_KEYS - set(LEGACY)
    assert keys
    for key in keys:
        assert any(filed_as(f"{block}.{key}".strip(".")) for block in blocks), key


def test_removed_keys_stay_refused(tmp_path: Path) -> None:
    """They are unknown, and DeepSpeed's list of them is the one that explain comments."""
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS

    for key in {*_REMOVED_TOP_LEVEL_CONFIG_KEYS, *REMOVED}:
        with pytest.raises(ConfigError, match=f"unknown key '{key}'"):
            load_ds_config(write(tmp_path, {key: {"enabled": False}}))


def test_top_level_keys_are_in_deepspeeds_sources() -> None:
    """DeepSpeed reads its top level key by key; each of ours appears there as a string constant."""
    import deepspeed

    root = Path(deepspeed.__file__).parent
    source = "".join(path.read_text() for folder in ("runtime", "monitor", "comm", "compile", "utils", "profiling",
                     "autotuning", "datastates") for path in (root / folder).rglob("*.py"))  # fmt: skip
    for key in KEYS:
        assert re.search(rf"[\"']{key}[\"']", source), key


def nested(path: tuple[str, ...], value: object) -> dict[str, Any]:
    for key in reversed(path):
        value = {key: value}
    assert isinstance(value, dict)
    return value


SWITCHES = {
    "tensor_parallel": {"autotp_size": 2},
    "gradient_allreduce_op": "sum",
    "managed_gradient_accumulation": False,
    "sequence_parallel_size": 2,
    "compute_grad_norm": False,
    "writer": {"type": "FAST"},
    "lower_precision_safe_modules": ["torch.nn.Linear"],
    "weight_quantization": {"quantized_initialization": {"num_bits": 8}},
    "data_efficiency": {"enabled": True, "data_sampling": {"enabled": True}},
}  # values that switch a key on, where true or {"enabled": true} does not


@pytest.mark.parametrize(("path", "entry"), [pytest.param(p, e, id=".".join(p)) for p, e in filed()])
def test_each_key_does_what_it_is_filed_as(
    path: tuple[str, ...], entry: Refused | Unused, tmp_path: Path, run: RunFile
) -> None:
    on = SWITCHES.get(path[-1], {"enabled": True})
    content = nested(path, on)
    assert not entry.off(on)
    if isinstance(entry, Refused):
        with pytest.raises(ConfigError, match=rf"ds.json:\d: {'.'.join(path)}: "):
            load_ds_config(write(tmp_path, content))
    else:
        assert [p for p, _ in unused(load_ds_config(write(tmp_path, content)))] == [path]
    # "auto" and null switch nothing on, and the engine never sees them.
    for off in ("auto", None):
        raw = load_ds_config(write(tmp_path, nested(path, off)))
        assert not list(unused(raw))
        final = resolve_ds_config(run, raw, PLAN, "bf16")
        assert value_at(final, path) in (None, off if isinstance(entry, Unused) else None)


@pytest.mark.parametrize(
    "content",
    [
        {"gradient_allreduce_op": "mean"},
        {"autotuning": {"enabled": False, "fast": True}},
        {"autotuning": {}},
        {"hybrid_engine": {"enabled": False, "max_out_tokens": 512}},
        {"tensor_parallel": {"autotp_size": 1}},
        {"sequence_parallel_size": 1},
        {"managed_gradient_accumulation": True},
        {"zero_optimization": {"stage": 1, "compute_grad_norm": True, "elastic_checkpoint": False}},
        {"checkpoint": {"load_universal": False, "writer": None}},
        {"datastates_ckpt": False},
        {"wandb": {"enabled": False, "project": "x"}},
        {"data_efficiency": {"enabled": False, "data_routing": {"enabled": False}}},
    ],
)
def test_keys_that_are_off_are_accepted(content: dict[str, Any], tmp_path: Path, run: RunFile) -> None:
    final = resolve_ds_config(run, load_ds_config(write(tmp_path, content)), PLAN, "bf16")
    assert not [path for path, entry in filed() if isinstance(entry, Refused) and value_at(final, path) is not None]


def test_a_monitor_without_its_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for key, package in (("wandb", "wandb"), ("comet", "comet_ml")):
        with pytest.raises(ConfigError, match=rf"ds.json:\d: {key}.enabled needs the package {package}"):
            load_ds_config(write(tmp_path, {key: {"enabled": True}}))


# ---- how a file is read ----

HJSON = """\
{
  # two ranks "stage": 9
  "_comment": {"stage": 7}, "$schema": "x", "comment": ["y"],
  "train_batch_size": "auto", // of the run file
  zero_optimization: {
    "_note": "a key of its own",
    stage: 2
    /* "stage": 3,
    */
    overlap_comm: true,
  },
}
"""


def test_hjson_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    import hjson

    path = tmp_path / "ds.json"
    path.write_text(HJSON)
    assert load_ds_config(str(path)) == {
        "train_batch_size": "auto", "zero_optimization": {"stage": 2, "overlap_comm": True},
    }  # fmt: skip
    theirs = hjson.loads(HJSON)
    assert theirs["zero_optimization"]["stage"] == 2
    path.write_text(HJSON.replace("overlap_comm", "overlap_com"))
    with pytest.raises(ConfigError, match=r"ds.json:10: unknown key 'zero_optimization.overlap_com'; did you mean"):
        load_ds_config(str(path))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_json_has_the_same_meaning_as_hjson(path: Path) -> None:
    import hjson

    assert load_ds_config(path.stem) == json.loads(hjson.dumpsJSON(hjson.loads(path.read_text())))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"bfloat16": {"enabled": "auto"}}, {"bf16": {"enabled": "auto"}}),
        ({"bfloat16": {"enabled": False}, "bf16": {"enabled": True}}, {"bf16": {"enabled": True}}),
        ({"zero_optimization": True}, {"zero_optimization": {"stage": 1}}),
        ({"zero_optimization": False}, {"zero_optimization": {"stage": 0}}),
        (
            {"zero_optimization": True, "allgather_size": 5000},
            {"zero_optimization": {"stage": 1, "allgather_bucket_size": 5000}},
        ),
        ({"zero_optimization": {"stage": "3"}}, {"zero_optimization": {"stage": 3}}),
        ({"zero_optimization": {"stage": 2.0}}, {"zero_optimization": {"stage": 2}}),
        (
            {"zero_optimization": {"stage": 2, "cpu_offload": True}},
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
        ),
        ({"zero_optimization": {"stage": 2, "cpu_offload": False}}, {"zero_optimization": {"stage": 2}}),
    ],
)
def test_old_spellings_mean_what_deepspeed_reads(
    tmp_path: Path, content: dict[str, Any], expected: dict[str, Any]
) -> None:
    from deepspeed.runtime.precision_config import get_bfloat16_config
    from deepspeed.runtime.zero.config import get_zero_config

    assert load_ds_config(write(tmp_path, content)) == expected
    if "zero_optimization" in content:
        theirs, ours = get_zero_config(content), get_zero_config(expected)
        assert theirs.model_dump(exclude={"cpu_offload", "allgather_bucket_size"}) == ours.model_dump(
            exclude={"cpu_offload", "allgather_bucket_size"}
        )
    else:
        assert get_bfloat16_config(content) == get_bfloat16_config(expected)


def test_old_and_new_spelling_together_are_refused(tmp_path: Path) -> None:
    both = {"stage": 2, "cpu_offload": True, "offload_optimizer": {"device": "none"}}
    with pytest.raises(ConfigError, match=r"cpu_offload is an old key: its value must be true or false"):
        load_ds_config(write(tmp_path, {"zero_optimization": both}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"x": "\xe9"}', r"ds.json:1: byte 7 \(0xe9\) is not UTF-8. Save it as UTF-8"),
        ('{"x": 1}'.encode("utf-16"), r"its encoding is UTF-16"),
        (b'{"zero_optimization": {"stage": 1}', r"ds.json:1: this is not valid JSON: .* not valid HJSON .* either"),
        (b"[1]", r"ds.json:1: the top level of a DeepSpeed configuration must be an object"),
        (b"\n", r"ds.json:1: the file is empty"),
        (b'{"fp16": {"enabled": false},\n"fp16": {}}', r"ds.json:2: fp16 is given twice \(first on line 1\)"),
        (b'{"steps_per_print": ' + b"9" * 5000 + b"}", r"'9+\.\.\. \(5,002 characters\) is not a 64-bit integer"),
        (b'{"tensorboard": {"job_name": "\\ud800"}}', r"tensorboard.job_name contains the character U\+D800"),
        (b'{"a": [[[[[[1]]]]]]}', r"ds.json:1: brackets nest deeper than 5 levels"),
    ],
)
def test_odd_files_get_one_paragraph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.setattr(parsing, "MAX_DEPTH", 5)
    path = tmp_path / "ds.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_ds_config(str(path))
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_and_tabs_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(b'\xef\xbb\xbf{\n\t"zero_optimization": {\n\t\t"stage": 2}}')
    assert load_ds_config(str(path)) == {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize("block", [k for k, v in KEYS.items() if isinstance(v, dict)])
def test_auto_for_a_block(tmp_path: Path, run: RunFile, block: str) -> None:
    """It leaves a block of the run file to the run file; any other block must be written."""
    name = write(tmp_path, {block: "auto"})
    if block in OWNED:
        final = resolve_ds_config(run, load_ds_config(name), PLAN, "bf16")
        assert final == resolve_ds_config(run, {}, PLAN, "bf16")
    else:
        with pytest.raises(ConfigError, match=f'{block}: "auto" is only valid for keys that the run file sets'):
            load_ds_config(name)


def test_auto_inside_blocks_is_deepspeeds_default(tmp_path: Path, run: RunFile) -> None:
    """As in the files of Hugging Face, which fills them in."""
    content = {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "offload_param": {"device": "auto"}},
        "data_types": {"grad_accum_dtype": "auto"},
        "optimizer": {"type": "auto", "params": {"lr": "auto", "weight_decay": "auto"}},
        "fp16": {"enabled": "auto", "loss_scale": "auto"},
        "gradient_clipping": "auto",
    }
    final = resolve_ds_config(run, load_ds_config(write(tmp_path, content)), PLAN, "bf16")
    assert final["zero_optimization"] == {"stage": 3, "offload_param": {}, "memory_efficient_linear": False}
    assert final["data_types"] == {"grad_accum_dtype": "fp32"}


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
    path.write_text('{"zero_optimization": {"stage": 1,,}}')
    with pytest.raises(ConfigError, match=r"ds.json:1: this is not valid JSON"):
        load_ds_config(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_batch_size": 8}, r"train_batch_size = 8, but the run file.s section train makes it 4"),
        ({"gradient_clipping": 0.5}, r"gradient_clipping = 0.5, but the run file.s section train makes it 1.0"),
        ({"optimizer": {"type": "Lion"}}, r"optimizer.type = 'Lion', but the run file's .* gives 'AdamW'"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}, r"optimizer.params.lr = 0.1, but the run file"),
        ({"scheduler": {"type": "WarmupLR"}}, r"scheduler: the run file sets the learning rate"),
        ({"fp16": {"enabled": True}}, r"fp16.enabled = True, but train.precision is bf16"),
        (
            {"zero_optimization": {"stage": 1}, "torch_autocast": {"enabled": True}},
            r"torch_autocast.enabled = True, but train.precision is bf16",
        ),
        (
            {"torch_autocast": {"enabled": True, "dtype": "float16"}},
            r"torch_autocast.dtype = 'float16', but the run file",
        ),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, r"optimizer.type = 'Adam', but"),
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
            "optimizer": {"type": "Adam", "params": {"lr": "auto", "torch_adam": True}},
            "torch_autocast": {"enabled": False},
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


@pytest.mark.parametrize(
    ("zero", "refused"),
    [
        ({"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}, "device: nvme"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "ratio below 1"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}, "super_offload"),
        ({"stage": 2, "zenflow": {"topk_ratio": 0.1}}, "zenflow"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, None),
        ({"stage": 0}, None),
    ],
)
def test_muon_is_a_client_optimizer_of_deepspeed(run: RunFile, zero: dict[str, Any], refused: str | None) -> None:
    """The block `optimizer` is that of the AdamW inside it, from which DeepSpeed's ops are chosen."""
    optimizer = run.train.optimizer.model_copy(update={"name": "muon"})
    muon = run.model_copy(update={"train": run.train.model_copy(update={"optimizer": optimizer})})
    raw = {"zero_optimization": zero}
    if refused:
        with pytest.raises(ConfigError, match=rf"{refused} works with AdamW only"):
            resolve_ds_config(muon, raw, PLAN, "fp32")
        return
    final = resolve_ds_config(muon, raw, PLAN, "fp32")
    assert final["optimizer"] == resolve_ds_config(run, raw, PLAN, "fp32")["optimizer"]
    assert final["zero_allow_untested_optimizer"] is True
    assert final["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": -5}}, r"DeepSpeedZeroConfig: reduce_bucket_size: "),
        ({"zero_optimization": {"stage": 1, "overlap_comm": "maybe"}}, r"DeepSpeedZeroConfig: overlap_comm: "),
        ({"communication_data_type": "fp7"}, r"DeepSpeed refuses it: Invalid communication_data_type"),
        ({"checkpoint": {"tag_validation": "x"}}, r"DeepSpeed refuses it: Checkpoint config contains invalid"),
    ],
)
def test_values_that_deepspeed_refuses_are_config_errors(
    tmp_path: Path, run: RunFile, content: dict[str, Any], message: str
) -> None:
    from packspeed.launch.engine.build import check_ds_config

    final = resolve_ds_config(run, load_ds_config(write(tmp_path, content)), PLAN, "bf16")
    with pytest.raises(ConfigError, match=message) as error:
        check_ds_config(final, "./ds.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("device", "capability", "hip", "message"),
    [
        ("cpu", (0, 0), None, None),
        ("cuda", (8, 9), None, None),
        ("cuda", (9, 0), None, None),
        ("cuda", (8, 6), None, r"fp8: NVIDIA A40 cannot multiply in fp8\. .* from compute capability 8\.9 on"),
        ("cuda", (9, 4), "6.4", "fp8: torch for ROCm cannot"),
        ("xpu", (0, 0), None, "fp8: this xpu device cannot"),
    ],
)
def test_fp8_is_refused_by_devices_without_it(
    monkeypatch: pytest.MonkeyPatch, device: str, capability: tuple[int, int], hip: str | None, message: str | None
) -> None:
    import torch

    from packspeed.launch.engine import build

    monkeypatch.setattr(build, "device_type", lambda: device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A40")
    monkeypatch.setattr(torch.version, "hip", hip)
    if message is None:
        build.check_precision("fp8")
    else:
        with pytest.raises(ConfigError, match=message):
            build.check_precision("fp8")
    build.check_precision("bf16")


@pytest.mark.parametrize("name", [path.stem for path in SHIPPED if path.stem != "zero_infinity_nvme"])
def test_shipped_files_pass_deepspeeds_own_check(run: RunFile, name: str) -> None:
    from packspeed.launch.engine.build import check_ds_config

    check_ds_config(resolve_ds_config(run, load_ds_config(name), PLAN, "bf16"), name)


# ---- what a run sets if the JSON does not ----


def resolved(run: RunFile, raw: dict[str, Any], precision: str = "bf16", model: GPTConfig | None = None) -> Any:
    return resolve_ds_config(run, raw, PLAN, precision, model)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gradients_travel_in_fp32(run: RunFile, stage: int, precision: str) -> None:
    """DeepSpeed itself says what the engine would do with it: fp32 in every case."""
    if (stage, precision) == (0, "fp16"):
        return  # refused
    final = resolved(run, {"zero_optimization": {"stage": stage}}, precision)
    sixteen_bits = stage > 0 and precision != "fp32"
    assert final.get("communication_data_type") == ("fp32" if sixteen_bits else None)
    assert resolved(run, {"communication_data_type": "bf16"}, precision="bf16")["communication_data_type"] == "bf16"


def test_nothing_waits_for_deepspeeds_timer(run: RunFile) -> None:
    assert resolved(run, {})["timers"] == {"throughput": {"enabled": False}}
    wanted = {"throughput": {"enabled": True, "synchronized": False}}
    assert resolved(run, {"timers": wanted})["timers"] == wanted


@pytest.mark.parametrize(
    ("preset", "zero", "expected"),
    [
        ("gpt2-124m", {"stage": 1}, {"reduce_bucket_size": 124_475_904, "allgather_bucket_size": 124_475_904}),
        ("gpt2-124m", {"stage": 2, "overlap_comm": True}, {"reduce_bucket_size": 15_559_488}),
        ("gpt2-1.5b", {"stage": 2}, {"reduce_bucket_size": 500_000_000, "allgather_bucket_size": 500_000_000}),
        ("llama-7b", {"stage": 3}, {"reduce_bucket_size": 500_000_000, "stage3_prefetch_bucket_size": 50_000_000}),
        ("gpt2-124m", {"stage": 3, "overlap_comm": False}, {"reduce_bucket_size": 124_475_904}),
        ("gpt2-124m", {"stage": 2, "reduce_bucket_size": 7}, {"reduce_bucket_size": 7}),
        ("gpt2-124m", {"stage": 3, "prefetch_bucket_size": 7}, {"prefetch_bucket_size": 7}),
        ("gpt2-124m", {"stage": 3, "prefetch_bucket_size": 7}, {"stage3_prefetch_bucket_size": None}),
        ("gpt2-124m", {"stage": 0}, {"reduce_bucket_size": None}),
    ],
)
def test_buckets_have_the_size_of_the_model(
    run: RunFile, preset: str, zero: dict[str, Any], expected: dict[str, Any]
) -> None:
    model = GPTConfig(**PRESETS[preset])
    final = resolved(run, {"zero_optimization": zero}, model=model)["zero_optimization"]
    assert {key: final.get(key) for key in expected} == expected
    assert all(final[key] % 2 == 0 for key in final if key.endswith("bucket_size") and final[key] != 7)


def test_a_small_model_has_one_bucket(run: RunFile) -> None:
    model = GPTConfig(n_layer=2, n_head=2, d_model=32, vocab_size=257, max_seq_len=32)
    zero = resolved(run, {"zero_optimization": {"stage": 2, "overlap_comm": True}}, model=model)["zero_optimization"]
    assert zero["reduce_bucket_size"] >= num_parameters(model, padded=True)


@pytest.mark.parametrize("preset", ["llama-7b", "gpt2-1.5b"])
def test_a_buffer_on_nvme_holds_the_largest_parameter(run: RunFile, preset: str) -> None:
    model = GPTConfig(**PRESETS[preset])
    final = resolved(run, load_ds_config("zero_infinity_nvme"), model=model)
    size = final["zero_optimization"]["offload_param"]["buffer_size"]
    largest = max(p.numel() for p in gpt_without_weights(model).parameters())
    assert largest_parameter(model) == largest
    assert size == -(-largest // PLAN.layout.zero)


@pytest.mark.parametrize(("precision", "communication", "refused"), [
    ("bf16", None, True), ("bf16", "fp32", True), ("fp32", None, True), ("bf16", "fp16", False), ("fp16", None, False),
])  # fmt: skip
def test_4_bit_gradients_are_refused_unless_they_are_fp16(
    run: RunFile, precision: str, communication: str | None, refused: bool
) -> None:
    raw: dict[str, Any] = {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}
    raw |= {"communication_data_type": communication} if communication else {}
    if refused:
        with pytest.raises(ConfigError, match=f"zero_quantized_gradients = True in {precision}: DeepSpeed's kernel"):
            resolved(run, raw, precision)
    else:
        assert resolved(run, raw, precision)["communication_data_type"] == "fp16"
    assert "zero_quantized_gradients" not in load_ds_config("zeropp")["zero_optimization"]
