"""``sla-sweep``: the grid of the paper (arXiv 2406.11274), distance by skip groups by context by size by seed."""
