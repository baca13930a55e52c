"""Masking jobs on a Ray cluster: datasets, reports and metrics."""

import re
import time
import urllib.request
from pathlib import Path

import pyarrow.compute as pc
import pytest
import ray
import torch
from PIL import Image
from safetensors.torch import save_file

from carclass import storage
from carclass.cluster.telemetry import PhotoMeter
from carclass.config.schema import CutoutSettings, DetectorSettings, ExcludeSettings, MaskSettings
from carclass.data import dataset, publishing
from carclass.errors import UserError
from carclass.masking import detectron, quality
from carclass.masking.mask import mask_dataset, preview_masks

SAMPLE = DetectorSettings(model="sample", weights="sample", short_side=160, num_proposals=30)


def test_every_row_has_mask_measures(masked: dataset.Dataset):
    rows = masked.read(dataset.DETECTION.names).filter(pc.field("outcome") == "vehicle").to_pylist()
    assert rows
    for row in rows:
        assert 0 < row["area_fraction"] < 1
        assert 0 < row["stability"] <= 1
        assert row["num_vehicles"] >= 1
        assert row["several_vehicles"] <= (row["num_vehicles"] > 1)


def test_a_masking_job_writes_a_report_and_a_contact_sheet(masked: dataset.Dataset):
    page = storage.read_bytes(storage.join(masked.uri, "report.html")).decode()
    assert "<h1>Dataset v2: masks of v1</h1>" in page
    assert f"{masked.manifest['outcomes']['vehicle']:,} of {masked.manifest['rows']:,} photos" in page
    with Image.open(Path(masked.uri, "contact_sheet.jpg")) as sheet:
        assert sheet.width > 1000


def test_the_report_has_the_mean_iou_with_the_true_masks(masked: dataset.Dataset, photos_folder: Path):
    ious = quality.ious(masked, str(photos_folder / "truth.json"))
    assert f"{sum(ious.values()) / len(ious):.3f}" in Path(masked.uri, "report.html").read_text()


@pytest.mark.slow  # 8 s
def test_a_preview_writes_pictures_but_no_dataset(root: str):
    uri = preview_masks(root, MaskSettings(detector=SAMPLE, num_actors=1, dataset="previewed"), 6)
    assert storage.list_files(uri) == ["contact_sheet.jpg", "report.html"]
    assert dataset.find_dataset(root, "previewed") is None


@pytest.mark.slow  # 15 s
def test_a_second_preview_may_have_other_settings(root: str):
    for margin in (0.0, 0.2):
        settings = MaskSettings(detector=SAMPLE, num_actors=1, dataset="twice", cutout=CutoutSettings(margin=margin))
        uri = preview_masks(root, settings, 3)
        assert f"margin {margin:g}" in Path(uri, "report.html").read_text()


@pytest.mark.slow  # 10 s
def test_excluded_photos_are_quarantined_with_the_reasons(
    root: str, ingested: dataset.Dataset, masked: dataset.Dataset
):
    exclude = ExcludeSettings(no_vehicle=True, min_area_fraction=0.25)
    large = mask_dataset(root, MaskSettings(detector=SAMPLE, num_actors=1, dataset="large", exclude=exclude))
    rows = masked.read(["key", "outcome", "area_fraction"]).to_pylist()
    kept = {row["key"] for row in rows if row["outcome"] == "vehicle" and row["area_fraction"] >= 0.25}
    assert set(large.read(["key"])["key"].to_pylist()) == kept
    assert large.manifest["reasons"] == {"doubtful_mask": ingested.manifest["rows"] - len(kept)}
    details = publishing.read_written(large.uri, "quarantine", ["detail"])["detail"].to_pylist()
    assert all("of the photo" in detail or detail == "no vehicle" for detail in details)


def metrics() -> dict[str, float]:
    """Return the metrics of carclass from Ray's Prometheus endpoint, by name and own labels."""
    port = ray.nodes()[0]["MetricsExportPort"]
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    values = {}
    for line in text.splitlines():
        if line.startswith("ray_carclass_"):
            name, labels, value = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line).groups()
            own_labels = re.findall(r'(?:verb|outcome|reason)="(\w+)"', labels)
            values["|".join([name, *sorted(own_labels)])] = float(value)
    return values


def test_outcomes_are_exported_to_prometheus(root: str, ray_cluster: str):
    meter = PhotoMeter("watched", 10)
    meter.add(["vehicle", "vehicle", "no_vehicle"], ["crashed"])
    expected = {
        "ray_carclass_photos_total|vehicle|watched": 2,
        "ray_carclass_photos_total|no_vehicle|watched": 1,
        "ray_carclass_quarantined_total|crashed|watched": 1,
        "ray_carclass_queue|watched": 6,
    }
    deadline = time.monotonic() + 60
    while not expected.items() <= metrics().items():
        assert time.monotonic() < deadline, metrics()
        time.sleep(1)
    assert metrics()["ray_carclass_photos_per_second|watched"] > 0


@pytest.fixture(scope="module")
def faster_rcnn(tmp_path_factory: pytest.TempPathFactory) -> DetectorSettings:
    """Settings of an untrained detector of boxes with high scores everywhere."""
    torch.manual_seed(0)
    network = detectron.build(detectron.load_config("faster_rcnn_r101_fpn"))
    for weight in network.backbone.parameters():
        weight.data.mul_(0.5)  # a hundred untrained layers would overflow
    network.roi_heads.box_predictor.cls_score.bias.data[2] = 20.0
    file = tmp_path_factory.mktemp("weights") / "faster.safetensors"
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, file)
    return DetectorSettings(
        model="faster_rcnn_r101_fpn",
        weights=str(file),
        classes={2: "car", 7: "truck"},
        score_threshold=0.0,
        short_side=64,
    )


@pytest.mark.slow  # 20 s
def test_a_detector_of_boxes_gives_crops_without_masks(root: str, faster_rcnn: DetectorSettings):
    crop = CutoutSettings(mode="crop", margin=0)
    boxes = mask_dataset(root, MaskSettings(detector=faster_rcnn, num_actors=1, dataset="boxes", cutout=crop, limit=4))
    rows = boxes.read(["outcome", "mask", "stability", "box", "width", "height", "area_fraction"]).to_pylist()
    assert {row["outcome"] for row in rows} == {"vehicle"}
    assert {(row["mask"], row["stability"]) for row in rows} == {(None, None)}
    for row in rows:
        x1, y1, x2, y2 = row["box"]
        assert abs(row["width"] - (x2 - x1)) <= 2
        assert abs(row["height"] - (y2 - y1)) <= 2


@pytest.mark.slow  # 5 s
def test_masks_require_a_detector_of_masks(root: str, faster_rcnn: DetectorSettings):
    with pytest.raises(
        UserError, match=r"`mask.cutout.mode` is crop\+mask, but faster_rcnn_r101_fpn detects boxes only"
    ):
        mask_dataset(root, MaskSettings(detector=faster_rcnn, dataset="boxes-masked"))
