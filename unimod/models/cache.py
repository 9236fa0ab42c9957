"""Keys and values of what the layers have processed, so that a token generated later costs one token.

    cache = KVCache(rows=len(sequences), room=longest + new)
    h = model(pack(sequences), cache=cache)                 # the known tokens, with their own intervals
    h = model(appended(...), cache=cache)                   # then at most one token per row, which sees all of its row

Every layer has its own length per row: a routed layer writes the tokens it keeps and no others. Positions are the
original ones, because keys are stored after their rotary embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.attention import interval_attention
from ..ops.decode import attend_appended, attend_one
from ..routing import ForwardState


class KVCache:
    """Room for `room` tokens of each of `rows` rows, allocated per layer when the layer first runs."""

    def __init__(self, rows: int, room: int) -> None:
        self.rows, self.room = rows, room
        self.fresh = True
        """Whether no forward has gone through yet."""
        self.keys: dict[int, Tensor] = {}
        """Per layer [B, H_kv, room, d]."""
        self.values: dict[int, Tensor] = {}
        self.used: dict[int, Tensor] = {}
        """Tokens of each row that a layer holds: int64 [B], on the model's device."""
        self._most: dict[int, int] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, state: ForwardState, scale: float) -> Tensor:
        """Write k and v and attend: by the mask when the layer runs first (prefill), else over everything its sequence
        has (decode).

        q: [H, T, d]; k, v: [H_kv, T, d], of the tokens that `state` gives the layer. The cache has v's dtype, to which
        a decode step of one size rounds q and k. Returns [T, H, d]. Raises RuntimeError when a sequence is fed several
        tokens after the first time.
        """
        first = layer not in self.keys
        if first:
            for store in (self.keys, self.values):
                # when the layer first runs: it alone knows its heads, width and dtype
                store[layer] = v.new_zeros(self.rows, v.shape[0], self.room, v.shape[2])
            self.used[layer] = torch.zeros(self.rows, dtype=torch.long, device=v.device)
        if state.decode:
            return attend_appended(q, k, v, self.keys[layer], self.values[layer], self.used[layer], state.active, scale)
        mask, row, used = state.mask, state.batch.row, self.used[layer]
        row = row if state.index is None else row[state.index]
        if not first and max(mask.lengths) > 1:
            raise RuntimeError(f"Rows of {max(mask.lengths)} tokens cannot follow cached ones; append one token per "
                               f"row at a time.")
        # a routed layer's tokens lie without gaps: its lo is the first kept token of the sequence
        place = used[row] + torch.arange(len(row), device=row.device) - mask.lo if first else used[row]
        self.keys[layer][row, :, place] = k.transpose(0, 1)
        self.values[layer][row, :, place] = v.transpose(0, 1)
        used.index_add_(0, row, torch.ones_like(row))
        if first:
            self._most[layer] = max(mask.lengths)
            return interval_attention(q, k, v, mask, scale, state.attention)
        # known on the host, at least what any row holds
        most = self._most[layer] = min(self._most[layer] + 1, self.room)
        # a slice is a view; indexing by sequence copies the cache, which only sequences that have ended cost
        whole = len(row) == self.rows
        keys, values = (store[layer][:, :, :most] if whole else store[layer][row, :, :most]
                        for store in (self.keys, self.values))
        allow = torch.arange(most, device=row.device) < used[row, None]
        return attend_one(q, keys, values, allow, scale)
