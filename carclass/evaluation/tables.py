"""Tables of an evaluation for notebooks, as pandas data frames."""

from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from carclass.evaluation.collect import to_arrays
from carclass.evaluation.metrics import confusion_matrix

if TYPE_CHECKING:
    import pandas as pd


def classification_report(metrics: dict[str, Any]) -> "pd.DataFrame":
    """Return precision, recall, F1 and support of each class, then their averages. metrics: classification_metrics.

    A class without photos has no rates, but counts as 0 in the macro average.
    """
    import pandas as pd

    averages = [{"name": f"{kind} average", **metrics[f"{kind}_average"]} for kind in ("macro", "weighted")]
    table = pd.DataFrame([*metrics["per_class"], *averages]).set_index("name")
    table.loc[table["support"] == 0, ["precision", "recall", "f1"]] = float("nan")
    return table


def confusion_table(predictions: pa.Table, classes: list[str]) -> "pd.DataFrame":
    """Return the counts of photos: a row per true class, a column per predicted one. predictions: of predict_split."""
    import pandas as pd

    labels, probabilities = to_arrays(predictions, classes)
    counts = confusion_matrix(labels, probabilities.argmax(1), len(classes))
    return pd.DataFrame(counts, pd.Index(classes, name="label"), pd.Index(classes, name="predicted"))


def worst_mistakes(predictions: pa.Table, number: int) -> "pd.DataFrame":
    """Return the wrong predictions with the highest confidence: key, label, predicted, confidence."""
    wrong = predictions.filter(pc.not_equal(predictions["label"], predictions["predicted"]))
    rows = wrong.select(["key", "label", "predicted", "confidence"]).sort_by([("confidence", "descending")])
    frame: pd.DataFrame = rows.slice(0, number).to_pandas()
    return frame
