"""Export of a run's best network to other formats, each checked against the network before it is published.

<run>/export/model.safetensors  weights under torchvision's or timm's names
<run>/export/model.onnx         for ONNX runtimes
<run>/export/model.pt2          for torch.export.load
<run>/export/export.json        each file's sha256 and its largest difference from the network, written last

Of another stage than that of the run's model, the folder is export-<stage>.

model.onnx and model.pt2 take uint8 (N,3,S,S) RGB, as decoders return it, for any N, and return float32 (N,C) logits and
calibrated probabilities: normalisation and temperature are inside. Labels and all steps before the input, such as
masking, are in the metadata of every file, see ModelDescription.
"""

import io
import json
import logging
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load, save
from torch import Tensor, nn

from carclass import storage
from carclass.config.schema import ModelSettings
from carclass.data import formats, photo
from carclass.data.formats import json_text
from carclass.data.lease import hold_lease
from carclass.formatting import bytes_text
from carclass.models import architectures
from carclass.models.classifier import Classifier
from carclass.models.preprocessing import normalise
from carclass.runs.calibration_record import require_calibration
from carclass.runs.model_description import ModelDescription
from carclass.runs.predictor import PhotoClassifier
from carclass.runs.preprocessing_record import load_preprocessing
from carclass.runs.run import find_run
from carclass.runs.saved_model import load_network
from carclass.sample.background import SCENES
from carclass.sample.draw import draw_photo
from carclass.sample.models import MODELS

log = logging.getLogger(__name__)
TOLERANCE = 1e-3
"""Largest difference of a logit or a probability between a published file and the network."""
NUM_PHOTOS = 4
"""Number of drawn photos the files are compared on, as one batch and as a single photo."""
OUTPUTS = ["logits", "probabilities"]
"""Names of a graph's outputs."""
EXTRA = "carclass.json"
"""Name of the description within a .pt2 file."""

Classify = Callable[[Tensor], dict[str, Tensor]]
"""uint8 (N,3,S,S) RGB → float32 (N,C) of each of OUTPUTS."""


class CalibratedClassifier(nn.Module):
    """A classifier with its temperature: uint8 (N,3,S,S) RGB → float32 (N,C) of each of OUTPUTS."""

    def __init__(self, classify: PhotoClassifier, temperature: float) -> None:
        super().__init__()
        self.classify, self.temperature = classify, temperature
        self.eval()

    def forward(self, photos: Tensor) -> dict[str, Tensor]:
        """Return logits and probabilities."""
        return _outputs(self.classify(photos), self.temperature)


class Format(NamedTuple):
    """A file format: its writer, of a network and its description, and its reader, for the comparison."""

    write: Callable[[PhotoClassifier, ModelDescription], bytes]
    read: Callable[[bytes], Classify]


def export_run(root: str, name: str, stage: str | None = None) -> str:
    """Write `<run>/export/`, unless it is up to date, and return its URI.

    stage: the one whose best epoch to export, by default the best epoch over all stages. Raise UserError if the run or
    its stage doesn't exist, is not finished or not calibrated, or its preprocessing is not known any more. Raise
    AssertionError, and publish nothing, if a file differs from the network by more than TOLERANCE.
    """
    run = find_run(root, name)
    selected = run.select_stage(stage)
    net, facts = load_network(run.model_uri(selected))
    uri = storage.join(run.uri, f"export{run.stage_suffix(selected)}")
    temperature = require_calibration(run, run.model_uri(selected), facts["sha256"]).temperature
    description = ModelDescription(facts, load_preprocessing(run), temperature)
    identity = {"model_sha256": facts["sha256"], "description_sha256": description.digest}
    if _is_current(uri, identity):
        log.info("export: %s is finished, nothing to do", uri)
        return uri
    with hold_lease(uri, "export") as lease:
        files = {file: kind.write(PhotoClassifier(net), description) for file, kind in FORMATS.items()}
        photos = _draw_photos(description.preprocessing.image_size)
        differences = {file: _compare(file, data, net, description, photos) for file, data in files.items()}
        lease.check()
        index: dict[str, Any] = {**identity, "tolerance": TOLERANCE, "files": {}}
        for file, data in files.items():
            storage.write_bytes(storage.join(uri, file), data)
            index["files"][file] = {"sha256": storage.sha256(data), "largest_difference": differences[file]}
        formats.write(storage.join(uri, "export.json"), "export", index)
    return uri


def _is_current(uri: str, identity: dict[str, str]) -> bool:
    """Return True if a finished export has this identity, and all of its files are as they were written."""
    try:
        index = formats.read(storage.join(uri, "export.json"), "export")
        return all(index.get(key) == value for key, value in identity.items()) and all(
            storage.sha256(storage.read_bytes(storage.join(uri, file))) == facts["sha256"]
            for file, facts in index["files"].items()
        )
    except FileNotFoundError:
        return False


def _compare(file: str, data: bytes, net: Classifier, description: ModelDescription, photos: Tensor) -> float:
    """Return the largest difference of a file from the network. Raise AssertionError if it exceeds TOLERANCE."""
    error = largest_difference(
        FORMATS[file].read(data),
        lambda batch: _outputs(net(normalise(batch, net.normalisation)), description.temperature),
        photos,
    )
    assert error <= TOLERANCE, (
        f"{file} of run {description.facts['run']} differs by {error:.2g} from the network, nothing is published"
    )
    log.info("export: %s, %s, outputs differ by %.1g at most", file, bytes_text(len(data)), error)
    return error


def _outputs(logits: Tensor, temperature: float) -> dict[str, Tensor]:
    return {"logits": logits, "probabilities": (logits / temperature).softmax(1)}


def _draw_photos(size: int) -> Tensor:
    """Return drawn photos: uint8 (N,3,S,S). The run's own may be deleted."""
    pairs = [*zip(MODELS, SCENES, strict=False)][:NUM_PHOTOS]
    drawn = [draw_photo((0, number), model, scene)[0] for number, (model, scene) in enumerate(pairs)]
    pixels = np.stack([photo.resize(one, size, size) for one in drawn])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


@torch.inference_mode()
def largest_difference(exported: Classify, network: Classify, photos: Tensor) -> float:
    """Return the largest absolute difference of an output, on all photos as one batch and on the first alone."""
    pairs = [(exported(batch), network(batch)) for batch in (photos, photos[:1])]
    return max(float((one[name] - other[name]).abs().max()) for one, other in pairs for name in OUTPUTS)


def to_safetensors(classify: PhotoClassifier, description: ModelDescription) -> bytes:
    """Return the network's tensors under the names of the library that its architecture is from (`fc.weight`)."""
    state = {classify.names[name]: value.contiguous() for name, value in classify.net.state_dict().items()}
    return save(state, description.metadata(normalises=False))


def from_safetensors(data: bytes) -> Classify:
    """Build the classifier of a .safetensors file."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    net = architectures.build(ModelSettings.model_validate_json(header["model"]), len(json.loads(header["classes"])))
    tensors = load(data)
    net.load_state_dict({name: tensors[net.published_name(name)] for name in net.state_dict()})
    return CalibratedClassifier(PhotoClassifier(net), float(header["temperature"]))


def _trace(classify: PhotoClassifier, description: ModelDescription) -> torch.export.ExportedProgram:
    """Trace the classifier, for any number of photos."""
    size = description.preprocessing.image_size
    photos = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    module = CalibratedClassifier(classify, description.temperature)
    program = torch.export.export(module, (photos,), dynamic_shapes=({0: torch.export.Dim("N", min=1)},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def to_pt2(classify: PhotoClassifier, description: ModelDescription) -> bytes:
    """Return an archive of torch.export; the description is its extra file EXTRA."""
    file = io.BytesIO()
    extra = {EXTRA: json_text(description.metadata(normalises=True), ensure_ascii=False)}
    torch.export.save(_trace(classify, description), file, extra_files=extra)
    return file.getvalue()


def from_pt2(data: bytes) -> Classify:
    """Load the program of a .pt2 file."""
    return torch.export.load(io.BytesIO(data)).module()


def to_onnx(classify: PhotoClassifier, description: ModelDescription) -> bytes:
    """Return an ONNX model with input `photos` and outputs OUTPUTS; the description is in its metadata."""
    names: dict[str, Any] = {"input_names": ["photos"], "output_names": OUTPUTS, "dynamic_shapes": ({0: "N"},)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`isinstance", FutureWarning)  # of torch's own code
        program = torch.onnx.export(_trace(classify, description), dynamo=True, verbose=False, **names)
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, description.metadata(normalises=True))
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def from_onnx(data: bytes) -> Classify:
    """Return a classifier that runs an ONNX model by ONNX's reference evaluator, which is slow."""
    evaluator = ReferenceEvaluator(onnx.load_from_string(data))

    def classify(photos: Tensor) -> dict[str, Tensor]:
        """Return the outputs."""
        outputs = evaluator.run(OUTPUTS, {"photos": photos.numpy()})
        return {name: torch.from_numpy(output) for name, output in zip(OUTPUTS, outputs, strict=True)}

    return classify


FORMATS = {
    "model.safetensors": Format(to_safetensors, from_safetensors),
    "model.onnx": Format(to_onnx, from_onnx),
    "model.pt2": Format(to_pt2, from_pt2),
}
