"""Draws scenes: 1 to 6 shapes on a plain background, compressed, decoded and cut into tiles.

Several rasterisers, file formats, sizes, proportions and resizing filters, so that the model does not learn one of them.
"""
import io
import math
import random

import aggdraw
import cv2
import numpy as np
from PIL import Image, ImageDraw

from questions import COLOURS, SHAPES

cv2.setNumThreads(1)
TILE = 112
MAX_TILES = 4
GRIDS = sorted(((c, r) for c in range(1, MAX_TILES + 1) for r in range(1, MAX_TILES + 1) if c * r <= MAX_TILES), key=lambda g: g[0] * g[1])
# Hue in degrees, saturation and value in percent: the range of colours that one name stands for.
HSV = {
    'red': (-9, 8, 70, 100, 68, 100), 'orange': (21, 39, 75, 100, 85, 100), 'yellow': (48, 61, 65, 100, 85, 100),
    'green': (95, 150, 50, 100, 42, 95), 'blue': (205, 242, 60, 100, 55, 100), 'purple': (268, 303, 45, 100, 45, 85)
}
FAR = 80    # least distance between an object's colour and the background's, in RGB


def closest_grid (width, height):
    """The tiling that transformers' processor chooses: closest aspect ratio, more tiles when the picture fills half of them."""
    best, best_diff, ratio = (1, 1), float('inf'), width / height
    for grid in GRIDS:
        diff = abs(ratio - grid[0] / grid[1])
        if diff < best_diff or (diff == best_diff and width * height > 0.5 * TILE * TILE * grid[0] * grid[1]):
            best, best_diff = grid, diff
    return best


def rgb (rng, name):
    if name == 'white':
        v = rng.randint(238, 255)
        return tuple(min(255, v + rng.randint(-3, 3)) for _ in range(3))
    if name == 'black':
        v = rng.randint(0, 24)
        return tuple(max(0, v + rng.randint(-3, 3)) for _ in range(3))
    h0, h1, s0, s1, v0, v1 = HSV[name]
    h, s, v = rng.uniform(h0, h1) % 360 / 60, rng.uniform(s0, s1) / 100, rng.uniform(v0, v1) / 100
    c = v * s
    x, m = c * (1 - abs(h % 2 - 1)), v - c
    r, g, b = [(c, x, 0), (x, c, 0), (0, c, x), (0, x, c), (x, 0, c), (c, 0, x)][int(h) % 6]
    return tuple(round(255 * (t + m)) for t in (r, g, b))


def outline (rng, shape):
    """The corners of a shape about its centre, for a size across of 2; None for a circle. Proportions and turn vary."""
    turn = rng.uniform(0, 2 * math.pi) if rng.random() < 0.6 else 0
    if shape == 'circle':
        return None
    if shape == 'square':
        r = rng.uniform(0.98, 1.41) if rng.random() < 0.8 else 1
        points = [(r * math.cos(math.pi / 4 + i * math.pi / 2), r * math.sin(math.pi / 4 + i * math.pi / 2)) for i in range(4)]
    elif shape == 'triangle':
        r = rng.uniform(0.95, 1.25)
        if rng.random() < 0.7:
            points = [(r * math.cos(-math.pi / 2 + i * 2 * math.pi / 3), r * math.sin(-math.pi / 2 + i * 2 * math.pi / 3)) for i in range(3)]
        else:
            w, h = rng.uniform(0.8, 1.05), rng.uniform(0.85, 1.05)
            if rng.random() < 0.5:
                points = [(0, -h), (w, h), (-w, h)]
            else:
                points = [(0, -h * 4 / 3), (w, h * 2 / 3), (-w, h * 2 / 3)]
    elif shape == 'star':
        inner, r = rng.uniform(0.36, 0.54), rng.uniform(0.98, 1.12)
        points = [((r if i % 2 == 0 else r * inner) * math.cos(-math.pi / 2 + i * math.pi / 5), (r if i % 2 == 0 else r * inner) * math.sin(-math.pi / 2 + i * math.pi / 5)) for i in range(10)]
        if rng.random() < 0.6:
            turn = rng.uniform(-0.3, 0.3) if rng.random() < 0.5 else 0
    else:
        w = rng.uniform(0.24, 0.42)
        points = [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w), (-w, -w)]
    c, s = math.cos(turn), math.sin(turn)
    return [(x * c - y * s, x * s + y * c) for x, y in points]


def plan (rng):
    """A scene in numbers: size, background and objects."""
    while True:
        ratio = 2 ** rng.uniform(-1.03, 1.03)
        if rng.random() < 0.3:
            ratio = rng.choice((1, 1, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 9 / 16, 2, 0.5))
        long = rng.randint(128, 1024) if rng.random() < 0.7 else rng.randint(128, 400)
        width, height = (long, round(long / ratio)) if ratio >= 1 else (round(long * ratio), long)
        if min(width, height) >= 126:
            break
    short = min(width, height)
    r = rng.random()
    grey = 255 if r < 0.15 else 0 if r < 0.25 else rng.randint(0, 255)
    back = (grey,) * 3 if rng.random() < 0.9 else tuple(max(0, min(255, grey + rng.randint(-4, 4))) for _ in range(3))
    count = rng.choices((1, 2, 3, 4, 5, 6), (10, 10, 12, 13, 13, 14))[0]
    palette = None
    if rng.random() < 0.5:
        cs, ss = rng.sample(COLOURS, rng.randint(1, 3)), rng.sample(SHAPES, rng.randint(1, 3))
        palette = [(rng.choice(cs), rng.choice(ss)) for _ in range(rng.randint(1, 4))]
    same = rng.random() < 0.2 and rng.uniform(1 / 7, 1 / 3)
    objects = []
    for _ in range(count):
        for _ in range(20):
            name, shape = rng.choice(palette) if palette else (rng.choice(COLOURS), rng.choice(SHAPES))
            colour = rgb(rng, name)
            if math.dist(colour, back) >= FAR:
                break
            palette = None if rng.random() < 0.3 else palette
        else:
            continue
        points = outline(rng, shape)
        across = (same or rng.uniform(1 / 7, 1 / 3)) * short
        reach = across / 2 * (max(math.hypot(*p) for p in points) if points else 1)
        for attempt in range(40):
            if attempt % 10 == 9:
                reach, across = max(reach * 0.8, reach * short / 7 / across), max(across * 0.8, short / 7)
            if width <= 2 * reach + 2 or height <= 2 * reach + 2:
                continue
            x, y = rng.uniform(reach + 1, width - reach - 1), rng.uniform(reach + 1, height - reach - 1)
            if min(abs(x / width - t) for t in (1 / 3, 2 / 3)) < 0.012 or min(abs(y / height - t) for t in (1 / 3, 2 / 3)) < 0.012:
                continue
            if all(math.hypot(x - o['px'], y - o['py']) > reach + o['reach'] + 0.012 * short for o in objects):
                objects.append({
                    'shape': shape, 'colour': name, 'rgb': colour, 'x': x / width, 'y': y / height,
                    'px': x, 'py': y, 'reach': reach, 'r': across / 2, 'points': points
                })
                break
    if not objects:
        return plan(rng)
    return {'width': width, 'height': height, 'back': back, 'objects': objects}


def paint_cv (scene, rng):
    image = np.empty((scene['height'], scene['width'], 3), np.uint8)
    image[:] = scene['back']
    line = cv2.LINE_AA if rng.random() < 0.75 else cv2.LINE_8
    for o in scene['objects']:
        if o['points'] is None:
            cv2.circle(image, (round(o['px'] * 16), round(o['py'] * 16)), round(o['r'] * 16), o['rgb'], -1, line, 4)
        else:
            points = np.round((np.array(o['points']) * o['r'] + (o['px'], o['py'])) * 16).astype(np.int32)
            cv2.fillPoly(image, [points], o['rgb'], line, 4)
    return image


def paint_agg (scene, rng):
    draw = aggdraw.Draw('RGB', (scene['width'], scene['height']), scene['back'])
    draw.setantialias(rng.random() < 0.85)
    for o in scene['objects']:
        x, y, r = o['px'], o['py'], o['r']
        brush = aggdraw.Brush(o['rgb'])
        if o['points'] is None:
            draw.ellipse((x - r, y - r, x + r, y + r), None, brush)
        else:
            draw.polygon([v for px, py in o['points'] for v in (x + px * r, y + py * r)], None, brush)
    return np.frombuffer(draw.tobytes(), np.uint8).reshape(scene['height'], scene['width'], 3)


def paint_pil (scene, rng):
    big = scene['width'] * scene['height'] > 300_000
    k = 1 if big or rng.random() < 0.4 else 2
    image = Image.new('RGB', (scene['width'] * k, scene['height'] * k), scene['back'])
    draw = ImageDraw.Draw(image)
    for o in scene['objects']:
        x, y, r = o['px'] * k, o['py'] * k, o['r'] * k
        if o['points'] is None:
            draw.ellipse((x - r, y - r, x + r, y + r), fill=o['rgb'])
        else:
            draw.polygon([(x + px * r, y + py * r) for px, py in o['points']], fill=o['rgb'])
    return np.asarray(image if k == 1 else image.resize((scene['width'], scene['height']), Image.BOX))


def compress (image, rng):
    """Through a file format and back."""
    r = rng.random()
    if r < 0.45:
        return image
    small = image.size < 3 * 500_000
    if r < 0.88 or not small:
        flags = [cv2.IMWRITE_JPEG_QUALITY, rng.randint(68, 97)]
        if rng.random() < 0.3:
            flags += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
        return cv2.imdecode(cv2.imencode('.jpg', image, flags)[1], cv2.IMREAD_COLOR)
    out = io.BytesIO()
    Image.fromarray(image).save(out, 'webp', quality=rng.randint(68, 97), method=0)
    return np.asarray(Image.open(out).convert('RGB'))


def resize (image, size, kind):
    if kind == 'pil':
        return np.asarray(Image.fromarray(image).resize(size, Image.BICUBIC, reducing_gap=3.0))
    if image.shape[1] < size[0] or image.shape[0] < size[1]:
        return cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def tiles_of (image, kind='pil'):
    height, width = image.shape[:2]
    cols, rows = closest_grid(width, height)
    whole = resize(image, (cols * TILE, rows * TILE), kind)
    tiles = whole.reshape(rows, TILE, cols, TILE, 3).transpose(0, 2, 1, 3, 4).reshape(-1, TILE, TILE, 3)
    if cols * rows > 1:
        tiles = np.concatenate((tiles, resize(image, (TILE, TILE), kind)[None]))
    return (cols, rows), tiles


def draw (seed):
    """(grid, tiles, objects as (colour index, shape index, x, y)) of the scene with that seed."""
    rng = random.Random(seed)
    scene = plan(rng)
    paint = rng.choices((paint_cv, paint_agg, paint_pil), (4, 5, 2))[0]
    image = compress(paint(scene, rng), rng)
    grid, tiles = tiles_of(np.ascontiguousarray(image), 'pil' if rng.random() < 0.6 else 'cv')
    return grid, tiles, [(COLOURS.index(o['colour']), SHAPES.index(o['shape']), o['x'], o['y']) for o in scene['objects']]
