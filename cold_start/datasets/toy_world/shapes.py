"""The six shapes, as functions that are negative inside and grow outwards roughly like the distance to the edge."""

import numpy as np

_STAR_INRADIUS = 0.44
_STAR_TIP = 1.2
_FIFTHS = -np.pi / 2 + 2 * np.pi / 5 * np.arange(5)


def outside_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance [h, w] on the grid of `x` [w] and `y` [h], in units of the shape's radius; y points down."""
    x, y = x[None, :], y[:, None]
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
    return _star_distance(x, y)


def _star_distance(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A pentagram: at most one of five half-planes may be left, so the second largest distance decides."""
    largest = second = np.float32(-np.inf)
    for angle in _FIFTHS:
        distance = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle)) - np.float32(_STAR_INRADIUS)
        second = np.maximum(second, np.minimum(largest, distance))
        largest = np.maximum(largest, distance)
    return np.maximum(second, np.hypot(x, y) - np.float32(_STAR_TIP))
