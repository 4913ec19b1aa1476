"""Small models whose graphs are drawn, and a stand-in for graphviz."""

import sys
from pathlib import Path
from typing import Any

import small_models
import torch
from torch import nn

t: Any = small_models.t
EVIL = '<script>alert("x")</script>\\N\'\x1b[31m\x00\u202e\ud800\uffff{{ 7 * 191 }}'


def llama() -> Any:
    """Five equal blocks: the last three repeat the second one."""
    return small_models.llama(num_hidden_layers=5)


def t5() -> Any:
    """Two stacks, whose first blocks are unlike the others."""
    config = t.T5Config(
        vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=5, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return t.T5ForConditionalGeneration(config)


def albert() -> Any:
    """One block that is called five times."""
    config = t.AlbertConfig(
        vocab_size=300, embedding_size=16, **(small_models.ENCODER | {"num_hidden_layers": 5})
    )
    return t.AlbertModel(config)


def fused() -> Any:
    """Gate and up are one matrix, in blocks that return several tensors."""
    config = t.Phi3Config(**(small_models.DECODER | {"num_hidden_layers": 5, "pad_token_id": 0}))
    return t.Phi3ForCausalLM(config)


class Block(nn.Module):
    """A residual FFN with its own activation and width."""

    def __init__(self, activation: nn.Module, hidden: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(16, hidden), activation, nn.Linear(hidden, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.ffn(x)
        return out


class InTurn(nn.Module):
    """Six blocks, of two kinds in turn, and a last one that is like none of them."""

    def __init__(self) -> None:
        super().__init__()
        kinds = [(nn.ReLU(), 32), (nn.GELU(), 48)] * 3
        self.blocks = nn.ModuleList(Block(*kind) for kind in kinds)
        self.last = Block(nn.SiLU(), 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.last(x)
        return out


class Refused(nn.Module):
    """Four places that look like FFNs: attention over memories."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(small_models.WithoutFFN() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Named(nn.Module):
    """An FFN and a refused place under a name that is no name."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module(EVIL, Block(nn.ReLU(), 32))
        self.add_module(f"{EVIL}2", small_models.WithoutFFN())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.children():
            x = module(x)
        return x


# It puts the boxes below each other in the order in which it reads them.
FAKE = r"""
import json, re, sys
text = sys.stdin.read()
objects, edges, y = [], [], 0.0
for line in text.splitlines():
    if found := re.match(r'(n\d+) \[width=([\d.]+), height=([\d.]+)\];$', line):
        height = 72 * float(found[3])
        objects.append({"name": found[1], "pos": f"300,{-y - height / 2}"})
        y += height + 20
    elif found := re.match(r'subgraph (cluster_\d+) \{$', line):
        objects.append({"name": found[1], "bb": "0,-900,600,0"})
for line in text.splitlines():
    if found := re.match(r'(n\d+) -> (n\d+);$', line):
        tail, head = ([o["name"] for o in objects].index(name) for name in found.groups())
        edges.append({"tail": tail, "head": head, "pos": "1,-2 3,-4e0 5,-6 7,-8"})
print(json.dumps({"bb": f"0,{-y},600,0", "objects": objects, "edges": edges}))
"""


def fake_dot(folder: Path, program: str = FAKE) -> Path:
    """A folder with a program ``dot``, written in Python."""
    folder.mkdir(exist_ok=True)
    (folder / "dot.py").write_text(program)
    (folder / "dot").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{folder}/dot.py"\n')
    (folder / "dot").chmod(0o755)
    return folder
