"""One collection of photos as folder, archives and S3 prefix, with real photos if ../shared is present."""

import io
import os
import shutil
import subprocess
import unicodedata
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from carclass import storage
from carclass.config.schema import IngestSettings
from carclass.data.inventory import Inventory
from carclass.data.quarantine import PhotoError
from carclass.ingestion import archive, listing, members
from carclass.ingestion.reading import load_photos, to_row
from tests.helpers.photos import noisy_jpeg, overwritten, saved, scene

CARS = Path(__file__).parents[3] / "shared" / "cars196" / "photos"
NUM_PHOTOS = 150
Result = dict[str, tuple[str, str]]
"""Key → ("row", hash of the bytes) or ("quarantine", reason)."""

pytestmark = [
    pytest.mark.skipif(not CARS.is_dir(), reason="needs ../shared/cars196"),
    pytest.mark.skipif(not shutil.which("zip"), reason="needs zip"),
]


def odd_files() -> dict[str, bytes]:
    """Return 37 files that are found among photos."""
    photo, jpeg, pixels = scene(), noisy_jpeg(), scene(60, 80)
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("a.jpg", jpeg)
    frames = [Image.fromarray(np.roll(pixels, shift, axis=1)) for shift in (0, 9)]
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "empty.jpg": b"",
        "page.jpg": b"<html>404 not found</html>",
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "header only.jpg": jpeg[:200],
        "one byte.jpg": b"\xff",
        "damaged.jpg": overwritten(jpeg, len(jpeg) // 2),
        "trailing.jpg": jpeg + bytes(1000),
        "upper.JPG": saved(photo, "JPEG"),
        "no ending": saved(photo, "JPEG"),
        "progressive.jpg": saved(photo, "JPEG", progressive=True),
        "rotated.jpg": saved(photo, "JPEG", exif=exif),
        "grey.jpg": saved(Image.fromarray(photo).convert("L"), "JPEG"),
        "cmyk.jpg": saved(Image.fromarray(photo).convert("CMYK"), "JPEG"),
        "really a.png.jpg": saved(photo, "PNG"),
        "alpha.png": saved(Image.fromarray(photo).convert("RGBA"), "PNG"),
        "palette.png": saved(Image.fromarray(photo).convert("P"), "PNG"),
        "deep.png": saved(Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80)), "PNG"),
        "cut.png": saved(photo, "PNG")[:-500],
        "x.webp": saved(photo, "WEBP"),
        "x.bmp": saved(photo, "BMP"),
        "x.gif": saved(frames[0], "GIF"),
        "moving.gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "x.tif": saved(photo, "TIFF"),
        "tiny.jpg": saved(scene(4, 4), "JPEG"),
        "thin.png": saved(scene(8, 400), "PNG"),
        "large.bin": bytes(3 * 2**20),
        "inner.zip": zipped.getvalue(),
        "notes.txt": b"front left",
        "Thumbs.db": b"\xd0\xcf\x11\xe0",
        ".DS_Store": b"\0\0\0\1Bud1",
        "._x.jpg": b"\0\5\x16\7",
        "__MACOSX/._y.jpg": b"\0\5\x16\7",
        unicodedata.normalize("NFC", "Škoda.jpg"): jpeg,
        unicodedata.normalize("NFD", "Citroën.jpg"): jpeg,
        "a, \"b\" & 'c' #1 100%.jpg": jpeg,
        "-rf.jpg": jpeg,
        f"{'deep/' * 20}{'n' * 200}.jpg": jpeg,
    }


def write_collection(folder: Path) -> Path:
    """Write 150 photos in folders of ten, 37 odd files, seven links and two files whose names are not UTF-8."""
    for i, path in enumerate(sorted(CARS.iterdir())[:NUM_PHOTOS]):
        (folder / f"class {i // 10:02d}").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / f"class {i // 10:02d}" / path.name)
    for name, data in odd_files().items():
        (folder / "odd" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "odd" / name).write_bytes(data)
    os.link(folder / "odd/upper.JPG", folder / "odd/hard link.jpg")
    (folder / "a first link.jpg").symlink_to("odd/upper.JPG")
    (folder / "odd/link to a link.jpg").symlink_to("../a first link.jpg")
    (folder / "odd/folder").symlink_to("../class 03")
    (folder / "odd/broken.jpg").symlink_to("gone.jpg")
    (folder / "odd/circle.jpg").symlink_to("circle.jpg")
    (folder / "odd/outside.jpg").symlink_to("../../gone.jpg")
    (folder / os.fsdecode(b"odd/caf\xe9.jpg")).write_bytes(noisy_jpeg())
    (folder / os.fsdecode(b"odd/\xff\xfe")).mkdir()
    (folder / os.fsdecode(b"odd/\xff\xfe/x.jpg")).write_bytes(noisy_jpeg())
    return folder


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_collection(tmp_path_factory.mktemp("sources") / "photos")


@pytest.fixture(autouse=True)
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "MAX_PHOTO_BYTES", 2**21)


def read(photos: str) -> Result:
    """Return the result of each file as ingestion would give it, without labels."""
    settings = IngestSettings(photos=photos)
    with Inventory() as inventory:
        listing.list_photos(photos, inventory)
        results = {row[0]: ("quarantine", str(row[1])) for row in inventory.rejected_inputs()}
        for requested in inventory.pending(1000, hash_order=False):
            if archive.is_archive(photos):
                tables = archive.read_photos(photos, requested, 256, "ingest.photos")
                rows = (row for table in tables for row in table.to_pylist())
            else:
                rows = load_photos(requested, photos, range(len(requested)))
            results |= {row["key"]: result(row, settings) for row in rows}
        assert len(results) == inventory.count_inputs()
    return results


def result(row: dict[str, Any], settings: IngestSettings) -> tuple[str, str]:
    try:
        return "row", to_row({**row, "subset": "train"}, settings)["image_id"]
    except PhotoError as error:
        return "quarantine", str(error.reason)


def differences(found: Result, expected: Result) -> dict[str, tuple[Any, Any]]:
    return {
        key: (found.get(key), expected.get(key))
        for key in sorted({*found, *expected})
        if found.get(key) != expected.get(key)
    }


def test_a_folder_loses_no_file(collection: Path):
    results = read(str(collection))
    names = [os.fsencode(path).decode("utf-8", "backslashreplace") for path in files_below(collection)]
    assert sorted(results) == sorted(name.removeprefix(f"{collection}/") for name in names)
    assert {kind for key, (kind, _) in results.items() if key.startswith("class ")} == {"row"}


def files_below(folder: Path) -> Iterator[Path]:
    """Yield all files and links, those below links to folders too."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from files_below(path)
        else:
            yield path


@pytest.mark.parametrize("suffix", ["tgz", "zip"])
def test_an_archive_gives_the_rows_and_the_quarantine_of_its_folder(collection: Path, suffix: str, tmp_path: Path):
    target = str(tmp_path / f"photos.{suffix}")
    command = ["zip", "-qry1", target, "."] if suffix == "zip" else ["tar", "-czf", target, "."]
    subprocess.run(command, cwd=collection, check=True)
    assert differences(read(target), read(str(collection))) == {}


@pytest.mark.slow  # the S3 server starts in 5 s
def test_a_prefix_gives_the_rows_and_the_quarantine_of_its_folder(collection: Path, s3: Any):
    """S3 has neither links nor names that are not UTF-8: an upload follows the ones and leaves the others out."""
    bucket = "collection"
    s3.create_bucket(Bucket=bucket)
    expected = {key: value for key, value in read(str(collection)).items() if os.path.isfile(collection / key)}
    for key in expected:
        storage.write_bytes(f"s3://{bucket}/photos/{key}", (collection / key).read_bytes())
    assert len(expected) > NUM_PHOTOS + 40
    assert differences(read(f"s3://{bucket}/photos"), expected) == {}
