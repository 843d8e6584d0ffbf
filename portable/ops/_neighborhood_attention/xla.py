"""Tiles of queries, each with the keys that its windows hold: products of tiles, masked where windows differ."""

from portable.ops._neighborhood_attention.halo import form
from portable.ops._neighborhood_attention.tables import Setting

SETTING = Setting(rows=16, mask=1.1, budget=8 << 20, unroll=32)
IMPL = form(SETTING)
