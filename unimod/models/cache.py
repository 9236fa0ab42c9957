"""Keys and values of what the layers have processed, so that a token generated later costs one token.

    cache = KVCache(rows=len(sequences), room=longest + new)
    h = model(pack(sequences), cache=cache)                 # the known tokens, with their own intervals
    h = model(appended(...), cache=cache)                   # then at most one token per row, which sees all of its row

Every layer has its own length per row: a routed layer writes the tokens it keeps and no others. Positions are the
original ones, because keys are stored after their rotary embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.attention import interval_attention
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

        q: [H, T, d]; k, v: [H_kv, T, d], of the tokens that `state` gives the layer. Returns [T, H, d]. Raises
        RuntimeError when a sequence is fed several tokens after the first time.
        """
        first = layer not in self.keys
        if first:
            for store in (self.keys, self.values):
                # when the layer first runs: it alone knows its heads, width and dtype
                store[layer] = k.new_zeros(self.rows, k.shape[0], self.room, k.shape[2])
            self.used[layer] = torch.zeros(self.rows, dtype=torch.long, device=k.device)
        if state.decode:
            return self._append(layer, q, k, v, scale, state.active)
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
        return _attend_one(q, keys, values, allow, scale)

    def _append(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, active: Tensor | None) -> Tensor:
        """One token of every row, in order, over all the room there is: one size at every step. A token that does not
        stay is seen by itself only, and the next one takes its place."""
        used, rows = self.used[layer], torch.arange(self.rows, device=k.device)
        self.keys[layer][rows, :, used] = k.transpose(0, 1)
        self.values[layer][rows, :, used] = v.transpose(0, 1)
        allow = torch.arange(self.room, device=k.device) <= used[:, None]
        used.add_(1 if active is None else active.long())
        return _attend_one(q, self.keys[layer], self.values[layer], allow, scale)


def _attend_one(q: Tensor, keys: Tensor, values: Tensor, allow: Tensor, scale: float) -> Tensor:
    """One query per sequence: q [H, B, d] over keys and values [B, H_kv, n, d] where allow [B, n] says so. Returns [B,
    H, d]."""
    out = F.scaled_dot_product_attention(q.transpose(0, 1)[:, :, None], keys, values, attn_mask=allow[:, None, None],
                                         scale=scale,
                                         enable_gqa=q.shape[0] != keys.shape[1])
    return out[:, :, 0]
