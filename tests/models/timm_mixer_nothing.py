"""timm mlp_mixer.MixerBlock: token and channel MLPs with LayerNorm, no attention."""

import torch
from timm.models.mlp_mixer import MixerBlock
from torch import nn

FEATURE = "mlp-mixer"
EXPECT = "nothing"
HEAD_DIM, SEQ = 0, 50


class Model(nn.Module):
    def __init__(self, dim):
        super().__init__()
        torch.manual_seed(0)
        self.block = MixerBlock(dim, seq_len=SEQ)
        for p in self.parameters():
            p.data.add_(torch.randn_like(p), alpha=0.1)
        self.eval()

    def forward(self, x):
        return self.block(x)


def get_init_inputs():
    return [48]


def get_inputs():
    torch.manual_seed(0)
    return [torch.randn(2, SEQ, 48)]
