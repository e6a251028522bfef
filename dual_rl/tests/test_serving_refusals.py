"""The reward server reads nothing outside its roots, serves no strangers, and takes no more than its limits."""

import itertools
import os
from pathlib import Path

import pytest

from model_support import CLIPS
from serving.requests import MAX_JSON_MB, ServerLimits
from serving_support import PROMPTS, UPLOAD, Client, form, results

pytest_plugins = ["serving_fixtures"]
FORM_HEADERS = {"Content-Type": "multipart/form-data; boundary=sheet"}
HEAD = b"--sheet\r\nContent-Disposition: form-data; name="


@pytest.mark.parametrize(("route", "has_length"), [("/v1/score", True), (UPLOAD, True), (UPLOAD, False)])
def test_a_body_over_the_limit_is_refused_while_it_arrives(serving, route, has_length):
    server = serving(limits=ServerLimits(max_body_mb=0.5))
    start, num_pieces = HEAD + b'"videos"; filename="a"\r\n\r\n', 320
    pieces = itertools.chain([start], itertools.repeat(b"x" * (1 << 16), num_pieces))
    length = {"Content-Length": str(len(start) + (num_pieces << 16))} if has_length else {}
    reply = server.client.post(route, content=pieces, headers=FORM_HEADERS | length)
    assert (reply.status_code, "over 524288 bytes" in reply.json()["error"]) == (413, True)
    assert server.client.metric('descore_refused_total{status="413"}') == 1


def test_without_the_token_nothing_but_health_is_answered(serving, scored_paths):
    server = serving(token="secret")
    stranger = Client(server.client.port)
    for header in ("", "Bearer", "Bearer secre", "Basic secret", b"Bearer s\xe9cret"):
        for method, route in (("POST", "/v1/score"), ("POST", UPLOAD), ("GET", "/metrics")):
            reply = stranger.request(method, route, headers={"Authorization": header})
            assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert stranger.health() == 200
    assert not scored_paths
    assert server.client.score_paths(CLIPS[:1], PROMPTS[:1]).status_code == 200


@pytest.fixture
def maze(tmp_path) -> Path:
    """A root with links of all kinds, beside a file that must not be read; returns the root."""
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    (tmp_path / "rootless").mkdir()
    for name in ("secret.mp4", "rootless/secret.mp4", "root/a.mp4", "root/inner/b.mp4"):
        (tmp_path / name).write_bytes(CLIPS[0].read_bytes())
    links = {"out.mp4": tmp_path / "secret.mp4", "out": tmp_path, "hop.mp4": "out.mp4", "loop": "loop",
             "missing.mp4": "nothing", "fine.mp4": "inner/b.mp4", "back": root}  # fmt: skip
    for name, target in links.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "pipe")
    return root


OUTSIDE = [
    "../secret.mp4", "{root}/../secret.mp4", "{root}/inner/../../secret.mp4", "{root}less/secret.mp4",
    "{tmp}/secret.mp4", "{tmp}/nothing.mp4", "out.mp4", "hop.mp4", "out/secret.mp4", "back/back/out.mp4", "loop",
    "loop/../out.mp4", "missing.mp4", "nothing.mp4", "pipe", "inner", "", "/", "/etc/passwd", "/proc/self/environ",
    "/proc/self/root{tmp}/secret.mp4", "/dev/zero", "a.mp4\0", "{tmp}/secret.mp4\0/../root/a.mp4", "~/a.mp4",
    "file://{root}/a.mp4", "http://127.0.0.1/a.mp4", "x" * 5000,
]  # fmt: skip


def test_paths_out_of_the_roots_are_refused_and_never_opened_and_links_within_are_followed(
    serving, maze, scored_paths
):
    client = serving(roots=[maze]).client
    paths = [path.format(root=maze, tmp=maze.parent) for path in OUTSIDE]
    scored = results(client.score_paths(paths, ["a"] * len(paths)))
    assert scored == [{"error": f"no file below the server's --roots: {path}"} for path in paths]
    assert not scored_paths
    paths = ["a.mp4", "fine.mp4", "back/back/inner/b.mp4", f"{maze}/inner/../a.mp4"]
    assert all("reward" in result for result in results(client.score_paths(paths, ["a"] * 4)))
    assert scored_paths == [str(maze / name) for name in ("a.mp4", "inner/b.mp4", "inner/b.mp4", "a.mp4")]


def test_without_roots_paths_are_refused(serving, scored_paths):
    reply = serving(roots=[]).client.score_paths(CLIPS[:1], PROMPTS[:1])
    assert (reply.status_code, "--roots" in reply.json()["error"]) == (403, True)
    assert not scored_paths


PATH = b'{"videos": [{"path": "a"}], "prompts": ["b"]'
BAD_JSON = {
    b"[]": "not a request to score",
    PATH + b', "more": 1}': "more",
    b'{"videos": ["a"], "prompts": ["b"]}': "videos.0",
    b'{"videos": [], "prompts": []}': "give one prompt for each",
    b'{"videos": [{"path": "\\ud800"}], "prompts": ["b"]}': "hex escape",
    PATH[:-4] + b'"' + b"b" * 101 + b'"]}': "a prompt has 101 characters",
}
BAD_FORMS = {  # body: status and message
    b"no form": (400, "Invalid multipart"),
    HEAD + b'"path"\r\n\r\n/etc/passwd\r\n--sheet--\r\n': (422, "other parts"),
    HEAD + b'"videos"\r\n\r\n/etc/passwd\r\n--sheet--\r\n': (422, "`videos` as files"),
}
BAD_UPLOADS = [  # number of videos, prompts, status and message
    (1, [], 422, "give one prompt for each"),
    (5, ["b"] * 4, 400, "Maximum number of files is 4"),
    (1, ["b" * 401], 400, "exceeded maximum size"),
    (1, ["b" * 101], 422, "a prompt has 101 characters"),
]


def test_an_invalid_request_is_refused_with_a_reason(serving):
    client = serving(limits=ServerLimits(max_videos=4, max_prompt_chars=100)).client
    replies = [(client.post("/v1/score", content=body), 422, message) for body, message in BAD_JSON.items()]
    replies += [(client.post(UPLOAD, content=body, headers=FORM_HEADERS), *why) for body, why in BAD_FORMS.items()]
    replies += [(client.post(UPLOAD, **form([b"a"] * count, prompts)), *why) for count, prompts, *why in BAD_UPLOADS]
    replies.append((client.post("/v1/score", content=b" " * ((MAX_JSON_MB << 20) + 1)), 413, ""))
    replies.append((client.post(UPLOAD, content=b"a", headers={"Content-Type": "text/plain"}), 415, ""))
    replies += [(client.get("/docs"), 404, ""), (client.post("/health"), 405, "")]
    for reply, status, message in replies:
        assert (reply.status_code, message in reply.json()["error"]) == (status, True), reply.text
