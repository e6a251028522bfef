"""Scoring, writing CoTs, evaluation and merging of a loaded model."""

import json

import av
import numpy as np
import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from checkpoint import LoadedReward, save_merged
from infer_utils import RewardScorer, evaluate, merge, score
from infer_utils.evaluate import summarise, wilson_interval
from infer_utils.scorer import Cot
from stage1_support import COT, write_pairs_csv

PROMPTS = ["a red circle moves left", "a star", "a green ring that stays still in the desert", "x"]


@pytest.fixture(scope="module")
def scorer(small_base) -> RewardScorer:
    return RewardScorer.from_base(small_base)


def test_scores_do_not_depend_on_batch_or_order_but_on_the_cot(scorer, clips):
    videos, cots = clips[:4], [COT.format(score=i) for i in (0, 1, 2, 2)]
    alone = [scorer.score([v], [p], [c])[0] for v, p, c in zip(videos, PROMPTS, cots, strict=True)]
    order = [2, 0, 3, 1]
    shuffled = scorer.score(*([items[i] for i in order] for items in (videos, PROMPTS, cots)), batch_size=3)
    assert shuffled == pytest.approx([alone[i] for i in order], abs=1e-5)
    ids = tuple(scorer.builder.encode_cot(cots[0]))
    from_ids = scorer.score(videos[:1], PROMPTS[:1], [Cot(ids, "another text")])
    assert from_ids == pytest.approx(alone[:1], abs=1e-5)
    masked = scorer.score(videos[:1], PROMPTS[:1])
    assert masked == pytest.approx(scorer.score(videos[:1], PROMPTS[:1], [""]), abs=1e-6)
    assert masked != pytest.approx(alone[:1], abs=1e-4)


def test_written_cots_equal_stock_greedy_generation_one_by_one(scorer, small_base, clips):
    encoded = scorer.encode(clips[:3], PROMPTS[:3])
    cots = scorer.write_cots(encoded, batch_size=3, max_new_tokens=12, repetition_penalty=1.0)
    stock = Qwen3VLForConditionalGeneration.from_pretrained(small_base).eval()
    eos = scorer.builder.tokenizer.eos_token_id
    for prompt, cot in zip(encoded, cots, strict=True):
        ids = prompt.input_ids.unsqueeze(0)
        output = stock.generate(
            input_ids=ids,
            mm_token_type_ids=(ids == stock.config.video_token_id).int() * 2,
            pixel_values_videos=prompt.pixel_values,
            video_grid_thw=torch.tensor([prompt.grid_thw]),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=eos,
            suppress_tokens=[scorer.builder.reward_token_id, stock.config.video_token_id, stock.config.image_token_id],
        )
        assert list(cot.ids) == [i for i in output[0, ids.shape[1] :].tolist() if i != eos]


def test_reward_has_a_gradient_by_pixels(scorer, clips):
    """Its value is that of the file's frames; its gradient is that of the frames before rounding."""
    stored = np.stack([frame.to_ndarray(format="rgb24") for frame in av.open(str(clips[0])).decode(video=0)])
    fps, cot = float(av.open(str(clips[0])).streams.video[0].average_rate), COT.format(score=1)
    frames = (torch.from_numpy(stored).permute(0, 3, 1, 2) / 255).requires_grad_()
    exact = scorer.differentiable(frames, PROMPTS[0], cot, fps=fps)
    assert exact.item() == pytest.approx(scorer.score(clips[:1], PROMPTS[:1], [cot])[0], abs=1e-4)
    smooth = scorer.differentiable(frames, PROMPTS[0], cot, fps=fps, is_exact=False)
    (gradient,) = torch.autograd.grad(smooth, frames)
    inside = (frames.detach() > 0.1) & (frames.detach() < 0.9)  # where a step does not leave the range
    step = 1e-4 * gradient.sign() * inside
    ahead, behind = (
        scorer.differentiable((frames + sign * step).detach(), PROMPTS[0], cot, fps=fps, is_exact=False)
        for sign in (1, -1)
    )
    assert ((ahead - behind) / 2).item() == pytest.approx((gradient * step).sum().item(), rel=0.05)
    assert torch.autograd.grad(exact, frames)[0].abs().sum() > 0


def test_reward_and_vision_tokens_are_never_written(small_base, clips):
    eager = RewardScorer.from_base(small_base)
    forbidden = [eager.builder.reward_token_id, eager.builder.processor.video_token_id]
    with torch.no_grad():  # a head that would write nothing else
        eager.model.generator.lm_head.weight[forbidden] *= 100
    cot = eager.write_cots(eager.encode(clips[:1], ["a"]), max_new_tokens=8)[0]
    assert cot.ids
    assert not set(forbidden) & set(cot.ids)


def test_accuracy_leaves_ties_out_and_its_interval_equals_published_values():
    labels, rewards = ["A", "B", "B", "A", "same", "invalid"], [(2, 1), (1, 2), (2, 1), (1, 1), (2, 1), (2, 1)]
    records = [{"label": label, "csv": pair} for label, pair in zip(labels, rewards, strict=True)]
    found = summarise(records, ["csv"])["csv"]
    low, high = wilson_interval(2, 4)
    assert found == {"accuracy": 0.5, "low": low, "high": high, "num_pairs": 4}
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


@pytest.fixture
def call_evaluate(tmp_path, clips, small_base, monkeypatch, capsys):
    """Evaluate the small base on pairs with these labels; returns what is written to stdout and stderr."""

    def call(*arguments: str, labels: list[str], is_refused: bool = False, **columns: list[str]) -> str:
        data = write_pairs_csv(tmp_path / "pairs.csv", clips, labels=labels, **columns)
        command = ["evaluate", *([str(small_base), str(data)] if labels else []), *arguments]
        monkeypatch.setattr("sys.argv", command)
        if is_refused:
            monkeypatch.delattr(RewardScorer, "from_base", raising=False)  # before anything is loaded
            with pytest.raises(SystemExit):
                evaluate.main()
        else:
            evaluate.main()
        return "".join(capsys.readouterr())

    return call


def test_evaluation_command_writes_results_that_can_be_compared(call_evaluate, tmp_path):
    output = tmp_path / "new" / "before.json"
    call_evaluate("--output", str(output), "--max_new_tokens", "8", labels=["A", "B", "same"])
    result = json.loads(output.read_text())
    assert set(result["accuracy"]) == {"csv", "masked", "own"}
    assert result["accuracy"]["csv"]["num_pairs"] == 2
    assert [record["label"] for record in result["pairs"]] == ["A", "B", "same"]
    assert "CoTs it writes itself" in call_evaluate("--compare", str(output), labels=[])


def test_evaluation_drops_pairs_whose_video_is_gone_up_to_a_share(call_evaluate, clips, tmp_path, monkeypatch, capsys):
    videos = [repr([str(clips[0]), str(tmp_path / "gone.mp4")]), repr([str(clips[0]), str(clips[1])])]
    arguments, pairs = ["--output", str(tmp_path / "after.json"), "--modes", "masked"], {"videos": videos}
    listed = f"\n  row 1: video not found: {tmp_path / 'gone.mp4'}"
    with pytest.raises(SystemExit):
        call_evaluate(*arguments, labels=["A", "B"], **pairs)
    message = capsys.readouterr().err
    assert "more than 1% of 2 pairs could not be loaded" in message
    assert listed in message
    monkeypatch.setattr(evaluate, "MAX_DROPPED_SHARE", 0.5)
    assert f"1 of 2 pairs dropped:{listed}\n" in call_evaluate(*arguments, labels=["A", "B"], **pairs)
    assert [pair["row"] for pair in json.loads((tmp_path / "after.json").read_text())["pairs"]] == [2]
    with pytest.raises(SystemExit):
        call_evaluate(*arguments, labels=["A", "same"], **pairs)
    assert "no pair with a preference" in capsys.readouterr().err


def test_merge_and_score_commands(tmp_path, scorer, clips, monkeypatch, capsys):
    save_merged(tmp_path / "one", LoadedReward(scorer.model, scorer.builder, scorer.config))
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
