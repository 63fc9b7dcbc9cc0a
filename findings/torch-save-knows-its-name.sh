#!/bin/bash
# torch 2.13.0: the bytes that torch.save writes depend on the name of the file.
#
# Guess:    Equal content is an equal file, or if it is not, time stamps are to blame.
# Instead:  There are no time stamps: one name gives the same bytes again and again. But the archive holds the file's stem as
#           the folder of all its members, so a checkpoint written under a temporary name and renamed differs from one
#           written in place. A file object in place of a name always gives the folder "archive".
# Output:   model.pt twice: equal; model.pt and model.pt.tmp: different; two file objects: equal
#           members of model.pt.tmp: model.pt/data.pkl
. "$(dirname "$0")/venv.sh"
venv torch==2.13.0 numpy==2.4.6
cd "$scratch"
"$python" - <<'PYTHON'
import time
import zipfile
from pathlib import Path

import torch


def written(name: str, as_file: bool = False) -> bytes:
    weights = {"weight": torch.ones(3)}
    if as_file:
        with open(name, "wb") as file:
            torch.save(weights, file)
    else:
        torch.save(weights, name)
    return Path(name).read_bytes()


first = written("model.pt")
time.sleep(2.1)  # zip's time stamps have a resolution of two seconds
again, other = written("model.pt"), written("model.pt.tmp")
objects = written("a.pt", as_file=True), written("b.pt", as_file=True)
word = lambda equal: "equal" if equal else "different"
print(f"model.pt twice: {word(first == again)}; model.pt and model.pt.tmp: {word(first == other)}; "
      f"two file objects: {word(objects[0] == objects[1])}")
print("members of model.pt.tmp:", zipfile.ZipFile("model.pt.tmp").namelist()[0])
assert first == again and first != other and objects[0] == objects[1], "the bytes have changed"
PYTHON
