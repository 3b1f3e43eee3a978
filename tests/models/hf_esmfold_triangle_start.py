"""transformers EsmFoldTriangleAttention (starting node): pair-biased, gated row attention over a [N,N,C] pair tensor."""

import torch
from torch import nn
from transformers.models.esm.modeling_esmfold import EsmFoldTriangleAttention

FEATURE = "triangle-attention-starting+gating"
EXPECT = "fuse"
HEAD_DIM, SEQ = 16, 33


class Model(nn.Module):
    def __init__(self, channels, head_dim, heads):
        super().__init__()
        torch.manual_seed(0)
        self.attn = EsmFoldTriangleAttention(channels, head_dim, heads, starting=True)
        for p in self.parameters():
            p.data.copy_(torch.randn_like(p) * 0.2)
        self.eval()

    def forward(self, pair, mask):
        return self.attn(pair, mask=mask)


def get_init_inputs():
    return [32, HEAD_DIM, 2]


def get_inputs():
    torch.manual_seed(0)
    mask = torch.ones(1, SEQ, SEQ)
    mask[:, :, 28:] = 0
    return [torch.randn(1, SEQ, SEQ, 32), mask]
