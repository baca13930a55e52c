"""Every setting once: its type, unit, default and reason.

A config file is YAML with the sections below; each job reads its own section. Unknown keys are errors.
`${NAME}` and `${NAME:-default}` are replaced from the environment. Relative paths in a file are relative
to that file; relative paths on the command line are relative to the working directory.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from carclass.config import yaml_file
from carclass.config.section import Name, Parent, Section, Sha256, Share, Uri, validate

Byte = Annotated[int, Field(ge=0, le=255)]
PROFILES = {
    "exact": {"short_side": 800, "num_proposals": 1000, "num_detections": 100},
    "fast": {"short_side": 352, "num_proposals": 100, "num_detections": 5},
}
"""How much a detector looks at: as the model zoo does, or trimmed for photos of one large vehicle."""


def _workers(value: Any) -> Any:
    counts = [str(count) for count in (value if isinstance(value, list | tuple) else [value])]
    numbers = [int(count) for count in counts if count.isdecimal()]
    if len(numbers) != len(counts) or len(counts) not in (1, 2) or numbers != sorted(numbers) or numbers[0] < 1:
        raise ValueError("give one number, or [fewest, most], greater than or equal to 1")
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


class IngestSettings(Section):
    """Photos and labels → a dataset."""

    dataset: Name = "v1"
    """Name of the dataset to publish."""
    photos: Uri
    """Folder, s3:// prefix or .tgz/.tar archive of photos; `sample`: drawn cars with their labels."""
    labels: Uri | None = None
    """CSV (img_name,class,subset) or folder of Stanford's devkit; without it, photos lie in a folder per class."""
    num_classes: int | None = Field(None, ge=2)
    """How many classes the labels must name; another number is an error."""
    val_fraction: Share = 0.2
    """Share of the train subset held out for validation, decided photo by photo from its content."""
    max_side: int | None = Field(800, ge=16)
    """Longest side of a stored photo in pixels; larger ones are shrunk. 800 is the detector zoo's scale."""
    quality: int = Field(92, ge=50, le=100)
    """JPEG quality of re-encoded photos; upright RGB JPEGs that need no shrinking keep their bytes."""
    min_side: int = Field(16, ge=1)
    """Photos with a shorter side in pixels are quarantined."""
    max_pixels: int = Field(100_000_000, ge=1)
    """Photos with more pixels are quarantined unread (decompression bombs)."""
    part_rows: int = Field(256, ge=1)
    """Photos per Parquet file: about 25 MB, a few seconds of work."""
    seed: int = 123
    """Decides, with a photo's content, whether it is held out. 123 is the original's."""

    @model_validator(mode="after")
    def _sample_has_labels(self) -> "IngestSettings":
        if self.photos == "sample" and self.labels is not None:
            raise ValueError("`photos: sample` brings its own labels: leave `labels` out")
        return self


class DetectorSettings(Section):
    """What finds the vehicle."""

    model: Uri = "mask_rcnn_r50_fpn"
    """`mask_rcnn_r50_fpn` or `faster_rcnn_r101_fpn` (boxes only) of Detectron2, `torchvision_mask_rcnn_v2`,
    `sample`, or the URI of a Detectron2 .yaml."""
    weights: Uri = "zoo"
    """`zoo` (fetched once), `sample` (in the package), or the URI of a .safetensors, .pth or .pkl file."""
    weights_sha256: Sha256 | None = None
    """Checked before the weights are opened; required for `zoo`, http(s) and every .pkl."""
    classes: dict[int, str] = Field({2: "car", 5: "bus", 7: "truck"}, min_length=1)
    """Which of COCO's 80 classes, counted from 0, are the vehicle, with the names they get in the dataset."""
    score_threshold: Share = 0.5
    """Detections below it are ignored; 0.5 is the original's."""
    profile: Literal["exact", "fast"] = "fast"
    """`exact` looks as the zoo does (800 px, 1000 proposals, 100 detections), `fast` is trimmed; the three
    settings below replace the profile's."""
    short_side: int = Field(PROFILES["fast"]["short_side"], ge=32)
    """Pixels of the photo's shorter side as the detector sees it."""
    num_proposals: int = Field(PROFILES["fast"]["num_proposals"], ge=1)
    """Proposals kept per photo; the zoo's 1000 are for crowded scenes."""
    num_detections: int = Field(PROFILES["fast"]["num_detections"], ge=1)
    """Vehicles kept per photo, the surest first."""
    max_size: int = Field(1333, ge=32)
    """Upper limit of the longer side in pixels, as in the zoo."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the network: bf16 autocast is 1.5 to 2 times faster on recent CPUs and GPUs."""

    @model_validator(mode="before")
    @classmethod
    def _profile(cls, values: Any) -> Any:
        return {**PROFILES.get(values.get("profile", ""), {}), **values} if isinstance(values, dict) else values


class CutoutSettings(Section):
    """What is done to the photo once the vehicle is found."""

    mode: Literal["crop", "mask", "crop+mask"] = "crop+mask"
    """Cut out the box, paint over the background, or both."""
    fill: tuple[Byte, Byte, Byte] = (124, 116, 104)
    """RGB colour of the removed background: ImageNet's mean, so it is zero after normalisation."""
    margin: Share = 0.05
    """Border kept around the box, as a share of its width and height."""


class ExcludeSettings(Section):
    """Which photos go to quarantine for their mask, as `doubtful_mask`; by default none does."""

    no_vehicle: bool = False
    """Photos in which no vehicle was found, which are otherwise kept whole."""
    several_vehicles: bool = False
    """Photos with another vehicle at least half as large."""
    touches_border: bool = False
    """Photos whose vehicle is cut off by the photo's edge."""
    min_area_fraction: Share = 0.0
    """Smallest share of the photo that the vehicle covers."""
    min_stability: Share = 0.0
    """Smallest agreement of the mask with itself, cut at a lower and a higher threshold."""


class MaskSettings(Section):
    """A dataset → a dataset with the background removed."""

    source: Name = "v1"
    """Dataset to read."""
    dataset: Name = "v2"
    """Name of the dataset to publish."""
    limit: int | None = Field(None, ge=1)
    """Mask only that many photos, chosen by content; all of them by default."""
    preview: int | None = Field(None, ge=1, le=500)
    """Publish nothing: mask that many photos, chosen by content, for a contact sheet and a report to look at."""
    truth: Uri | None = None
    """COCO file with the true masks (or `sample`): the masks are judged by it."""
    detector: DetectorSettings = DetectorSettings()
    choice: Literal["largest", "central", "surest"] = "largest"
    """Which of several vehicles: the one with the largest mask, and of those within 10 % of it the most central;
    the one nearest to the middle; or the one with the highest score."""
    cutout: CutoutSettings = CutoutSettings()
    exclude: ExcludeSettings = ExcludeSettings()
    num_actors: int | None = Field(None, ge=1)
    """Detector processes; by default one per GPU, without GPUs one per CPU."""
    use_gpu: bool | None = None
    """true, false, or by default: when the cluster has one."""
    batch_size: int = Field(8, ge=1)
    """Photos per forward pass on a GPU, all of one shape; a CPU takes them one by one."""
    quality: int = Field(92, ge=50, le=100)
    """JPEG quality of the result."""
    part_rows: int = Field(64, ge=1)
    """Photos per Parquet file, and so between two reports of progress: half a minute of work on a CPU."""


class ModelSettings(Section):
    """The network."""

    architecture: Literal["resnet50", "resnet26-narrow"] = "resnet50"
    """resnet26-narrow has two blocks a stage and a quarter of the width: for the sample and for tests."""
    stride_in_1x1: bool = False
    """Blocks stride in the 1x1 convolution: true for Keras' and MSRA's weights, false for torchvision's."""
    image_size: int = Field(224, ge=32)
    """Side in pixels of the square that a photo is resized to."""
    dropout: Share = 0.2
    """Before the classifier."""


class AugmentationSettings(Section):
    """Random changes of a training photo, drawn from (seed, epoch, photo)."""

    flip: Literal["none", "horizontal", "horizontal+vertical"] = "horizontal"
    """Mirror images, each with probability one half."""
    rotation: Share = 0.05
    """Largest angle, as a share of a full turn in either direction."""
    zoom_height: Share = 0.2
    """Largest change of the height, in or out."""
    zoom_width: Share = 0.2
    """Largest change of the width, in or out, drawn apart from the height."""


class StageSettings(Section):
    """How a stage is optimised."""

    epochs: int = Field(ge=1)
    """Upper limit; patience may end the stage before."""
    lr: float = Field(gt=0, allow_inf_nan=False)
    """Highest learning rate."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """SGD has a momentum of 0.9."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled for adamw, L2 for the others."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_epochs: float = Field(0.0, ge=0)
    """Linear rise of the learning rate, in epochs."""
    label_smoothing: Share = 0.1
    """Share of the target spread over all classes (Szegedy et al. 2016)."""
    batch_size: int = Field(32, ge=1)
    """Photos per step, over all workers together."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Weight of the past, per step, in a moving average of the weights, which is validated and kept; null: none."""
    patience: int | None = Field(None, ge=1)
    """Epochs without a better val accuracy before the stage ends; by default it runs to its end."""
    keep_epochs: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Epochs whose weights are kept for runs that start from them, whatever their val accuracy; patience doesn't end
    the stage before they are reached. The best ones' and the last one's are kept anyway."""

    @model_validator(mode="after")
    def _keeps_what_comes(self) -> "StageSettings":
        beyond = [epoch for epoch in self.keep_epochs if epoch > self.epochs]
        if beyond:
            raise ValueError(f"`keep_epochs` has {beyond[0]}, and the stage ends after {self.epochs}")
        return self


class FrozenSettings(StageSettings):
    """The head alone, on cached features of the frozen backbone."""

    epochs: int = Field(80, ge=1)
    lr: float = Field(2e-3, gt=0, allow_inf_nan=False)
    batch_size: int = Field(128, ge=1)
    views: int = Field(4, ge=1)
    """Versions of each training photo whose features are cached: 1 as it is, 2 its mirror image too,
    more: randomly augmented ones. One is drawn per epoch."""


class UnfrozenSettings(StageSettings):
    """Everything, from the frozen stage's best epoch; BatchNorm statistics stay frozen."""

    epochs: int = Field(30, ge=1)
    lr: float = Field(6e-4, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(0.05, ge=0)
    warmup_epochs: float = Field(1.0, ge=0)
    layer_decay: float = Field(0.5, gt=0, le=1)
    """Learning rate of each block as a share of that of the block above; the last block and the classifier have lr."""
    ema_decay: float | None = Field(0.99, gt=0, lt=1)
    appearance: bool = True
    """One random change of a photo's colours or sharpness in each epoch, as TrivialAugment makes them."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Photos that a worker computes at once; gradients of its share of a step are summed over them. By default all."""


class TrainSettings(Section):
    """A dataset → a run."""

    name: Name
    """Name of the run; the same name resumes it."""
    dataset: Name = "v2"
    """Dataset to train on."""
    parent: Parent = "imagenet"
    """`imagenet` or `imagenet-v2` (torchvision's), `sample` (in the package), the URI of weights, or a run under
    the same root, with its classifier: `exp_002@12` (an epoch of its last stage), `exp_002@best`, `exp_002@last`."""
    parent_sha256: Sha256 | None = None
    """Checked before the weights are opened; required for http(s)."""
    model: ModelSettings = ModelSettings()
    augmentation: AugmentationSettings = AugmentationSettings()
    frozen: FrozenSettings | None = FrozenSettings()
    """null skips the stage."""
    unfrozen: UnfrozenSettings | None = UnfrozenSettings()
    """null skips the stage."""
    num_workers: Annotated[int | tuple[int, int], BeforeValidator(_workers)] = 1
    """Training processes, one per GPU where GPUs are used; [fewest, most]: as many as there is room for at the time."""
    use_gpu: bool | None = None
    """true, false, or by default: when the cluster has one."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 autocast, or float32 throughout."""
    checkpoint_steps: int = Field(100, ge=1)
    """Steps between checkpoints to go on from, which are written while training goes on; the two latest are kept."""
    keep_checkpoints: int = Field(2, ge=1)
    """Epochs whose weights are kept, the best by val accuracy."""
    seed: int = Field(123, ge=0)
    """Decides initial weights, order, augmentation and dropout."""

    @model_validator(mode="after")
    def _some_stage(self) -> "TrainSettings":
        if self.frozen is None and self.unfrozen is None:
            raise ValueError("`frozen` and `unfrozen` are both null: nothing would be trained; keep one")
        return self

    @model_validator(mode="after")
    def _keeps_what_is_used(self) -> "TrainSettings":
        if self.unfrozen is not None and self.frozen is not None and self.frozen.keep_epochs:
            raise ValueError("`frozen.keep_epochs` has no effect: other runs start from the last stage, `unfrozen`")
        return self

    @property
    def workers(self) -> tuple[int, int]:
        """The fewest and the most workers."""
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)


class EvaluateSettings(Section):
    """A run and a dataset → a report."""

    run: Name | None = None
    """Run to judge; in a pipeline, the one just trained."""
    dataset: Name | None = None
    """Dataset whose photos are classified; by default the one the run was trained on."""
    split: Literal["test", "val"] = "test"
    """Split to classify; choices are made on val, test is for the end."""
    batch_size: int = Field(64, ge=1)
    """Photos per forward pass."""


class PredictSettings(Section):
    """Photos and a run → predictions."""

    run: Name | None = None
    """Run whose network classifies the photos."""
    photos: Uri
    """Folder, s3:// prefix or .tgz/.tar archive of photos."""
    name: Name = "predictions"
    """Name of the result, below the run's folder; the same name resumes it."""
    threshold: Share = 0.0
    """Photos whose calibrated probability is below it are marked as rejected."""
    detector_weights: Uri | None = None
    """Where the weights are that the run's dataset was masked with; by default where they were then."""
    batch_size: int = Field(64, ge=1)
    """Photos per forward pass of the classifier."""
    part_rows: int = Field(64, ge=1)
    """Photos per Parquet file, and so between two reports of progress."""


class Config(Section):
    """A config file: where results live, and one section per job."""

    root: Uri
    """Folder or s3:// prefix for datasets and experiments."""
    ingest: IngestSettings | None = None
    mask: MaskSettings | None = None
    train: TrainSettings | None = None
    evaluate: EvaluateSettings = EvaluateSettings()
    predict: PredictSettings | None = None
    compare_unmasked: bool = False
    """The pipeline also trains on the unmasked dataset with the same settings, to show what masking gave."""


def with_changes(settings: TrainSettings, changes: dict[str, Any], *, source: str, base: Path) -> TrainSettings:
    """A run's settings with some others, by dotted keys that begin with `train.`; UserError when they don't fit.

    source: what asks for them; base: folder of relative paths.
    """
    values: dict[str, Any] = {"root": ".", "train": settings.model_dump(mode="json")}
    for key, value in changes.items():
        yaml_file.set_key(values, key, value)
    found = validate(values, Config, source=source, base=base).train
    assert found is not None
    return found
