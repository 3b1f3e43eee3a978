"""Softmax attention with no mask: the spellings of the two products, the softmax and the layouts."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import Program, Sizes, building
from .building import built, feed


class EinsumAttention(nn.Module):
    """Both products are einsums."""

    def forward(self, q, k, v):
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
        return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(dim=-1), v)


class StableSoftmaxByHand(nn.Module):
    """Softmax by hand: maximum subtracted, divided before the second product."""

    def forward(self, query, key, value):
        scale = query.size(-1) ** -0.5
        logits = torch.matmul(query * scale, key.transpose(-1, -2))
        logits = logits - logits.amax(dim=-1, keepdim=True)
        weights = torch.exp(logits)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return torch.matmul(weights, value)


class UnsafeSoftmaxLateDivision(nn.Module):
    """Softmax by hand without the maximum, divided after the second product."""

    def forward(self, q, k, v):
        e = (q @ k.mT * q.shape[-1] ** -0.5).exp()
        return (e @ v) / e.sum(-1, keepdim=True)


class StableSoftmaxLateDivision(nn.Module):
    """The maximum is subtracted, the division comes last, by a reciprocal."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        s = torch.einsum("...qd,...kd->...qk", q, k)
        s = s.mul(1.0 / math.sqrt(k.shape[-1]))
        m, _ = torch.max(s, dim=-1, keepdim=True)
        p = torch.exp(s - m)
        norm = torch.reciprocal(torch.sum(p, dim=-1, keepdim=True))
        return torch.einsum("...qk,...kd->...qd", p, v) * norm


class VisionAttention(nn.Module):
    """As in vision transformers: packed qkv by reshape, permute and unbind; `nn.Softmax` as a submodule."""

    def __init__(self, dim, num_heads=8, qkv_bias=True, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.softmax = nn.Softmax(dim=-1)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)

        q = q * self.scale
        attn = q @ k.transpose(-2, -1)
        attn = self.softmax(attn)
        attn = self.attn_drop(attn)

        x = (attn @ v).transpose(1, 2).reshape(B, N, C)
        x = self.proj(x)
        return self.proj_drop(x)


class ParameterEinsumAttention(nn.Module):
    """Heads stay last ([B, S, H, D]) and the projections are einsums with 3-D parameters, as in JAX code."""

    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        d_head = d_model // n_heads
        self.W_Q = nn.Parameter(torch.randn(n_heads, d_model, d_head) * d_model**-0.5)
        self.W_K = nn.Parameter(torch.randn(n_heads, d_model, d_head) * d_model**-0.5)
        self.W_V = nn.Parameter(torch.randn(n_heads, d_model, d_head) * d_model**-0.5)
        self.W_O = nn.Parameter(torch.randn(n_heads, d_head, d_model) * d_model**-0.5)
        self.b_Q = nn.Parameter(torch.zeros(n_heads, d_head))
        self.d_head = d_head

    def forward(self, resid):
        q = torch.einsum("b s m, n m h -> b s n h", resid, self.W_Q) + self.b_Q
        k = torch.einsum("b s m, n m h -> b s n h", resid, self.W_K)
        v = torch.einsum("b s m, n m h -> b s n h", resid, self.W_V)
        scores = torch.einsum("b i n h, b j n h -> b n i j", q, k) / self.d_head**0.5
        pattern = torch.softmax(scores, dim=-1)
        z = torch.einsum("b j n h, b n i j -> b i n h", v, pattern)
        return torch.einsum("b i n h, n h m -> b i m", z, self.W_O)


class SequenceFirstAttention(nn.Module):
    """[S, B, D] input; batch and heads merged by one view, so every product is a `bmm`."""

    def __init__(self, embed_dim, num_heads):
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.scaling = self.head_dim**-0.5
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, query):
        tgt_len, bsz, embed_dim = query.size()
        q = self.q_proj(query)
        k = self.k_proj(query)
        v = self.v_proj(query)
        q *= self.scaling

        q = q.contiguous().view(tgt_len, bsz * self.num_heads, self.head_dim).transpose(0, 1)
        k = k.contiguous().view(-1, bsz * self.num_heads, self.head_dim).transpose(0, 1)
        v = v.contiguous().view(-1, bsz * self.num_heads, self.head_dim).transpose(0, 1)

        attn_weights = torch.bmm(q, k.transpose(1, 2))
        attn_probs = F.softmax(attn_weights, dim=-1)
        attn = torch.bmm(attn_probs, v)
        attn = attn.transpose(0, 1).contiguous().view(tgt_len, bsz, embed_dim)
        return self.out_proj(attn)


class PlainMatrixAttention(nn.Module):
    """Matrices only: no batch, no heads."""

    def forward(self, Q, K, V):
        return torch.softmax(Q @ K.T / Q.shape[1] ** 0.5, dim=1) @ V


class SelfAttentionHead(nn.Module):
    """One head on [B, S, D], by `bmm`, with softmax over a positive dim."""

    def __init__(self, input_dim, head_dim):
        super().__init__()
        self.query = nn.Linear(input_dim, head_dim)
        self.key = nn.Linear(input_dim, head_dim)
        self.value = nn.Linear(input_dim, head_dim)
        self.sqrt_dim = math.sqrt(head_dim)

    def forward(self, x):
        queries, keys, values = self.query(x), self.key(x), self.value(x)
        score = torch.bmm(queries, keys.transpose(1, 2)) / self.sqrt_dim
        attention = F.softmax(score, dim=2)
        return torch.bmm(attention, values)


class DiffusionAttention(nn.Module):
    """Scores by `baddbmm` into an uninitialised tensor with beta=0; batch and heads merged by reshape."""

    def __init__(self, query_dim: int, heads: int = 8, dim_head: int = 40):
        super().__init__()
        inner_dim = dim_head * heads
        self.scale = dim_head**-0.5
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, query_dim), nn.Dropout(0.0)])

    def head_to_batch_dim(self, tensor):
        batch_size, seq_len, dim = tensor.shape
        tensor = tensor.reshape(batch_size, seq_len, self.heads, dim // self.heads)
        return tensor.permute(0, 2, 1, 3).reshape(batch_size * self.heads, seq_len, -1)

    def batch_to_head_dim(self, tensor):
        batch_size, seq_len, dim = tensor.shape
        tensor = tensor.reshape(batch_size // self.heads, self.heads, seq_len, dim)
        return tensor.permute(0, 2, 1, 3).reshape(batch_size // self.heads, seq_len, -1)

    def get_attention_scores(self, query, key):
        baddbmm_input = torch.empty(
            query.shape[0], query.shape[1], key.shape[1], dtype=query.dtype, device=query.device
        )
        attention_scores = torch.baddbmm(baddbmm_input, query, key.transpose(-1, -2), beta=0, alpha=self.scale)
        attention_probs = attention_scores.softmax(dim=-1)
        return attention_probs.to(query.dtype)

    def forward(self, hidden_states):
        query = self.head_to_batch_dim(self.to_q(hidden_states))
        key = self.head_to_batch_dim(self.to_k(hidden_states))
        value = self.head_to_batch_dim(self.to_v(hidden_states))
        attention_probs = self.get_attention_scores(query, key)
        hidden_states = torch.bmm(attention_probs, value)
        hidden_states = self.batch_to_head_dim(hidden_states)
        hidden_states = self.to_out[0](hidden_states)
        return self.to_out[1](hidden_states)


class ChunkedProjectionSDPA(nn.Module):
    """qkv by one linear and `chunk`; the rest is `F.scaled_dot_product_attention`."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.to_qkv(x).chunk(3, dim=-1))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(-2))


class ImageSelfAttention(nn.Module):
    """Channels first, as in GANs: the second product is v @ attention^T; no scale; residual with a learned gain."""

    def __init__(self, in_dim, reduction=8):
        super().__init__()
        self.query_conv = nn.Conv1d(in_dim, in_dim // reduction, kernel_size=1)
        self.key_conv = nn.Conv1d(in_dim, in_dim // reduction, kernel_size=1)
        self.value_conv = nn.Conv1d(in_dim, in_dim // reduction, kernel_size=1)
        self.out_conv = nn.Conv1d(in_dim // reduction, in_dim, kernel_size=1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x):
        proj_query = self.query_conv(x).permute(0, 2, 1)  # B x N x C'
        proj_key = self.key_conv(x)  # B x C' x N
        energy = torch.bmm(proj_query, proj_key)
        attention = self.softmax(energy)
        proj_value = self.value_conv(x)
        out = torch.bmm(proj_value, attention.permute(0, 2, 1))
        return self.gamma * self.out_conv(out) + x


class ImageBlock(nn.Module):
    """As in the autoencoder of latent diffusion: one head as wide as the image has channels."""

    def __init__(self, in_channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, in_channels, eps=1e-6)
        self.q = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.k = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.v = nn.Conv2d(in_channels, in_channels, kernel_size=1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, kernel_size=1)

    def forward(self, x):
        h_ = self.norm(x)
        q, k, v = self.q(h_), self.k(h_), self.v(h_)
        b, c, h, w = q.shape
        q = q.reshape(b, c, h * w).permute(0, 2, 1)
        w_ = torch.bmm(q, k.reshape(b, c, h * w)) * (int(c) ** (-0.5))
        w_ = F.softmax(w_, dim=2).permute(0, 2, 1)
        h_ = torch.bmm(v.reshape(b, c, h * w), w_).reshape(b, c, h, w)
        return x + self.proj_out(h_)


def attention(query, key, value):
    "Compute 'Scaled Dot Product Attention': a plain function, no module."
    d_k = query.size(-1)
    scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(d_k)
    p_attn = F.softmax(scores, dim=-1)
    return torch.matmul(p_attn, value)


PROGRAMS = [
    Program(
        name="vanilla_einsum",
        family="vanilla",
        build=built(lambda dim, heads: EinsumAttention()),
        inputs=feed(building.heads_first),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1), Sizes(1, 19, 67)),
    ),
    Program(
        name="vanilla_by_hand_early",
        family="vanilla",
        build=built(lambda dim, heads: StableSoftmaxByHand()),
        inputs=feed(building.heads_first),
        traced=Sizes(2, 19),
        others=(Sizes(1, 50), Sizes(3, 1, 37)),
        twin="vanilla_einsum",
    ),
    Program(
        name="vanilla_unsafe_late",
        family="vanilla",
        build=built(lambda dim, heads: UnsafeSoftmaxLateDivision()),
        inputs=feed(building.heads_first),
        traced=Sizes(1, 50),
        others=(Sizes(3, 37), Sizes(1, 1)),
        twin="vanilla_einsum",
        note="exp without the maximum: overflows where scores exceed 88 (fp16: 11)",
    ),
    Program(
        name="vanilla_by_hand_late",
        family="vanilla",
        build=built(lambda dim, heads, head_dim=24: StableSoftmaxLateDivision()),
        inputs=feed(building.heads_first),
        traced=Sizes(1, 37, 19),
        others=(Sizes(3, 19, 37), Sizes(2, 1, 1), Sizes(1, 67)),
        note="head dim 24",
    ),
    Program(
        name="vanilla_vision_packed",
        family="vanilla",
        build=built(lambda dim, heads: VisionAttention(dim, num_heads=heads)),
        inputs=feed(building.tokens),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(1, 1)),
    ),
    Program(
        name="vanilla_bshd_parameters",
        family="vanilla",
        build=built(lambda dim, heads: ParameterEinsumAttention(dim, heads)),
        inputs=feed(building.tokens),
        traced=Sizes(2, 19),
        others=(Sizes(1, 67), Sizes(3, 1)),
    ),
    Program(
        name="vanilla_sequence_first",
        family="vanilla",
        build=built(lambda dim, heads: SequenceFirstAttention(dim, heads)),
        inputs=feed(building.tokens_first),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(1, 1)),
        note="x is [S, B, D]",
    ),
    Program(
        name="vanilla_matrices",
        family="vanilla",
        build=built(lambda dim, heads: PlainMatrixAttention()),
        inputs=feed(building.one_sequence),
        traced=Sizes(1, 37),
        others=(Sizes(1, 141, 67), Sizes(1, 1)),
        note="no batch",
    ),
    Program(
        name="vanilla_one_head",
        family="vanilla",
        build=built(lambda dim, heads, head_dim=64: SelfAttentionHead(dim, head_dim)),
        inputs=feed(building.tokens),
        traced=Sizes(1, 50),
        others=(Sizes(3, 37), Sizes(2, 1)),
    ),
    Program(
        name="vanilla_diffusion_baddbmm",
        family="vanilla",
        build=built(lambda dim, heads, head_dim=40: DiffusionAttention(dim, heads, head_dim)),
        inputs=feed(building.tokens),
        traced=Sizes(1, 19),
        others=(Sizes(3, 37), Sizes(2, 1)),
        note="head dim 40",
    ),
    Program(
        name="vanilla_sdpa_chunk",
        family="vanilla",
        build=built(lambda dim, heads: ChunkedProjectionSDPA(dim, heads)),
        inputs=feed(building.tokens),
        traced=Sizes(1, 37),
        others=(Sizes(3, 67), Sizes(1, 1)),
    ),
    Program(
        name="vanilla_channels_first",
        family="vanilla",
        build=built(lambda dim, heads: ImageSelfAttention(dim)),
        inputs=feed(building.channels_first),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 19)),
        note="x is [B, C, N]; a head dim of dim // 8",
    ),
    Program(
        name="vanilla_function",
        family="vanilla",
        build=built(lambda dim, heads: attention),
        inputs=feed(building.heads_first),
        traced=Sizes(1, 19),
        others=(Sizes(3, 50), Sizes(1, 1, 37)),
        twin="vanilla_einsum",
        note="a plain function",
    ),
    Program(
        name="vanilla_image_block",
        family="vanilla",
        build=built(lambda dim, heads: ImageBlock(dim), dim=320),
        inputs=feed(building.pixels),
        traced=Sizes(1, 37),
        others=(Sizes(2, 50),),
        note="features are channels, 512 of them as published: no program holds as many",
    ),
]
