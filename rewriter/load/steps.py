"""The steps of loading, in order."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

from rewriter.errors import Reason, RewriteError
from rewriter.load.build import Given, construct, definition_line, given_inputs, init_inputs, seed
from rewriter.load.devices import WITHOUT_GPU, without_gpu
from rewriter.load.inputs import TORCH_DTYPES, random_inputs
from rewriter.load.loaded import FROM_FILE, FROM_OPTIONS, Loaded
from rewriter.load.prepare import Model, cast, for_inference, prove
from rewriter.load.running import beside, import_source
from rewriter.load.source import Source, bad_input
from rewriter.load.target import INPUTS, Target, find_target
from rewriter.options import Options


def load_source(source: Source, options: Options) -> Loaded:
    """Import, find, build, draw inputs, prepare, run once.

    Raises:
        RewriteError: with code BAD_INPUT and the user's line, from whichever step fails.
    """
    with beside(source):
        seed()
        module = import_source(source)
        target = find_target(source, module, options.class_name)
        line = _forward_line(source, target)
        if not options.inputs and not hasattr(module, INPUTS):
            raise _no_inputs(source, target, line)
        with without_gpu() as on_cpu:
            init = init_inputs(source, module, target)
            model = construct(source, target, init)
            given = _inputs(source, module, model, options, line)
        notes = for_inference(source, model, source.line_of(target.__name__))
        notes += [Reason(WITHOUT_GPU, source.site(line))] if on_cpu and on_cpu.used else []
        call = cast(model, given.call, TORCH_DTYPES.get(options.dtype))
        notes += prove(source, model, call, line, was_cast=options.dtype is not None)
    args, kwargs = call
    return Loaded(
        module=model,
        args=args,
        kwargs=kwargs,
        file=source.path,
        shown=source.shown,
        class_name=target.__name__,
        module_name=module.__name__,
        inputs_from=FROM_OPTIONS if options.inputs else FROM_FILE,
        line=source.line_of(target.__name__),
        init_form=init.form,
        inputs_form=given.form,
        package=source.package,
        notes=tuple(notes),
    )


def _forward_line(source: Source, target: Target) -> int:
    forward = target.forward if isinstance(target, type) else target
    return definition_line(source, forward) or source.line_of(target.__name__)


def _inputs(source: Source, module: ModuleType, model: Model, options: Options, line: int) -> Given:
    forward: Callable[..., Any] = model.forward if isinstance(model, nn.Module) else model
    if options.inputs:
        return Given(*random_inputs(options.inputs, forward, source.site(line)))
    return given_inputs(source, module, forward)


def _no_inputs(source: Source, target: Target, line: int) -> RewriteError:
    if isinstance(target, type):
        parameters = list(inspect.signature(target.forward).parameters)[1:]  # without self
    else:
        parameters = list(inspect.signature(target).parameters)
    shown = ", ".join(parameters)
    text = f"no inputs for {target.__name__}: define {INPUTS}(), or give --input for each of {shown}"
    return bad_input(text, source.site(line))
