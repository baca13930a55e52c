"""A headless Chromium that opens a report from a file."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SWITCHES = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--v=0",
]
PHONE_WIDTH = 400


def open_page(page: str, folder: Path, width: int = 800) -> tuple[str, list[str]]:
    """Open a page and return the DOM after its script ran, and the lines of the browser's console."""
    result = _run(page, folder, "--dump-dom", f"--window-size={width},600")
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


def photograph_page(page: str, folder: Path) -> np.ndarray:
    """Return the top of a page on a phone, whose scroll bars are hidden: uint8 (H,PHONE_WIDTH,3) RGB."""
    file = folder / "page.png"
    _run(page, folder, f"--screenshot={file}", f"--window-size={PHONE_WIDTH},600", "--hide-scrollbars")
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def _run(page: str, folder: Path, *switches: str) -> subprocess.CompletedProcess[str]:
    file = folder / "report.html"
    file.write_text(page, encoding="utf-8")
    command = [BROWSER, *SWITCHES, *switches, f"--user-data-dir={folder / 'profile'}", file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
