"""What was measured on two real models: the lines behind this model's point."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from pydantic import TypeAdapter

FILE = "measured.json"


@dataclass(frozen=True)
class Measured:
    """Points of one model.

    Attributes:
        model: as it is named on the command line.
        about: the model, what was measured, and on what.
        source: the page of the documentation with all figures.
        points: recipe -> FLOPs of all FFNs over the dense ones, and the quality.
    """

    model: str
    about: str
    source: str
    points: dict[str, tuple[tuple[float, float], ...]]


@cache
def measured() -> dict[str, Measured]:
    """For ``perplexity`` (over the dense model's, 1 is best) and ``cosine`` (to its outputs)."""
    text = files("upcycle.page").joinpath(FILE).read_text("utf-8")
    return TypeAdapter(dict[str, Measured]).validate_json(text)
