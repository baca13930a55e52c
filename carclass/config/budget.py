"""Settings of a budget file: the tree of experiments of jobs/lineage.py."""

from typing import Any

from pydantic import Field, model_validator

from carclass.config.schema import IngestSettings, MaskSettings
from carclass.config.section import Section, Sha256, Share, Uri


class Figures(Section):
    """Accuracies of another system on one experiment."""

    val: Share | None = None
    """Best accuracy on the val split."""
    test: Share | None = None
    """Accuracy on the test split."""


class Baseline(Section):
    """Accuracies of another system to compare with."""

    name: str
    """Title of the other system in the report."""
    figures: dict[str, Figures]
    """Accuracies by name of the experiment."""


class Budget(Section):
    """A budget file: experiments, their datasets and the length of training."""

    root: Uri
    """Folder or s3:// prefix for datasets and experiments; the roots in the experiment files are ignored."""
    experiments: Uri
    """Glob pattern of the experiment files."""
    ingest: IngestSettings | None = None
    """Dataset of photos, published if missing; without this section it has to exist."""
    masks: tuple[MaskSettings, ...] = ()
    """Masked datasets, published in this order if missing."""
    imagenet: Uri = "imagenet"
    """Weights used for `parent: imagenet`, in the form of `train.parent`."""
    imagenet_sha256: Sha256 | None = None
    """Checksum of these weights, as `train.parent_sha256`."""
    fixed: dict[str, Any] = Field({})
    """Changes to all experiments by dotted key, such as `train.model.image_size`."""
    max_epochs: int | None = Field(None, ge=1)
    """Upper limit of the epochs of each stage; epochs that other runs start from are trained in any case."""
    devices_per_worker: float = Field(1.0, gt=0)
    """GPUs (CPUs if there are none) of each training worker; with 0.25, four workers share a GPU."""
    baseline: Uri | None = None
    """YAML file with the accuracies of another system, for comparison."""

    @model_validator(mode="after")
    def _check_effect(self) -> "Budget":
        if self.imagenet == "imagenet" and self.imagenet_sha256 is not None:
            raise ValueError("`imagenet_sha256` has no effect with `imagenet: imagenet`, whose checksum is fixed")
        return self
