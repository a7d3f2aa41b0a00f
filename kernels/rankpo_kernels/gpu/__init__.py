"""Triton kernels of the losses and their launchers; importing anything here imports triton.

`rows` are kernels that walk embeddings row by row, `scores` those that tile the scores, `products`
the gradient products that cuBLAS has no form of, `slopes` what lies between the passes; `info_nce`
launches them, `blocks` is what launchers share, `tiles` says how large, `pointwise` has the losses
that are sums over pairs of a batch, and `pairs` the one kernel of ranked passages.
"""
