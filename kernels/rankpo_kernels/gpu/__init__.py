"""Triton kernels of the losses and their launchers; importing anything here imports triton.

`rows` are kernels that walk embeddings row by row, `scores` those that tile the scores, `products`
the gradient products that skip dead tiles; `info_nce` launches them, `tiles` says how large.
`pairs` is the one kernel of ranked passages.
"""
