"""Assignment of labels to photos, in SQL on the inventory.

A label names a photo by its key. Labels that name none are compared by the rules in RULES, from strict to loose; each
assigns a label only if a single photo fits.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from carclass.data.inventory import Inventory
from carclass.data.quarantine import Reason
from carclass.errors import UserError
from carclass.ingestion import names
from carclass.ingestion.labels import Label, describe

log = logging.getLogger(__name__)
MAX_LISTED = 5


class Rule(NamedTuple):
    """Comparison of the names of labels with the keys of photos.

    form: function that is applied to both; see `names`. join: condition on their reversed forms. is_loose: considers
    only photos that have no label yet, and assigns none for which two labels differ.
    """

    text: str
    form: str
    join: str
    is_loose: bool = True


SAME, LOCATED = "photo.path = label.path", "photo.path = label.located"
TAIL = "photo.path >= label.path AND photo.path < substr(label.path, 1, length(label.path) - 1) || '0'"
WITHIN = "label.path >= photo.path AND label.path < substr(photo.path, 1, length(photo.path) - 1) || '0'"
"""A path is the end of another one if that, reversed, lies in a range of reversed paths, as '0' follows '/'."""
RULES = (
    Rule("the path, normalised", "normalise_path", SAME, is_loose=False),
    Rule("the path below `ingest.photos`", "normalise_path", LOCATED, is_loose=False),
    Rule("the end of the photo's path", "normalise_path", TAIL, is_loose=False),
    Rule("the end of the label's path", "normalise_path", WITHIN),
    *(
        Rule(f"{end}, ignoring {ignored}", form, join)
        for form, ignored in (
            ("fold_case", "upper and lower case"),
            ("remove_suffix", "case and the ending"),
            ("remove_zeros", "the ending and leading zeros"),
        )
        for end, join in (("the end of the photo's path", TAIL), ("the end of the label's path", WITHIN))
    ),
)
OPEN_LABELS = """
CREATE TABLE open_label AS SELECT min(id) AS id, name, 0 AS photos, NULL AS hint FROM labels GROUP BY name ORDER BY 1;
CREATE UNIQUE INDEX open_label_id ON open_label (id);
CREATE TABLE matches (photo INTEGER, label_id INTEGER);
CREATE INDEX matches_photo ON matches (photo);
INSERT INTO matches SELECT input.id, open_label.id FROM open_label CROSS JOIN input ON input.key = open_label.name;
DELETE FROM open_label WHERE id IN (SELECT label_id FROM matches)
"""
"""open_label: labels without a photo, with the number of photos that fit, or a hint. matches: photos of labels."""
FORMS = """
DROP TABLE IF EXISTS label_path;
DROP TABLE IF EXISTS photo_path;
CREATE TABLE label_path (id INTEGER PRIMARY KEY, path TEXT, located TEXT);
CREATE TABLE photo_path (id INTEGER PRIMARY KEY, path TEXT, junk INTEGER);
INSERT INTO label_path
SELECT id, reversed_{form}(name) AS path, reversed_located(name) AS located FROM open_label ORDER BY id;
INSERT INTO photo_path
SELECT id, reversed_{form}(key) AS path, is_junk(key) AS junk FROM input AS photo WHERE {photos} ORDER BY id;
CREATE INDEX label_path_path ON label_path (path);
CREATE INDEX photo_path_path ON photo_path (path)
"""
CANDIDATES = """
DROP TABLE IF EXISTS candidate;
CREATE TABLE candidate AS
WITH pair AS (
    SELECT label.id AS label_id, photo.id AS photo, junk,
    rank() OVER (PARTITION BY label.id ORDER BY junk, length(photo.path) * {longest} DESC) AS place
    FROM {tables} ON {join} WHERE {photos}
)
SELECT label_id, min(photo) AS photo, count(*) AS photos FROM pair WHERE place = 1 GROUP BY label_id
"""
"""The photo that fits a label, and the number of those that fit equally well: junk fits less than other files."""
UNLABELLED = "NOT EXISTS (SELECT 1 FROM matches WHERE matches.photo = photo.id)"
DISPUTED = """
CREATE TABLE disputed AS SELECT photo FROM candidate JOIN labels ON labels.id = label_id WHERE photos = 1
GROUP BY photo HAVING count(DISTINCT label) > 1 OR count(DISTINCT subset) > 1;
UPDATE open_label SET hint = 'ambiguous: other labels fit ' || key || ' as well' FROM candidate
JOIN input ON input.id = photo WHERE label_id = open_label.id AND candidate.photos = 1
AND photo IN (SELECT photo FROM disputed);
DELETE FROM candidate WHERE photos = 1 AND photo IN (SELECT photo FROM disputed);
DROP TABLE disputed
"""
MISPLACED = """
CREATE TABLE placed AS
SELECT label_id, folder(name) AS folder, length(label_path.path) - length(photo_path.path) AS removed
FROM candidate CROSS JOIN labels ON labels.id = label_id CROSS JOIN label_path ON label_path.id = label_id
CROSS JOIN photo_path ON photo_path.id = photo;
CREATE TABLE least AS SELECT folder, min(removed) AS removed FROM placed GROUP BY folder;
CREATE INDEX least_folder ON least (folder);
DELETE FROM candidate WHERE label_id IN (
    SELECT label_id FROM placed CROSS JOIN least ON least.folder = placed.folder WHERE placed.removed > least.removed
    OR placed.folder IN (SELECT folder(name) FROM matches JOIN labels ON labels.id = label_id)
);
DROP TABLE placed;
DROP TABLE least
"""
"""A folder of labels is a folder of photos: if others in it name photos there, its labels name no photos above it."""
MATCHED = """
SELECT count(*) OVER (), name, key FROM candidate JOIN labels ON labels.id = label_id JOIN input ON input.id = photo
WHERE photos = 1 ORDER BY label_id LIMIT 1
"""
ASSIGN = """
INSERT INTO matches SELECT photo, label_id FROM candidate WHERE photos = 1;
UPDATE open_label SET photos = candidate.photos FROM candidate WHERE candidate.label_id = id AND candidate.photos > 1;
DELETE FROM label_path WHERE id IN (SELECT label_id FROM candidate);
DELETE FROM open_label WHERE id IN (SELECT label_id FROM candidate WHERE photos = 1)
"""
REPEATED = """
INSERT INTO matches SELECT candidate.photo, label_id FROM candidate JOIN open_label ON open_label.id = label_id
JOIN input ON input.id = candidate.photo WHERE candidate.photos = 1
AND candidate.photo IN (SELECT photo FROM matches) AND image_suffix(name) IN ('', image_suffix(key));
DELETE FROM open_label WHERE id IN (SELECT label_id FROM matches);
UPDATE open_label SET hint = 'no such photo (could be ' || key || ', then write its complete name)' FROM candidate
JOIN input ON input.id = photo WHERE label_id = open_label.id AND candidate.photos = 1 AND hint IS NULL
AND photo NOT IN (SELECT photo FROM matches)
"""
"""Labels in another spelling of photos that have one, unless it is that of another file: `x.png` is not `x.jpg`."""
CONTRADICTIONS = """
WITH first AS (SELECT photo, min(label_id) AS label_id FROM matches GROUP BY photo HAVING count(*) > 1)
SELECT labels.name, labels.label, labels.subset, earlier.name, earlier.label, earlier.subset, input.key FROM first
JOIN labels AS earlier ON earlier.id = first.label_id JOIN matches ON matches.photo = first.photo
JOIN labels ON labels.id = matches.label_id JOIN input ON input.id = first.photo
WHERE labels.label != earlier.label OR labels.subset != earlier.subset ORDER BY labels.id
"""
ASSIGN_LABELS = f"""
UPDATE input SET label = labels.label, subset = labels.subset, photo_group = labels.photo_group
FROM matches JOIN labels ON labels.id = matches.label_id WHERE input.id = matches.photo;
INSERT INTO input (key, reason, detail) SELECT name, '{Reason.MISSING_FILE}',
CASE photos WHEN 0 THEN 'labelled ' || label || ', ' || coalesce(hint, 'no such photo')
ELSE photos || ' photos have this name' END
FROM open_label JOIN labels USING (id, name) ORDER BY id;
UPDATE input SET reason = '{Reason.JUNK}', detail = 'not a photo by its name'
WHERE label IS NULL AND reason IS NULL AND is_junk(key);
UPDATE input SET reason = '{Reason.NO_LABEL}', detail = 'no label names this photo'
WHERE label IS NULL AND reason IS NULL
"""  # noqa: S608 - constant
TABLES = ("matches", "candidate", "label_path", "photo_path", "open_label", "labels")


def match_labels(inventory: Inventory, source: str) -> None:
    """Assign labels to photos by RULES, and log the rules that assigned any.

    Photos without a label and labels without a photo become rejected inputs. source: URI of the photos. Raise UserError
    if labels with different classes or subsets name the same photo.
    """
    for function in (names.normalise_path, names.fold_case, names.remove_suffix, names.remove_zeros):
        inventory.add_function(f"reversed_{function.__name__}", partial(_reverse, form=function))
    locate = partial(names.remove_prefix, prefixes=names.source_prefixes(source))
    inventory.add_function("reversed_located", partial(_reverse, form=locate))
    inventory.add_function("folder", lambda path: names.normalise_path(path).rpartition("/")[0])
    inventory.add_function("is_junk", names.is_junk)
    inventory.add_function("image_suffix", names.image_suffix)
    inventory.add_function("is_plain_number", names.is_plain_number)
    num_labels = inventory.scalar("SELECT count(*) FROM labels")
    _run(inventory, OPEN_LABELS)
    form = None
    for rule in RULES:
        if inventory.scalar("SELECT 1 FROM open_label WHERE photos = 0") is None:
            break
        if rule.form != form:
            form = rule.form
            _run(inventory, FORMS.format(form=form, photos=UNLABELLED if rule.is_loose else "TRUE"))
        if (matched := _apply_rule(inventory, rule)) is not None:
            count, name, key = matched
            example = f"{name!r} is the photo {key!r}"
            log.info("ingest: %s of %s labels matched by %s: %s", f"{count:,}", f"{num_labels:,}", rule.text, example)
    _find_repeated(inventory)
    _check_contradictions(inventory)
    _run(inventory, ASSIGN_LABELS)
    _run(inventory, ";".join(f"DROP TABLE IF EXISTS {table}" for table in TABLES))


def _apply_rule(inventory: Inventory, rule: Rule) -> tuple[int, str, str] | None:
    """Assign the labels that name a single photo by the rule, and return their number and the first with its photo."""
    if rule.form == "remove_zeros" and inventory.scalar("SELECT 1 FROM labels WHERE NOT is_plain_number(name)"):
        return None
    is_within = rule.join == WITHIN
    tables = ("photo_path AS photo", "label_path AS label")[:: 1 if is_within else -1]
    photos = UNLABELLED if rule.is_loose else "TRUE"
    _run(
        inventory,
        CANDIDATES.format(tables=" CROSS JOIN ".join(tables), join=rule.join, photos=photos, longest=int(is_within)),
    )
    if rule.is_loose:
        _run(inventory, DISPUTED)
    if is_within:
        _run(inventory, MISPLACED)
    if rule.form == "remove_zeros" and inventory.scalar("SELECT 1 FROM candidate WHERE photos > 1"):
        inventory.execute("DELETE FROM candidate")
    matched = next(inventory.query(MATCHED), None)
    _run(inventory, ASSIGN)
    return matched


def _find_repeated(inventory: Inventory) -> None:
    """Assign labels left over to photos that have another label, of which they are a spelling, or give them a hint."""
    if inventory.scalar("SELECT 1 FROM open_label WHERE photos = 0") is None:
        return
    _run(inventory, FORMS.format(form="remove_zeros", photos="TRUE"))
    tables = "label_path AS label CROSS JOIN photo_path AS photo"
    _run(inventory, CANDIDATES.format(tables=tables, join=TAIL, photos="TRUE", longest=0))
    inventory.execute("DELETE FROM candidate WHERE label_id IN (SELECT id FROM open_label WHERE photos > 0)")
    _run(inventory, REPEATED)


def _check_contradictions(inventory: Inventory) -> None:
    """Raise UserError if labels with different classes or subsets name the same photo."""
    problems, count = [], 0
    for count, row in enumerate(inventory.query(CONTRADICTIONS), start=1):
        name, label, subset, other_name, other_label, other_subset, key = row
        if count <= MAX_LISTED:
            one, other = Label(name, label, subset), Label(other_name, other_label, other_subset)
            problems.append(
                f"{name} is {describe(one, other)}, but the label {other_name} of the photo {key} is "
                f"{describe(other, one)}"
            )
    if problems:
        more = f"; and {count - MAX_LISTED:,} more" if count > MAX_LISTED else ""
        raise UserError(f"`ingest.labels`: {'; '.join(problems)}{more}. Keep the correct one of each.")


def _reverse(path: str, form: Callable[[str], str | None]) -> str | None:
    """Return the characters of a path's form reversed, with a slash appended: common ends become common prefixes."""
    formed = form(path)
    return None if formed is None else formed[::-1] + "/"


def _run(inventory: Inventory, statements: str) -> None:
    """Run statements separated by semicolons."""
    inventory.execute(*statements.split(";"))
