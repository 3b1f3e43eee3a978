"""transformers GptOssAttention (eager): a learned sink logit per head is concatenated before the softmax and dropped after it."""

import torch
from torch import nn
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

FEATURE = "attention-sinks+gqa+sliding-mask"
EXPECT = "fuse"
HEAD_DIM, SEQ = 16, 50
CONFIG = GptOssConfig(
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=HEAD_DIM,
    num_hidden_layers=2,
    sliding_window=16,
    layer_types=["sliding_attention", "full_attention"],
    attn_implementation="eager",
)


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        torch.manual_seed(0)
        self.attn = GptOssAttention(config, layer_idx=0)
        for p in self.parameters():
            p.data.copy_(torch.randn_like(p) * 0.2)
        self.eval()

    def forward(self, x, cos, sin, mask):
        return self.attn(x, position_embeddings=(cos, sin), attention_mask=mask)[0]


def get_init_inputs():
    return [CONFIG]


def get_inputs():
    torch.manual_seed(0)
    x = torch.randn(2, SEQ, 64)
    cos, sin = GptOssRotaryEmbedding(CONFIG)(x, torch.arange(SEQ)[None])
    mask = torch.full((SEQ, SEQ), torch.finfo(torch.float32).min).triu(1)[None, None]
    return [x, cos, sin, mask]
