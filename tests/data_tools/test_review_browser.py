"""The review page in a real browser: mouse, keys, reload, undo, hostile text, a server that is killed and comes back.

Needs Debian's chromium and the Python package playwright; without either the tests skip.
"""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
HOSTILE = '<img src=x onerror="window.hit=1"><script>window.hit=1</script><b>bold</b> & "quoted" \u202e'


# The contrast of an element's text with the first colour that is painted behind it.
CONTRAST = """selector => {
  const channels = text => text.match(/[\\d.]+/g).map(Number);
  const light = text => channels(text).slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  let behind = document.querySelector(selector);
  const text = light(getComputedStyle(behind).color);
  while (behind && (channels(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
  const back = light(getComputedStyle(behind).backgroundColor);
  return (Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05);
}"""


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    context.set_default_timeout(20_000)
    opened = context.new_page()
    opened.problems = []
    opened.on("pageerror", lambda error: opened.problems.append(str(error)))
    yield opened
    assert not opened.problems
    context.close()


@pytest.fixture
def pairs(tmp_path, write_rows, draw):
    draw(tmp_path / "a.png")
    random.seed(0)
    rows = [
        {
            "id": f"p{n}",
            "images": ["a.png"] if n % 3 else ["a.png", "gone.png"],
            "prompt": f"Question {n}? {HOSTILE}",
            "chosen": f"good {n} {HOSTILE}",
            "rejected": f"bad {n} " + "long " * random.randrange(60),
            "margin": 2 + n % 3,
            "scores_chosen": {"helpfulness": 4},
            "scores_rejected": {"helpfulness": n % 4},
        }
        for n in range(20)
    ]
    return write_rows(tmp_path / "pairs.jsonl", rows)


class _Command:
    """`fasttrain-data review` as a process of its own, to be killed and started again on the same port."""

    def __init__(self, pairs, *options):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.words = [
            sys.executable,
            "-m",
            "fasttrain_data",
            "review",
            str(pairs),
            "--port",
            str(self.port),
            *options,
        ]
        self.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/"

    def start(self):
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(self.words, stdout=subprocess.PIPE, text=True, env=environment)
        assert "pairs to review on http://127.0.0.1" in self.process.stdout.readline()

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def command(pairs):
    started = []

    def start(*options):
        started.append(_Command(pairs, *options))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def standing(pairs, rater="anna"):
    from fasttrain_data.review.judgements import Judgements, reviews_path

    return Judgements(reviews_path(pairs)).of(rater)


def count(page, done):
    page.wait_for_selector(f'#bar[aria-valuenow="{done}"]')


def good_side(page):
    return "left" if page.text_content("#left").startswith("good") else "right"


def shoot(page, name):
    """Screenshots to look at, where $FASTTRAIN_SCREENSHOTS says."""
    if folder := os.environ.get("FASTTRAIN_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


def test_twenty_pairs_by_keyboard_alone_in_under_a_minute(page, pairs, command):
    """From typing the name to the thank-you; each pair is read off the page before its key is pressed."""
    page.goto(command().url)
    page.wait_for_selector("#enter", state="visible")
    shoot(page, "enter")
    start = time.monotonic()
    page.keyboard.type("anna")
    page.keyboard.press("Enter")
    for done in range(20):
        count(page, done)
        if done == 2:
            shoot(page, "pair")
        page.keyboard.press(
            {"left": ("1", "ArrowLeft"), "right": ("3", "ArrowRight")}[good_side(page)][done % 2]
        )
    page.wait_for_selector("#done", state="visible")
    assert time.monotonic() - start < 60
    assert page.text_content("#count") == "20 of 20 judged"
    page.click("summary")
    page.wait_for_selector("#figures td:text('20 of 20')")
    assert "helpfulness" in page.text_content("#figures")
    shoot(page, "done")
    rows = standing(pairs)
    assert len(rows) == 20 and all(row["agrees"] for row in rows.values())


def test_buttons_undo_and_reload_keep_what_was_done(page, pairs, command):
    page.goto(command("--rater", "anna").url)
    count(page, 0)  # the page has its first pair
    first = page.text_content("#prompt")
    for done, label in enumerate(("Left is better", "No difference", "Right is better", "Skip")):
        count(page, done)
        page.get_by_role("button", name=label).click()
    count(page, 4)
    assert [row["verdict"] for row in standing(pairs).values()] == ["left", "tie", "right", "skip"]
    page.reload()
    count(page, 4)
    page.keyboard.press("u")
    count(page, 3)
    page.get_by_role("button", name="Undo").click()
    count(page, 2)
    page.keyboard.press("Backspace")
    count(page, 1)
    page.keyboard.press("U")
    count(page, 0)
    assert page.text_content("#prompt") == first
    assert page.is_disabled("#undo")
    assert standing(pairs) == {}


def test_another_person_at_the_same_browser_has_a_name_and_a_queue_of_their_own(page, pairs, command):
    page.goto(command().url)
    for name, key in (("anna", "1"), ("ben", "3")):
        page.wait_for_selector("#enter", state="visible")
        page.keyboard.type(name)
        page.keyboard.press("Enter")
        count(page, 0)
        assert page.text_content("#who") == name
        page.keyboard.press(key)
        count(page, 1)
        page.get_by_role("button", name="Not you?").click()
    page.wait_for_selector("#enter", state="visible")
    assert "anna, ben" in page.text_content("#known")
    assert (len(standing(pairs, "anna")), len(standing(pairs, "ben"))) == (1, 1)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_the_page_fits_and_can_be_read_in_the_dark_and_on_a_telephone(browser, pairs, command, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    opened = context.new_page()
    opened.goto(command("--rater", "anna").url)
    count(opened, 0)
    assert opened.is_hidden("#leave")  # the command said who reviews
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    for selector in ("#prompt", ".answer", "#undo", ".quiet", "button.main"):
        assert opened.evaluate(CONTRAST, selector) > 4.4, selector  # WCAG AA asks for 4.5 of normal text
    shoot(opened, f"{scheme}-{width}")
    context.close()


def test_text_of_the_data_is_shown_and_never_run(page, pairs, command):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    server = command("--rater", HOSTILE.strip(" \u202e")[:40])
    page.goto(server.url)
    count(page, 0)
    assert HOSTILE in page.text_content("#prompt")
    assert '<b>bold</b> & "quoted"' in page.text_content("#left") + page.text_content("#right")
    for done in range(3):
        count(page, done)
        page.keyboard.press("2")
    count(page, 3)
    page.click("summary")
    page.wait_for_selector("#figures table")
    assert page.evaluate("window.hit") is None
    assert page.locator("#work script, #work b, #figures img").count() == 0
    assert all(url.startswith((server.url, "data:")) for url in asked)


def test_a_picture_that_is_gone_is_said_and_the_review_goes_on(page, pairs, command):
    page.goto(command("--rater", "anna").url)
    for done in range(20):
        count(page, done)
        if page.locator("#images > *").count() == 2:
            page.wait_for_selector("#images .broken")
            assert page.locator("#images img").count() == 1
            return
        page.keyboard.press("2")
    raise AssertionError("no pair with two pictures came up")


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the killed process's pipe
def test_a_judgement_made_while_the_server_is_dead_is_kept(page, pairs, command):
    """SIGKILL, a key, a reload is not even needed: the page tries until the command is back."""
    server = command("--rater", "anna")
    page.goto(server.url)
    count(page, 0)
    page.keyboard.press("1")
    count(page, 1)
    server.kill()
    page.keyboard.press("3")
    page.wait_for_selector("#status:not([hidden])")
    assert "nothing is lost" in page.text_content("#status")
    shoot(page, "away")
    assert len(standing(pairs)) == 1
    server.start()
    count(page, 2)
    assert [row["verdict"] for row in standing(pairs).values()] == ["left", "right"]
    assert page.is_hidden("#status")


def test_two_reviewers_in_two_browsers_do_not_mix(browser, pairs, command):
    server = command()
    pages = {}
    for name in ("anna", "ben"):
        pages[name] = browser.new_context().new_page()
        pages[name].goto(server.url)
        pages[name].fill("#name", name)
        pages[name].keyboard.press("Enter")
        count(pages[name], 0)
    for done in range(3):
        pages["anna"].keyboard.press("1")
        count(pages["anna"], done + 1)
    pages["ben"].keyboard.press("3")
    count(pages["ben"], 1)
    assert (len(standing(pairs, "anna")), len(standing(pairs, "ben"))) == (3, 1)
    found = json.loads(urllib.request.urlopen(server.url + "agreement").read())
    assert found["between_raters"]["pairs"]["anna and ben"]["n"] == 1
    for opened in pages.values():
        opened.context.close()
