"""All settings of the jobs: type, unit, default and reason.

A config file is YAML with the sections below; each job reads its own section. Unknown keys, keys given twice and keys
without a value are errors. The type of a setting decides how its value is read: `no`, `012`, `1e3` and `2024-01-01` are
names where a name is expected, and `1e-3` is a number where a number is expected.

`${NAME}` and `${NAME:-default}` are replaced from the environment, within a value and after the file is parsed: the
value of a variable may contain any characters. `$${NAME}` stands for the text `${NAME}`. Relative paths in a file are
relative to that file; relative paths on the command line are relative to the working directory.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from carclass.config import yaml_file
from carclass.config.audit_settings import AuditSettings
from carclass.config.effects import check_mask_effect, check_train_effect
from carclass.config.ingest_settings import IngestSettings as IngestSettings
from carclass.config.model_settings import TIMM
from carclass.config.model_settings import ModelSettings as ModelSettings
from carclass.config.section import Name, Parent, ProperShare, Section, Sha256, Share, Uri, validate
from carclass.errors import UserError

StageName = Literal["frozen", "unfrozen"]
"""The stages of training, by the names of their sections."""
LoggerName = Literal["tensorboard", "mlflow", "wandb"]
"""Receivers of a run's metrics besides its own files."""
Byte = Annotated[int, Field(ge=0, le=255)]
PROFILES = {
    "exact": {"short_side": 800, "num_proposals": 1000, "num_detections": 100},
    "fast": {"short_side": 352, "num_proposals": 100, "num_detections": 5},
}
"""Detector presets: the model zoo's values, or smaller ones for photos of one large vehicle."""
RENAMED_CHOICES = {"surest": "highest_score"}
"""Former values of `mask.choice`, which older datasets have in their manifests."""


def _check_choice(value: Any) -> Any:
    if isinstance(value, str) and value in RENAMED_CHOICES:
        raise ValueError(f"`{value}` was renamed to `{RENAMED_CHOICES[value]}`")
    return value


def _parse_workers(value: Any) -> Any:
    counts = [str(count) for count in (value if isinstance(value, list | tuple) else [value])]
    numbers = [int(count) for count in counts if count.isdecimal()]
    if len(numbers) != len(counts) or len(counts) not in (1, 2) or numbers != sorted(numbers) or numbers[0] < 1:
        raise ValueError("give one number, or [min, max], greater than or equal to 1")
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


class DetectorSettings(Section):
    """Detector of vehicles."""

    model: Uri = "mask_rcnn_r50_fpn"
    """`mask_rcnn_r50_fpn` or `faster_rcnn_r101_fpn` (boxes only) of Detectron2, `torchvision_mask_rcnn_v2`,
    `sample`, or the URI of a Detectron2 .yaml."""
    weights: Uri = "zoo"
    """`zoo` (downloaded once), `sample` (in the package), or the URI of a .safetensors, .pth or .pkl file."""
    weights_sha256: Sha256 | None = None
    """Checked before the weights are opened; by default the one recorded at the first use of a download or .pkl."""
    classes: dict[int, str] = Field({2: "car", 5: "bus", 7: "truck"}, min_length=1)
    """COCO classes, counted from 0, that are vehicles, and their names in the dataset."""
    score_threshold: Share = 0.5
    """Detections with a lower score are ignored; 0.5 is the Keras project's value."""
    profile: Literal["exact", "fast"] = "fast"
    """Preset of the three settings below: `exact` as the model zoo (800 px, 1000 proposals, 100 detections), or
    `fast`. Each of them can be set on its own."""
    short_side: int = Field(PROFILES["fast"]["short_side"], ge=32)
    """Shorter side of the detector's input in pixels."""
    num_proposals: int = Field(PROFILES["fast"]["num_proposals"], ge=1)
    """Proposals kept per photo; the zoo's 1000 are for crowded scenes."""
    num_detections: int = Field(PROFILES["fast"]["num_detections"], ge=1)
    """Vehicles kept per photo, by descending score."""
    max_size: int = Field(1333, ge=32)
    """Upper limit of the longer side in pixels, as in the zoo."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of the network, as `train.precision`."""

    @model_validator(mode="before")
    @classmethod
    def _apply_profile(cls, values: Any) -> Any:
        return {**PROFILES.get(values.get("profile", ""), {}), **values} if isinstance(values, dict) else values


class CutoutSettings(Section):
    """Removal of the background."""

    mode: Literal["crop", "mask", "crop+mask"] = "crop+mask"
    """Crop to the box, paint over the background, or both."""
    fill: tuple[Byte, Byte, Byte] = (124, 116, 104)
    """RGB colour of the removed background: ImageNet's mean, which is zero after normalisation."""
    margin: Share = 0.05
    """Border kept around the box, as a share of its width and height."""


class ExcludeSettings(Section):
    """Photos to quarantine for their mask, with the reason `doubtful_mask`; none by default."""

    no_vehicle: bool = False
    """Photos without a detected vehicle, which are otherwise kept whole."""
    several_vehicles: bool = False
    """Photos with another vehicle at least half as large."""
    touches_border: bool = False
    """Photos in which the vehicle touches the photo's edge."""
    min_area_fraction: Share = 0.0
    """Smallest share of the photo that the vehicle covers."""
    min_stability: Share = 0.0
    """Smallest IoU of the masks at a lower and a higher threshold."""


class MaskSettings(Section):
    """A dataset → a dataset with the background removed."""

    removed: ClassVar[dict[str, str]] = {"preview": "is now a flag of jobs/mask.py: --preview 40"}

    source: Name = "v1"
    """Dataset to read."""
    dataset: Name = "v2"
    """Name of the dataset to publish."""
    limit: int | None = Field(None, ge=1)
    """Number of photos to mask, chosen by content; all by default."""
    truth: Uri | None = None
    """COCO file with the true masks (or `sample`), for the masks' IoU in the report."""
    detector: DetectorSettings = DetectorSettings()
    choice: Annotated[Literal["largest", "central", "highest_score"], BeforeValidator(_check_choice)] = "largest"
    """Vehicle to keep if there are several: the largest mask (of those within 10 % of it, the most central), the one
    nearest to the centre, or the one with the highest score."""
    cutout: CutoutSettings = CutoutSettings()
    exclude: ExcludeSettings = ExcludeSettings()
    num_actors: int | None = Field(None, ge=1)
    """Number of detectors; by default one per GPU, also of nodes that join, or one per CPU if there are no GPUs."""
    use_gpu: bool | None = None
    """true or false; by default true if the cluster has a GPU."""
    batch_size: int = Field(8, ge=1)
    """Photos of one shape per forward pass on a GPU; on a CPU photos are processed one by one."""
    quality: int = Field(92, ge=50, le=100)
    """JPEG quality of the result."""
    max_quarantined: Share = 0.05
    """Largest share of photos in quarantine because they crashed their workers; with more, nothing is published."""
    part_rows: int = Field(64, ge=1)
    """Photos per Parquet file, and between two progress lines: half a minute of work on a CPU."""


class AugmentationSettings(Section):
    """Random changes of a training photo, drawn from (seed, epoch, photo)."""

    flip: Literal["none", "horizontal", "horizontal+vertical"] = "horizontal"
    """Mirror images, each with probability one half."""
    rotation: Share = 0.05
    """Largest angle, as a share of a full turn in either direction."""
    zoom_height: Share = 0.2
    """Largest change of the height, in or out."""
    zoom_width: Share = 0.2
    """Largest change of the width, in or out, drawn independently of the height."""
    crop: float | None = Field(None, gt=0, lt=1)
    """Area of the smallest random crop, as a share of the photo; the ratio of its sides varies from 3/4 to 4/3 of the
    photo's. null: the whole photo."""


class StageSettings(Section):
    """Optimisation of one training stage."""

    name: ClassVar[StageName]
    epochs: int = Field(ge=1)
    """Upper limit; patience may end the stage earlier."""
    lr: float = Field(gt=0)
    """Peak learning rate."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """SGD has a momentum of 0.9."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled for adamw, L2 for the others."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate schedule after the warm-up."""
    warmup_epochs: float = Field(0.0, ge=0)
    """Epochs of linear learning rate warm-up."""
    label_smoothing: ProperShare = 0.1
    """Share of the target spread over all classes (Szegedy et al. 2016)."""
    batch_size: int = Field(32, ge=1)
    """Photos per step, over all workers together."""
    clip_grad_norm: float | None = Field(None, gt=0)
    """Largest norm of a step's gradients, which are scaled down to it; null: they are used as they are."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay per step of a moving average of the weights, which is validated and saved; null: none."""
    patience: int | None = Field(None, ge=1)
    """Epochs without a better val accuracy before the stage ends; by default all epochs are trained."""
    keep_epochs: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Epochs whose weights are kept for runs that start from them, whatever their val accuracy; patience does not end
    the stage before them. The best epochs and the last one are always kept."""

    @model_validator(mode="after")
    def _check_keep_epochs(self) -> "StageSettings":
        beyond = [epoch for epoch in self.keep_epochs if epoch > self.epochs]
        if beyond:
            raise ValueError(f"`keep_epochs` has {beyond[0]}, but the stage ends after {self.epochs}")
        return self


class FrozenSettings(StageSettings):
    """Training of the head on cached features of the frozen backbone."""

    name = "frozen"
    epochs: int = Field(80, ge=1)
    lr: float = Field(2e-3, gt=0)
    batch_size: int = Field(128, ge=1)
    views: int = Field(4, ge=1)
    """Versions of each training photo whose features are cached: 1 the photo, 2 also its mirror image,
    more: random augmentations. One is drawn per epoch."""


class UnfrozenSettings(StageSettings):
    """Training of all layers, from the frozen stage's best epoch; BatchNorm statistics stay frozen."""

    name = "unfrozen"
    epochs: int = Field(30, ge=1)
    lr: float = Field(6e-4, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    warmup_epochs: float = Field(1.0, ge=0)
    blocks: int = Field(4, ge=1, le=4)
    """Quarters of the network that are trained, counted from the last one (ResNet's layers): 4 for all of it."""
    layer_decay: float = Field(0.5, gt=0, le=1)
    """Learning rate of each quarter of the network (ResNet's layers) as a share of the quarter above; the last one and
    the classifier have lr."""
    ema_decay: float | None = Field(0.99, gt=0, lt=1)
    appearance: bool = True
    """One random change of a photo's colours or sharpness per epoch, as in TrivialAugment."""
    train_size: int | None = Field(None, ge=32)
    """Side in pixels of the photos that the stage is trained on, below `model.image_size`, which validation, evaluation
    and prediction use. By default the same."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Photos per forward pass of a worker; gradients are accumulated over its share of the batch. By default all."""


class TrainSettings(Section):
    """A dataset → a run."""

    removed: ClassVar[dict[str, str]] = {"checkpoint_steps": "is now `checkpoint_seconds`: 60 by default"}

    name: Name
    """Name of the run; the same name resumes it."""
    dataset: Name = "v2"
    """Dataset to train on."""
    parent: Parent = "imagenet"
    """`pretrained` (the weights published for the architecture, the default for timm's), `imagenet` or `imagenet-v2`
    (torchvision's), `sample` (in the package), the URI of weights, or a run under the same root, including its
    classifier: `exp_002@best` (its model, the best epoch over its stages), `exp_002@12` or `exp_002@last` (epochs of
    its last stage)."""
    parent_sha256: Sha256 | None = None
    """Checked before the weights are opened; by default the one recorded at the first use of a download or .pkl."""
    model: ModelSettings = ModelSettings()
    augmentation: AugmentationSettings = AugmentationSettings()
    sampling: Literal["uniform", "balanced"] = "uniform"
    """Photos of an epoch: `uniform` takes every training photo once; `balanced` takes equally many of each class, for
    rare classes. Either way an epoch has as many photos, `balanced` rounded up to a multiple of the classes."""
    frozen: FrozenSettings | None = FrozenSettings()
    """null skips the stage."""
    unfrozen: UnfrozenSettings | None = UnfrozenSettings()
    """null skips the stage."""
    num_workers: Annotated[int | tuple[int, int], BeforeValidator(_parse_workers)] = 1
    """Training workers, one per GPU if GPUs are used; [min, max]: as many as fit the cluster at the time."""
    use_gpu: bool | None = None
    """true or false, for the run's evaluation and predictions too; by default true if the cluster has a GPU."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 autocast where it is faster than float32 (GPUs since Ampere, CPUs with AMX, AMD's since Zen 4), and float32
    elsewhere; or float32 throughout."""
    checkpoint_seconds: float = Field(60, ge=0)
    """Seconds between checkpoints for resuming, which are written asynchronously; the latest two are kept."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of epochs whose weights are kept, the best by val accuracy."""
    refit: bool = False
    """true: train once more on train and val photos together, for as many epochs as were best on val, and use that
    model. Accuracies on val, curves and calibration are of the model before."""
    seed: int = Field(123, ge=0)
    """Seed of initial weights, order, augmentation and dropout."""
    loggers: tuple[LoggerName, ...] = ("tensorboard",)
    """Receivers of metrics besides `metrics.jsonl`: `tensorboard`, `mlflow`, `wandb`. The latter two are extras
    (`pip install carclass[mlflow]`) and set up by their environment variables; [] for none."""

    @model_validator(mode="before")
    @classmethod
    def _choose_parent(cls, values: Any) -> Any:
        """Return the values with the parent of timm's architectures, unless one is given."""
        model = values.get("model") if isinstance(values, dict) else None
        if isinstance(model, dict) and str(model.get("architecture")).startswith(TIMM):
            return {"parent": "pretrained", **values}
        return values

    @model_validator(mode="after")
    def _check_stages(self) -> "TrainSettings":
        if self.frozen is None and self.unfrozen is None:
            raise ValueError("`frozen` and `unfrozen` are both null, so nothing would be trained; keep one")
        return self

    @model_validator(mode="after")
    def _check_loggers(self) -> "TrainSettings":
        if repeated := [name for name in self.loggers if self.loggers.count(name) > 1]:
            raise ValueError(f"`loggers` has {repeated[0]} twice")
        return self

    @model_validator(mode="after")
    def _check_kept_stage(self) -> "TrainSettings":
        if self.unfrozen is not None and self.frozen is not None and self.frozen.keep_epochs:
            raise ValueError("`frozen.keep_epochs` has no effect: other runs start from the last stage, `unfrozen`")
        return self

    @property
    def workers(self) -> tuple[int, int]:
        """Return the smallest and the largest number of workers."""
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)

    @property
    def train_size(self) -> int:
        """Return the side in pixels of the photos that the unfrozen stage is trained on."""
        return (self.unfrozen and self.unfrozen.train_size) or self.model.image_size


class EvaluateSettings(Section):
    """A run and a dataset → a report."""

    run: Name | None = None
    """Run to evaluate; by default the one that the file trains."""
    dataset: Name | None = None
    """Dataset to evaluate on; by default the one the run was trained on."""
    split: Literal["test", "val"] = "test"
    """Split to evaluate on; make choices on val, and use test only at the end."""
    stage: StageName | None = None
    """Stage whose best epoch is evaluated; by default the run's model, the best epoch over its stages by val
    accuracy."""
    batch_size: int = Field(64, ge=1)
    """Photos per forward pass."""


class PredictSettings(Section):
    """Photos and a run → predictions."""

    run: Name | None = None
    """Run whose network classifies the photos; by default the one that the file trains."""
    stage: StageName | None = None
    """Stage whose best epoch classifies them; by default the run's model, the best epoch over its stages by val
    accuracy."""
    photos: Uri
    """Folder, s3:// prefix, tar or zip archive of photos, or one photo, whose prediction is printed alone."""
    name: Name = "predictions"
    """Name of the result, below the run's folder; the same name resumes it."""
    threshold: Share = 0.0
    """Photos with a lower calibrated probability are marked as rejected."""
    detector_weights: Uri | None = None
    """URI of the weights with which the run's dataset was masked, or of the file that they were converted from; by
    default the recorded one, and if it is lost the zoo's."""
    batch_size: int = Field(64, ge=1)
    """Photos per forward pass of the classifier."""
    max_quarantined: Share = 0.05
    """Largest share of photos in quarantine because they could not be read from storage or crashed their workers; with
    more, nothing is published."""
    part_rows: int = Field(64, ge=1)
    """Photos per Parquet file, and between two progress lines."""


class Config(Section):
    """A config file: the root of all results, and one section per job."""

    root: Uri
    """Folder or s3:// prefix for datasets and experiments."""
    ingest: IngestSettings | None = None
    mask: Annotated[MaskSettings | None, AfterValidator(check_mask_effect)] = None
    train: Annotated[TrainSettings | None, AfterValidator(check_train_effect)] = None
    evaluate: EvaluateSettings = EvaluateSettings()
    audit: AuditSettings = AuditSettings()
    predict: PredictSettings | None = None
    compare_unmasked: bool = False
    """Also train on the unmasked dataset in the pipeline, with the same settings, to measure the effect of masking."""

    def or_trained(self, run: str | None) -> str | None:
        """Return the run that a section names, or the one that the file trains, if any."""
        return run or (None if self.train is None else self.train.name)


class _TrainSection(Section):
    """A config file's `train` section, without the checks of a user's file."""

    train: TrainSettings


def with_changes(settings: TrainSettings, changes: dict[str, Any], *, source: str, base: Path) -> TrainSettings:
    """Return a run's settings with changes by dotted keys that begin with `train.`. Raise UserError if they are wrong.

    source: origin of the changes, for messages. base: folder that relative paths refer to.
    """
    values: dict[str, Any] = {"train": settings.model_dump(mode="json", exclude_unset=True)}
    for key, value in changes.items():
        if part := next((other for other in changes if other.startswith(f"{key}.")), None):
            raise UserError(f"{source}: `{part}` is given twice, as it is a part of `{key}`. Join the two.")
        yaml_file.set_key(values, key, value)
    return validate(values, _TrainSection, source=source, base=base).train
