"""Heads that are put on an encoder while it is pretrained, and dropped afterwards."""

import itertools

from torch import nn


def projector(width: int, hidden: int, output: int, layers: int) -> nn.Sequential:
    """SimCLR's projection head: `layers` linear layers, batch norm after each, ReLU between.

    No bias where a batch norm follows, no ReLU after the last (arXiv:2002.05709; v2's deeper
    head: arXiv:2006.10029).
    """
    widths = [width, *[hidden] * (layers - 1), output]
    modules: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        modules += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs)]
        if index < layers - 1:
            modules.append(nn.ReLU(inplace=True))
    return nn.Sequential(*modules)
