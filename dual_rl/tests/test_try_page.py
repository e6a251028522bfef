"""The page of the reward server, used as a visitor does: in headless Chromium, at a real server, with the keyboard."""

import json
import re
from collections.abc import Iterator
from contextlib import closing

import pytest

from browser_support import CHROMIUM, CONTROL, Browser
from descore.answers import JUDGEMENT_KEY, extract_judgement
from model_support import CLIPS
from serving_support import TOLERANCE

pytest_plugins = ["serving_fixtures"]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
IS_DONE = "!isBusy && document.activeElement === find('verdict')"
THOUGHTS = (
    'It moves. 2\n<answer>{"dimensional_scores": {"subject": 1, "camera": "N/A"}, "overall_score": 4.2}</answer>',
    '<answer>{"x": 1}</answer> then <answer>\n```json\n{"dimensional_scores": {"a": "2"}}\n```\n</answer> end',
    '<answer>{"dimensional_scores": {"subject": 1}',
    "no answer",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with closing(Browser(tmp_path_factory.mktemp("browser"))) as browser:
        yield browser


def read_numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d{4}", text)]


def test_two_dropped_clips_are_compared_and_a_broken_one_is_named(browser, serving, reward_model, tmp_path):
    rewards, cots = reward_model.score(CLIPS[:2], ["a red circle"] * 2)
    browser.command("Page.navigate", url=f"http://127.0.0.1:{serving().client.port}/")
    browser.wait_for("find('state').innerText === 'ready'")
    browser.drop(".clip", CLIPS[:2])
    browser.wait_for("document.activeElement === find('prompt')")
    browser.enter("a red\n circle ", CONTROL)
    browser.wait_for(IS_DONE)
    assert read_numbers(browser.text("tr.total")) == pytest.approx(rewards, abs=TOLERANCE)
    assert browser.text("#verdict").startswith("A is better" if rewards[0] > rewards[1] else "B is better")
    assert browser.run("[...document.querySelectorAll('article p:last-child')].map((p) => p.textContent)") == cots
    assert "Cut at the length limit." in browser.text("#thoughts")
    browser.command("Emulation.setDeviceMetricsOverride", width=320, height=640, deviceScaleFactor=1, mobile=True)
    assert browser.run("document.documentElement.scrollWidth") == 320, "wider than a phone"
    (tmp_path / "broken.mp4").write_bytes(CLIPS[0].read_bytes()[:400])
    browser.drop(".clip + .clip", [tmp_path / "broken.mp4"])
    browser.wait_for("document.activeElement === find('prompt')")
    browser.enter("", CONTROL)
    browser.wait_for(f"{IS_DONE} && find('verdict').innerText === 'No verdict'")
    assert re.search(r"Not scored: video does not decode.* videos\[1\] broken\.mp4", browser.text("#thoughts"))
    assert read_numbers(browser.text("tr.total")) == pytest.approx(rewards[:1], abs=TOLERANCE)
    for thought in THOUGHTS:
        judgement, found = extract_judgement(thought), f"readThought({json.dumps(thought)}).scores"
        overall = {"overall": judgement["overall_score"]} if "overall_score" in (judgement or {}) else {}
        scores = browser.run(f"{found} && Object.fromEntries({found})")
        assert scores == (judgement and judgement[JUDGEMENT_KEY] | overall)


def test_a_token_is_asked_for_until_it_is_right_and_kept_for_the_tab(browser, serving, offline):
    url = f"http://127.0.0.1:{serving(token='secret').client.port}/"
    browser.command("Page.navigate", url=url)
    for token, accepted in (("guess", "!find('refused').hidden"), ("secret", "!find('ask').open")):
        browser.wait_for("document.activeElement === find('token')")
        browser.enter(token)
        browser.wait_for(accepted)
    browser.command("Page.navigate", url=url)
    browser.wait_for("find('state').innerText === 'ready'")
    for clips, fault in (((), "Give a clip first."), (CLIPS[:1], "Type the prompt of the clips.")):
        browser.drop(".clip", clips)
        browser.run("find('score').click()")
        assert browser.text("#error") == fault
    browser.enter("a shape, number 0", CONTROL)
    browser.wait_for(IS_DONE)
    assert read_numbers(browser.text("#verdict")) == pytest.approx([offline[0]["reward"]], abs=TOLERANCE)
