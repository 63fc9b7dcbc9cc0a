"""Make a corpus for benchmarks from files of this machine. The content is the same every time on one machine.

python tests/bench/corpus.py OUT.jsonl MEGABYTES [code|prose]

code: documents of 20 to 400 lines from Python's standard library, each with a unique first line. prose: documents of 3
to 60 paragraphs from the docstrings of all installed Python packages and their documentation, in random order.
"""

import json
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path


def make_corpus(out: Path, size_bytes: int) -> None:
    """Write about `size_bytes` of jsonl with documents of 20 to 400 lines of code."""
    rng = random.Random(0)
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(library.rglob("*.py")) if "site-packages" not in path.parts]
    texts = [text for path in paths if (text := path.read_text("utf-8", errors="ignore"))]
    written, number = 0, 0
    with open(out, "w", encoding="utf-8") as stream:
        while written < size_bytes:
            lines = rng.choice(texts).splitlines(keepends=True)
            first = rng.randrange(len(lines))
            body = "".join(lines[first : first + rng.randrange(20, 400)])
            body = body.replace("self", rng.choice(["self", "this", "me", "obj"]))
            written += stream.write(json.dumps({"text": f"# {number} {rng.random()}\n{body}", "id": number}) + "\n")
            number += 1


def make_prose(out: Path, size_bytes: int) -> None:
    """Write about `size_bytes` of jsonl with documents of 3 to 60 paragraphs of prose."""
    rng = random.Random(0)
    paragraphs = sorted(set(_paragraphs()))
    written, number = 0, 0
    with open(out, "w", encoding="utf-8") as stream:
        while written < size_bytes:
            text = "\n\n".join(rng.choices(paragraphs, k=rng.randrange(3, 60)))
            written += stream.write(json.dumps({"text": text, "id": number}, ensure_ascii=False) + "\n")
            number += 1


def _paragraphs() -> Iterator[str]:
    """Yield the paragraphs of docstrings and documentation that are mostly words."""
    for folder in {sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")}:
        for path in Path(folder).rglob("*"):
            if path.suffix not in (".py", ".md", ".rst", ".txt") or not path.is_file():
                continue
            text = path.read_text("utf-8", errors="ignore")
            blocks = re.findall(r'"""(.+?)"""', text, re.DOTALL) if path.suffix == ".py" else [text]
            for paragraph in (part for block in blocks for part in re.split(r"\n\s*\n", block)):
                words = " ".join(paragraph.split())
                if len(words) > 100 and sum(c.isalpha() or c == " " for c in words) > 0.9 * len(words):
                    yield words


if __name__ == "__main__":
    make = make_prose if sys.argv[3:] == ["prose"] else make_corpus
    make(Path(sys.argv[1]), int(float(sys.argv[2]) * 1e6))
