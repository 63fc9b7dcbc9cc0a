"""Write a safetensors file one tensor after the other, so that only one of them has to be in memory.

    file = TensorFile(path)
    file.append("fp32", weight)             # written, read back and compared
    file.append("exp_avg", moment)
    hashed = file.finish()                  # the header is complete, and the file is on disk

safetensors' own save_file needs all tensors at once, because the header comes first. Here the header has a fixed size:
the format allows spaces after its JSON. Before `finish`, the file is not a valid safetensors file.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from packspeed.data.storage.atomic import sync
from packspeed.data.storage.hashing import FileHash, hash_file
from packspeed.launch.engine.mapped_pages import release_pages

HEADER_BYTES = 4096  # with the eight bytes before it that say how long it is
PIECE = 2**20  # elements that are written or compared at a time


class TensorFile:
    """A safetensors file of fp32 tensors that is being written to `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._header: dict[str, dict[str, object]] = {}
        self._bytes = 0  # of all tensors so far
        path.write_bytes(bytes(HEADER_BYTES))

    def append(self, key: str, tensor: torch.Tensor) -> str | None:
        """Write a tensor under this key in fp32, and read it back.

        Returns a description of the difference if what was read is not what was written, else None.
        """
        flat = tensor.detach().float().contiguous().view(-1)
        with self.path.open("ab") as file:
            for start in range(0, flat.numel(), PIECE):
                file.write(flat[start : start + PIECE].numpy().data)
        begin, self._bytes = self._bytes, self._bytes + flat.numel() * 4
        self._header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, self._bytes]}
        if not flat.numel():
            return None
        found = torch.from_file(str(self.path), size=(HEADER_BYTES + self._bytes) // 4)[(HEADER_BYTES + begin) // 4 :]
        for start in range(0, flat.numel(), PIECE):
            piece = found[start : start + PIECE]
            # As integers, so that NaNs are compared too.
            if not torch.equal(piece.view(torch.int32), flat[start : start + PIECE].view(torch.int32)):
                return f"{self.path}: {key}, read back from the file, differs from what was written"
            release_pages([piece])
        return None

    def finish(self) -> FileHash:
        """Write the header, sync the file to disk, and return its size and hash."""
        header = json.dumps(self._header, separators=(",", ":")).encode()
        room = HEADER_BYTES - 8
        if len(header) > room:
            raise ValueError(f"{self.path}: its header needs {len(header)} bytes, and there is room for {room}")
        with self.path.open("r+b") as file:
            file.write(room.to_bytes(8, "little") + header.ljust(room))
        sync(self.path)
        return hash_file(self.path)
