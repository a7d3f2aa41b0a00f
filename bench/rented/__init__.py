"""Fifteen minutes on a rented GPU without internet: `make gpu`, where every minute counts.

    make gpu-carry                  here: Triton's cache and wheels into build/gpu-carry
    OUT=... COMMIT=... make gpu     there, or without make: python3 -m bench.rented
    RESUME=... make gpu             there again: what the first call did not reach
    make gpu REHEARSE=1             on a CPU, tiny: every part runs, no figure means anything

The checkout travels, and build/gpu-carry with it; OUT comes back: results.json, a result file of
the bench, and log.txt. MINUTES=6 is the length of a call, ONLY="probes speed" leaves out the other
steps, AGAIN=speed runs a step that is done.

A step is a list of parts. A part's results are on the disk when it ends, so that nothing is lost
when time is up, and a second call goes on where the first was cut off. `state` is what is written,
`runner` runs parts in processes of their own within their times, `steps` lists what is asked and
how long it may take; `probes`, `correctness`, `speed`, `memory` and `commands` are what the steps
are made of, `pipelines` and `plan` what is launched and at which sizes. `cache`, `carried` and
`wheels` are what travels.
"""
