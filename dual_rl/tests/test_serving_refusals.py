"""What the reward server must not do: read outside its roots, serve strangers, or take more than it can hold."""

import itertools
import json
import os
from pathlib import Path

import pytest
from fastapi.exceptions import RequestValidationError

from serving_support import CLIPS, FORM_HEADERS, PROMPTS, Client, announce_frames, assert_scored, form_body
from verl.serving.app import create_app
from verl.serving.limits import MAX_JSON_BYTES, ServerLimits

pytest_plugins = ["serving_fixtures"]
PATH = b'{"videos": [{"path": "a"}], "prompts": ["b"]'
HEAD = b"--sheet\r\nContent-Disposition: form-data; name="


@pytest.mark.parametrize("route", ["/v1/score", "/v1/score/upload"])
@pytest.mark.parametrize("has_length", [True, False], ids=["announced", "chunked"])
def test_a_body_over_the_limit_is_refused_while_it_arrives(serving, route, has_length):
    server = serving(limits=ServerLimits(max_body_mb=0.5))
    start, num_pieces = HEAD + b'"videos"\r\n\r\n', 320  # more than sockets buffer: a mere close would reset
    pieces = itertools.chain([start], itertools.repeat(b"x" * (1 << 16), num_pieces))
    length = {"Content-Length": str(len(start) + (num_pieces << 16))} if has_length else {}
    reply = server.client.request("POST", route, pieces, {**FORM_HEADERS, **length})
    assert reply.status == 413
    assert "over 524288 bytes" in reply.json["error"]
    assert server.client.metric('descore_refused_total{reason="body_too_large"}') == 1


def test_a_json_body_has_a_limit_of_its_own(serving):
    server = serving()
    reply = server.client.request("POST", "/v1/score", b" " * (MAX_JSON_BYTES + 1))
    assert reply.status == 413


@pytest.mark.parametrize(
    "header", [None, "Bearer", "Bearer wrong", "Bearer secre", "Basic secret", "Bearer s\xe9cret"]
)
def test_without_the_token_nothing_but_health_is_answered(serving, header, reads):
    server = serving(token="secret")
    headers = {} if header is None else {"Authorization": header}
    stranger = Client(server.client.port)
    for method, route in (("POST", "/v1/score"), ("POST", "/v1/score/upload"), ("GET", "/metrics")):
        reply = stranger.request(method, route, b"{}" if method == "POST" else None, headers)
        assert reply.status == 401
        assert reply.headers["www-authenticate"] == "Bearer"
    assert stranger.request("GET", "/health", None, headers).status == 200
    assert not reads
    assert server.client.score_paths(CLIPS[:1], PROMPTS[:1]).status == 200


@pytest.fixture
def maze(tmp_path) -> Path:
    """A root with links of all kinds, beside a file that is not to be read; returns the root."""
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    (tmp_path / "rootless").mkdir()
    for place in ("secret.mp4", "rootless/secret.mp4", "root/a.mp4", "root/inner/b.mp4"):
        (tmp_path / place).write_bytes(CLIPS[0].read_bytes())
    links = {
        "out.mp4": tmp_path / "secret.mp4",
        "out": tmp_path,
        "hop.mp4": "out.mp4",
        "loop": "loop",
        "ping": "pong",
        "pong": "ping",
        "missing.mp4": "nothing",
        "fine.mp4": "inner/b.mp4",
        "back": root,
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    os.mkfifo(root / "pipe")
    return root


OUTSIDE = [
    "../secret.mp4",
    "{root}/../secret.mp4",
    "{root}/inner/../../secret.mp4",
    "{root}less/secret.mp4",
    "{tmp}/secret.mp4",
    "{tmp}/nothing.mp4",
    "out.mp4",
    "hop.mp4",
    "out/secret.mp4",
    "back/back/out.mp4",
    "loop",
    "loop/../out.mp4",
    "ping/x.mp4",
    "missing.mp4",
    "nothing.mp4",
    "pipe",
    "inner",
    "",
    "/",
    "/etc/passwd",
    "/proc/self/environ",
    "/proc/self/root{tmp}/secret.mp4",
    "/dev/zero",
    "a.mp4\0",
    "\0",
    "{tmp}/secret.mp4\0/../root/a.mp4",
    "~/a.mp4",
    "file://{root}/a.mp4",
    "http://127.0.0.1/a.mp4",
    "x" * 5000,
]


def test_paths_out_of_the_roots_are_refused_and_never_opened(serving, maze, reads):
    client = serving(roots=[maze]).client
    paths = [path.format(root=maze, tmp=maze.parent) for path in OUTSIDE]
    results = client.score_paths(paths, ["a"] * len(paths)).results
    assert results == [{"error": f"no file below the server's --roots: {path}"} for path in paths]
    assert not reads


def test_links_within_the_roots_are_followed(serving, maze, reads):
    client = serving(roots=[maze, maze.parent / "rootless"]).client
    paths = ["a.mp4", "fine.mp4", "back/back/inner/b.mp4", f"{maze}/inner/../a.mp4", "secret.mp4"]
    results = client.score_paths(paths, ["a"] * len(paths)).results
    assert all("reward" in result for result in results)
    names = ["a.mp4", "inner/b.mp4", "inner/b.mp4", "a.mp4"]
    assert reads == [*(str(maze / name) for name in names), str(maze.parent / "rootless" / "secret.mp4")]


def test_without_roots_paths_are_refused(serving, reads):
    reply = serving(roots=[]).client.score_paths(CLIPS[:1], PROMPTS[:1])
    assert reply.status == 403
    assert "--roots" in reply.json["error"]
    assert not reads


def test_a_broken_video_fails_alone(serving, offline, tmp_path, maze):
    (maze / "broken.mp4").write_bytes(CLIPS[0].read_bytes()[:400])
    (maze / "empty.mp4").touch()
    server = serving(roots=[maze, CLIPS[0].parent])
    for reply in (
        server.client.score_paths([CLIPS[0], "broken.mp4", "empty.mp4", CLIPS[1]], [PROMPTS[0], "a", "b", PROMPTS[1]]),
        server.client.upload(
            [CLIPS[0].read_bytes(), CLIPS[0].read_bytes()[:400], b"", CLIPS[1].read_bytes()],
            [PROMPTS[0], "a", "b", PROMPTS[1]],
        ),
    ):
        assert_scored([reply.results[0], reply.results[3]], offline[:2])
        assert "does not decode" in reply.results[1]["error"]
        assert "empty" in reply.results[2]["error"]
        assert str(tmp_path) not in reply.body.decode()
    reply = server.client.score_paths(CLIPS[:2], ["says <Reward>", PROMPTS[1]])
    assert "reserved token" in reply.results[0]["error"]
    assert_scored(reply.results[1:], offline[1:2])
    assert server.client.metric('descore_videos_total{outcome="failed"}') == 5


@pytest.mark.parametrize(
    ("route", "body", "status", "message"),
    [
        ("", b"", 422, "JSON"),
        ("", b"[]", 422, "no request to score"),
        ("", PATH, 422, "EOF"),
        ("", PATH + b', "more": 1}', 422, "more"),
        ("", b'{"videos": ["a"], "prompts": ["b"]}', 422, "videos.0"),
        ("", b'{"videos": [], "prompts": []}', 422, "give one for each"),
        ("", b'{"videos": [{"path": "a"}], "prompts": []}', 422, "give one for each"),
        ("", b'{"videos": [{"path": "\\ud800"}], "prompts": ["b"]}', 422, "hex escape"),
        ("", b'{"videos": [{"path": "a"}], "prompts": ["' + b"b" * 101 + b'"]}', 422, "a prompt of 101 characters"),
        ("/upload", b"", 400, "it ends early"),
        ("/upload", form_body([b"a"], ["b"])[:-8], 400, "it ends early"),
        ("/upload", b"no form", 400, "malformed"),
        ("/upload", form_body([b"a"], []), 422, "give one for each"),
        ("/upload", form_body([b"a"] * 5, ["b"] * 5), 422, "at most 4 videos"),
        ("/upload", form_body([b"a"], ["b" * 401]), 422, "over 100 characters"),
        ("/upload", HEAD + b'"path"\r\n\r\n/etc/passwd\r\n--sheet--\r\n', 422, "unknown part"),
        ("/upload", HEAD + b'"prompts"\r\n\r\n\xff\r\n--sheet--\r\n', 400, "no UTF-8"),
        ("/upload", b"--sheet\r\nX: " + b"y" * 100_000, 400, "malformed"),
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused_with_a_reason(serving, route, body, status, message):
    server = serving(limits=ServerLimits(max_videos=4, max_prompt_chars=100))
    reply = server.client.request("POST", f"/v1/score{route}", body, FORM_HEADERS if route else {})
    assert (reply.status, message in reply.json["error"]) == (status, True), reply.body


@pytest.mark.parametrize(
    ("method", "route", "status", "allowed"),
    [
        ("GET", "/", 404, None),
        ("GET", "/docs", 404, None),
        ("POST", "/v1/scores", 404, None),
        ("GET", "/v1/score", 405, "POST"),
        ("DELETE", "/v1/score/upload", 405, "POST"),
        ("POST", "/health", 405, "GET"),
    ],
)
def test_other_routes_and_methods_are_refused_in_the_same_form(serving, method, route, status, allowed):
    server = serving()
    reply = server.client.request(method, route, b"{}" if method == "POST" else None)
    assert (reply.status, set(reply.json)) == (status, {"error"})
    assert reply.json["error"].startswith(f"{method} {route}: ")
    assert reply.headers.get("allow") == allowed
    assert server.client.metric('descore_refused_total{reason="invalid"}') == 1


def test_parameters_that_a_route_may_have_one_day_are_refused_in_the_same_form(serving):
    handler = create_app(serving().service).exception_handlers[RequestValidationError]
    reply = handler(None, RequestValidationError([{"loc": ("query", "seed"), "msg": "no integer", "type": "int"}]))
    assert reply.status_code == 422
    assert json.loads(reply.body) == {"error": "the request has wrong parameters: no integer"}


def test_a_video_that_is_too_large_to_decode_fails_alone_and_unread(serving, model, offline, reads, monkeypatch):
    monkeypatch.setattr(model.loader, "max_gigapixels", 16 * 104 * 112 / 1e9)
    server = serving()
    reply = server.client.upload([CLIPS[0].read_bytes(), announce_frames(2_000_000_000)], PROMPTS[:2])
    assert_scored(reply.results[:1], offline[:1])
    assert "videos[1] clip.mp4: 2000000000 frames or more of 112 x 104 pixels" in reply.results[1]["error"]
    assert len(reads) == 1


def test_an_upload_of_another_type_is_refused(serving):
    client = serving().client
    for kind in ("text/plain", "multipart/form-data", "multipart/form-data; boundary=" + "x" * 300, ""):
        reply = client.request("POST", "/v1/score/upload", b"a", {"Content-Type": kind})
        assert reply.status in (400, 415)
