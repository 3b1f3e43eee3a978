"""transformers LlamaAttention (eager): RoPE, grouped query heads 4/2, additive causal mask as an input."""

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

FEATURE = "rope+gqa+causal-mask"
EXPECT = "fuse"
HEAD_DIM, SEQ = 24, 50
B, H, HKV = 2, 4, 2
CONFIG = LlamaConfig(
    hidden_size=96, num_attention_heads=H, num_key_value_heads=HKV, head_dim=HEAD_DIM, attn_implementation="eager"
)


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        torch.manual_seed(0)
        self.attn = LlamaAttention(config, layer_idx=0)
        self.eval()

    def forward(self, x, cos, sin, mask):
        return self.attn(x, position_embeddings=(cos, sin), attention_mask=mask)[0]


def get_init_inputs():
    return [CONFIG]


def get_inputs():
    torch.manual_seed(0)
    x = torch.randn(B, SEQ, 96)
    cos, sin = LlamaRotaryEmbedding(CONFIG)(x, torch.arange(SEQ)[None])
    mask = torch.full((SEQ, SEQ), torch.finfo(torch.float32).min).triu(1)[None, None]
    return [x, cos, sin, mask]
