"""torch.nn.MultiheadAttention with need_weights=True: bmm path, weights averaged over heads, key padding mask."""

import torch
from torch import nn

FEATURE = "nn.MultiheadAttention+average-weights"
EXPECT = "fuse"
HEAD_DIM, SEQ = 16, 37


class Model(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        for p in self.parameters():
            p.data.add_(torch.randn_like(p), alpha=0.1)
        self.eval()

    def forward(self, x, padding):
        return self.attn(x, x, x, key_padding_mask=padding, need_weights=True)


def get_init_inputs():
    return [64, 4]


def get_inputs():
    torch.manual_seed(0)
    return [torch.randn(2, SEQ, 64), torch.arange(SEQ)[None] >= torch.tensor([[SEQ], [30]])]
