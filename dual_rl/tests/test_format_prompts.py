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


def test_shipped_prompts_are_the_default_the_judge_prompt_and_two_that_keep_the_problem_in_front():
    assert sorted(path.stem for path in FOLDER.iterdir()) == NAMES
    assert render("content", PROBLEM) == FormatPrompt(DEFAULT_FORMAT_PROMPT).render(PROBLEM)
    assert render("judge", "a red circle {moves} 100%\n") == judge_problem("a red circle {moves} 100%\n")
    for name in ("subdim", "think_answer"):
        text = render(name, PROBLEM)
        assert text.startswith(PROBLEM.strip() + "\n\n")
        assert text == text.strip()


@pytest.mark.parametrize("name", NAMES)
def test_rendered_text_holds_no_comment_and_one_video(name):
    text = render(name, "a red circle" if name == "judge" else PROBLEM)
    assert text.count(VIDEO_PLACEHOLDER) == 1
    assert not any(unwanted in text for unwanted in ("{#", "data.", REWARD_TOKEN))


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
