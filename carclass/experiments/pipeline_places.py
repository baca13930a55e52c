"""Check of the places that a pipeline reads and writes, before libraries are loaded, which takes seconds."""

from carclass.config.schema import Config
from carclass.data.root_check import check_root
from carclass.errors import Problems
from carclass.ingestion.labelling import check_labels_place
from carclass.ingestion.listing import check_place
from carclass.models.weights_place import check_weights_place
from carclass.runs.run import parse_parent


def check_places(settings: Config) -> None:
    """Raise UserError, with all problems, for a root, photos, labels or weights that certainly cannot be used."""
    problems = Problems()
    problems.passes(check_root, settings.root)
    if settings.ingest is not None and settings.ingest.photos != "sample":
        problems.passes(check_place, settings.ingest.photos, "ingest.photos")
        if settings.ingest.labels is not None:
            problems.passes(check_labels_place, settings.ingest.labels)
    if settings.train is not None and parse_parent(settings.train.parent) is None:
        problems.passes(check_weights_place, settings.train.parent, "train.parent")
    if settings.mask is not None:
        problems.passes(check_weights_place, settings.mask.detector.weights, "mask.detector.weights")
    problems.raise_all()
