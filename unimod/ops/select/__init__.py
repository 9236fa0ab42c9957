"""Selection of the tokens a routed layer processes."""

from .reference import segment_rank, segment_topk

__all__ = ["segment_rank", "segment_topk"]
