"""How the router is made, one method per file.

To add one: write its file, add it to `GATES` and its name to `upcycle.recipe.Router`.
"""

from typing import Final

from upcycle.passes.gates.avg_key import AVG_KEY
from upcycle.passes.gates.centroid import CENTROID
from upcycle.passes.gates.method import GateMethod
from upcycle.passes.gates.normal import NORMAL
from upcycle.passes.gates.ridge import RIDGE
from upcycle.passes.gates.virtual_group import VIRTUAL_GROUP

GATES: Final[dict[str, GateMethod]] = {
    "normal": NORMAL,
    "virtual_group": VIRTUAL_GROUP,
    "avg_key": AVG_KEY,
    "centroid": CENTROID,
    "ridge": RIDGE,
}

__all__ = ["GATES", "GateMethod"]
