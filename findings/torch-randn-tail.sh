#!/bin/bash
# torch 2.13.0: one seed does not make one sequence of normal numbers on a CPU.
#
# Guess:    With the same seed, torch.randn(n) begins with the numbers of every shorter torch.randn(m). So one may draw a
#           large weight in rows or pieces, or pad a vocabulary, and get the same weights.
# Instead:  Below 16 elements another algorithm draws (other numbers from the first on). From 16 on, numbers are made in
#           groups of 16; if the size is no multiple of 16, the last 16 elements are drawn once more. So a longer tensor
#           differs from a shorter one near the shorter one's end, and what is drawn next differs as well. torch.rand has
#           the property that one expects.
# Output:   randn of 15 and 16: 15 of 15 common elements differ
#           randn of 32 and 40: 8 of 32 common elements differ, from element 24 on
#           randn of 32 and 48: 0 of 32 common elements differ
#           rand  of 15 and 40: 0 of 15 common elements differ
. "$(dirname "$0")/venv.sh"
venv torch==2.13.0 numpy==2.4.6
"$python" -W ignore - <<'PYTHON'
import torch


def compare(draw, short, long):
    """Numbers of the elements, out of those that both have, that differ."""
    first, second = (draw(size, generator=torch.Generator().manual_seed(0)) for size in (short, long))
    places = (first != second[:short]).nonzero().flatten().tolist()
    where = f", from element {places[0]} on" if places and places[0] else ""
    print(f"{draw.__name__:<5} of {short} and {long}: {len(places)} of {short} common elements differ{where}")
    return places


assert len(compare(torch.randn, 15, 16)) == 15, "small tensors have the numbers of large ones now"
assert compare(torch.randn, 32, 40) == list(range(24, 32)), "the tail is no longer drawn again"
assert compare(torch.randn, 32, 48) == []
assert compare(torch.rand, 15, 40) == []
PYTHON
