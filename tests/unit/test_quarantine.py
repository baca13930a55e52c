"""Limit of the photos that are quarantined for reasons of storage or workers."""

import logging

import pytest

from carclass.data.quarantine import check_quarantined, log_counts
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


def test_the_log_has_the_counts_of_the_table(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "carclass")
    log_counts("ingest", {"inputs": 1200, "reasons": {"corrupt": 3, "missing_file": 1000}})
    log_counts("mask", {"inputs": 7, "reasons": {}})
    assert caplog.messages == [
        "ingest: 1,200 inputs, 1,003 quarantined (3 corrupt, 1,000 missing_file)",
        "mask: 7 inputs, 0 quarantined",
    ]


def test_faults_of_the_photos_themselves_are_not_limited():
    check_quarantined(facts(corrupt=60, no_label=40), 0.0, "ingest.max_quarantined")
