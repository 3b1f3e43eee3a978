"""Stub of the check stage's entry, replaced below."""
