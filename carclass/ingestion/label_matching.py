"""What is decided of all photos together, in SQL on the inventory: whose a label is, and which spoil a measurement."""

from collections.abc import Iterator
from typing import Any

from carclass.config.schema import IngestSettings
from carclass.data import publishing
from carclass.data.inventory import Inventory
from carclass.data.photo import Reason
from carclass.errors import UserError
from carclass.ingestion import labels
from carclass.ingestion.labels import read_labels

NUM_OTHERS = 10
"""Photos that the detail of a conflict names: of a placeholder there may be thousands."""

SAID_BACK = "CREATE INDEX IF NOT EXISTS said_back ON said (back)"
REPEATED = """
WITH first AS (SELECT back, min(id) AS id FROM said GROUP BY back HAVING count(*) > 1)
SELECT said.name FROM first JOIN said AS earlier ON earlier.id = first.id JOIN said ON said.back = first.back
WHERE said.label != earlier.label OR said.subset != earlier.subset ORDER BY said.id LIMIT 1
"""
FITS = """
CREATE TABLE fits AS SELECT min(said.id) AS said, count(DISTINCT input.id) AS photos, min(input.id) AS photo,
max(CASE WHEN input.back = said.back THEN input.id END) AS whole
FROM said LEFT JOIN input ON input.back >= said.back AND input.back < substr(said.back, 1, length(said.back) - 1) || '0'
GROUP BY said.back
"""
"""A name's photos: they lie in the range of paths that begin, read from their end, as it does ('0' follows '/')."""
NAMED = """
CREATE TABLE named AS SELECT coalesce(whole, photo) AS photo, said FROM fits WHERE whole NOT NULL OR photos = 1
"""
CONTRADICTION = """
WITH first AS (SELECT photo, min(said) AS said FROM named GROUP BY photo HAVING count(*) > 1)
SELECT said.name, said.label, said.subset, input.key, earlier.label, earlier.subset FROM first
JOIN said AS earlier ON earlier.id = first.said JOIN named ON named.photo = first.photo
JOIN said ON said.id = named.said JOIN input ON input.id = first.photo
WHERE said.label != earlier.label OR said.subset != earlier.subset ORDER BY said.id LIMIT 1
"""
LABELLED = """
UPDATE input SET label = said.label, subset = said.subset
FROM named JOIN said ON said.id = named.said WHERE input.id = named.photo
"""
LONE_LABELS = f"""
INSERT INTO input (key, back, reason, detail) SELECT name, back, '{Reason.MISSING_FILE}',
CASE photos WHEN 0 THEN 'labelled ' || label || ', no such photo' ELSE photos || ' photos have this name' END
FROM fits JOIN said ON said.id = fits.said WHERE whole IS NULL AND photos != 1 ORDER BY said.id
"""  # noqa: S608 - our own words
WITHOUT_LABEL = f"""
UPDATE input SET reason = '{Reason.NO_LABEL}', detail = 'no label names this photo'
WHERE label IS NULL AND reason IS NULL
"""  # noqa: S608 - our own words
LEAKS = f"""
WITH spoilt AS (
    SELECT image, min(CASE split WHEN 'test' THEN key END) AS tested,
    count(DISTINCT CASE WHEN split != 'test' THEN label END) AS labels, count(*) AS copies
    FROM written WHERE NOT quarantined GROUP BY image HAVING copies > 1 AND (tested NOT NULL OR labels > 1)
)
SELECT image, key, tested, copies - 1, (
    SELECT group_concat(key, ', ') FROM (
        SELECT key FROM written AS other WHERE other.image = row.image AND other.key != row.key AND NOT quarantined
        ORDER BY key LIMIT {NUM_OTHERS}
    )
) FROM spoilt JOIN written AS row USING (image) WHERE split != 'test' AND NOT quarantined ORDER BY image, key
"""  # noqa: S608 - our own words


def repeated_label(inventory: Inventory) -> str | None:
    """The first name of which labels say two different things, if there is one."""
    inventory.run(SAID_BACK)
    found: str | None = inventory.one(REPEATED)
    return found


def match_labels(inventory: Inventory) -> None:
    """Gives each photo its label: a label names a photo by its key, or by the end of exactly one key's path.

    Photos without a label and labels without a photo become inputs with a reason. UserError when two labels that say
    different things name one photo.
    """
    inventory.run(SAID_BACK, "CREATE INDEX input_back ON input (back)", FITS, NAMED)
    inventory.run("CREATE INDEX named_photo ON named (photo)")
    for name, label, subset, key, *earlier in inventory.ask(CONTRADICTION):
        raise UserError(
            f"`ingest.labels`: {name} is {label} ({subset}), but another label for the photo "
            f"{key} says {earlier[0]} ({earlier[1]}); keep the right one."
        )
    inventory.run(LABELLED, LONE_LABELS, WITHOUT_LABEL, "DROP TABLE fits", "DROP TABLE named", "DROP TABLE said")
    inventory.run("DROP INDEX input_back")


def find_leaks(inventory: Inventory) -> Iterator[tuple[str, dict[str, Any]]]:
    """(content's hash, row of quarantine) of each train photo that spoils a measurement, copies one after the other.

    These are photos whose bytes are also in test, or under two labels. Test photos are never touched.
    """
    inventory.run("CREATE INDEX IF NOT EXISTS written_image ON written (image, key)")
    for image, key, tested, num_others, others in inventory.ask(LEAKS):
        if tested is not None:
            yield image, publishing.quarantine_row(key, Reason.LEAKAGE, f"same bytes as the test photo {tested}")
        else:
            more = f" and {num_others - NUM_OTHERS:,} more" if num_others > NUM_OTHERS else ""
            detail = f"same bytes as {others}{more}, other label"
            yield image, publishing.quarantine_row(key, Reason.LABEL_CONFLICT, detail)


def label_photos(settings: IngestSettings, inventory: Inventory) -> None:
    """Gives the inventory's photos their labels; UserError when two say different things of one photo."""
    inventory.add_labels(label for _, label in read_labels(settings, inventory))
    if (name := repeated_label(inventory)) is not None:
        labels.refuse_contradiction(read_labels(settings, inventory), name)
    match_labels(inventory)
