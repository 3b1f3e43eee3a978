"""transformers LlamaModel, one layer (eager): RoPE and the causal mask are computed inside the graph."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

FEATURE = "whole-model+in-graph-causal-mask"
EXPECT = "fuse"
HEAD_DIM, SEQ = 16, 37
CONFIG = LlamaConfig(
    vocab_size=101,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=HEAD_DIM,
    attn_implementation="eager",
)


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        torch.manual_seed(0)
        self.model = LlamaModel(config)
        for p in self.parameters():
            p.data.add_(torch.randn_like(p), alpha=0.1)
        self.eval()

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).last_hidden_state


def get_init_inputs():
    return [CONFIG]


def get_inputs():
    torch.manual_seed(0)
    return [torch.randint(0, 101, (2, SEQ))]
