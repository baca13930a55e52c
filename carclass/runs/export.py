"""A run's best network as files for other programs, each checked against the network before it is published.

<run>/export/model.safetensors  weights under torchvision's names
<run>/export/model.onnx         for ONNX runtimes
<run>/export/model.pt2          for torch.export.load
<run>/export/export.json        each file's sha256 and how far it is from the network: written last

model.onnx and model.pt2 take uint8 (N,3,S,S) RGB, which is what a decoder gives, for any N, and give float32 (N,C)
logits: normalisation is inside. Labels and preprocessing are in the metadata of every file, see describe().
"""

import io
import json
import logging
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import onnx
import torch
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load, save
from torch import Tensor

from carclass import storage
from carclass.config.schema import ModelSettings
from carclass.data import dataset
from carclass.models import preprocessing, resnet
from carclass.models.preprocessing import decode_photos
from carclass.runs.predictor import PhotoClassifier
from carclass.runs.run import find_run
from carclass.runs.saved_model import read_model

log = logging.getLogger(__name__)
TOLERANCE = 1e-3
"""Largest difference of a logit that a published file may show: it moves no probability by more than 0.0005."""
NUM_PHOTOS = 4
"""Photos on which the files are compared, all at once and one alone."""
EXTRA = "carclass.json"
"""Name of the description within a .pt2 file."""

Classify = Callable[[Tensor], Tensor]
"""uint8 (N,3,S,S) RGB → float32 (N,C) logits."""


class Format(NamedTuple):
    """A kind of file: how it is made of a network and its facts (see checkpoint), and how it is run from its bytes."""

    write: Callable[[PhotoClassifier, dict[str, Any]], bytes]
    read: Callable[[bytes], Classify]


def export_run(root: str, name: str) -> str:
    """Writes `<run>/export/` unless it is there, and returns its URI.

    UserError when there is no such run, its last stage is not finished, or its dataset, whose photos the files are
    compared on, is gone. AssertionError when a file differs from the network by more than TOLERANCE; none is
    published then.
    """
    this = find_run(root, name)
    state, facts = read_model(this.model_uri(this.stages[-1]))
    uri = storage.join(this.uri, "export")
    if _exported_from(uri) == facts["sha256"]:
        log.info("export: %s is finished, nothing to do", uri)
        return uri
    settings = ModelSettings.model_validate(facts["model"])
    net = resnet.build(settings, len(facts["classes"]))
    net.load_state_dict(state)
    net.eval()
    photos = _sample_photos(dataset.load_dataset(root, this.settings.dataset), settings.image_size)
    files = {file: kind.write(PhotoClassifier(net), facts) for file, kind in FORMATS.items()}
    index: dict[str, Any] = {"model_sha256": facts["sha256"], "tolerance": TOLERANCE, "files": {}}
    for file, data in files.items():
        found = largest_difference(FORMATS[file].read(data), lambda batch: net(preprocessing.normalise(batch)), photos)
        assert found <= TOLERANCE, f"{file} of run {name} differs by {found:.2g} from the network: nothing is published"
        log.info("export: %s, %.1f MB, logits differ by %.1g at most", file, len(data) / 1e6, found)
        index["files"][file] = {"sha256": storage.sha256(data), "largest_difference": found}
    for file, data in files.items():
        storage.write_bytes(storage.join(uri, file), data)
    storage.write_bytes(storage.join(uri, "export.json"), json.dumps(index, indent=1).encode())
    return uri


def _exported_from(uri: str) -> str | None:
    """sha256 of the model that a finished export was made from."""
    try:
        return str(json.loads(storage.read_bytes(storage.join(uri, "export.json")))["model_sha256"])
    except FileNotFoundError:
        return None


def _sample_photos(source: dataset.Dataset, size: int) -> Tensor:
    """uint8 (N,3,S,S): some photos of a dataset."""
    images = dataset.read_part(source.part_uris[0], ["image"])["image"][:NUM_PHOTOS].to_pylist()
    return torch.from_numpy(decode_photos(images, size)).permute(0, 3, 1, 2).contiguous()


@torch.inference_mode()
def largest_difference(one: Classify, other: Classify, photos: Tensor) -> float:
    """Between the logits that two give to photos, to all of them at once and to the first alone."""
    return max(float((one(batch) - other(batch)).abs().max()) for batch in (photos, photos[:1]))


def describe_model(facts: dict[str, Any], *, normalises: bool) -> dict[str, str]:
    """What someone needs to use a file, as its metadata says it; lists are JSON.

    facts: what checkpoint.publish_model recorded; normalises: whether the file takes photos as they are.
    """
    size = facts["model"]["image_size"]
    inputs = f"uint8 (N,3,{size},{size}) RGB, 0 to 255, any N; mean and std are applied inside"
    plain = f"float32 (N,3,{size},{size}) RGB, (photo / 255 - mean) / std"
    return {
        "classes": json.dumps(facts["classes"], ensure_ascii=False),
        "image_size": str(size),
        "resize": "to image_size x image_size whatever the shape; bilinear, antialiased, rounded to uint8",
        "input": inputs if normalises else plain,
        "layout": "NCHW, RGB",
        "mean": json.dumps(preprocessing.MEAN),
        "std": json.dumps(preprocessing.STD),
        "output": "float32 (N,C) logits in the order of classes; their softmax are probabilities",
        "model": json.dumps(facts["model"]),
        **{key: str(facts[key]) for key in ("run", "stage", "epoch", "val_accuracy")},
        "model_sha256": facts["sha256"],
    }


def to_safetensors(classify: PhotoClassifier, facts: dict[str, Any]) -> bytes:
    """The network's tensors, named as torchvision's ResNet names them (`fc.weight`), which can load them."""
    state = {name.replace("fc.1.", "fc."): value.contiguous() for name, value in classify.net.state_dict().items()}
    return save(state, describe_model(facts, normalises=False))


def from_safetensors(data: bytes) -> Classify:
    """The classifier that a .safetensors file describes."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    net = resnet.build(ModelSettings.model_validate_json(header["model"]), len(json.loads(header["classes"])))
    net.load_state_dict({name.replace("fc.", "fc.1."): value for name, value in load(data).items()})
    return PhotoClassifier(net)


def _trace(classify: PhotoClassifier, facts: dict[str, Any]) -> torch.export.ExportedProgram:
    """The computation, for any number of photos."""
    size = facts["model"]["image_size"]
    photos = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    traced = torch.export.export(classify, (photos,), dynamic_shapes=({0: torch.export.Dim("N", min=1)},))
    for node in traced.graph.nodes:
        node.meta.pop("stack_trace", None)  # else the files would hold paths of this machine
    return traced


def to_pt2(classify: PhotoClassifier, facts: dict[str, Any]) -> bytes:
    """An archive of torch.export; the description is its extra file EXTRA."""
    file = io.BytesIO()
    extra = {EXTRA: json.dumps(describe_model(facts, normalises=True), ensure_ascii=False)}
    torch.export.save(_trace(classify, facts), file, extra_files=extra)
    return file.getvalue()


def from_pt2(data: bytes) -> Classify:
    """The program in a .pt2 file."""
    return torch.export.load(io.BytesIO(data)).module()


def to_onnx(classify: PhotoClassifier, facts: dict[str, Any]) -> bytes:
    """An ONNX model with input `photos` and output `logits`; the description is in its metadata properties."""
    names: dict[str, Any] = {"input_names": ["photos"], "output_names": ["logits"], "dynamic_shapes": ({0: "N"},)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`isinstance", FutureWarning)  # what torch says to itself
        program = torch.onnx.export(_trace(classify, facts), dynamo=True, verbose=False, **names)
    assert program is not None
    made = program.model_proto
    onnx.helper.set_model_props(made, describe_model(facts, normalises=True))
    onnx.checker.check_model(made, full_check=True)
    return bytes(made.SerializeToString())


def from_onnx(data: bytes) -> Classify:
    """An ONNX model as the standard's own evaluator runs it: slowly."""
    evaluator = ReferenceEvaluator(onnx.load_from_string(data))

    def classify(photos: Tensor) -> Tensor:
        (logits,) = evaluator.run(None, {"photos": photos.numpy()})
        return torch.from_numpy(logits)

    return classify


FORMATS = {
    "model.safetensors": Format(to_safetensors, from_safetensors),
    "model.onnx": Format(to_onnx, from_onnx),
    "model.pt2": Format(to_pt2, from_pt2),
}
