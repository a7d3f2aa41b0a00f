"""The study of `gradient_filter` compares curves with what seeds do."""

import pytest

from bench.training import left_out


def log(seed: int, share: float) -> list[dict]:
    """Curves that lie `share` above exact ones, which seeds move by 0.1."""
    at = 0.1 * seed + share
    losses = [
        {"loss": loss + at, "queries_left_out": out} for loss, out in ((2, 0), (1, 0.5), (0.5, 1))
    ]
    return [*losses, {left_out.NDCG: 0.8 + at}]


def test_a_line_for_each_share(monkeypatch, capsys):
    monkeypatch.setattr(left_out, "train", log)
    left_out.main(["--seeds", "3", "--shares", "0.05", "0.2"])
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first == "| 0.05 | 0%, 50%, 100% | 0.950 (0.900) | 0.50 | 0.50 |"
    assert second.endswith("| 2.00 | 2.00 |")


def test_curves_are_compared_point_by_point():
    assert left_out.apart([[1, 2], [3, 5]], [[1, 2], [1, 2]]) == [1.0, 1.5]
    assert left_out.spread([[1, 5], [3, 5]]) == pytest.approx([2**0.5, 0])
