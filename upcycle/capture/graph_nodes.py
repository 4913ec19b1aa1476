"""A graph that is recorded: each value that it hands on is known by the name of its node.

A graph of `torch.export`, or of any tracer of torch.fx, is run like other Python code, so that one
recording has the shapes of this run, and the operations inside of the modules that the graph calls.
"""

import copy
import re
from pathlib import Path
from typing import Any

from torch import fx

from upcycle.capture.recorder import Recorder


def labelled(module: fx.GraphModule, recorder: Recorder) -> fx.GraphModule:
    """The same computation, with the same weights, that tells the recorder of its nodes.

    A recorded node has the names of the nodes that hold its tensor in ``meta["nodes"]``, and the
    path of the module that the graph says it comes from.
    """
    graph = copy.deepcopy(module.graph)
    for node in list(graph.nodes):
        if node.op == "output":
            continue
        with graph.inserting_before(node):
            if node.op not in ("placeholder", "get_attr"):
                graph.call_function(recorder.enter, (path_of(node), source_of(node)))
        with graph.inserting_after(node):
            if node.op != "get_attr":
                graph.call_function(recorder.label, (node, node.name))
    return fx.GraphModule(module, graph)


def source_of(node: fx.Node) -> str:
    """The ``file.py:line`` of the model that the node was made by, if the graph notes it."""
    lines = re.findall(r'File "([^"]*)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{Path(lines[-1][0]).name}:{lines[-1][1]}" if lines else ""


def path_of(node: fx.Node) -> str:
    """The innermost module that the node comes from, as `torch.export` and tracers note it."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    paths = [str(found[0]) for found in stack.values() if isinstance(found, tuple)]
    return re.sub(r"^L\['\w+'\]\.?", "", paths[-1]) if paths else ""  # as dynamo begins them
