"""See conftest.py, which makes the cases."""


def test_what_it_costs(run, benchmark):
    benchmark(run)
