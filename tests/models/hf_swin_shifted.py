"""transformers SwinLayer: shifted 4x4 windows, relative position bias table and the shift mask, roll and window partition around it."""

import torch
from torch import nn
from transformers import SwinConfig
from transformers.models.swin.modeling_swin import SwinLayer

FEATURE = "shifted-window+relative-bias"
EXPECT = "fuse"
HEAD_DIM, SEQ = 24, 16
CONFIG = SwinConfig(window_size=4, embed_dim=48, attn_implementation="eager")


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        torch.manual_seed(0)
        self.layer = SwinLayer(config, dim=48, input_resolution=(12, 8), num_heads=2, shift_size=2)
        for p in self.parameters():
            p.data.add_(torch.randn_like(p), alpha=0.2)
        self.eval()

    def forward(self, x):
        return self.layer(x, (12, 8))[0]


def get_init_inputs():
    return [CONFIG]


def get_inputs():
    torch.manual_seed(0)
    return [torch.randn(1, 96, 48)]
