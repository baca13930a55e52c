"""Settings of a search file: the sweep of jobs/tune.py."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from carclass.config.section import Name, Section, Uri

SCHEDULERS = ("asha", "hyperband", "median", "none")


class Range(Section):
    """Values of one varied setting: an interval from `min` to `max`, or `choices`."""

    min: float | None = None
    """Lowest value of the interval."""
    max: float | None = None
    """Highest value of the interval."""
    log: bool = False
    """Sample on a logarithmic scale."""
    choices: list[Any] | None = None
    """Values of a categorical setting."""

    @model_validator(mode="after")
    def _check_values(self) -> "Range":
        if (self.choices is None) == (self.min is None and self.max is None):
            raise ValueError("give either `min` and `max`, or `choices`")
        if self.choices is not None:
            if len({repr(choice) for choice in self.choices}) < max(2, len(self.choices)):
                raise ValueError("`choices` needs two or more values, each once")
            if self.log:
                raise ValueError("`log` applies to `min` and `max` only; `choices` are unordered")
        elif self.min is None or self.max is None or self.min >= self.max:
            raise ValueError("`min` must be below `max`, and both are required")
        elif self.log and self.min <= 0:
            raise ValueError("with `log`, `min` must be above 0")
        return self


def _check_scheduler(value: Any) -> Any:
    if str(value).lower() in ("pbt", "pb2", "population_based_training"):
        raise ValueError(
            "population-based training cannot exchange weights between Ray Train's workers and would silently be a "
            f"random search; choose one of {', '.join(SCHEDULERS)}"
        )
    return value


class Search(Section):
    """A search file."""

    removed: ClassVar[dict[str, str]] = {
        "train": "is a section of an experiment file, which --experiment names. Give a search file, such as "
        "jobs/experiments/searches/both.yml, by --config"
    }

    name: Name
    """Name of the sweep; the same name resumes it."""
    experiment: Uri
    """Experiment file whose `train:` section is varied."""
    root: Uri | None = None
    """Folder or s3:// prefix of the dataset and of the sweep's results; by default the experiment's root."""
    fixed: dict[str, Any] = Field({})
    """Changes to the experiment for all trials, by dotted key."""
    space: dict[str, Range] = Field(min_length=1)
    """Varied settings by dotted key: {min, max, log} or {choices}."""
    num_trials: int = Field(16, ge=1)
    """Number of sampled trials; trial 0, the unchanged experiment, is not counted."""
    sampler: Literal["tpe", "random"] = "tpe"
    """Optuna's tree-structured Parzen estimator, which learns from earlier trials, or random sampling."""
    scheduler: Annotated[Literal["asha", "hyperband", "median", "none"], BeforeValidator(_check_scheduler)] = "asha"
    """Early stopping: ASHA and HyperBand keep the best share of trials at growing intervals, `median` stops trials
    below the median of all, `none` trains every trial to its last epoch."""
    reduction_factor: int = Field(3, ge=2)
    """ASHA and HyperBand: one trial in this many continues, for this many times as many epochs."""
    min_epochs: int | None = Field(None, ge=1)
    """Epochs of the last stage before a trial may be stopped; by default a fifteenth of all its epochs.
    Not with `hyperband`, which sets its own."""
    num_seeds: int = Field(3, ge=1)
    """Seeds with which the best three settings and the unchanged experiment are trained, the first one included.

    The first chose the settings, so they are compared over the others: fewer than 3 allow no verdict.
    """
    devices_per_worker: float = Field(1.0, gt=0)
    """GPUs (CPUs if there are none) of each worker of a trial; with 0.25, four trials share a GPU."""
    max_concurrent_trials: int | None = Field(None, ge=1)
    """Largest number of concurrent trials; by default as many as fit the cluster."""
    seed: int = Field(123, ge=0)
    """Seed of the sampler; the seed of training is the experiment's."""

    @model_validator(mode="after")
    def _check_effect(self) -> "Search":
        unused = {"none": {"reduction_factor", "min_epochs"}, "median": {"reduction_factor"}}.get(self.scheduler, set())
        if without := sorted(unused & self.model_fields_set):
            raise ValueError(f"`{without[0]}` has no effect with `scheduler: {self.scheduler}`; leave it out")
        return self
