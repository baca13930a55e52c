"""Counts of a masked dataset, and the photos that its report shows, collected part by part in little memory."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from carclass import storage
from carclass.data import dataset
from carclass.masking.report import FLAGS, NUM_BINS, SMALL_AREA, histogram

log = logging.getLogger(__name__)
NUM_DOUBTFUL, NUM_EMPTY = 50, 15
"""Doubtful photos in the report, and those of them without a vehicle, as these are alike."""
DOUBT_COLUMNS = ("outcome", "score", "stability", "several_vehicles", "touches_border", "area_fraction")
COLUMNS = ("image_id", "key", "vehicle_class", *DOUBT_COLUMNS)
MEASURES = ("score", "area_fraction", "stability")
PLACE = pa.schema([("key", pa.string()), ("part", pa.string()), ("position", pa.int64())])
FIRST = pa.schema([dataset.ROW.field("image_id"), *PLACE])
RANKS = pa.schema([("doubt", pa.float64()), *PLACE])
WORST_FIRST = [("doubt", "descending"), ("key", "ascending")]
PARTS_PER_TASK = 512
Parts = Sequence[dataset.Part]
RunTasks = Callable[[Callable[[Parts], "Overview"], Iterable[Parts]], Iterable["Overview"]]


@dataclass
class Overview:
    """Counts and chosen photos of the rows added so far."""

    num_sheet: int
    """Photos to choose by content."""
    ious: Mapping[str, float]
    """IoU with the true mask by key, as far as known."""
    num_rows: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    classes: Counter[str] = field(default_factory=Counter)
    histograms: dict[str, np.ndarray] = field(default_factory=lambda: {name: _no_counts() for name in MEASURES})
    first: pa.Table = field(default_factory=FIRST.empty_table)
    vehicles: pa.Table = field(default_factory=RANKS.empty_table)
    empty: pa.Table = field(default_factory=RANKS.empty_table)

    def add(self, rows: pa.Table, part: str = "") -> None:
        """Add all rows of a part, with COLUMNS. part: its URI."""
        places = [rows["key"], pa.array([part] * len(rows), pa.string()), np.arange(len(rows))]
        ranks = pa.table([self._doubts(rows), *places], schema=RANKS)
        is_empty = pc.equal(rows["outcome"], "no_vehicle")
        self._count(
            len(rows),
            _count_values(rows["outcome"]),
            Counter({flag: pc.sum(rows[flag]).as_py() or 0 for flag in FLAGS}),
            _count_values(rows["vehicle_class"]),
            {name: np.array(histogram(rows[name].drop_null().to_numpy())) for name in MEASURES},
        )
        first = pa.table([rows["image_id"], *places], schema=FIRST)
        self._choose(first, ranks.filter(pc.invert(is_empty)), ranks.filter(is_empty))

    def merge(self, other: "Overview") -> None:
        """Add the rows of another overview with the same parameters."""
        self._count(other.num_rows, other.outcomes, other.flags, other.classes, other.histograms)
        self._choose(other.first, other.vehicles, other.empty)

    def _count(
        self,
        num_rows: int,
        outcomes: Counter[str],
        flags: Counter[str],
        classes: Counter[str],
        histograms: Mapping[str, np.ndarray],
    ) -> None:
        self.num_rows += num_rows
        self.outcomes.update(outcomes)
        self.flags.update(flags)
        self.classes.update(classes)
        for name, counts in histograms.items():
            self.histograms[name] += counts

    def _choose(self, first: pa.Table, vehicles: pa.Table, empty: pa.Table) -> None:
        self.first = _first(self.first, first, self.num_sheet, [("image_id", "ascending"), ("key", "ascending")])
        self.vehicles = _first(self.vehicles, vehicles, NUM_DOUBTFUL, WORST_FIRST)
        self.empty = _first(self.empty, empty, NUM_EMPTY, WORST_FIRST)

    def _doubts(self, rows: pa.Table) -> np.ndarray:
        """Return one minus the IoU where a true mask is known, else the doubt score: float64 (N,)."""
        doubts = doubt_scores(rows)
        for i, key in enumerate(rows["key"].to_pylist() if self.ious else ()):
            if key in self.ious:
                doubts[i] = 1 - self.ious[key]
        return doubts

    @property
    def sampled(self) -> list[str]:
        """Return the keys of the first photos in the order of their content's hash."""
        return list(self.first["key"].to_pylist())

    @property
    def doubtful(self) -> list[str]:
        """Return the keys of the most doubtful photos, worst first."""
        ranks = pa.concat_tables([self.vehicles, self.empty])
        return list(ranks.sort_by(WORST_FIRST)["key"].to_pylist()[:NUM_DOUBTFUL])

    @property
    def places(self) -> dict[str, dataset.Place]:
        """Return the places of the chosen photos by key."""
        tables = [table.select(PLACE.names) for table in (self.first, self.vehicles, self.empty)]
        rows = pa.concat_tables(tables).to_pylist()
        return {row["key"]: dataset.Place(row["part"], row["position"]) for row in rows}


def warn_of_small_vehicles(overview: Overview, sheet: str) -> None:
    """Warn if most photos have no vehicle, or one that covers less than SMALL_AREA. sheet: URI of the contact sheet."""
    small = int(overview.histograms["area_fraction"][: round(SMALL_AREA * NUM_BINS)].sum())
    empty = overview.outcomes["no_vehicle"]
    if small + empty > overview.num_rows / 2:
        log.warning(
            "mask: of %s photos, %s have no vehicle and %s one that covers less than %d %% of the photo. Look at %s "
            "before training on them: other weights or classes of `mask.detector` may fit these photos better.",
            *(f"{overview.num_rows:,}", f"{empty:,}", f"{small:,}", round(100 * SMALL_AREA), sheet),
        )


def read_overview(
    masked: dataset.Dataset, num_sheet: int, ious: Mapping[str, float], run_tasks: RunTasks = map
) -> Overview:
    """Return the overview of a masked dataset. Raise UserError if its rows are not all there.

    run_tasks: how to summarize PARTS_PER_TASK parts each, if there are more; not with true masks, as these are in
    memory.
    """
    summarize = partial(_summarize, num_sheet=num_sheet, ious=ious)
    parts = masked.parts
    chunks = [parts[i : i + PARTS_PER_TASK] for i in range(0, len(parts), PARTS_PER_TASK)]
    overview = Overview(num_sheet, ious)
    for other in (map if ious or len(chunks) == 1 else run_tasks)(summarize, chunks):
        overview.merge(other)
    masked.check_rows(overview.num_rows)
    return overview


def _summarize(parts: Parts, num_sheet: int, ious: Mapping[str, float]) -> Overview:
    overview = Overview(num_sheet, ious)
    tables = storage.in_parallel(lambda part: part.read(COLUMNS).replace_schema_metadata(), parts)
    for part, rows in zip(parts, tables, strict=True):
        overview.add(rows, part.uri)
    return overview


def doubt_scores(rows: pa.Table) -> np.ndarray:
    """Return the priority of photos for review, 0 to 1, float64 (N,); 1 without a vehicle. rows: with DOUBT_COLUMNS.

    It is one minus the product of factors of trust, treated as independent probabilities that the mask is right: score,
    stability, 0.6 if several vehicles are large, 0.9 if the vehicle touches the border, and the share of SMALL_AREA
    that it covers. Null, for values that a detector does not give, counts as 1.
    """
    several, border = (rows[name].fill_null(False).to_numpy() for name in ("several_vehicles", "touches_border"))
    trust = _factor(rows["score"]) * _factor(rows["stability"])
    trust *= np.where(several, 0.6, 1.0) * np.where(border, 0.9, 1.0)
    trust *= np.minimum(1.0, _factor(pc.divide(rows["area_fraction"].cast(pa.float64()), SMALL_AREA)))
    return np.where(pc.equal(rows["outcome"], "no_vehicle").to_numpy(), 1.0, 1.0 - trust)


def _factor(values: pa.ChunkedArray) -> np.ndarray:
    """Return a column as float64, null as 1."""
    factors: np.ndarray = values.cast(pa.float64()).fill_null(1.0).to_numpy()
    return factors


def _first(kept: pa.Table, added: pa.Table, number: int, order: list[tuple[str, str]]) -> pa.Table:
    """Return the first rows of both tables, sorted."""
    rows = pa.concat_tables([kept, added])
    return rows.take(pc.select_k_unstable(rows, number, order)).combine_chunks()


def _count_values(values: pa.ChunkedArray) -> Counter[str]:
    return Counter({row["values"]: row["counts"] for row in values.drop_null().value_counts().to_pylist()})


def _no_counts() -> np.ndarray:
    return np.zeros(NUM_BINS, np.int64)
