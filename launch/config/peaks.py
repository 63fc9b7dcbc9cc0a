"""The peak FLOP/s of GPUs according to their data sheets. MFU is a share of this peak.

    datasheet_peak("NVIDIA H100 80GB HBM3", "bf16")        # 989e12

The values are for dense matrices (no sparsity) and for products that add up in fp32, as torch's do. For fp32 it is the
speed without tensor cores, because runs compute fp32 in fp32 and not in TF32 (numerics.py). Sources: data sheets and
architecture papers of NVIDIA and AMD; for the A10G, AWS.
"""

from __future__ import annotations

import re

# TFLOP/s of one GPU in (fp16, fp32, fp8); 0: no tensor cores for it. The words of a key must all be in the GPU's name.
PEAKS = {
    "GB300": (2500, 80, 5000), "B300": (2250, 75, 4500), "GB200": (2500, 80, 5000), "B200": (2250, 75, 4500),
    "H200": (989, 67, 1979), "H200 NVL": (835.5, 60, 1671), "GH200": (989, 67, 1979),
    "H100": (989, 67, 1979), "H100 NVL": (835.5, 60, 1671), "H100 PCIe": (756, 51, 1513), "H100 HBM2e": (756, 51, 1513),
    "H800": (989, 67, 1979), "H800 PCIe": (756, 51, 1513), "H20": (148, 44, 296),
    "A100": (312, 19.5, 0), "A800": (312, 19.5, 0), "A30": (165, 10.3, 0), "A40": (150, 37.4, 0),
    "A10": (125, 31.2, 0), "A10G": (70, 35, 0), "RTX A6000": (155, 38.7, 0),
    "L4": (121, 30.3, 242), "L40": (181, 90.5, 362), "L40S": (362, 91.6, 733), "RTX 6000 Ada": (364, 91.1, 728),
    "T4": (65, 8.1, 0), "V100 SXM2": (125, 15.7, 0), "V100 SXM3": (125, 15.7, 0), "V100 PCIe": (112, 14, 0),
    "V100S PCIe": (130, 16.4, 0), "RTX 3090": (71, 35.6, 0), "RTX 4090": (165, 82.6, 330), "RTX 5090": (210, 105, 419),
    "RTX PRO 6000 Blackwell Server": (480, 120, 960), "RTX PRO 6000 Blackwell Workstation": (504, 126, 1008),
    "RTX PRO 6000 Blackwell Max Q Workstation": (439, 110, 878),
    "MI300X": (1307, 163, 2615),
}  # fmt: skip

WITHOUT_BF16 = ("T4", "V100", "V100S")
# Words that make the name that of a slower or faster GPU, or of a part of one, unless the key has them.
OTHER_GPUS = {"laptop", "ti", "super", "d", "mig", "grid"}


def datasheet_peak(gpu: str, precision: str) -> float:
    """Return the peak FLOP/s of one GPU in a precision ("fp32", "bf16", "fp16", "fp8"); nan if the GPU is not known.

    `gpu` is the name that torch reports.
    """
    words = _words(gpu)
    fitting = [key for key in PEAKS if _words(key) <= words and not (words - _words(key)) & OTHER_GPUS]
    if not fitting or (precision == "bf16" and words & _words(" ".join(WITHOUT_BF16))):
        return float("nan")
    fp16, fp32, fp8 = PEAKS[max(fitting, key=lambda key: len(_words(key)))]
    teraflops = {"fp32": fp32, "bf16": fp16, "fp16": fp16, "fp8": fp8}[precision]
    return teraflops * 1e12 or float("nan")


def _words(name: str) -> set[str]:
    """Return the words of a GPU's name, split at spaces and hyphens, in lower case."""
    return set(re.split(r"[ -]+", name.casefold()))
