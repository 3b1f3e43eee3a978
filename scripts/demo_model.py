"""Attention as Gemma 2 does it: rotary positions, grouped queries, a sliding window, soft-capped scores.

Plain PyTorch, laid out as KernelBench lays out its problems: `Model`, `get_init_inputs()` and
`get_inputs()`. `scripts/demo` rewrites it.
"""

import torch
from torch import Tensor, nn

BATCH, SEQUENCE, HIDDEN = 1, 160, 256
HEADS, GROUPS, HEAD_DIM = 4, 2, 64
WINDOW, SOFTCAP = 64, 50.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x is [batch, heads, sequence, head_dim], cos and sin [sequence, head_dim]."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class Model(nn.Module):
    """Attention over the last `window` positions, `heads // groups` query heads to a key head."""

    def __init__(self, hidden: int, heads: int, groups: int, head_dim: int, window: int, softcap: float):
        super().__init__()
        self.heads, self.groups, self.head_dim = heads, groups, head_dim
        self.window, self.softcap = window, softcap
        self.q_proj = nn.Linear(hidden, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, groups * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, groups * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=False)
        self.register_buffer("inv_freq", 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x and the result are [batch, sequence, hidden]."""
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.groups, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.groups, self.head_dim).transpose(1, 2)

        position = torch.arange(length, device=x.device)
        angle = torch.cat([position[:, None] * self.inv_freq] * 2, dim=-1)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)

        k = k.repeat_interleave(self.heads // self.groups, dim=1)
        v = v.repeat_interleave(self.heads // self.groups, dim=1)

        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
        scores = torch.tanh(scores / self.softcap) * self.softcap
        distance = position[:, None] - position[None, :]
        visible = (distance >= 0) & (distance < self.window)
        scores = scores.masked_fill(~visible, float("-inf"))
        weights = torch.softmax(scores, dim=-1)
        return self.o_proj((weights @ v).transpose(1, 2).reshape(batch, length, -1))


def get_init_inputs() -> list:
    return [HIDDEN, HEADS, GROUPS, HEAD_DIM, WINDOW, SOFTCAP]


def get_inputs() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(BATCH, SEQUENCE, HIDDEN)]
