"""The rules of the policies in float64, each written from its formula over the list of all past raw keys and
values: what a chunk sees beside itself, without slots, rings or states."""

import math
import random
from dataclasses import dataclass, field

import torch

from rf_kernels.reference.streaming import rotate, token_positions


@dataclass
class Told:
    """A stream so far, and the chunk [begin, end) that is about to be seen.

    ``k``, ``v``: raw key and value ``[B, n, H, D]`` of every past frame; ``ends``: of all chunks, this one's
    the last; ``cuts``: first frames of the shots after the first; ``S``, ``W``: sizes; ``at``: position of
    every past frame.
    """

    S: int
    W: int
    k: dict = field(default_factory=dict)
    v: dict = field(default_factory=dict)
    q: dict = field(default_factory=dict)
    ends: list = field(default_factory=list)
    cuts: list = field(default_factory=list)
    grid: tuple = ()
    at: dict = field(default_factory=dict)
    text: list = field(default_factory=list)  # of every chunk, keys [B, T, H, D]

    @property
    def begin(self):
        return self.ends[-2] if len(self.ends) > 1 else 0

    @property
    def end(self):
        return self.ends[-1]

    def oldest(self, chunk=-1):
        """The window's first frame beside the sink, when a chunk is in."""
        return max(self.S, self.ends[chunk] - self.W)

    def gone(self):
        """Frames that left, chunk by chunk, where any did."""
        firsts = [self.S, *(self.oldest(i) for i in range(len(self.ends)))]
        pairs = zip(firsts[:-1], firsts[1:], strict=True)
        return [list(range(a, b)) for a, b in pairs if b > a]

    def asked(self, chunk):
        """Rotated queries of a chunk's last forward ``[B, tokens, H, D]``."""
        frames = range(self.ends[chunk - 1] if chunk else 0, self.ends[chunk])
        return torch.cat([rotate(self.q[f], token_positions([self.at[f]], self.grid)) for f in frames], 1)

    def window(self):
        return [(self.at[f], self.k[f], self.v[f]) for f in range(self.oldest(), self.begin)]

    def shift(self, span=None):
        return max(0, self.end - (span or self.S + self.W))

    def sink(self, frames, shift):
        return [(j + shift, self.k[j], self.v[j]) for j in frames if j < self.begin]


def static(told, rephase=True, span=None):
    return told.sink(range(told.S), told.shift(span) if rephase else 0) + told.window()


def linear(told, q, own_at, phi, span, dtype=torch.float64):
    """What stands beside the attention: a ratio of two means over the tokens that are W frames back. In a
    dtype other than float64: as PyTorch has it there, from keys rotated in float64, states first."""
    phi = {"relu": torch.relu, "softmax": lambda x: x.softmax(-1)}[phi]
    keys, values, counted, group = [], [], 0, 1
    for begin, end in zip([0, *told.ends[:-1]], told.ends, strict=True):
        for f in range(counted, min(begin, end - told.W)):
            keys.append((told.k[f], rotate(told.k[f], token_positions([f - max(0, end - span)], told.grid))))
            values.append(told.v[f])
            counted = f + 1
    if not counted:
        return torch.zeros_like(q)
    plain, rotated, values = (torch.cat(x, 1) for x in (*zip(*keys, strict=True), values))
    group = q.shape[2] // plain.shape[2]
    plain, rotated, values = (x.repeat_interleave(group, 2) for x in (plain, rotated, values))
    turned = rotate(q, token_positions([p - max(0, told.end - span) for p in own_at], told.grid))
    if dtype != torch.float64:
        q, turned, plain, rotated, values = (x.to(dtype) for x in (q, turned, plain, rotated, values))
        kv = torch.einsum("bkhd,bkhe->bhde", rotated, values) / plain.shape[1]
        z = phi(plain).mean(1)
        over, under = torch.einsum("bqhd,bhde->bqhe", turned, kv), torch.einsum("bqhd,bhd->bqh", phi(q), z)
        return over / (under + 1e-6).unsqueeze(-1)
    scores = torch.einsum("bqhd,bkhd->bhqk", turned, rotated)
    over = torch.einsum("bhqk,bkhd->bqhd", scores, values) / plain.shape[1]
    under = torch.einsum("bqhd,bkhd->bqh", phi(q), phi(plain)) / plain.shape[1]
    return over / (under + 1e-6).unsqueeze(-1)


def steady(told, alpha, held):
    average = {j: (told.k[j], told.v[j]) for j in range(told.S) if j < told.begin}
    for e in (e for frames in told.gone() for e in frames):
        j = (e - told.S) % told.S
        if j not in held:
            pairs = zip(average[j], (told.k[e], told.v[e]), strict=True)
            average[j] = tuple(alpha * a + (1 - alpha) * x for a, x in pairs)
    return [(j + told.shift(), *kv) for j, kv in average.items()] + told.window()


def two_rates(told, long, short, adaptive=False):
    S = told.S
    seen = told.sink(range(S - 2), told.shift())
    for j, rate in ((S - 2, long), (S - 1, short)):
        if j >= told.begin:
            continue
        memory = [told.k[j], told.v[j]]
        for frames in told.gone():
            means = [torch.stack([x[e] for e in frames]).mean(0) for x in (told.k, told.v)]
            a = torch.tensor(rate, dtype=torch.float64)
            if adaptive and j == S - 1:
                d = (means[0] - memory[0]).norm(dim=-1).mean(-1)
                a = (rate * (0.1 + 4.9 * d / (d.max(-1, keepdim=True).values + 1e-8)))[..., None, None]
            memory = [a * mean + (1 - a) * old for mean, old in zip(means, memory, strict=True)]
        seen.append((j + told.shift(), *memory))
    return seen + told.window()


def strided(told, memories, taps=None):
    first = told.S - memories
    pool = [(told.k[j], told.v[j]) for j in range(first, told.S) if j < told.begin]
    for frames in told.gone():
        row = pool + [(told.k[e], told.v[e]) for e in frames]
        size, more = divmod(len(row), memories)
        ends = [0]
        for i in range(memories):
            ends.append(ends[-1] + size + (i < more))
        pool = []
        for a, b in zip(ends[:-1], ends[1:], strict=True):
            w = taps or [1 / (b - a)] * (b - a)
            pool.append(tuple(sum(w[i] * row[a + i][part] for i in range(b - a)) for part in (0, 1)))
    seen = [(first + i + told.shift(), *kv) for i, kv in enumerate(pool)]
    return told.sink(range(first), told.shift()) + seen + told.window()


def cyclic(told, bank):
    def copied(f):
        lap = list(range(bank)) + list(range(bank))[::-1]
        return lap[f % (2 * bank)]

    before = range(max(0, told.oldest() - told.S), min(told.oldest(), told.begin))
    return [(f, told.k[copied(f)], told.v[copied(f)]) for f in before] + told.window()


def important(told, frames):
    """Tokens are (position, key, value) of their own, one row each."""
    G, n = told.S - frames, told.grid[0] * told.grid[1]

    def rotated(fs):
        return [(rotate(told.k[f], token_positions([told.at[f]], told.grid)), told.v[f]) for f in fs]

    pool = [torch.cat(x, 1) for x in zip(*rotated(range(G, min(told.S, told.begin))), strict=True)]
    for chunk in range(len(told.ends)):
        gone = range(told.S if not chunk else told.oldest(chunk - 1), told.oldest(chunk))
        if gone:
            pool = [
                torch.cat([p, *x], 1) for p, x in zip(pool, zip(*rotated(gone), strict=True), strict=True)
            ]
            phi = torch.einsum("bqhd,bkhd->bk", told.asked(chunk - 1), pool[0])
            order = phi.argsort(dim=1, descending=True)[:, : frames * n]
            pool = [torch.stack([x[o] for x, o in zip(p, order, strict=True)]) for p in pool]
    return told.sink(range(G), told.shift()) + told.window() + ([(None, *pool)] if pool else [])


def merged(told, frames, threshold, rephase=True, most=math.inf):
    """One sample after the other, token by token. A place is [key, value, number of tokens, last frame]."""
    G, n = told.S - frames, told.grid[0] * told.grid[1]
    if not told.gone():
        return static(told, rephase)
    entering = [*range(G, told.S), *(f for frames in told.gone() for f in frames)]
    keys, values, weights = [], [], []
    for b in range(len(told.k[0])):
        places = [None] * (frames * n)
        for f in entering:
            position = told.S - 1 + told.shift() if rephase else told.at[f]
            key = rotate(told.k[f], token_positions([position], told.grid))[b]
            joined, coming = {}, []
            for u in range(n):
                like = {
                    j: torch.cosine_similarity(key[u].flatten(), place[0].flatten(), dim=0).item()
                    for j, place in enumerate(places)
                    if place is not None
                }
                j = max(like, key=like.get, default=None)
                if j is not None and like[j] >= threshold:
                    joined.setdefault(j, []).append(u)
                else:
                    coming.append(u)
            for j, tokens in joined.items():
                k, v, m, _ = places[j]
                k, v = (
                    (m * x + y[tokens].sum(0)) / (m + len(tokens)) for x, y in ((k, key), (v, told.v[f][b]))
                )
                places[j] = [k, v, m + len(tokens), f]
            oldest = sorted(range(len(places)), key=lambda j: places[j][3] if places[j] else -1)
            for u, j in zip(coming, oldest, strict=False):
                places[j] = [key[u], told.v[f][b, u], 1, f]
        empty = [torch.zeros_like(key[0]), torch.zeros_like(key[0]), 0, -1]
        k, v, m, _ = zip(*(place or empty for place in places), strict=True)
        keys.append(torch.stack(k))
        values.append(torch.stack(v))
        weights.append(torch.tensor(m, dtype=torch.float64).clamp(max=most).log())
    memory = (None, *(torch.stack(x) for x in (keys, values, weights)))
    return told.sink(range(G), told.shift() if rephase else 0) + told.window() + [memory]


def recalled(told, frames, weight, tau):
    """One sample after the other, frame by frame."""
    G, B = told.S - frames, len(told.k[0]) if told.k else 0
    if told.begin < told.S:
        return static(told)

    def like(x, trusted):
        mean, std, to = x.mean(0), x.std(0, unbiased=False), torch.cat(trusted)
        return (1 - tau) * x + tau * (to.std(0, unbiased=False) * (x - mean) / std + to.mean(0))

    memory = [[(f, told.k[f][b], told.v[f][b]) for f in range(G, told.S)] for b in range(B)]
    for chunk in range(1, len(told.ends)):
        gone = range(told.oldest(chunk - 1), told.oldest(chunk))
        asked = range(told.ends[chunk - 2] if chunk > 1 else 0, told.ends[chunk - 1])
        for b in range(B if gone else 0):
            pool = memory[b] + [(f, told.k[f][b], told.v[f][b]) for f in gone]
            q = torch.cat([told.q[f][b] for f in asked])
            pairs = [torch.einsum("qhd,khd->hqk", q, k).mean() / q.shape[-1] ** 0.5 for _, k, _ in pool]
            mass = torch.stack(pairs).softmax(0).tolist()
            names = [f for f, _, _ in pool]
            s = max(1.0, 0.5 * (max(names) - min(names) + 1))
            near = [
                max(math.exp(-abs(f - g) / s) * m for g, m in zip(names, mass, strict=True) if g != f)
                for f in names
            ]
            score = [m + weight * max(0.0, 1 - x) for m, x in zip(mass, near, strict=True)]
            best = sorted(sorted(range(len(pool)), key=lambda i: -score[i])[:frames])
            sides = [
                [x[b] for x in side] for side in zip(*[(told.k[j], told.v[j]) for j in range(G)], strict=True)
            ]
            sides = sides or [[], []]
            trusted = [side + [m[1 + i] for m in memory[b]] for i, side in enumerate(sides)]
            memory[b] = [
                pool[i]
                if i < frames
                else (pool[i][0], like(pool[i][1], trusted[0]), like(pool[i][2], trusted[1]))
                for i in best
            ]
    seen = [
        (G + i + told.shift(), *(torch.stack([m[i][part] for m in memory]) for part in (1, 2)))
        for i in range(frames)
    ]
    return told.sink(range(G), told.shift()) + seen + told.window()


def routed(told, frames, every):
    """One sample after the other, every pair of a token of the text and one of a frame."""
    G = told.S - frames
    if told.begin < told.S:
        return told.sink(range(told.S), 0) + told.window()
    banks = []
    for b in range(len(told.k[0])):
        bank = list(range(G, told.S))
        for chunk in range(1, len(told.ends)):
            for e in range(told.oldest(chunk - 1), told.oldest(chunk)):
                if e % every:
                    continue

                def score(f, text=told.text[chunk][b], b=b):
                    k = rotate(told.k[f], token_positions([told.at[f]], told.grid))[b]
                    return float(torch.einsum("thd,khd->thk", text, k).mean())

                bank.remove(min(bank, key=score))
                bank.append(e)
        banks.append(bank)
    kept = [
        torch.stack([torch.stack([x[f][b] for f in bank]) for b, bank in enumerate(banks)])
        for x in ({f: rotate(told.k[f], token_positions([told.at[f]], told.grid)) for f in told.k}, told.v)
    ]
    seen = [(None, kept[0][:, i], kept[1][:, i]) for i in range(frames)]
    return told.sink(range(G), 0) + told.window() + seen


def placed(told, ahead=None, at=None):
    if told.begin < told.S:
        return static(told, rephase=False)
    place = [at if ahead is None else told.end - 1 + ahead + j for j in range(told.S)]
    return [(place[j], told.k[j], told.v[j]) for j in range(told.S)] + told.window()


def shots(told, pinned, offset=0, span=None, where="sink"):
    G, span = told.S - pinned, span or told.S + told.W
    shift = told.shift(span)
    if shift:
        shift += offset * len(told.cuts)
    seen = told.sink(range(G), shift)
    if not told.cuts:
        if told.end <= told.S + told.W:
            seen += told.sink(range(G, told.S), shift)
        return seen + told.window()
    shot = told.cuts[-1]
    base = G if where == "sink" else min(shot, span - (told.end - told.begin))
    for i in range(pinned):
        if shot + i < told.oldest():
            seen.append((base + i + shift, told.k[shot + i], told.v[shot + i]))
    return seen + told.window()


def rope_cut(told, jump, keep):
    window = []
    for begin, end in zip([0, *told.ends[:-1]], told.ends, strict=True):
        if begin in told.cuts and keep is not None:
            window = window[max(0, len(window) - keep) :]
        room = told.W - len([f for f in range(begin, end) if f >= told.S])
        window = window[max(0, len(window) - room) :] + [f for f in range(begin, end) if f >= told.S]
    shift = told.shift()
    if shift:
        shift += jump * len(told.cuts)
    past = [(told.at[f], told.k[f], told.v[f]) for f in window if f < told.begin]
    return told.sink(range(told.S), shift) + past


def log_bias(told, factor):
    weight = math.log(factor)
    seen = [(j, told.k[j], told.v[j], weight if j else 0.0) for j in range(told.S) if j < told.begin]
    return seen + [(*x, weight if x[0] else 0.0) for x in told.window()]


def random_history(told, keep, seed, sink=None, nearest=0):
    window, draw, anchors = told.window(), random.Random(f"{seed} {told.begin}"), range(told.S)
    if keep is not None:
        older, newest = window[: max(0, len(window) - nearest)], window[max(0, len(window) - nearest) :]
        window = [older[i] for i in sorted(draw.sample(range(len(older)), min(keep, len(older))))] + newest
    if sink is not None and told.gone():
        anchors = draw.sample(range(told.S), sink)
    return told.sink(anchors, 0) + window


def rolling(told, frames):
    first = max(0, told.end - frames)
    window = [
        (told.at[f], told.k[f], told.v[f]) for f in range(told.oldest(), told.begin) if f >= first + told.S
    ]
    return told.sink(range(told.S), first) + window


def short(told, frames):
    window = told.window()
    return told.sink(range(told.S), 0) + window[max(0, len(window) - frames) :]


def patches(told, cuts, keep, frames, memory, rephase=False, by=None):
    """One sample after the other. ``cuts``: patches of a frame; ``by``: whose keys tell likeness."""
    window, best, S, size = [], None, told.S, told.grid[0] * told.grid[1] // cuts

    def rotated(stream, f, b):
        return rotate(stream.k[f], token_positions([told.at[f]], told.grid))[b]

    for begin, end in zip([0, *told.ends[:-1]], told.ends, strict=True):
        own = [f for f in range(begin, end) if f >= S]
        excess = max(len(window) - frames, len(window) + len(own) - told.W, 0)
        gone, known = window[:excess], window
        if gone:
            best = []
            for b in range(len(told.k[0])):
                pool = []
                for f in (f for f in gone if f + 1 in known):
                    a, z = (rotated(by or told, g, b).flatten(1) for g in (f, f + 1))
                    like = torch.cosine_similarity(a, z, dim=1).split(size)
                    parts = zip(rotated(told, f, b).split(size), told.v[f][b].split(size), strict=True)
                    pool += [(x.mean().item(), tokens) for x, tokens in zip(like, parts, strict=True)]
                count = min(round(keep * len(pool)), memory * cuts)
                best.append([tokens for _, tokens in sorted(pool, key=lambda x: x[0])[:count]])
        window = window[excess:] + own
    seen = told.sink(range(S - memory), told.shift() if rephase else 0)
    seen += [(told.at[f], told.k[f], told.v[f]) for f in window if f < told.begin]
    if best and best[0]:
        seen.append((None, *(torch.stack([torch.cat([x[i] for x in b]) for b in best]) for i in (0, 1))))
    return seen


def state_slot(told, chunk):
    begin = told.begin
    state = [begin - chunk] if begin else []
    content = [f for f in range(begin) if f % chunk]
    room = told.W - chunk
    content = content[max(0, len(content) - room) :]
    seen = [f for f in content]  # the state before this chunk's has left
    assert not state or state[0] not in seen
    return [(told.at[f], told.k[f], told.v[f]) for f in seen]


def jumping(begin, frames, cuts, jump):
    """Positions that jump at every cut."""
    return [f + jump * sum(c <= f for c in cuts) for f in range(begin, begin + frames)]
