"""Limit of the photos that are quarantined for reasons of storage or workers."""

import pytest

from carclass.data.quarantine import check_quarantined
from carclass.errors import UserError


def facts(**reasons: int) -> dict[str, object]:
    return {"inputs": 100, "reasons": reasons}


def test_more_photos_than_the_limit_are_refused_with_the_way_to_allow_them():
    with pytest.raises(
        UserError, match=r"8 of 100 photos .*\(5 unreadable, 3 crashed\).*`mask.max_quarantined` to 0.08"
    ):
        check_quarantined(facts(unreadable=5, crashed=3), 0.05, "mask.max_quarantined")


@pytest.mark.parametrize("limit", [0.08, 1.0])
def test_the_share_that_the_message_names_is_enough(limit: float):
    check_quarantined(facts(unreadable=5, crashed=3), limit, "mask.max_quarantined")


def test_faults_of_the_photos_themselves_are_not_limited():
    check_quarantined(facts(corrupt=60, no_label=40), 0.0, "ingest.max_quarantined")
