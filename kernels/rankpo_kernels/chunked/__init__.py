"""The losses as torch GEMMs over chunks of rows, on any device: a file a loss.

`info_nce`, `in_batch` and `rankpo` are what ops call. On the CPU the row work between the GEMMs is
native: `native` is the ctypes face of the C++ library. `chunks` cuts rows, `blocks` are the scores
of InfoNCE's general form, `norms` what normalisation takes, `ring` InfoNCE of passages that travel
between ranks.
"""
