"""Held-out photos of the real ones: exact shares, which further photos leave in their splits."""

import csv
from collections import Counter
from pathlib import Path

import pytest

from carclass import storage
from tests.helpers.held_out import Photo, publish, splits

CARS = Path(__file__).parents[3] / "shared" / "cars196"

pytestmark = [
    pytest.mark.skipif(not CARS.is_dir(), reason="needs ../shared/cars196"),
    pytest.mark.slow,  # 10 s
]


def test_each_class_has_its_share_to_one_photo_and_fifty_new_photos_move_none(tmp_path: Path):
    rows = [row for row in csv.DictReader((CARS / "labels.csv").open()) if (CARS / "photos" / row["img_name"]).exists()]
    photos = [
        Photo(row["img_name"], row["class"], content=storage.sha256((CARS / "photos" / row["img_name"]).read_bytes()))
        for row in rows
        if row["subset"] == "train"
    ]
    published = publish(tmp_path, photos[50:], {"val": 0.2})
    before = splits(published)
    after = splits(publish(tmp_path, photos, {"val": 0.2}, published))
    assert before.items() <= after.items()
    for kept, found in ((photos[50:], before), (photos, after)):
        numbers = Counter(photo.label for photo in kept)
        in_val = Counter(photo.label for photo in kept if found[photo.key] == "val")
        assert {name: n for name, n in numbers.items() if abs(in_val[name] - 0.2 * n) > 1} == {}
