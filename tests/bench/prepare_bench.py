"""Time `packspeed prepare` and two published recipes on one jsonl file, as complete processes with start-up.

    python tests/bench/prepare_bench.py FOLDER [MEGABYTES=160]

nanogpt: datasets.load_dataset, map with tiktoken's encode_ordinary in one process, write through np.memmap
         (https://github.com/karpathy/nanoGPT, data/openwebtext/prepare.py).
packspeed: with one worker, and with tiktoken alone; `start` prepares a file with one short line.
megatron: json.loads, tiktoken, one IndexedDatasetBuilder.add_document per document, one process
         (https://github.com/NVIDIA/Megatron-LM, tools/preprocess_data.py).
"""

import json
import os
import shutil
import sys
from pathlib import Path

from corpus import make_corpus, make_prose
from recipes import run


def nanogpt(source: str, out: str) -> None:
    """Tokenize with nanoGPT's recipe, written again here."""
    import numpy as np
    import tiktoken
    from datasets import load_dataset

    encoding = ranks()
    data = load_dataset("json", data_files=source, split="train", cache_dir=f"{out}/cache")
    parts = data.train_test_split(test_size=0.005, seed=2357, shuffle=True)

    def encode(example: dict[str, str]) -> dict[str, object]:
        ids = encoding.encode_ordinary(example["text"])
        ids.append(50256)
        return {"ids": ids, "len": len(ids)}

    assert isinstance(encoding, tiktoken.Encoding)
    tokenized = parts.map(encode, remove_columns=["text", "id"], num_proc=1)
    for split, part in tokenized.items():
        total = int(np.sum(part["len"], dtype=np.uint64))
        array = np.memmap(f"{out}/{split}.bin", dtype=np.uint16, mode="w+", shape=(total,))
        at = 0
        for i in range(min(1024, len(part))):
            batch = part.shard(num_shards=min(1024, len(part)), index=i, contiguous=True).with_format("numpy")
            ids = np.concatenate(batch["ids"])
            array[at : at + len(ids)] = ids
            at += len(ids)
        array.flush()


def megatron(source: str, out: str) -> None:
    """Tokenize with Megatron's classic recipe, written again here."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    encoding = ranks()
    builder = IndexedDatasetBuilder(f"{out}/corpus_text_document.bin", dtype=np.uint16)
    with open(source, encoding="utf-8") as stream:
        for line in stream:
            ids = encoding.encode_ordinary(json.loads(line)["text"])
            ids.append(50256)
            builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)])
    builder.finalize(f"{out}/corpus_text_document.idx")


def ranks() -> object:
    """Return tiktoken's GPT-2 encoding, made from the file in our package, so that no recipe has to download it."""
    import tiktoken

    from packspeed.data import text
    from packspeed.data.text.ranks import GPT2_PATTERN, parse_ranks

    path = Path(text.__file__ or "").parents[1] / "gpt2.tiktoken"
    return tiktoken.Encoding(
        "gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=parse_ranks(path.read_bytes(), "gpt2"), special_tokens={}
    )


def timed(name: str, command: list[str]) -> tuple[float, float]:
    """Run a command. Print and return its wall time and its CPU time, which other work on the machine disturbs less."""
    wall_s, cpu_s, _ = run(command)
    print(f"{name:<28} {wall_s:8.2f} s, {cpu_s:.2f} s of CPU", flush=True)
    return wall_s, cpu_s


OURS = {  # options of `packspeed prepare`
    "packspeed": ["--verify"],
    "packspeed, tiktoken alone": ["--verify", "--encoder", "tiktoken"],
    "start": [],
}


def prepared(name: str, source: Path, out: Path, options: list[str]) -> tuple[float, float]:
    """Run `packspeed prepare` and remove its dataset. Return its wall time and its CPU time."""
    prepare = [str(Path(sys.executable).parent / "packspeed"), "prepare"]
    times = timed(name, [*prepare, str(source), "--out", str(out), *options])
    shutil.rmtree(out)
    return times


def compare(folder: Path, source: Path) -> None:
    """Run all recipes twice on one corpus, in turn, and print the better times of each."""
    short = folder / "short.jsonl"
    short.write_text('{"text": "hello"}\n')
    print(f"{source.name}: {os.path.getsize(source) / 1e6:.0f} MB of jsonl")
    wall, cpu = dict[str, float](), dict[str, float]()
    for _ in range(2):
        for name in (*OURS, "nanogpt", "megatron"):
            out = folder / "out"
            if name in OURS:
                wall_s, cpu_s = prepared(name, short if name == "start" else source, out, OURS[name])
            else:
                out.mkdir()
                wall_s, cpu_s = timed(name, [sys.executable, __file__, name, str(source), str(out)])
                shutil.rmtree(out)
            wall[name], cpu[name] = min(wall.get(name, 1e9), wall_s), min(cpu.get(name, 1e9), cpu_s)
    for name in ("nanogpt", "megatron", "packspeed"):
        ratios = (f"{each} {wall[name] / wall[each]:.2f} (CPU {cpu[name] / cpu[each]:.2f})" for each in OURS)
        print(f"{name} / ours: {'; '.join(ratios)}")


def compare_workers(folder: Path, source: Path) -> None:
    """Prepare one corpus with 1 and with 2 workers, in turn, and print the ratio of the best wall times.

    The first run of each only warms the machine up: a virtual machine may have to get each page of memory from its
    host, which takes longer than anything that this measures.
    """
    best = {1: 1e9, 2: 1e9}
    for turn in range(4):
        for workers in best:
            name = f"{source.name}, workers: {workers}" + ("" if turn else ", warm-up")
            wall_s, _ = prepared(name, source, folder / "out", ["--workers", str(workers)])
            best[workers] = min(best[workers], wall_s if turn else 1e9)
    print(f"2 workers are {best[1] / best[2]:.2f} times as fast as 1")


def main(folder: Path, megabytes: float) -> None:
    """Make the corpora that are missing, and measure everything."""
    folder.mkdir(parents=True, exist_ok=True)
    code, prose, large = (folder / f"{name}.jsonl" for name in ("code", "prose", "large"))
    for source, make, size in ((code, make_corpus, 1), (prose, make_prose, 1), (large, make_corpus, 500 / 160)):
        if not source.exists():
            make(source, int(megabytes * size * 1e6))
    for source in (code, prose):
        compare(folder, source)
    compare_workers(folder, large)


if __name__ == "__main__":
    if sys.argv[1] in ("nanogpt", "megatron"):
        {"nanogpt": nanogpt, "megatron": megatron}[sys.argv[1]](sys.argv[2], sys.argv[3])
    else:
        main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 160)
