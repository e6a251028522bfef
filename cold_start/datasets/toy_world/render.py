"""Renders scenes as frames and encodes them as H.264 clips; the same arguments give the same bytes.

World coordinates have their origin in the middle of the frame (at the middle of a pan), x to the right, y down; the
unit is the smaller side of the frame. A pan or zoom moves the whole world, the subject included; the subject's own
motion is relative to the world. Both run evenly over the clip's duration. The start place is fitted so that the whole
subject stays in view.
"""

import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from .renderings import RENDERINGS, RenderingName
from .scene import Scene
from .shapes import outside_distance
from .textures import World, paint_world

SUBJECT_RGB = {
    "red": (230, 30, 35),
    "green": (25, 205, 60),
    "blue": (30, 60, 245),
    "yellow": (255, 230, 20),
    "purple": (165, 35, 215),
    "white": (250, 250, 250),
}
TRAVEL_RANGE = (0.26, 0.35)  # how far a moving subject gets, in units of the smaller side
PAN_RANGE = (0.16, 0.22)  # less than TRAVEL_RANGE: a pan never hides the subject's own motion
GROWTH_RANGE = (1.7, 2.1)  # last diameter over first
ZOOM_RANGE = (1.35, 1.5)
ZOOM_OVERSAMPLING = 1.4  # painted pixels per screen pixel before a zoom
UNREADABLE_WIDTH = 48  # decord2 takes rows of 48, 96 or 144 pixels for rows of four channels and fails
DURATION_RANGE = (2.0, 4.0)
CRF_RANGE = (18, 34)
PIXEL_BLOCKS = 24  # blocks along the smaller side in the pixelated style
BLUR_RADIUS = 0.05
BAND_WIDTH = 0.022
GLOW_REACH = 0.16
_DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_PANS = {"pans left": -1, "pans right": 1}


@dataclass(frozen=True)
class Nuisance:
    """What may differ between two clips of the same scene.

    `size` is the subject's diameter in units of the smaller side; `speed` in [0, 1] picks how far things move within
    their ranges; `start` in [0, 1]^2 picks the start place (x, y) among those that keep the subject in view; `width`
    and `height` are even, in pixels; `fps` in frames a second; `duration` in seconds, a multiple of 1 / fps;
    `rendering` picks the textures.
    Example: Nuisance(0.3, 0.5, (0.2, 0.8), 7, False, 96, 112, 10, 2.5, 28)
    """

    size: float
    speed: float
    start: tuple[float, float]
    texture_seed: int
    has_distractor: bool
    width: int
    height: int
    fps: int
    duration: float
    crf: int
    rendering: RenderingName = "usual"

    @property
    def num_frames(self) -> int:
        return round(self.duration * self.fps)


def sample_nuisance(rng: np.random.Generator, rendering: RenderingName = "usual") -> Nuisance:
    """Draws everything that the prompt says nothing about."""
    look = RENDERINGS[rendering]
    while True:
        width, height = (2 * int(rng.integers(look.sides[0] // 2, look.sides[1] // 2 + 1)) for _ in range(2))
        if width % UNREADABLE_WIDTH and look.allows(width, height):
            break
    fps = int(rng.choice(look.frame_rates, p=look.frame_rate_probabilities))
    return Nuisance(
        size=float(rng.uniform(*look.diameters)),
        speed=float(rng.random()),
        start=(float(rng.random()), float(rng.random())),
        texture_seed=int(rng.integers(2**31)),
        has_distractor=bool(rng.random() < look.distractor_probability),
        width=width,
        height=height,
        fps=fps,
        duration=round(float(rng.uniform(*DURATION_RANGE)) * fps) / fps,
        crf=int(rng.integers(CRF_RANGE[0], CRF_RANGE[1] + 1)),
        rendering=rendering,
    )


def _within(bounds: tuple[float, float], fraction: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * fraction


@dataclass(frozen=True)
class Track:
    """Where things are at T moments: the camera (world x, zoom) and the subject (screen place, radius), float [T]."""

    camera_x: np.ndarray
    zoom: np.ndarray
    center_x: np.ndarray
    center_y: np.ndarray
    radius: np.ndarray


def compute_track(scene: Scene, nuisance: Nuisance, times: np.ndarray) -> Track:
    """Camera and subject at `times` (seconds, [T]); screen places in units of the smaller side from the middle."""
    # The two ends of the clip come first: all tracks are monotone, so a subject in view at both is always in view.
    progress = np.concatenate(([0.0, 1.0], np.asarray(times, dtype=float) / nuisance.duration))
    camera_x = _PANS.get(scene.camera, 0) * _within(PAN_RANGE, nuisance.speed) * (progress - 0.5)
    zoom = _within(ZOOM_RANGE, nuisance.speed) ** progress if scene.camera == "zooms in" else np.ones_like(progress)
    growth = {"grows": 1, "shrinks": -1}.get(scene.motion, 0)
    radius = nuisance.size / 2 * _within(GROWTH_RANGE, nuisance.speed) ** (growth * (progress - 0.5)) * zoom
    step_x, step_y = _DIRECTIONS.get(scene.motion, (0, 0))
    travel = _within(TRAVEL_RANGE, nuisance.speed) * progress
    shorter = min(nuisance.width, nuisance.height)
    centers = []
    for half, offset, fraction in (
        (nuisance.width / shorter / 2, step_x * travel - camera_x, nuisance.start[0]),
        (nuisance.height / shorter / 2, step_y * travel, nuisance.start[1]),
    ):
        room = (half - radius[:2]) / zoom[:2]
        low, high = float(np.max(-room - offset[:2])), float(np.min(room - offset[:2]))
        start = _within((low, high), fraction) if low < high else (low + high) / 2
        centers.append((start + offset) * zoom)
    return Track(camera_x[2:], zoom[2:], centers[0][2:], centers[1][2:], radius[2:])


def render_frames(scene: Scene, nuisance: Nuisance, times: np.ndarray) -> np.ndarray:
    """Frames at `times` (seconds from the clip's start, any number T of them) as uint8 RGB [T, height, width, 3]."""
    track = compute_track(scene, nuisance, times)
    shorter = min(nuisance.width, nuisance.height)
    block = max(2, round(shorter / PIXEL_BLOCKS)) if scene.style == "pixelated" else 1
    columns, rows = -(-nuisance.width // block), -(-nuisance.height // block)
    # Screen coordinates of the centres of the pixels (or blocks of pixels) that are drawn.
    screen_x = ((np.arange(columns) + 0.5) * block - nuisance.width / 2) / shorter
    screen_y = ((np.arange(rows) + 0.5) * block - nuisance.height / 2) / shorter
    world = _paint_background(scene, nuisance)
    subject = _Subject(scene.shape, scene.style, _subject_color(scene, nuisance), block / shorter)
    frames = np.empty((len(track.zoom), rows, columns, 3), dtype=np.uint8)
    for index, frame in enumerate(frames):
        if index == 0 or scene.camera != "still":
            zoom = track.zoom[index]
            background = world.look_up(screen_x / zoom + track.camera_x[index], screen_y / zoom)
        frame[:] = background
        x, y = screen_x - track.center_x[index], screen_y - track.center_y[index]
        _draw_subject(frame, subject, x=x, y=y, radius=track.radius[index])
    if block > 1:
        frames = frames.repeat(block, axis=1).repeat(block, axis=2)[:, : nuisance.height, : nuisance.width]
    return frames


def _paint_background(scene: Scene, nuisance: Nuisance) -> World:
    shorter = min(nuisance.width, nuisance.height)
    margin = PAN_RANGE[1] / 2 if scene.camera in _PANS else 0.0
    return paint_world(
        scene,
        half_size=(nuisance.width / shorter / 2 + margin, nuisance.height / shorter / 2),
        pixels_per_unit=shorter * (ZOOM_OVERSAMPLING if scene.camera == "zooms in" else 1.0),
        seed=nuisance.texture_seed,
        distractor_rgb=_distractor_color(scene, nuisance),
        blur_radius=BLUR_RADIUS if scene.style == "blurred" else 0.0,
        rendering=nuisance.rendering,
    )


def _subject_color(scene: Scene, nuisance: Nuisance) -> np.ndarray:
    jitter = np.random.default_rng([nuisance.texture_seed, 1]).uniform(-14, 14, size=3)
    dimming = 0.92 if scene.light == "night" else 1.0
    return (np.clip(np.asarray(SUBJECT_RGB[scene.color]) + jitter, 0, 255) * dimming).astype(np.float32)


def _distractor_color(scene: Scene, nuisance: Nuisance) -> tuple[int, int, int] | None:
    others = [rgb for name, rgb in SUBJECT_RGB.items() if name != scene.color]
    return others[nuisance.texture_seed % len(others)] if nuisance.has_distractor else None


@dataclass(frozen=True)
class _Subject:
    """How the subject is drawn: `rgb` float32 [3]; `pixel` is a pixel's (or block's) side in world units."""

    shape: str
    style: str
    rgb: np.ndarray
    pixel: float


def _draw_subject(frame: np.ndarray, subject: _Subject, *, x: np.ndarray, y: np.ndarray, radius: float) -> None:
    """Blends the subject into `frame` (uint8 [h, w, 3], in place); `x` [w] and `y` [h] count from its center."""
    margin = {"glowing": 2.0 * GLOW_REACH, "blurred": BLUR_RADIUS}.get(subject.style, BAND_WIDTH)
    reach = 1.3 * radius + margin
    columns = slice(*np.searchsorted(x, (-reach, reach)))
    rows = slice(*np.searchsorted(y, (-reach, reach)))
    unit_x, unit_y = (x[columns] / radius).astype(np.float32), (y[rows] / radius).astype(np.float32)
    distance = outside_distance(subject.shape, unit_x, unit_y) * np.float32(radius)
    patch = frame[rows, columns].astype(np.float32)
    softness = subject.pixel
    if subject.style == "outlined":
        _blend(patch, distance - BAND_WIDTH, softness, np.full(3, 255, dtype=np.float32))
        _blend(patch, distance, softness, np.zeros(3, dtype=np.float32))
        distance = distance + 1.5 * BAND_WIDTH
    elif subject.style == "glowing":
        halo = 0.85 * np.exp(np.maximum(distance, 0) * np.float32(-2.0 / GLOW_REACH))
        patch += halo[..., None] * (subject.rgb - patch)
    elif subject.style == "blurred":
        softness = 2 * BLUR_RADIUS
    _blend(patch, distance, softness, subject.rgb)
    frame[rows, columns] = patch


def _blend(patch: np.ndarray, distance: np.ndarray, softness: float, color: np.ndarray) -> None:
    """Covers the inside (negative distance) of a shape with `color`, with an edge `softness` wide."""
    coverage = np.clip(0.5 - distance / np.float32(softness), 0, 1)
    patch += coverage[..., None] * (color - patch)


def encode_clip(path: str | Path, scene: Scene, nuisance: Nuisance) -> None:
    """Writes the clip as H.264 mp4 (yuv420p, one thread, no B-frames); an unfinished file never has the final name.

    The same clip is the same bytes. Therefore without x264's macroblock tree, whose AVX-512 code now and then gives
    another result for the same frames.
    """
    import av  # only encoding needs it

    frames = render_frames(scene, nuisance, np.arange(nuisance.num_frames) / nuisance.fps)
    temporary = f"{path}.{os.getpid()}.tmp"
    with av.open(temporary, "w", format="mp4") as container:
        options = {"crf": str(nuisance.crf), "preset": "veryfast", "bf": "0", "threads": "1", "mbtree": "0"}
        stream = container.add_stream("libx264", rate=Fraction(nuisance.fps), options=options)
        stream.width, stream.height, stream.pix_fmt = nuisance.width, nuisance.height, "yuv420p"
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    os.replace(temporary, path)
