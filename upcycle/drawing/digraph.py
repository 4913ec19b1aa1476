"""The type of a graph whose nodes have names."""

from typing import TYPE_CHECKING

import networkx as nx

if TYPE_CHECKING:
    DiGraph = nx.DiGraph[str]
else:  # in networkx itself it takes no argument
    DiGraph = nx.DiGraph
