"""The losses as Triton kernels that tile the scores: a file a loss; importing anything here imports
triton.

`info_nce`, `in_batch` and `rankpo` are what ops call. `inputs` are a batch with what every pass
needs of it, `passes` are what InfoNCE's pipelines are made of; their kernels: `rows` walk
embeddings row by row, `scores` tile the scores, `slopes` lie between the passes, `products` are
gradient products that cuBLAS has no form of. `blocks` is what launchers share, `tiles` says how
large, `launches` lists every launch for the ahead-of-time checks.
"""
