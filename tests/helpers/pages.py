"""HTML reports for tests: their sections, their text and example contents."""

import io
import re
from functools import cache

import numpy as np
from PIL import Image

from carclass.evaluation.metrics import classification_metrics, confusion_matrix, coverage_curve
from carclass.evaluation.report import MaskingSample, Mistake, Report
from carclass.experiments.report import render_comparison
from carclass.ingestion.report import DatasetReport, Rejected, Sample
from carclass.masking.contact_sheet import CELL_HEIGHT, CELL_WIDTH, MaskedPhoto
from carclass.masking.report import MaskingReport, histogram
from carclass.prediction.report import FailedPhoto, PredictedClass, PredictionReport, ShownPhoto
from tests.helpers.trees import sixteen

EVALUATION_SECTIONS = [
    "summary", "curves", "confusion", "pairs", "classes", "mistakes", "calibration", "threshold", "masking",
    "data",
]  # fmt: skip
DATASET_SECTIONS = ["summary", "classes", "sizes", "sample", "quarantine"]
PREDICTION_SECTIONS = ["summary", "photos", "classes", "quarantine"]
MASKING_SECTIONS = ["summary", "detections", "measures", "doubtful", "sample", "data"]
SWEEP_SECTIONS = ["summary", "seeds", "trials", "curves", "parallel", "importance", "slices", "cost"]
COMPARISON_SECTIONS = ["summary", "tree", "curves", "runs", "changes", "better", "treatments", "test"]


def visible_text(html: str) -> str:
    """Return the words of a piece of HTML; line breaks become single spaces, non-breaking spaces stay."""
    return re.sub(r"[ \n]+", " ", re.sub(r"<[^>]+>", " ", html))


def section(page: str, name: str) -> str:
    """Return the HTML of the section with this id."""
    match = re.search(rf'<section id="{name}".*?</section>', page, re.S)
    assert match, f"no section {name}"
    return match.group()


def has_linked_section(page: str, name: str) -> bool:
    """Return True if the section with this id exists and is linked."""
    return f'<section id="{name}"' in page and f'href="#{name}"' in page


def section_text(page: str, name: str) -> str:
    """Return the words of a section, with plain spaces only."""
    return visible_text(section(page, name)).replace("\u00a0", " ")


def make_photo(seed: int = 0) -> bytes:
    """Return a noisy JPEG file of about 20 KB, the recommended size for a report."""
    pixels = np.random.default_rng(seed).integers(0, 256, (132, 176, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=80)
    return file.getvalue()


def make_epoch(epoch: int, val_accuracy: float, loss: float = 1.0) -> dict[str, float]:
    """Return one row of a training history."""
    return {
        "epoch": epoch,
        "train_loss": loss,
        "train_accuracy": 0.5,
        "val_loss": loss,
        "val_accuracy": val_accuracy,
        "lr": 1e-3,
        "seconds": 2.5,
    }


def make_report(num_classes: int = 4, num_photos: int = 60, num_mistakes: int = 2, num_masked: int = 2) -> Report:
    """Return an evaluation report on random predictions."""
    generator = np.random.default_rng(5)
    names = [f"Maker Model {i:03d}" for i in range(num_classes)]
    labels = generator.integers(0, num_classes, num_photos)
    scores = generator.random((num_photos, num_classes)) ** 4
    scores[np.arange(num_photos), labels] += 0.5
    probabilities = (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32)
    return Report(
        title="Run exp_001: test photos of v2",
        facts=[("Run", "exp_001"), ("Seed", "17")],
        split="test",
        model=("unfrozen", 1),
        metrics=classification_metrics(labels, probabilities, names),
        calibration="Probabilities are calibrated: temperature 1.2.",
        val_coverage=coverage_curve(probabilities.max(axis=1) ** 0.5, probabilities.argmax(axis=1) == labels),
        class_names=names,
        confusion=confusion_matrix(labels, probabilities.argmax(axis=1), num_classes),
        history={
            "frozen": [make_epoch(1, 0.2), make_epoch(2, 0.4)],
            "unfrozen": [make_epoch(1, 0.7), make_epoch(2, 0.6)],
        },
        masking=[
            MaskingSample(caption=f"sample {i}", before=make_photo(i), after=make_photo(i + 500))
            for i in range(num_masked)
        ],
        mistakes=[
            Mistake(photo=make_photo(i + 100), key=f"a/{i}.jpg", label="right", predicted="off", confidence=0.9)
            for i in range(num_mistakes)
        ],
        quarantined={"v1 (ingest)": {"truncated": 3, "too_small": 11}, "v2 (masking)": {}},
        dataset_pages=[("v1", "../../../datasets/v1/report.html")],
        missing_source=None,
    )


def make_masked_photo(
    height: int = CELL_HEIGHT, width: int = CELL_WIDTH, seed: int = 0, **changes: object
) -> MaskedPhoto:
    """Return a noisy photo masked to the rectangle in its centre, half as wide and half as high."""
    photo = np.random.default_rng(seed).integers(60, 200, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), bool)
    mask[height // 4 : height * 3 // 4, width // 4 : width * 3 // 4] = True
    values = {
        "key": f"photos/{seed}.jpg",
        "photo": photo,
        "box": np.array([width / 4, height / 4, width * 3 / 4, height * 3 / 4], np.float32),
        "mask": mask,
        "result": photo,
        "outcome": "vehicle",
        "vehicle_class": "car",
        "score": 0.98,
        "notes": ["several vehicles"],
    }
    return MaskedPhoto(**{**values, **changes})


def make_photo_without_vehicle(**changes: object) -> MaskedPhoto:
    """Return a photo in which the detector found no vehicle."""
    return make_masked_photo(outcome="no_vehicle", vehicle_class=None, score=None, box=None, mask=None, **changes)


def make_masking_report(num_photos: int = 2, **changes: object) -> MaskingReport:
    """Return a masking report on random measures."""
    generator = np.random.default_rng(3)
    values = {
        "title": "Dataset v2: masks of v1",
        "facts": [("Dataset", "v2"), ("Detector", "mask_rcnn_r50_fpn")],
        "outcomes": {"vehicle": 180, "no_vehicle": 20},
        "quarantined": {"doubtful_mask": 7},
        "flags": {"several_vehicles": 12, "touches_border": 5},
        "classes": {"car": 150, "truck": 30},
        "scores": histogram(1 - generator.random(180) ** 3 * 0.5),
        "areas": histogram(generator.random(180)),
        "stabilities": histogram(1 - generator.random(180) ** 2 * 0.4),
        "mean_iou": 0.9137,
        "ious": histogram(1 - generator.random(60) * 0.3),
        "doubtful": [make_photo_without_vehicle(), *(make_masked_photo(seed=i) for i in range(num_photos - 1))],
        "sheet": [make_masked_photo(seed=i + 50) for i in range(num_photos)],
    }
    return MaskingReport(**{**values, **changes})


def make_dataset_report(**changes: object) -> DatasetReport:
    """Return the report of a dataset of two classes."""
    values = {
        "title": "Dataset v1",
        "facts": [("Photos", "s3://bucket/photos"), ("Labels", "one folder per class")],
        "classes": {"Ardo Coupe": {"train": 30, "val": 8, "test": 12}, "Belmar Wagon": {"train": 1200, "val": 300}},
        "sides": {"up to 128 px": 50, "257 to 512 px": 1500},
        "samples": {
            name: [Sample(f"{name}/{i}.jpg", make_photo(i)) for i in range(4)]
            for name in ("Ardo Coupe", "Belmar Wagon")
        },
        "reasons": {"truncated": 3, "no_label": 1},
        "rejected": [
            Rejected("train/Ardo Coupe/5.jpg", "truncated", "the end of the JPEG file is missing", None),
            Rejected("a/long/folder/" * 6 + "9.jpg", "no_label", "", make_photo(9)),
        ],
    }
    return DatasetReport(**{**values, **changes})


def make_shown_photo(seed: int = 0, **changes: object) -> ShownPhoto:
    """Return a classified photo with its cutout."""
    names = ["Ardo Coupe", "Belmar Wagon", "Corvo Van", "Delta Pickup", "Elan Roadster"]
    first = 0.3 + (seed * 37 % 70) / 100
    top = [(names[(seed + i) % 5], first if i == 0 else (1 - first) / 2**i) for i in range(5)]
    photo, cutout = make_photo(seed), make_photo(seed + 900)
    values = {"key": f"new/{seed:04d}.jpg", "photo": photo, "cutout": cutout, "top": top}
    return ShownPhoto(**{**values, "rejected": first < 0.5, "detection": "car, score 0.98", **changes})


def make_prediction_report(num_photos: int = 6, **changes: object) -> PredictionReport:
    """Return the page of predictions of a folder."""
    shown = [make_shown_photo(seed) for seed in range(num_photos)]
    classes = [PredictedClass("Ardo Coupe", num_photos - 2, 1, 0.8), PredictedClass("Belmar Wagon", 2, 1, 0.6)]
    values = {
        "title": "Run first: predictions monday",
        "is_calibrated": True,
        "facts": [("Run", "first"), ("Threshold", "0.5")],
        "threshold": 0.5,
        "report_link": "../../report/report.html#threshold",
        "classes": classes,
        "shown": sorted(shown, key=lambda photo: photo.top[0][1]),
        "others": "2 (notes.txt, Thumbs.db)",
        "reasons": {"truncated": 1, "empty": 1},
        "failed": [FailedPhoto("a.jpg", "truncated", "the end is missing"), FailedPhoto("b.jpg", "empty", "")],
    }
    return PredictionReport(**{**values, **changes})


@cache
def comparison_page() -> str:
    """Return the page that compares the sixteen example experiments."""
    return render_comparison(sixteen())


def row_of(page: str, section_name: str, run: str) -> list[str]:
    """Return the text of the cells of a run's row in a section's first table."""
    rows = re.findall(r"<tr.*?</tr>", section(page, section_name), re.S)
    row = next(row for row in rows if re.search(rf">{run}<", row))
    cells = re.findall(r"<t[hd].*?</t[hd]>", row, re.S)
    return [visible_text(cell).replace("\u00a0", " ").strip() for cell in cells]
