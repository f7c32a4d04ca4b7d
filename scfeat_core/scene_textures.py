"""Procedural surfaces for the demo scene: wood, brick, plaster, posters, books, terrazzo.

Each is ``texture(rng, height, width) -> (height, width, 3) float32`` RGB in 0..1, display-referred, with structure from
metres to millimetres and nothing that repeats: a keypoint on them is found again because it is itself. Sizes are in
texels of ``rendering.TEXEL``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np

from scfeat_core.rendering import TEXEL

Texture = Callable[[np.random.Generator, int, int], np.ndarray]
Colour = tuple[float, float, float]


def _texels(metres: float) -> int:
    return max(1, round(metres / TEXEL))


def fractal_noise(
    rng: np.random.Generator, height: int, width: int, cell: float = 0.6, octaves: int = 7, stretch: float = 1.0
) -> np.ndarray:
    """1/f noise of about unit variance: (height, width) float32. cell: metres of the coarsest octave."""
    total = np.zeros((height, width), np.float32)
    weight, power = 1.0, 0.0
    for octave in range(octaves):
        step = cell / TEXEL / 2**octave
        if step < 1:
            break
        shape = (int(height / step) + 3, int(width / (step * stretch)) + 3)
        grid = rng.standard_normal(shape, np.float32)
        size = (max(width, round(shape[1] * step * stretch)), max(height, round(shape[0] * step)))
        total += np.float32(weight) * cv2.resize(grid, size, interpolation=cv2.INTER_CUBIC)[:height, :width]
        power += weight * weight
        weight *= 0.72
    return total / np.float32(np.sqrt(power * 0.45) + 1e-6)


def _paint(colour: Colour, noise: np.ndarray, contrast: float) -> np.ndarray:
    return np.array(colour, np.float32) * (1 + np.float32(contrast) * noise[..., None])


def _blend(image: np.ndarray, colour: Colour, alpha: np.ndarray) -> None:
    """Mix a colour into an image in place. alpha: (H, W) in 0..1."""
    image += (np.array(colour, np.float32) - image) * alpha[..., None]


def _grain(rng: np.random.Generator, image: np.ndarray, strength: float) -> np.ndarray:
    h, w = image.shape[:2]
    fine = cv2.GaussianBlur(rng.standard_normal((h, w), np.float32), (3, 3), 0.7)
    return np.clip(image * (1 + np.float32(strength) * fine[..., None]), 0, 1).astype(np.float32)


def _stains(rng: np.random.Generator, image: np.ndarray, colour: Colour, amount: float) -> None:
    """Irregular patches where a noise field is high."""
    h, w = image.shape[:2]
    field = fractal_noise(rng, h, w, cell=0.7, octaves=6)
    _blend(image, colour, np.clip((field - 1.0) * 1.2, 0, 1) * np.float32(amount))


def _scratches(rng: np.random.Generator, image: np.ndarray, count: int, colour: Colour, reach: float = 0.25) -> None:
    """Thin broken lines in random directions."""
    h, w = image.shape[:2]
    layer = np.zeros((h, w), np.uint8)
    for _ in range(count):
        at = rng.uniform((0, 0), (w, h))
        turn = np.cumsum(rng.normal(0, 0.35, 7)) + rng.uniform(0, 2 * np.pi)
        steps = np.stack([np.cos(turn), np.sin(turn)], axis=1) * rng.uniform(0.2, 1) * reach / TEXEL / 7
        line = np.rint((at + np.cumsum(steps, axis=0)) * 16).astype(np.int32)
        cv2.polylines(layer, [line], False, int(rng.integers(90, 255)), 1, cv2.LINE_AA, 4)
    _blend(image, colour, layer.astype(np.float32) / 255 * 0.7)


def _ink(image: np.ndarray, colour: Sequence[float], draw: Callable[[np.ndarray], object]) -> None:
    """Draw in a colour in place. OpenCV smooths edges on 8-bit images only, so ``draw`` is given a mask to fill."""
    mask = np.zeros(image.shape[:2], np.uint8)
    draw(mask)
    x, y, w, h = cv2.boundingRect(mask)
    window = np.s_[y : y + h, x : x + w]
    _blend(image[window], tuple(colour), mask[window].astype(np.float32) / 255)  # type: ignore[arg-type]


def glyph(rng: np.random.Generator, mask: np.ndarray, x: int, y: int, height: int) -> None:
    """A made-up letter on a uint8 mask: a few strokes and arcs between the nodes of a 3 x 4 grid."""
    width = height * 0.6
    nodes = [(x + width * i / 2, y + height * j / 3) for j in range(4) for i in range(3)]
    thick = max(1, height // 7)
    for _ in range(int(rng.integers(3, 6))):
        a, b = rng.choice(12, 2, replace=False)
        p, q = (tuple(round(c * 16) for c in nodes[i]) for i in (a, b))
        if rng.random() < 0.3:
            centre = (int(nodes[a][0]), int(nodes[a][1]))
            start = int(rng.integers(0, 4)) * 90
            cv2.ellipse(mask, centre, (int(width / 2.6),) * 2, 0, start, start + 200, 255, thick, cv2.LINE_AA)
        else:
            cv2.line(mask, p, q, 255, thick, cv2.LINE_AA, 4)


def lettering(
    rng: np.random.Generator, image: np.ndarray, x: int, y: int, width: int, height: int, colour: Sequence[float]
) -> None:
    """A line of glyphs, with gaps between words."""

    def write(mask: np.ndarray) -> None:
        at = x
        while at + height * 0.6 < x + width:
            if rng.random() > 0.15:
                glyph(rng, mask, at, y, height)
            at += round(height * 0.85)

    _ink(image, colour, write)


def plaster(colour: Colour, dado: Colour | None = None) -> Texture:
    """A painted wall with stains, cracks and scuffs; with a dado, its lower metre has another colour."""

    def paint(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
        image = _paint(colour, fractal_noise(rng, h, w, cell=1.2, octaves=9), 0.045)
        _stains(rng, image, tuple(0.62 * c for c in colour), 0.45)  # type: ignore[arg-type]
        if dado is not None:
            top = h - _texels(0.95)
            lower = _paint(dado, fractal_noise(rng, h - top, w, cell=0.8, octaves=8), 0.07)
            worn = np.clip(fractal_noise(rng, h - top, w, cell=0.3, octaves=6) - 1.3, 0, 1)[..., None]
            image[top:] = lower + (np.array(colour, np.float32) * 0.85 - lower) * worn
            image[top - 4 : top + 4] *= np.float32(0.62)
        _scratches(rng, image, h * w // 26000, (0.30, 0.27, 0.25))
        _scratches(rng, image, h * w // 60000, (0.97, 0.95, 0.92), 0.4)
        return _grain(rng, image, 0.02)

    return paint


def brick(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    """Old brickwork: every brick has its own tone, size and chips."""
    image = _paint((0.63, 0.59, 0.54), fractal_noise(rng, h, w, cell=0.2, octaves=6), 0.10)
    course, joint = _texels(0.085), _texels(0.012)
    palette = np.array([(0.60, 0.30, 0.22), (0.68, 0.38, 0.27), (0.50, 0.25, 0.20), (0.72, 0.47, 0.34)], np.float32)
    mask = np.zeros((h, w), np.float32)
    tone = np.zeros((h, w, 3), np.float32)
    for row in range(0, h, course):
        x = -int(rng.integers(0, _texels(0.24)))
        while x < w:
            length = _texels(rng.uniform(0.17, 0.27))
            colour = palette[rng.integers(len(palette))] * rng.uniform(0.7, 1.2) + rng.normal(0, 0.02, 3)
            y0, y1 = row + int(rng.integers(0, 2)), row + course - joint - int(rng.integers(0, 2))
            x0, x1 = max(0, x), max(0, x + length - joint)
            mask[y0:y1, x0:x1] = 1
            tone[y0:y1, x0:x1] = colour
            x += length
    chips = np.clip((fractal_noise(rng, h, w, cell=0.08, octaves=5) - 1.2) * 3, 0, 1)
    alpha = (mask * (1 - chips))[..., None]
    surface = tone * (1 + 0.16 * fractal_noise(rng, h, w, cell=0.1, octaves=5))[..., None]
    image += (surface - image) * alpha
    _stains(rng, image, (0.80, 0.77, 0.72), 0.5)
    _stains(rng, image, (0.20, 0.15, 0.13), 0.55)
    return _grain(rng, image, 0.05)


def planks(colour: Colour, board: float = 0.13, along: str = "x") -> Texture:
    """Wooden boards with grain, knots and wear. board: metres wide. along: the direction of the grain, x or y."""

    def paint(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
        if along == "y":
            return np.ascontiguousarray(lay(rng, w, h).transpose(1, 0, 2))
        return lay(rng, h, w)

    def lay(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
        grain = fractal_noise(rng, h, w, cell=0.05, octaves=4, stretch=14)
        broad = fractal_noise(rng, h, w, cell=0.5, octaves=6, stretch=3)
        image = _paint(colour, 0.6 * grain + 0.4 * broad, 0.12)
        width = _texels(board)
        for row in range(0, h, width):
            x = -int(rng.integers(0, _texels(1.2)))
            while x < w:
                length = _texels(rng.uniform(0.6, 1.7))
                window = image[row : row + width, max(0, x) : max(0, x + length)]
                window *= np.float32(rng.uniform(0.72, 1.18)) * (1 + rng.normal(0, 0.025, 3)).astype(np.float32)
                window[:, -1:] *= np.float32(0.45)
                for _ in range(rng.poisson(length * width * TEXEL**2 * 9)):
                    if window.size:
                        _knot(rng, window)
                x += length
            image[row : row + 1] *= np.float32(0.42)
            image[row + 1 : row + 2] *= np.float32(0.8)
        _scratches(rng, image, h * w // 14000, (0.16, 0.10, 0.07), 0.2)
        _stains(rng, image, tuple(0.5 * c for c in colour), 0.4)  # type: ignore[arg-type]
        return _grain(rng, image, 0.04)

    return paint


def _knot(rng: np.random.Generator, window: np.ndarray) -> None:
    h, w = window.shape[:2]
    centre = (int(rng.integers(0, w)), int(rng.integers(0, h)))
    layer = np.zeros((h, w), np.float32)
    size = rng.uniform(0.008, 0.02) / TEXEL
    for ring, depth in ((2.2, 0.35), (1.5, 0.15), (1.0, 0.8)):
        axes = (max(1, round(size * ring * 1.7)), max(1, round(size * ring)))
        cv2.ellipse(layer, centre, axes, float(rng.normal(0, 8)), 0, 360, depth, -1, cv2.LINE_AA)
    window *= (1 - 0.6 * layer)[..., None]


def concrete(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    """Cast concrete: blotches, pits and streaks."""
    image = _paint((0.60, 0.59, 0.57), fractal_noise(rng, h, w, cell=0.9, octaves=9), 0.09)
    pits = np.clip((fractal_noise(rng, h, w, cell=0.045, octaves=3) - 1.9) * 2.5, 0, 1)
    _blend(image, (0.25, 0.24, 0.23), pits)
    _stains(rng, image, (0.36, 0.33, 0.30), 0.6)
    _stains(rng, image, (0.70, 0.52, 0.36), 0.35)
    _scratches(rng, image, h * w // 9000, (0.30, 0.29, 0.28), 0.3)
    return _grain(rng, image, 0.06)


def terrazzo(base: Colour) -> Texture:
    """Chips of many colours in a polished binder."""
    chips = np.array(
        [(0.86, 0.80, 0.70), (0.66, 0.36, 0.28), (0.28, 0.40, 0.45), (0.85, 0.65, 0.35), (0.20, 0.20, 0.22)], np.float32
    )

    def paint(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
        image = _paint(base, fractal_noise(rng, h, w, cell=0.3, octaves=6), 0.04)
        canvas = cv2.convertScaleAbs(image, alpha=255)  # OpenCV smooths edges on 8-bit images only
        for _ in range(int(h * w * TEXEL**2 * 420)):
            radius = rng.lognormal(np.log(0.014), 0.5) / TEXEL
            corners = int(rng.integers(4, 8))
            angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
            spread = radius * rng.uniform(0.6, 1.1, corners)
            shape = rng.uniform((0, 0), (w, h)) + np.stack([np.cos(angle), np.sin(angle)], axis=1) * spread[:, None]
            colour = np.clip(chips[rng.integers(len(chips))] * rng.uniform(0.8, 1.15), 0, 1)
            cv2.fillPoly(canvas, [np.rint(shape * 16).astype(np.int32)], (255 * colour).tolist(), cv2.LINE_AA, 4)
        return _grain(rng, canvas.astype(np.float32) / 255, 0.03)

    return paint


def crate(colour: Colour) -> Texture:
    """The side of a wooden box: boards, a frame, nails, and a stencilled mark."""

    def paint(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
        image = planks(colour, board=0.11)(rng, h, w)
        frame = _texels(0.07)
        border = planks(tuple(0.85 * c for c in colour), board=0.3)(rng, h, w)  # type: ignore[arg-type]
        inner = np.s_[frame : h - frame, frame : w - frame]
        kept = image[inner].copy()
        image[:] = border
        image[inner] = kept
        cv2.rectangle(image, (frame, frame), (w - frame, h - frame), (0.12, 0.08, 0.05), 2)
        for x in np.linspace(frame / 2, w - frame / 2, 5):
            for y in (frame / 2, h - frame / 2):
                at = (int(x + rng.normal(0, 2)), int(y + rng.normal(0, 2)))
                cv2.circle(image, at, 2, (0.10, 0.09, 0.09), -1, cv2.LINE_AA)
        tall = max(10, int(h * rng.uniform(0.16, 0.26)))
        lettering(rng, image, frame + 8, int(rng.uniform(0.3, 0.5) * h), w - 2 * frame - 16, tall, (0.12, 0.10, 0.10))
        return _grain(rng, image, 0.03)

    return paint


def books(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    """The front of a bookcase: shelves of spines, each with its own colour, bands and title."""
    wood = planks((0.40, 0.27, 0.18), board=0.4)(rng, h, w)
    image = wood.copy()
    rim, shelf = _texels(0.03), _texels(0.33)
    for top in range(rim, h - rim - shelf // 2, shelf):
        bottom = min(top + shelf - rim, h - rim)
        image[top:bottom, rim : w - rim] = (0.07, 0.05, 0.04)
        x = rim + 1
        while x < w - rim - 4:
            thick = _texels(rng.uniform(0.018, 0.06))
            if rng.random() < 0.06:
                x += thick * 2
                continue
            tall = int((bottom - top) * rng.uniform(0.62, 0.96))
            _spine(rng, image[bottom - tall : bottom, x : min(x + thick, w - rim)])
            x += thick
    return _grain(rng, image, 0.05)


_CLOTH = np.array(
    [
        (0.55, 0.16, 0.14),
        (0.16, 0.27, 0.42),
        (0.20, 0.38, 0.28),
        (0.80, 0.70, 0.52),
        (0.75, 0.48, 0.16),
        (0.22, 0.20, 0.22),
        (0.48, 0.34, 0.50),
        (0.86, 0.84, 0.78),
        (0.30, 0.50, 0.55),
    ],
    np.float32,
)


def _spine(rng: np.random.Generator, spine: np.ndarray) -> None:
    h, w = spine.shape[:2]
    if w < 2:
        return
    colour = _CLOTH[rng.integers(len(_CLOTH))] * rng.uniform(0.75, 1.15)
    round_back = 1 - 0.35 * np.abs(np.linspace(-1, 1, w)) ** 3
    spine[:] = np.clip(colour * round_back[None, :, None], 0, 1)
    ink = _CLOTH[rng.integers(len(_CLOTH))]
    for y in rng.uniform(0.04, 0.96, int(rng.integers(1, 4))) * h:
        spine[int(y) : int(y) + int(rng.integers(1, 5)), 1:-1] = ink
    if w >= 5:
        size = w - 3
        rows = np.arange(int(h * rng.uniform(0.12, 0.3)), int(h * 0.8 - size * 1.4), max(4, int(size * 1.5)))

        def write(mask: np.ndarray) -> None:
            for y in rows:
                glyph(rng, mask, 2, int(y), max(4, size))

        _ink(spine, ink, write)


def poster(colours: Sequence[Colour]) -> Texture:
    """A framed print: shapes over a gradient, with a title. The first colour is the ground, the last the ink."""

    def paint(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
        ground = np.array(colours[0], np.float32)
        ramp = np.linspace(1.12, 0.8, h, dtype=np.float32)[:, None, None]
        image = np.ascontiguousarray(np.broadcast_to(ground * ramp, (h, w, 3)))
        canvas = cv2.convertScaleAbs(image, alpha=255)
        for _ in range(int(rng.integers(14, 22))):
            _shape(rng, canvas, colours[1 + int(rng.integers(len(colours) - 1))])
        image = canvas.astype(np.float32) / 255
        ink = colours[-1]
        tall = max(8, h // 14)
        image[h - 3 * tall :] += (ground * 1.1 - image[h - 3 * tall :]) * np.float32(0.9)
        lettering(rng, image, w // 10, h - int(2.5 * tall), w * 8 // 10, tall, ink)
        lettering(rng, image, w // 10, h - int(1.2 * tall), w * 6 // 10, max(6, tall // 2), ink)
        frame = _texels(0.03)
        cv2.rectangle(image, (0, 0), (w - 1, h - 1), (0.10, 0.08, 0.07), 2 * frame)
        cv2.rectangle(image, (frame, frame), (w - frame, h - frame), (0.93, 0.91, 0.86), frame)
        image *= 1 + 0.05 * fractal_noise(rng, h, w, cell=0.25, octaves=7)[..., None]
        _scratches(rng, image, h * w // 9000, (0.97, 0.95, 0.92), 0.1)
        return _grain(rng, image, 0.04)

    return paint


def _shape(rng: np.random.Generator, canvas: np.ndarray, colour: Colour) -> None:
    """A disc, a ring, a triangle or a bar somewhere on a uint8 canvas."""
    h, w = canvas.shape[:2]
    at = rng.uniform((0, 0), (w, h * 0.8))
    size = rng.uniform(0.05, 0.28) * min(h, w)
    tone = tuple(float(np.clip(255 * c * rng.uniform(0.8, 1.2), 0, 255)) for c in colour)
    centre, radius = (int(at[0]), int(at[1])), max(2, int(size))
    kind = rng.integers(4)
    if kind == 0:
        cv2.circle(canvas, centre, radius, tone, -1, cv2.LINE_AA)
    elif kind == 1:
        cv2.circle(canvas, centre, radius, tone, max(2, radius // 5), cv2.LINE_AA)
    elif kind == 2:
        angle = np.sort(rng.uniform(0, 2 * np.pi, 3))
        corners = at + np.stack([np.cos(angle), np.sin(angle)], axis=1) * size * 1.3
        cv2.fillPoly(canvas, [np.rint(corners * 16).astype(np.int32)], tone, cv2.LINE_AA, 4)
    else:
        heading = rng.uniform(0, np.pi)
        end = at + 3 * size * np.array([np.cos(heading), np.sin(heading)])
        cv2.line(canvas, centre, (int(end[0]), int(end[1])), tone, max(2, radius // 6), cv2.LINE_AA)


def rug(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    """A patchwork carpet: irregular fields of colour, borders and a coarse weave."""
    palette = np.array(
        [(0.52, 0.15, 0.13), (0.16, 0.22, 0.36), (0.78, 0.62, 0.40), (0.30, 0.37, 0.27), (0.68, 0.36, 0.20)], np.float32
    )
    sites = rng.uniform((0, 0), (w, h), (60, 2)).astype(np.float32)
    tone = palette[rng.integers(len(palette), size=len(sites))] * rng.uniform(0.8, 1.2, (len(sites), 1))
    y, x = np.mgrid[0:h:2, 0:w:2].astype(np.float32)
    warp = 14 * fractal_noise(rng, h, w, cell=0.3, octaves=3)[::2, ::2]
    nearest, second, owner = np.full(x.shape, 1e9), np.full(x.shape, 1e9), np.zeros(x.shape, int)
    for i, (sx, sy) in enumerate(sites):
        distance = np.abs(x + warp - sx) + np.abs(y - warp - sy)
        second = np.minimum(second, np.maximum(distance, nearest))
        owner[distance < nearest] = i
        nearest = np.minimum(nearest, distance)
    image = tone[owner].astype(np.float32)
    seam = np.abs(np.sin((second - nearest) / 9)) * np.exp(-(second - nearest) / 45)
    _blend(image, (0.88, 0.80, 0.66), seam.astype(np.float32) * 0.7)
    image = cv2.resize(image, (w, h), interpolation=cv2.INTER_LINEAR)
    for inset, colour in ((4, (0.78, 0.62, 0.40)), (16, (0.14, 0.16, 0.24)), (30, (0.52, 0.15, 0.13))):
        cv2.rectangle(image, (inset, inset), (w - inset, h - inset), colour, 5)
    image *= 1 + 0.10 * fractal_noise(rng, h, w, cell=0.06, octaves=4)[..., None]
    return _grain(rng, image, 0.12)


def metal(colour: Colour) -> Texture:
    """Painted sheet metal with rust, scratches and a label."""

    def paint(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
        image = _paint(colour, fractal_noise(rng, h, w, cell=0.8, octaves=8), 0.05)
        rust = np.clip((fractal_noise(rng, h, w, cell=0.25, octaves=7) - 1.15) * 3, 0, 1)
        _blend(image, (0.42, 0.22, 0.12), rust)
        _scratches(rng, image, h * w // 3500, (0.85, 0.84, 0.82), 0.12)
        y, tall = int(h * 0.16), max(8, h // 9)
        cv2.rectangle(image, (w // 6, y), (w * 5 // 6, y + 2 * tall), (0.92, 0.90, 0.84), -1)
        lettering(rng, image, w // 6 + 6, y + tall // 2, w * 2 // 3 - 12, tall, (0.12, 0.12, 0.14))
        cv2.rectangle(image, (2, 2), (w - 3, h - 3), tuple(0.6 * c for c in colour), 3)
        return _grain(rng, image, 0.04)

    return paint


def window(rng: np.random.Generator, h: int, w: int) -> np.ndarray:
    """Sky, far hills and glazing bars."""
    ramp = np.linspace(0, 1, h, dtype=np.float32)[:, None, None]
    image = (1 - ramp) * np.array((0.66, 0.80, 0.96), np.float32) + ramp * np.array((0.98, 0.96, 0.90), np.float32)
    image = np.ascontiguousarray(np.broadcast_to(image, (h, w, 3)))
    _blend(image, (1, 1, 1), np.clip(fractal_noise(rng, h, w, cell=0.6, octaves=6, stretch=2) * 0.5, 0, 0.9))
    crest = (h * 0.72 + 12 * fractal_noise(rng, 4, w, cell=0.6)[0]).astype(int)
    image[np.arange(h)[:, None] > crest] = (0.52, 0.60, 0.50)
    for i in range(1, 3):
        cv2.line(image, (w * i // 3, 0), (w * i // 3, h), (0.42, 0.36, 0.30), 7)
    cv2.line(image, (0, h // 2), (w, h // 2), (0.42, 0.36, 0.30), 7)
    cv2.rectangle(image, (0, 0), (w - 1, h - 1), (0.42, 0.36, 0.30), 18)
    return np.clip(image, 0, 1).astype(np.float32)
