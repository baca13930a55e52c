"""Settings of ingestion."""

import re
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from carclass.config.section import Name, ProperShare, Section, Share, Uri

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
"""Endings of tables of labels, in lower case."""
ColumnRole = Literal["name", "class", "subset"]
ColumnName = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


def group_pattern(text: str) -> re.Pattern[str] | None:
    """Return a text as a regular expression with one group, or None if it is not such."""
    try:
        pattern = re.compile(text)
    except re.error:
        return None
    return pattern if pattern.groups == 1 else None


class IngestSettings(Section):
    """Photos and labels → a dataset."""

    dataset: Name = "v1"
    """Name of the dataset to publish."""
    photos: Uri
    """Folder, s3:// prefix, tar or zip archive of photos, or a folder in an archive (`photos.tgz!/cars`); `sample`:
    drawn cars with their labels."""
    labels: Uri | None = None
    """Table (.csv, .tsv, .jsonl with img_name,class,subset) or folder of Stanford's devkit; by default the folder of a
    photo is its class."""
    columns: dict[ColumnRole, ColumnName] = Field({})
    """Other names of the table's columns, such as `{name: file, class: model, subset: split}`."""
    num_classes: int | None = Field(None, ge=2)
    """Expected number of classes; any other number is an error."""
    test_fraction: ProperShare = 0.2
    """Share of each class held out for test from the train subset, if the source has no test subset."""
    val_fraction: ProperShare = 0.2
    """Share of each class held out for validation from the train photos, if the source has no val subset."""
    group: str | None = Field(None, min_length=1)
    """Photos to keep in one split: the name of a column of `labels`, whose values are the groups, or a regular
    expression with one group in parentheses that is searched in the keys, such as `([^/]+)/[^/]+$` for folders."""
    corrections: Uri | None = None
    """Table of an audit (.csv), with an action for each wrong photo: `drop`, `relabel:CLASS` or `group:NAME`."""
    max_side: int | None = Field(800, ge=16)
    """Longest side of a stored photo in pixels; larger photos are shrunk."""
    quality: int = Field(92, ge=50, le=100)
    """JPEG quality of re-encoded photos; upright RGB JPEGs that are not shrunk keep their coded pixels."""
    keep_metadata: bool = False
    """Store the bytes of upright RGB JPEGs that are not shrunk as they are; by default EXIF with GPS, thumbnails,
    colour profiles and bytes after the image are removed."""
    min_side: int = Field(16, ge=1)
    """Photos with a shorter side in pixels, before or after shrinking, are quarantined."""
    max_pixels: int = Field(100_000_000, ge=1)
    """Photos with more pixels are quarantined without decoding (decompression bombs)."""
    max_quarantined: Share = 0.05
    """Largest share of photos in quarantine because they could not be read from storage or crashed their workers; with
    more, nothing is published."""
    part_rows: int = Field(256, ge=1)
    """Photos per Parquet file: about 25 MB, a few seconds of work."""
    seed: int = 123
    """Decides, together with the content, which photos are held out for test and validation; 123 as in the Keras
    project."""

    @model_validator(mode="after")
    def _check_settings(self) -> "IngestSettings":
        if self.photos == "sample" and self.labels is not None:
            raise ValueError("`photos: sample` includes its labels: leave `labels` out")
        is_table = self.labels is not None and self.labels.lower().endswith(TABLE_SUFFIXES)
        if self.columns and not is_table:
            raise ValueError("`columns` has no effect: `labels` is not a table. Leave it out")
        if self.group is not None and not is_table and group_pattern(self.group) is None:
            raise ValueError(
                f"`group` is {self.group!r}, but not a regular expression with one group in parentheses, and `labels` "
                "is not a table that could have such a column"
            )
        if self.max_side is not None and self.max_side < self.min_side:
            raise ValueError("`max_side` is below `min_side`: every photo would be quarantined as too small")
        return self
