"""Attention of blocks of queries to the blocks of keys that an array names."""

XLA = {"cpu": "xla_dispatch", "default": "xla_gather"}
WHY = {
    "xla_gather": "goes through blocks of queries and gathers the keys that each selects.",
    "xla_dispatch": "goes through blocks of keys and gathers the queries that select each: for blocks of few queries.",
}
WORK = "xla_gather"
