"""The shipped Jinja files, rendered the way the trainer renders them."""

from pathlib import Path

import pytest

from descore.format_prompt import FormatPrompt
from verl.data.scored_sequence import DEFAULT_FORMAT_PROMPT, REWARD_TOKEN, VIDEO_PLACEHOLDER, judge_problem

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "format_prompt"
NAMES = ["content", "judge", "subdim", "think_answer"]
PROBLEM = "  <video>\nDoes it show {a red circle}? 100%\n"


def render(name: str, content: str) -> str:
    return FormatPrompt((FOLDER / f"{name}.jinja").read_text(encoding="utf-8")).render(content)


def test_four_prompts_are_shipped():
    assert sorted(path.stem for path in FOLDER.iterdir()) == NAMES


def test_content_is_the_default():
    assert render("content", PROBLEM) == FormatPrompt(DEFAULT_FORMAT_PROMPT).render(PROBLEM)


def test_judge_is_the_built_in_judge_prompt():
    assert render("judge", "a red circle {moves} 100%\n") == judge_problem("a red circle {moves} 100%\n")


@pytest.mark.parametrize("name", ["subdim", "think_answer"])
def test_others_keep_the_problem_in_front(name):
    text = render(name, PROBLEM)
    assert text.startswith(PROBLEM.strip() + "\n\n")
    assert text == text.strip()


@pytest.mark.parametrize("name", NAMES)
def test_rendered_text_holds_no_comment_and_one_video(name):
    text = render(name, "a red circle" if name == "judge" else PROBLEM)
    assert text.count(VIDEO_PLACEHOLDER) == 1
    assert "{#" not in text
    assert "data." not in text
    assert REWARD_TOKEN not in text


@pytest.mark.parametrize(
    "text",
    ["{% if %}", "{{ contents }}", "{{ 1 / 0 }}", "{{ content + 1 }}", "{{ ''.__class__.__mro__ }}", 3,
     "{% for _ in range(10 ** 9) %}{% endfor %}"],
)  # fmt: skip
def test_a_prompt_that_does_not_render_is_one_error_that_names_its_source(text):
    with pytest.raises(ValueError, match=r"^mine\.jinja: the format prompt "):
        FormatPrompt(text, source="mine.jinja")
    with pytest.raises(ValueError, match=r"^mine\.jinja: the format prompt "):
        FormatPrompt("{% if content %}{{ cycler.__init__.__globals__ }}{% endif %}", source="mine.jinja").render("x")
