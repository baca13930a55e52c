"""Checks of a pipeline's sections against each other, before anything else is imported."""

from carclass.config.schema import Config, TrainSettings
from carclass.errors import Problems, UserError


def check_sections(settings: Config) -> None:
    """Raise UserError, with all problems, if sections are missing or contradict each other."""
    problems = Problems()
    if settings.ingest is None or settings.train is None:
        raise UserError(
            "a pipeline needs the sections `ingest:` and `train:`; see jobs/experiments/sample.yml, or write such a "
            "file by `python jobs/init.py PHOTOS`."
        )
    problems.passes(check_evaluation, settings, settings.train)
    if settings.compare_unmasked and settings.train.dataset == settings.ingest.dataset:
        problems.add(
            f"`compare_unmasked` has no effect: `train.dataset` is {settings.train.dataset}, the unmasked dataset. "
            "Train on the masked one (`mask.dataset`), or leave `compare_unmasked` out."
        )
    if settings.mask is not None and settings.mask.dataset == settings.ingest.dataset:
        problems.add(
            f"`mask.dataset` is {settings.mask.dataset}, as `ingest.dataset` is. Give the masked dataset another name."
        )
    problems.raise_all()


def check_evaluation(settings: Config, run: TrainSettings) -> None:
    """Raise UserError if the run cannot be evaluated as set."""
    stage = settings.evaluate.stage
    if stage is not None and getattr(run, stage) is None:
        raise UserError(f"`evaluate.stage` is {stage}, but `train.{stage}` is null. Leave `evaluate.stage` out.")
    if settings.evaluate.dataset not in (None, run.dataset):
        raise UserError(
            f"`evaluate.dataset` is {settings.evaluate.dataset}, but a pipeline evaluates on the dataset it trains on, "
            f"{run.dataset}. Leave it out, and run jobs/evaluate.py on {settings.evaluate.dataset} afterwards."
        )


def pipeline_runs(settings: Config) -> list[TrainSettings]:
    """Return the runs of a pipeline."""
    assert settings.train is not None
    return [settings.train, *([unmasked_run(settings)] if settings.compare_unmasked else [])]


def unmasked_run(settings: Config) -> TrainSettings:
    """Return the settings of the run on the unmasked dataset."""
    assert settings.ingest is not None
    assert settings.train is not None
    changes = {"name": f"{settings.train.name}-unmasked", "dataset": settings.ingest.dataset}
    return settings.train.model_copy(update=changes)
