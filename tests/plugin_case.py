"""Packages that bring methods, as pip leaves them, and what the tests of plug-ins convert."""

import textwrap
from pathlib import Path

import torch
from click.testing import CliRunner, Result
from torch import nn

import upcycle
from upcycle.cli.main import main
from upcycle.passes.experts.split import deal
from upcycle.util.registry import installed

ROOT = Path(__file__).parents[1]
EXAMPLE = (ROOT / "CONTRIBUTING.md").read_text().split("```python\n")[1].split("```")[0]

DISTANCE = '''
"""A router of distances."""

import torch
from torch import nn

from upcycle.layers.config import RouterConfig
from upcycle.layers.router import Router


class DistanceRouter(Router):
    """Scores an expert by how near a token is to its centre."""

    def make(self, rows: int, d_model: int, config: RouterConfig) -> None:
        self.sharpness = config.options["sharpness"]
        self.centre = nn.Parameter(torch.zeros(rows, d_model))

    def scores(self, x_TD: torch.Tensor) -> torch.Tensor:
        apart_TED = x_TD[:, None] - self.centre.to(x_TD.dtype)
        return -self.sharpness * apart_TED.square().sum(-1)
'''
REGISTERED = """
import torch
import upcycle
from {home} import DistanceRouter

@upcycle.register_router("distance", makes=DistanceRouter, facts=lambda *_: {{"sharpness": 0.5}})
def distance(dense, parts):
    shape = dense.spec.num_experts, dense.d_model
    return {{"centre": torch.randn(shape, generator=dense.generator)}}
"""


def install(site: Path, package: str, points: str, **modules: str) -> None:
    """What pip leaves of a package."""
    about = site / f"{package}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(textwrap.dedent(points))
    for name, text in modules.items():
        (site / f"{name}.py").write_text(text.lstrip())
    installed.cache_clear()


def strided(site: Path) -> None:
    points = "[upcycle.experts]\nstrided = strided_experts\n"
    install(site, "strided-experts", points, strided_experts=EXAMPLE)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)).eval()


def backwards(dense: upcycle.DenseLayer) -> torch.Tensor:
    """The last neurons first."""
    order = torch.arange(dense.d_ff).flip(0)
    return deal(order, dense.spec.num_experts, dense.spec.width)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])
