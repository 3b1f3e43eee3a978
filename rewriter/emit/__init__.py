"""Stage emit: kernel plans → readable Triton files."""

from rewriter.emit.expr import NotEmittable
from rewriter.emit.kernel_file import Entry, KernelFile, Source, emit_kernel
from rewriter.emit.render import render

__all__ = ["Entry", "KernelFile", "NotEmittable", "Source", "emit_kernel", "render"]
