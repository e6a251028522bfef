"""Textures of the places and outlines of the shapes, as numpy functions of coordinates.

Every texture varies along both axes, with periods well above the motion within half a second, so that the direction of
a pan or a zoom is visible.
"""

import numpy as np

NIGHT_TINT = np.array((0.36, 0.38, 0.48), dtype=np.float32)
SUBJECT_RGB = {
    "red": (230, 30, 35),
    "green": (25, 205, 60),
    "blue": (30, 60, 245),
    "yellow": (255, 230, 20),
    "purple": (165, 35, 215),
    "white": (250, 250, 250),
}
PLACE_RGB = {  # base color and contrast in each rendering
    "usual": {
        "desert": ((190, 146, 88), (24, 22, 20)),
        "ocean": ((52, 140, 152), (28, 30, 28)),
        "forest": ((74, 104, 48), (32, 26, 26)),
        "city": ((128, 128, 132), (26, 26, 22)),
        "garden": ((194, 132, 164), (22, 26, 22)),
    },
    "changed": {
        "desert": ((202, 160, 112), (26, 24, 24)),
        "ocean": ((44, 124, 160), (26, 28, 30)),
        "forest": ((60, 92, 54), (28, 30, 24)),
        "city": ((116, 120, 138), (24, 24, 24)),
        "garden": ((184, 120, 146), (26, 24, 24)),
    },
}
_STAR_INRADIUS = 0.44
_STAR_TIP = 1.2
_FIFTHS = -np.pi / 2 + 2 * np.pi / 5 * np.arange(5)


def waves(values: np.ndarray, period: float, phase: float) -> np.ndarray:
    return np.sin(values * np.float32(2 * np.pi / period) + np.float32(phase))


def texture(place: str, x: np.ndarray, y: np.ndarray, phases: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """The texture [h, w] of a place, about -1 to 1.7, on the grid of `x` [1, w] and `y` [h, 1] in world units.

    `phases` [6] in [0, 2 pi] and `cells` [n, n] in [0, 1] make one clip's texture differ from another's.
    """
    if place == "desert":  # slanted dunes
        return waves(0.6 * x + 0.05 * waves(x, 0.7, phases[1]) + y, 0.26, phases[0])
    if place == "ocean":  # flat crests, broken along x
        crests = waves(y + 0.025 * waves(x, 0.3, phases[0]), 0.17, phases[1])
        return crests * (0.55 + 0.45 * waves(x + 0.35 * y, 0.45, phases[2]))
    if place == "forest":  # upright trunks of unequal width with a canopy here and there
        trunks = np.clip(3.0 * waves(x + 0.06 * waves(x, 0.53, phases[1]), 0.24, phases[0]), -1, 1)
        return 0.75 * trunks + 0.35 * waves(y, 0.5, phases[2]) * waves(x, 0.8, phases[3])
    x, y = x + phases[0], y + phases[1]
    if place == "city":  # rows of windows, some of them lit
        inside_x, inside_y = (abs(values / 0.2 % 1 - 0.5) < 0.3 for values in (x, y))
        lit = np.where(_cell_values(x, y, 0.2, cells) < 0.6, np.float32(1.6), np.float32(-1.0))
        return np.where(inside_x & inside_y, lit, np.float32(-0.3))
    # garden: round flowers, some of them missing
    squared = (x / 0.18 % 1 - 0.5) ** 2 + (y / 0.18 % 1 - 0.5) ** 2
    blooms = np.where(_cell_values(x, y, 0.18, cells) < 0.7, np.float32(1.7), np.float32(-0.4))
    return np.where(squared < 0.1, blooms, np.float32(-0.4))


def _cell_values(x: np.ndarray, y: np.ndarray, period: float, cells: np.ndarray) -> np.ndarray:
    """A random value per cell of a square lattice: [h, w]."""
    columns, rows = ((np.floor(values / period)).astype(np.intp) % len(cells) for values in (x, y))
    return cells[rows, columns]


def box_blur(field: np.ndarray, radius: int) -> np.ndarray:
    """Mean over a window of 2 * radius + 1 along both axes, edges repeated."""
    width = 2 * radius + 1
    for axis in (0, 1):
        pad = [(radius + 1, radius) if i == axis else (0, 0) for i in (0, 1)]
        sums = np.cumsum(np.pad(field, pad, mode="edge"), axis=axis)
        upper, lower = np.split(sums, [width], axis=axis)[1], np.split(sums, [-width], axis=axis)[0]
        field = (upper - lower) / np.float32(width)
    return field


def outside_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Approximate distance [h, w] to the edge of a shape, negative inside, on the grid of `x` [1, w] and `y` [h, 1].

    In units of the shape's radius; y points down.
    """
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "ring":
        return abs(np.hypot(x, y) - 0.78) - 0.24
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.86
    if shape == "cross":
        x, y = abs(x), abs(y)
        return np.minimum(np.maximum(x - 1.05, y - 0.34), np.maximum(x - 0.34, y - 1.05))
    if shape == "triangle":  # point up; shifted down so that its box is centred
        y = y - 0.2
        return np.maximum(y - 0.7, abs(x) * 0.894 - y * 0.447 - 0.56)
    # A star: at most one of five half-planes may be left, so the second largest distance decides.
    sides = [x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle)) for angle in _FIFTHS]
    second = np.sort(sides, axis=0)[-2] - np.float32(_STAR_INRADIUS)
    return np.maximum(second, np.hypot(x, y) - np.float32(_STAR_TIP))
