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
# # When one pass is not enough
#
# Softmax attention needs one sweep over the keys, because what a finished maximum would change can be made up
# for by one factor (see the first notebook). Not every reduction is so forgiving. Here are three programs
# whose reductions need what others have *finished*, what `derive` makes of them, and what `plan` does: another
# sweep in the same kernel, an output written position by position, or a second kernel.
#
# Everything runs on a CPU, through Triton's interpreter.

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"

import re
import textwrap
import warnings

import torch

from rewriter import rewrite
from rewriter.derive import derive
from rewriter.ir import Index, Load, Reduce, walk
from rewriter.ir.printer import show_output
from rewriter.lift import lift
from rewriter.plan import NeedsFixed, plan
from rewriter.trace import capture

torch.manual_seed(0)
q, k, v = torch.randn(2, 45, 16), torch.randn(2, 60, 16), torch.randn(2, 60, 32)

# %% [markdown]
# Two helpers. One takes a function of `q`, `k` and `v` to its chain and its plan, as the command does; the other
# prints a chain with a letter for each axis, and `s[b, m, n]` for the score.


# %%
def planned(function, args=(q, k, v)):
    """The chain of a function and its plan; sizes that a kernel keeps whole are bound as planning asks."""
    bound = {}
    while True:
        traced = capture(function, args, {}, bound)
        chain = derive(lift(traced).regions[0].program)
        try:
            return chain, plan(chain, function.__name__)
        except NeedsFixed as needs:
            bound |= dict.fromkeys(d for size in needs.sizes for d in traced.dimensions_of(size))


def letters(chain):
    """A letter for every axis, by the dimension of q, k or v that it indexes."""
    dims = {"q": "bmd", "k": "bnd", "v": "bne", "unsqueeze": "b_ne"}  # v[:, None]
    names = {}
    for load in (n for n in walk(*chain.roots) if isinstance(n, Load)):
        for entry, letter in zip(load.index, dims[load.tensor.name], strict=True):
            if isinstance(entry, Index):
                names.setdefault(entry.axis, letter)
    return names | {a: "d" for n in walk(*chain.roots) if isinstance(n, Reduce) for a in n.axes}


def short(text):
    return re.sub(r"\(sum_d q\[b, m, d\] \* k\[b, n, d\]\)|sum_d q\[b, m, d\] \* k\[b, n, d\]", "s[b, m, n]", text)


def print_chain(chain):
    names = letters(chain)
    for definition in chain.definitions:
        line = f"sweep {definition.sweep + 1}:  {short(definition.show(names))}"
        print(textwrap.fill(line, 110, subsequent_indent=" " * 12))
    for output in chain.outputs:
        print(textwrap.fill(f"then      {short(show_output(output, names))}", 110, subsequent_indent=" " * 12))


# %% [markdown]
# ## A deviation from what is not finished
#
# The mean of the values under softmax weights, and their variance. Its terms are `(v - mean)²`, and the mean
# is known when the sweep is over.


# %%
def mean_and_variance(q, k, v):
    p = torch.softmax(torch.einsum("bmd,bnd->bmn", q, k), dim=-1)
    mean = torch.einsum("bmn,bne->bme", p, v)
    apart = v[:, None] - mean[:, :, None]
    return mean, torch.einsum("bmn,bmne->bme", p, apart * apart)


chain, chain_plan = planned(mean_and_variance)
print_chain(chain)

# %% [markdown]
# The maximum, the sum of weights and the mean share the first sweep, as in the first notebook. The variance has
# a sweep of its own, for a reason that the derivation gives:

# %%
print(*(f"- {note}" for note in chain.derivation), sep="\n")

# %% [markdown]
# On paper there is a way out, `E[v²] - E[v]²`: both are sums that one sweep can make. In floating point it
# subtracts two numbers that are nearly the same. With values around 30 it costs three digits:


# %%
def in_one_sweep(q, k, v):
    p = torch.softmax(torch.einsum("bmd,bnd->bmn", q, k), dim=-1)
    mean, square = (torch.einsum("bmn,bne->bme", p, x) for x in (v, v * v))
    return mean, square - mean * mean


def relative(out, reference):
    return ((out - reference).norm() / reference.norm()).item()


moved = v + 30
exact = mean_and_variance(q.double(), k.double(), moved.double())[1]
print(f"centred, as written:  {relative(mean_and_variance(q, k, moved)[1], exact):.0e}")
print(f"E[v²] - E[v]²:        {relative(in_one_sweep(q, k, moved)[1], exact):.0e}")

# %% [markdown]
# So a rule that is right in algebra is not used where rounding would notice, and the price is a second look at
# the keys. What is *not* paid is memory: the weights are computed again, tile by tile, and never written.
#
# ## An output as wide as the sweep
#
# Whoever returns the weights wants what nobody can say before the end: each divided by the finished sum. They
# are written in the last sweep, position by position.


# %%
def with_weights(q, k, v):
    p = torch.softmax(torch.einsum("bmd,bnd->bmn", q, k), dim=-1)
    return torch.einsum("bmn,bne->bme", p, v), p


chain, chain_plan = planned(with_weights)
print_chain(chain)
(kernel,) = chain_plan.kernels
for number, sweep in enumerate(kernel.sweeps, 1):
    made = [d.name for d in sweep.definitions], [o.name for o in sweep.outputs]
    print(f"sweep {number}: computes {', '.join(made[0]) or 'nothing new'}; writes {', '.join(made[1]) or 'nothing'}")

# %% [markdown]
# ## Rows of another kind
#
# In slot attention the softmax runs over the *queries*: slots compete for each input. Then each slot averages
# the inputs it has won, with weights that sum to one. The first reduction has inputs for rows and sweeps over
# slots, the second has slots for rows and sweeps over inputs.


# %%
def slots(q, k, v):
    p = torch.softmax(torch.einsum("bmd,bnd->bmn", q, k), dim=1) + 1e-8
    return torch.einsum("bmn,bne->bme", p / p.sum(-1, keepdim=True), v)


chain, chain_plan = planned(slots)
print_chain(chain)

# %% [markdown]
# A program of a kernel holds a tile of rows and walks the stream. No tile of slots ever sees all slots, and
# so no sweep over inputs can finish the first softmax: two kernels, and between them, in memory, one number
# per input for the maximum and one for the sum.

# %%
names = letters(chain)
for kernel in chain_plan.kernels:
    rows, streams = (", ".join(names[a] for a in axes) for axes in (kernel.rows, kernel.streams))
    print(f"{kernel.name}: rows {rows}, stream {streams}; writes {', '.join(o.name for o in kernel.outputs)}")
print("between them:", *(f"{t.name} {t.dtype}" for t in chain_plan.results))

# %% [markdown]
# ## All three, run
#
# The error of each against float64, beside eager's own in float32. (The interpreter computes positions past the
# end too, as a GPU does, and NumPy warns of what is divided there and thrown away.)

# %%
warnings.simplefilter("ignore", RuntimeWarning)

for function in (mean_and_variance, with_weights, slots):
    rewritten = rewrite(function, (q, k, v))
    (found,) = rewritten.report["chains"]
    for lengths in ((45, 60), (7, 33)):
        args = torch.randn(2, lengths[0], 16), torch.randn(2, lengths[1], 16), torch.randn(2, lengths[1], 32)
        runs = [f(*x) for f, x in ((rewritten.module, args), (function, args), (function, [a.double() for a in args]))]
        outs, own, exact = (run if isinstance(run, tuple) else (run,) for run in runs)
        errors = [(relative(a, c), relative(b, c)) for a, b, c in zip(outs, own, exact, strict=True)]
        print(f"{function.__name__} at {lengths}: {found['passes']} passes;", *(f"{a:.0e} (eager {b:.0e})" for a, b in errors))
        assert all(ours <= max(2 * eager, 2e-6) for ours, eager in errors)

# %% [markdown]
# How many passes a chain takes is not written down anywhere in the rewriter. Each reduction goes into the first
# sweep in which a form for it can be derived and proved; change a line of the programs above, and see it move.
