"""What the losses cost: time, memory and error, each beside the floor of the hardware and its
peers.

`python -m bench` prints a table and writes one JSON file. A case asks one question; see
`bench/cases`.
"""
