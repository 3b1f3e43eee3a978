"""Scores against embeddings of distances, moved into place by a shift: Transformer-XL, XLNet, Conformer."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import Program, Sizes, building
from .building import feed, small


def sinusoids(positions, dim):
    """[P, dim]"""
    inv_freq = 1 / (10000 ** (torch.arange(0.0, dim, 2.0, device=positions.device) / dim))
    angles = torch.outer(positions.to(inv_freq.dtype), inv_freq)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


class RelPartialLearnableMultiHeadAttn(nn.Module):
    """Transformer-XL: [S, B, dim]; distances from n - 1 down to 0; shifted by a pad, a view and a slice; causal."""

    def __init__(self, d_model, n_head):
        super().__init__()
        self.n_head = n_head
        self.d_head = d_model // n_head
        self.scale = 1 / self.d_head**0.5
        self.qkv_net = nn.Linear(d_model, 3 * d_model, bias=False)
        self.r_net = nn.Linear(d_model, d_model, bias=False)
        self.o_net = nn.Linear(d_model, d_model, bias=False)
        self.r_w_bias = nn.Parameter(torch.randn(n_head, self.d_head) * 0.3)
        self.r_r_bias = nn.Parameter(torch.randn(n_head, self.d_head) * 0.3)

    def _rel_shift(self, x):
        zero_pad = torch.zeros((x.size(0), 1, *x.size()[2:]), device=x.device, dtype=x.dtype)
        x_padded = torch.cat([zero_pad, x], dim=1)
        x_padded = x_padded.view(x.size(1) + 1, x.size(0), *x.size()[2:])
        return x_padded[1:].view_as(x)

    def positions(self, w):
        pos_seq = torch.arange(w.size(0) - 1, -1, -1.0, device=w.device)
        return sinusoids(pos_seq, w.size(-1)).to(w.dtype)

    def forward(self, w):
        qlen, bsz, _ = w.shape
        r = self.positions(w)
        w_head_q, w_head_k, w_head_v = torch.chunk(self.qkv_net(w), 3, dim=-1)
        r_head_k = self.r_net(r).view(qlen, self.n_head, self.d_head)
        w_head_q = w_head_q.view(qlen, bsz, self.n_head, self.d_head)
        w_head_k = w_head_k.view(qlen, bsz, self.n_head, self.d_head)
        w_head_v = w_head_v.view(qlen, bsz, self.n_head, self.d_head)

        rw_head_q = w_head_q + self.r_w_bias
        AC = torch.einsum("ibnd,jbnd->ijbn", rw_head_q, w_head_k)
        rr_head_q = w_head_q + self.r_r_bias
        BD = torch.einsum("ibnd,jnd->ijbn", rr_head_q, r_head_k)
        BD = self._rel_shift(BD)
        attn_score = AC + BD
        attn_score = attn_score * self.scale
        ones = torch.ones(qlen, qlen, dtype=torch.bool, device=w.device)
        attn_score = attn_score.masked_fill(ones.triu(1)[:, :, None, None], float("-inf"))
        attn_prob = F.softmax(attn_score, dim=1)
        attn_vec = torch.einsum("ijbn,jbnd->ibnd", attn_prob, w_head_v)
        attn_vec = attn_vec.contiguous().view(qlen, bsz, self.n_head * self.d_head)
        return self.o_net(attn_vec)


class TransformerXLIndexed(RelPartialLearnableMultiHeadAttn):
    """The shift as an index: what is wanted at (i, j) is the product with distance i - j."""

    def forward(self, w):
        n = w.shape[0]
        q, k, v = self.qkv_net(w).unflatten(-1, (3, self.n_head, -1)).unbind(2)
        r = self.r_net(self.positions(w).flip(0)).unflatten(-1, (self.n_head, -1))  # by distance
        i = torch.arange(n, device=w.device)
        back = i[:, None] - i[None, :]
        by_distance = torch.einsum("ibhd,rhd->bhir", q + self.r_r_bias, r)
        index = back.clamp(min=0).expand(*by_distance.shape[:2], n, n)
        score = torch.einsum("ibhd,jbhd->bhij", q + self.r_w_bias, k)
        score = (score + torch.gather(by_distance, 3, index)) * self.scale
        prob = torch.where(back >= 0, score, -torch.inf).softmax(dim=-1)
        return self.o_net(torch.einsum("bhij,jbhd->ibhd", prob, v).flatten(2))


class XLNetRelativeAttention(nn.Module):
    """XLNet: [S, B, dim]; distances from n down to -n + 1; shifted by reshapes, a slice and index_select."""

    def __init__(self, d_model, n_head):
        super().__init__()
        self.n_head = n_head
        self.d_head = d_model // n_head
        self.scale = 1 / (self.d_head**0.5)
        self.q = nn.Parameter(torch.randn(d_model, n_head, self.d_head) * d_model**-0.5)
        self.k = nn.Parameter(torch.randn(d_model, n_head, self.d_head) * d_model**-0.5)
        self.v = nn.Parameter(torch.randn(d_model, n_head, self.d_head) * d_model**-0.5)
        self.o = nn.Parameter(torch.randn(d_model, n_head, self.d_head) * d_model**-0.5)
        self.r = nn.Parameter(torch.randn(d_model, n_head, self.d_head) * d_model**-0.5)
        self.r_r_bias = nn.Parameter(torch.randn(n_head, self.d_head) * 0.3)
        self.r_w_bias = nn.Parameter(torch.randn(n_head, self.d_head) * 0.3)

    @staticmethod
    def rel_shift_bnij(x, klen):
        x_size = x.shape
        x = x.reshape(x_size[0], x_size[1], x_size[3], x_size[2])
        x = x[:, :, 1:, :]
        x = x.reshape(x_size[0], x_size[1], x_size[2], x_size[3] - 1)
        return torch.index_select(x, 3, torch.arange(klen, device=x.device, dtype=torch.long))

    def forward(self, h):
        n = h.shape[0]
        pos_emb = sinusoids(torch.arange(n, -n, -1.0, device=h.device), h.shape[-1]).to(h.dtype)
        q_head_h = torch.einsum("ibh,hnd->ibnd", h, self.q)
        k_head_h = torch.einsum("ibh,hnd->ibnd", h, self.k)
        v_head_h = torch.einsum("ibh,hnd->ibnd", h, self.v)
        k_head_r = torch.einsum("ih,hnd->ind", pos_emb, self.r)
        ac = torch.einsum("ibnd,jbnd->bnij", q_head_h + self.r_w_bias, k_head_h)
        bd = torch.einsum("ibnd,jnd->bnij", q_head_h + self.r_r_bias, k_head_r)
        bd = self.rel_shift_bnij(bd, klen=ac.shape[3])
        attn_score = (ac + bd) * self.scale
        attn_prob = nn.functional.softmax(attn_score, dim=3)
        attn_vec = torch.einsum("bnij,jbnd->ibnd", attn_prob, v_head_h)
        return torch.einsum("ibnd,hnd->ibh", attn_vec, self.o)


class XLNetLookup(XLNetRelativeAttention):
    """An embedding is looked up for each pair, by distance, and contracted with the query."""

    def forward(self, h):
        n = h.shape[0]
        i = torch.arange(n, device=h.device)
        distances = torch.arange(-n + 1, n, device=h.device)
        table = torch.einsum("ph,hnd->pnd", sinusoids(distances, h.shape[-1]).to(h.dtype), self.r)
        pairs = table[i[:, None] - i[None, :] + n - 1]  # [i, j, heads, d]
        q, k, v = (torch.einsum("ibh,hnd->bnid", h, w) for w in (self.q, self.k, self.v))
        score = (q + self.r_w_bias[:, None]) @ k.transpose(-1, -2)
        score = score + torch.einsum("bnid,ijnd->bnij", q + self.r_r_bias[:, None], pairs)
        return torch.einsum("bnid,hnd->ibh", (score * self.scale).softmax(-1) @ v, self.o)


class ConformerAttention(nn.Module):
    """ESPnet's Conformer: [B, S, dim]; distances from n - 1 to -n + 1; a zero column, a view, half is kept; lengths."""

    def __init__(self, n_feat, n_head):
        super().__init__()
        self.d_k = n_feat // n_head
        self.h = n_head
        self.linear_q = nn.Linear(n_feat, n_feat)
        self.linear_k = nn.Linear(n_feat, n_feat)
        self.linear_v = nn.Linear(n_feat, n_feat)
        self.linear_out = nn.Linear(n_feat, n_feat)
        self.linear_pos = nn.Linear(n_feat, n_feat, bias=False)
        self.pos_bias_u = nn.Parameter(torch.randn(n_head, self.d_k) * 0.3)
        self.pos_bias_v = nn.Parameter(torch.randn(n_head, self.d_k) * 0.3)

    def rel_shift(self, x):
        zero_pad = torch.zeros((*x.size()[:3], 1), device=x.device, dtype=x.dtype)
        x_padded = torch.cat([zero_pad, x], dim=-1)
        x_padded = x_padded.view(*x.size()[:2], x.size(3) + 1, x.size(2))
        return x_padded[:, :, 1:].view_as(x)[:, :, :, : x.size(-1) // 2 + 1]

    def forward(self, x, lengths):
        n_batch, n, _ = x.shape
        q = self.linear_q(x).view(n_batch, -1, self.h, self.d_k)
        k = self.linear_k(x).view(n_batch, -1, self.h, self.d_k).transpose(1, 2)
        v = self.linear_v(x).view(n_batch, -1, self.h, self.d_k).transpose(1, 2)
        pos_emb = sinusoids(torch.arange(n - 1, -n, -1.0, device=x.device), x.shape[-1])
        p = self.linear_pos(pos_emb.to(x.dtype)).view(1, -1, self.h, self.d_k).transpose(1, 2)
        q_with_bias_u = (q + self.pos_bias_u).transpose(1, 2)
        q_with_bias_v = (q + self.pos_bias_v).transpose(1, 2)
        matrix_ac = torch.matmul(q_with_bias_u, k.transpose(-2, -1))
        matrix_bd = torch.matmul(q_with_bias_v, p.transpose(-2, -1))
        matrix_bd = self.rel_shift(matrix_bd)
        scores = (matrix_ac + matrix_bd) / math.sqrt(self.d_k)
        mask = torch.arange(n, device=x.device)[None, :] >= lengths[:, None]
        mask = mask[:, None, None, :]
        scores = scores.masked_fill(mask, float("-inf"))
        attn = torch.softmax(scores, dim=-1).masked_fill(mask, 0.0)
        x = torch.matmul(attn, v)
        x = x.transpose(1, 2).contiguous().view(n_batch, -1, self.h * self.d_k)
        return self.linear_out(x)


class ConformerStrided(ConformerAttention):
    """The shift as a view whose rows are one shorter: what is wanted lies on a slant."""

    def rel_shift(self, x):
        b, h, n, p = x.shape  # p = 2 n - 1
        flat = x.flatten(2)[:, :, n - 1 :]  # from distance 0 of the first row
        return flat[:, :, : n * (p - 1)].view(b, h, n, p - 1)[..., :n]


class ConformerGather(ConformerAttention):
    """The shift as a gather."""

    def rel_shift(self, x):
        b, h, n, _ = x.shape
        i = torch.arange(n, device=x.device)
        index = (n - 1) - (i[:, None] - i[None, :])
        return x.gather(-1, index.expand(b, h, n, n))


PROGRAMS = [
    Program(
        name="transformer_xl_shift",
        family="shifted",
        build=small(lambda dim, heads: RelPartialLearnableMultiHeadAttn(dim, heads)),
        inputs=feed(building.tokens_first),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        note="the mask hides what the shift leaves above the diagonal",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="transformer_xl_gather",
        family="shifted",
        build=small(lambda dim, heads: TransformerXLIndexed(dim, heads)),
        inputs=feed(building.tokens_first),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20), Sizes(3, 50)),
        twin="transformer_xl_shift",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="xlnet_shift",
        family="shifted",
        build=small(lambda dim, heads: XLNetRelativeAttention(dim, heads)),
        inputs=feed(building.tokens_first),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="xlnet_lookup",
        family="shifted",
        build=small(lambda dim, heads: XLNetLookup(dim, heads)),
        inputs=feed(building.tokens_first),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20), Sizes(3, 50)),
        twin="xlnet_shift",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="conformer_shift",
        family="shifted",
        build=small(lambda dim, heads: ConformerAttention(dim, heads)),
        inputs=feed(building.tokens, building.key_lengths),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="conformer_strided",
        family="shifted",
        build=small(lambda dim, heads: ConformerStrided(dim, heads)),
        inputs=feed(building.tokens, building.key_lengths),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20), Sizes(3, 50)),
        twin="conformer_shift",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="conformer_gather",
        family="shifted",
        build=small(lambda dim, heads: ConformerGather(dim, heads)),
        inputs=feed(building.tokens, building.key_lengths),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        twin="conformer_shift",
        part=2,
        passes=1,
        kernels=1,
    ),
]
