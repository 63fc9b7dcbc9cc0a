"""Make a corpus for benchmarks: documents from Python's standard library, each with a unique first line.

python tests/bench/corpus.py OUT.jsonl MEGABYTES
"""

import json
import random
import sys
import sysconfig
from pathlib import Path


def make_corpus(out: Path, size_bytes: int) -> None:
    """Write about `size_bytes` of jsonl with documents of 20 to 400 lines. The content is the same every time."""
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


if __name__ == "__main__":
    make_corpus(Path(sys.argv[1]), int(float(sys.argv[2]) * 1e6))
