"""Attention of packed tokens over intervals."""

from .reference import interval_attention

__all__ = ["interval_attention"]
