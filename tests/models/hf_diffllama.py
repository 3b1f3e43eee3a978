"""transformers DiffLlamaAttention (eager): the difference of two head groups' attention with a learned lambda, group norm after."""

import torch
from torch import nn
from transformers import DiffLlamaConfig
from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention, DiffLlamaRotaryEmbedding

FEATURE = "differential-attention-lambda"
EXPECT = "fuse"
HEAD_DIM, SEQ = 16, 48
CONFIG = DiffLlamaConfig(
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=HEAD_DIM,
    num_hidden_layers=2,
    attn_implementation="eager",
)


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        torch.manual_seed(0)
        self.attn = DiffLlamaAttention(config, layer_idx=1)
        for p in self.parameters():
            p.data.add_(torch.randn_like(p), alpha=0.1)
        self.eval()

    def forward(self, x, cos, sin, mask):
        return self.attn(x, position_embeddings=(cos, sin), attention_mask=mask)[0]


def get_init_inputs():
    return [CONFIG]


def get_inputs():
    torch.manual_seed(0)
    x = torch.randn(1, SEQ, 64)
    cos, sin = DiffLlamaRotaryEmbedding(CONFIG)(x, torch.arange(SEQ)[None])
    mask = torch.full((SEQ, SEQ), torch.finfo(torch.float32).min).triu(1)[None, None]
    return [x, cos, sin, mask]
