"""Blocks of queries, whose selected keys are gathered."""

from portable.ops._block_sparse_attention.gather import form

IMPL = form(2**19)
