"""The annotators' page in a browser: keys, what is shown, and a server that goes away."""

import shutil

import pytest

from rankpo_fast.judge.journal import Journal
from rankpo_fast.judge.page import serve_page
from rankpo_fast.judge.people import verdicts
from support.judge_page import PAIRS, free_port, serving

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
ASKED = {"prompt": "who fits?"}
SHOW_MS = 10_000  # at most, on a busy machine

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on the PATH"),
]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        profile = tmp_path_factory.mktemp("profile")
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, headless=True, args=FLAGS
        )
        context.set_default_timeout(SHOW_MS)
        yield context
        context.close()


@pytest.fixture
def tab(chromium):
    """A new tab, whose script must not fail."""
    page, errors = chromium.new_page(), []
    page.on("pageerror", lambda error: errors.append(error))
    yield page
    page.close()
    assert errors == []


@pytest.fixture
def journal(tmp_path):
    with Journal(tmp_path / "answers.jsonl", ASKED) as opened:
        yield opened


@pytest.fixture
def server(journal):
    with serve_page(PAIRS, journal) as serving:
        yield serving


def ready(page, done):
    """Until the page has settled on the pair after so many."""
    page.wait_for_selector(f"#count:text-matches('^{done} of')")
    page.wait_for_selector("[data-choice]:enabled")


def given(journal):
    return [answer["answer"] for answer in journal.answers]


def test_a_person_judges_by_keys_alone(server, journal, tab):
    tab.goto(server.url)
    tab.wait_for_selector("#name:focus")
    tab.keyboard.type("Anna 1")  # digits in a name are no verdicts
    tab.keyboard.press("Enter")
    for done, (key, answer, unsure) in enumerate(
        [("1", "left", False), ("Shift+ArrowRight", "right", True), ("Space", "tie", False)]
    ):
        ready(tab, done)
        tab.keyboard.press(key)
        ready(tab, done + 1)
        last = journal.answers[-1]
        assert (last["answer"], last["confidence"] == 50) == (answer, unsure)
        assert last["judge"] == "Anna 1"
    assert tab.is_visible("#end-page") and "3 of 3" in tab.text_content("#count")
    tab.keyboard.press("u")
    ready(tab, 2)
    assert "job 2" in tab.text_content("#query")
    tab.keyboard.press("s")
    ready(tab, 3)
    assert "1 skipped" in tab.text_content("#count")
    assert given(journal) == ["left", "right", "tie", "undo", "skip"]


@pytest.mark.parametrize(
    "key, answer",
    [
        ("ArrowLeft", "left"), ("2", "right"), ("0", "tie"), ("Shift+Digit1", "left"),
        ("Shift+S", "skip"),
    ],
)  # fmt: skip
def test_keys_mean_what_the_help_says(server, journal, tab, key, answer):
    tab.goto(f"{server.url}?annotator=Anna")
    ready(tab, 0)
    for other in ("x", "3", "Enter", "Control+1", "Alt+ArrowLeft", "PageDown"):
        tab.keyboard.press(other)
    tab.keyboard.press("?")
    tab.wait_for_selector("#help-box[open]")
    tab.keyboard.press("2")  # while help is open
    tab.keyboard.press("Escape")
    ready(tab, 0)
    tab.keyboard.press(key)
    ready(tab, 1)
    assert given(journal) == [answer]


def test_a_key_pressed_twice_judges_one_pair(server, journal, tab):
    tab.goto(f"{server.url}?annotator=Anna")
    ready(tab, 0)
    tab.keyboard.press("1")
    tab.keyboard.press("1")
    ready(tab, 1)
    assert given(journal) == ["left"]


def test_buttons_do_what_keys_do(server, journal, tab):
    tab.goto(f"{server.url}?annotator=Anna")
    tab.check("#unsure")
    tab.click("button:has-text('Passage 2')")
    ready(tab, 1)
    assert not tab.is_checked("#unsure")  # of that pair alone
    tab.focus("button:has-text('Skip')")
    tab.keyboard.press("Space")  # of the button, not a tie
    ready(tab, 2)
    assert given(journal) == ["right", "skip"] and journal.answers[0]["confidence"] == 50


def test_what_stands_left_is_what_is_preferred_when_left_is_chosen(server, journal, tab):
    tab.goto(f"{server.url}?annotator=Anna")
    for done, pair in enumerate(PAIRS):
        ready(tab, done)
        left = tab.text_content("#left .text")
        tab.keyboard.press("1")
        ready(tab, done + 1)
        chosen = {"A": "passage1", "B": "passage2"}[journal.answers[-1]["preferred"]]
        assert left == pair[chosen]


def test_texts_run_no_script_and_profiles_are_headed_lists(journal, tab):
    attack = "<img src=x onerror=window.hit=1><script>window.hit=1</script>"
    profile = f"<keyword>a<sep>b</keyword><title>{attack}<sep>T2</title><abstract>cut off"
    pair = {"query": f"first\n\nsecond {attack}", "passage1": profile, "passage2": "plain"}
    with serve_page([pair], journal, instructions=attack) as server:
        tab.goto(f"{server.url}?annotator=%3Cb%3EAnna")
        tab.wait_for_selector("#help-box[open]")  # instructions are shown at first
        assert tab.text_content("#help-instructions") == attack
        tab.keyboard.press("Escape")
        ready(tab, 0)
        assert tab.locator("#query p").all_text_contents() == ["first", f"second {attack}"]
        tagged = tab.locator("article:has(h3)")
        assert tagged.locator("h3").all_text_contents() == ["Keywords", "Titles", "Abstracts"]
        assert tagged.locator("li").all_text_contents() == ["a", "b", attack, "T2", "cut off"]
        assert tab.evaluate("window.hit") is None and tab.locator("article img").count() == 0
        assert tab.text_content("#who") == "<b>Anna"


def test_two_tabs_of_one_annotator_count_once(server, journal, chromium, tab):
    other = chromium.new_page()
    for page in (tab, other):
        page.goto(f"{server.url}?annotator=Anna")
        ready(page, 0)
    tab.keyboard.press("1")
    ready(tab, 1)
    other.keyboard.press("2")
    ready(other, 1)
    assert "another tab" in other.text_content("#message") and "job 1" in other.text_content("main")
    other.close()
    assert given(journal) == ["left"]


def test_a_server_that_is_gone_is_said_and_the_answer_arrives_when_it_is_back(
    tmp_path, chromium, tab
):
    path, port = tmp_path / "answers.jsonl", free_port()
    process, url = serving(path, port)
    tab.goto(f"{url}?annotator=Anna")
    tab.wait_for_selector("#help-box[open]")
    tab.keyboard.press("Escape")
    ready(tab, 0)
    tab.keyboard.press("1")
    ready(tab, 1)
    process.kill()
    process.communicate()
    tab.keyboard.press("0")
    tab.wait_for_selector("#problem:visible")
    assert "does not answer" in tab.text_content("#problem")
    assert "job 1" in tab.text_content("#query")  # nothing is passed over
    tab.keyboard.press("1")  # the first key stands
    tab.close()  # the answer is in the browser's storage
    process, again = serving(path, port)
    assert again == url
    later = chromium.new_page()
    later.goto(f"{url}?annotator=Anna")
    ready(later, 2)
    assert not later.is_visible("#problem") and "job 2" in later.text_content("#query")
    process.kill()
    process.communicate()
    # And one in a page that stays open.
    later.keyboard.press("2")
    later.wait_for_selector("#problem:visible")
    process, _ = serving(path, port)
    assert process.stdout.readline() == "all judged\n" and process.wait(10) == 0
    later.wait_for_selector("#end-page:visible")
    later.close()
    with Journal(path, ASKED) as opened:
        assert [answer["answer"] for answer in opened.answers] == ["left", "tie", "right"]
        assert len(verdicts(opened.answers)) == 3
