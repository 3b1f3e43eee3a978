"""transformers WhisperDecoderLayer (eager): masked self-attention, then cross attention from 37 to 50 positions."""

import torch
from torch import nn
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperDecoderLayer

FEATURE = "causal-self+cross-attention"
EXPECT = "fuse"
HEAD_DIM, SEQ = 24, 37
CONFIG = WhisperConfig(d_model=96, decoder_attention_heads=4, decoder_ffn_dim=96, attn_implementation="eager")


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        torch.manual_seed(0)
        self.layer = WhisperDecoderLayer(config, layer_idx=0)
        for p in self.parameters():
            p.data.add_(torch.randn_like(p), alpha=0.1)
        self.eval()

    def forward(self, x, mask, encoded):
        out = self.layer(x, attention_mask=mask, encoder_hidden_states=encoded, use_cache=False)
        return out[0] if isinstance(out, tuple) else out


def get_init_inputs():
    return [CONFIG]


def get_inputs():
    torch.manual_seed(0)
    mask = torch.full((SEQ, SEQ), torch.finfo(torch.float32).min).triu(1)[None, None]
    return [torch.randn(1, SEQ, 96), mask, torch.randn(1, 50, 96)]
