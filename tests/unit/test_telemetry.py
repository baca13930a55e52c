"""Cost and losses of nodes from Ray's list of nodes."""

from typing import Any

import pytest

from carclass.cluster.telemetry import CostMeter, LostNodes, hourly_price


def node(name: str = "a", price: str | None = "3.6", alive: bool = True, reason: int = 0) -> dict[str, Any]:
    """Return an entry of ray.nodes()."""
    labels = {} if price is None else {"usd-per-hour": price}
    return {"NodeID": name, "Alive": alive, "DeathReason": reason, "Labels": labels}


@pytest.mark.parametrize(
    ("label", "price"), [("0.526", 0.526), ("2", 2.0), (None, None), ("cheap", None), ("inf", None)]
)
def test_a_price_is_a_label_that_is_a_number(label: str | None, price: float | None):
    assert hourly_price(node(price=label)) == price


def test_nodes_cost_while_they_are_alive():
    cost = CostMeter()
    cost.update([node("a")], now=100)
    cost.update([node("a"), node("b")], now=1100)  # a alone: 1,000 s at 0.001 dollars
    cost.update([node("a", alive=False), node("b")], now=2100)  # both
    cost.update([node("a", alive=False), node("b", alive=False)], now=2600)  # b alone
    cost.update([], now=9999)
    assert cost.usd == pytest.approx(1 + 2 + 0.5)


def test_nodes_without_a_price_add_nothing():
    cost = CostMeter()
    for now in (0, 3600):
        cost.update([node("a"), node("b", price=None)], now)
    assert cost.usd == pytest.approx(3.6)


def test_the_cost_is_unknown_if_no_node_has_a_price():
    cost = CostMeter()
    cost.update([node(price=None)], now=0)
    assert not cost.is_known


def test_only_unplanned_deaths_are_lost_nodes():
    lost = LostNodes()
    lost.update([node("a"), node("b"), node("c"), node("d")])
    ended = {"a": 1, "b": 2, "c": 3, "d": 4}  # planned, unexpected, preempted, idle
    assert lost.update([node(name, alive=False, reason=reason) for name, reason in ended.items()]) == {
        "unexpected": 1,
        "preempted": 1,
    }


def test_nodes_lost_before_the_job_are_not_counted():
    lost, dead = LostNodes(), node("a", alive=False, reason=2)
    lost.update([dead])
    assert lost.update([dead, node("b", alive=False, reason=2)]) == {"unexpected": 1, "preempted": 0}
