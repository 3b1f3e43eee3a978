"""Keys beyond a length, or padding, are not seen."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import Program, Sizes, building
from .building import built, feed


class ValidLengths(nn.Module):
    """Lengths [B] against an arange; `where` with a tensor of -inf."""

    def forward(self, q, k, v, valid_lens):
        live = torch.arange(k.size(2), device=k.device)[None, :] < valid_lens[:, None]
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(q.size(-1))
        minus_inf = torch.tensor(float("-inf"), device=q.device, dtype=q.dtype)
        scores = torch.where(live[:, None, None, :], scores, minus_inf)
        return torch.matmul(nn.functional.softmax(scores, dim=-1), v)


class RepeatedLengths(nn.Module):
    """Batch and heads merged; lengths repeated for each head, then for each query; -1e6 by boolean indexing."""

    def __init__(self, num_hiddens, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.W_q = nn.Linear(num_hiddens, num_hiddens, bias=False)
        self.W_k = nn.Linear(num_hiddens, num_hiddens, bias=False)
        self.W_v = nn.Linear(num_hiddens, num_hiddens, bias=False)
        self.W_o = nn.Linear(num_hiddens, num_hiddens, bias=False)

    def transpose_qkv(self, X):
        X = X.reshape(X.shape[0], X.shape[1], self.num_heads, -1)
        X = X.permute(0, 2, 1, 3)
        return X.reshape(-1, X.shape[2], X.shape[3])

    def transpose_output(self, X):
        X = X.reshape(-1, self.num_heads, X.shape[1], X.shape[2])
        X = X.permute(0, 2, 1, 3)
        return X.reshape(X.shape[0], X.shape[1], -1)

    def masked_softmax(self, X, valid_lens, value=-1e6):
        shape = X.shape
        valid_lens = torch.repeat_interleave(valid_lens, shape[1])
        X = X.reshape(-1, shape[-1])
        maxlen = X.size(1)
        mask = torch.arange(maxlen, dtype=torch.float32, device=X.device)[None, :]
        mask = mask < valid_lens[:, None]
        X[~mask] = value
        return F.softmax(X.reshape(shape), dim=-1)

    def forward(self, queries, memory, valid_lens):
        queries = self.transpose_qkv(self.W_q(queries))
        keys = self.transpose_qkv(self.W_k(memory))
        values = self.transpose_qkv(self.W_v(memory))
        valid_lens = torch.repeat_interleave(valid_lens, repeats=self.num_heads, dim=0)
        d = queries.shape[-1]
        scores = torch.bmm(queries, keys.transpose(1, 2)) / math.sqrt(d)
        weights = self.masked_softmax(scores, valid_lens)
        return self.W_o(self.transpose_output(torch.bmm(weights, values)))


class BertSelfAttention(nn.Module):
    """The tokenizer's mask of ones and zeros becomes an additive one: (1 - mask) * least number."""

    def __init__(self, hidden_size, num_attention_heads):
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.attention_head_size = hidden_size // num_attention_heads
        self.all_head_size = self.num_attention_heads * self.attention_head_size
        self.query = nn.Linear(hidden_size, self.all_head_size)
        self.key = nn.Linear(hidden_size, self.all_head_size)
        self.value = nn.Linear(hidden_size, self.all_head_size)
        self.dropout = nn.Dropout(0.1)

    def transpose_for_scores(self, x):
        new_x_shape = x.size()[:-1] + (self.num_attention_heads, self.attention_head_size)
        return x.view(new_x_shape).permute(0, 2, 1, 3)

    def forward(self, hidden_states, attention_mask):
        extended_attention_mask = attention_mask[:, None, None, :].to(hidden_states.dtype)
        extended_attention_mask = 1.0 - extended_attention_mask
        extended_attention_mask *= torch.finfo(hidden_states.dtype).min

        query_layer = self.transpose_for_scores(self.query(hidden_states))
        key_layer = self.transpose_for_scores(self.key(hidden_states))
        value_layer = self.transpose_for_scores(self.value(hidden_states))

        attention_scores = torch.matmul(query_layer, key_layer.transpose(-1, -2))
        attention_scores = attention_scores / math.sqrt(self.attention_head_size)
        attention_scores = attention_scores + extended_attention_mask
        attention_probs = nn.functional.softmax(attention_scores, dim=-1)
        attention_probs = self.dropout(attention_probs)

        context_layer = torch.matmul(attention_probs, value_layer)
        context_layer = context_layer.permute(0, 2, 1, 3).contiguous()
        new_context_layer_shape = context_layer.size()[:-2] + (self.all_head_size,)
        return context_layer.view(new_context_layer_shape)


class RenormalisedSoftmax(nn.Module):
    """Scores are multiplied by the mask, so masked ones count as 0 in the softmax; then masked and divided again."""

    def __init__(self, eps=1e-6):
        super().__init__()
        self.eps = eps

    def masked_softmax(self, vector, mask):
        result = torch.softmax(vector * mask, dim=-1)
        result = result * mask
        return result / (result.sum(dim=-1, keepdim=True) + self.eps)

    def forward(self, question, passage, passage_values, lengths):
        mask = torch.arange(passage.size(1), device=lengths.device).expand(lengths.size(0), -1)
        mask = (mask < lengths.unsqueeze(1)).to(question.dtype).unsqueeze(1)
        similarity = question.bmm(passage.transpose(1, 2)) * question.size(-1) ** -0.5
        return self.masked_softmax(similarity, mask).bmm(passage_values)


class PaddingSDPA(nn.Module):
    """A boolean padding mask expanded to full size for SDPA; rows beyond the length are zeroed afterwards."""

    def __init__(self, d_model, nhead):
        super().__init__()
        self.nhead = nhead
        self.q = nn.Linear(d_model, d_model)
        self.kv = nn.Linear(d_model, 2 * d_model)
        self.o = nn.Linear(d_model, d_model)

    def forward(self, x, lengths):
        B, L, D = x.shape
        valid = torch.arange(L, device=x.device).expand(B, L) < lengths.view(B, 1)
        q = self.q(x).view(B, L, self.nhead, D // self.nhead).transpose(1, 2)
        k, v = self.kv(x).view(B, L, 2, self.nhead, D // self.nhead).permute(2, 0, 3, 1, 4)
        mask = valid.view(B, 1, 1, L).expand(B, self.nhead, L, L)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = self.o(y.transpose(1, 2).reshape(B, L, D))
        return y * valid.unsqueeze(-1)


PROGRAMS = [
    Program(
        name="key_lengths_where",
        family="lengths",
        build=built(lambda dim, heads: ValidLengths()),
        inputs=feed(building.heads_first, building.key_lengths),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1, 19)),
    ),
    Program(
        name="key_lengths_repeated",
        family="lengths",
        build=built(lambda dim, heads: RepeatedLengths(dim, heads)),
        inputs=feed(building.tokens, building.memory, building.key_lengths),
        traced=Sizes(2, 19, 37),
        others=(Sizes(1, 37, 50), Sizes(3, 1, 1)),
        note="a finite fill, -1e6; in fp16 it becomes -inf",
    ),
    Program(
        name="key_padding_bert",
        family="lengths",
        build=built(lambda dim, heads: BertSelfAttention(dim, heads)),
        inputs=feed(building.tokens, building.padding_mask),
        traced=Sizes(1, 50),
        others=(Sizes(3, 37), Sizes(2, 1)),
        note="a finite fill, added",
    ),
    Program(
        name="key_lengths_renormalised",
        family="lengths",
        build=built(lambda dim, heads: RenormalisedSoftmax()),
        inputs=feed(building.one_head, building.key_lengths),
        traced=Sizes(2, 19, 50),
        others=(Sizes(1, 50, 37), Sizes(3, 1, 1)),
    ),
    Program(
        name="key_lengths_sdpa",
        family="lengths",
        build=built(lambda dim, heads: PaddingSDPA(dim, heads)),
        inputs=feed(building.tokens, building.key_lengths),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 1)),
    ),
]
