"""Exports: every file gives the network's logits, says how to use it, and is there whole or not at all."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load
from torchvision.models import resnet50

from carclass import storage
from carclass.config.schema import ModelSettings, TrainSettings
from carclass.data import dataset, photo, publishing
from carclass.errors import UserError
from carclass.models import preprocessing, resnet
from carclass.models.preprocessing import decode_photos, to_network_input
from carclass.runs.export import EXTRA, FORMATS, TOLERANCE, export_run, to_safetensors
from carclass.runs.predictor import PhotoClassifier
from carclass.runs.run import Run, begin_run
from carclass.runs.saved_model import publish_model
from carclass.sample.background import SCENES
from carclass.sample.draw import draw_photo
from carclass.sample.models import MODELS
from carclass.training import pretrained
from tests.helpers import inventories

HOUSE = Path(__file__).parents[2]
CLASSES = [*(f"{car.name} é" for car in MODELS)]
MODEL = ModelSettings(architecture="resnet26-narrow", image_size=96)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    """Drawn cars, encoded."""
    return [
        photo.encode(draw_photo((7, i), car, scene)[0])
        for i, (car, scene) in enumerate(zip(MODELS, SCENES, strict=True))
    ]


def begin(root: Path, photos: list[bytes]) -> Run:
    """A run on a dataset of the photos, with no stage finished yet."""
    uri, settings = dataset.dataset_uri(str(root), "v2"), {"dataset": "v2"}
    rows = [
        {
            "image_id": f"{i:064}",
            "key": f"{i}.jpg",
            "label": name,
            "split": "train",
            "width": 1,
            "height": 1,
            "image": data,
        }
        for i, (name, data) in enumerate(zip(CLASSES, photos, strict=True))
    ]
    publishing.write_part(uri, "parts", pa.Table.from_pylist(rows, dataset.ROW), settings)
    keys = [row["key"] for row in rows]
    source = publishing.publish_manifest(inventories.draft(uri, keys, settings=settings, classes=CLASSES, facts={}))
    settings = TrainSettings(name="first", parent="sample", model=MODEL)
    return begin_run(Run(str(root), settings), source, "0" * 64)


def make_net(seed: int = 0) -> torch.nn.Module:
    """The sample's backbone under a classifier whose logits reach about 10."""
    torch.manual_seed(seed)
    net = resnet.build(MODEL, len(CLASSES))
    pretrained.load_backbone(net, TrainSettings(name="any", parent="sample", model=MODEL))
    torch.nn.init.normal_(net.get_submodule("fc.1").weight, std=0.5)
    return net.eval()


def finish(run: Run, net: torch.nn.Module) -> None:
    facts = {"run": "first", "stage": "unfrozen", "epoch": 3, "val_accuracy": 0.5, "classes": CLASSES}
    publish_model(run.model_uri("unfrozen"), net, {**facts, "model": MODEL.model_dump(), "precision": "bf16"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, photos: list[bytes]) -> Path:
    """The export of a finished run."""
    root = tmp_path_factory.mktemp("root")
    finish(begin(root, photos), make_net())
    return Path(export_run(str(root), "first"))


@pytest.fixture(scope="module")
def pixels(photos: list[bytes]) -> np.ndarray:
    """uint8 (N,96,96,3)."""
    return decode_photos(photos, MODEL.image_size)


@pytest.fixture(scope="module")
def expected(pixels: np.ndarray) -> torch.Tensor:
    """The logits of the network as training and evaluation run it, in float32."""
    with torch.inference_mode():
        return make_net()(to_network_input(pixels, CPU))


def as_input(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


# Logits


def test_the_networks_logits_differ_from_photo_to_photo(expected: torch.Tensor):
    assert expected.std(0).min() > 100 * TOLERANCE


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("count", [1, 3, 10])
def test_every_file_gives_the_networks_logits_for_any_number_of_photos(
    folder: Path, pixels: np.ndarray, expected: torch.Tensor, name: str, count: int
):
    with torch.inference_mode():
        found = FORMATS[name].read((folder / name).read_bytes())(as_input(pixels[:count]))
    torch.testing.assert_close(found, expected[:count], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("count", [1, 3, 10])
def test_onnxruntime_gives_the_networks_logits(folder: Path, pixels: np.ndarray, expected: torch.Tensor, count: int):
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"photos": as_input(pixels[:count]).numpy()})
    np.testing.assert_allclose(found, expected[:count], atol=TOLERANCE, rtol=0)


def test_a_pt2_file_is_moved_to_another_device_as_a_whole(folder: Path, pixels: np.ndarray):
    program = torch.export.load(folder / "model.pt2").module().to("meta")
    assert program(as_input(pixels).to("meta")).device.type == "meta"


def test_torchvisions_resnet50_loads_the_safetensors():
    settings = ModelSettings(image_size=64)
    facts = {"run": "r", "stage": "frozen", "epoch": 1, "val_accuracy": 0.5, "classes": CLASSES, "sha256": "0"}
    ours = PhotoClassifier(resnet.build(settings, len(CLASSES)))
    data = to_safetensors(ours, {**facts, "model": settings.model_dump()})
    theirs = resnet50(num_classes=len(CLASSES))
    theirs.load_state_dict(load(data))
    inputs = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(theirs.eval()(inputs), ours.net(inputs))


# Descriptions


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
def test_every_file_says_labels_and_preprocessing(folder: Path, name: str):
    said = read_description(folder / name)
    assert json.loads(said["classes"]) == CLASSES
    assert (said["image_size"], said["layout"]) == ("96", "NCHW, RGB")
    assert "bilinear, antialiased" in said["resize"]
    assert (json.loads(said["mean"]), json.loads(said["std"])) == ([*preprocessing.MEAN], [*preprocessing.STD])
    assert said["input"].startswith("float32" if name == "model.safetensors" else "uint8 (N,3,96,96) RGB")


def test_an_onnx_model_names_its_input_and_output(folder: Path):
    graph = onnx.load(folder / "model.onnx").graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {"photos": ["N", 3, 96, 96], "logits": ["N", 10]}


def test_batch_normalisation_is_folded_into_the_onnx_convolutions_for_good(folder: Path):
    kinds = {node.op_type for node in onnx.load(folder / "model.onnx").graph.node}
    assert kinds == {"Cast", "Sub", "Div", "Conv", "Relu", "MaxPool", "Add", "ReduceMean", "Reshape", "Gemm"}


@pytest.mark.parametrize("name", FORMATS)
def test_no_file_holds_a_path_of_this_machine(folder: Path, name: str):
    data = (folder / name).read_bytes()
    assert not [place for place in (HOUSE, folder, Path(torch.__file__).parent) if str(place).encode() in data]


# Publishing


def test_the_index_has_hashes_and_differences(folder: Path):
    index = json.loads((folder / "export.json").read_text())
    for name, said in index["files"].items():
        assert said["sha256"] == storage.sha256((folder / name).read_bytes())
        assert 0 <= said["largest_difference"] <= index["tolerance"]
    assert set(index["files"]) == set(FORMATS)


def test_a_second_run_writes_nothing(folder: Path, files_below):
    before = files_below(str(folder))
    assert export_run(str(folder.parents[2]), "first") == str(folder)
    assert files_below(str(folder)) == before


def test_a_run_trained_again_is_exported_again(tmp_path: Path, photos: list[bytes], pixels: np.ndarray):
    run = begin(tmp_path, photos)
    finish(run, make_net())
    storage.write_bytes(f"{run.uri}/export/export.json", json.dumps({"model_sha256": "0" * 64}).encode())
    folder = Path(export_run(str(tmp_path), "first"))
    assert {path.name for path in folder.iterdir()} == {*FORMATS, "export.json"}


def test_a_file_that_disagrees_is_not_published(tmp_path: Path, photos: list[bytes], monkeypatch: pytest.MonkeyPatch):
    run = begin(tmp_path, photos)
    finish(run, make_net())
    wrong = to_safetensors(
        PhotoClassifier(make_net(seed=1)), json.loads(storage.read_bytes(f"{run.model_uri('unfrozen')}.json"))
    )
    monkeypatch.setitem(FORMATS, "model.safetensors", FORMATS["model.safetensors"]._replace(write=lambda *_: wrong))
    with pytest.raises(AssertionError, match=r"model.safetensors of run first differs by .* nothing is published"):
        export_run(str(tmp_path), "first")
    assert not Path(run.uri, "export").exists()


# Mistakes


def test_a_run_that_is_not_there_is_refused_with_those_that_are(folder: Path):
    with pytest.raises(UserError, match=r"no run `second` in .*\. Available: first\."):
        export_run(str(folder.parents[2]), "second")


def test_a_stage_that_is_not_finished_is_refused(tmp_path: Path, photos: list[bytes]):
    begin(tmp_path, photos)
    with pytest.raises(UserError, match=r"unfrozen/best.safetensors: the run has not finished this stage"):
        export_run(str(tmp_path), "first")


def test_the_job_says_where_the_files_are(folder: Path):
    command = [sys.executable, str(HOUSE / "jobs" / "export.py"), "--run", "first", "--root", str(folder.parents[2])]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"{folder}/{name}" in done.stdout for name in FORMATS)


def test_the_job_answers_a_mistake_in_one_paragraph(tmp_path: Path):
    command = [sys.executable, str(HOUSE / "jobs" / "export.py"), "--run", "first", "--root", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no run `first`" in done.stderr
