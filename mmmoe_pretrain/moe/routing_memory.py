"""Memory of a router across layers: how a token was routed before enters its routing here.

After the layerwise recurrent router (RMoE, arXiv 2408.06793): a gated recurrent unit runs over the MoE layers, token
by token. Its state s goes from layer to layer beside the hidden states (``models/block.py``), also to the next
pipeline stage:

    s_l = GRU(P x, s_{l-1})      logits_l = W x + U s_l

There logits are of s_l alone, and all layers share one unit; here the plain logits W x stay and U is 0 at the start,
so that training begins with the plain router, and each layer has a unit of its own, so that stages share no weights.

Shapes: n tokens, D hidden size, E router outputs, R size of the state.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RoutingMemory(nn.Module):
    """In fp32. ``read``: P, [R, D]. ``of_input``, ``of_state``: [3R, R] with biases, of the reset gate, the update
    gate and the new state, as ``torch.nn.GRUCell`` has them. ``logits``: U, [E, R]."""

    def __init__(self, hidden_size: int, size: int, outputs: int) -> None:
        super().__init__()
        self.size = size
        self.read = nn.Linear(hidden_size, size, bias=False)
        self.of_input = nn.Linear(size, 3 * size)
        self.of_state = nn.Linear(size, 3 * size)
        self.logits = nn.Linear(size, outputs, bias=False)

    def forward(self, x_nD: Tensor, state_nR: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to the logits, [n, E], and the new state, [n, R]."""
        reset, update, new = self.of_input(self.read(x_nD)).split(self.size, dim=-1)
        state_nR = state_nR.float()
        reset_by, update_by, new_by = self.of_state(state_nR).split(self.size, dim=-1)
        kept_nR = torch.sigmoid(update + update_by)
        new_nR = torch.tanh(new + torch.sigmoid(reset + reset_by) * new_by)
        state_nR = new_nR + kept_nR * (state_nR - new_nR)
        return self.logits(state_nR), state_nR


def flops(hidden_size: int, size: int, outputs: int) -> int:
    """A token, forward."""
    return 2 * (hidden_size * size + 6 * size**2 + size * outputs)
