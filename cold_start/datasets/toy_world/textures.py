"""Backgrounds: five places with a base color and a texture of their own, by day and by night, in two renderings.

Every texture varies along both axes with periods well above what moves between two frames half a second apart, so that
a pan or a zoom can be told from its steps.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .renderings import RenderingName
from .scene import Scene

NIGHT_TINT = np.array((0.36, 0.38, 0.48), dtype=np.float32)
LANDMARK_STRENGTH = 0.25
DISTRACTOR_DIAMETER = 0.09
_COLOR_JITTER = 8.0


def _waves(values: np.ndarray, period: float, phase: float) -> np.ndarray:
    return np.sin(values * np.float32(2 * np.pi / period) + np.float32(phase))


def _desert(x: np.ndarray, y: np.ndarray, phases: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Slanted dunes."""
    bent = 0.6 * x + 0.05 * _waves(x, 0.7, phases[1])
    return _waves(bent + y, 0.26, phases[0])


def _ocean(x: np.ndarray, y: np.ndarray, phases: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Flat crests, broken along x."""
    crests = _waves(y + 0.025 * _waves(x, 0.3, phases[0]), 0.17, phases[1])
    return crests * (0.55 + 0.45 * _waves(x + 0.35 * y, 0.45, phases[2]))


def _forest(x: np.ndarray, y: np.ndarray, phases: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Upright trunks of unequal width with a canopy here and there."""
    trunks = np.clip(3.0 * _waves(x + 0.06 * _waves(x, 0.53, phases[1]), 0.24, phases[0]), -1, 1)
    return 0.75 * trunks + 0.35 * _waves(y, 0.5, phases[2]) * _waves(x, 0.8, phases[3])


def _cell_values(x: np.ndarray, y: np.ndarray, period: float, cells: np.ndarray) -> np.ndarray:
    """A random value per cell of a square lattice: [h, w]."""
    columns, rows = ((np.floor(values / period)).astype(np.intp) % len(cells) for values in (x, y))
    return cells[rows[:, 0]][:, columns[0]]


def _city(x: np.ndarray, y: np.ndarray, phases: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Rows of windows, some of them lit."""
    x, y = x + phases[0], y + phases[1]
    inside_x, inside_y = (abs(values / 0.2 % 1 - 0.5) < 0.3 for values in (x, y))
    lit = np.where(_cell_values(x, y, 0.2, cells) < 0.6, np.float32(1.6), np.float32(-1.0))
    return np.where(inside_x & inside_y, lit, np.float32(-0.3))


def _garden(x: np.ndarray, y: np.ndarray, phases: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Round flowers, some of them missing."""
    x, y = x + phases[0], y + phases[1]
    squared = (x / 0.18 % 1 - 0.5) ** 2 + (y / 0.18 % 1 - 0.5) ** 2
    blooms = np.where(_cell_values(x, y, 0.18, cells) < 0.7, np.float32(1.7), np.float32(-0.4))
    return np.where(squared < 0.1, blooms, np.float32(-0.4))


def _ripples(x: np.ndarray, y: np.ndarray, phases: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Rings around a point in the sand."""
    far_x, far_y = x - np.float32(0.1 * np.sin(phases[0])), y - np.float32(0.1 * np.sin(phases[1]))
    return _waves(np.sqrt(far_x**2 + far_y**2), 0.21, phases[2])


def _swell(x: np.ndarray, y: np.ndarray, phases: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Zigzag crests."""
    zigzag = 0.12 * abs((x / 0.34 + phases[0]) % 2 - 1)
    return np.clip(1.6 * _waves(y + zigzag, 0.22, phases[1]), -1, 1)


def _leaves(x: np.ndarray, y: np.ndarray, phases: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Blotches of leaves without trunks."""
    blotches = _waves(x + 0.5 * y, 0.2, phases[0]) * _waves(y - 0.5 * x, 0.23, phases[1])
    return blotches + 0.5 * _waves(x + y, 0.47, phases[2])


def _bricks(x: np.ndarray, y: np.ndarray, phases: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Walls of bricks, each row shifted by half a brick."""
    x, y = x + phases[0], y + phases[1]
    shifted = x / 0.28 + 0.5 * (np.floor(y / 0.14) % 2)
    is_joint = (shifted % 1 < 0.16) | (y / 0.14 % 1 < 0.24)
    return np.where(is_joint, np.float32(1.3), np.float32(-0.5))


def _beds(x: np.ndarray, y: np.ndarray, phases: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Slanting rows of blossoms with paths between them."""
    rows = _waves(x - y, 0.24, phases[0])
    return np.where(rows > 0, 1.2 * abs(_waves(x + y, 0.19, phases[1])), np.float32(-0.7))


_Texture = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
_Looks = dict[str, tuple[tuple[int, int, int], tuple[int, int, int], _Texture]]  # base color, contrast, texture
_PLACES: dict[RenderingName, _Looks] = {
    "usual": {
        "desert": ((190, 146, 88), (24, 22, 20), _desert),
        "ocean": ((52, 140, 152), (28, 30, 28), _ocean),
        "forest": ((74, 104, 48), (32, 26, 26), _forest),
        "city": ((128, 128, 132), (26, 26, 22), _city),
        "garden": ((194, 132, 164), (22, 26, 22), _garden),
    },
    "changed": {
        "desert": ((202, 160, 112), (26, 24, 24), _ripples),
        "ocean": ((44, 124, 160), (26, 28, 30), _swell),
        "forest": ((60, 92, 54), (28, 30, 24), _leaves),
        "city": ((116, 120, 138), (24, 24, 24), _bricks),
        "garden": ((184, 120, 146), (26, 24, 24), _beds),
    },
}


@dataclass(frozen=True)
class World:
    """A painted stretch of background: `pixels` uint8 [h, w, 3], whose first pixel lies at (left, top)."""

    pixels: np.ndarray
    left: float
    top: float
    pixels_per_unit: float

    def look_up(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The nearest painted pixels on the grid of world coordinates `x` [w] and `y` [h]: uint8 [h, w, 3]."""
        columns = np.rint((x - self.left) * self.pixels_per_unit).astype(np.intp)
        rows = np.rint((y - self.top) * self.pixels_per_unit).astype(np.intp)
        rows = rows.clip(0, self.pixels.shape[0] - 1)
        return self.pixels[rows].take(columns.clip(0, self.pixels.shape[1] - 1), axis=1)


def paint_world(
    scene: Scene,
    *,
    half_size: tuple[float, float],
    pixels_per_unit: float,
    seed: int,
    distractor_rgb: tuple[int, int, int] | None,
    blur_radius: float,
    rendering: RenderingName = "usual",
) -> World:
    """The background of a scene from -half_size to half_size (x, y), in world units like `blur_radius`.

    A `blur_radius` of 0 leaves it sharp. The optional distractor is a small disc.
    """
    rng = np.random.default_rng([seed, 0])
    base, contrast, texture = _PLACES[rendering][scene.place]
    phases = rng.uniform(0, 2 * np.pi, size=6).astype(np.float32)
    cells = rng.random((16, 16), dtype=np.float32)
    jitter = rng.uniform(-_COLOR_JITTER, _COLOR_JITTER, size=3)
    spot_x, spot_y = rng.uniform(-0.42, 0.42, size=2)
    counts = [int(2 * half * pixels_per_unit) for half in half_size]
    left, top = (0.5 / pixels_per_unit - half for half in half_size)
    x = (left + np.arange(counts[0]) / pixels_per_unit).astype(np.float32)[None, :]
    y = (top + np.arange(counts[1]) / pixels_per_unit).astype(np.float32)[:, None]
    field = texture(x, y, phases, cells)
    field = field + LANDMARK_STRENGTH * (_waves(x, 1.1, phases[4]) + _waves(y, 0.9, phases[5]))
    if blur_radius:
        radius = round(blur_radius * pixels_per_unit)
        field = _box_blur(_box_blur(field, radius), radius)
    tint = NIGHT_TINT if scene.light == "night" else np.ones(3, dtype=np.float32)
    base = ((np.asarray(base) + jitter) * tint).astype(np.float32)
    pixels = base + field[..., None] * (np.asarray(contrast, dtype=np.float32) * np.sqrt(tint))
    if distractor_rgb is not None:
        inside = (x - spot_x) ** 2 + (y - spot_y) ** 2 < (DISTRACTOR_DIAMETER / 2) ** 2
        pixels[inside] = np.asarray(distractor_rgb, dtype=np.float32) * np.sqrt(tint)
    return World(np.clip(pixels, 0, 255).astype(np.uint8), left, top, pixels_per_unit)


def _box_blur(field: np.ndarray, radius: int) -> np.ndarray:
    """Mean over a window of 2 * radius + 1 along both axes, edges repeated."""
    for axis in (0, 1):
        pad = [(radius + 1, radius) if i == axis else (0, 0) for i in (0, 1)]
        sums = np.cumsum(np.pad(field, pad, mode="edge"), axis=axis)
        width = 2 * radius + 1
        upper, lower = np.split(sums, [width], axis=axis)[1], np.split(sums, [-width], axis=axis)[0]
        field = (upper - lower) / np.float32(width)
    return field
