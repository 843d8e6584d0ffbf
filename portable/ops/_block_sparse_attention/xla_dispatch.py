"""Blocks of keys, for which the queries that select them are gathered."""

from portable.ops._block_sparse_attention.dispatch import Setting, form

IMPL = form(Setting(rows=256, room=2**25, few=16, crowd=16))
