"""Verify the checkpoints in a folder with several ranks. Each writes what it found to rank-N.json beside the folder.

Rank 1 takes longer to read its share of step 1 than TIMEOUT_S, after which collectives fail. So the test shows that
ranks do not wait for each other in a collective.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from packspeed.data.storage.hashing import FileHash, hash_file
from packspeed.launch.checkpoint import verify
from packspeed.launch.config.errors import UserError
from packspeed.launch.engine import shared_work
from packspeed.launch.engine.distributed import start_distributed

TIMEOUT_S = 10.0


def main(folder: Path) -> None:
    """Verify all checkpoints of a folder. Then wait for rank 2, which arrives only after the others have given up."""
    read: list[str] = []
    beats: list[tuple[str, str]] = []
    topology = start_distributed(timeout_s=TIMEOUT_S, beat=lambda phase, waits="": beats.append((phase, waits)))

    def counted(path: Path, progress: Callable[[], object]) -> FileHash:
        read.append(f"{path.parent.name}/{path.name}")
        if topology.rank == 1 and path.parent.name == "step-00000001":
            time.sleep(1.5 * TIMEOUT_S)
        return hash_file(path, progress)

    verify.hash_file = counted
    lines: list[str] = []
    newest, damaged = verify.newest_complete(folder, lines.append, topology)
    out = {"newest": newest and newest.name, "damaged": [path.name for path in damaged], "lines": lines, "read": read}
    out["beats"] = sorted(set(beats))  # before the work that fails

    # Rank 2 comes only when the others have given it up.
    shared_work.SILENCE_S = 1.0
    given_up = folder.with_name("given-up")
    work = shared_work.SharedWork(topology, "waiting")
    while topology.rank == 2 and not given_up.exists():
        time.sleep(0.05)
    try:
        work.wait()
    except UserError as error:
        out["silence"] = str(error)
        given_up.touch()
    folder.with_name(f"rank-{topology.rank}.json").write_text(json.dumps(out))
    topology.barrier()  # rank 0 is the server of the store, so it must end last
    time.sleep(1 if topology.rank == 0 else 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
