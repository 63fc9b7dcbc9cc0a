"""Text samples during training: what they leave behind in the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from packspeed.launch.config.loading import load_run_file
from packspeed.launch.training.text_samples import TextSampler
from packspeed.model.gpt import GPT, init_weights
from support.workspace import Workspace


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch looks at it while it traces
def test_sampling_makes_no_graphs_and_leaves_training_compiled(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token has a new length. Graphs for them would reach torch's limit, and training would have none."""
    to_compile = nn.Module.compile

    def without_code(self: nn.Module, **options: Any) -> None:
        to_compile(self, backend="aot_eager", **options)  # the same graphs, without generating code for them

    monkeypatch.setattr(nn.Module, "compile", without_code)
    sets = ["model.kernels=compile", 'monitor.sample_prompts=["def ", "a"]', "monitor.sample_tokens=14"]
    run = load_run_file(workspace.run_file, sets)
    config = run.gpt_config(257)
    model = GPT(config)
    init_weights(model, 0)
    sampler = TextSampler(run, config, model, torch.device("cpu"))  # type: ignore[arg-type]  # it only calls the engine
    tokens = torch.zeros(2, 32, dtype=torch.int64)
    counters.clear()

    def train() -> int:
        model(tokens, tokens, dropout_keys=torch.arange(2)).backward()
        return int(counters["stats"]["unique_graphs"])

    first = sampler.sample()
    assert counters["stats"]["unique_graphs"] == 0
    graphs = train()
    frames = dict(counters["frames"])
    assert graphs > 0
    assert frames["ok"] == frames["total"] > 0
    assert sampler.sample() == first
    assert train() == graphs
    assert counters["frames"] == frames, "nothing was compiled again, and nothing gave up"
