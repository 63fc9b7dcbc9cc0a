"""Make the pictures of docs/images: python tests/tools/screenshots.py RUN RUN   (needs Debian's chromium)

Headless Chromium draws the report of two runs and TensorBoard's pages. The pictures are reduced to 160 colours.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from packspeed.launch.config.ports import free_port
from packspeed.launch.observe.report import report
from support import ROOT
from support.browser import browse

TABS = {"scalars": "custom_scalars", "texts": "text", "histograms": "histograms", "hparams": "hparams"}


def shoot(url: str, path: Path, height: int, width: int = 1240) -> None:
    """Draw one page and write it as a PNG, scaled to two thirds of its size."""
    with tempfile.TemporaryDirectory() as profile:
        size = f"--window-size={width},{height}"
        browse(url, Path(profile), size, "--hide-scrollbars", "--virtual-time-budget=20000", f"--screenshot={path}")
    with Image.open(path) as image:
        small = image.convert("RGB").resize((image.width * 2 // 3, image.height * 2 // 3), Image.Resampling.LANCZOS)
    small.quantize(160, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size:,} bytes")


def main() -> None:
    runs, docs = [Path(name).resolve() for name in sys.argv[1:]], ROOT / "docs" / "images"
    docs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report(runs, folder / "report.html")
        shoot(f"file://{folder}/report.html", docs / "report.png", 2600)
        (folder / "logs").mkdir()
        for run in runs:
            (folder / "logs" / run.name).symlink_to(run / "tensorboard")
        port = free_port()
        options = ["--logdir", folder / "logs", "--port", str(port), "--load_fast", "false"]
        server = subprocess.Popen([sys.executable, "-m", "tensorboard.main", *options], stderr=subprocess.DEVNULL)
        try:
            time.sleep(15)  # until TensorBoard has started and has read the runs
            for name, tab in TABS.items():
                shoot(f"http://localhost:{port}/#{tab}", docs / f"tensorboard_{name}.png", 900)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
