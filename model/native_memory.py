"""Keep the memory of freed CPU tensors for the next ones. native_memory.cpp says how, and why."""

from pathlib import Path

import torch

from packspeed.model.native_kernels import compiled

SOURCE = Path(__file__).with_name("native_memory.cpp")


def keep_memory() -> None:
    """Let torch allocate CPU tensors of 1 MiB or more in this process from blocks that are kept when they are freed.

    Compiles the allocator first if it is not in the cache folder. Raises what native_kernels.build raises.
    """
    folder = Path(torch.__file__).parent
    library = compiled(
        "native_memory",
        [SOURCE],
        f"-I{folder}/include",
        f"-L{folder}/lib",
        "-lc10",
        f"-D_GLIBCXX_USE_CXX11_ABI={torch.compiled_with_cxx11_abi():d}",
        f"-DTORCH={torch.__version__}",  # so that another torch, with other headers, gets another library
    )
    library.keep_memory()
