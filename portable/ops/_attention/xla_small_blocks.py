"""Small blocks: the scores of a head stay in a core's second-level cache, with those of a backward beside them."""

from portable.ops._attention.walk import form

IMPL = form(256, 256)
