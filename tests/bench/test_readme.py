"""Figures of README and docs/ are those of the committed result files."""

import dataclasses

import pytest

from bench.readme import MARKED, PICTURE, ROOT, pages, pictures, rewritten
from bench.results import Run, write
from rankpo_fast.errors import InputError
from support.bench_runs import MACHINE, RUN, info_nce


@pytest.mark.parametrize("page", pages(ROOT), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_says_what_its_files_say(page):
    text = page.read_text(encoding="utf-8")
    assert rewritten(text, ROOT) == text, "python -m bench.readme writes it anew"
    for svg, content in pictures(text, ROOT).items():
        drawn = (page.parent / svg).read_text(encoding="utf-8")
        assert drawn == content, "python -m bench.readme draws it anew"
        assert len(content) < 80_000


def test_pages_with_figures_are_found():
    texts = {page.name: page.read_text(encoding="utf-8") for page in pages(ROOT)}
    assert PICTURE.search(texts["README.md"])
    assert len(MARKED.findall(texts["benchmarks.md"])) >= 3


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "one.json", RUN)
    forward = dataclasses.replace(info_nce(4096, ours=1.4), case="info_nce forward")
    write(tmp_path / "two.json", Run(MACHINE | {"commit": "fff"}, [info_nce(4096, 1.3), forward]))
    return tmp_path


def marked(marker: str, inside: str = "") -> str:
    return f"before 1.23\n<!-- bench: {marker} -->\n{inside}<!-- end -->\nafter 4.56\n"


def test_a_number_written_by_hand_is_undone(root):
    right = rewritten(marked("two.json"), root)
    assert "| 1.30 (1.17-1.43) |" in right
    assert rewritten(right.replace("1.30", "1.03"), root) == right
    assert right.startswith("before 1.23\n<!--") and right.endswith("-->\nafter 4.56\n")


def test_another_file_is_one_word(root):
    one, two = (
        rewritten(marked(f"{name}: info_nce 4096x4096x1024"), root)
        for name in ("one.json", "two.json")
    )
    assert "| 1.10 (0.99-1.21) |" in one and "| 1.30 (1.17-1.43) |" in two
    assert "From `two.json`: NVIDIA H100 80GB HBM3; driver 580.65, torch 2.13.0+cu130; " in two
    assert "commit fff, 2026-11-24." in two


@pytest.mark.parametrize(
    ("names", "cases"),
    [
        pytest.param("info_nce", ["info_nce"], id="a-case-is-not-those-that-begin-like-it"),
        pytest.param("info_nce forward; info_nce", ["info_nce forward", "info_nce"], id="in-order"),
        pytest.param("info_nce forward 4096x4096x1024", ["info_nce forward"], id="a-shape"),
    ],
)
def test_names_choose_cases(root, names, cases):
    text = rewritten(marked(f"two.json: {names}"), root)
    found = [line.split(" 4096x")[0][4:] for line in text.splitlines() if line.startswith("| **")]
    assert found == cases


def test_columns_are_chosen(root):
    text = rewritten(marked("two.json: info_nce | ratio error"), root)
    assert "|  | ratio | error |\n" in text


def test_who_could_not_run_has_no_row_and_who_fell_over_has_one(root):
    text = rewritten(marked("one.json: info_nce"), root)
    assert "liger-kernel" not in text and "| out of memory |" in text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param(marked("two.json: siglip"), "two.json: no case or shape 'siglip': it has "
                     "info_nce, info_nce forward", id="unknown-case"),
        pytest.param(marked("three.json"), "three.json: .*No such file", id="no-file"),
        pytest.param(marked("two.json | speed"), "no column 'speed'", id="unknown-column"),
        pytest.param("<!-- bench: two.json -->\n", "without its end", id="no-end"),
        pytest.param("<!-- bench: two.json -->\n" + marked("one.json"), "without its end",
                     id="no-end-before-another"),
        pytest.param(marked("two.json: a | b | c"), "something else in it", id="unreadable"),
    ],
)  # fmt: skip
def test_a_comment_that_cannot_be_followed_is_named(root, text, says):
    with pytest.raises(InputError, match=says):
        rewritten(text, root)


PICTURED = """before
<!-- picture: {} -->
![time and memory](figure.svg)
old
<!-- end -->
"""


def test_a_picture_shows_each_implementation_and_its_source(root):
    text = PICTURED.format("one.json: info_nce 4096x4096x1024")
    [drawn] = pictures(text, root).values()
    assert ">rankpo-fast<" in drawn and ">1.10<" in drawn
    assert "liger-kernel" not in drawn  # was not installed
    assert "1 = lower bound: 3 GEMMs" in drawn
    below = rewritten(text, root)
    assert "old" not in below and "From `one.json`: NVIDIA H100 80GB HBM3; " in below


@pytest.mark.parametrize(
    ("marker", "says"),
    [
        pytest.param("one.json: siglip", "no case or shape 'siglip'", id="unknown-case"),
        pytest.param("one.json", "something else in it", id="no-case"),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_named(root, marker, says):
    with pytest.raises(InputError, match=says):
        text = PICTURED.format(marker)
        pictures(text, root)
        rewritten(text, root)
