#!/bin/bash
# DeepSpeed 0.19.8 with torch 2.13.0: Muon orthogonalizes the embeddings of a model that calls them wte.
#
# Guess:    DeepSpeed's Muon gives embeddings and the head to AdamW, as its authors recommend: it can see which modules are
#           torch.nn.Embedding.
# Instead:  It looks for "embed" and "lm_head" in the parameters' names. In a model with GPT-2's names (wte, wpe: nanoGPT,
#           transformers' GPT2) all matrices get Muon, without a message, and in each step the rows of all tokens move, not
#           only of those in the batch. The same model with the name embed_tokens is treated as expected.
# Output:   wte: Muon; 8 of 64 tokens in the batch, 64 rows moved
#           embed_tokens: AdamW; 8 of 64 tokens in the batch, 8 rows moved
. "$(dirname "$0")/venv.sh"
venv torch==2.13.0 numpy==2.4.6 deepspeed==0.19.8 ninja==1.13.2 setuptools==84.2.1
export RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=0 TORCHDYNAMO_DISABLE=1
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
moved = (table.detach() != before).any(dim=1).sum().item()
print(f"{name}: {'Muon' if table.use_muon else 'AdamW'}; 8 of 64 tokens in the batch, {moved} rows moved")
PYTHON
run() { "$python" -W ignore "$scratch/muon.py" "$1" 2>"$scratch/log" | grep "^$1" || { cat "$scratch/log" >&2; exit 2; }; }
wte=$(run wte) embed=$(run embed_tokens)
printf '%s\n' "$wte" "$embed"
[[ $wte == *"Muon;"*" 64 rows moved" && $embed == *"AdamW;"*" 8 rows moved" ]]
