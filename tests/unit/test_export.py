"""Exports: logits equal to the network's, metadata, and publishing of all files or none."""

import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load
from torchvision.models import resnet50

from carclass import load_run, storage
from carclass.config.schema import ModelSettings, TrainSettings
from carclass.data import dataset, photo, publishing
from carclass.data.photo import decode_photos
from carclass.errors import UserError
from carclass.evaluation.calibration import fit_calibration
from carclass.models import architectures, preprocessing
from carclass.models.preprocessing import to_network_input
from carclass.runs.calibration_record import write_calibration
from carclass.runs.export import EXTRA, FORMATS, OUTPUTS, TOLERANCE, export_run, to_safetensors
from carclass.runs.model_description import ModelDescription
from carclass.runs.predictor import PhotoClassifier
from carclass.runs.preprocessing_record import Preprocessing, record_preprocessing
from carclass.runs.run import Run, begin_run
from carclass.runs.saved_model import publish_model, read_model
from carclass.sample.background import SCENES
from carclass.sample.draw import draw_photo
from carclass.sample.models import MODELS
from carclass.training import pretrained
from tests.helpers import inventories

HOUSE = Path(__file__).parents[2]
CLASSES = [*(f"{car.name} é" for car in MODELS)]
MODEL = ModelSettings(architecture="resnet26-narrow", image_size=96)
READING = {"min_side": 16, "max_pixels": 10_000_000, "max_side": 640, "quality": 90}
TEMPERATURE = 1.7
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    """Return encoded photos of drawn cars."""
    return [
        photo.encode(draw_photo((7, i), car, scene)[0])
        for i, (car, scene) in enumerate(zip(MODELS, SCENES, strict=True))
    ]


def begin(root: Path, photos: list[bytes]) -> Run:
    """Begin a run on a dataset of the photos."""
    uri, settings = dataset.dataset_uri(str(root), "v2"), READING
    same = {"split": "train", "width": 1, "height": 1}
    rows = [
        {"image_id": f"{i:064}", "key": f"{i}.jpg", "label": name, "image": data, **same}
        for i, (name, data) in enumerate(zip(CLASSES, photos, strict=True))
    ]
    publishing.write_part(uri, "parts", pa.Table.from_pylist(rows, dataset.ROW), settings)
    keys = [row["key"] for row in rows]
    source = publishing.publish_manifest(
        inventories.complete_dataset(uri, keys, settings=settings, classes=CLASSES, facts={"kind": "photos"})
    )
    settings = TrainSettings(name="first", parent="sample", model=MODEL)
    run = begin_run(Run(str(root), settings), source, "0" * 64)
    record_preprocessing(run, source)
    return run


def make_net(seed: int = 0) -> torch.nn.Module:
    """Return the sample's backbone with a random classifier, with logits of up to about 10."""
    torch.manual_seed(seed)
    net = architectures.build(MODEL, len(CLASSES))
    pretrained.load_backbone(net, TrainSettings(name="any", parent="sample", model=MODEL))
    torch.nn.init.normal_(net.get_submodule("fc.1").weight, std=0.5)
    return net.eval()


def finish(
    run: Run,
    net: torch.nn.Module,
    temperature: float | None = TEMPERATURE,
    stage: str = "unfrozen",
    val_accuracy: float = 0.5,
) -> None:
    facts = {"run": "first", "stage": stage, "epoch": 3, "val_accuracy": val_accuracy, "classes": CLASSES}
    uri = run.model_uri(stage)
    publish_model(uri, net, {**facts, "model": MODEL.model_dump(), "precision": "bf16"})
    if temperature is not None:
        calibrated = fit_calibration(np.array([0, 1]), np.full((2, 2), 0.5), read_model(uri)[1]["sha256"])
        write_calibration(uri, dataclasses.replace(calibrated, temperature=temperature))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, photos: list[bytes]) -> Path:
    """Export a finished run."""
    root = tmp_path_factory.mktemp("root")
    finish(begin(root, photos), make_net())
    return Path(export_run(str(root), "first"))


@pytest.fixture(scope="module")
def pixels(photos: list[bytes]) -> np.ndarray:
    """Return the decoded photos, uint8 (N,96,96,3)."""
    return decode_photos(photos, MODEL.image_size)


@pytest.fixture(scope="module")
def expected(pixels: np.ndarray) -> dict[str, torch.Tensor]:
    """Return the outputs of the network as training and evaluation run it, in float32."""
    with torch.inference_mode():
        logits = make_net()(to_network_input(pixels, CPU))
    return {"logits": logits, "probabilities": (logits / TEMPERATURE).softmax(1)}


def as_input(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


# Logits


def test_logits_differ_between_photos_by_more_than_the_tolerance(expected: dict[str, torch.Tensor]):
    assert expected["logits"].std(0).min() > 100 * TOLERANCE


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("count", [1, 3, 10])
def test_every_file_returns_the_outputs_of_the_network_for_any_number_of_photos(
    folder: Path, pixels: np.ndarray, expected: dict[str, torch.Tensor], name: str, count: int
):
    with torch.inference_mode():
        outputs = FORMATS[name].read((folder / name).read_bytes())(as_input(pixels[:count]))
    for output in OUTPUTS:
        torch.testing.assert_close(outputs[output], expected[output][:count], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("count", [1, 3, 10])
def test_onnxruntime_returns_the_outputs_of_the_network(
    folder: Path, pixels: np.ndarray, expected: dict[str, torch.Tensor], count: int
):
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    outputs = session.run(OUTPUTS, {"photos": as_input(pixels[:count]).numpy()})
    for name, output in zip(OUTPUTS, outputs, strict=True):
        np.testing.assert_allclose(output, expected[name][:count], atol=TOLERANCE, rtol=0)


def test_all_tensors_of_a_pt2_file_move_to_another_device(folder: Path, pixels: np.ndarray):
    program = torch.export.load(folder / "model.pt2").module().to("meta")
    assert {output.device.type for output in program(as_input(pixels).to("meta")).values()} == {"meta"}


@pytest.mark.slow
def test_torchvisions_resnet50_loads_the_safetensors():
    settings = ModelSettings(image_size=64)
    classifier = PhotoClassifier(architectures.build(settings, len(CLASSES)))
    data = to_safetensors(classifier, describe(settings))
    torchvision_net = resnet50(num_classes=len(CLASSES))
    torchvision_net.load_state_dict(load(data))
    inputs = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(torchvision_net.eval()(inputs), classifier.net(inputs))


# Descriptions


def describe(model: ModelSettings, mask: dict[str, Any] | None = None) -> ModelDescription:
    facts = {"run": "r", "stage": "frozen", "epoch": 1, "val_accuracy": 0.5, "sha256": "0", "model": model.model_dump()}
    statistics = [*map(list, preprocessing.IMAGENET)]
    steps = Preprocessing(READING, mask, "s3://bucket/weights", "e" * 64, model.image_size, *statistics, CLASSES)
    return ModelDescription(facts, steps, TEMPERATURE)


def read_description(path: Path) -> dict[str, str]:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return dict(file.metadata())
    if path.suffix == ".onnx":
        return {item.key: item.value for item in onnx.load(path).metadata_props}
    extra = {EXTRA: ""}
    torch.export.load(io.BytesIO(path.read_bytes()), extra_files=extra)
    return dict(json.loads(extra[EXTRA]))


@pytest.mark.parametrize("name", FORMATS)
def test_every_file_has_classes_and_preprocessing_in_its_metadata(folder: Path, name: str):
    metadata = read_description(folder / name)
    assert json.loads(metadata["classes"]) == CLASSES
    assert (metadata["image_size"], metadata["layout"]) == ("96", "NCHW, RGB")
    assert "bilinear, antialiased" in metadata["resize"]
    assert (json.loads(metadata["mean"]), json.loads(metadata["std"])) == tuple(map(list, preprocessing.IMAGENET))
    assert metadata["input"].startswith("float32" if name == "model.safetensors" else "uint8 (N,3,96,96) RGB")
    assert float(metadata["temperature"]) == TEMPERATURE
    assert metadata["masking"] == "none"
    steps = json.loads(metadata["preprocessing"])
    assert (steps["reading"], steps["mask"], steps["temperature"]) == (READING, None, TEMPERATURE)


def test_the_description_of_a_model_of_masked_photos_says_so_without_places():
    detector = {"model": "/home/user/detector.yaml", "weights": "f" * 64, "score_threshold": 0.4}
    cutout = {"mode": "crop+mask", "fill": [1, 2, 3], "margin": 0.05}
    metadata = describe(MODEL, {"detector": detector, "cutout": cutout}).metadata(normalises=True)
    assert metadata["masking"].startswith("required before resizing: crop+mask of the vehicle found by detector.yaml")
    assert all(part in metadata["masking"] for part in ("f" * 64, "margin 0.05", "background [1, 2, 3]"))
    assert json.loads(metadata["preprocessing"])["mask"]["detector"]["score_threshold"] == 0.4
    assert [value for value in metadata.values() if "/home/user" in value or "s3://bucket" in value] == []


def test_input_and_output_of_the_onnx_model_have_names(folder: Path):
    graph = onnx.load(folder / "model.onnx").graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {"photos": ["N", 3, 96, 96], "logits": ["N", 10], "probabilities": ["N", 10]}


def test_batch_normalisation_is_folded_into_the_onnx_convolutions(folder: Path):
    kinds = {node.op_type for node in onnx.load(folder / "model.onnx").graph.node}
    assert kinds == {"Cast", "Sub", "Div", "Conv", "Relu", "MaxPool", "Add", "ReduceMean", "Reshape", "Gemm", "Softmax"}


@pytest.mark.parametrize("name", FORMATS)
def test_no_file_has_a_path_of_this_machine(folder: Path, name: str):
    data = (folder / name).read_bytes()
    assert not [path for path in (HOUSE, folder, Path(torch.__file__).parent) if str(path).encode() in data]


@pytest.mark.parametrize("kind", ["rotated", "16-bit", "transparent"])
def test_the_documented_example_reads_photos_as_the_jobs_do(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    page = (HOUSE / "docs" / "outputs.md").read_text(encoding="utf-8")
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "onnxruntime" in block]
    shutil.copy(folder / "model.onnx", tmp_path)
    write_unusual_photo(tmp_path / "car.jpg", kind)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example, names)
    (row,) = load_run(folder.parent).predict("car.jpg").to_pylist()
    expected = dict(zip(row["top5"], row["top5_probabilities"], strict=True))
    actual = dict(zip(CLASSES, names["probabilities"][0].tolist(), strict=True))
    assert {name: actual[name] for name in expected} == pytest.approx(expected, abs=0.05)


def write_unusual_photo(path: Path, kind: str) -> None:
    """Write a drawn photo as a file that naive readers misread."""
    image, exif = Image.fromarray(draw_photo((3, 1), MODELS[1], next(iter(SCENES)))[0]), Image.Exif()
    if kind == "rotated":
        exif[0x0112] = 6
        image.save(path, "PNG", exif=exif)
    elif kind == "16-bit":
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256).save(path, "PNG")
    else:
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(path, "PNG")


# Publishing


def test_the_index_has_hashes_and_differences(folder: Path):
    index = json.loads((folder / "export.json").read_text())
    for name, entry in index["files"].items():
        assert entry["sha256"] == storage.sha256((folder / name).read_bytes())
        assert 0 <= entry["largest_difference"] <= index["tolerance"]
    assert set(index["files"]) == set(FORMATS)


def test_a_second_export_writes_nothing(folder: Path, files_below):
    before = files_below(str(folder))
    assert export_run(str(folder.parents[2]), "first") == str(folder)
    assert files_below(str(folder)) == before


@pytest.fixture
def only_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Export no other file: tracing the network for the others takes ten seconds."""
    for name in [*FORMATS]:
        if name != "model.safetensors":
            monkeypatch.delitem(FORMATS, name)


@pytest.mark.slow
def test_a_retrained_run_is_exported_again(tmp_path: Path, photos: list[bytes], only_safetensors: None):
    run = begin(tmp_path, photos)
    finish(run, make_net())
    storage.write_bytes(f"{run.uri}/export/export.json", json.dumps({"model_sha256": "0" * 64, "files": {}}).encode())
    folder = Path(export_run(str(tmp_path), "first"))
    assert {path.name for path in folder.iterdir()} == {*FORMATS, "export.json"}


@pytest.mark.slow
def test_the_model_of_the_run_or_of_a_named_stage_is_exported(
    tmp_path: Path, photos: list[bytes], only_safetensors: None
):
    run = begin(tmp_path, photos)
    finish(run, make_net(), stage="frozen", val_accuracy=0.6)
    finish(run, make_net(1), stage="unfrozen", val_accuracy=0.5)
    exports = {stage: Path(export_run(str(tmp_path), "first", stage)) for stage in (None, "unfrozen")}
    assert {stage: folder.name for stage, folder in exports.items()} == {None: "export", "unfrozen": "export-unfrozen"}
    stages = [read_description(folder / "model.safetensors")["stage"] for folder in exports.values()]
    assert stages == ["frozen", "unfrozen"]


@pytest.mark.slow
def test_nothing_is_published_if_a_file_differs_from_the_network(
    tmp_path: Path, photos: list[bytes], monkeypatch: pytest.MonkeyPatch, only_safetensors: None
):
    run = begin(tmp_path, photos)
    finish(run, make_net())
    wrong = to_safetensors(PhotoClassifier(make_net(seed=1)), describe(MODEL))
    monkeypatch.setitem(FORMATS, "model.safetensors", FORMATS["model.safetensors"]._replace(write=lambda *_: wrong))
    with pytest.raises(AssertionError, match=r"model.safetensors of run first differs by .* nothing is published"):
        export_run(str(tmp_path), "first")
    assert storage.list_files(f"{run.uri}/export") == []


@pytest.mark.slow
def test_a_run_is_exported_without_its_dataset(tmp_path: Path, photos: list[bytes], only_safetensors: None):
    run = begin(tmp_path, photos)
    finish(run, make_net())
    shutil.rmtree(tmp_path / "datasets")
    assert json.loads(storage.read_bytes(f"{export_run(str(tmp_path), 'first')}/export.json"))["files"]


@pytest.mark.slow
def test_a_run_is_exported_again_after_another_calibration(tmp_path: Path, photos: list[bytes], only_safetensors: None):
    run = begin(tmp_path, photos)
    for temperature in (1.5, 2.5):
        finish(run, make_net(), temperature)
        folder = Path(export_run(str(tmp_path), "first"))
        assert float(read_description(folder / "model.safetensors")["temperature"]) == temperature


@pytest.mark.slow
def test_an_export_of_a_former_format_is_replaced(tmp_path: Path, photos: list[bytes], only_safetensors: None):
    run = begin(tmp_path, photos)
    finish(run, make_net())
    former = {"model_sha256": read_model(run.model_uri("unfrozen"))[1]["sha256"], "tolerance": TOLERANCE, "files": {}}
    storage.write_bytes(f"{run.uri}/export/export.json", json.dumps(former).encode())
    assert (Path(export_run(str(tmp_path), "first")) / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-1] + b"?")])
def test_a_missing_or_damaged_file_is_exported_again(
    tmp_path: Path, photos: list[bytes], only_safetensors: None, damage: Callable[[Path], object]
):
    finish(begin(tmp_path, photos), make_net())
    file = Path(export_run(str(tmp_path), "first"), "model.safetensors")
    damage(file)
    files = json.loads(storage.read_bytes(f"{export_run(str(tmp_path), 'first')}/export.json"))["files"]
    assert storage.sha256(file.read_bytes()) == files[file.name]["sha256"]


# Errors


def test_a_run_that_is_not_calibrated_is_an_error(tmp_path: Path, photos: list[bytes]):
    finish(begin(tmp_path, photos), make_net(), temperature=None)
    with pytest.raises(UserError, match=r"`first` \(stage unfrozen\) is not calibrated yet.* FILE --run first"):
        export_run(str(tmp_path), "first")


def test_a_missing_run_is_an_error_that_lists_the_existing_runs(folder: Path):
    with pytest.raises(UserError, match=r"no run `second` in .*\. Available: first\."):
        export_run(str(folder.parents[2]), "second")


def test_an_unfinished_stage_is_an_error(tmp_path: Path, photos: list[bytes]):
    begin(tmp_path, photos)
    with pytest.raises(UserError, match=r"unfrozen/best.safetensors: the run has not finished this stage"):
        export_run(str(tmp_path), "first")


@pytest.mark.slow  # 6 s
@pytest.mark.parametrize("arguments", [("--run", "first", "--root", "{root}"), ("--config", "{root}/my.yml")])
def test_the_job_prints_the_uris_of_the_files(folder: Path, arguments: tuple[str, ...]):
    root = folder.parents[2]
    (root / "my.yml").write_text("root: .\ntrain: {name: first}\n")
    command = [sys.executable, str(HOUSE / "jobs" / "export.py"), *(text.format(root=root) for text in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"{folder}/{name}" in done.stdout for name in FORMATS)
