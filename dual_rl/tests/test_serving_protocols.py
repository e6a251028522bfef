"""Trainers' own protocols: the bytes that their clients send are answered with the rewards of the offline model."""

import base64
import io
import json
import os
import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.exceptions import HTTPException

from model_support import CLIPS, DUAL_RL
from reward_client import RewardClient, RewardServerError
from serving import protocols
from serving.protocols import DEFAULT_FPS, read_flow_grpo
from serving.requests import ServerLimits
from serving_support import PROMPTS, TOLERANCE, Client

pytest_plugins = ["serving_fixtures"]
FPS = 8.0


def make_clip(number: int) -> np.ndarray:
    """uint8 [frames, height, width, 3]: a bright bar that moves."""
    clip = np.full((12, 64, 96, 3), 20 * number, np.uint8)
    for frame in range(12):
        clip[frame, :, 8 * frame : 8 * frame + 8] = (255, 40 * number, 0)
    return clip


def encode(clip: np.ndarray, kind: str) -> list[bytes]:
    files = [io.BytesIO() for _ in clip]
    for frame, file in zip(clip, files, strict=True):
        Image.fromarray(frame).save(file, kind)
    return [file.getvalue() for file in files]


def decode(frames: list[bytes]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(frame))) for frame in frames])


def near(rewards: list[float]) -> object:
    return pytest.approx(rewards, abs=TOLERANCE)


def test_flow_grpo_gets_the_rewards_of_the_frames_that_it_pickles(serving, reward_model):
    """Its client splits the prompts by numpy, posts without a content type, and reads `outputs` of the pickle."""
    clips, prompts = [make_clip(number) for number in range(3)], PROMPTS[:3]
    jpegs = [encode(clip, "JPEG") for clip in clips]
    expected = reward_model.score(clips, prompts, fps=FPS).rewards
    of_jpegs = reward_model.score([decode(frames) for frames in jpegs], prompts, fps=FPS).rewards
    at_24 = reward_model.score(clips[2:], prompts[2:], fps=24.0).rewards
    by_default = reward_model.score(clips, prompts, fps=DEFAULT_FPS).rewards
    client = serving().client  # now the model is the server's
    floats = np.stack(clips).transpose(0, 1, 4, 2, 3) / np.float32(255)
    split = np.array_split(prompts, 1)[0]
    for images, rewards in (
        (jpegs, of_jpegs),
        ([encode(clip, "PNG") for clip in clips], expected),
        (np.stack(clips), expected),
        (list(floats), expected),
    ):
        for protocol in (3, 4, 5):
            body = pickle.dumps({"images": images, "prompts": split, "fps": FPS}, protocol)
            if protocol == 3:
                body = body.replace(b"numpy._core", b"numpy.core")  # of numpy 1
            reply = client.post("/flow_grpo", content=body)
            assert reply.status_code == 200, reply.text
            assert pickle.loads(reply.content) == {"outputs": near(rewards)}
    body = pickle.dumps({"videos": clips, "prompts": prompts, "meta_datas": [{}] * 3, "fps": [FPS, FPS, 24.0]})
    assert pickle.loads(client.post("/flow_grpo", content=body).content)["outputs"] == near([*expected[:2], *at_24])
    body = pickle.dumps({"images": clips, "prompts": prompts})
    assert pickle.loads(client.post("/flow_grpo", content=body).content)["outputs"] == near(by_default)


class Attack:
    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call[0], self.call[1:]


def test_what_flow_grpo_must_not_send_is_refused_and_never_run(serving, scored_paths, tmp_path):
    """A pickle that runs code, an image for a video, a video that cannot be scored: never a reward."""
    client, clip = serving().client, make_clip(1)

    def send(**changes: object) -> bytes:
        return pickle.dumps({"images": [clip], "prompts": ["a"]} | changes)

    refused = {
        send(metadata=Attack(os.mkdir, str(tmp_path / "run"))): "mkdir",
        send(metadata=Attack(np.ndarray, (1 << 40,))): "not a pickled dict",
        send(images=torch.zeros(1, 4, 3, 8, 8)): "_rebuild_tensor",
        b"no pickle": "not a pickled dict",
        pickle.dumps([clip]): "not a pickled dict",
        send(prompts=["a", "b"]): "give one prompt for each",
        send(images=encode(clip[:1], "JPEG")): "videos[0]: it is not a video",
        send(images=[[b"no image"] * 4]): "cannot identify image",
        send(images=[clip[:2]]): "has 2 frames",
        send(images=[clip.astype(np.float32)]): "not all in [0, 1]",
        send(images=[np.full((4, 64, 64, 3), np.nan)]): "not all in [0, 1]",
        send(fps=0): "fps is 0",
        send(fps=[8.0, 8.0]): "longer than",
        send(fps=10**400): "not a pickled dict",
        send(images=[clip, clip], prompts=["a", "b <Reward>"]): "videos[1]: ",
    }
    for body, message in refused.items():
        reply = client.post("/flow_grpo", content=body)
        assert (reply.status_code, message in reply.json()["error"]) == (422, True), reply.text
    assert not (tmp_path / "run").exists()
    assert len(scored_paths) == 2  # of the last one


def shared_lists() -> list:
    """A few bytes in a pickle, and 10**7 letters as text."""
    value: object = "a"
    for _ in range(7):
        value = [value] * 10
    return value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02Nr\xff\xff\xff\x00.", "not written as pickle.dumps does"),  # None, memorised as the 2**24th
        ({"prompts": [shared_lists()]}, "prompts are not text"),
        ({"fps": [shared_lists()]}, "must be a string or a real number"),
        ({"images": np.zeros((10**7, 0), np.uint8)}, "10000000 videos"),
        ({"fps": Attack(np._core.multiarray.scalar, np.dtype("V20000000"))}, "required positional argument"),
        ({"images": [encode(np.zeros((10, 8, 8, 3), np.uint8), "PNG")]}, "over 600 pixels"),
    ],
    ids=["memo", "text", "rates", "no data", "scalar", "pixels"],
)
def test_a_small_pickle_takes_little_memory(content, message, monkeypatch):
    """The first five stand for gigabytes; the last is over a limit of the test's own."""
    monkeypatch.setattr(protocols, "MAX_CLIP_PIXELS", 600)
    request = {"images": [np.zeros((4, 8, 8, 3), np.uint8)], "prompts": ["a"]}
    body = content if isinstance(content, bytes) else pickle.dumps(request | content)
    assert len(body) < 4000
    with pytest.raises(HTTPException, match=re.escape(message)) as refusal:
        read_flow_grpo(body, ServerLimits(), None)
    assert refusal.value.status_code == 422


def unirl_body(*turns: str, more: str = "") -> str:
    """As UniRL's remote.py writes it."""
    requests = [
        f'{{"history": [{{"text": "{PROMPTS[number]}", {turn}}}], "required_rewards": ["descore"], "metadata": null, '
        f'"request_id": "r{number}", "sample_id": "s", "group_id": "g", "source_rank": 0, "policy_version": null, '
        '"scorer_version": null, "idempotency_key": "k"}'
        for number, turn in enumerate(turns)
    ]
    return f'{{"protocol_version": "1", {more}"requests": [{", ".join(requests)}]}}'


def test_unirl_gets_rewards_and_errors_by_name_and_its_identities_back(serving, offline, tmp_path):
    """With the token in the URL, since its client has no other place for one; its health check wants our reward."""
    (tmp_path / "broken.mp4").write_bytes(CLIPS[0].read_bytes()[:400])
    server = serving(token="secret", roots=[CLIPS[0].parent, tmp_path])
    client = Client(server.client.port)
    client.auth = ("descore", "secret")
    turns = [
        f'"video_b64": "{base64.b64encode(CLIPS[0].read_bytes()).decode()}"',
        f'"video_path": "{CLIPS[1]}"',
        '"video_path": "broken.mp4"',
        '"video_path": "/etc/passwd"',
        '"video_b64": "!"',
    ]
    reply = client.post("/score", content=unirl_body(*turns), headers={"Content-Type": "application/json"})
    answer = reply.json()
    rewards = [[{"descore": {"descore": near(result["reward"])}}] for result in offline[:2]]
    assert [[result] for result in answer["results"]] == [*rewards, [{}], [{}], [{}]]
    assert answer["errors"][:2] == [{}, {}]
    for error, message in zip(answer["errors"][2:], ("does not decode", "no file below", "not base64"), strict=True):
        assert message in error["descore"]
    echo = {"sample_id": "s", "group_id": "g", "source_rank": 0, "policy_version": None, "scorer_version": None}
    expected = [{"request_id": f"r{number}", "idempotency_key": "k", **echo} for number in range(5)]
    assert (answer["identities"], answer["protocol_version"]) == (expected, "1")
    assert client.get("/health").json()["rewards"] == {"descore": ["ready"]}
    client.auth = ("descore", "guess")
    assert client.post("/score", content=unirl_body(*turns)).status_code == 401


def test_what_unirl_asks_for_and_we_have_not_is_refused(serving, scored_paths):
    client, turn = serving().client, '"video_path": "a.mp4"'
    whole = unirl_body(turn)
    refused = {
        whole.replace('"descore"', '"hpsv3"'): "required_rewards",
        whole.replace('"protocol_version": "1"', '"protocol_version": "2"'): "protocol_version",
        whole.replace('"scorer_version": null', '"scorer_version": "x"'): "scorer_version",
        unirl_body(turn, more='"grad_mode": true, '): "grad_mode",
        unirl_body('"image_b64": "aaaa"'): "images are not scored",
        json.dumps({"requests": [{"history": [], "required_rewards": ["descore"]}]}): "history is empty",
    }
    for body, message in refused.items():
        reply = client.post("/score", content=body)
        assert (reply.status_code, message in reply.json()["error"]) == (422, True), reply.text
    assert not scored_paths


def test_the_client_is_a_scorer_as_dancegrpo_calls_it(serving, offline, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"broken")
    inferencer = RewardClient(f"http://127.0.0.1:{serving().client.port}")
    (reward,) = inferencer.reward([str(CLIPS[0])], [PROMPTS[0]], use_norm=True)
    assert reward == dict.fromkeys(("VQ", "MQ", "TA", "Overall"), near(offline[0]["reward"]))
    with pytest.raises(RewardServerError, match="does not decode"):
        inferencer.reward([str(CLIPS[0]), str(tmp_path / "broken.mp4")], PROMPTS[:2])


def test_the_snippet_for_flow_grpo_runs_as_it_is_shown(serving, reward_model):
    """With [batch, frames, 3, height, width] in [0, 1], as its trainers hand videos to a reward."""
    clips = [make_clip(number) for number in range(2)]
    expected = reward_model.score(clips, PROMPTS[:2], fps=16).rewards
    address = f"http://127.0.0.1:{serving().client.port}"
    (snippet,) = re.findall(r"```python\n(import pickle.*?)```", (DUAL_RL / "SERVING.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(snippet.replace("http://rewards:8000", address), names)
    videos = torch.from_numpy(np.stack(clips)).permute(0, 1, 4, 2, 3) / 255
    rewards, details = names["descore_score"]("cpu")(videos, tuple(PROMPTS[:2]), [{}, {}])
    assert (rewards, details) == (near(expected), {})
