"""transformers T5Attention: bucketed relative position bias computed in the graph, unscaled scores."""

import torch
from torch import nn
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention

FEATURE = "t5-bucketed-relative-bias+no-scale"
EXPECT = "fuse"
HEAD_DIM, SEQ = 24, 50
CONFIG = T5Config(
    d_model=64,
    d_kv=HEAD_DIM,
    num_heads=4,
    num_layers=1,
    relative_attention_num_buckets=16,
    relative_attention_max_distance=40,
    attn_implementation="eager",
)


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        torch.manual_seed(0)
        self.attn = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
        self.eval()

    def forward(self, x):
        return self.attn(x)[0]


def get_init_inputs():
    return [CONFIG]


def get_inputs():
    torch.manual_seed(0)
    return [torch.randn(2, SEQ, 64)]
