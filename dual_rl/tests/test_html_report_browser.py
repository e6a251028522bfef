"""The page in a browser, as a person uses it: sorting, filters, clips that play; nothing leaves the machine."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from browser_support import BROWSERS, Browser, find_browser, open_browser
from report_support import fill_journal, make_result, read_data, write_example_bench
from scoring.html_report import write_report
from scoring.journal import Journal
from scoring.types import FailedVideo

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason=f"needs one of {', '.join(BROWSERS)}"),
]
ORDER = "[...document.querySelectorAll('#rows h3')].map(h => Number(h.textContent.slice(1)))"
OUTSIDE = "http://127.0.0.1:9/x"
VIDEOS = "[...document.querySelectorAll('#rows article')][0].querySelectorAll('video')"


@pytest.fixture(scope="module")
def tab() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> tuple[Path, dict]:
    """112 pairs; the last item has no score, one thought tries to get out."""
    folder = tmp_path_factory.mktemp("a page #1")
    bench, scored = write_example_bench(folder / "data")
    first, *_, last = scored
    del scored[last]
    attack = f"<img src={OUTSIDE} onerror=\"fetch('{OUTSIDE}')\"></script><script>window.hacked = 1</script>"
    scored[first] = (scored[first][0], f"{attack}\n{scored[first][1]}")
    path = folder / "pages" / "out.html"
    with Journal(folder / "out.rewards.jsonl", {}) as journal:
        fill_journal(journal, scored)
        journal.add(FailedVideo(last, "video is empty"))
        write_report(path, bench, journal, make_result(bench, journal))
    return path, read_data(path.read_text(encoding="utf-8"))


@pytest.fixture
def browser(tab, page) -> Browser:
    """The page as it is when it opens."""
    tab.open("about:blank#")
    tab.open(page[0].as_uri())
    tab.wait_for("document.querySelectorAll('#rows article').length === 25")
    return tab


def choose(browser: Browser, name: str, value: str) -> list[int]:
    """Set a control of the toolbar; numbers of the rows in sight."""
    event = "input" if name == "text" else "change"
    browser.run(f"find('{name}').value = {value!r}; find('{name}').dispatchEvent(new Event('{event}'))")
    return browser.run(ORDER)


@pytest.mark.parametrize("sort", [0, 3])
def test_rows_are_sorted_both_ways_with_unscored_ones_last(browser, page, sort):
    values = {row["number"]: row["numbers"][sort] for row in page[1]["rows"]}
    scored = sorted((value, number) for number, value in values.items() if value is not None)
    assert choose(browser, "sort", str(sort)) == [number for _, number in scored[:25]]
    browser.run("find('direction').click()")
    falling = sorted(scored, key=lambda entry: (-entry[0], entry[1]))
    assert browser.run(ORDER) == [number for _, number in falling[:25]]
    browser.press("]]]]")
    unscored = [number for number, value in values.items() if value is None]
    assert browser.run(ORDER)[12 - len(unscored) :] == unscored  # the last page has 12 rows
    assert browser.run("find('page').textContent") == "page 5 of 5"


def test_rows_are_filtered_by_verdict_label_model_and_text(browser, page):
    overall, ta = (next(view for view in page[1]["views"] if view["name"] == name) for name in ("Overall", "TA"))
    for verdict in ("tie", "unlabelled", "unscored", "wrong"):
        expected = [n for n, found in enumerate(overall["verdicts"], start=1) if found == verdict]
        assert expected
        assert choose(browser, "verdict", verdict) == expected[:25]
        assert browser.run("find('count').textContent") == f"{len(expected)} of 112"
    wrong = [n for n, found in enumerate(ta["verdicts"], start=1) if found == "wrong"]
    assert choose(browser, "view", "0") == wrong[:25]
    model = page[1]["rows"][0]["models"][0]
    of_model = [n for n in wrong if model in page[1]["rows"][n - 1]["models"]]
    assert choose(browser, "facet-0", model) == of_model[:25]
    prompt = page[1]["prompts"][page[1]["rows"][of_model[0] - 1]["prompt"]]
    same_prompt = [n for n in of_model if page[1]["prompts"][page[1]["rows"][n - 1]["prompt"]] == prompt]
    assert choose(browser, "text", prompt.upper()) == same_prompt
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


def test_the_keyboard_moves_opens_and_searches(browser):
    browser.press("jjk")
    assert browser.run("document.activeElement.id") == "row-1"
    browser.press("jt")
    opened = browser.run("[...document.querySelectorAll('.thought')].map(d => d.open)")
    assert [index for index, is_open in enumerate(opened) if is_open] == [2, 3]
    browser.press("]")
    assert browser.run(ORDER)[0] == 26
    browser.press("/j")
    assert browser.run("[document.activeElement.id, find('text').value]") == ["text", "j"]


def test_clips_are_loaded_late_and_a_phone_shows_all_without_sideways_scrolling(browser):
    assert browser.run("[...document.querySelectorAll('video')].slice(10).map(v => [v.preload, v.readyState])") == (
        [["none", 0]] * 40
    )
    browser.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=True)
    try:
        assert browser.run("document.documentElement.scrollWidth") <= 360
    finally:
        browser.call("Emulation.clearDeviceMetricsOverride")


def test_nothing_leaves_the_machine_and_thoughts_are_text(browser):
    assert OUTSIDE in browser.run("[...document.querySelectorAll('.thought pre')][0].textContent")
    assert browser.run("[typeof window.hacked, document.images.length]") == ["undefined", 0]
    choose(browser, "text", "onerror")
    assert browser.complaints == []
    assert {url.split(":")[0] for url in browser.urls} <= {"file", "about", "data"}
    # And if it tried, its policy would refuse.
    assert browser.run(f"fetch('{OUTSIDE}').then(() => 'sent', () => 'refused')") == "refused"
    for element in (f"Object.assign(new Image(), {{src: '{OUTSIDE}'}})",
                    f"Object.assign(document.createElement('video'), {{src: '{OUTSIDE}'}})",
                    "Object.assign(document.createElement('script'), {text: 'window.hacked = 1'})"):  # fmt: skip
        browser.run(f"document.body.append({element}); 1")
    browser.run("new Promise(done => setTimeout(done, 500))")
    assert browser.run("typeof window.hacked") == "undefined"
    assert len([text for text in browser.complaints if "Content Security Policy" in text]) >= 4
