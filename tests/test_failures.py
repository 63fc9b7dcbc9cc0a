"""What goes wrong for users: typos, missing data, damaged checkpoints, signals. Through the real commands."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from packspeed.launch.checkpoint.manifest import MANIFEST, dump_manifest, read_manifest, step_folder
from packspeed.launch.config.ports import free_port
from support import TRAIN, prefork
from support.ranks import deepspeed, environment, train
from support.workspace import Workspace

pytestmark = [pytest.mark.launch, pytest.mark.timeout(900)]


def packspeed(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from packspeed.launch.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=cwd)


@pytest.fixture(scope="module")
def trained(workspace: Workspace) -> Workspace:
    """A finished run of 10 steps called `done`, by the command as a user types it."""
    command = [sys.executable, str(TRAIN), *workspace.arguments("done")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return workspace


def test_typo_in_the_run_file_exits_2_before_any_process_starts(workspace: Workspace) -> None:
    bad = workspace.folder / "typo.yaml"
    bad.write_text(workspace.run_file.read_text().replace("seq_len", "seqlen"))
    done = packspeed("train", str(bad))
    assert done.returncode == 2
    assert "typo.yaml:4: unknown key 'data.seqlen'; did you mean 'seq_len'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert "deepspeed" not in done.stdout.lower(), "no launcher was started"


def test_typo_in_the_deepspeed_json_exits_2_through_deepspeeds_launcher(workspace: Workspace) -> None:
    bad = workspace.folder / "bad.json"
    bad.write_text(json.dumps({"zero_optimisation": {"stage": 3}}))
    done = packspeed("train", str(workspace.run_file), "--set", f"deepspeed={bad}")
    assert done.returncode == 2
    done = deepspeed(TRAIN, *workspace.arguments("typo"), "--deepspeed_config", str(bad))
    assert done.returncode == 2
    assert "bad.json:1: unknown key 'zero_optimisation'; did you mean 'zero_optimization'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (workspace.folder / "runs" / "typo").exists()


@pytest.mark.parametrize(
    ("sets", "code", "message"),
    [
        (["data.path=nowhere"], 2, "nowhere"),
        (["train.micro_batch=3"], 2, "train.micro_batch = 3 does not divide the 8 samples"),
        (["deepspeed=zero9"], 2, "Names in ds_configs/: "),
        (["train.precision=fp16", "deepspeed=zero0"], 2, "fp16 with ZeRO-0"),
        (["train.optimizer.name=lion", "deepspeed=zero1"], 2, "DeepSpeed has no op FusedLion for cpu"),
        (["model.max_seq_len=8"], 2, "data.seq_len = 32 is longer than the model's max_seq_len = 8"),
        (["model.n_head=3"], 2, "d_model = 32 is not a multiple of n_head = 3"),
    ],
)
def test_impossible_requests_are_one_paragraph(workspace: Workspace, sets: list[str], code: int, message: str) -> None:
    done = train(*workspace.arguments("impossible", *sets))
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_unwritable_run_folder(workspace: Workspace) -> None:
    """As root nothing is unwritable by mode, so the folder's parent is a file."""
    (workspace.folder / "a-file").write_text("")
    done = train(*workspace.arguments("x", f"runs_dir={workspace.folder}/a-file"))
    assert done.returncode == 1
    assert "run folder" in done.stderr
    assert "--set runs_dir=DIR" in done.stderr


def test_torn_shard_is_refused_by_name(workspace: Workspace) -> None:
    torn = workspace.folder / "torn"
    shutil.copytree(workspace.folder / "tokens", torn)
    shard = torn / "train-00000.bin"
    os.truncate(shard, shard.stat().st_size - 2)
    done = train(*workspace.arguments("torn", f"data.path={torn}"))
    assert done.returncode == 1
    assert "train-00000.bin" in done.stderr
    assert "Traceback" not in done.stderr


def test_finished_run_says_so(trained: Workspace) -> None:
    before = (trained.folder / "runs" / "done" / "metrics.jsonl").read_bytes()
    done = train(*trained.arguments("done"))
    assert done.returncode == 0
    assert "run done is finished: 10 of 10 steps" in done.stdout
    assert (trained.folder / "runs" / "done" / "metrics.jsonl").read_bytes() == before


def test_another_runs_checkpoint_is_refused_and_fresh_moves_it_aside(trained: Workspace) -> None:
    done = train(*trained.arguments("done", "model.d_model=64", "train.seed=2"))
    assert done.returncode == 2
    assert "belongs to another run: model.d_model was 32, is 64; train.seed was 1337, is 2" in done.stderr
    shutil.copytree(trained.folder / "runs" / "done", trained.folder / "runs" / "fresh")
    done = train(*trained.arguments("fresh", "train.seed=2", "train.steps=2", fresh=True))
    assert done.returncode == 0, done.stderr
    assert len(list((trained.folder / "runs").glob("fresh.old-*"))) == 1
    assert len(trained.losses("fresh")) == 2


def test_other_dataset_is_refused(trained: Workspace) -> None:
    from packspeed.data.prepare.prepare import prepare

    (trained.folder / "other.txt").write_text("other text " * 2000)
    prepare([str(trained.folder / "other.txt")], trained.folder / "other", "bytes", val_fraction=0.1)
    done = train(*trained.arguments("done", f"data.path={trained.folder}/other"))
    assert done.returncode == 2
    assert "was trained with another dataset" in done.stderr
    assert "tokens before" in done.stderr, "what changed is named"


def copy_as(folder: Path, step: int, other: int) -> None:
    """Copy the checkpoint of `step` as a complete one of another step."""
    copy = folder / step_folder(other)
    shutil.copytree(folder / step_folder(step), copy)
    manifest = {**read_manifest(folder / step_folder(step)), "step": other}
    (copy / MANIFEST).write_text(dump_manifest(manifest))


def test_damaged_checkpoints_are_skipped_with_the_reason(trained: Workspace) -> None:
    """Truncated, bit-flipped, unlisted, unfinished: the run resumes from the complete one, with the same curve."""
    trained.rewind("done", "damaged", step=9)
    folder = trained.checkpoints("damaged")
    flipped = folder / "step-00000009" / "mp_rank_00_model_states.pt"
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    copy_as(folder, 6, 8)
    optimizer = next((folder / "step-00000008").glob("*optim_states.pt"))
    os.truncate(optimizer, 100)
    copy_as(folder, 6, 7)
    (folder / "step-00000007" / "packspeed.json").unlink()
    copy_as(folder, 6, 10)
    (folder / "step-00000010" / "evil.pt").write_bytes(b"")
    done = train(*trained.arguments("damaged"))
    assert done.returncode == 0, done.stderr
    reasons = {"10": "not listed", "09": "was changed", "08": "has 100 bytes", "07": "did not finish"}
    for name, reason in reasons.items():
        line = next(text for text in done.stdout.splitlines() if f"skipping checkpoint step-000000{name}" in text)
        assert reason in line
    assert "(step 6)" in done.stdout
    assert trained.curve("damaged") == trained.curve("done")


def test_generate_without_a_checkpoint(workspace: Workspace) -> None:
    done = packspeed("generate", str(workspace.folder / "nope"))
    assert done.returncode == 2
    assert "no such run folder" in done.stderr
    (workspace.folder / "empty" / "checkpoints").mkdir(parents=True)
    done = packspeed("generate", str(workspace.folder / "empty"))
    assert done.returncode == 1
    assert "no complete checkpoint" in done.stderr


def test_generate_refuses_a_damaged_checkpoint(trained: Workspace) -> None:
    shutil.copytree(trained.checkpoints("done") / "step-00000010", trained.folder / "step-00000010")
    (trained.folder / "step-00000010" / "mp_rank_00_model_states.pt").write_bytes(b"x")
    done = packspeed("generate", str(trained.folder / "step-00000010"))
    assert done.returncode == 1
    assert "damaged" in done.stderr


def test_generate_prints_json_alone(trained: Workspace) -> None:
    done = packspeed(
        "generate", str(trained.folder / "runs" / "done"), "--prompt", "def ", "--max-new-tokens", "5", "--json"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) == {"checkpoint", "prompt", "text", "tokens"}
    assert "deepspeed" not in done.stderr.lower()


def test_a_checkpoint_is_read_without_running_what_it_pickles(tmp_path: Path) -> None:
    """weights_only: a pickle that would run a command is refused, the command not run."""
    import torch

    from packspeed.launch.checkpoint.zero_checkpoint import read_safely
    from packspeed.launch.config.errors import UserError

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path}/owned",)

    torch.save({"module": Evil()}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match="cannot be read"):
        read_safely(tmp_path / "mp_rank_00_model_states.pt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(("owner", "allowed"), [("deepspeed", True), ("collections", False)])
def test_members_of_enumerations_are_read_from_every_python(tmp_path: Path, owner: str, allowed: bool) -> None:
    """Python 3.11.2, Debian 12's, pickles them as getattr(class, name), which is refused for other classes."""
    from collections import OrderedDict

    import torch
    from deepspeed.runtime.zero.config import ZeroStageEnum

    from packspeed.launch.checkpoint.zero_checkpoint import read_safely
    from packspeed.launch.config.errors import UserError

    class Member:
        def __reduce__(self) -> tuple[object, ...]:
            return getattr, (ZeroStageEnum, "weights") if owner == "deepspeed" else (OrderedDict, "fromkeys")

    path = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": {"zero_stage": Member()}}, path)
    if allowed:
        assert read_safely(path)["optimizer_state_dict"]["zero_stage"].state == ("weights",)
    else:
        with pytest.raises(UserError, match="cannot be read"):
            read_safely(path)


def test_a_rank_ends_although_a_pool_of_threads_is_open() -> None:
    """torch's compiler keeps one. Its idle threads end only if Python tells them to."""
    code = (
        "import concurrent.futures, atexit\nfrom packspeed.launch.config.unattended import end_process\n"
        "pool = concurrent.futures.ThreadPoolExecutor(1)\n"
        "pool.submit(int).result()\n"
        "atexit.register(print, 'registered')\n"
        "end_process(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (7, "registered\n"), done.stderr


@pytest.mark.parametrize("closed", ["", " 2>&-", " >&- 2>&-"])
@pytest.mark.parametrize(("raised", "code"), [("None", 0), ("3", 3), ("'why'", 1)])
def test_the_console_script_ends_with_the_code_of_the_command(raised: str, code: int, closed: str) -> None:
    """Also if stdout and stderr are closed, as they can be under a scheduler."""
    text = (
        "import sys, packspeed.launch.cli as cli\n"
        f"cli.main = lambda: (print('printed'), sys.exit({raised})) if sys.stdout else sys.exit({raised})\n"
        "cli.command()"
    )
    script = f"{shlex.quote(sys.executable)} -c {shlex.quote(text)}{closed}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert done.stdout == ("" if ">&- 2" in closed else "printed\n")
    assert done.stderr == ("why\n" if raised == "'why'" and not closed else "")


def test_free_ports_are_none_of_outgoing_connections() -> None:
    ports = {free_port() for _ in range(50)}
    assert len(ports) > 40
    assert all(20_000 <= port < 32_768 for port in ports)


def wait_for_step(path: Path, step: int, process: subprocess.Popen[str] | prefork.Processes) -> None:
    """Wait until metrics.jsonl has a line for `step`."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        if path.exists() and any(
            json.loads(x)["step"] >= step for x in path.read_text().splitlines() if x.endswith("}")
        ):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"no step {step} after 300 s")


LONG = ("train.steps=4000", "checkpoint.every_steps=0", "eval.every_steps=0", "train.schedule.name=constant")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda n: n.name)
def test_signals_save_and_exit_75_through_the_launcher(workspace: Workspace, number: signal.Signals) -> None:
    """`packspeed train` hands the signal to both ranks, which save and exit 75; the same command resumes."""
    name = f"stopped-{number.name}"
    options = [f"--set={text}" for text in (f"name={name}", "deepspeed=zero2", *LONG)]
    command = [sys.executable, "-c", "from packspeed.launch.cli import main; main()", "train", str(workspace.run_file)]
    process = subprocess.Popen(
        [*command, *options, "--ranks", "2"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_step(workspace.folder / "runs" / name / "metrics.jsonl", 3, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "The state is saved" in output
    last = workspace.metrics(name)[-1]["step"]
    assert (workspace.checkpoints(name) / "latest").read_text() == f"step-{last:08d}"
    assert json.loads((workspace.folder / "runs" / name / "status.json").read_text())["state"] == "stopped"


def test_stopped_run_goes_on_to_the_same_curve(workspace: Workspace) -> None:
    """Stopped by SIGTERM in the middle and started again: bitwise the curve of a run left alone."""
    sets = ("train.steps=60", "checkpoint.every_steps=0", "model.dropout=0.1")
    assert train(*workspace.arguments("alone", *sets)).returncode == 0
    process = prefork.start(TRAIN, workspace.arguments("interrupted", *sets), [environment()])
    wait_for_step(workspace.folder / "runs" / "interrupted" / "metrics.jsonl", 4, process)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert train(*workspace.arguments("interrupted", *sets)).returncode == 0
    assert workspace.curve("interrupted") == workspace.curve("alone")
