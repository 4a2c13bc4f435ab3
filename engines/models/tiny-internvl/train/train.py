"""Trains the tiny model and exports it. One command, on a machine with a CUDA card and a dozen cores:

    python train.py --out .. --minutes 15

Processes draw scenes while training has begun; their tiles stay in the card's memory as bytes. Other processes
pack questions about them into rows. The learning rate follows the clock, so that a run takes the time it is given.
"""
import argparse
import json
import math
import os
import pickle
import queue
import random
import shutil
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

import model as m
import rows
import scenes

CHUNK = 200
TYPES = 40 + 9


def drawer (seed, first, step, total, folder, done):
    """Draws every step-th chunk of scenes into a file each."""
    for chunk in range(first, total // CHUNK, step):
        tiles, metas, count = [], [], 0
        for i in range(CHUNK):
            grid, t, objects = scenes.draw(f'{seed}:{chunk * CHUNK + i}')
            if grid not in rows.BATCH:
                continue
            metas.append((grid, count, objects))
            tiles.append(t)
            count += len(t)
        path = f'{folder}/tiles-{chunk}.npy'
        np.save(path, np.concatenate(tiles))
        done.put((path, metas, count))


def packer (seed, tokenizer, folder, out, stop):
    """Makes batches of the scenes announced so far."""
    pack = rows.Packer(tokenizer, seed)
    seen = 0
    while not stop.is_set():
        while os.path.exists(f'{folder}/meta-{seen}.pkl'):
            with open(f'{folder}/meta-{seen}.pkl', 'rb') as f:
                for grid, first, objects in pickle.load(f):
                    pack.add(grid, first, objects)
            seen += 1
        if any(len(p) < 20 for p in pack.pools.values()):
            time.sleep(0.05)
            continue
        batch = {k: torch.from_numpy(v) for k, v in pack.batch().items()}
        while not stop.is_set():
            try:
                out.put(batch, timeout=1)
                break
            except queue.Full:
                pass


class Muon:
    """Momentum, orthogonalised (Newton-Schulz); matrices of one shape go through it together."""

    def __init__(self, params, decay=0.02, momentum=0.95):
        self.groups, self.decay, self.momentum = {}, decay, momentum
        for p in params:
            self.groups.setdefault(tuple(p.shape), []).append(p)
        self.state = {s: torch.zeros(len(ps), *s, device=ps[0].device) for s, ps in self.groups.items()}

    @torch.no_grad()
    def step (self, lr):
        for shape, params in self.groups.items():
            g = torch.stack([p.grad for p in params]).float()
            buf = self.state[shape]
            buf.lerp_(g, 1 - self.momentum)
            x = g.lerp(buf, self.momentum).bfloat16()
            tall = shape[0] > shape[1]
            x = x.transpose(1, 2) if tall else x
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                a = x @ x.transpose(1, 2)
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = (x.transpose(1, 2) if tall else x).float() * (0.2 * max(shape) ** 0.5)
            torch._foreach_mul_(params, 1 - lr * self.decay)
            torch._foreach_add_(params, list(x.unbind(0)), alpha=-lr)


class Trainer(nn.Module):
    """The model, and heads of an auxiliary loss: which objects have their centre in the cell of each image token, and where."""

    def __init__(self):
        super().__init__()
        self.net = m.TinyInternVL()
        self.aux = nn.Linear(m.HIDDEN, TYPES)
        nn.init.constant_(self.aux.bias, -4)
        self.register_buffer('mean', torch.tensor(m.MEAN).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer('std', torch.tensor(m.STD).view(1, 3, 1, 1) * 255, persistent=False)

    def pixels (self, tiles, flips):
        x = tiles.permute(0, 3, 1, 2)
        x = torch.where(flips[:, 0].view(-1, 1, 1, 1), x.flip(3), x)
        x = torch.where(flips[:, 1].view(-1, 1, 1, 1), x.flip(2), x)
        x = x.float()
        if self.training:
            n = x.shape[0]
            gain = 1 + 0.03 * torch.randn(n, 1, 1, 1, device=x.device)
            shift = 3 * torch.randn(n, 3, 1, 1, device=x.device)
            x = (x * gain + shift).clamp(0, 255)
        return (x - self.mean) / self.std

    def forward (self, tiles, b):
        features = self.net.see(self.pixels(tiles, b['flips']))
        flat = features.reshape(-1, m.HIDDEN)
        target = torch.zeros(flat.shape[0] + 1, TYPES, device=flat.device)
        token = b['targets'][:, 0].long()
        token = torch.where(token < 0, flat.shape[0], token)
        target[token, b['targets'][:, 1].long()] = 1
        target[token, b['targets'][:, 2].long()] = 1
        aux = F.binary_cross_entropy_with_logits(self.aux(flat).float(), target[:-1], reduction='sum') / flat.shape[0]
        index = b['feats'].long()
        x = self.net.model.language_model.embed_tokens(b['ids'].long())
        x = torch.where((index >= 0).unsqueeze(-1), flat[index.clamp(min=0)].float(), x)
        s = b['segments']
        length = s.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=s.device).tril()
        see = ((s[:, :, None] == s[:, None, :]) | (s[:, None, :] == 0)) & causal
        mask = torch.zeros(see.shape, dtype=torch.bfloat16 if s.is_cuda else torch.float32, device=s.device).masked_fill_(~see, float('-inf'))[:, None]
        x = self.net.read(x, b['positions'], mask)
        x = x.reshape(-1, m.HIDDEN)[b['index'].long()]
        logits = self.net.lm_head(x).float()
        loss = F.cross_entropy(logits, b['token'].long(), reduction='none')
        answer = (loss * b['weight']).sum() / b['weight'].sum()
        return answer, aux, logits


def exact (logits, b):
    """Share of answers with every token right (the right ones before it given), by kind."""
    valid = b['weight'] > 0
    right = (logits.argmax(-1) == b['token'].long())[valid].long()
    keys, kinds = b['key'][valid].long(), b['kind'][valid].long()
    whole = torch.ones(int(keys.max()) + 1, dtype=torch.long, device=keys.device).scatter_reduce(0, keys, right, 'amin')
    kind = torch.full_like(whole, -1).scatter(0, keys, kinds)
    return {name: round(float(whole[kind == i].float().mean()), 4) for i, name in enumerate(rows.KINDS) if (kind == i).any()}


def main ():
    parser = argparse.ArgumentParser()
    parser.add_argument('--out', default='..', help='the model folder; tokenizer.json is built there')
    parser.add_argument('--minutes', type=float, default=15)
    parser.add_argument('--steps', type=int, default=0, help='a number of steps in place of a time')
    parser.add_argument('--scenes', type=int, default=250_000)
    parser.add_argument('--drawers', type=int, default=max(1, (os.cpu_count() or 2) - 5))
    parser.add_argument('--packers', type=int, default=max(1, min(9, (os.cpu_count() or 2) // 2)))
    parser.add_argument('--lr', type=float, default=1.5e-3)
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--resume', help='a checkpoint to go on from')
    parser.add_argument('--checkpoint', default='checkpoint.pt')
    parser.add_argument('--save-every', type=float, default=120, help='seconds')
    parser.add_argument('--no-compile', action='store_true')
    parser.add_argument('--no-export', action='store_true')
    args = parser.parse_args()
    start = time.time()
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    torch.set_float32_matmul_precision('high')
    out = Path(args.out)
    if not (out / 'tokenizer.json').exists():
        import tokenizer
        tokenizer.build(out)

    mp.set_start_method('fork')
    mp.set_sharing_strategy('file_system')
    folder = tempfile.mkdtemp(dir='/dev/shm' if os.path.isdir('/dev/shm') else None)
    drawn, batches, stop = mp.Queue(), mp.Queue(24), mp.Event()
    workers = [mp.Process(target=drawer, args=(args.seed, i, args.drawers, args.scenes, folder, drawn), daemon=True) for i in range(args.drawers)]
    workers += [mp.Process(target=packer, args=(args.seed * 1000 + i, out / 'tokenizer.json', folder, batches, stop), daemon=True) for i in range(args.packers)]
    for w in workers:
        w.start()

    tiles = torch.empty(int(args.scenes * 4.15) + 10_000, m.TILE, m.TILE, 3, dtype=torch.uint8, device=device)
    state = {'tiles': 0, 'chunks': 0, 'scenes': 0}

    def upload ():
        stream = torch.cuda.Stream() if device.type == 'cuda' else None
        while not stop.is_set() and state['chunks'] < args.scenes // CHUNK:
            try:
                path, metas, count = drawn.get(timeout=1)
            except queue.Empty:
                continue
            data = torch.from_numpy(np.load(path))
            os.unlink(path)
            at = state['tiles']
            if at + count > tiles.shape[0]:
                break
            if stream:
                with torch.cuda.stream(stream):
                    tiles[at:at + count].copy_(data)
                stream.synchronize()
            else:
                tiles[at:at + count].copy_(data)
            temporary = f'{folder}/meta-{state["chunks"]}.tmp'
            with open(temporary, 'wb') as f:
                pickle.dump([(grid, at + first, objects) for grid, first, objects in metas], f)
            os.rename(temporary, temporary[:-4] + '.pkl')
            state['tiles'] += count
            state['scenes'] += len(metas)
            state['chunks'] += 1
        print(f'[{time.time() - start:.0f} s] drawn: {state}', flush=True)
    threading.Thread(target=upload, daemon=True).start()

    trainer = Trainer().to(device)
    if args.resume:
        trainer.net.load_state_dict({k: v.float() for k, v in torch.load(args.resume, map_location='cpu').items()})
    if device.type == 'cuda' and not args.no_compile:
        # A layer at a time: one compilation serves them all.
        for layer in (*trainer.net.model.vision_tower.encoder.layer, *trainer.net.model.language_model.layers):
            layer.compile()
    matrices = [p for n, p in trainer.named_parameters() if p.dim() == 2 and 'embed_tokens' not in n and 'lm_head' not in n and 'aux' not in n]
    known = {id(p) for p in matrices}
    others = [p for p in trainer.parameters() if id(p) not in known]
    muon = Muon(matrices)
    adam = torch.optim.AdamW([
        {'params': [p for p in others if p.dim() > 1], 'weight_decay': 0.01},
        {'params': [p for p in others if p.dim() <= 1], 'weight_decay': 0.0}
    ], lr=args.lr, betas=(0.9, 0.95), fused=device.type == 'cuda')

    def save ():
        torch.save({k: v.half() for k, v in trainer.net.state_dict().items()}, args.checkpoint + '.tmp')
        os.rename(args.checkpoint + '.tmp', args.checkpoint)

    step, began, saved, logged, waited = 0, None, time.time(), time.time(), 0.0
    sums = torch.zeros(2, device=device)
    since = 0
    while True:
        t = time.time()
        batch = batches.get()
        waited += time.time() - t
        b = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
        del batch
        began = began or time.time()
        progress = step / args.steps if args.steps else (time.time() - began) / (args.minutes * 60)
        if progress >= 1:
            break
        warm = min(1, (step + 1) / 200)
        scale = warm * (0.5 * (1 + math.cos(math.pi * progress)) if progress < 1 else 0)
        lr = args.lr * scale
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda'):
            answer, aux, logits = trainer(tiles[b['order'].long()], b)
            # A checkpoint has no auxiliary heads: new ones would only disturb it.
            loss = answer + (0 if args.resume else 0.5 if progress < 0.5 else 0.2) * aux
        for p in trainer.parameters():
            p.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(others, 1.0, foreach=True)
        muon.step(lr)
        for group in adam.param_groups:
            group['lr'] = lr
        adam.step()
        sums += torch.stack((answer.detach(), aux.detach()))
        step += 1
        since += 1
        if step in (1, 2, 20, 100) or step % 500 == 0:
            mean = (sums / since).tolist()
            now = time.time()
            print(f'[{now - start:.0f} s] step {step} loss {mean[0]:.4f} aux {mean[1]:.4f} lr {lr:.2e} {(now - logged) / since * 1000:.1f} ms/step, '
                  f'waited {waited / since * 1000:.1f} ms, scenes {state["scenes"]}, {json.dumps(exact(logits.detach(), b))}', flush=True)
            sums.zero_()
            since, waited, logged = 0, 0.0, time.time()
        if time.time() - saved > args.save_every:
            save()
            saved = time.time()
    save()
    stop.set()
    print(f'[{time.time() - start:.0f} s] {step} steps', flush=True)
    for w in workers:
        w.kill()
    shutil.rmtree(folder, ignore_errors=True)
    if not args.no_export:
        import export
        net = m.TinyInternVL()
        net.load_state_dict({k: v.float() for k, v in torch.load(args.checkpoint, map_location='cpu').items()})
        export.export(out, net)
    print('finished', flush=True)


if __name__ == '__main__':
    main()
