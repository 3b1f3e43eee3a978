"""Attention programs drawn at random, through the whole path.

The same ones every time; FLASHLIGHT_EXAMPLES=20 draws twenty times as many, anew. A failure shows the program;
with FLASHLIGHT_SHRINK=1, the smallest that fails, after some minutes.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy
from random_programs import OUTPUTS, WEIGHTS, RandomProgram, attention_programs, wider_programs
from strategies import MORE, fixed
from whole_path import assert_right, fused
from zoo_checks import unformatted

PHASES = [Phase.generate, *([Phase.shrink] if os.environ.get("FLASHLIGHT_SHRINK") else [])]
_numbers = itertools.count()


def imported(source: str, folder: Path) -> Callable:
    """`attend` from a file of its own: the rewriter reads the lines."""
    name = f"random_program_{next(_numbers)}"
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.attend


def rows_and_stream(program: RandomProgram, sizes: dict[str, int]) -> tuple[int, int] | tuple[()]:
    """The sizes that nothing may be written over, where they tell, and no input is over both of them."""
    m, n = sizes["m"], sizes["n"]
    others = {sizes["h"] * sizes["d"], sizes["h"] * sizes["e"]}
    is_stored = any({"m", "n"} <= set(made.dims) for made in program.inputs.values())
    return () if is_stored or min(m, n) <= 16 or {m, n} & others else (m, n)


def check(program: RandomProgram, folder: Path) -> None:
    attend = imported(program.source, folder)
    with unformatted():
        result = fused(attend, program.arguments(program.traced), folder / f"package_{next(_numbers)}")
    for sizes in (program.traced, program.other):
        assert_right(result, attend, program.arguments(sizes), rows_and_stream(program, sizes))


def check_every(programs: SearchStrategy[RandomProgram], examples: int, number: int, folder: Path) -> None:
    """`number` is of the kind: else every kind would go with the same masks and layouts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small take longer on two
    seen: set[str] = set()

    @settings(fixed(examples), phases=PHASES)
    @given(program=programs)
    def every_program_drawn(program):
        if program.source not in seen:
            check(program, folder)
            seen.add(program.source)

    drawn = every_program_drawn if MORE else seed(number)(every_program_drawn)
    drawn()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_random_programs(weights, tmp_path):
    check_every(attention_programs(weights), 3, WEIGHTS.index(weights), tmp_path)


@pytest.mark.parametrize("output", OUTPUTS)
def test_random_programs_of_several_outputs(output, tmp_path):
    check_every(wider_programs(output), 3, OUTPUTS.index(output), tmp_path)
