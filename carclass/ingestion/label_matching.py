"""Assignment of labels to photos, and detection of label conflicts and leakage, in SQL on the inventory."""

from collections.abc import Iterator
from typing import Any

from carclass.config.schema import IngestSettings
from carclass.data import quarantine
from carclass.data.inventory import Inventory
from carclass.data.quarantine import Reason
from carclass.errors import UserError
from carclass.ingestion import labels

MAX_LISTED_COPIES = 10
"""Copies named in the detail of a label conflict: a placeholder image may have thousands."""

INDEX_LABELS = "CREATE INDEX IF NOT EXISTS labels_reversed_path ON labels (reversed_path)"
CONTRADICTED_NAME = """
WITH first AS (SELECT reversed_path, min(id) AS id FROM labels GROUP BY reversed_path HAVING count(*) > 1)
SELECT labels.name FROM first JOIN labels AS earlier ON earlier.id = first.id
JOIN labels ON labels.reversed_path = first.reversed_path
WHERE labels.label != earlier.label OR labels.subset != earlier.subset ORDER BY labels.id LIMIT 1
"""
CANDIDATES = """
CREATE TABLE candidates AS SELECT min(labels.id) AS label_id, count(DISTINCT input.id) AS photos,
min(input.id) AS first_photo, max(CASE WHEN input.reversed_path = labels.reversed_path THEN input.id END) AS exact_photo
FROM labels LEFT JOIN input ON input.reversed_path >= labels.reversed_path
AND input.reversed_path < substr(labels.reversed_path, 1, length(labels.reversed_path) - 1) || '0'
GROUP BY labels.reversed_path
"""
"""Photos whose path ends with the name of a label: a range of reversed paths, as '0' follows '/'."""
MATCHES = """
CREATE TABLE matches AS SELECT coalesce(exact_photo, first_photo) AS photo, label_id FROM candidates
WHERE exact_photo NOT NULL OR photos = 1
"""
CONTRADICTIONS = """
WITH first AS (SELECT photo, min(label_id) AS label_id FROM matches GROUP BY photo HAVING count(*) > 1)
SELECT labels.name, labels.label, labels.subset, input.key, earlier.label, earlier.subset FROM first
JOIN labels AS earlier ON earlier.id = first.label_id JOIN matches ON matches.photo = first.photo
JOIN labels ON labels.id = matches.label_id JOIN input ON input.id = first.photo
WHERE labels.label != earlier.label OR labels.subset != earlier.subset ORDER BY labels.id LIMIT 1
"""
ASSIGN_LABELS = """
UPDATE input SET label = labels.label, subset = labels.subset
FROM matches JOIN labels ON labels.id = matches.label_id WHERE input.id = matches.photo
"""
REJECT_LABELS = f"""
INSERT INTO input (key, reversed_path, reason, detail) SELECT name, reversed_path, '{Reason.MISSING_FILE}',
CASE photos WHEN 0 THEN 'labelled ' || label || ', no such photo' ELSE photos || ' photos have this name' END
FROM candidates JOIN labels ON labels.id = candidates.label_id
WHERE exact_photo IS NULL AND photos != 1 ORDER BY labels.id
"""  # noqa: S608 - constant
REJECT_UNLABELLED = f"""
UPDATE input SET reason = '{Reason.NO_LABEL}', detail = 'no label names this photo'
WHERE label IS NULL AND reason IS NULL
"""  # noqa: S608 - constant
LEAKS = f"""
WITH conflicts AS (
    SELECT image, min(CASE split WHEN 'test' THEN key END) AS test_key,
    count(DISTINCT CASE WHEN split != 'test' THEN label END) AS labels, count(*) AS copies
    FROM written WHERE NOT quarantined GROUP BY image HAVING copies > 1 AND (test_key NOT NULL OR labels > 1)
)
SELECT image, key, test_key, copies - 1, (
    SELECT group_concat(key, ', ') FROM (
        SELECT key FROM written AS other WHERE other.image = row.image AND other.key != row.key AND NOT quarantined
        ORDER BY key LIMIT {MAX_LISTED_COPIES}
    )
) FROM conflicts JOIN written AS row USING (image) WHERE split != 'test' AND NOT quarantined ORDER BY image, key
"""  # noqa: S608 - constant


def label_photos(settings: IngestSettings, inventory: Inventory) -> None:
    """Read labels and assign them to the inventory's photos. Raise UserError if two labels contradict each other."""
    inventory.add_labels(label for _, label in labels.read_labels(settings, inventory))
    if (name := find_contradicted_name(inventory)) is not None:
        labels.raise_contradiction(labels.read_labels(settings, inventory), name)
    match_labels(inventory)


def find_contradicted_name(inventory: Inventory) -> str | None:
    """Return the first name that has labels with different classes or subsets, or None."""
    inventory.execute(INDEX_LABELS)
    name: str | None = inventory.scalar(CONTRADICTED_NAME)
    return name


def match_labels(inventory: Inventory) -> None:
    """Assign labels to photos. A label's name is a photo's key, or the end of exactly one key's path.

    Photos without a label and labels without a photo become rejected inputs. Raise UserError if labels with different
    classes or subsets match the same photo.
    """
    inventory.execute(INDEX_LABELS, "CREATE INDEX input_reversed_path ON input (reversed_path)", CANDIDATES, MATCHES)
    inventory.execute("CREATE INDEX matches_photo ON matches (photo)")
    for name, label, subset, key, other_label, other_subset in inventory.query(CONTRADICTIONS):
        raise UserError(
            f"`ingest.labels`: {name} is {label} ({subset}), but another label for the photo {key} is "
            f"{other_label} ({other_subset}). Keep the correct one."
        )
    inventory.execute(ASSIGN_LABELS, REJECT_LABELS, REJECT_UNLABELLED)
    inventory.execute("DROP TABLE candidates", "DROP TABLE matches", "DROP TABLE labels")
    inventory.execute("DROP INDEX input_reversed_path")


def find_leaks(inventory: Inventory) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (hash of the content, row of quarantine) of train and val photos that bias evaluation, copies adjacent.

    These are photos with the bytes of a test photo, or with the same bytes under two labels. Test photos stay.
    """
    inventory.execute("CREATE INDEX IF NOT EXISTS written_image ON written (image, key)")
    for image, key, test_key, num_copies, copies in inventory.query(LEAKS):
        if test_key is not None:
            yield image, quarantine.quarantine_row(key, Reason.LEAKAGE, f"same bytes as the test photo {test_key}")
        else:
            num_unlisted = num_copies - MAX_LISTED_COPIES
            more = f" and {num_unlisted:,} more" if num_unlisted > 0 else ""
            detail = f"same bytes as {copies}{more}, other label"
            yield image, quarantine.quarantine_row(key, Reason.LABEL_CONFLICT, detail)
