"""The weights that a run starts from: a backbone from a file, or all of another run's network as an epoch left it."""

from torch import Tensor
from torchvision.models.resnet import ResNet

from carclass import config, lineage, model, storage
from carclass.errors import UserError
from carclass.training import checkpoint


def load(net: ResNet, root: str, settings: config.Train, classes: list[str]) -> str:
    """Puts the parent's weights into a network and returns the sha256 of their file.

    Of a run, the classifier's too; a frozen stage's epoch has a file with the classifier alone, and its backbone is
    that of the run's published model. classes: of the dataset to train on. UserError when the parent isn't there, isn't
    what it was, has other classes or is another network.
    """
    start = lineage.start(settings.parent)
    if start is None:
        return model.load_parent(net, settings)
    run = lineage.load(root, start.run)
    best, facts = checkpoint.read_model(run.best(run.stages[-1]))
    _check_fit(settings, facts, classes)
    state, sha256 = (best, str(facts["sha256"])) if start.epoch == "best" else _epoch(run, start, best, settings)
    if settings.parent_sha256 not in (None, sha256):
        raise UserError(
            f"`train.parent_sha256`: {settings.parent} has the sha256 {sha256}, not {settings.parent_sha256}. "
            "Correct it, or find out why the weights are others."
        )
    net.load_state_dict(state)
    return sha256


def _epoch(
    run: lineage.Run, start: lineage.Start, best: dict[str, Tensor], settings: config.Train
) -> tuple[dict[str, Tensor], str]:
    """(state dict, sha256 of the file) of an epoch of a run's last stage."""
    stage = run.stages[-1]
    epochs = [row["epoch"] for row in run.metrics() if row["stage"] == stage]
    epoch = max(epochs) if start.epoch == "last" else int(start.epoch)
    uri = storage.join(run.uri, stage, checkpoint.name_of(epoch))
    if epoch not in epochs:
        raise UserError(
            f"`train.parent`: {settings.parent} isn't there: `{start.run}` ended after {max(epochs)} {stage} epochs."
        )
    if not storage.exists(storage.join(uri, checkpoint.INDEX)):
        raise UserError(
            f"`train.parent`: the weights of {settings.parent} weren't kept. Add {epoch} to "
            f"`train.{stage}.keep_epochs` of `{run.settings.name}` and train it anew, or start from @best or @last."
        )
    weights, sha256 = checkpoint.weights_of(uri)
    prefix = "fc." if stage == "frozen" else ""
    return best | {f"{prefix}{name}": tensor for name, tensor in weights.items()}, sha256


def _check_fit(settings: config.Train, facts: dict, classes: list[str]) -> None:
    if facts["classes"] != classes:
        ours, theirs = set(classes), set(facts["classes"])
        other = sorted(ours ^ theirs)
        raise UserError(
            f"`train.parent`: {settings.parent} knows {len(theirs)} classes, dataset `{settings.dataset}` has "
            f"{len(ours)}; {len(other)} are in one alone ({', '.join(other[:3])} …). Choose a parent or a dataset of "
            "the same classes, or start from `imagenet`."
        )
    found = config.Model.model_validate(facts["model"])
    for key in ("architecture", "stride_in_1x1"):
        if getattr(found, key) != getattr(settings.model, key):
            raise UserError(
                f"`train.model.{key}` is {getattr(settings.model, key)}, and {settings.parent} was trained with "
                f"{getattr(found, key)}. Give both runs the same."
            )
