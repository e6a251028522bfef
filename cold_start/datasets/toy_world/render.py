"""Renders scenes as frames and encodes them as H.264 clips; the same arguments give the same bytes.

World coordinates have their origin in the center of the frame (halfway through a pan), x to the right, y down. Their
unit is the smaller side of the frame. A pan or zoom moves the whole world, the subject included; the subject's own
motion is relative to the world. The start position keeps the whole subject in view.

The rendering "changed" is never used in training: frames of other sizes and rates, smaller subjects, more distractors,
textures rotated by 90 degrees, other shades.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .looks import NIGHT_TINT, PLACE_RGB, SUBJECT_RGB, box_blur, outside_distance, texture, waves
from .scene import Scene

TRAVEL_RANGE = (0.26, 0.35)  # travel of a moving subject, in units of the smaller side
PAN_RANGE = (0.16, 0.22)  # less than TRAVEL_RANGE: a pan never hides the subject's own motion
GROWTH_RANGE = (1.7, 2.1)  # last diameter / first
ZOOM_RANGE = (1.35, 1.5)
ZOOM_OVERSAMPLING = 1.4  # painted pixels per screen pixel before a zoom
UNREADABLE_WIDTH = 48  # decord2 fails at multiples: it mistakes their rows for rows of four channels
DURATION_RANGE = (2.0, 4.0)
CRF_RANGE = (18, 34)
PIXEL_BLOCKS = 24  # blocks along the smaller side in the pixelated style
BLUR_RADIUS = 0.05
BAND_WIDTH = 0.022
GLOW_REACH = 0.16
LANDMARK_STRENGTH = 0.25
DISTRACTOR_DIAMETER = 0.09
_DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_PANS = {"pans left": -1, "pans right": 1}


@dataclass(frozen=True)
class Rendering:
    """Ranges for the nuisances of a clip.

    `sides`: width and height in pixels. `aspects`: ranges of width / height. `frame_rates` in frames per second, with
    their probabilities. `diameters`: of the subject midway through the clip, in units of the smaller side.
    """

    sides: tuple[int, int]
    aspects: tuple[tuple[float, float], ...]
    frame_rates: dict[int, float]
    diameters: tuple[float, float]
    distractor_probability: float


RENDERINGS = {
    "usual": Rendering((80, 144), ((0.8, 1.25),), {8: 0.3, 10: 0.3, 12: 0.2, 15: 0.15, 24: 0.05}, (0.28, 0.40), 0.3),
    "changed": Rendering(
        (96, 176), ((0.6, 0.78), (1.28, 1.65)), {18: 0.25, 20: 0.25, 25: 0.25, 30: 0.25}, (0.26, 0.32), 0.7
    ),
}


@dataclass(frozen=True)
class Nuisance:
    """What may differ between two clips of the same scene.

    `size` is the subject's diameter in units of the smaller side; `speed` in [0, 1] picks how far things move within
    their ranges; `start` in [0, 1]^2 picks the start position (x, y) among those that keep the subject in view;
    `width` and `height` are even, in pixels; `fps` in frames per second; `duration` in seconds, a multiple of 1 / fps.
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
    rendering: str = "usual"

    @property
    def num_frames(self) -> int:
        return round(self.duration * self.fps)

    @property
    def half_size(self) -> np.ndarray:
        """Half the width and height of the frame in units of its smaller side: float [2]."""
        return np.array([self.width, self.height]) / min(self.width, self.height) / 2


def sample_nuisance(rng: np.random.Generator, rendering: str = "usual") -> Nuisance:
    """Draw everything that a prompt does not mention."""
    ranges = RENDERINGS[rendering]
    while True:
        width, height = (2 * int(rng.integers(ranges.sides[0] // 2, ranges.sides[1] // 2 + 1)) for _ in range(2))
        if width % UNREADABLE_WIDTH and any(low <= width / height <= high for low, high in ranges.aspects):
            break
    fps = int(rng.choice(list(ranges.frame_rates), p=list(ranges.frame_rates.values())))
    return Nuisance(
        size=float(rng.uniform(*ranges.diameters)),
        speed=float(rng.random()),
        start=(float(rng.random()), float(rng.random())),
        texture_seed=int(rng.integers(2**31)),
        has_distractor=bool(rng.random() < ranges.distractor_probability),
        width=width,
        height=height,
        fps=fps,
        duration=round(float(rng.uniform(*DURATION_RANGE)) * fps) / fps,
        crf=int(rng.integers(CRF_RANGE[0], CRF_RANGE[1] + 1)),
        rendering=rendering,
    )


def _within(bounds: tuple[float, float], fraction: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * fraction


class Track(NamedTuple):
    """Camera (world x, zoom) and subject (position on screen, radius) at T times, each float [T]."""

    camera_x: np.ndarray
    zoom: np.ndarray
    center_x: np.ndarray
    center_y: np.ndarray
    radius: np.ndarray


def compute_track(scene: Scene, nuisance: Nuisance, times: np.ndarray) -> Track:
    """Camera and subject at `times` (seconds, [T]); screen positions from the center, in units of the smaller side."""
    # The ends of the clip come first. All tracks are monotone: a subject in view at both ends is always in view.
    progress = np.concatenate(([0.0, 1.0], np.asarray(times, dtype=float) / nuisance.duration))
    camera_x = _PANS.get(scene.camera, 0) * _within(PAN_RANGE, nuisance.speed) * (progress - 0.5)
    zoom = _within(ZOOM_RANGE, nuisance.speed) ** progress if scene.camera == "zooms in" else np.ones_like(progress)
    growth = {"grows": 1, "shrinks": -1}.get(scene.motion, 0)
    radius = nuisance.size / 2 * _within(GROWTH_RANGE, nuisance.speed) ** (growth * (progress - 0.5)) * zoom
    step_x, step_y = _DIRECTIONS.get(scene.motion, (0, 0))
    travel = _within(TRAVEL_RANGE, nuisance.speed) * progress
    offsets, centers = (step_x * travel - camera_x, step_y * travel), []
    for half, offset, fraction in zip(nuisance.half_size, offsets, nuisance.start, strict=True):
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
    # Screen coordinates of the centers of the pixels, or of the blocks of pixels, to draw.
    screen_x, screen_y = (
        ((np.arange(-(-side // block)) + 0.5) * block - side / 2) / shorter
        for side in (nuisance.width, nuisance.height)
    )
    background_at = _paint_world(scene, nuisance)
    jitter = np.random.default_rng([nuisance.texture_seed, 1]).uniform(-14, 14, size=3)
    dimming = 0.92 if scene.light == "night" else 1.0
    rgb = (np.clip(np.asarray(SUBJECT_RGB[scene.color]) + jitter, 0, 255) * dimming).astype(np.float32)
    frames = np.empty((len(track.zoom), len(screen_y), len(screen_x), 3), dtype=np.uint8)
    for index, frame in enumerate(frames):
        zoom, radius = track.zoom[index], track.radius[index]
        if index == 0 or scene.camera != "still":
            background = background_at(screen_x / zoom + track.camera_x[index], screen_y / zoom)
        frame[:] = background
        x, y = screen_x - track.center_x[index], screen_y - track.center_y[index]
        reach = 1.3 * radius + {"glowing": 2.0 * GLOW_REACH, "blurred": BLUR_RADIUS}.get(scene.style, BAND_WIDTH)
        columns, rows = (slice(*np.searchsorted(values, (-reach, reach))) for values in (x, y))
        unit_x, unit_y = ((values / radius).astype(np.float32) for values in (x[None, columns], y[rows, None]))
        distance = outside_distance(scene.shape, unit_x, unit_y) * np.float32(radius)
        frame[rows, columns] = _draw_subject(
            frame[rows, columns].astype(np.float32), distance, style=scene.style, rgb=rgb, pixel=block / shorter
        )
    return frames.repeat(block, axis=1).repeat(block, axis=2)[:, : nuisance.height, : nuisance.width]


def _paint_world(scene: Scene, nuisance: Nuisance) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Paints the background; returns a function of world coordinates `x` [w] and `y` [h]: uint8 [h, w, 3]."""
    rng = np.random.default_rng([nuisance.texture_seed, 0])
    phases = rng.uniform(0, 2 * np.pi, size=6).astype(np.float32)
    cells = rng.random((16, 16), dtype=np.float32)
    jitter = rng.uniform(-8, 8, size=3)
    spot_x, spot_y = rng.uniform(-0.42, 0.42, size=2)
    per_unit = min(nuisance.width, nuisance.height) * (ZOOM_OVERSAMPLING if scene.camera == "zooms in" else 1.0)
    half_x, half_y = nuisance.half_size
    half_x += PAN_RANGE[1] / 2 if scene.camera in _PANS else 0.0
    left, top = (float(0.5 / per_unit - half) for half in (half_x, half_y))
    columns, rows = (int(2 * half * per_unit) for half in (half_x, half_y))
    x = (left + np.arange(columns) / per_unit).astype(np.float32)[None, :]
    y = (top + np.arange(rows) / per_unit).astype(np.float32)[:, None]
    is_turned = nuisance.rendering == "changed"
    field = texture(scene.place, y.T, x.T, phases, cells).T if is_turned else texture(scene.place, x, y, phases, cells)
    field = field + LANDMARK_STRENGTH * (waves(x, 1.1, phases[4]) + waves(y, 0.9, phases[5]))
    if scene.style == "blurred":
        radius = round(BLUR_RADIUS * per_unit)
        field = box_blur(box_blur(field, radius), radius)
    tint = NIGHT_TINT if scene.light == "night" else np.ones(3, dtype=np.float32)
    base, contrast = PLACE_RGB[nuisance.rendering][scene.place]
    pixels = ((np.asarray(base) + jitter) * tint).astype(np.float32)
    pixels = pixels + field[..., None] * (np.asarray(contrast, dtype=np.float32) * np.sqrt(tint))
    if nuisance.has_distractor:  # a small disc
        others = [rgb for name, rgb in SUBJECT_RGB.items() if name != scene.color]
        inside = (x - spot_x) ** 2 + (y - spot_y) ** 2 < (DISTRACTOR_DIAMETER / 2) ** 2
        rgb = np.asarray(others[nuisance.texture_seed % len(others)], dtype=np.float32)
        pixels[inside] = rgb * np.sqrt(tint)
    painted = np.clip(pixels, 0, 255).astype(np.uint8)

    def look_up(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        nearest_x = np.rint((x - left) * per_unit).astype(np.intp).clip(0, columns - 1)
        nearest_y = np.rint((y - top) * per_unit).astype(np.intp).clip(0, rows - 1)
        return painted[nearest_y].take(nearest_x, axis=1)

    return look_up


def _draw_subject(patch: np.ndarray, distance: np.ndarray, *, style: str, rgb: np.ndarray, pixel: float) -> np.ndarray:
    """`patch` (float32 [h, w, 3]) with the subject on it; `distance` [h, w] and `pixel` (its side) in world units."""
    softness = 2 * BLUR_RADIUS if style == "blurred" else pixel
    if style == "outlined":
        _blend(patch, distance - BAND_WIDTH, softness, np.full(3, 255, dtype=np.float32))
        _blend(patch, distance, softness, np.zeros(3, dtype=np.float32))
        distance = distance + 1.5 * BAND_WIDTH
    elif style == "glowing":
        halo = 0.85 * np.exp(np.maximum(distance, 0) * np.float32(-2.0 / GLOW_REACH))
        patch += halo[..., None] * (rgb - patch)
    _blend(patch, distance, softness, rgb)
    return patch


def _blend(patch: np.ndarray, distance: np.ndarray, softness: float, color: np.ndarray) -> None:
    """Paint the inside (negative distance) of a shape with `color`; its edge is `softness` wide."""
    coverage = np.clip(0.5 - distance / np.float32(softness), 0, 1)
    patch += coverage[..., None] * (color - patch)


def encode_clip(path: str | Path, scene: Scene, nuisance: Nuisance) -> None:
    """Write the clip as H.264 mp4 (yuv420p, no B-frames) under a temporary name, then rename it.

    The same arguments give the same bytes: one thread, and no macroblock tree, whose AVX-512 code sometimes gives
    another result for the same frames.
    """
    import av  # needed for encoding only

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
