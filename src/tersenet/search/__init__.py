"""Spends one budget over the choices of several steps. Takes steps, and names no method."""

from tersenet.search.search import Search

__all__ = ["Search"]
