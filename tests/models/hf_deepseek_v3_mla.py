"""transformers DeepseekV3Attention (eager): multi-head latent attention, 24-wide queries and keys but 16-wide values."""

import torch
from torch import nn
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

FEATURE = "mla-latent-kv+interleaved-rope+dq-ne-dv"
EXPECT = "fuse"
HEAD_DIM, SEQ = 24, 37
CONFIG = DeepseekV3Config(
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=32,
    kv_lora_rank=24,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=16,
    num_hidden_layers=1,
    attn_implementation="eager",
)


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        torch.manual_seed(0)
        self.attn = DeepseekV3Attention(config, layer_idx=0)
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
    cos, sin = DeepseekV3RotaryEmbedding(CONFIG)(x, torch.arange(SEQ)[None])
    mask = torch.full((SEQ, SEQ), torch.finfo(torch.float32).min).triu(1)[None, None]
    return [x, cos, sin, mask]
