"""The parser of annotations and judgements."""

import json

import pytest

from verl.data.answers import extract_judgement, parse_annotation, parse_label

SCORES_A = {"subject": 2, "camera": "N/A"}
SCORES_B = {"subject": 0, "camera": 1}
ANNOTATION = json.dumps({"video_1_scores": SCORES_A, "video_2_scores": SCORES_B, "gsb_result": "Video 2 is better"})

LABELS = {
    1: ["A", "a", " A\n", "A.", "Video 1", "Video 1 is better", "video A IS better", "A is better"],
    -1: ["B", "Video 2 is better.", "VIDEO B", "b is better", "Video  2\nis better"],
    0: [
        "same",
        "Same.",
        "tie",
        "Tied",
        "equal",
        "Both are equal",
        "both videos are equal",
        "both are equally good",
        "Both videos are equally bad",
        "both are about the same",
        "The two videos are similar",
        "about the same",
        "neither is better",
    ],
    None: ["invalid", "Invalid"],
}


@pytest.mark.parametrize(("label", "preference"), [(x, sign) for sign, labels in LABELS.items() for x in labels])
@pytest.mark.parametrize("form", ["{}", "<answer>{}</answer>", '<answer>"{}"</answer>', '{{"gsb_result": "{}"}}'])
def test_every_spelling_is_understood_bare_and_in_json(form, label, preference):
    if "gsb_result" in form or '"' in form:
        label = label.replace("\n", " ")  # raw line breaks are no JSON
    annotation = parse_annotation(form.format(label))
    assert annotation.preference == preference
    assert annotation.scores == {"A": {}, "B": {}}


@pytest.mark.parametrize(
    "form",
    [
        "{}",
        "<answer>{}</answer>",
        "<answer>\n{}\n</answer>\n",
        "<answer>```json\n{}\n```</answer>",
        "Some words first.\n<answer>\n```\n{}\n```\n</answer> and after",
        "```JSON\n{}\n```",
    ],
)
def test_scores_are_read_with_and_without_tags_and_fence(form):
    annotation = parse_annotation(form.format(ANNOTATION))
    assert annotation.scores == {"A": SCORES_A, "B": SCORES_B}
    assert annotation.preference == -1


@pytest.mark.parametrize("label", [{}, {"gsb_result": None}, {"gsb_result": "invalid"}])
def test_scores_without_a_label_have_no_preference(label):
    annotation = parse_annotation(json.dumps({"video_1_scores": SCORES_A, **label}))
    assert annotation.preference is None
    assert annotation.scores == {"A": SCORES_A, "B": {}}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("", "no label in ''"),
        ("C", "no label in 'C'"),
        ("A or B", "no label"),
        ("12", "no label in '12'"),
        ("<answer>{broken</answer>", "no label in '{broken'"),
        ("[1, 2]", "no label"),
        ("null", "no label"),
        ("{}", "neither gsb_result nor scores"),
        ('{"gsb_result": 1}', "gsb_result is 1"),
        ('{"gsb_result": "better"}', "no label in 'better'"),
        ('{"video_1_scores": [2]}', r"video_1_scores is \[2\]"),
        ('{"video_2_scores": {"style": 3}}', "video_2_scores: style is 3"),
        ('{"video_2_scores": {"style": "2"}}', "style is '2'"),
        ('{"video_2_scores": {"style": 2.0}}', "style is 2.0"),
        ('{"video_2_scores": {"style": true}}', "style is True"),
        ('{"video_2_scores": {"style": null}}', "style is None"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_says_how_to_write_it(answer, message):
    with pytest.raises(ValueError, match=message) as raised:
        parse_annotation(answer)
    assert "write " in str(raised.value)


def test_long_answers_are_cut_in_the_message():
    with pytest.raises(ValueError, match=r"x\.\.\.") as raised:
        parse_label("x" * 10_000)
    assert len(str(raised.value)) < 300


JUDGEMENT = {"dimensional_scores": {"subject": 2}, "overall_score": 3.5}


@pytest.mark.parametrize(
    "response",
    [
        f"Thinking.\n<answer>\n{json.dumps(JUDGEMENT)}\n</answer>",
        f"<answer>```json\n{json.dumps(JUDGEMENT, indent=1)}\n```</answer>",
        f"<answer>```{json.dumps(JUDGEMENT)}```</answer> trailing words",
        f"<answer>{json.dumps(JUDGEMENT)}</answer><answer>not this</answer>",
    ],
)
def test_judgement_is_the_first_answer_block(response):
    assert extract_judgement(response) == JUDGEMENT


@pytest.mark.parametrize(
    "response",
    [
        "",
        "no answer at all",
        json.dumps(JUDGEMENT),
        f"<answer>{json.dumps(JUDGEMENT)}",
        f"<answer>words</answer><answer>{json.dumps(JUDGEMENT)}</answer>",
        '<answer>{"overall_score": 3}</answer>',
        '<answer>{"dimensional_scores": {"subject": 2}</answer>',
        '<answer>["dimensional_scores"]</answer>',
        '<answer>"dimensional_scores"</answer>',
        "<answer></answer>",
        f"<answer>words {json.dumps(JUDGEMENT)}</answer>",
        "<answer>" + "[" * 100_000 + "</answer>",
        '<answer>{"dimensional_scores": ' + "9" * 5000 + "}</answer>",
    ],
)
def test_everything_else_is_no_judgement_and_never_raises(response):
    assert extract_judgement(response) is None
