"""The parser of annotations and judgements."""

import json
import time

import pytest

from descore.answers import extract_judgement, find_answer, parse_annotation, parse_score

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
        "<answer>The scores:\n```json\n{}\n```\nThat is all.</answer>",
        "<answer>They are {} as said.</answer>",
        'I put {{"gsb_result": "A"}} into <answer>: <answer>{}</answer>',
    ],
)
def test_scores_are_read_with_and_without_tags_fence_and_text_around(form):
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
        ("", "'' is not a label"),
        ("C", "'C' is not a label"),
        ("A or B", "not a label"),
        ("12", "'12' is not a label"),
        ("<answer>{broken</answer>", "'{broken' is not a label"),
        ('{"gsb_result": "A" "video_1_scores": {"style": 2}}', "is not a label"),
        ("[1, 2]", "not a label"),
        ("null", "not a label"),
        ("{}", "neither gsb_result nor scores"),
        ('{"gsb_result": 1}', "gsb_result is 1"),
        ('{"gsb_result": "better"}', "'better' is not a label"),
        ('{"video_1_scores": [2]}', r"video_1_scores is \[2\]"),
        ('{"video_2_scores": {"style": 3}}', "video_2_scores: style is 3"),
        ('{"video_2_scores": {"style": "two"}}', "style is 'two'"),
        ('{"video_2_scores": {"style": 1.5}}', "style is 1.5"),
        ('{"video_2_scores": {"style": true}}', "style is True"),
        ('{"video_2_scores": {"style": null}}', "style is None"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_says_how_to_write_it(answer, message):
    with pytest.raises(ValueError, match=message) as raised:
        parse_annotation(answer)
    assert "Write " in str(raised.value)


def test_sub_scores_are_numbers_however_they_are_written():
    annotation = parse_annotation(
        '{"video_1_scores": {"subject": "2", "camera": 1.0, "style": "N/A", "light": " 0 "}}'
    )
    assert annotation.scores["A"] == {"subject": 2, "camera": 1, "style": "N/A", "light": 0}
    assert [parse_score(value) for value in (True, "n/a", None, [1], "1.5")] == [None, None, None, None, 1.5]


def test_long_answers_are_cut_in_the_message():
    for answer in ("x" * 10_000, f'{{"gsb_result": {"[" * 500}{"]" * 500}}}'):
        with pytest.raises(ValueError, match=r"\.\.\.") as raised:
            parse_annotation(answer)
        assert len(str(raised.value)) < 300


JUDGEMENT = {"dimensional_scores": {"subject": 2}, "overall_score": 3.5}


@pytest.mark.parametrize(
    "response",
    [
        f"Thinking.\n<answer>\n{json.dumps(JUDGEMENT)}\n</answer>",
        f"<answer>```json\n{json.dumps(JUDGEMENT, indent=1)}\n```</answer>",
        f"<answer>```{json.dumps(JUDGEMENT)}```</answer> trailing words",
        f"<answer>{json.dumps(JUDGEMENT)}</answer><answer>not this</answer>",
        f'<answer>{json.dumps(JUDGEMENT)}</answer><answer>{{"overall_score": 3}}</answer>',
        f'<answer>{{"dimensional_scores": {{}}}}</answer> No: <answer>{json.dumps(JUDGEMENT)}</answer>',
        f"I write my scores in <answer>. So: <answer>{json.dumps(JUDGEMENT)}</answer>",
        f"The tags <answer></answer> hold {{scores}}. <answer>{json.dumps(JUDGEMENT)}</answer>",
        f"<answer>They are:\n```json\n{json.dumps(JUDGEMENT)}\n```\nas {{seen}}.</answer>",
        f'<answer>{{"draft": 1}} ```json\n{json.dumps(JUDGEMENT)}\n``` ```{{"dimensional_scores": 1}}```</answer>',
        f"<answer>```python\nx = 1\n```\n```json\n{json.dumps(JUDGEMENT)}\n```</answer>",
        f"<answer>```json\n{json.dumps(JUDGEMENT)}</answer>",
        f'<answer>words, {{braces}}, "quotes {json.dumps(JUDGEMENT)} words</answer>',
        f'<answer>{json.dumps(JUDGEMENT)} {{"dimensional_scores": 1}}</answer>',
    ],
)
def test_judgement_is_the_first_object_of_the_last_answer_with_scores(response):
    assert extract_judgement(response) == JUDGEMENT


def test_an_answer_knows_where_it_begins():
    text = "I look. <answer>no</answer> <answer>words</answer>"
    assert text[: find_answer(text, "dimensional_scores").start] == "I look. <answer>no</answer> "


@pytest.mark.parametrize(
    "response",
    [
        "",
        "no answer at all",
        json.dumps(JUDGEMENT),
        f"<answer>{json.dumps(JUDGEMENT)}",
        '<answer>{"overall_score": 3}</answer>',
        '<answer>{"dimensional_scores": {"subject": 2}</answer>',
        '<answer>["dimensional_scores"]</answer>',
        '<answer>"dimensional_scores"</answer>',
        "<answer></answer>",
        f"</answer>{json.dumps(JUDGEMENT)}<answer>",
        '<answer>{} {"dimensional_scores": {}}</answer>',
        "<answer>" + "[" * 100_000 + "</answer>",
        '<answer>{"dimensional_scores": ' + "9" * 5000 + "}</answer>",
    ],
)
def test_everything_else_is_no_judgement_and_never_raises(response):
    assert extract_judgement(response) is None


WORST = ["\n", "`", "```", "```\n", "<answer>", "</answer>", "<answer></answer>", "{", '{"', '{"a":', '{"a":[1 ',
         '{"\\', '{"a{', '{"a":1}', '{"a" 1}', "[", "}", '"', "\\", "9"]  # fmt: skip


@pytest.mark.parametrize("kind", WORST)
@pytest.mark.parametrize("form", ["{}", "<answer>```json{}```</answer>"])
def test_100_000_characters_of_hostile_text_are_read_in_well_under_a_second(form, kind):
    text = form.format(kind * (100_000 // len(kind)))
    start = time.process_time()
    assert extract_judgement(text) is None
    assert time.process_time() - start < 0.9
    with pytest.raises(ValueError, match="Write"):
        parse_annotation(text)
