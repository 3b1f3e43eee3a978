"""Inputs that are too large for the machine at hand, and GPUs that it lacks."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from rewriter.check.smaller import short_sizes, shown_sizes
from rewriter.check.worker import _at_most, _TooSlow
from rewriter.load import load
from rewriter.load.weight import MOST_WORK, too_large, weighed
from rewriter.options import Options

GIB = 2**30


def attend(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


def call_of(*shape: int):
    return tuple(torch.empty(shape) for _ in range(3)), {}


def test_what_a_run_holds_at_once_is_counted():
    weight = weighed(attend, call_of(2, 1000, 8))
    scores = 2 * 1000 * 1000 * 4
    assert 2 * scores <= weight.bytes < 3 * scores
    assert weight.work == 2 * (2 * 2 * 1000 * 1000 * 8)


def test_what_is_too_large_is_said():
    assert "GiB" in too_large(attend, call_of(2, 40_000, 8), free=16 * GIB)
    assert not too_large(attend, call_of(2, 1000, 8), free=16 * GIB)
    layer, x = nn.Linear(64, 64), torch.empty(1, 64).expand(int(MOST_WORK) // 4096, 64)
    assert "operations" in too_large(layer, ((x,), {}), free=float("inf"))


def test_nothing_is_said_of_a_program_that_needs_values():
    assert not too_large(lambda x: x[: int(x.sum())], ((torch.ones(100_000),), {}), free=1.0)


def test_an_image_is_cut_in_the_dimensions_that_are_free():
    def fits(call):
        return call[0][0].shape[1] == 128

    assert shown_sizes(short_sizes(call_of(2, 128, 128, 128), fits, 31)) == "(2, 128, 31, 31)"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_file_that_asks_for_a_gpu(tmp_path):
    file = tmp_path / "model.py"
    file.write_text(
        "import torch\n"
        "class Model(torch.nn.Module):\n"
        "    def forward(self, x): return x\n"
        "def get_inputs(): return [torch.rand(3, device='cuda'), torch.ones(2).cuda()][:1]\n"
    )
    loaded = load(Options(file))
    assert loaded.args[0].device.type == "cpu" and "no GPU" in loaded.notes[0].text


def test_patience_ends():
    with pytest.raises(_TooSlow), _at_most(1):
        time.sleep(3)
