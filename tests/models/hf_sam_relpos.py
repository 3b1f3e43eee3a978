"""transformers SamVisionAttention: decomposed height and width relative position terms, einsums added to the logits."""

import torch
from torch import nn
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionAttention

FEATURE = "decomposed-relative-position"
EXPECT = "fuse"
HEAD_DIM, SEQ = 32, 49
CONFIG = SamVisionConfig(hidden_size=64, num_attention_heads=2, image_size=56, patch_size=8, use_rel_pos=True)


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        torch.manual_seed(0)
        self.attn = SamVisionAttention(config, window_size=0)
        for p in self.parameters():
            p.data.add_(torch.randn_like(p), alpha=0.2)
        self.eval()

    def forward(self, x):
        return self.attn(x)[0]


def get_init_inputs():
    return [CONFIG]


def get_inputs():
    torch.manual_seed(0)
    return [torch.randn(1, 7, 7, 64)]
