"""Large blocks: fewer steps, and products large enough for a matrix unit."""

from portable.ops._attention.walk import form

IMPL = form(512, 512)
