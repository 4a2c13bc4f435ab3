"""Packs questions and answers into rows of tokens.

A row holds a shared prefix (a system message, a picture or several) and after it many questions, each of which
sees the prefix and itself: one look at a picture serves a dozen questions. Rows where the question stands before
the picture have no prefix; there each segment is complete in itself.
"""
import random

import numpy as np
from tokenizers import Tokenizer

import questions as q

LENGTH = 400
BATCH = {(2, 2): 128, (2, 1): 52, (1, 2): 60, (1, 1): 16}    # pictures of each tiling in a batch
ROWS = {'one': 208, 'before': 56, 'several': 64, 'text': 8}
TILES = sum(n * (c * r + (c * r > 1)) for (c, r), n in BATCH.items())
TILE_TOKENS = 16
LABELS = 28672
OBJECTS = 6 * 2 * sum(BATCH.values())
KINDS = q.KINDS + ['several', 'text']
TURN = '<|im_end|>\n<|im_start|>assistant\n'


class Packer:
    def __init__(self, tokenizer, seed):
        self.tokenizer = Tokenizer.from_file(str(tokenizer))
        self.rng = random.Random(seed)
        self.cache = {}
        self.image = self.tokenizer.token_to_id('<IMG_CONTEXT>')
        self.pad = self.tokenizer.token_to_id('<|endoftext|>')
        self.pools = {g: [] for g in BATCH}

    def add (self, grid, first_tile, objects):
        self.pools[grid].append((first_tile, objects))

    def ids (self, text):
        found = self.cache.get(text)
        if found is None:
            found = self.tokenizer.encode(text, add_special_tokens=False).ids
            if len(self.cache) < 400_000:
                self.cache[text] = found
        return found

    def pictures (self):
        """A batch of pictures, mirrored at random: tile numbers, flips, targets of the auxiliary loss, scenes."""
        rng = self.rng
        order, flips, targets, pictures = [], [], [], []
        for (cols, rows), number in BATCH.items():
            pool = self.pools[cols, rows]
            for first, objects in (pool[rng.randrange(len(pool))] for _ in range(number)):
                fh, fv = rng.random() < 0.5, rng.random() < 0.5
                start, n = len(order), cols * rows
                for r in range(rows):
                    for c in range(cols):
                        order.append(first + (rows - 1 - r if fv else r) * cols + (cols - 1 - c if fh else c))
                if n > 1:
                    order.append(first + n)
                tiles = len(order) - start
                flips += [(fh, fv)] * tiles
                scene = []
                for colour, shape, x, y in objects:
                    x, y = 1 - x if fh else x, 1 - y if fv else y
                    scene.append({'colour': q.COLOURS[colour], 'shape': q.SHAPES[shape], 'x': x, 'y': y})
                    what = colour * 5 + shape
                    u, v = x * cols, y * rows
                    spots = [(start + min(rows - 1, int(v)) * cols + min(cols - 1, int(u)), u % 1, v % 1)]
                    if n > 1:
                        spots.append((start + n, x, y))
                    for tile, tx, ty in spots:
                        token = tile * TILE_TOKENS + min(3, int(ty * 4)) * 4 + min(3, int(tx * 4))
                        targets.append((token, what, 40 + min(2, int(ty * 3)) * 3 + min(2, int(tx * 3))))
                pictures.append((list(range(start * TILE_TOKENS, (start + tiles) * TILE_TOKENS)), scene))
        return order, flips, targets, pictures

    def question (self, ask):
        """Token ids of what stands between prefix and answer, of the answer, and the kind; now and then with a second turn."""
        text, answer, kind = ask()
        turns = [(text, answer, kind)]
        if self.rng.random() < 0.12:
            turns.append(ask())
        return turns

    def ask_one (self, scene):
        while True:
            kind = self.rng.choices(q.KINDS, q.WEIGHTS)[0]
            found = q.ask(self.rng, scene, kind)
            if found:
                return q.vary(self.rng, found[0]), found[1], kind

    def ask_picture (self, scene):
        if self.rng.random() < 0.03:
            text, answer = q.ask_beside(self.rng)
            return q.vary(self.rng, text), answer, 'text'
        return self.ask_one(scene)

    def ask_several (self, scenes):
        text, answer = q.ask_several(self.rng, scenes)
        return q.vary(self.rng, text), answer, 'several'

    def ask_text (self):
        text, answer = q.ask_text(self.rng)
        return q.vary(self.rng, text), answer, 'text'

    def batch (self):
        rng = self.rng
        order, flips, targets, pictures = self.pictures()
        total = sum(ROWS.values())
        ids = np.full((total, LENGTH), self.pad, np.int16)
        feats = np.full((total, LENGTH), -1, np.int32)
        positions = np.zeros((total, LENGTH), np.int16)
        segments = np.full((total, LENGTH), -1, np.int8)
        labels = []    # (flat index, next token, weight, kind, segment key)
        row = 0

        def system ():
            return '<|im_start|>system\n' + rng.choice(q.SYSTEMS) + '<|im_end|>\n' if rng.random() < 0.12 else ''

        def put (at, base, segment, tokens, features):
            n = len(tokens)
            ids[row, at:at + n] = tokens
            if features:
                feats[row, at:at + n] = features
            positions[row, at:at + n] = np.arange(base, base + n)
            segments[row, at:at + n] = segment

        def images (chosen):
            tokens, features = [], []
            for where, _ in chosen:
                a, b = self.ids('<img>'), self.ids('</img>\n')
                tokens += a + [self.image] * len(where) + b
                features += [-1] * len(a) + where + [-1] * len(b)
            return tokens, features

        def segment_of (head, head_features, turns, tail=((), ())):
            """head + question + tail + answers."""
            tokens, features, marks = list(head), list(head_features), []
            for i, (text, answer, kind) in enumerate(turns):
                if i:
                    extra = self.ids('\n<|im_start|>user\n')
                    tokens += extra
                    features += [-1] * len(extra)
                question = self.ids(text)
                tokens += question
                features += [-1] * len(question)
                if i == 0:
                    tokens += tail[0]
                    features += tail[1]
                reply = self.ids(TURN)
                out = self.ids(answer) + self.ids('<|im_end|>')
                weight = max(0.3, len(out) ** -0.5)
                start = len(tokens) + len(reply) - 1
                marks += [(start + j, t, weight, kind, i) for j, t in enumerate(out)]
                tokens += reply + out
                features += [-1] * (len(reply) + len(out))
            return tokens, features, marks

        def place (at, base, segment, made):
            tokens, features, marks = made
            put(at, base, segment, tokens, features)
            for offset, token, weight, kind, turn in marks:
                labels.append((row * LENGTH + at + offset, token, weight, KINDS.index(kind), (row * 64 + segment) * 2 + turn))

        for kind, number in ROWS.items():
            chosen = rng.sample(pictures, number) if kind == 'one' else None
            for i in range(number):
                at = base = 0
                if kind in ('one', 'several'):
                    group = [chosen[i]] if kind == 'one' else rng.sample(pictures, rng.choice((2, 2, 3, 3, 4)))
                    scenes = [scene for _, scene in group]
                    head = self.ids(system() + '<|im_start|>user\n')
                    tokens, features = images(group)
                    tokens, features = head + tokens, [-1] * len(head) + features
                    put(0, 0, 0, tokens, features)
                    at = base = len(tokens)
                misses, segment = 0, 0
                while misses < 3 and segment < 60:
                    segment += 1
                    if kind == 'one':
                        made = segment_of((), (), self.question(lambda: self.ask_picture(scenes[0])))
                    elif kind == 'several':
                        made = segment_of((), (), self.question(lambda: self.ask_several(scenes)))
                    elif kind == 'text':
                        head = self.ids(system() + '<|im_start|>user\n')
                        made = segment_of(head, [-1] * len(head), self.question(self.ask_text))
                    else:
                        head = self.ids(system() + '<|im_start|>user\n')
                        # Several pictures take most of a row: they come first in it.
                        group = rng.sample(pictures, rng.choice((2, 3, 4, 4)) if segment == 1 and rng.random() < 0.5 else 1)
                        scenes = [scene for _, scene in group]
                        ask = (lambda: self.ask_picture(scenes[0])) if len(scenes) == 1 else (lambda: self.ask_several(scenes))
                        made = segment_of(head, [-1] * len(head), self.question(ask), images(group))
                    if at + len(made[0]) > LENGTH:
                        misses += 1
                        segment -= 1
                        continue
                    place(at, base if kind in ('one', 'several') else 0, segment, made)
                    at += len(made[0])
                row += 1
        if len(labels) > LABELS:
            labels = rng.sample(labels, LABELS)
        labels += [(0, 0, 0, 0, 0)] * (LABELS - len(labels))
        targets = targets[:OBJECTS] + [(-1, 0, 0)] * (OBJECTS - len(targets))
        index, token, weight, kinds, keys = zip(*labels)
        return {
            'order': np.array(order, np.int32), 'flips': np.array(flips, bool), 'targets': np.array(targets, np.int32),
            'ids': ids, 'feats': feats, 'positions': positions, 'segments': segments,
            'index': np.array(index, np.int32), 'token': np.array(token, np.int16), 'weight': np.array(weight, np.float32),
            'kind': np.array(kinds, np.int8), 'key': np.array(keys, np.int32)
        }
