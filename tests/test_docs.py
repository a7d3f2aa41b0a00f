"""README, CONTRIBUTING, CHANGELOG and docs/: links lead somewhere, code runs, none is missing."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

import rankpo_fast
from mutants import MUTANTS
from small_world import small_world

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
API = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/api").glob("*.md"))
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
# Words of ours for what has a name in the field, and what to write in their place.
PRIVATE = {
    r"contenders?": "implementation",
    r"floors?": "lower bound",
    r"cards?(?! of)": "GPU",  # "model card" is one of the hub's
    r"(first|second|one) look": "pass",
    r"falls? over": "runs out of memory, limit",
    r"what becomes of": "where ... is",
}
# Flags of torchrun, pytest, `bench compare` and the simulated judge; the example of a typing error.
OF_OTHERS = {
    "--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_id", "--rdzv_endpoint",
    "--equality", "--benchmark-save", "--benchmark-compare-fail",
    "--threshold", "--learning_rat", "--passages", "--text", "--bias", "--beir", "--seeds",
    "--preferences", "--signal", "--habit", "--on_disk", "--stage1_steps", "--steps",
    "--learning_rates", "--batch_size", "--starts",
}  # fmt: skip
MODEL = "sentence-transformers/all-MiniLM-L6-v2"


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and the site make them."""
    heads = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", head.lower()) for head in heads]
    return {re.sub(r"[ ]+", "-", head.strip()) for head in plain}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings_that_are_there(page):
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    for link in LINK.findall(text):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)}: {link}: no such file"
        assert target.is_relative_to(ROOT), f"{name(page)}: {link}"
        assert not anchor or anchor in anchors(target), f"{name(page)}: {link}: no such heading"


def test_every_page_is_in_the_navigation_of_the_site():
    config = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    named = set(re.findall(r'= "([\w/-]+\.md)"', config))
    assert named == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES[2:]}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name)
def test_words_are_those_of_the_field(page):
    text = page.read_text(encoding="utf-8").lower().replace("model card", "")
    for word, instead in PRIVATE.items():
        found = re.search(rf"\b{word}\b", text)
        assert found is None, f"{name(page)}: {found[0]!r}: {instead}"


def test_every_public_name_is_on_a_page_of_the_api():
    missing = [n for n in rankpo_fast.__all__ if f"::: rankpo_fast.{n}\n" not in API]
    assert not missing


@pytest.mark.parametrize("path", re.findall(r"^::: (\S+)$", API, re.MULTILINE))
def test_what_a_page_of_the_api_names_is_there(path):
    """The site's build reads the source, and fails alike: this needs nothing installed for it."""
    if path.startswith("rankpo_fast.integrations."):
        assert (ROOT / path.replace(".", "/")).with_suffix(".py").exists() or (
            ROOT / path.replace(".", "/") / "__init__.py"
        ).exists()
        return
    module, _, attribute = path.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute)


def test_the_page_of_flags_is_what_the_parsers_say():
    path = ROOT / "docs/command_line.py"
    spec = importlib.util.spec_from_file_location("command_line", path)
    command_line = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command_line)
    written = command_line.PAGE.read_text(encoding="utf-8")
    assert written == command_line.page(), "python docs/command_line.py writes it anew"


def test_flags_that_pages_name_are_flags():
    known = (ROOT / "docs/command-line.md").read_text(encoding="utf-8")
    known = {*re.findall(r"--\w+", known), *OF_OTHERS}
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text(encoding="utf-8")))
        assert named <= known, f"{name(page)}: {named - known}"


def test_the_number_of_mutants_is_told_as_it_is():
    assert f" in {len(MUTANTS)} ways" in (ROOT / "docs/proof.md").read_text(encoding="utf-8")


def runnable(page: Path) -> str:
    [code] = re.findall(
        r"^<!-- runnable -->\n```python\n(.*?)^```", page.read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )  # fmt: skip
    return code


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with world/data, as `rankpo-fast demo --quick` leaves it, and a small model in place
    of the real one."""
    from rankpo_fast.data.rows import write_jsonl

    folder = tmp_path_factory.mktemp("docs")
    made = small_world(folder / "world")
    for split in ("train", "test"):
        write_jsonl(folder / f"world/data/{split}_preferences.jsonl", made.preferences[:24])
    return folder, made.model


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_code_runs_as_it_is_printed(page, world, tmp_path, monkeypatch, capsys):
    folder, model = world
    (tmp_path / "world").symlink_to(folder / "world")
    monkeypatch.chdir(tmp_path)
    code = runnable(ROOT / page)
    assert MODEL in code
    exec(compile(code.replace(MODEL, model), page, "exec"), {})
    assert "alignment" in capsys.readouterr().out
    assert (tmp_path / "outputs/rankpo/modules.json").exists()
