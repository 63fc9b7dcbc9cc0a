#!/bin/bash
# DeepSpeed 0.19.8 with torch 2.13.0: Muon orthogonalizes the embeddings of a model that calls them wte.
#
# Guess:    DeepSpeed's Muon gives embeddings and the head to AdamW, as its authors recommend: it can see which modules are
#           torch.nn.Embedding.
# Instead:  It looks for "embed" and "lm_head" in the parameters' names. In a model with GPT-2's names (wte, wpe: nanoGPT,
#           transformers' GPT2) all matrices get Muon, without a message: AdamW's first step would change every element by the
#           learning rate, this one does not. The same model with the name embed_tokens is treated as expected.
# Output:   wte: Muon, first step at lr 0.01 changes elements by 0.0000 to 0.0012
#           embed_tokens: AdamW, first step at lr 0.01 changes elements by 0.0100 to 0.0100
. "$(dirname "$0")/venv.sh"
venv torch==2.13.0 numpy==2.4.6 deepspeed==0.19.8 ninja==1.13.2 setuptools==84.2.1
export RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29719 TORCHDYNAMO_DISABLE=1
cat >"$scratch/muon.py" <<'PYTHON'
import sys

import deepspeed
import torch


class Model(torch.nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.name = name
        self.add_module(name, torch.nn.Embedding(64, 16))
        self.mlp = torch.nn.Linear(16, 64, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.mlp(getattr(self, self.name)(tokens))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


name = sys.argv[1]
torch.manual_seed(0)
model = Model(name)
table = getattr(model, name).weight
before = table.detach().clone()
optimizer = {"type": "Muon", "params": {"lr": 0.01}}
config = {"train_batch_size": 1, "optimizer": optimizer, "zero_optimization": {"stage": 1}, "bf16": {"enabled": False}}
engine = deepspeed.initialize(model=model, config=config)[0]
engine.backward(engine(torch.arange(8)[None]))
engine.step()
change = (table.detach() - before)[:8].abs()  # the rows of the tokens in the batch
print(f"{name}: {'Muon' if table.use_muon else 'AdamW'}, first step at lr 0.01 changes elements by "
      f"{change.min().item():.4f} to {change.max().item():.4f}")
PYTHON
run() { "$python" -W ignore "$scratch/muon.py" "$1" 2>"$scratch/log" | grep "^$1" || { cat "$scratch/log" >&2; exit 2; }; }
wte=$(run wte) embed=$(run embed_tokens)
printf '%s\n' "$wte" "$embed"
[[ $wte == *"Muon,"* && $wte != *"by 0.0100 to 0.0100" && $embed == *"AdamW,"*"by 0.0100 to 0.0100" ]]
