"""The commands of `portable`, a module each.

A module has `configure(parser)`, which adds its arguments and sets `parser.epilog` to examples (each line begins
with two spaces and `portable`), and `run(args)`, which returns the exit code.
"""
