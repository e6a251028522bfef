"""The page of the reward server, used as a visitor does: in headless Chromium, at a real server, with the keyboard."""

import json
import re
from collections.abc import Iterator

import pytest

from browser_support import CHROMIUM, CONTROL, Browser
from descore.answers import JUDGEMENT_KEY, extract_judgement
from model_support import CLIPS
from serving_support import TOLERANCE

pytest_plugins = ["serving_fixtures"]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
IS_DONE = "!isBusy && (find('error').innerText || find('verdict') === document.activeElement)"
THOUGHTS = (
    'It moves. 2\n<answer>{"dimensional_scores": {"subject": 1, "camera": "N/A"}, "overall_score": 4.2}</answer>',
    '<answer>{"x": 1}</answer> then <answer>\n```json\n{"dimensional_scores": {"a": "2"}}\n```\n</answer> end',
    '<answer>{"dimensional_scores": {"subject": 1}',
    '<answer>{"dimensional_scores": null, }</answer>',
    "no answer",
)


def read_numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d{4}", text)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


def test_two_dropped_clips_are_compared_and_a_broken_one_is_named(browser, serving, reward_model, tmp_path):
    rewards, cots = reward_model.score(CLIPS[:2], ["a red circle"] * 2)
    browser.open(f"http://127.0.0.1:{serving().client.port}/")
    browser.wait_for("find('state').innerText === 'ready'")
    browser.press("Enter", CONTROL, selector="#prompt")
    assert browser.text("#error") == "Give a clip first."
    browser.drop(".clip", CLIPS[:2])
    browser.wait_for("document.activeElement === find('prompt')")
    browser.type("a red\n circle ")
    browser.press("Enter", CONTROL)
    browser.wait_for(IS_DONE)
    assert browser.text("#error") == ""
    assert read_numbers(browser.text("tr.total")) == pytest.approx(rewards, abs=TOLERANCE)
    assert browser.text("#verdict").startswith("A is better" if rewards[0] > rewards[1] else "B is better")
    assert read_numbers(browser.text("#verdict")) == pytest.approx([abs(rewards[0] - rewards[1])], abs=2 * TOLERANCE)
    assert browser.run("[...document.querySelectorAll('.thought p:last-child')].map((p) => p.textContent)") == cots
    assert "Cut at the length limit." in browser.text("#thoughts")
    browser.command("Emulation.setDeviceMetricsOverride", width=320, height=640, deviceScaleFactor=1, mobile=True)
    assert browser.run("document.documentElement.scrollWidth") == 320, "wider than a phone"
    (tmp_path / "broken.mp4").write_bytes(CLIPS[0].read_bytes()[:400])
    browser.drop(".clip + .clip", [tmp_path / "broken.mp4"])
    browser.press("Enter", CONTROL, selector="#prompt")
    browser.wait_for(f"{IS_DONE} && find('verdict').innerText === 'No verdict'")
    assert re.search(r"Not scored: video does not decode.* videos\[1\] broken\.mp4", browser.text("#thoughts"))
    assert read_numbers(browser.text("tr.total")) == pytest.approx(rewards[:1], abs=TOLERANCE)


def test_a_token_is_asked_for_until_it_is_right_and_kept_for_the_tab(browser, serving, offline):
    url = f"http://127.0.0.1:{serving(token='secret').client.port}/"
    browser.open(url)
    for token, is_refused in (("guess", True), ("secret", False)):
        browser.wait_for("find('ask').open && document.activeElement === find('token')")
        browser.type(token)
        browser.press("Enter")
        browser.wait_for("!find('refused').hidden" if is_refused else "!find('ask').open")
    browser.open(url)
    browser.drop(".clip", CLIPS[:1])
    browser.press("Enter", CONTROL, selector="#prompt")
    assert browser.text("#error") == "Type the prompt that the clips were generated from."
    browser.type("a shape, number 0")
    browser.press("Enter", CONTROL)
    browser.wait_for(IS_DONE)
    assert browser.text("#verdict") == f"Reward {offline[0]['reward']:.4f}"


def test_the_page_reads_the_scores_that_the_parser_reads(browser, serving):
    browser.open(f"http://127.0.0.1:{serving().client.port}/")
    for thought in THOUGHTS:
        found = f"readThought({json.dumps(thought)}).scores"
        scores = browser.run(f"{found} && Object.fromEntries({found})")
        judgement = extract_judgement(thought)
        if judgement and (overall := judgement.get("overall_score")):
            judgement[JUDGEMENT_KEY]["overall"] = overall
        assert scores == (judgement and judgement[JUDGEMENT_KEY])
