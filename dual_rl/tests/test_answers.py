"""The parser of annotations and judgements."""

import json
import time

import pytest

from descore.answers import extract_judgement, parse_annotation

SCORES_A = {"subject": "2", "camera": "N/A"}
SCORES_B = {"subject": " 0 ", "camera": 1.0}
ANNOTATION = json.dumps({"video_1_scores": SCORES_A, "video_2_scores": SCORES_B, "gsb_result": "Video 2 is better"})
JUDGEMENT = {"dimensional_scores": {"subject": 2}, "overall_score": 3.5}
JSON = json.dumps(JUDGEMENT)
LABELS = {
    1: ["A", "a", " A\n", "A.", "Video 1", "Video 1 is better", "video A IS better", "A is better"],
    -1: ["B", "Video 2 is better.", "VIDEO B", "b is better", "Video  2\nis better"],
    0: ["same", "Same.", "tie", "Tied", "equal", "Both are equal", "both are equally good",
        "Both videos are equally bad", "both are about the same", "The two videos are similar", "about the same",
        "neither is better"],
    None: ["invalid", "Invalid"],
}  # fmt: skip


@pytest.mark.parametrize("form", ["{}", "<answer>{}</answer>", '<answer>"{}"</answer>', '{{"gsb_result": "{}"}}'])
def test_every_spelling_is_understood_bare_and_in_json(form):
    for preference, labels in LABELS.items():
        for label in labels:
            if '"' in form:
                label = label.replace("\n", " ")  # raw line breaks are not JSON
            annotation = parse_annotation(form.format(label))
            assert (annotation.preference, annotation.scores) == (preference, {"A": {}, "B": {}}), label


@pytest.mark.parametrize(
    "form",
    [
        "{}",
        "<answer>\n{}\n</answer>\n",
        "```JSON\n{}\n```",
        "<answer>The scores:\n```json\n{}\n```\nThat is all.</answer>",
        'I put {{"gsb_result": "A"}} into <answer>: <answer>{}</answer>',
    ],
)
def test_scores_are_read_with_and_without_tags_fence_and_text_around(form):
    annotation = parse_annotation(form.format(ANNOTATION))
    assert annotation.scores == {"A": {"subject": 2, "camera": "N/A"}, "B": {"subject": 0, "camera": 1}}
    assert annotation.preference == -1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("", "'' is not a label"),
        ("<answer>{broken</answer>", "'{broken' is not a label"),
        ("{}", "neither gsb_result nor scores"),
        ('{"gsb_result": 1}', "gsb_result is 1"),
        ('{"video_1_scores": [2]}', r"video_1_scores is \[2\]"),
        ('{"video_2_scores": {"style": 3}}', "video_2_scores: style is 3"),
        ('{"video_2_scores": {"style": true}}', "style is True"),
        ("x" * 10_000, r"\.\.\."),
        (f'{{"gsb_result": {"[" * 500}{"]" * 500}}}', r"\.\.\."),
    ],
)
def test_what_cannot_be_read_is_a_short_error_that_says_how_to_write_it(answer, message):
    with pytest.raises(ValueError, match=message) as raised:
        parse_annotation(answer)
    assert "Write " in str(raised.value)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    "response",
    [
        f"<answer>```json\n{json.dumps(JUDGEMENT, indent=1)}\n```</answer>",
        f"<answer>{JSON}</answer><answer>not this</answer>",
        f'<answer>{JSON}</answer><answer>{{"overall_score": 3}}</answer>',
        f'<answer>{{"dimensional_scores": {{}}}}</answer> No: <answer>{JSON}</answer>',
        f"I write my scores in <answer>. So: <answer>{JSON}</answer>",
        f"<answer>They are:\n```json\n{JSON}\n```\nas {{seen}}.</answer>",
        f'<answer>{{"draft": 1}} ```json\n{JSON}\n``` ```{{"dimensional_scores": 1}}```</answer>',
        f"<answer>```json\n{JSON}</answer>",
        f'<answer>words, {{braces}}, "quotes {JSON} words</answer>',
        f'<answer>{JSON} {{"dimensional_scores": 1}}</answer>',
    ],
)
def test_judgement_is_the_first_object_of_the_last_answer_with_scores(response):
    assert extract_judgement(response) == JUDGEMENT


@pytest.mark.parametrize(
    "response",
    [
        "",
        JSON,
        f"<answer>{JSON}",
        '<answer>{"overall_score": 3}</answer>',
        '<answer>{"dimensional_scores": {"subject": 2}</answer>',
        '<answer>["dimensional_scores"]</answer>',
        '<answer>{} {"dimensional_scores": {}}</answer>',
        '<answer>{"dimensional_scores": ' + "9" * 5000 + "}</answer>",
    ],
)
def test_everything_else_is_not_a_judgement_and_never_raises(response):
    assert extract_judgement(response) is None


WORST = ["\n", "```", "```\n", "<answer>", "<answer></answer>", "{", '{"', '{"a":', '{"a":[1 ',
         '{"\\', '{"a":1}', '{"a" 1}', "[", "}", '"', "9"]  # fmt: skip


@pytest.mark.parametrize("kind", WORST)
def test_100_000_characters_of_hostile_text_are_read_in_well_under_a_second(kind):
    for form in ("{}", "<answer>```json{}```</answer>"):
        text = form.format(kind * (100_000 // len(kind)))
        start = time.process_time()
        assert extract_judgement(text) is None
        assert time.process_time() - start < 0.9
        with pytest.raises(ValueError, match="Write"):
            parse_annotation(text)
