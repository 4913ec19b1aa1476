"""An expert is scored by how well a token points along its keys."""

from dataclasses import replace

import torch

from upcycle.passes.experts.method import DenseLayer, Parts
from upcycle.passes.routers.avg_key import AVG_KEY, keys, mean_of
from upcycle.passes.routers.method import linear


def centroid(dense: DenseLayer, parts: Parts) -> dict[str, torch.Tensor]:
    """Make each router row the mean of the expert's keys, each scaled to length one.

    The centre of the cluster that `experts.method: cluster` finds. The
    paper takes the centres nearest to the token scaled to length one; a linear router can take
    those of the largest inner product, which is the same for centres of one length.

    Source:
        Zhang et al., "MoEfication", 2021, https://arxiv.org/abs/2110.01786
    """
    key_EID = torch.nn.functional.normalize(keys(parts), dim=-1)
    return linear(mean_of(key_EID, parts), dense.spec)


CENTROID = replace(AVG_KEY, name="centroid", build=centroid, reads=frozenset(), limits=())
