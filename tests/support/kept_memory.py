"""Check the allocator of model/native_memory.cpp in a process of its own, because it cannot be taken out again."""

import psutil
import pytest
import torch

from packspeed.model.native_memory import keep_memory

MIB = 2**20


def tensor(mib: float) -> torch.Tensor:
    """Return a tensor whose pages are all resident."""
    return torch.ones(int(mib * MIB), dtype=torch.uint8)


def resident_mib() -> float:
    return float(psutil.Process().memory_info().rss / MIB)


before = torch.ones(8 * MIB)
start = resident_mib()
keep_memory()
keep_memory()  # a second call changes nothing
del before  # was allocated by torch's own allocator, which also frees it

# A freed block is given to the next tensor whose blocks have the same size.
other = tensor(400)
first = tensor(64)
place = first.data_ptr()
assert place % 4096 == 0
del first
larger, smaller, same = tensor(65), tensor(50), tensor(61)
assert [larger.data_ptr() == place, smaller.data_ptr() == place, same.data_ptr() == place] == [False, False, True]
del larger, smaller, same, other

# Without memory, torch raises its own error. The request does not raise the limit below.
with pytest.raises(RuntimeError, match=r"(not enough|allocate) memory"):
    torch.empty(2**60, dtype=torch.uint8)

# Blocks of sizes that do not come back are returned: at most half more than the largest sum of tensors is kept.
for mib in range(100, 200, 3):
    a, b = tensor(mib), tensor(2 * mib)
    del a, b
assert resident_mib() - start < 1.5 * 3 * 200

# A tensor can outlive others, change its size and be shared with numpy.
kept = torch.arange(MIB, dtype=torch.int64)
array = kept.numpy()
others = [tensor(8) for _ in range(20)]
del others, kept
assert array[-1] == MIB - 1
grown = torch.zeros(10)
grown.resize_(4 * MIB).fill_(1)
grown.resize_(20 * MIB)
assert float(grown[: 4 * MIB].sum()) == 4 * MIB

# The profiler sees what tensors take.
with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
    tensor(32)
assert max(event.cpu_memory_usage for event in profile.events()) == 32 * MIB

print("memory is kept")
