"""Peak memory of an ingestion task, measured in a process of its own."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from carclass.config.schema import IngestSettings
from carclass.data.inventory import INPUT
from carclass.ingestion.ingest import write_photos
from tests.helpers.inventories import run_all

MAX_MB = 600


def draw(height: int, width: int) -> Image.Image:
    """Draw colour gradients with a little noise."""
    y, x = np.linspace(0, 100, height)[:, None], np.linspace(0, 100, width)
    pixels = np.repeat((y + x)[..., None], 3, axis=2).astype(np.uint8)
    return Image.fromarray(pixels + np.random.default_rng(0).integers(0, 4, (height, width, 1), np.uint8))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a photo of 12 and photos of 50 megapixels."""
    folder = tmp_path_factory.mktemp("photos")
    draw(3024, 4032).save(folder / "12.jpg", quality=98, subsampling=0)
    large = draw(5774, 8660)
    large.save(folder / "50.jpg", quality=95)
    large.save(folder / "50.png", compress_level=1)
    large.save(folder / "50.webp", method=0)
    large.save(folder / "50.avif", speed=10)
    return folder


def print_peak(folder: Path, name: str, count: int, max_side: int | None) -> None:
    """Ingest links to one photo as a task does, and print the peak memory of this process in MB."""
    size = (folder / name).stat().st_size
    keys = [f"{i}-{max_side}-{name}" for i in range(count)]
    for key in keys:
        (folder / key).hardlink_to(folder / name)
    rows = [{"key": key, "label": "A", "subset": "test", "size": size, "fingerprint": key} for key in keys]
    settings = IngestSettings(photos=str(folder), max_side=max_side)
    written = write_photos(pa.Table.from_pylist(rows, INPUT), str(folder / "out"), settings, {}, run_all)
    assert sum(len(part.rows) for part in written if part.path.startswith("parts/")) == count
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(line.split()[1]) // 1024)


@pytest.mark.slow  # 40 s with its fixture, which draws the photos
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("name", "count", "max_side"),
    [
        ("12.jpg", 64, 800),
        ("12.jpg", 64, None),
        ("50.jpg", 6, 800),
        ("50.jpg", 6, None),
        ("50.png", 2, 800),
        ("50.webp", 2, 800),
        ("50.webp", 2, None),
        ("50.avif", 2, 800),
        ("50.avif", 2, None),
    ],
)
def test_the_memory_of_a_task_depends_neither_on_the_size_of_files_nor_on_their_number(
    photos: Path, name: str, count: int, max_side: int | None
):
    command = [sys.executable, "-m", "tests.unit.test_ingest_memory", str(photos), name, str(count), str(max_side)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert int(done.stdout) <= MAX_MB


if __name__ == "__main__":
    print_peak(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), None if sys.argv[4] == "None" else int(sys.argv[4]))
