"""The page of a mixture of experts that no report describes: trained or changed since."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle.page.origins import Kind, Origin, first_split, kinds_of
from upcycle.page.routing import Routing, read_routing
from upcycle.page.sites import Site, sites_of
from upcycle.targets.provenance_file import FILE, read_origins

UNKNOWN = (
    "There is no report.json here: the model was trained since its conversion, or upcycle did not "
    "convert it. So nothing is said of its distance from a dense model: `upcycle verify DENSE DIR` "
    "measures it, and `upcycle bench` the speed."
)


@dataclass(frozen=True)
class Mixture:
    """All that its page tells.

    Attributes:
        name: of the directory.
        told: sentences: what was done to it, or that nothing is known.
        layers: facts of each MoE layer, as `upcycle inspect --json` prints them.
        kinds, origin, sites: what the experts are made of, if ``provenance.json`` is there.
        routing: if it was traced.
    """

    name: str
    architecture: str
    is_own: bool
    dtype: str
    told: tuple[str, ...]
    layers: tuple[Mapping[str, Any], ...]
    kinds: tuple[Kind, ...] = ()
    origin: Origin | None = None
    sites: tuple[Site, ...] = ()
    routing: Routing | None = None


def read_mixture(directory: Path, found: Mapping[str, Any]) -> Mixture:
    """The contents of the page, with what `upcycle inspect` found of the model.

    Raises:
        UsageError: a file beside the model is damaged.
    """
    origins = read_origins(directory) or []
    where = str(directory / FILE)
    return Mixture(
        name=directory.absolute().name,
        architecture=found["architecture"],
        is_own=found["is_own"],
        dtype=found["dtype"],
        told=tuple(found["told"] or [UNKNOWN]),
        layers=tuple(found["layers"]),
        kinds=tuple(kinds_of(origins, where)),
        origin=first_split(origins),
        sites=sites_of(origins, where),
        routing=read_routing(directory),
    )
