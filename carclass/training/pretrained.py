"""The weights a run starts from: an ImageNet or sample backbone, a file, or another run's epoch."""

from torch import Tensor
from torchvision.models.resnet import ResNet

from carclass import storage
from carclass.config.schema import ModelSettings, TrainSettings
from carclass.errors import UserError
from carclass.models import weights
from carclass.runs.run import ParentEpoch, Run, find_run, parse_parent
from carclass.runs.saved_model import read_model
from carclass.training import checkpoint


def load_pretrained(net: ResNet, root: str, settings: TrainSettings, classes: list[str]) -> str:
    """Puts the parent's weights into a network and returns the sha256 of their file.

    Of a run, the classifier's too; a frozen stage's epoch has a file with the classifier alone, and its backbone is
    that of the run's published model. classes: of the dataset to train on. UserError when the parent isn't there, isn't
    what it was, has other classes or is another network.
    """
    start = parse_parent(settings.parent)
    if start is None:
        return load_backbone(net, settings)
    run = find_run(root, start.run)
    best, facts = read_model(run.best(run.stages[-1]))
    _check_fit(settings, facts, classes)
    state, sha256 = (best, str(facts["sha256"])) if start.epoch == "best" else _load_epoch(run, start, best, settings)
    if settings.parent_sha256 not in (None, sha256):
        raise UserError(
            f"`train.parent_sha256`: {settings.parent} has the sha256 {sha256}, not {settings.parent_sha256}. "
            "Correct it, or find out why the weights are others."
        )
    net.load_state_dict(state)
    return sha256


def _load_epoch(
    run: Run, start: ParentEpoch, best: dict[str, Tensor], settings: TrainSettings
) -> tuple[dict[str, Tensor], str]:
    """(state dict, sha256 of the file) of an epoch of a run's last stage."""
    stage = run.stages[-1]
    epochs = [row["epoch"] for row in run.metrics() if row["stage"] == stage]
    epoch = max(epochs) if start.epoch == "last" else int(start.epoch)
    uri = storage.join(run.uri, stage, checkpoint.checkpoint_name(epoch))
    if epoch not in epochs:
        raise UserError(
            f"`train.parent`: {settings.parent} isn't there: `{start.run}` ended after {max(epochs)} {stage} epochs."
        )
    if not storage.exists(storage.join(uri, checkpoint.INDEX)):
        raise UserError(
            f"`train.parent`: the weights of {settings.parent} weren't kept. Add {epoch} to "
            f"`train.{stage}.keep_epochs` of `{run.settings.name}` and train it anew, or start from @best or @last."
        )
    weights, sha256 = checkpoint.read_weights(uri)
    prefix = "fc." if stage == "frozen" else ""
    return best | {f"{prefix}{name}": tensor for name, tensor in weights.items()}, sha256


def _check_fit(settings: TrainSettings, facts: dict, classes: list[str]) -> None:
    if facts["classes"] != classes:
        ours, theirs = set(classes), set(facts["classes"])
        other = sorted(ours ^ theirs)
        raise UserError(
            f"`train.parent`: {settings.parent} knows {len(theirs)} classes, dataset `{settings.dataset}` has "
            f"{len(ours)}; {len(other)} are in one alone ({', '.join(other[:3])} …). Choose a parent or a dataset of "
            "the same classes, or start from `imagenet`."
        )
    found = ModelSettings.model_validate(facts["model"])
    for key in ("architecture", "stride_in_1x1"):
        if getattr(found, key) != getattr(settings.model, key):
            raise UserError(
                f"`train.model.{key}` is {getattr(settings.model, key)}, and {settings.parent} was trained with "
                f"{getattr(found, key)}. Give both runs the same."
            )


def load_backbone(net: ResNet, train: TrainSettings) -> str:
    """Puts the parent's weights into everything but the classifier, whose classes are others.

    Returns the sha256 of the parent's file. UserError when the file is not this architecture's.
    """
    state, sha256 = weights.load(train.parent, train.parent_sha256, sample="backbone.safetensors", key="train.parent")
    state = {name: value.float() for name, value in state.items() if not name.startswith("fc.")}
    expected = {name: value for name, value in net.state_dict().items() if not name.startswith("fc.")}
    # Some files leave out the counters of BatchNorm, which nothing reads here.
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    wrong = [name for name in state if name not in expected or state[name].shape != expected[name].shape]
    if missing or wrong:
        raise UserError(
            f"`train.parent`: {train.parent} is no {train.model.architecture}: "
            f"{len(missing)} tensors are missing, {len(wrong)} don't fit (the first: {[*missing, *wrong][0]})."
        )
    net.load_state_dict(state, strict=False)
    return sha256
