"""timm VisionTransformer, depth 1 (sdpa): patch embedding, class token, layer scale, classifier head."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

FEATURE = "whole-model+sdpa+classifier"
EXPECT = "fuse"
HEAD_DIM, SEQ = 16, 50


class Model(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        torch.manual_seed(0)
        self.model = VisionTransformer(
            img_size=28,
            patch_size=4,
            embed_dim=dim,
            depth=1,
            num_heads=heads,
            mlp_ratio=2,
            num_classes=11,
            init_values=0.5,
        )
        for p in self.parameters():
            p.data.add_(torch.randn_like(p), alpha=0.1)
        self.eval()

    def forward(self, x):
        return self.model(x)


def get_init_inputs():
    return [64, 4]


def get_inputs():
    torch.manual_seed(0)
    return [torch.randn(2, 3, 28, 28)]
