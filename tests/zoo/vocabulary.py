"""A linear layer and a loss over its outputs, which are never needed whole: vocabularies, distillation."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import Program, Sizes, building
from .building import built, feed, small

VOCAB = 211


def tokens_and_vocabulary(sizes):
    """with and without the last token, batch and tokens merged or not"""
    rows = (sizes.q, sizes.q - 1, sizes.batch * sizes.q, sizes.batch * (sizes.q - 1))
    return tuple((n, VOCAB) for n in rows)


def labels(sizes, shape, generator):
    """ids [B, S] below 100, of which about one in five is -100: ignored; the last never is"""
    ids = torch.randint(0, 100, (sizes.batch, sizes.q), generator=generator)
    ignored = torch.rand(ids.shape, generator=generator) < 0.2
    ignored[:, -1] = False
    return (ids.masked_fill(ignored, -100),)


def all_labels(sizes, shape, generator):
    """ids [B, S] below 100"""
    return (torch.randint(0, 100, (sizes.batch, sizes.q), generator=generator),)


class CausalLMLoss(nn.Module):
    """As language models have it: logits in fp32, shifted, flattened; mean over what is not ignored."""

    def __init__(self, hidden_size, vocab_size, bias=False):
        super().__init__()
        self.vocab_size = vocab_size
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=bias)

    def forward(self, hidden_states, labels):
        logits = self.lm_head(hidden_states)
        logits = logits.float()
        shift_logits = logits[..., :-1, :].contiguous()
        shift_labels = labels[..., 1:].contiguous()
        shift_logits = shift_logits.view(-1, self.vocab_size)
        shift_labels = shift_labels.view(-1)
        return F.cross_entropy(shift_logits, shift_labels, ignore_index=-100)


class CausalLMLossGather(CausalLMLoss):
    """log_softmax, gathered at the labels; ignored places are multiplied by zero."""

    def forward(self, hidden_states, labels):
        log_probs = F.log_softmax(self.lm_head(hidden_states[:, :-1]).float(), dim=-1)
        labels = labels[:, 1:]
        kept = labels.ne(-100)
        nll = -log_probs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return (nll * kept).sum() / kept.sum()


class CausalLMLossLogSumExp(CausalLMLoss):
    """logsumexp less the label's logit; the product with the weight is spelled out."""

    def forward(self, hidden_states, labels):
        x = hidden_states[:, :-1].flatten(0, 1)
        y = labels[:, 1:].flatten()
        logits = torch.matmul(x, self.lm_head.weight.t()).float()
        picked = logits[torch.arange(y.shape[0], device=y.device), y.clamp(min=0)]
        loss = torch.logsumexp(logits, dim=-1) - picked
        return torch.where(y != -100, loss, 0.0).sum() / (y != -100).sum()


class SmoothedLoss(nn.Module):
    """`F.cross_entropy` with smoothed labels, on logits [B, V, S]; a bias."""

    def __init__(self, dim, vocab, smoothing=0.1):
        super().__init__()
        self.smoothing = smoothing
        self.out = nn.Linear(dim, vocab)

    def forward(self, x, target):
        logits = self.out(x).transpose(1, 2)
        return F.cross_entropy(logits, target, ignore_index=-100, label_smoothing=self.smoothing)


class SmoothedLossByHand(SmoothedLoss):
    """As sequence-to-sequence toolkits have it: the label's loss, and the mean over all classes."""

    def forward(self, x, target):
        lprobs = F.log_softmax(self.out(x), dim=-1).flatten(0, 1)
        target = target.reshape(-1, 1)
        pad_mask = target.eq(-100)
        nll_loss = -lprobs.gather(dim=-1, index=target.masked_fill(pad_mask, 0))
        smooth_loss = -lprobs.mean(dim=-1, keepdim=True)
        nll_loss = nll_loss.masked_fill(pad_mask, 0.0)
        smooth_loss = smooth_loss.masked_fill(pad_mask, 0.0)
        loss = (1.0 - self.smoothing) * nll_loss.sum() + self.smoothing * smooth_loss.sum()
        return loss / (~pad_mask).sum()


class TokenLosses(nn.Module):
    """A loss per token, none ignored, and a penalty on the log-sum-exp (z-loss)."""

    def __init__(self, dim, vocab, z_weight=1e-2):
        super().__init__()
        self.z_weight = z_weight
        self.unembed = nn.Parameter(torch.randn(dim, vocab) * dim**-0.5)

    def forward(self, x, target):
        logits = x @ self.unembed
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        z = torch.logsumexp(logits, dim=-1)
        return loss.view(target.shape) + self.z_weight * z**2, z


class TokenLossesByHand(TokenLosses):
    """By hand from the maximum on; the label's logit by a one-hot mask and a sum."""

    def forward(self, x, target):
        logits = torch.einsum("bsd,dv->bsv", x, self.unembed)
        top = logits.amax(dim=-1, keepdim=True)
        z = torch.log((logits - top).exp().sum(-1)) + top[..., 0]
        is_target = torch.arange(logits.shape[-1], device=x.device) == target[..., None]
        loss = z - torch.where(is_target, logits, 0).sum(-1)
        return loss + self.z_weight * z.square(), z


class LabelProbability(nn.Module):
    """Sequence scores for preference training: the sum of the labels' log-probabilities; logits capped."""

    def __init__(self, dim, vocab, cap=15.0):
        super().__init__()
        self.cap = cap
        self.head = nn.Linear(dim, vocab, bias=False)

    def forward(self, x, target):
        logits = self.cap * torch.tanh(self.head(x) / self.cap)
        per_token = torch.gather(logits.log_softmax(-1), 2, target.unsqueeze(2)).squeeze(2)
        return per_token.sum(-1)


class LabelProbabilityNLL(LabelProbability):
    """`F.nll_loss` on [B, V, S], of the logarithm of a softmax by hand."""

    def forward(self, x, target):
        logits = torch.tanh(F.linear(x, self.head.weight) / self.cap) * self.cap
        log_p = logits - logits.exp().sum(-1, keepdim=True).log()
        return -F.nll_loss(log_p.mT, target, reduction="none").sum(dim=1)


class Distillation(nn.Module):
    """Kullback-Leibler divergence of a student's vocabulary from a teacher's, both softened."""

    def __init__(self, dim, vocab, temperature=2.0):
        super().__init__()
        self.temperature = temperature
        self.student = nn.Linear(dim, vocab, bias=False)
        self.teacher = nn.Linear(dim, vocab, bias=False)

    def forward(self, x, t):
        student = F.log_softmax(self.student(x) / self.temperature, dim=-1)
        teacher = F.softmax(self.teacher(t) / self.temperature, dim=-1)
        loss = F.kl_div(student, teacher, reduction="none").sum(-1)
        return loss.mean() * self.temperature**2


class DistillationByHand(Distillation):
    """The sum of p (log p - log q), with both logarithms from `log_softmax`."""

    def forward(self, x, t):
        log_q = (self.student(x) / self.temperature).log_softmax(-1)
        log_p = (self.teacher(t) / self.temperature).log_softmax(-1)
        return torch.sum(log_p.exp() * (log_p - log_q), -1).mean() * self.temperature**2


ROWS = "the mean over tokens is of narrow rows"
WIDE = 320  # more features than a tile holds

PROGRAMS = [
    Program(
        name="lm_loss_cross_entropy",
        family="vocabulary",
        build=small(lambda dim, heads, vocab=VOCAB: CausalLMLoss(dim, vocab)),
        inputs=feed(building.tokens, labels),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        note="ignored labels; " + ROWS,
        wide=tokens_and_vocabulary,
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="lm_loss_gather",
        family="vocabulary",
        build=small(lambda dim, heads, vocab=VOCAB: CausalLMLossGather(dim, vocab)),
        inputs=feed(building.tokens, labels),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20), Sizes(3, 50)),
        twin="lm_loss_cross_entropy",
        note="ignored labels; " + ROWS,
        wide=tokens_and_vocabulary,
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="lm_loss_logsumexp",
        family="vocabulary",
        build=small(lambda dim, heads, vocab=VOCAB: CausalLMLossLogSumExp(dim, vocab)),
        inputs=feed(building.tokens, labels),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        twin="lm_loss_cross_entropy",
        note="ignored labels; batch and positions merged; " + ROWS,
        wide=tokens_and_vocabulary,
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="lm_loss_long_contraction",
        family="vocabulary",
        build=built(lambda dim, heads, vocab=VOCAB: CausalLMLoss(dim, vocab), dim=WIDE),
        inputs=feed(building.tokens, labels),
        traced=Sizes(2, 20),
        others=(Sizes(1, 37), Sizes(3, 11)),
        note="320 features: the contraction is a loop",
        wide=tokens_and_vocabulary,
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="lm_loss_long_contraction_bias",
        family="vocabulary",
        build=built(lambda dim, heads, vocab=VOCAB: SmoothedLoss(dim, vocab), dim=WIDE),
        inputs=feed(building.tokens, labels),
        traced=Sizes(2, 19),
        others=(Sizes(1, 37), Sizes(3, 11)),
        note="320 features: the contraction is a loop",
        wide=tokens_and_vocabulary,
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="smoothed_loss",
        family="vocabulary",
        build=small(lambda dim, heads, vocab=VOCAB: SmoothedLoss(dim, vocab)),
        inputs=feed(building.tokens, labels),
        traced=Sizes(2, 20),
        others=(Sizes(1, 37), Sizes(3, 50)),
        note="ignored labels; classes are the second axis; in fp16, eager's sum over all classes overflows early",
        wide=tokens_and_vocabulary,
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="smoothed_loss_by_hand",
        family="vocabulary",
        build=small(lambda dim, heads, vocab=VOCAB: SmoothedLossByHand(dim, vocab)),
        inputs=feed(building.tokens, labels),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20), Sizes(3, 50)),
        twin="smoothed_loss",
        wide=tokens_and_vocabulary,
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="token_losses",
        family="vocabulary",
        build=small(lambda dim, heads, vocab=VOCAB: TokenLosses(dim, vocab)),
        inputs=feed(building.tokens, all_labels),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        note="the weight is [dim, V]",
        wide=tokens_and_vocabulary,
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="token_losses_by_hand",
        family="vocabulary",
        build=small(lambda dim, heads, vocab=VOCAB: TokenLossesByHand(dim, vocab)),
        inputs=feed(building.tokens, all_labels),
        traced=Sizes(1, 37),
        others=(Sizes(3, 50), Sizes(2, 1)),
        twin="token_losses",
        wide=tokens_and_vocabulary,
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="label_log_probability",
        family="vocabulary",
        build=small(lambda dim, heads, vocab=VOCAB: LabelProbability(dim, vocab)),
        inputs=feed(building.tokens, all_labels),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        wide=tokens_and_vocabulary,
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="label_log_probability_nll",
        family="vocabulary",
        build=small(lambda dim, heads, vocab=VOCAB: LabelProbabilityNLL(dim, vocab)),
        inputs=feed(building.tokens, all_labels),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20), Sizes(3, 50)),
        twin="label_log_probability",
        note="exp without the maximum: capped logits cannot overflow fp32, nor exp(15) bf16, but fp16 they can",
        wide=tokens_and_vocabulary,
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="distillation",
        family="vocabulary",
        build=small(lambda dim, heads, vocab=VOCAB: Distillation(dim, vocab)),
        inputs=feed(building.tokens, building.tokens),
        traced=Sizes(2, 37),
        others=(Sizes(1, 50), Sizes(3, 20)),
        note="two scores over one stream",
        wide=tokens_and_vocabulary,
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="distillation_by_hand",
        family="vocabulary",
        build=small(lambda dim, heads, vocab=VOCAB: DistillationByHand(dim, vocab)),
        inputs=feed(building.tokens, building.tokens),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20), Sizes(3, 50)),
        twin="distillation",
        wide=tokens_and_vocabulary,
        part=2,
        passes=1,
        kernels=1,
    ),
]
