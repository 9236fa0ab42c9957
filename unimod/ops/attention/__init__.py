"""Attention of packed tokens over intervals."""

from .reference import attention_received, interval_attention

__all__ = ["attention_received", "interval_attention"]
