"""Kernels of rankpo_fast and their launchers. The losses that use them are in `rankpo_fast.ops`.

`problem` is what a loss is asked, `relations` who belongs to whom, `objective` the arithmetic of
InfoNCE. Two wings compute the losses, each with a file a loss: `chunked` as torch GEMMs over chunks
of rows with native row work, on any device, and `triton` as kernels that tile the scores.
"""
