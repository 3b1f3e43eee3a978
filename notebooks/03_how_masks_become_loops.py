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
# # How masks become loops
#
# Under a causal mask half of all scores are thrown away, under a window or a mask of documents most of them.
# A program in plain PyTorch computes them all the same. Its kernel need not: it goes through the keys tile by
# tile, and a tile in which a mask leaves nothing can be left out. One in which the mask leaves everything
# needs no code for it. This notebook shows how the rewriter finds out which is which: by *loop bounds* where
# arithmetic tells, by a *map of tiles* where only data does, and at run time where a mask is not a mask but a
# large negative number.
#
# Everything runs on a CPU, through Triton's interpreter.

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"

import inspect
import math
import re
import sys
import warnings

import torch

from rewriter import rewrite
from rewriter.derive import derive

from rewriter.ir.printer import show
from rewriter.lift import lift
from rewriter.plan import NeedsFixed, plan
from rewriter.sparsity import truth_of
from rewriter.trace import capture

warnings.filterwarnings("ignore", category=RuntimeWarning)  # NumPy's, inside the interpreter
torch.manual_seed(0)
LENGTH, TILE = 512, 64
q, k, v = (torch.randn(1, 2, LENGTH, 16) for _ in range(3))
m, n = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)

# %% [markdown]
# ## Five masks
#
# A row of a picture is a tile of 64 queries, a column a tile of 64 keys. `██` is a tile that the mask leaves
# whole, `▒▒` one that it cuts, and ` ·` one of which it leaves nothing.


# %%
def tiles_of(mask):
    """0, 1 or 2 for every tile: the mask leaves nothing of it, something, or all."""
    split = mask.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE))
    return split.any(3).any(1).int() + split.all(3).all(1).int()


def picture(tiles):
    return ["".join((" ·", "▒▒", "██")[kind] for kind in row) for row in tiles.tolist()]


def print_beside(**pictures):
    """Pictures side by side, their names above."""
    print("   ".join(name.ljust(2 * LENGTH // TILE) for name in pictures))
    for rows in zip(*pictures.values()):
        print("   ".join(rows))


documents = torch.tensor([150, 90, 200, 72])
ids = torch.arange(4).repeat_interleave(documents)[None]
patches = torch.rand(8, 8).lt(0.4).repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
patches[:64, :32], patches[:, 400:] = True, False
MASKS = {
    "causal": n <= m,
    "window": (n <= m) & (m - n < 130),
    "prefix": (n <= m) | (n < 200),
    "documents": (ids[0, :, None] == ids[0]) & (n <= m),
    "dense": patches,
}
print_beside(**{name: picture(tiles_of(mask)) for name, mask in MASKS.items()})

# %% [markdown]
# ## Bounds
#
# Lifting turns every spelling of a mask into a *predicate* of the reductions: which `n` take part at row `m`.
# Here are three programs, and their predicates.


# %%
def masked(q, k, v, keep):
    return (q @ k.mT * 0.25).masked_fill(~keep, -math.inf).softmax(-1) @ v


def positions(q):
    at = torch.arange(q.shape[-2], device=q.device)
    return at[:, None], at


def causal(q, k, v):
    m, n = positions(q)
    return masked(q, k, v, n <= m)


def window(q, k, v):
    m, n = positions(q)
    return masked(q, k, v, (n <= m) & (m - n < 130))


def prefix(q, k, v):
    m, n = positions(q)
    return masked(q, k, v, (n <= m) | (n < 200))


def swept(function, args):
    """The one loop that a program's kernel has, and a letter for each axis."""
    bound = {}
    while True:
        traced = capture(function, args, {}, bound)
        try:
            (kernel,) = plan(derive(lift(traced).regions[0].program), function.__name__).kernels
        except NeedsFixed as needs:
            bound |= dict.fromkeys(d for size in needs.sizes for d in traced.dimensions_of(size))
            continue
        return kernel, kernel.sweeps[0], dict(zip((*kernel.grid, *kernel.rows, *kernel.streams), "bhmn"))


for function in (causal, window, prefix):
    kernel, sweep, letters = swept(function, (q, k, v))
    print(f"{function.__name__}: n where", show(sweep.definitions[0].predicate, letters))

# %% [markdown]
# An inequality in which `n` stands once can be solved for it. The conjunction of two is where their intervals
# meet, a disjunction at most what spans both. So each predicate gets two intervals whose ends the kernel knows
# before its loop: `outer`, outside of which it never holds, and `inner`, inside of which it always does.

# %%
for function in (causal, window, prefix):
    kernel, sweep, letters = swept(function, (q, k, v))
    for name in ("outer", "inner"):
        interval = getattr(sweep.support, name)
        ends = [end and show(end, letters) for end in (interval.lower, interval.upper)]
        print(f"{function.__name__:8} {name}: from {ends[0] or 'the first'} to before {ends[1] or 'the end'}")

# %% [markdown]
# A tile of rows takes the least and greatest of those ends over its rows. The loop over whole tiles has no
# mask code at all, and its counterpart over the others starts and ends where the picture does:

# %%
for function in (causal, window, prefix):
    text = rewrite(function, (q, k, v)).sources[f"kernels/{function.__name__}.py"]
    print(function.__name__, *(line for line in text.splitlines() if line.startswith("    for ")), sep="\n")

# %% [markdown]
# ## Maps
#
# Whether `ids[m] == ids[n]` no arithmetic tells. For documents the bounds say no more than that the future is
# left out. But ids can be looked at before: they are few, and all heads share them.


# %%
def of_documents(q, k, v, ids):
    m, n = positions(q)
    same = ids[:, None, :, None] == ids[:, None, None, :]
    return masked(q, k, v, same & (n <= m))


def short(text):
    return re.sub(r"unsqueeze_\d\[b, (0, )*([mn])(, 0)*\]", r"ids[b, \2]", text)


kernel, sweep, letters = swept(of_documents, (q, k, v, ids))
print("n where", short(show(sweep.definitions[0].predicate, letters)))
print("outer to before", show(sweep.support.outer.upper, letters), "- inner:", sweep.support.inner)
for name in ("causal", "documents"):
    print(f"tiles of which the {name} mask leaves something:", int(tiles_of(MASKS[name]).gt(0).sum()))
print("a map over", *(letters[a] for a in (*sweep.map.grid, sweep.map.row)), "and not over h")

# %% [markdown]
# A small kernel runs before the main one. For a tile it takes the least and greatest id of its rows, and of
# its keys. Where the two ranges do not meet, no pair is equal; where all four are one number, all are. The same
# rules take in comparisons of positions, `//`, `|x|`, `and`, `or` and `not`:

# %%
truth = truth_of(sweep.definitions[0].predicate, sweep.map.row, sweep.stream)
for name, condition in (("something", truth.some), ("everything", truth.every)):
    print(f"{name} if all of", *short(show(condition, letters)).split(" & "), sep="\n    ")

# %% [markdown]
# It reads each id once for a tile of rows, instead of comparing all pairs, and writes two lists: whole tiles,
# and those that are cut. The main kernel loops over the first without mask code, then over the second. To see
# them, we let everything run but the main kernel.


# %%
def seen_by(function, args):
    """What the main kernel of a rewritten program is given."""
    rewritten = rewrite(function, args).module
    file, *_ = (x for name, x in sys.modules.items() if name.endswith(f"kernels.{function.__name__}"))
    kernel, given = getattr(file, f"{function.__name__}_kernel"), {}
    vars(file).setdefault("FEW", {})["rows"] = 0  # few rows, too, go the way of many

    class Instead:
        def __getitem__(self, grid):
            return lambda *values, **config: given.update(zip(kernel.arg_names, values), **config)

    setattr(file, f"{function.__name__}_kernel", Instead())
    file.PREPARED.clear()  # launches that know the kernel itself
    rewritten(*args)
    setattr(file, f"{function.__name__}_kernel", kernel)
    file.PREPARED.clear()
    return given


def listed(function, args):
    """The tiles of 64 x 64 as the lists of a map have them."""
    given = seen_by(function, args)
    high, wide, tile_map = given["BLOCK_M"], given["BLOCK_N"], given["tile_map_ptr"]
    kinds = torch.zeros(len(tile_map), tile_map.shape[2] - 1, dtype=torch.int32)
    for kind, (row, lists) in ((kind, pair) for pair in enumerate(tile_map) for kind in (2, 1)):
        count, *places = lists[2 - kind].tolist()
        kinds[row, places[:count]] = kind
    as_mask = lambda kind: kinds.ge(kind).repeat_interleave(high, 0).repeat_interleave(wide, 1)  # noqa: E731
    return tiles_of(as_mask(1)).clamp(max=1) + tiles_of(as_mask(2)).div(2, rounding_mode="floor")


by_map, by_looking = listed(of_documents, (q, k, v, ids)), tiles_of(MASKS["documents"])
print_beside(listed=picture(by_map), looked_at=picture(by_looking))
assert torch.equal(by_map, by_looking)

# %% [markdown]
# Ranges may call a tile cut that is empty, never the other way round. Here even and odd ids take turns every 128
# tokens: ranges of 0 to 2 and of 1 to 3 meet, though no two ids are equal. Nothing is lost by that but time.

# %%
mixed = (torch.arange(LENGTH) % 2 * 2 + torch.arange(LENGTH) // 128 % 2)[None]
by_map = listed(of_documents, (q, k, v, mixed))
by_looking = tiles_of((mixed[0, :, None] == mixed[0]) & (n <= m))
print("tiles that the map lists:", int(by_map.gt(0).sum()), "- that are not empty:", int(by_looking.gt(0).sum()))
assert (by_map >= by_looking.clamp(max=1)).all()

# %% [markdown]
# A dense mask has no rule. There the kernel before looks at every position once, and a second one makes the
# lists; what they say is exact.


# %%
def of_patches(q, k, v, keep):
    return masked(q, k, v, keep)


by_map, by_looking = listed(of_patches, (q, k, v, patches[None, None])), tiles_of(patches)
print_beside(listed=picture(by_map), looked_at=picture(by_looking))
assert torch.equal(by_map, by_looking)

# %% [markdown]
# A map has its price. Where no matrix product would be left out, where a band is narrow, or where no two
# heads share a dense mask, the plan has none, and says so.


# %%
def banded(q, k, v, ids):
    m, n = positions(q)
    same = ids[:, None, :, None] == ids[:, None, None, :]
    return masked(q, k, v, same & ((m - n).abs() < 20))


print(swept(banded, (q, k, v, ids))[1].mapped)

# %% [markdown]
# ## Fills
#
# Many programs mask with a number: `masked_fill(mask, -1e9)`. In a row that sees anything at all this is the
# same: `exp(-1e9 - max)` is 0 in any float that a GPU has. In a row that sees *nothing*, all scores are -1e9,
# and eager gives the mean of all values. A kernel that leaves tiles out would give something else.
#
# So tiles of nothing but fills are put off. After the others the kernel knows the maxima of its rows, and only
# where one of them is no larger than the fill (by 104: below that, `exp` is 0 in fp32) it takes the rest too.
# The state of a sweep is a sum; what is added last counts as what is added first.


# %%
def filled(q, k, v):
    m, n = positions(q)
    return (q @ k.mT * 0.25).masked_fill((n > m) | (m < 70), -1e9).softmax(-1) @ v


result = rewrite(filled, (q, k, v))
text = result.sources["kernels/filled.py"]
at = text.index("    # What is left out")
print(inspect.cleandoc("\n" + text[at : text.index("m_new", at)].rpartition("\n")[0]))

# %% [markdown]
# The first 70 rows see nothing, and are the mean. Their two tiles of rows read all values; in the next two no
# row needs what comes after it, so they do not see NaN there.

# %%
out = result.module(q, k, v)
print("first rows against the mean:", f"{(out[:, :, :70] - v.mean(-2, keepdim=True)).abs().max():.0e}")
print("all against eager:          ", f"{(out - filled(q, k, v)).abs().max():.0e}")
broken = v.clone()
broken[:, :, 300:] = math.nan
print("rows without NaN:", int((~result.module(q, k, broken).isnan().any(-1)[0, 0]).sum()), "of", LENGTH)

# %% [markdown]
# A number that is *added*, `scores - 1e9 * hidden`, does not hide the score that it is added to, and without a
# bound on scores nothing may be left out. Such a program is computed in full, as eager does.


# %%
def added(q, k, v):
    m, n = positions(q)
    return (q @ k.mT * 0.25 + torch.where(n <= m, 0.0, -1e9)).softmax(-1) @ v


for function in (filled, added):
    kernel, sweep, letters = swept(function, (q, k, v))
    print(function.__name__, "- fills:", sweep.fill and sweep.fill.floors, "- bounds:", sweep.support is not None)
