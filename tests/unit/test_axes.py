"""Labels of charts: names are shortened to the width that there is."""

import pytest

from carclass.reporting.axes import fit_text


@pytest.mark.parametrize(
    ("name", "length", "label"),
    [
        ("Aster Corva", 11, "Aster Corva"),
        ("Aster Corva Sedan", 11, "Aster…Sedan"),
        ("日本の車", 8, "日本の車"),
        ("日本の自動車", 8, "日本…車"),
        ("日本の車", 4, "日…"),
        ("", 3, ""),
    ],
)
def test_a_name_fits_its_width(name, length, label):
    assert fit_text(name, length) == label
