"""Export of a run's best network to other formats, each checked against the network before it is published.

<run>/export/model.safetensors  weights under torchvision's names
<run>/export/model.onnx         for ONNX runtimes
<run>/export/model.pt2          for torch.export.load
<run>/export/export.json        each file's sha256 and its largest difference from the network, written last

Of another stage than that of the run's model, the folder is export-<stage>.

model.onnx and model.pt2 take uint8 (N,3,S,S) RGB, as decoders return it, for any N, and return float32 (N,C) logits:
normalisation is inside. Labels and preprocessing are in the metadata of every file, see describe_model.
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
from carclass.data import dataset, formats
from carclass.data.lease import hold_lease
from carclass.formatting import bytes_text
from carclass.models import preprocessing, resnet
from carclass.models.preprocessing import decode_photos
from carclass.runs.predictor import PhotoClassifier
from carclass.runs.run import find_run
from carclass.runs.saved_model import load_network

log = logging.getLogger(__name__)
TOLERANCE = 1e-3
"""Largest difference of a logit between a published file and the network: at most 0.0005 of a probability."""
NUM_PHOTOS = 4
"""Number of photos the files are compared on, as one batch and as a single photo."""
EXTRA = "carclass.json"
"""Name of the description within a .pt2 file."""

Classify = Callable[[Tensor], Tensor]
"""uint8 (N,3,S,S) RGB → float32 (N,C) logits."""


class Format(NamedTuple):
    """A file format: its writer, of a network and its facts (see saved_model), and its reader, for the comparison."""

    write: Callable[[PhotoClassifier, dict[str, Any]], bytes]
    read: Callable[[bytes], Classify]


def export_run(root: str, name: str, stage: str | None = None) -> str:
    """Write `<run>/export/`, unless it is up to date, and return its URI.

    stage: the one whose best epoch to export, by default the best epoch over all stages. Raise UserError if the run or
    its stage doesn't exist or is not finished, or its dataset, whose photos the files are compared on, is gone. Raise
    AssertionError, and publish nothing, if a file differs from the network by more than TOLERANCE.
    """
    run = find_run(root, name)
    selected = run.select_stage(stage)
    net, facts = load_network(run.model_uri(selected))
    uri = storage.join(run.uri, f"export{run.stage_suffix(selected)}")
    if _exported_model_sha256(uri) == facts["sha256"]:
        log.info("export: %s is finished, nothing to do", uri)
        return uri
    photos = _sample_photos(dataset.load_dataset(root, run.settings.dataset), facts["model"]["image_size"])
    with hold_lease(uri, "export") as lease:
        files = {file: kind.write(PhotoClassifier(net), facts) for file, kind in FORMATS.items()}
        index: dict[str, Any] = {"model_sha256": facts["sha256"], "tolerance": TOLERANCE, "files": {}}
        for file, data in files.items():
            read = FORMATS[file].read(data)
            error = largest_difference(read, lambda batch: net(preprocessing.normalise(batch)), photos)
            assert error <= TOLERANCE, (
                f"{file} of run {name} differs by {error:.2g} from the network, nothing is published"
            )
            log.info("export: %s, %s, logits differ by %.1g at most", file, bytes_text(len(data)), error)
            index["files"][file] = {"sha256": storage.sha256(data), "largest_difference": error}
        lease.check()
        for file, data in files.items():
            storage.write_bytes(storage.join(uri, file), data)
        formats.write(storage.join(uri, "export.json"), "export", index)
    return uri


def _exported_model_sha256(uri: str) -> str | None:
    """Return the sha256 of the model that a finished export was made from; None if there is no export."""
    try:
        return str(formats.read(storage.join(uri, "export.json"), "export")["model_sha256"])
    except FileNotFoundError:
        return None


def _sample_photos(source: dataset.Dataset, size: int) -> Tensor:
    """Return the first photos of a dataset: uint8 (N,3,S,S)."""
    images = dataset.read_part(source.part_uris[0], ["image"])["image"][:NUM_PHOTOS].to_pylist()
    return torch.from_numpy(decode_photos(images, size)).permute(0, 3, 1, 2).contiguous()


@torch.inference_mode()
def largest_difference(exported: Classify, network: Classify, photos: Tensor) -> float:
    """Return the largest absolute difference of logits, on all photos as one batch and on the first alone."""
    return max(float((exported(batch) - network(batch)).abs().max()) for batch in (photos, photos[:1]))


def describe_model(facts: dict[str, Any], *, normalises: bool) -> dict[str, str]:
    """Return the metadata of a file: classes, preprocessing, input and output; lists are JSON.

    facts: as publish_model recorded them. normalises: True if the file takes uint8 photos.
    """
    size = facts["model"]["image_size"]
    uint8_input = f"uint8 (N,3,{size},{size}) RGB, 0 to 255, any N; mean and std are applied inside"
    float_input = f"float32 (N,3,{size},{size}) RGB, (photo / 255 - mean) / std"
    return {
        "classes": json.dumps(facts["classes"], ensure_ascii=False),
        "image_size": str(size),
        "resize": "to image_size x image_size whatever the shape; bilinear, antialiased, rounded to uint8",
        "input": uint8_input if normalises else float_input,
        "layout": "NCHW, RGB",
        "mean": json.dumps(preprocessing.MEAN),
        "std": json.dumps(preprocessing.STD),
        "output": "float32 (N,C) logits in the order of classes; their softmax are probabilities",
        "model": json.dumps(facts["model"]),
        **{key: str(facts[key]) for key in ("run", "stage", "epoch", "val_accuracy")},
        "model_sha256": facts["sha256"],
    }


def to_safetensors(classify: PhotoClassifier, facts: dict[str, Any]) -> bytes:
    """Return the network's tensors under torchvision's names (`fc.weight`), so that its ResNet can load them."""
    state = {name.replace("fc.1.", "fc."): value.contiguous() for name, value in classify.net.state_dict().items()}
    return save(state, describe_model(facts, normalises=False))


def from_safetensors(data: bytes) -> Classify:
    """Build the classifier of a .safetensors file."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    net = resnet.build(ModelSettings.model_validate_json(header["model"]), len(json.loads(header["classes"])))
    net.load_state_dict({name.replace("fc.", "fc.1."): value for name, value in load(data).items()})
    return PhotoClassifier(net)


def _trace(classify: PhotoClassifier, facts: dict[str, Any]) -> torch.export.ExportedProgram:
    """Trace the classifier, for any number of photos."""
    size = facts["model"]["image_size"]
    photos = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    program = torch.export.export(classify, (photos,), dynamic_shapes=({0: torch.export.Dim("N", min=1)},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def to_pt2(classify: PhotoClassifier, facts: dict[str, Any]) -> bytes:
    """Return an archive of torch.export; the description is its extra file EXTRA."""
    file = io.BytesIO()
    extra = {EXTRA: json.dumps(describe_model(facts, normalises=True), ensure_ascii=False)}
    torch.export.save(_trace(classify, facts), file, extra_files=extra)
    return file.getvalue()


def from_pt2(data: bytes) -> Classify:
    """Load the program of a .pt2 file."""
    return torch.export.load(io.BytesIO(data)).module()


def to_onnx(classify: PhotoClassifier, facts: dict[str, Any]) -> bytes:
    """Return an ONNX model with input `photos` and output `logits`; the description is in its metadata properties."""
    names: dict[str, Any] = {"input_names": ["photos"], "output_names": ["logits"], "dynamic_shapes": ({0: "N"},)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`isinstance", FutureWarning)  # of torch's own code
        program = torch.onnx.export(_trace(classify, facts), dynamo=True, verbose=False, **names)
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, describe_model(facts, normalises=True))
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def from_onnx(data: bytes) -> Classify:
    """Return a classifier that runs an ONNX model by ONNX's reference evaluator, which is slow."""
    evaluator = ReferenceEvaluator(onnx.load_from_string(data))

    def classify(photos: Tensor) -> Tensor:
        """Return the logits."""
        (logits,) = evaluator.run(None, {"photos": photos.numpy()})
        return torch.from_numpy(logits)

    return classify


FORMATS = {
    "model.safetensors": Format(to_safetensors, from_safetensors),
    "model.onnx": Format(to_onnx, from_onnx),
    "model.pt2": Format(to_pt2, from_pt2),
}
