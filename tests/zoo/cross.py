"""Cross-attention: queries from one sequence, keys and values from another of a different length."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import Program, Sizes, building
from .building import built, feed


class EncoderDecoderAttention(nn.Module):
    """Three projections, heads by view; query and memory have lengths of their own."""

    def __init__(self, hid_dim, n_heads):
        super().__init__()
        self.hid_dim = hid_dim
        self.n_heads = n_heads
        self.head_dim = hid_dim // n_heads
        self.fc_q = nn.Linear(hid_dim, hid_dim)
        self.fc_k = nn.Linear(hid_dim, hid_dim)
        self.fc_v = nn.Linear(hid_dim, hid_dim)
        self.fc_o = nn.Linear(hid_dim, hid_dim)
        self.scale = math.sqrt(self.head_dim)

    def forward(self, query, memory):
        batch_size = query.shape[0]
        Q = self.fc_q(query)
        K = self.fc_k(memory)
        V = self.fc_v(memory)
        Q = Q.view(batch_size, -1, self.n_heads, self.head_dim).permute(0, 2, 1, 3)
        K = K.view(batch_size, -1, self.n_heads, self.head_dim).permute(0, 2, 1, 3)
        V = V.view(batch_size, -1, self.n_heads, self.head_dim).permute(0, 2, 1, 3)
        energy = torch.matmul(Q, K.permute(0, 1, 3, 2)) / self.scale
        attention = torch.softmax(energy, dim=-1)
        x = torch.matmul(attention, V)
        x = x.permute(0, 2, 1, 3).contiguous()
        x = x.view(batch_size, -1, self.hid_dim)
        return self.fc_o(x)


class PerceiverResampler(nn.Module):
    """Learned latents attend to the input and to themselves: keys are a `cat` of both."""

    def __init__(self, dim, heads, num_latents=16):
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(dim, dim * 2, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        b = x.shape[0]
        latents = self.norm_latents(self.latents).unsqueeze(0).expand(b, -1, -1)
        q = self.to_q(latents)
        k, v = self.to_kv(torch.cat((self.norm_media(x), latents), dim=-2)).chunk(2, dim=-1)
        q, k, v = (t.reshape(b, t.shape[1], self.heads, -1).transpose(1, 2) for t in (q, k, v))
        sim = torch.einsum("... i d, ... j d -> ... i j", q * self.scale, k)
        sim = sim - sim.amax(dim=-1, keepdim=True).detach()
        attn = sim.softmax(dim=-1)
        out = torch.einsum("... i j, ... j d -> ... i d", attn, v)
        return self.to_out(out.transpose(1, 2).reshape(b, -1, q.shape[1] * q.shape[-1]))


class TextConditionedSDPA(nn.Module):
    """Text of another width conditions the image, by SDPA; head dim 80."""

    def __init__(self, query_dim, context_dim, heads, dim_head):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(query_dim, heads * dim_head, bias=False)
        self.to_k = nn.Linear(context_dim, heads * dim_head, bias=False)
        self.to_v = nn.Linear(context_dim, heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, query_dim)

    def forward(self, x, context):
        b, _, _ = x.shape
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (
            t.unsqueeze(3).reshape(b, t.shape[1], self.heads, -1).permute(0, 2, 1, 3).contiguous() for t in (q, k, v)
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0)
        return self.to_out(out.permute(0, 2, 1, 3).reshape(b, x.shape[1], -1))


class DecodeStep(nn.Module):
    """One new token against a cache of keys and values, by einsum."""

    def forward(self, q, k_cache, v_cache):
        # q: [B, H, 1, D]
        w = torch.einsum("bhqd,bhsd->bhqs", q, k_cache) * (1.0 / math.sqrt(q.shape[-1]))
        w = torch.softmax(w.float(), dim=-1).to(v_cache.dtype)
        return torch.einsum("bhqs,bhsd->bhqd", w, v_cache)


PROGRAMS = [
    Program(
        name="cross_encoder_decoder",
        family="cross",
        build=built(lambda dim, heads: EncoderDecoderAttention(dim, heads)),
        inputs=feed(building.tokens, building.memory),
        traced=Sizes(1, 19, 37),
        others=(Sizes(3, 50, 19), Sizes(2, 1, 67), Sizes(1, 37, 1)),
    ),
    Program(
        name="cross_latents",
        family="cross",
        build=built(lambda dim, heads: PerceiverResampler(dim, heads)),
        inputs=feed(building.memory),
        traced=Sizes(1, 16, 37),
        others=(Sizes(3, 16, 50), Sizes(2, 16, 1)),
        note="the number of queries, 16, is fixed",
    ),
    Program(
        name="cross_text_sdpa",
        family="cross",
        build=built(lambda dim, heads, head_dim=80: TextConditionedSDPA(dim, dim, heads, head_dim)),
        inputs=feed(building.tokens, building.memory),
        traced=Sizes(1, 37, 19),
        others=(Sizes(3, 19, 19), Sizes(2, 1, 50)),
        note="head dim 80",
    ),
    Program(
        name="cross_decode_step",
        family="cross",
        build=built(lambda dim, heads: DecodeStep()),
        inputs=feed(building.heads_first),
        traced=Sizes(1, 1, 37),
        others=(Sizes(3, 1, 67), Sizes(2, 1, 1)),
        note="traced with a single query",
    ),
]
