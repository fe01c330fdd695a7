"""How many instructions a memory-bound kernel issues for the bytes that it moves: a model, from machine code.

The usual kernels hold a few tokens in registers and go around one loop for them. Counted is the loop's
longest path that makes the 16-byte accesses of the call, and a turn's share of the longest path into the loop
and out of it. Inner loops count with the turns that the benchmark's shape gives them. Where warps have
different work, their paths are averaged. The longer side of every branch is taken, whatever the call takes:
the figure is an upper bound. dmd_gradient has two loops over tiles with a barrier of the grid in between: a
turn of both is counted, and what a warp does besides them stands beside it. The time that the schedulers need
to issue it is then set beside the time that the memory needs for the bytes.
"""

import re
from dataclasses import dataclass, replace

# An H200: what its schedulers issue a second (132 SMs, 4 a cycle, 1.755 GHz), and its memory's bandwidth as
# the vendor states it.
ISSUE_PER_SECOND = 132 * 4 * 1.755e9
BYTES_PER_SECOND = 4.8e12

_TARGET = re.compile(r"(0x[0-9a-f]+)\s*$")


def _edges(kernel):
    """Index -> indices that may come next."""
    code = kernel.instructions
    place = {address: i for i, (address, _) in enumerate(code)}
    edges, joins = [], {}
    for i, (address, text) in enumerate(code):
        op, target = text.split()[0].split(".")[0], _TARGET.search(text)
        following = [i + 1] if i + 1 < len(code) else []
        there = [place[int(target[1], 16)]] if target and int(target[1], 16) in place else []
        if op == "BSSY":
            joins[text.split()[1].rstrip(",")] = there
        if op in ("BRA", "BRX"):
            conditional = address in kernel.predicated or re.match(r"BRA\S*\s+!?U?P\d", text)
            edges.append([*there, *following] if conditional else there)
        elif op in ("EXIT", "RET"):
            edges.append(following if address in kernel.predicated else [])
        elif op == "BSYNC":
            edges.append(joins.get(text.split()[1]) or following)
        else:
            edges.append(following)
    return edges


def _order(edges):
    """Indices that the entry reaches, each after its followers; edges back into a loop leave ``edges``."""
    state, order, stack = {}, [], [(0, iter(edges[0]))]
    state[0] = "open"
    while stack:
        node, rest = stack[-1]
        for following in rest:
            if state.get(following) == "open":
                edges[node] = [e for e in edges[node] if e != following]
            elif following not in state:
                state[following] = "open"
                stack.append((following, iter(edges[following])))
                break
        else:
            state[node] = "done"
            order.append(node)
            stack.pop()
    return order


def _wide(text):
    return ".128" in text.split()[0], text.split(".")[0]


def loops(kernel) -> list:
    """(first, last) index of every loop, the smallest first."""
    place = {address: i for i, (address, _) in enumerate(kernel.instructions)}
    found = []
    for i, (_, text) in enumerate(kernel.instructions):
        target = _TARGET.search(text) if text.startswith("BRA") else None
        if target and place.get(int(target[1], 16), i) < i:
            found.append((place[int(target[1], 16)], i))
    return sorted(found, key=lambda loop: loop[1] - loop[0])


def part(kernel, first: int, last: int):
    """Instructions first .. last alone; the last one leaves."""
    code = list(kernel.instructions[first : last + 1])
    code[-1] = (code[-1][0], "EXIT")
    return replace(kernel, instructions=code, predicated=kernel.predicated - {code[-1][0]})


def longest_path(kernel, loads: int, stores: int, without: str | tuple = ""):
    """The instructions of the longest path with so many 16-byte global loads and stores, or None.
    ``without``: it has no instruction that begins so."""
    edges = _edges(kernel)
    if without:
        bad = {i for i, (_, text) in enumerate(kernel.instructions) if text.startswith(without)}
        edges = [[] if i in bad else [e for e in to if e not in bad] for i, to in enumerate(edges)]
    best = {}  # index -> {(loads, stores) from here to an exit: (length, next index)}
    for node in _order(edges):
        text = kernel.instructions[node][1]
        is_wide, op = _wide(text)
        own = (int(is_wide and op == "LDG"), int(is_wide and op == "STG"))
        found = {}
        ends = not edges[node] and text.split()[0].split(".")[0] in ("EXIT", "RET")
        tails = [(key, length, e) for e in edges[node] for key, (length, _) in best.get(e, {}).items()]
        if ends or (text.startswith("EXIT") and edges[node]):
            tails.append(((0, 0), 0, None))
        for key, length, following in tails:
            total = (key[0] + own[0], key[1] + own[1])
            if total[0] <= loads and total[1] <= stores and length + 1 > found.get(total, (0, None))[0]:
                found[total] = (length + 1, following)
        best[node] = found
    node, key, path = 0, (loads, stores), []
    while node is not None:
        if key not in best.get(node, {}):
            return None
        text = kernel.instructions[node][1]
        path.append(text)
        is_wide, op = _wide(text)
        following = best[node][key][1]
        key = (key[0] - int(is_wide and op == "LDG"), key[1] - int(is_wide and op == "STG"))
        node = following
    return path


def loads_in_flight(path) -> int:
    """The most 16-byte loads of a thread that are under way before one of them is waited for."""
    waiting, most = [], 0  # registers of each load
    for text in path:
        operands = text.split(None, 1)[1] if " " in text else ""
        registers = [int(r) for r in re.findall(r"\bR(\d+)\b", operands)]
        is_wide, op = _wide(text)
        stores = text.startswith(("STG", "STS", "ST."))
        first, read = ([], registers) if stores else (registers[:1], registers[1:])
        for i, held in reversed(list(enumerate(waiting))):
            if held & set(read) or (not (is_wide and op == "LDG") and held & set(first)):
                waiting = waiting[i + 1 :]
                break
        if is_wide and op == "LDG" and first:
            waiting.append(set(range(first[0], first[0] + 4)))
            most = max(most, len(waiting))
    return most


def _sums_on(path_of, kernel, turns) -> int:
    """What further turns of the loops that sum four numbers a turn add, where the path goes through them."""
    sums = [
        (first, last)
        for first, last in sorted(loops(kernel))
        if sum(text.startswith("LDS") for _, text in kernel.instructions[first : last + 1]) == 4
        and last - first < 40
    ]
    texts = set(path_of)
    more = 0
    for (first, last), n in zip(sums, turns, strict=False):
        if kernel.instructions[last][1] in texts:
            more += (n - 1) * (last - first + 1)
    return more


@dataclass
class Issue:
    """Of one kernel, for a turn of its loop: instructions of a warp, bytes that it moves between memory and
    SM, loads in flight."""

    instructions: float
    nbytes: int  # of a warp
    in_flight: int
    once: float = 0  # of a warp besides the loops, where it is not part of `instructions`
    turns: float = 1  # of the loops

    @property
    def per_16_bytes(self) -> float:
        """Instructions of a thread for 16 bytes that it moves."""
        return self.instructions / (self.nbytes / 32 / 16)

    @property
    def issue_over_bytes(self) -> float:
        """Time to issue over time to move, on the device above."""
        return (self.instructions / ISSUE_PER_SECOND) / (self.nbytes / BYTES_PER_SECOND)

    @property
    def all_over_bytes(self) -> float:
        """The same with what is done once."""
        return replace(self, instructions=self.instructions + self.once / self.turns).issue_over_bytes


@dataclass(frozen=True)
class Usual:
    """A call of the benchmark's shapes: 12 heads of 128, one source a sink frame, weights like the data."""

    label: str
    kernel: str  # part of the kernel's name
    loads: int  # 16-byte accesses of a thread in a turn of the loop
    stores: int
    turns: int  # of the loop
    most: int  # instructions a turn, at most
    in_flight: int  # loads under way, at least
    before: int = 0  # 16-byte loads before the loop: weights, which stay in the L2
    sums: tuple = ()  # turns of the inner loops that sum four numbers at once
    # Shares of the warps, and what the paths of each are without.
    roles: tuple = ((1.0, ""),)


def issue(kernel, usual: Usual) -> Issue | None:
    """Of a kernel in its usual call; None where it has no such loop."""
    found = []
    for first, last in loops(kernel):
        inside = part(kernel, first, last)
        if longest_path(inside, usual.loads, usual.stores) is None:
            continue
        total = 0.0
        for share, without in usual.roles:
            path = longest_path(inside, usual.loads, usual.stores, without)
            total += share * (len(path) + _sums_on(path, inside, usual.sums))
        found.append((total, first, last, longest_path(inside, usual.loads, usual.stores)))
    if not found:
        return None
    # The straight way: beside it there may be a loop with every question, and loops around both.
    total, first, last, path = min(found)
    into = longest_path(part(kernel, 0, first), usual.before, 0)
    out = longest_path(part(kernel, last + 1, len(kernel.instructions) - 1), 0, 0) or []
    total += (len(into) + len(out)) / usual.turns
    return Issue(total, (usual.loads + usual.stores) * 16 * 32, loads_in_flight(path))


# rope_append: two tokens a turn. 8 units and 12 heads are summed; of the three warps of a block one forms the
# scales.
_ROPE = dict(loads=12, stores=12, turns=3, in_flight=12, before=4, sums=(2, 3))
_ROPE["roles"] = ((1 / 3, ""), (2 / 3, "MUFU.RSQ"))
_EVICT = "evict_held_kernel<rf::bf16, (rf::EmaState)"
USUAL = (
    Usual("rope_append, bfloat16", "rope_append_held_kernel<rf::bf16, 8, true>", most=1160, **_ROPE),
    Usual("rope_append, float16", "rope_append_held_kernel<rf::f16, 8, true>", most=1160, **_ROPE),
    Usual(
        "rope_append, float32", "rope_append_held_kernel<float, 4, true>", most=780, **(_ROPE | {"before": 4})
    ),
    Usual("ema_evict, bfloat16, compensated", _EVICT + "0, 8>", 6, 5, 6, 530, 6),
    Usual("ema_evict, bfloat16, state float32", _EVICT + "1, 8>", 6, 6, 6, 300, 6),
    Usual("ema_evict, bfloat16, published", _EVICT + "2, 8>", 4, 3, 6, 310, 4),
    Usual("ema_evict, float32", "evict_held_kernel<float, (rf::EmaState)2, 4>", 4, 3, 6, 190, 4),
)


@dataclass(frozen=True)
class Passes:
    """A call whose tiles go through two loops: of one kernel, or of two launches."""

    label: str
    loops: tuple  # of each: part of the kernel's name, 16-byte loads and stores of a turn
    turns: float  # of each loop in a block, for the benchmark's shape
    most: int  # instructions a turn of both, at most
    in_flight: int  # loads under way in each loop that loads, at least
    once: int  # instructions of a warp besides the loops, at most


_ONE_WARP = ("MUFU.RCP64H", "STG.E.64 ", "ATOM.E.")


def once(kernel, found) -> float:
    """Instructions of the longest way through the loops (first, last, path) ``found`` of a kernel, without
    theirs: what a warp does once a launch. One warp of eight does what a block needs once (divisions, the
    sums of tiles, the grid's barrier). The way ends where all blocks but the last one leave."""
    code = kernel.instructions
    ticket = next((i for i, (_, text) in enumerate(code) if text.startswith("ATOMG")), len(code))
    leave = (
        i for i, (a, text) in enumerate(code) if i > ticket and text == "EXIT" and a in kernel.predicated
    )
    kernel = part(kernel, 0, next(leave, len(code) - 1))
    loads = sum(_accesses(path, "LDG") for *_, path in found)
    stores = sum(_accesses(path, "STG") for *_, path in found)
    one, others = (longest_path(kernel, loads, stores, without) for without in ("", _ONE_WARP))
    return len(one) / 8 + len(others) * 7 / 8 - sum(len(path) for *_, path in found)


def _accesses(path, op) -> int:
    return sum(_wide(text) == (True, op) for text in path)


def issue_of_passes(kernels, passes: Passes) -> Issue | None:
    """Of a turn of both loops; None where one of them is missing."""
    total, in_flight, ways = 0, [], {}
    for name, loads, stores in passes.loops:
        kernel = next((k for k in kernels if name in k.name), None)
        inside = [
            (first, last, path)
            for first, last in (loops(kernel) if kernel else ())
            if (path := longest_path(part(kernel, first, last), loads, stores)) is not None
        ]
        if not inside:
            return None
        way = min(inside, key=lambda x: len(x[2]))
        total += len(way[2])
        in_flight += [loads_in_flight(way[2])] if loads else []
        ways.setdefault(name, (kernel, []))[1].append(way)
    besides = sum(once(kernel, found) for kernel, found in ways.values())
    accesses = sum(loads + stores for _, loads, stores in passes.loops)
    return Issue(total, accesses * 16 * 32, min(in_flight), besides, passes.turns)


# dmd_gradient: two vectors of x, fake, real and unconditional a turn; while the differences fit in shared
# memory the second loop stores alone, else it reads the predictions again.
_DMD = "dmd_straight_kernel<{}, (rf::dmd_gradient::Mode){}>"


def _dmd(dtype, label, resident, launches):
    one, measure, finish = (_DMD.format(dtype, mode) for mode in range(3))
    return (
        Passes(f"dmd_gradient, {label}", ((one, 8, 0), (one, 0, 2)), *resident),
        Passes(f"dmd_gradient, {label}, two launches", ((measure, 8, 0), (finish, 6, 2)), *launches),
    )


# Of a latent of 21 frames a block has 4 of 1,024 tiles; of four of them, in two launches, 15.5.
PASSES = (
    *_dmd("rf::bf16", "bfloat16", (2, 465, 8, 540), (7.75, 555, 6, 560)),
    *_dmd("rf::f16", "float16", (2, 465, 8, 550), (7.75, 555, 6, 600)),
    *_dmd("float", "float32", (4, 240, 8, 400), (15.5, 280, 6, 420)),
)
AIM = 0.5  # issue time over byte time


def figures(found) -> dict:
    """label -> Issue (None: no such path) of the usual calls with kernels among ``found``, for sm_90a."""
    kernels = [k for k in found if k.arch == "sm_90a"]
    seen = {usual.label: issue(k, usual) for usual in USUAL for k in kernels if usual.kernel in k.name}
    for passes in PASSES:
        if any(name in k.name for name, *_ in passes.loops for k in kernels):
            seen[passes.label] = issue_of_passes(kernels, passes)
    return seen


def table(found) -> str:
    """One line per usual call."""
    title = "usual call, a turn of its loop"
    lines = [f"{title:36s} instructions  per 16 bytes  loads in flight  issue / bytes  once  with that"]
    for label, x in figures(found).items():
        if x is not None:
            row = f"{x.instructions:12.0f}  {x.per_16_bytes:12.1f}  {x.in_flight:15d}"
            besides = f"  {x.once:4.0f}  {x.all_over_bytes:9.2f}" if x.once else ""
            lines.append(f"{label:36s} {row}  {x.issue_over_bytes:13.2f}{besides}")
    return "\n".join(lines)


def check(found) -> list[str]:
    """What has become longer, or has fewer loads under way, than it was, or misses the aim."""
    wrong, seen = [], figures(found)
    for usual in (*USUAL, *PASSES):
        if usual.label not in seen:
            continue
        x = seen[usual.label]
        if x is None:
            both = (
                [x[1:] for x in usual.loops] if isinstance(usual, Passes) else [(usual.loads, usual.stores)]
            )
            ways = " and ".join(f"{loads} loads and {stores} stores" for loads, stores in both)
            wrong.append(f"{usual.label}: no loop with {ways}")
        elif x.instructions > usual.most:
            wrong.append(f"{usual.label}: up to {x.instructions:.0f} instructions, intended {usual.most}")
        elif x.in_flight < usual.in_flight:
            wrong.append(f"{usual.label}: {x.in_flight} loads in flight, intended {usual.in_flight}")
        elif isinstance(usual, Passes) and x.once > usual.once:
            wrong.append(f"{usual.label}: up to {x.once:.0f} instructions besides, intended {usual.once}")
        elif x.issue_over_bytes > AIM:
            wrong.append(f"{usual.label}: {x.issue_over_bytes:.2f} of the byte time, intended {AIM}")
    return wrong
