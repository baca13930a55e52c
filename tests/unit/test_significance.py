"""Whether one classifier is better than another: McNemar's test and the paired bootstrap."""

from functools import partial
from itertools import product
from math import comb

import numpy as np
import pytest

from carclass.experiments.significance import compare, difference_interval, mcnemar


def make_answers(only_ours: int, only_theirs: int, both: int = 0, neither: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Photos by who gets them right: (ours, theirs), bool (N,) each."""
    counts = (only_ours, only_theirs, both, neither)
    return np.repeat([True, False, True, False], counts), np.repeat([False, True, True, False], counts)


def test_mcnemar_has_a_textbook_s_value():
    """Siegel and Castellan 1988: of 5 + 1 that change, 2 (1 + 6) / 64."""
    assert mcnemar(*make_answers(5, 1, 30, 4)) == pytest.approx(14 / 64)


@pytest.mark.parametrize(("only_ours", "only_theirs"), [*product(range(1, 6), repeat=2), (30, 12), (0, 10)])
def test_mcnemar_adds_up_the_binomial_s_tails(only_ours, only_theirs):
    total = only_ours + only_theirs
    tail = sum(comb(total, k) for k in range(min(only_ours, only_theirs) + 1)) / 2**total
    assert mcnemar(*make_answers(only_ours, only_theirs, 7, 3)) == pytest.approx(min(1.0, 2 * tail))


def test_mcnemar_of_classifiers_that_agree_everywhere_is_one():
    assert mcnemar(*make_answers(0, 0, 5, 5)) == 1.0


def test_mcnemar_is_the_same_in_both_directions():
    ours, theirs = make_answers(9, 2, 20, 5)
    assert mcnemar(ours, theirs) == mcnemar(theirs, ours)


def test_photos_on_which_both_agree_do_not_change_mcnemar():
    assert mcnemar(*make_answers(9, 2)) == mcnemar(*make_answers(9, 2, 500, 300))


def test_the_interval_is_that_of_resampled_photos():
    """Against the bootstrap as Efron has it, photo by photo."""
    ours, theirs = make_answers(60, 30, 200, 110)
    generator = np.random.default_rng(3)
    gains = ours.astype(int) - theirs.astype(int)
    resampled = [gains[generator.integers(0, 400, 400)].mean() for _ in range(10_000)]
    expected = np.percentile(resampled, (2.5, 97.5))
    assert difference_interval(ours, theirs, seed=1) == pytest.approx(expected, abs=0.004)


def test_the_interval_has_the_width_of_the_normal_approximation():
    ours, theirs = make_answers(300, 200, 3000, 1500)
    low, high = difference_interval(ours, theirs, seed=1)
    deviation = np.std(ours.astype(int) - theirs.astype(int)) / np.sqrt(5000)
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.05)


def test_the_interval_holds_the_truth_about_19_times_in_20():
    generator = np.random.default_rng(0)
    inside = 0
    for seed in range(400):
        answers = make_answers(*generator.multinomial(500, (0.12, 0.08, 0.6, 0.2)))
        low, high = difference_interval(*answers, seed=seed)
        inside += low <= 0.04 <= high
    assert 0.92 <= inside / 400 <= 0.98


def test_the_interval_of_equals_is_a_point():
    assert difference_interval(*make_answers(0, 0, 5, 5), seed=1) == (0.0, 0.0)


def test_the_interval_hangs_on_its_seed_alone():
    answers = make_answers(9, 2, 20, 5)
    assert difference_interval(*answers, seed=1) == difference_interval(*answers, seed=1)


def test_a_verdict_counts_the_photos_that_only_one_gets_right():
    verdict = compare(*make_answers(9, 2, 20, 5), seed=1)
    assert (verdict.only_ours, verdict.only_theirs, verdict.num_photos) == (9, 2, 36)


def test_a_verdict_s_difference_is_that_of_accuracies():
    ours, theirs = make_answers(9, 2, 20, 5)
    assert compare(ours, theirs, seed=1).difference == pytest.approx(ours.mean() - theirs.mean())


@pytest.mark.parametrize(
    ("only_ours", "only_theirs", "words"),
    [(90, 10, "better"), (10, 90, "worse"), (52, 48, "no clear difference"), (0, 0, "no clear difference")],
)
def test_a_verdict_says_whether_the_interval_leaves_out_zero(only_ours, only_theirs, words):
    assert compare(*make_answers(only_ours, only_theirs, 50, 50), seed=1).words == words


@pytest.mark.parametrize("function", [mcnemar, partial(compare, seed=1), partial(difference_interval, seed=1)])
@pytest.mark.parametrize(
    ("ours", "theirs", "sentence"),
    [
        (np.ones(3, bool), np.ones(4, bool), "ours holds 3 photos and theirs 4: pass the photos that both have"),
        (np.ones(0, bool), np.ones(0, bool), "no photos: there is nothing to compare"),
        (np.ones(3, int), np.ones(3, bool), r"ours must be bool of shape \(N,\), got int64"),
        (np.ones(3, bool), np.ones((3, 1), bool), r"theirs must be bool of shape \(N,\), got bool of \(3, 1\)"),
    ],
)
def test_what_can_t_be_compared_is_named(function, ours, theirs, sentence):
    with pytest.raises(ValueError, match=sentence):
        function(ours, theirs)
