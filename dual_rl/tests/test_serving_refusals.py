"""What the reward server must not do: read outside its roots, serve strangers, or take more than it can hold."""

import itertools
import os
from pathlib import Path

import pytest

from serving.bodies import MAX_JSON_MB
from serving.limits import ServerLimits
from serving_support import CLIPS, FORM_HEADERS, PROMPTS, Client, assert_scored, form_body

pytest_plugins = ["serving_fixtures"]
PATH = b'{"videos": [{"path": "a"}], "prompts": ["b"]'
HEAD = b"--sheet\r\nContent-Disposition: form-data; name="


@pytest.mark.parametrize("route", ["/v1/score", "/v1/score/upload"])
@pytest.mark.parametrize("has_length", [True, False], ids=["announced", "chunked"])
def test_a_body_over_the_limit_is_refused_while_it_arrives(serving, route, has_length):
    server = serving(limits=ServerLimits(max_body_mb=0.5))
    start, num_pieces = HEAD + b'"videos"; filename="a"\r\n\r\n', 320
    pieces = itertools.chain([start], itertools.repeat(b"x" * (1 << 16), num_pieces))
    length = {"Content-Length": str(len(start) + (num_pieces << 16))} if has_length else {}
    reply = server.client.request("POST", route, pieces, {**FORM_HEADERS, **length})
    assert reply.status == 413
    assert "over 524288 bytes" in reply.json["error"]
    assert server.client.metric('descore_refused_total{reason="body_too_large"}') == 1


def test_a_json_body_has_a_limit_of_its_own(serving):
    assert serving().client.request("POST", "/v1/score", b" " * ((MAX_JSON_MB << 20) + 1)).status == 413


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer secre", "Basic secret", "Bearer s\xe9cret"])
def test_without_the_token_nothing_but_health_is_answered(serving, header, scored_paths):
    server = serving(token="secret")
    headers = {} if header is None else {"Authorization": header}
    stranger = Client(server.client.port)
    for method, route in (("POST", "/v1/score"), ("POST", "/v1/score/upload"), ("GET", "/metrics")):
        reply = stranger.request(method, route, b"{}" if method == "POST" else None, headers)
        assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert stranger.request("GET", "/health", None, headers).status == 200
    assert not scored_paths
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
        "missing.mp4": "nothing",
        "fine.mp4": "inner/b.mp4",
        "back": root,
    }
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


def test_paths_out_of_the_roots_are_refused_and_never_opened(serving, maze, scored_paths):
    client = serving(roots=[maze]).client
    paths = [path.format(root=maze, tmp=maze.parent) for path in OUTSIDE]
    results = client.score_paths(paths, ["a"] * len(paths)).results
    assert results == [{"error": f"no file below the server's --roots: {path}"} for path in paths]
    assert not scored_paths


def test_links_within_the_roots_are_followed(serving, maze, scored_paths):
    client = serving(roots=[maze, maze.parent / "rootless"]).client
    paths = ["a.mp4", "fine.mp4", "back/back/inner/b.mp4", f"{maze}/inner/../a.mp4", "secret.mp4"]
    results = client.score_paths(paths, ["a"] * len(paths)).results
    assert all("reward" in result for result in results)
    names = ["root/a.mp4", "root/inner/b.mp4", "root/inner/b.mp4", "root/a.mp4", "rootless/secret.mp4"]
    assert scored_paths == [str(maze.parent / name) for name in names]


def test_without_roots_paths_are_refused(serving, scored_paths):
    reply = serving(roots=[]).client.score_paths(CLIPS[:1], PROMPTS[:1])
    assert (reply.status, "--roots" in reply.json["error"]) == (403, True)
    assert not scored_paths


def test_a_broken_video_fails_alone(serving, offline, tmp_path):
    broken = {"broken.mp4": CLIPS[0].read_bytes()[:400], "empty.mp4": b""}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    server = serving(roots=[tmp_path, CLIPS[0].parent])
    prompts = [PROMPTS[0], "a", "b", PROMPTS[1]]
    for reply in (
        server.client.score_paths([CLIPS[0], *broken, CLIPS[1]], prompts),
        server.client.upload([CLIPS[0].read_bytes(), *broken.values(), CLIPS[1].read_bytes()], prompts),
    ):
        assert_scored([reply.results[0], reply.results[3]], offline[:2])
        assert "does not decode" in reply.results[1]["error"]
        assert "empty" in reply.results[2]["error"]
        assert str(tmp_path) not in reply.body.decode()
    reply = server.client.score_paths(CLIPS[:2], ["says <Reward>", PROMPTS[1]])
    assert "reserved token" in reply.results[0]["error"]
    assert_scored(reply.results[1:], offline[1:2])


@pytest.mark.parametrize(
    ("route", "body", "status", "message"),
    [
        ("", b"", 422, "JSON"),
        ("", b"[]", 422, "not a request to score"),
        ("", PATH, 422, "EOF"),
        ("", PATH + b', "more": 1}', 422, "more"),
        ("", b'{"videos": ["a"], "prompts": ["b"]}', 422, "videos.0"),
        ("", b'{"videos": [], "prompts": []}', 422, "give one prompt for each"),
        ("", b'{"videos": [{"path": "\\ud800"}], "prompts": ["b"]}', 422, "hex escape"),
        ("", b'{"videos": [{"path": "a"}], "prompts": ["' + b"b" * 101 + b'"]}', 422, "a prompt has 101 characters"),
        ("/upload", b"", 422, "0 video(s)"),
        ("/upload", form_body([b"a"], ["b"])[:-8], 422, "1 video(s) and 0 prompt(s)"),
        ("/upload", b"no form", 400, "Invalid multipart"),
        ("/upload", form_body([b"a"], []), 422, "give one prompt for each"),
        ("/upload", form_body([b"a"] * 5, ["b"] * 5), 400, "Maximum number of files is 4"),
        ("/upload", form_body([b"a"], ["b" * 401]), 400, "exceeded maximum size"),
        ("/upload", form_body([b"a"], ["b" * 101]), 422, "a prompt has 101 characters"),
        ("/upload", HEAD + b'"path"\r\n\r\n/etc/passwd\r\n--sheet--\r\n', 422, "other parts"),
        ("/upload", HEAD + b'"videos"\r\n\r\n/etc/passwd\r\n--sheet--\r\n', 422, "`videos` as files"),
        ("/upload", b"--sheet\r\nX: " + b"y" * 100_000, 400, "Invalid multipart"),
    ],
)  # fmt: skip
def test_an_invalid_request_is_refused_with_a_reason(serving, route, body, status, message):
    server = serving(limits=ServerLimits(max_videos=4, max_prompt_chars=100))
    reply = server.client.request("POST", f"/v1/score{route}", body, FORM_HEADERS if route else {})
    assert (reply.status, message in reply.json["error"]) == (status, True), reply.body


def test_an_upload_of_another_type_is_refused(serving):
    client = serving().client
    for kind in ("text/plain", "multipart/form-data", "multipart/form-data; boundary=" + "x" * 300, ""):
        reply = client.request("POST", "/v1/score/upload", b"a", {"Content-Type": kind})
        assert reply.status in (400, 415)


@pytest.mark.parametrize(
    ("method", "route", "status", "allowed"),
    [("GET", "/docs", 404, None), ("GET", "/v1/score", 405, "POST"), ("POST", "/health", 405, "GET")],
)
def test_other_routes_and_methods_are_refused_in_the_same_form(serving, method, route, status, allowed):
    reply = serving().client.request(method, route, b"{}" if method == "POST" else None)
    assert (reply.status, set(reply.json), reply.headers.get("allow")) == (status, {"error"}, allowed)
