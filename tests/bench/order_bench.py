"""Test the randomness of our permutation beside numpy's at awkward sizes, and at 2**40 + 11 by sampling.

    python tests/bench/order_bench.py

The program prints three figures per size. "mix": the variance of the share of one source (30% of the data) in batches
of 480, divided by the variance for random draws without replacement; 1 is random. "repeated steps": how often the
distance between neighbouring samples in the data has occurred before, divided by the same for numpy's permutation; 1 is
random. "serial": the serial correlation times sqrt(n), which is around 0 for a random order.
"""

import numpy as np
import numpy.typing as npt

from packspeed.data.order import Permutation

Image = npt.NDArray[np.int64]


def figures(image: Image, n: int) -> tuple[float, int, float]:
    """Return the three figures of a permutation: mix variance, repeated steps, serial correlation times sqrt(n)."""
    mine = (image < 0.3 * n)[: image.size // 480 * 480].reshape(-1, 480).sum(axis=1)
    mix = float(mine.var() / (480 * 0.3 * 0.7 * (n - 480) / (n - 1)))
    steps = np.diff(image)
    repeated = steps.size - np.unique(steps).size
    serial = float(np.corrcoef(image[1:], image[:-1])[0, 1]) * float(np.sqrt(image.size))
    return mix, repeated, serial


def main() -> None:
    """Print the table of figures."""
    print(f"{'n':>16} {'order':>7} {'mix':>7} {'repeated steps':>15} {'serial':>7}")
    for n in (1_000_003, 700_001, 2**18):
        theirs = np.random.default_rng(0).permutation(n)
        for name, image in (("numpy", theirs), ("ours", Permutation(n, b"bench")(np.arange(n)))):
            mix, repeated, serial = figures(image, n)
            print(f"{n:>16} {name:>7} {mix:>7.3f} {repeated:>15} {serial:>7.2f}")
    n = 2**40 + 11
    samples = {
        "numpy": np.random.default_rng(0).integers(n, size=1_000_000),
        "ours": Permutation(n, b"bench")(np.arange(1_000_000)),
    }
    for name, image in samples.items():
        mix, repeated, serial = figures(image, n)
        print(f"{n:>16} {name:>7} {mix:>7.3f} {repeated:>15} {serial:>7.2f}")


if __name__ == "__main__":
    main()
