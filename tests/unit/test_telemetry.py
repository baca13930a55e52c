"""What nodes cost and which are lost, from what Ray says of them."""

from typing import Any

import pytest

from carclass.cluster.telemetry import CostMeter, LostNodes, price_of


def node(name: str = "a", price: str | None = "3.6", alive: bool = True, reason: int = 0) -> dict[str, Any]:
    """As ray.nodes() lists it."""
    labels = {} if price is None else {"usd-per-hour": price}
    return {"NodeID": name, "Alive": alive, "DeathReason": reason, "Labels": labels}


@pytest.mark.parametrize(
    ("label", "price"), [("0.526", 0.526), ("2", 2.0), (None, None), ("cheap", None), ("inf", None)]
)
def test_a_price_is_a_label_that_is_a_number(label: str | None, price: float | None):
    assert price_of(node(price=label)) == price


def test_nodes_are_paid_while_they_are_there():
    bill = CostMeter()
    bill.add([node("a")], now=100)
    bill.add([node("a"), node("b")], now=1100)  # a alone: 1,000 s at 0.001 dollars
    bill.add([node("a", alive=False), node("b")], now=2100)  # both
    bill.add([node("a", alive=False), node("b", alive=False)], now=2600)  # b alone
    bill.add([], now=9999)
    assert bill.usd == pytest.approx(1 + 2 + 0.5)


def test_nodes_without_a_price_add_nothing():
    bill = CostMeter()
    for now in (0, 3600):
        bill.add([node("a"), node("b", price=None)], now)
    assert bill.usd == pytest.approx(3.6)


def test_a_cluster_where_no_node_has_a_price_has_no_bill():
    bill = CostMeter()
    bill.add([node(price=None)], now=0)
    assert not bill.is_known


def test_lost_nodes_are_those_that_nobody_ended():
    lost = LostNodes()
    lost.add([node("a"), node("b"), node("c"), node("d")])
    ended = {"a": 1, "b": 2, "c": 3, "d": 4}  # told to end, unexpectedly, preempted, idle
    assert lost.add([node(name, alive=False, reason=reason) for name, reason in ended.items()]) == {
        "unexpected": 1,
        "preempted": 1,
    }


def test_nodes_that_were_lost_before_a_job_are_not_its_own():
    lost, gone = LostNodes(), node("a", alive=False, reason=2)
    lost.add([gone])
    assert lost.add([gone, node("b", alive=False, reason=2)]) == {"unexpected": 1, "preempted": 0}
