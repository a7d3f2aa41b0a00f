"""Kernels of rankpo_fast and their launchers. The losses that use them are in `rankpo_fast.ops`.

`chunked` computes InfoNCE as GEMMs over chunks of rows on any device, `pointwise` the losses that
are sums over pairs of a batch, `ring` InfoNCE of passages that travel between ranks, `pairs` the
losses of passages ranked for a query, a row at a time, and `native` is the ctypes face of the C++
library that does their row work on the CPU.
"""
