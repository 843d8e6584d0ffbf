"""Which blocks or tokens a query attends to, by the methods of papers: pure functions that return indices."""
