"""Softmaxes along both axes of one matrix: contrastive losses, matching."""

import torch
import torch.nn.functional as F
from torch import nn

from . import Program, Sizes, building
from .building import feed, small


def paired(sizes, shape, generator):
    """embeddings of as many images and texts [N, dim], [N, dim]"""
    size = (sizes.q, shape.dim)
    return torch.randn(size, generator=generator), torch.randn(size, generator=generator)


def both_views(sizes):
    return ((2 * sizes.q, 2 * sizes.q),)


def two_sets(sizes, shape, generator):
    """features of two images [B, Q, d], [B, K, d]"""
    return building.one_head(sizes, shape, generator)[:2]


class CLIPLoss(nn.Module):
    """Cross-entropy with the diagonal as labels, over rows and over columns."""

    def __init__(self):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, image, text):
        image = F.normalize(image, dim=-1)
        text = F.normalize(text, dim=-1)
        logits_per_image = self.logit_scale.exp() * image @ text.t()
        logits_per_text = logits_per_image.t()
        labels = torch.arange(image.shape[0], device=image.device)
        loss_i = F.cross_entropy(logits_per_image, labels)
        loss_t = F.cross_entropy(logits_per_text, labels)
        return (loss_i + loss_t) / 2


class CLIPLossLogSumExp(CLIPLoss):
    """The diagonal is a row-wise product; two logsumexps of one matrix."""

    def forward(self, image, text):
        image = image / image.norm(dim=1, keepdim=True)
        text = text / text.norm(dim=1, keepdim=True)
        logits = torch.einsum("id,jd->ij", image, text) * self.logit_scale.exp()
        positive = (image * text).sum(-1) * self.logit_scale.exp()
        both = logits.logsumexp(dim=0) + logits.logsumexp(dim=1)
        return (both / 2 - positive).mean()


class NTXent(nn.Module):
    """SimCLR: both views are put together; a view is never its own candidate."""

    def __init__(self, temperature=0.5):
        super().__init__()
        self.temperature = temperature

    def forward(self, z_i, z_j):
        n = z_i.size(0)
        z = F.normalize(torch.cat((z_i, z_j), dim=0), dim=1)
        sim = torch.matmul(z, z.T) / self.temperature
        sim = sim.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=z.device), float("-inf"))
        target = torch.cat((torch.arange(n, 2 * n), torch.arange(n))).to(z.device)
        return F.cross_entropy(sim, target)


class NTXentByHand(NTXent):
    """The denominator is a sum of exponentials less its own; no maximum."""

    def forward(self, z_i, z_j):
        z_i, z_j = F.normalize(z_i, dim=1), F.normalize(z_j, dim=1)
        z = torch.cat((z_i, z_j))
        e = torch.exp(z @ z.t() / self.temperature)
        i = torch.arange(z.shape[0], device=z.device)
        denominator = torch.where(i[:, None] != i[None, :], e, 0).sum(dim=1)
        positive = (z_i * z_j).sum(dim=1) / self.temperature
        return (denominator.log() - torch.cat((positive, positive))).mean()


class SigmoidLoss(nn.Module):
    """SigLIP: no softmax; a log-sigmoid of each pair, summed over all."""

    def __init__(self):
        super().__init__()
        self.t = nn.Parameter(torch.tensor(2.0))
        self.bias = nn.Parameter(torch.tensor(-3.0))

    def forward(self, image, text):
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        logits = image @ text.t() * self.t.exp() + self.bias
        n = image.shape[0]
        labels = 2 * torch.eye(n, device=logits.device, dtype=logits.dtype) - torch.ones_like(logits)
        return -F.logsigmoid(labels * logits).sum() / n


class SigmoidLossSoftplus(SigmoidLoss):
    """Softplus, signed by where; a sum per row, then their mean."""

    def forward(self, image, text):
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        logits = torch.einsum("id,jd->ij", image, text) * self.t.exp() + self.bias
        i = torch.arange(image.shape[0], device=image.device)
        signed = torch.where(i[:, None] == i[None, :], -logits, logits)
        return F.softplus(signed).sum(dim=-1).mean()


class DualSoftmax(nn.Module):
    """LoFTR: confidence is a softmax over rows times a softmax over columns, returned whole."""

    def __init__(self, temperature=0.5):
        super().__init__()
        self.temperature = temperature

    def forward(self, feat0, feat1):
        sim = torch.einsum("nlc,nsc->nls", feat0, feat1) / (feat0.shape[-1] ** 0.5)
        sim = sim / self.temperature
        return F.softmax(sim, 1) * F.softmax(sim, 2)


class DualSoftmaxLogspace(DualSoftmax):
    """Sums of logarithms, exponentiated once."""

    def forward(self, feat0, feat1):
        s = feat0 @ feat1.transpose(1, 2) * (feat0.size(-1) ** -0.5 / self.temperature)
        return torch.exp(F.log_softmax(s, dim=-2) + F.log_softmax(s, dim=-1))


class MutualBest(DualSoftmax):
    """Only the best confidence of each row is wanted."""

    def forward(self, feat0, feat1):
        return super().forward(feat0, feat1).max(dim=2).values


class MutualBestByHand(DualSoftmax):
    """A row's normaliser does not change which is best: it divides the maximum."""

    def forward(self, feat0, feat1):
        s = torch.bmm(feat0, feat1.mT) * (feat0.size(-1) ** -0.5 / self.temperature)
        column = torch.logsumexp(s, dim=1, keepdim=True)
        row = torch.logsumexp(s, dim=2)
        return ((2 * s - column).amax(dim=2) - row).exp()


AXES = "one softmax runs over rows, the other over columns: rows and stream change places"

PROGRAMS = [
    Program(
        name="clip_loss",
        family="contrastive",
        build=small(lambda dim, heads: CLIPLoss()),
        inputs=feed(paired),
        traced=Sizes(1, 37),
        others=(Sizes(1, 50), Sizes(1, 20)),
        note="no batch: its elements are the rows",
        part=2,
        passes=2,
        kernels=2,
        why=AXES,
    ),
    Program(
        name="clip_loss_logsumexp",
        family="contrastive",
        build=small(lambda dim, heads: CLIPLossLogSumExp()),
        inputs=feed(paired),
        traced=Sizes(1, 37),
        others=(Sizes(1, 50), Sizes(1, 20)),
        twin="clip_loss",
        part=2,
        passes=2,
        kernels=2,
        why=AXES,
    ),
    Program(
        name="nt_xent",
        family="contrastive",
        build=small(lambda dim, heads: NTXent()),
        inputs=feed(paired),
        traced=Sizes(1, 37),
        others=(Sizes(1, 50), Sizes(1, 20)),
        note="twice as many rows as an input has",
        wide=both_views,
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="nt_xent_by_hand",
        family="contrastive",
        build=small(lambda dim, heads: NTXentByHand()),
        inputs=feed(paired),
        traced=Sizes(1, 37),
        others=(Sizes(1, 50), Sizes(1, 20)),
        twin="nt_xent",
        wide=both_views,
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="sigmoid_loss",
        family="contrastive",
        build=small(lambda dim, heads: SigmoidLoss()),
        inputs=feed(paired),
        traced=Sizes(1, 37),
        others=(Sizes(1, 50), Sizes(1, 20)),
        note="a sum over both axes: rows are summed in a second kernel, or by PyTorch",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="sigmoid_loss_softplus",
        family="contrastive",
        build=small(lambda dim, heads: SigmoidLossSoftplus()),
        inputs=feed(paired),
        traced=Sizes(1, 37),
        others=(Sizes(1, 50), Sizes(1, 20)),
        twin="sigmoid_loss",
        part=2,
        passes=1,
        kernels=1,
    ),
    Program(
        name="dual_softmax",
        family="contrastive",
        build=small(lambda dim, heads: DualSoftmax()),
        inputs=feed(two_sets),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        part=2,
        passes=3,
        kernels=2,
        why=AXES + "; then what is final is written",
    ),
    Program(
        name="dual_softmax_logspace",
        family="contrastive",
        build=small(lambda dim, heads: DualSoftmaxLogspace()),
        inputs=feed(two_sets),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="dual_softmax",
        part=2,
        passes=3,
        kernels=2,
        why=AXES + "; then what is final is written",
    ),
    Program(
        name="mutual_best",
        family="contrastive",
        build=small(lambda dim, heads: MutualBest()),
        inputs=feed(two_sets),
        traced=Sizes(2, 20, 37),
        others=(Sizes(1, 50), Sizes(3, 37, 20)),
        part=2,
        passes=2,
        kernels=2,
        why=AXES,
    ),
    Program(
        name="mutual_best_by_hand",
        family="contrastive",
        build=small(lambda dim, heads: MutualBestByHand()),
        inputs=feed(two_sets),
        traced=Sizes(2, 37),
        others=(Sizes(1, 20, 50), Sizes(3, 20)),
        twin="mutual_best",
        part=2,
        passes=2,
        kernels=2,
        why=AXES,
    ),
]
