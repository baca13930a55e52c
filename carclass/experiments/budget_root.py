"""The budget that a root belongs to: `<root>/experiments/budget.json`. Two budgets would replace each other's runs."""

from carclass import storage
from carclass.data import formats
from carclass.errors import UserError


def check_budget(root: str, budget: str) -> None:
    """Raise UserError if a root belongs to another budget. budget: name of its file, without suffix."""
    uri = _uri(root)
    try:
        owner = formats.read(uri, "budget")["budget"]
    except FileNotFoundError:  # a new root, or one of a former version
        return
    if owner != budget:
        raise UserError(
            f"{root} holds the experiments of the budget `{owner}`, which differ from those of `{budget}`. "
            f"Use `--budget {owner}`, or give `{budget}` a root of its own with `--root`. If the budget was renamed, "
            f"delete {uri}."
        )


def claim_root(root: str, budget: str) -> None:
    """Record the budget of a root. Raise UserError if it belongs to another one."""
    formats.create(_uri(root), "budget", {"budget": budget})
    check_budget(root, budget)


def _uri(root: str) -> str:
    return storage.join(root, "experiments", "budget.json")
