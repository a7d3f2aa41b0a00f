"""What the losses cost: time, memory and error, each beside the lower bound that the hardware sets,
and beside its peers.

`rankpo-fast bench` (in the tree also `python -m bench`): `__main__.py`. A case asks one question:
`registry.py` has them all. What it finds is a result file, of which tables, reports, comparisons
and README's figures are made.
"""
