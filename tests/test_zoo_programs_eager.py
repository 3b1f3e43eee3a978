"""The zoo itself: every program runs in plain PyTorch, as it says it does, and has nothing in it that is not used."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from zoo import Program, Sizes, programs
from zoo_checks import NothingWide

from rewriter.check.numerics import ERROR_FLOOR, relative_error, run_float64

ALL = programs(part=None)
BY_NAME = {program.name: program for program in ALL}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
TOLERANCES = {"fp16": 0.02, "bf16": 0.1, "fp64": 1e-5}

every_program = pytest.mark.parametrize("program", ALL, ids=lambda program: program.name)


@pytest.fixture(autouse=True, scope="module")
def one_thread_without_gradients():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small take 7 times as long on two
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def flat(output) -> torch.Tensor:
    """What a program returned, as one row of floating numbers."""
    parts = (output,) if isinstance(output, torch.Tensor) else output
    numbers = torch.cat([part.flatten() for part in parts])
    return numbers if numbers.is_floating_point() else numbers.float()


def call(module, inputs) -> torch.Tensor:
    """The output for copies of the inputs: a program may write into them."""
    return flat(module(*(tensor.clone() for tensor in inputs)))


def cast(value, dtype: torch.dtype):
    """A module or an input at another dtype; integers and booleans stay."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(dtype)
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value


def run_at(program: Program, module, sizes: Sizes, dtype: torch.dtype) -> torch.Tensor:
    inputs = [cast(tensor, dtype) for tensor in program.inputs(sizes, module)]
    return call(cast(module, dtype), inputs)


def test_names_families_and_twins_are_consistent():
    assert len(BY_NAME) == len(ALL)
    for program in ALL:
        assert program.name.replace("_", "").isalnum() and program.name.islower()
        assert program.others and program.traced not in program.others
        assert not program.twin or BY_NAME[program.twin].family == program.family


def test_some_program_is_traced_at_batch_one_and_called_at_three():
    first = programs(part=1)
    grown = [p for p in first if p.traced.batch == 1 and any(s.batch == 3 for s in p.others)]
    assert len(grown) > len(first) // 3


def test_part_two_says_what_it_expects():
    for program in programs(part=2):
        assert (program.passes is not None) == program.fused, program.name
        assert (program.kernels is not None) == program.fused, program.name
        if program.fused:
            assert 1 <= program.kernels <= program.passes, program.name
            assert program.passes == 1 or program.why, program.name


@every_program
def test_runs_at_every_size(program):
    module = program.build()
    for sizes in (program.traced, *program.others):
        output = call(module, program.inputs(sizes, module))
        assert output.numel() > 0 and not output.isinf().any()
        assert output.isnan().any() == program.nan_rows, sizes
        assert not output.isnan().all(), sizes


def writes_wide(program: Program, module, inputs) -> bool:
    given = {tuple(tensor.shape) for tensor in inputs}
    for rows, stream in program.wide(program.traced):
        try:
            with NothingWide(((rows, stream),), given), sdpa_kernel(SDPBackend.MATH):
                module(*(tensor.clone() for tensor in inputs))
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("program", programs(part=2), ids=lambda program: program.name)
def test_what_is_to_be_fused_is_wide(program):
    """Or watching for wide tensors, once it is rewritten, would see nothing."""
    module = program.build()
    inputs = program.inputs(program.traced, module)
    lone = program.rows or not (program.fused or program.eager)
    assert writes_wide(program, module, inputs) == (not lone)


@every_program
def test_float64_run_is_near(program):
    """It is the reference that rewritten programs are measured against."""
    module = program.build()
    inputs = program.inputs(program.traced, module)
    outputs = pytree.tree_leaves(module(*(tensor.clone() for tensor in inputs)))
    exact = pytree.tree_leaves(run_float64(module, inputs))
    assert [(out.shape, out.is_floating_point()) for out in outputs] == [
        (out.shape, out.is_floating_point()) for out in exact
    ]
    for output, reference in zip(outputs, exact, strict=True):
        assert relative_error(output, reference) < 50 * ERROR_FLOOR[torch.float32]


@every_program
def test_built_twice_is_the_same(program):
    first = program.build()
    outputs = [call(m, program.inputs(program.traced, m)) for m in (first, program.build())]
    torch.testing.assert_close(*outputs, rtol=0, atol=0, equal_nan=True)


@every_program
def test_output_depends_on_every_input(program):
    module = program.build()
    inputs = program.inputs(program.traced, module)
    before = call(module, inputs).nan_to_num()
    torch.manual_seed(0)
    for index, tensor in enumerate(inputs):
        changed = torch.ones_like(tensor)
        if tensor.is_floating_point():
            changed = tensor + 0.5 * torch.randn(tensor.shape)
        after = call(module, (*inputs[:index], changed, *inputs[index + 1 :])).nan_to_num()
        assert (after - before).norm() > 1e-3 * before.norm(), f"input {index} is not used"


@every_program
def test_no_parameter_is_constant(program):
    module = program.build()
    if isinstance(module, nn.Module):
        for name, parameter in module.named_parameters():
            assert parameter.abs().min() > 0 or parameter.numel() > 1000, name
            assert parameter.numel() == 1 or parameter.std() > 0, name


@pytest.mark.parametrize("program", [p for p in ALL if p.twin], ids=lambda program: program.name)
def test_twins_agree(program):
    twin = BY_NAME[program.twin]
    module, other = program.build(), twin.build()
    if isinstance(module, nn.Module) and isinstance(other, nn.Module):
        other.load_state_dict(module.state_dict())
    for sizes in (program.traced, *program.others):
        inputs = program.inputs(sizes, module)
        expected = call(other, inputs).nan_to_num()
        torch.testing.assert_close(call(module, inputs), expected, rtol=1e-4, atol=1e-5)


@every_program
@pytest.mark.parametrize("name", DTYPES)
def test_other_precisions_are_as_declared(program, name):
    module = program.build()
    exact = run_at(program, module, program.traced, torch.float32)
    if name not in (*program.dtypes, "fp64"):
        with pytest.raises(RuntimeError, match="overflow|dtype|not implemented"):
            run_at(program, module, program.traced, DTYPES[name])
        return
    output = run_at(program, module, program.traced, DTYPES[name]).float()
    assert output.isnan()[exact.isnan()].all()
    if name != "bf16":  # in bf16, products on a CPU with AMX pass a row's NaN on to its neighbour
        assert not output.isnan()[~exact.isnan()].any()
    error = (output - exact).nan_to_num().norm() / exact.nan_to_num().norm()
    assert error < TOLERANCES[name]
