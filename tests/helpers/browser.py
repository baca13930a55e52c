"""A headless Chromium that opens a report from a file."""

import shutil
import subprocess
from pathlib import Path

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
    "--dump-dom",
]


def open_page(page: str, folder: Path) -> tuple[str, list[str]]:
    """Open a page and return the DOM after its script ran, and the lines of the browser's console."""
    file = folder / "report.html"
    file.write_text(page, encoding="utf-8")
    command = [BROWSER, *SWITCHES, f"--user-data-dir={folder / 'profile'}", file.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]
