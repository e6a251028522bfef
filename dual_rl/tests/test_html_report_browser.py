"""The page in a browser, as a person uses it: sorting, filters, clips that play; nothing leaves the machine."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser_support import BROWSERS, Browser, Trap, find_browser, open_browser
from report_support import fill_journal, make_result, read_data, write_example_bench
from scoring.html_report import write_report
from scoring.journal import Journal
from scoring.scoring import FailedVideo

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason=f"needs one of {', '.join(BROWSERS)}"),
]
ORDER = "[...document.querySelectorAll('#rows h3')].map(h => Number(h.textContent.slice(1)))"
VIDEOS = "[...document.querySelectorAll('#rows article')][0].querySelectorAll('video')"


@pytest.fixture(scope="module")
def tab() -> Iterator[tuple[Browser, Trap]]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory, tab) -> tuple[Path, dict]:
    """112 pairs; the last item has no score, one thought tries to get out. Open in the tab."""
    folder, (_, trap) = tmp_path_factory.mktemp("a page #1"), tab
    bench, scored = write_example_bench(folder / "data")
    first, *_, last = scored
    del scored[last]
    address = f"http://127.0.0.1:{trap.port}/x"
    attack = f"<img src={address} onerror=\"fetch('{address}')\"></script><script>window.hacked = 1</script>"
    scored[first] = (scored[first][0], f"{attack}\n{scored[first][1]}")
    with Journal(folder / "out.rewards.jsonl", {}) as journal:
        fill_journal(journal, scored)
        journal.add(FailedVideo(last, "video is empty"))
        write_report(folder / "pages" / "out.html", bench, journal, make_result(bench, journal))
    path = folder / "pages" / "out.html"
    return path, read_data(path.read_text(encoding="utf-8"))


@pytest.fixture
def browser(tab, page) -> Browser:
    """The page as it is when it opens."""
    tab[0].open("about:blank#")
    tab[0].open(page[0].as_uri())
    tab[0].wait_for("document.querySelectorAll('#rows article').length === 25")
    return tab[0]


def choose(browser: Browser, name: str, value: str) -> list[int]:
    """Set a control of the toolbar; numbers of the rows in sight."""
    event = "input" if name == "text" else "change"
    browser.run(f"find('{name}').value = {value!r}; find('{name}').dispatchEvent(new Event('{event}'))")
    return browser.run(ORDER)


def numbers(page, sort: int) -> dict[int, float | None]:
    return {row["number"]: row["numbers"][sort] for row in page[1]["rows"]}


@pytest.mark.parametrize("sort", range(4))
def test_rows_are_sorted_both_ways_with_unscored_ones_last(browser, page, sort):
    values = numbers(page, sort)
    scored = sorted((value, number) for number, value in values.items() if value is not None)
    assert choose(browser, "sort", str(sort)) == [number for _, number in scored[:25]]
    browser.run("find('direction').click()")
    falling = sorted(scored, key=lambda entry: (-entry[0], entry[1]))
    assert browser.run(ORDER) == [number for _, number in falling[:25]]
    for _ in range(4):
        browser.press("]")
    unscored = [number for number, value in values.items() if value is None]
    assert browser.run(ORDER)[12 - len(unscored) :] == unscored  # the last page has 12 rows
    assert browser.run("find('page').textContent") == "page 5 of 5"


def test_rows_are_filtered_by_verdict_model_text_and_label(browser, page):
    overall, ta = (next(view for view in page[1]["views"] if view["name"] == name) for name in ("Overall", "TA"))
    for verdict in ("wrong", "tie", "unlabelled", "unscored"):
        expected = [n for n, found in enumerate(overall["verdicts"], start=1) if found == verdict]
        assert expected
        assert choose(browser, "verdict", verdict) == expected[:25]
        assert browser.run("find('count').textContent") == f"{len(expected)} of 112"
    assert choose(browser, "verdict", "wrong")
    wrong = [n for n, found in enumerate(ta["verdicts"], start=1) if found == "wrong"]
    assert choose(browser, "view", "0") == wrong[:25]
    model = page[1]["rows"][0]["models"][0]
    of_model = [n for n in wrong if model in page[1]["rows"][n - 1]["models"]]
    assert choose(browser, "facet-0", model) == of_model[:25]
    assert choose(browser, "text", "WHITE RING") == [
        n for n in of_model if "white ring" in page[1]["prompts"][page[1]["rows"][n - 1]["prompt"]]
    ]
    assert choose(browser, "text", "in no thought at all") == []


def test_both_clips_play_together_again_and_again(browser):
    assert browser.run(f"[...{VIDEOS}].map(v => [v.controls, v.muted, v.loop, v.paused])") == [[True] * 4] * 2
    browser.press("p")
    browser.wait_for(f"[...{VIDEOS}].every(v => v.currentTime > 0.3)")
    assert browser.run(f"Math.abs({VIDEOS}[0].currentTime - {VIDEOS}[1].currentTime)") < 0.1
    browser.wait_for("document.querySelector('.play').textContent.includes('pause both')")
    browser.run(f"window.ends = 0; {VIDEOS}[0].addEventListener('ended', () => ends++); 1")
    browser.wait_for(f"ends === 2 && [...{VIDEOS}].every(v => v.currentTime > 0.3 && !v.paused)")
    browser.press("p")
    browser.wait_for(f"[...{VIDEOS}].every(v => v.paused && v.loop)")
    browser.wait_for("document.querySelector('.play').textContent.includes('play both')")


def test_the_keyboard_moves_opens_and_searches(browser):
    for key in "jjk":
        browser.press(key)
    assert browser.run("document.activeElement.id") == "row-1"
    browser.press("j")
    browser.press("t")
    opened = browser.run("[...document.querySelectorAll('.thought')].map(d => d.open)")
    assert [place for place, is_open in enumerate(opened) if is_open] == [2, 3]
    browser.press("]")
    assert browser.run(ORDER)[0] == 26
    browser.press("/")
    browser.press("j")
    assert browser.run("[document.activeElement.id, find('text').value]") == ["text", "j"]


def test_only_the_page_in_sight_is_there_and_its_clips_are_read_late(browser):
    assert browser.run("document.querySelectorAll('video').length") == 50
    assert browser.run("[...document.querySelectorAll('video')].slice(10).map(v => [v.preload, v.readyState])") == (
        [["none", 0]] * 40
    )


def test_a_phone_shows_all_of_it_without_sideways_scrolling(browser):
    browser.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    try:
        assert browser.run("document.documentElement.scrollWidth") <= 360
    finally:
        browser.call("Emulation.clearDeviceMetricsOverride")


def test_nothing_leaves_the_machine_and_thoughts_are_text(browser, tab, page):
    trap = tab[1]
    address = f"http://127.0.0.1:{trap.port}/x"
    assert address in browser.run("[...document.querySelectorAll('.thought pre')][0].textContent")
    assert browser.run("[typeof window.hacked, document.images.length]") == ["undefined", 0]
    choose(browser, "text", "onerror")
    assert browser.complaints == []
    assert browser.run(f"fetch('{address}').then(() => 'sent', () => 'refused')") == "refused"
    browser.run(f"document.body.append(Object.assign(new Image(), {{src: '{address}'}})); 1")
    browser.run(f"document.body.append(Object.assign(document.createElement('video'), {{src: '{address}'}})); 1")
    script = "Object.assign(document.createElement('script'), {text: 'window.hacked = 1'})"
    browser.run(f"document.body.append({script}); 1")
    browser.run("new Promise(done => setTimeout(done, 500))")
    assert browser.run("typeof window.hacked") == "undefined"
    assert len([text for text in browser.complaints if "Content Security Policy" in text]) >= 4
    assert trap.requests == []
    sent = {re.split("[:,]", url)[0] for url in browser.urls if not url.startswith(address)}
    assert sent <= {"file", "data", "about"}
    # What does leave is caught: the same from a page without the policy.
    browser.open("about:blank#")
    browser.run(f"fetch('{address}', {{mode: 'no-cors'}}).catch(() => 0)")
    assert [request.split()[:2] for request in trap.requests[:1]] == [[b"GET", address.encode()]]
