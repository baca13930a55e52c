"""The initial weights of a run: an ImageNet or sample backbone, a file, or another run's epoch."""

import torch
from torch import Tensor

from carclass import storage
from carclass.config.schema import StageName, TrainSettings
from carclass.errors import UserError
from carclass.models import architectures, weights
from carclass.models.classifier import Classifier
from carclass.runs import checkpoint_index
from carclass.runs.run import ParentEpoch, Run, find_run, parse_parent
from carclass.runs.saved_model import load_network, read_model
from carclass.training import checkpoint


def initial_network(run: Run, stage: StageName, classes: list[str]) -> Classifier:
    """Return the network that a stage starts from: the parent's weights, or after a frozen stage its best model."""
    if stage == "unfrozen" and run.settings.frozen is not None:
        return load_network(run.model_uri("frozen"))[0]
    torch.manual_seed(run.settings.seed)  # the initial classifier, the same on every worker
    net = architectures.build(run.settings.model, len(classes))
    load_pretrained(net, run.root, run.settings, classes)
    return net


def check_parent(root: str, settings: TrainSettings) -> None:
    """Raise UserError for a parent that is unusable, whatever the classes of the dataset."""
    classes = parent_classes(root, settings) or []
    load_pretrained(architectures.build(settings.model, len(classes) or 1), root, settings, classes)


def parent_classes(root: str, settings: TrainSettings) -> list[str] | None:
    """Return the classes of the run that a run starts from, None if it starts from a file.

    Raise UserError if that run is missing or not finished.
    """
    parent = parse_parent(settings.parent)
    if parent is None:
        return None
    run = find_run(root, parent.run)
    classes: list[str] = run.model_facts(run.best_stage)["classes"]
    return classes


def load_pretrained(net: Classifier, root: str, settings: TrainSettings, classes: list[str]) -> str:
    """Load the parent's weights into a network and return the sha256 of their file.

    A run's weights include the classifier; an epoch of a frozen stage has only the classifier in its file, so the
    backbone is that of the run's published model. classes: of the dataset to train on. Raise UserError if the parent is
    missing or damaged, or has another sha256, other classes or another architecture.
    """
    parent = parse_parent(settings.parent)
    if parent is None:
        return load_backbone(net, settings, storage.join(root, "weights"))
    run = find_run(root, parent.run)
    best, facts = read_model(run.model_uri(run.best_stage if parent.epoch == "best" else run.stages[-1]))
    _check_parent(settings, facts, classes)
    state, sha256 = (best, str(facts["sha256"])) if parent.epoch == "best" else _load_epoch(run, parent, best, settings)
    if settings.parent_sha256 not in (None, sha256):
        raise UserError(
            f"`train.parent_sha256`: {settings.parent} has the sha256 {sha256}, not {settings.parent_sha256}. "
            "Correct it, or find out why the weights have changed."
        )
    net.load_state_dict(state)
    return sha256


def _load_epoch(
    run: Run, parent: ParentEpoch, best: dict[str, Tensor], settings: TrainSettings
) -> tuple[dict[str, Tensor], str]:
    """Return (state dict, sha256 of the file) of an epoch of a run's last stage. best: the stage's published model."""
    stage = run.stages[-1]
    epochs = [row["epoch"] for row in run.metrics() if row["stage"] == stage]
    epoch = max(epochs) if parent.epoch == "last" else int(parent.epoch)
    uri = storage.join(run.uri, stage, checkpoint_index.checkpoint_name(epoch))
    if epoch not in epochs:
        raise UserError(
            f"`train.parent`: {settings.parent} doesn't exist: `{parent.run}` has {max(epochs)} {stage} epochs."
        )
    if not storage.exists(storage.join(uri, checkpoint_index.INDEX)):
        raise UserError(
            f"`train.parent`: the weights of {settings.parent} were not kept. Add {epoch} to "
            f"`train.{stage}.keep_epochs` of `{run.settings.name}` and train it again, or start from @best or @last."
        )
    state, sha256 = checkpoint.read_weights(uri)
    prefix = "fc." if stage == "frozen" else ""
    return best | {f"{prefix}{name}": tensor for name, tensor in state.items()}, sha256


def _check_parent(settings: TrainSettings, facts: dict, classes: list[str]) -> None:
    """Raise UserError if the parent has other classes or another architecture."""
    if facts["classes"] != classes:
        dataset_classes, parent_classes = set(classes), set(facts["classes"])
        different = sorted(dataset_classes ^ parent_classes)
        raise UserError(
            f"`train.parent`: {settings.parent} has {len(parent_classes)} classes, dataset `{settings.dataset}` has "
            f"{len(dataset_classes)}; {len(different)} are in only one of them ({', '.join(different[:3])} …). Choose "
            "a parent or a dataset of the same classes, or start from `imagenet`."
        )
    for key in ("architecture", "stride_in_1x1"):
        value, parent_value = getattr(settings.model, key), facts["model"][key]
        if value != parent_value:
            raise UserError(
                f"`train.model.{key}` is {value}, but {settings.parent} was trained with {parent_value}. Use the same "
                "value in both runs."
            )


def load_backbone(net: Classifier, settings: TrainSettings, cache: str | None = None) -> str:
    """Load a file's weights into everything but the classifier and return the file's sha256.

    cache: a folder or s3:// prefix, where the sha256 of a download is recorded if none is set. Raise UserError if the
    file is of another architecture.
    """
    uri = settings.parent
    if uri == "pretrained":
        uri = architectures.pretrained_weights(settings.model.architecture)
    state, sha256 = weights.load_weights(
        uri, settings.parent_sha256, sample="backbone.safetensors", key="train.parent", cache=cache
    )
    own = {net.published_name(name): name for name in net.state_dict()}
    head = {published for published, name in own.items() if name.startswith("fc.")}
    # Files of carclass' own runs have the names of a Classifier.
    state = {name.removeprefix("backbone."): value.float() for name, value in state.items()}
    state = {name: value for name, value in state.items() if name not in head and not name.startswith("fc.1.")}
    tensors = net.state_dict()
    expected = {name: tensors[own[name]] for name in own if name not in head}
    # Some files have no counters of BatchNorm; frozen statistics don't need them.
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    mismatched = [name for name in state if name not in expected or state[name].shape != expected[name].shape]
    if missing or mismatched:
        right = "resnet26-narrow, as the sample's weights are" if settings.parent == "sample" else "the file's"
        raise UserError(
            f"`train.parent`: {settings.parent} is not a {settings.model.architecture} checkpoint: {len(missing)} "
            f"tensors missing, {len(mismatched)} unknown or with other shapes (first: {[*missing, *mismatched][0]}). "
            f"Set `train.model.architecture` to {right}."
        )
    net.load_state_dict({own[name]: value for name, value in state.items()}, strict=False)
    return sha256
