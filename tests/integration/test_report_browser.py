"""The page in a real browser: no network, no errors, no sideways scrolling, and its script at work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sead_megatron.report import write_report
from tests.browser import NAMES, Browser, find_browser
from tests.report_runs import rollout_record, write_run

HOSTILE = "</script><script>window.hostile = 1</script><img src=x onerror='window.hostile = 2'><svg onload=alert(1)>"
PROGRAM = find_browser()
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason=f"no browser: none of {', '.join(NAMES)} is installed"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    with Browser(PROGRAM, tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: one with rollouts in two steps, the first of them hostile; one with nothing but metrics."""
    directory = tmp_path_factory.mktemp("report")
    hostile = rollout_record(
        [HOSTILE, "x\n", ""], prompt_id=HOSTILE, answer=HOSTILE, prompt=[{HOSTILE: HOSTILE}]
    )
    hostile["prompt"] = [{"role": HOSTILE, "content": HOSTILE}]
    long = rollout_record(["supercalifragilistic" * 20, *["word "] * 300], prompt_id="p1", reward=0.0)
    first = write_run(directory / "first", {1: [hostile, long], 3: [rollout_record(["three", "-"])]})
    second = write_run(directory / "second", objective={"name": "opd"}, curriculum={"name": "uniform"})
    for name, run in (("a-name-that-is-rather-long-for-a-telephone", first), ("short", second)):
        run.path.rename(directory / name)
    return write_report(
        [directory / "a-name-that-is-rather-long-for-a-telephone", directory / "short"],
        directory / "page.html",
    )


def assert_quiet(browser: Browser, page: Path) -> None:
    """Nothing was requested but the page, and nothing was written to the console."""
    assert [event["request"]["url"] for event in browser.of("Network.requestWillBeSent")] == [
        page.resolve().as_uri()
    ]
    assert browser.of("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded") == []


def text_of(browser: Browser, selector: str) -> str:
    return str(browser.evaluate(f"document.querySelector({selector!r}).textContent"))


def choose(browser: Browser, picker: str, index: int) -> None:
    """What a reader does: take an option; the browser then sends `change`."""
    browser.evaluate(
        f"(() => {{ const picker = document.getElementById({picker!r}); picker.selectedIndex = {index}; "
        "picker.dispatchEvent(new Event('change')); })()"
    )


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1440])
def test_fits_and_is_quiet(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width, 844, dark=dark)
    assert browser.evaluate("innerWidth") == width
    for rollout in (1, 0):  # one with a very long word and many tokens, one with long names
        choose(browser, "rollout-picker", rollout)
        assert browser.evaluate("document.documentElement.scrollWidth") == width
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(16, 19, 23)" if dark else "rgb(246, 247, 249)")
    assert_quiet(browser, page)


def test_wide_tables_scroll_inside(browser: Browser, page: Path) -> None:
    browser.open(page, 390, 844)
    inner, outer = browser.evaluate(
        "(() => { const box = document.querySelector('#comparison .scroll'); "
        "return [box.scrollWidth, box.clientWidth]; })()"
    )
    assert inner > outer > 300


def test_token_viewer(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert text_of(browser, "#tokens") == HOSTILE + "x↵\n" + "⟨2⟩"
    browser.evaluate("document.getElementById('step-on').click()")
    assert text_of(browser, "#tokens") == "three-"
    assert browser.evaluate("document.getElementById('step-picker').value") == "1"
    assert browser.evaluate("document.getElementById('step-on').disabled") is True

    choose(browser, "step-picker", 0)
    choose(browser, "rollout-picker", 1)
    assert text_of(browser, "#tokens").startswith("supercali")
    assert "Response wrong" in text_of(browser, "#rollout-facts").replace("Response", "Response ")

    choose(browser, "run-picker", 1)
    assert text_of(browser, "#tokens") == ""
    assert text_of(browser, "#rollout-note") == "This run has no sampled rollouts."
    assert_quiet(browser, page)


def test_a_token_shows_its_numbers(browser: Browser, page: Path) -> None:
    browser.open(page)
    choose(browser, "step-picker", 1)
    browser.evaluate("document.querySelector('#tokens span:nth-child(2)').click()")
    detail = text_of(browser, "#token-detail")
    assert (
        "token-" in detail
        and "zoneB" in detail
        and "forward KL0.1 nats" in detail
        and "logprob−0.1 nats" in detail
    )
    x, y = browser.evaluate(
        "(() => { document.getElementById('tokens').scrollIntoView({behavior: 'instant', block: 'center'}); "
        "const r = document.querySelector('#tokens span').getBoundingClientRect(); return [r.left + 3, r.top + 3]; })()"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    assert browser.evaluate("document.querySelector('#viewer .tooltip').innerText").split("\n")[:3] == [
        "position\t1",
        "id\t0",
        "zone\tA",
    ]
    browser.evaluate("document.querySelector('#tokens span:nth-child(2)').click()")
    for key in ("ArrowLeft", "ArrowLeft"):
        browser.evaluate(
            f"document.getElementById('tokens').dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}'}}))"
        )
    assert "tokenthree" in text_of(browser, "#token-detail")
    classes = browser.evaluate(
        "[...document.querySelectorAll('#tokens span')].map((node) => node.classList[0])"
    )
    assert classes == ["a", "b"]
    opacities = browser.evaluate(
        "[...document.querySelectorAll('#tokens span')].map((n) => +n.style.getPropertyValue('--kl'))"
    )
    assert (
        opacities[0] == pytest.approx(0.08) and opacities[1] > 0.9
    )  # KLs of 0 and of nearly the 99th percentile


def test_other_steps_and_values_under_the_pointer(browser: Browser, page: Path) -> None:
    browser.open(page)
    shown = "[...document.querySelectorAll('.panel')].filter((panel) => panel.offsetHeight).map((panel) => panel.id)"
    assert browser.evaluate(shown) == ["panel-0-0"]
    choose(browser, "panel-picker", 2)
    assert browser.evaluate(shown) == ["panel-0-2"]

    browser.evaluate("document.querySelector('#outcome').scrollIntoView({behavior: 'instant'})")
    box = browser.evaluate(
        "(() => { const r = document.querySelector('#outcome svg[data-hover]').getBoundingClientRect(); "
        "return [r.left, r.top, r.width, r.height]; })()"
    )
    left, top, width, height = box
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=left + 0.95 * width, y=top + height / 2)
    assert "step 4" in text_of(browser, "#outcome .tooltip")
    assert "50 (28 to 72)" in text_of(browser, "#outcome .tooltip")


def test_hostile_text_is_inert(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.evaluate("document.querySelector('#tokens span').click()")
    assert browser.evaluate("document.querySelectorAll('img, #viewer svg, #viewer script').length") == 0
    assert browser.evaluate("document.scripts.length") == 2
    assert browser.evaluate("typeof window.hostile") == "undefined"
    assert HOSTILE in text_of(browser, "#token-detail") and HOSTILE in text_of(browser, "#rollout-facts")
    assert_quiet(browser, page)


def test_the_policy_stops_what_would_get_in(browser: Browser, page: Path) -> None:
    """Markup that escaped all the same could not run, nor fetch."""
    browser.open(page)
    browser.evaluate(
        "new Promise((done) => { document.body.insertAdjacentHTML('beforeend', "
        "`<img src='x.png' onerror='window.hostile = 3'>`); "
        "const script = document.createElement('script'); script.textContent = 'window.hostile = 4'; "
        "document.body.append(script); setTimeout(done, 300); })"
    )
    assert browser.evaluate("typeof window.hostile") == "undefined"
    refused = [event["entry"]["text"] for event in browser.of("Log.entryAdded")]
    assert len([text for text in refused if "Content Security Policy" in text]) >= 3, refused
