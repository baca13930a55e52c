"""Detection of leakage and of label conflicts among photos with the same bytes, in SQL on the inventory."""

from collections.abc import Iterator
from typing import Any

from carclass.data import quarantine
from carclass.data.inventory import Inventory
from carclass.data.quarantine import Reason

MAX_LISTED_COPIES = 10
"""Copies named in the detail of a label conflict: a placeholder image may have thousands."""
LEAKS = f"""
WITH row AS (
    SELECT image, written.key, written.label, written.fingerprint, subset
    FROM written JOIN input ON input.key = written.key WHERE NOT quarantined
), conflicts AS (
    SELECT image, min(CASE subset WHEN 'test' THEN key END) AS test_key,
    min(CASE subset WHEN 'val' THEN key END) AS val_key,
    count(DISTINCT CASE WHEN subset != 'test' THEN label END) AS labels, count(*) AS copies
    FROM row GROUP BY image
    HAVING copies > 1 AND (test_key NOT NULL OR labels > 1 OR (val_key NOT NULL AND min(subset) = 'train'))
)
SELECT image, key, row.fingerprint, test_key, CASE WHEN labels = 1 THEN val_key END, copies - 1, (
    SELECT group_concat(key, ', ') FROM (
        SELECT key FROM written AS other WHERE other.image = row.image AND other.key != row.key AND NOT quarantined
        ORDER BY key LIMIT {MAX_LISTED_COPIES}
    )
) FROM conflicts JOIN row USING (image)
WHERE subset != 'test' AND (subset = 'train' OR test_key NOT NULL OR labels > 1) ORDER BY image, key
"""  # noqa: S608 - constant
TEST_CONFLICTS = """
SELECT min(key), max(key) FROM written WHERE split = 'test' AND NOT quarantined
GROUP BY image HAVING count(DISTINCT label) > 1 ORDER BY 1
"""


def find_leaks(inventory: Inventory) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield (hash of the content, row of quarantine) of train and val photos that bias evaluation, copies adjacent.

    These are photos with the bytes of a test photo, train photos with those of a val photo, or photos with the same
    bytes under two labels. Subsets are those of the source: what is held out from train is chosen afterwards.
    """
    inventory.execute("CREATE INDEX IF NOT EXISTS written_image ON written (image, key)")
    for image, key, fingerprint, test_key, val_key, num_copies, copies in inventory.query(LEAKS):
        if test_key is not None:
            reason, detail = Reason.LEAKAGE, f"same bytes as the test photo {test_key}"
        elif val_key is not None:
            reason, detail = Reason.LEAKAGE, f"same bytes as the val photo {val_key}"
        else:
            num_unlisted = num_copies - MAX_LISTED_COPIES
            more = f" and {num_unlisted:,} more" if num_unlisted > 0 else ""
            reason, detail = Reason.LABEL_CONFLICT, f"same bytes as {copies}{more}, other label"
        yield image, {**quarantine.quarantine_row(key, reason, detail, fingerprint), "image_id": image.hex()}


def find_test_conflicts(inventory: Inventory) -> Iterator[tuple[str, str]]:
    """Yield the first and last key of each group of test photos with the same bytes under two labels."""
    inventory.execute("CREATE INDEX IF NOT EXISTS written_image ON written (image, key)")
    return inventory.query(TEST_CONFLICTS)
