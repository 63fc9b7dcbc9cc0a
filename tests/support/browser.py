"""Open pages in Debian's Chromium, without a screen."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path


def browse(url: str, folder: Path, *flags: str) -> str:
    """Open a URL in headless Chromium and return what it prints. folder: Chromium's profile. flags: further options."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    assert chromium, "Debian's package chromium is missing: run bash .ci/packages"
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", f"--user-data-dir={folder}",
        "--disable-dev-shm-usage", "--window-size=1400,1100", *flags, url,
    ]  # fmt: skip
    env = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=env).stdout
