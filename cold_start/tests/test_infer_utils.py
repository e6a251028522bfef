"""Scoring, writing CoTs, evaluation and merging of a loaded model."""

import json
import random
import shutil

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from checkpoint import LoadedReward, RewardConfig, save_merged
from infer_utils import RewardScorer, evaluate, merge, score
from infer_utils.evaluate import Accuracy, summarise, wilson_interval
from infer_utils.scorer import Cot
from stage1_support import COT, REAL_VIDEOS, SMALL_BUDGET, write_pairs_csv

PROMPTS = ["a red circle moves left", "a star", "a green ring that stays still in the desert", "x"]


@pytest.fixture(scope="module")
def scorer(small_base) -> RewardScorer:
    return RewardScorer.from_base(small_base)


def test_scores_do_not_depend_on_batch_or_order(scorer, clips):
    videos, cots = clips[:4], [COT.format(score=i) for i in (0, 1, 2, 2)]
    alone = [scorer.score([v], [p], [c])[0] for v, p, c in zip(videos, PROMPTS, cots, strict=True)]
    assert scorer.score(videos, PROMPTS, cots) == pytest.approx(alone, abs=1e-5)
    order = [2, 0, 3, 1]
    shuffled = scorer.score(*([items[i] for i in order] for items in (videos, PROMPTS, cots)), batch_size=3)
    assert shuffled == pytest.approx([alone[i] for i in order], abs=1e-5)


def test_cot_matters_and_no_cot_masks_it(scorer, clips):
    shown = scorer.score([clips[0]], ["a red circle"], [COT.format(score=2)])
    masked = scorer.score([clips[0]], ["a red circle"])
    assert shown != pytest.approx(masked, abs=1e-4)
    assert masked == pytest.approx(scorer.score([clips[0]], ["a red circle"], [""]), abs=1e-6)


def test_cot_ids_are_scored_as_they_are(scorer, clips):
    text = COT.format(score=1)
    ids = tuple(scorer.builder.encode_cot(text))
    from_ids = scorer.score([clips[0]], ["a"], [Cot(ids, "another text")])
    assert from_ids == pytest.approx(scorer.score([clips[0]], ["a"], [text]), abs=1e-6)


def test_written_cots_equal_stock_greedy_generation_one_by_one(scorer, small_base, clips):
    encoded = scorer.encode(clips[:3], PROMPTS[:3])
    cots = scorer.write_cots(encoded, batch_size=3, max_new_tokens=12, repetition_penalty=1.0)
    stock = Qwen3VLForConditionalGeneration.from_pretrained(small_base).eval()
    for prompt, cot in zip(encoded, cots, strict=True):
        ids = prompt.input_ids.unsqueeze(0)
        output = stock.generate(
            input_ids=ids,
            mm_token_type_ids=(ids == stock.config.video_token_id).int() * 2,
            pixel_values_videos=prompt.pixel_values,
            video_grid_thw=torch.tensor([prompt.grid_thw]),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=scorer.builder.tokenizer.eos_token_id,
            suppress_tokens=[scorer.builder.reward_token_id, stock.config.video_token_id, stock.config.image_token_id],
        )
        assert list(cot.ids) == [
            i for i in output[0, ids.shape[1] :].tolist() if i != scorer.builder.tokenizer.eos_token_id
        ]
    assert scorer.score_encoded(encoded, cots) != scorer.score_encoded(encoded)


def test_reward_and_vision_tokens_are_never_written(small_base, clips):
    eager = RewardScorer.from_base(small_base)
    forbidden = [eager.builder.reward_token_id, eager.builder.processor.video_token_id]
    with torch.no_grad():  # a head that would write nothing else
        eager.model.generator.lm_head.weight[forbidden] *= 100
    cot = eager.write_cots(eager.encode(clips[:1], ["a"]), max_new_tokens=8)[0]
    assert cot.ids
    assert not set(forbidden) & set(cot.ids)


def test_interval_equals_published_values():
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


def test_accuracy_equals_brute_force_and_leaves_ties_out():
    rng = random.Random(0)
    for _ in range(300):
        records = [
            {"label": rng.choice(["A", "B", "same", "invalid"]), "csv": [rng.randint(0, 2), rng.randint(0, 2)]}
            for _ in range(rng.randint(1, 8))
        ]
        right = total = 0
        for record in records:
            if record["label"] in "AB":
                total += 1
                winner = "A" if record["csv"][0] > record["csv"][1] else "B"
                right += winner == record["label"] and record["csv"][0] != record["csv"][1]
        if total == 0:
            with pytest.raises(ValueError, match="no pair"):
                summarise(records, ["csv"])
        else:
            found = summarise(records, ["csv"])["csv"]
            assert (found.accuracy, found.num_pairs) == (right / total, total)
            assert found.low <= found.accuracy + 1e-9
            assert found.high >= found.accuracy - 1e-9


def test_evaluation_command_writes_results_that_can_be_compared(tmp_path, clips, small_base, monkeypatch, capsys):
    data = write_pairs_csv(tmp_path / "pairs.csv", clips, labels=["A", "B", "same"])
    output = tmp_path / "before.json"
    arguments = [str(small_base), str(data), "--output", str(output), "--max_new_tokens", "8"]
    monkeypatch.setattr("sys.argv", ["evaluate", *arguments])
    evaluate.main()
    result = json.loads(output.read_text())
    assert set(result["accuracy"]) == {"csv", "masked", "own"}
    assert Accuracy(**result["accuracy"]["csv"]).num_pairs == 2
    assert [record["label"] for record in result["pairs"]] == ["A", "B", "same"]
    monkeypatch.setattr("sys.argv", ["evaluate", "--compare", str(output)])
    evaluate.main()
    assert "CoTs it writes itself" in capsys.readouterr().out


def test_base_is_scored_with_the_format_prompt_that_it_was_made_for(small_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(small_base, base)
    RewardConfig(base_model=None, video=SMALL_BUDGET, format_prompt="So: {{ content }}").save(base)
    assert "So: a cat" in RewardScorer.from_base(base).builder.render("a cat")


@pytest.fixture
def refused_evaluation(tmp_path, clips, small_base, monkeypatch, capsys):
    """What evaluation says of work that it refuses, before anything is loaded."""
    monkeypatch.delattr(RewardScorer, "from_base")

    def call(*arguments: str, labels: list[str]) -> str:
        data = write_pairs_csv(tmp_path / "pairs.csv", clips, labels=labels)
        monkeypatch.setattr("sys.argv", ["evaluate", str(small_base), str(data), *arguments])
        with pytest.raises(SystemExit):
            evaluate.main()
        return capsys.readouterr().err

    return call


def test_evaluation_without_a_preference_is_refused_before_scoring(refused_evaluation):
    message = refused_evaluation(labels=["same", "invalid"])
    assert "pairs.csv: no pair with a preference to evaluate on; write A or B into GSB of one" in message


def test_evaluation_into_a_place_that_cannot_be_written_is_refused_before_scoring(refused_evaluation, tmp_path):
    (tmp_path / "notes").write_text("mine")
    output = tmp_path / "notes" / "after.json"
    assert f"--output {output} cannot be written: " in refused_evaluation("--output", str(output), labels=["A"])
    assert f"--output {tmp_path} cannot be written: " in refused_evaluation("--output", str(tmp_path), labels=["A"])


def test_checked_output_has_its_folder_and_is_left_as_it_was(tmp_path):
    output = tmp_path / "new" / "folder" / "after.json"
    evaluate.check_output(output)
    assert output.parent.is_dir()
    assert not output.exists()
    output.write_text("before")
    evaluate.check_output(output)
    assert output.read_text() == "before"


def test_merge_and_score_commands(tmp_path, scorer, clips, monkeypatch, capsys):
    loaded = LoadedReward(scorer.model, scorer.builder, scorer.config)
    save_merged(tmp_path / "one", loaded)
    monkeypatch.setattr("sys.argv", ["merge", str(tmp_path / "one"), str(tmp_path / "two"), "--dtype", "float32"])
    merge.main()
    monkeypatch.setattr("sys.argv", ["score", str(tmp_path / "two"), str(clips[0]), "a red circle", "--cot", "fine"])
    capsys.readouterr()
    score.main()
    printed = float(capsys.readouterr().out.split("reward: ")[1])
    assert printed == pytest.approx(scorer.score([clips[0]], ["a red circle"], ["fine"])[0], abs=1e-5)
    monkeypatch.setattr("sys.argv", ["score", str(tmp_path / "two"), str(tmp_path / "none.mp4"), "a"])
    with pytest.raises(SystemExit):
        score.main()
    assert "video not found" in capsys.readouterr().err


@pytest.mark.skipif(not REAL_VIDEOS.is_dir(), reason=f"no real clips at {REAL_VIDEOS}")
def test_real_clips_score_the_same_alone_and_together(scorer):
    assert scorer.config.video == SMALL_BUDGET
    videos = sorted(REAL_VIDEOS.glob("*.mp4"))
    together = scorer.score(videos, ["a person walks"] * len(videos))
    assert together == pytest.approx([scorer.score([v], ["a person walks"])[0] for v in videos], abs=1e-5)
