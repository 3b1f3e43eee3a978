"""Attention programs drawn at random, as source text: what a user might write, each line one choice of several.

Nothing here knows what the rewriter supports. Letters name dimensions: batch b, query heads h, key heads g, queries m,
keys n, width of queries and keys d, width of values e.
"""

from random_programs.author import WEIGHTS, attention_programs, wider_programs
from random_programs.outputs import OUTPUTS
from random_programs.words import RandomProgram

__all__ = ["OUTPUTS", "WEIGHTS", "RandomProgram", "attention_programs", "wider_programs"]
