# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From softmax to online softmax
#
# Attention needs a softmax over every key, and a softmax needs a maximum and a sum over every key before it
# can give its first weight. Written down naively that is three sweeps over a matrix of scores that nobody
# wants to store. The *online* form does it in one sweep, with a few numbers per row to remember.
#
# Textbooks invent the online form. Here it is **derived**: we start from plain PyTorch and walk through the
# stages of the rewriter one at a time, printing what each of them hands to the next.
#
#     trace → lift → derive → plan → emit → check
#
# Everything runs on a CPU: Triton's interpreter, chosen before Triton is imported, runs the kernel at the
# end.

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"

import itertools
import math
import re
import textwrap

import torch
from torch import nn

from rewriter import rewrite
from rewriter.derive import NotDerivable, derive
from rewriter.emit import Source, emit_kernel
from rewriter.ir import Param, Reduce, walk
from rewriter.ir.evaluate import evaluate
from rewriter.ir.printer import show, show_output, show_program
from rewriter.lift import lift
from rewriter.plan import NeedsFixed, plan
from rewriter.trace import capture

# %% [markdown]
# ## The program
#
# Causal attention whose scores are pressed into (-100, 100) by a tanh, as one would write it without a thought
# for speed. Three tensors as wide as rows × keys come into being: the scores, the mask and the weights. The
# head dimensions differ (16 for queries and keys, 32 for values) only to keep their letters apart below.


# %%
class SoftcapCausal(nn.Module):
    def forward(self, q, k, v):
        scores = torch.einsum("bmd,bnd->bmn", q, k)
        scores = 100.0 * torch.tanh(scores / 100.0)
        causal = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril()
        scores = scores.masked_fill(~causal, -math.inf)
        return torch.softmax(scores, dim=-1) @ v


torch.manual_seed(0)
q, k, v = torch.randn(2, 70, 16), torch.randn(2, 70, 16), torch.randn(2, 70, 32)
plain = SoftcapCausal()(q.double(), k.double(), v.double())

# %% [markdown]
# ## Trace
#
# `capture` turns the module into a graph of ATen calls. Nothing is decomposed (softmax is still one node),
# and every size is a symbol: the 70 above is an example, no constant.

# %%
traced = capture(SoftcapCausal(), (q, k, v), {})
print(traced.graph)

# %% [markdown]
# ## Lift
#
# A graph of tensors says *which calls were made*; to reorder reductions we need *what they mean*. `lift`
# finds the part of the graph that is wide, and writes each of its results as a function from positions to a
# scalar. Views, masks from positions and broadcasting are gone: they were only ever ways to say which index
# goes where. The mask, for one, is now the comparison of two positions.

# %%
region = lift(traced).regions[0]
notation = show_program(region.program)
print(textwrap.fill(notation, 110))

# %% [markdown]
# The names are canonical: axes that a reduction binds are numbered by how deep it nests, so that two
# reductions that mean the same print the same. In fact they *are* the same, since equal nodes are one object.
# The maximum is printed twice, in the numerator and in the denominator, but there is one of it.

# %%
reductions = [n for n in walk(region.program.outputs[0].body) if isinstance(n, Reduce)]
maxima = [n for n in reductions if n.op == "max"]
print("maxima printed:", notation.count("max_"), "as objects:", len(maxima))

# %% [markdown]
# For people, letters are better. Two helpers: one names axes by what they range over (the number is the depth
# of the reduction that binds it), the other abbreviates the score by `s`.


# %%
def letters(program, *extra):
    """A letter for every axis of a program and of `extra`, by its extent."""
    shape = {t.name: t.shape for t in program.tensors}
    letter = dict(zip((*shape["q"], *shape["v"][1:]), "bmdne", strict=True))
    bound = [
        a for o in program.outputs for n in walk(o.body) if isinstance(n, Reduce) for a in n.axes
    ]
    names = {a: letter[a.extent] + a.name[1] for a in bound}
    names |= {a: "d" for a in bound if letter[a.extent] == "d"}
    return names | {a: letter[a.extent] for a in (*program.outputs[0].axes, *extra)}


def short(text):
    """`text` with the softcapped score of a query and a key as `s[b, m, n]`."""
    score = r"tanh\(\(sum_d q\[b, m, d\] \* k\[b, (\w+), d\]\) / 100\) \* 100"
    return re.sub(score, r"s[b, m, \1]", text)


(output,) = region.program.outputs
print(textwrap.fill(short(show_output(output, letters(region.program))), 110))

# %% [markdown]
# This is attention in one line: three reductions over keys, of which the second needs the result of the first
# and the third those of both. The line is not a picture of the program but *is* the program: a reference
# evaluator runs it.

# %%
tensors = {"q": q, "k": k, "v": v}
shapes = [(t.shape, tensors[t.name].shape) for t in region.program.tensors]
sizes = {
    s.name: n
    for shape, real in shapes
    for s, n in zip(shape, real, strict=True)
    if isinstance(s, Param)
}
meant = evaluate(region.program, tensors, sizes)[output.name]
print("index notation against eager, both in float64:", f"{(meant - plain).abs().max():.0e}")
assert torch.allclose(meant, plain, rtol=1e-9)

# %% [markdown]
# ## Derive
#
# `derive` brings the program into a *chain*: definitions that each reduce over a stream, here all over `n`
# and all in one sweep, and outputs computed from their final values.

# %%
chain = derive(region.program)
stream = chain.definitions[0].stream
names = letters(region.program, *chain.axes)
for definition in chain.definitions:
    print(short(definition.show(names)))
print(short(show_output(chain.outputs[0], names)))

# %% [markdown]
# Four lines, and three things have happened.
#
# **1. The mask left the score.** `where(m < n, -inf, s)` became a predicate of the reductions: `n <= m`
# stands beside `n`, and says which elements there are. A maximum ignores -inf and a sum ignores exp(-inf), so
# nothing changes; but a predicate can be reasoned about, and what it excludes need never be computed.

# %%
for definition in chain.definitions:
    print(definition.name, "takes n where", show(definition.predicate, names))

# %% [markdown]
# **2. The division was hoisted.** Each weight was divided by a sum that does not depend on `n`, so
#
#     sum_n (w[n] / l) * v[n]  =  (sum_n w[n] * v[n]) / l
#
# and the sum over values no longer waits for the sum of weights. It is one division per output now, not one
# per score.
#
# **3. What is left to wait for became a shift.** Both sums read the maximum inside an exponential, `exp(s -
# max_0)`. Deriving splits their bodies into `exp(exponent - Φ) · rest`, where Φ is all that depends on an
# earlier reduction.

# %%
for definition in chain.definitions[1:]:
    exponent, phi = show(definition.shift.exponent, names), show(definition.shift.phi, names)
    rest = " * ".join(show(r, names) for r in definition.rest) or "1"
    print(f"{definition.name}: exponent = {short(exponent)}, Φ = {phi}, rest = {rest}")

# %% [markdown]
# Halfway through the keys the maximum is provisional, and the sums were made with a Φ that may prove too
# small. The exponential forgives this: exp(x - new) = exp(x - old) · exp(old - new), whatever x was. A
# finished sum can be *moved* from the old Φ to the new one by a single factor,
#
#     T(old → new) = exp(Φ(old) - Φ(new))
#
# without another look at its terms. This is what makes one sweep enough.
#
# A formula is not yet a proof. The derivation carries its reasons: that Φ is at least every exponent seen so
# far, so that no exponential overflows on the way; and that the chain, run block by block and in two merged
# halves, agrees with the program on random values. What is not proved is not used.

# %%
for reason in chain.derivation:
    for axis, letter in names.items():
        reason = reason.replace(axis.name, letter)
    print("-", reason)

# %% [markdown]
# ### Why T(-inf → x) has to be total
#
# Before its first key, a row has seen nothing: its maximum is -inf and its sums are 0. There T(-inf → x) =
# exp(-inf - x) is 0, and 0 · 0 = 0 is what an empty state should contribute. The trap is T(-inf → -inf), for
# a row whose keys so far are *all* masked: exp(-inf + inf) is NaN, and NaN would stay to the end. The same
# holds for the weights, exp(s - Φ). So Φ counts as 0 while it is -inf (it is *settled*), which makes T
# defined everywhere.


# %%
def settled(phi):
    return torch.where(phi == -math.inf, 0.0, phi)


def T(old, new):
    return torch.exp(old - settled(new))


points = [torch.tensor(x) for x in (-math.inf, -3.0, 0.0, 2.5)]
for a, b in itertools.combinations_with_replacement(points, 2):
    print(f"T({a:g} → {b:g}) = {T(a, b):.4g}")
for a, b, c in itertools.combinations_with_replacement(points, 3):
    assert torch.allclose(T(a, b) * T(b, c), T(a, c))

# %% [markdown]
# The loop at the end checks that T composes: going from a to b and on to c is the same as going from a to c.
# So it does not matter into how many blocks the stream is cut. And as the only state with Φ = -inf is the
# empty one, whose sums are 0, it does no harm that T(-inf → -inf) is 0 rather than 1. A row that never sees a
# key ends as 0 / 0, which is NaN, as softmax makes it.
#
# ### By hand
#
# The chain in a few lines of torch, `width` keys at a time. The state is `max_0`, `sum_1` and `sum_2`; no
# tensor is wider than a block.


# %%
def empty(q, v):
    return (
        torch.full_like(q[..., 0], -math.inf),
        torch.zeros_like(q[..., 0]),
        q.new_zeros(*q.shape[:2], v.shape[2]),
    )


def online(q, k, v, keys, width):
    """The state after the range `keys`, in blocks of `width`."""
    max_0, sum_1, sum_2 = empty(q, v)
    m = torch.arange(q.shape[1])[:, None]
    for start in range(keys.start, keys.stop, width):
        n = torch.arange(start, min(start + width, keys.stop))
        s = 100 * torch.tanh(q @ k[:, n].mT / 100)
        s = torch.where(n <= m, s, -math.inf)
        new = torch.maximum(max_0, s.amax(-1))
        weight, t = torch.exp(s - settled(new)[..., None]), T(max_0, new)
        sum_1 = sum_1 * t + weight.sum(-1)
        sum_2 = sum_2 * t[..., None] + weight @ v[:, n]
        max_0 = new
    return max_0, sum_1, sum_2


def result(state):
    return state[2] / state[1][..., None]


wide = q.double(), k.double(), v.double()
for width in (1, 16, 32, 70):
    error = (result(online(*wide, range(70), width)) - plain).abs().max()
    print(f"blocks of {width}: largest difference {error:.0e}")
    assert error < 1e-12

# %% [markdown]
# The same T joins two states that were made apart, by two programs on a GPU or by two GPUs. Of the second
# half below, rows 0 to 34 see nothing at all, and merging with their empty state changes nothing.


# %%
def merged(a, b):
    new = torch.maximum(a[0], b[0])
    ta, tb = T(a[0], new), T(b[0], new)
    return new, a[1] * ta + b[1] * tb, a[2] * ta[..., None] + b[2] * tb[..., None]


first, second = online(*wide, range(35), 16), online(*wide, range(35, 70), 16)
print("rows of the second half that saw no key:", int((second[0][0] == -math.inf).sum()))
assert torch.allclose(result(merged(first, second)), plain, rtol=1e-12)
assert all(map(torch.equal, merged(first, empty(*wide[::2])), first))

# %% [markdown]
# ### What is not derivable
#
# T alone proves nothing about overflow. Subtract the *minimum* instead of the maximum: on paper the quotient
# is the same, yet the weights have no bound any more. The derivation says so, and the program stays as it
# was.


# %%
def shifted_by_minimum(q, k, v):
    scores = torch.einsum("bmd,bnd->bmn", q, k)
    weights = torch.exp(scores - scores.amin(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True) @ v


try:
    derive(lift(capture(shifted_by_minimum, (q, k, v), {})).regions[0].program)
except NotDerivable as reason:
    print("not derivable:", reason)

# %% [markdown]
# ## Plan
#
# A chain says what to compute, a plan says where: in how many kernels (here one), and which role each axis has: batch entries go to the *grid*, a
# program holds a tile of *rows* and walks the *stream*, and *features* stay whole within a tile. A tile's
# width must be known when the kernel is written, so the planner asks for the sizes of the features first. We
# trace once more with these bound; all others stay free.

# %%
try:
    plan(chain, "softcap")
except NeedsFixed as needs:
    print(needs)
    bound = dict.fromkeys(d for size in needs.sizes for d in traced.dimensions_of(size))
print("(input, dimension) to bind:", sorted(bound))

region = lift(capture(SoftcapCausal(), (q, k, v), {}, bound)).regions[0]
chain_plan = plan(derive(region.program), "softcap")
(kernel_plan,) = chain_plan.kernels

# %%
(sweep,) = kernel_plan.sweeps
names = letters(region.program, *chain_plan.chain.axes, *kernel_plan.features)
print("grid:", *(names[a] for a in kernel_plan.grid))
print("rows:", *(names[a] for a in kernel_plan.rows))
print("stream:", names[sweep.stream])
print("features:", ", ".join(f"{names[a]} = {a.extent}" for a in kernel_plan.features))
print("matrix products of tiles:", *(show(dot.node, names) for dot in kernel_plan.dots))
print(kernel_plan.config)

# %% [markdown]
# ## Emit
#
# All decisions are made; what remains is text. Of the emitted file, here is the loop over whole blocks. Read
# it beside `online` above: `m_i`, `l_i` and `acc` are `max_0`, `sum_1` and `sum_2`, `shift` is the settled Φ,
# and `alpha` is T. Comments give the user's line that a statement comes from (in a notebook, the file is the
# cell).

# %%
source = Source("Softcap attention, causal.", "this notebook", "", "rewriter.rewrite(...)")
kernel = emit_kernel(region, chain_plan, source)
loop = kernel.text[kernel.text.index("    for ") :]
print(textwrap.dedent(loop[: loop.index("\n\n")]))

# %% [markdown]
# ## Check
#
# `rewrite` does all of this in one call, and returns a drop-in module whose `forward` calls the kernel. The
# sizes that were left free are: the one module below runs at three shapes. The error of each is measured
# against float64, beside the error that the eager program makes itself in float32. The kernel may make twice
# as much (or 2e-6, where that is more).

# %%
rewritten = rewrite(SoftcapCausal(), (q, k, v))
print(*sorted(rewritten.sources))


def relative(out, reference):
    return ((out - reference).norm() / reference.norm()).item()


for batch, length in ((2, 70), (1, 1), (3, 37)):
    inputs = [torch.randn(batch, length, width) for width in (16, 16, 32)]
    reference = SoftcapCausal()(*(x.double() for x in inputs))
    ours, eager = relative(rewritten.module(*inputs), reference), relative(
        SoftcapCausal()(*inputs), reference
    )
    print(f"batch {batch}, length {length}: kernel {ours:.1e}, eager {eager:.1e}")
    assert ours <= max(2 * eager, 2e-6)

# %% [markdown]
# Nothing above knew that it was dealing with attention. Try it: take the cap away, make the mask a window,
# divide before or after the product with `v`, or append a sink to the scores. The definitions change, and the
# loop with them.
