"""Counts made on the device: what `jax_keep` keeps there is judged and added up, and only sums come to the host.

The k-grams of all visited states are numbered, and equal (group, state, next state) are added up by sorting; only
distinct ones leave, with their sums. Nothing is hashed: as many states fit as there are tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...outcomes import CODES, OUTCOMES
from ..rules import Rule
from ..sums import Added
from .jax_keep import Shelf
from .jax_sampling import compiled

__all__ = ["adder"]

MOST = 1 << 20
"""States that are sorted at once."""
WORD = 62
"""Bits of a number that is sorted by."""
NEVER = 1 << WORD
_LAST = CODES["truncated"]


@dataclass(frozen=True)
class Sizes:
    """What the program of sums is compiled for.

    Parameters
    ----------
    order : int
        Tokens in a state.
    rows, most : int
        Rollouts looked at together; sampled tokens of one.
    symbols : int
        Bits of a token.
    before : int
        Forced tokens that are looked at.
    codes : tuple of int
        Outcome code of each class that is summed, and its column among the masses.
    refusal_at : str
    """

    order: int
    rows: int
    most: int
    symbols: int
    before: int
    codes: tuple[tuple[int, int], ...]
    refusal_at: str

    @property
    def states(self) -> int:
        """Visited states, at most."""
        return self.rows * (self.most + 1)

    @property
    def bits(self) -> int:
        """Of the number of a state, or of one of the outcomes, which come behind all states."""
        return (self.states + len(OUTCOMES)).bit_length()

    @property
    def words(self) -> list[int]:
        """Symbols in each of the words that hold a state, the oldest first."""
        per = max(WORD // self.symbols, 1)
        return [min(per, self.order - at) for at in range(0, self.order, per)]


def _first(
    line: jax.Array, seen: jax.Array, single: jax.Array, longer: jax.Array, sizes: jax.Array, whole: bool
) -> jax.Array:
    """Index of the first match in each answer (`whole`: of its last token), or a number beyond all; shape (rows,)."""
    most = seen.shape[1]
    never, at = 2 * most, jnp.arange(most)
    new = line[:, line.shape[1] - most :]
    best = jnp.min(jnp.where(single[new] & seen, at, never), -1)
    before, width = line.shape[1] - most, longer.shape[1]

    def one(best: jax.Array, entry: Any) -> tuple[jax.Array, None]:
        ids, size = entry
        here = seen
        for back in range(width):
            want = ids[width - 1 - back]
            here &= (line[:, before - back : before - back + most] == want) | (want < -1)
        value = at if whole else jnp.maximum(at - size + 1, 0)
        return jnp.minimum(best, jnp.min(jnp.where(here, value, never), -1)), None

    return jax.lax.scan(one, best, (longer, sizes))[0] if len(longer) else best


def _judge(line: jax.Array, length: jax.Array, rule: dict[str, Any], s: Sizes) -> tuple[jax.Array, jax.Array]:
    """Outcome of each rollout and how many states it visits, up to the hit; 0 states where there is no rollout."""
    at, never = jnp.arange(s.most), 2 * s.most
    inside = at < length[:, None]
    end = jnp.min(jnp.where(rule["ends"][line[:, s.before :]] & inside, at, never), -1)
    seen = inside & (at < end[:, None])
    harm = _first(line, seen, *rule["harm"], whole=True)
    refusal = _first(line, seen, *rule["refusal"], whole=False)
    if s.refusal_at == "end":
        refusal = jnp.where(refusal < never, end, never)
    found = jnp.stack([harm, refusal, end]) < never
    outcome = jnp.where(found.any(0), found.argmax(0), _LAST).astype(jnp.int32)
    hit = jnp.stack([harm, refusal, end, length])[outcome, jnp.arange(len(length))]
    return outcome, jnp.where(length > 0, hit + 1, 0)


def _distinct(keys: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Distinct ones among sorted keys, at the front; the place of each key among them; how many there are."""
    real = keys < NEVER
    first = real & jnp.concatenate([jnp.ones(1, bool), keys[1:] != keys[:-1]])
    rank = jnp.where(real, jnp.cumsum(first) - 1, size)
    return jnp.zeros(size, keys.dtype).at[rank].set(keys, mode="drop"), rank, first.sum()


def _number(symbols: jax.Array, valid: jax.Array, s: Sizes) -> tuple[jax.Array, list[jax.Array], jax.Array]:
    """Number every visited state in the order of the labels; the words of each number, and how many there are."""
    words, lag = [], s.order
    for many in s.words:
        word = jnp.zeros(valid.shape, jnp.int64)
        for _ in range(many):
            word = (word << s.symbols) | symbols[:, s.before - lag : s.before - lag + s.most + 1].astype(jnp.int64)
            lag -= 1
        words.append(jnp.where(valid, word, NEVER).reshape(-1))
    if not words:
        return jnp.zeros(valid.shape, jnp.int64), [], jnp.ones((), jnp.int64)
    m = s.states
    *words, place = jax.lax.sort((*words, jnp.arange(m)), num_keys=len(words))
    real = words[0] < NEVER
    new = functools.reduce(jnp.logical_or, [w[1:] != w[:-1] for w in words])
    first = real & jnp.concatenate([jnp.ones(1, bool), new])
    rank = jnp.cumsum(first) - 1
    code = jnp.zeros(m, jnp.int64).at[place].set(rank)
    at = jnp.where(first, rank, m)
    return code.reshape(valid.shape), [jnp.zeros(m, jnp.int64).at[at].set(w, mode="drop") for w in words], first.sum()


def _sums(
    tokens: Sequence[jax.Array],
    masses: Sequence[jax.Array],
    begin: jax.Array,
    length: jax.Array,
    before: jax.Array,
    group: jax.Array,
    rule: dict[str, Any],
    *,
    s: Sizes,
) -> dict[str, Any]:
    """Every table of the rollouts `begin` to `begin` + rows; behind its size a table means nothing."""
    part = lambda x: jax.lax.dynamic_slice_in_dim(x, begin, s.rows)  # noqa: E731
    new = functools.reduce(jnp.add, map(part, tokens))  # a rollout is in one worker's array, 0 in the others
    line = jnp.concatenate([part(before), new], 1)
    outcome, visited = _judge(line, part(length), rule, s)
    at, m = jnp.arange(s.most + 1), s.states
    valid = at < visited[:, None]
    code, words, states = _number(line + 1, valid, s)
    group = part(group - group[begin]).astype(jnp.int64)[:, None]
    row = jnp.arange(s.rows, dtype=jnp.int64)[:, None]
    end = outcome.astype(jnp.int64)[:, None]
    last = at == visited[:, None] - 1
    target = jnp.where(last, m + end, jnp.roll(code, -1, 1))
    source = (group << s.bits) | code
    flat = lambda keys, mask=valid: jnp.where(mask, keys, NEVER).reshape(-1)  # noqa: E731
    moves, rank, size = _distinct(jnp.sort(flat((source << s.bits) | target)), m)
    zero = jnp.zeros(m, jnp.int32)
    out: dict[str, Any] = {"words": words, "sizes": {"states": states, "moves": size}}
    out["moves"] = moves, zero.at[rank].add(1, mode="drop")
    room = (s.rows - 1).bit_length()
    keys = jnp.sort(flat((((source << 2) | end) << room) | row))
    once = (keys < NEVER) & jnp.concatenate([jnp.ones(1, bool), keys[1:] != keys[:-1]])
    through, rank, out["sizes"]["through"] = _distinct(jnp.where(keys < NEVER, keys >> room, NEVER), m)
    out["through"] = through, zero.at[rank].add(once, mode="drop")
    out["ends"] = jnp.zeros((s.rows, len(OUTCOMES)), jnp.int32).at[group[:, 0], outcome].add(visited > 0)
    if s.codes:
        drawn = valid & ~(last & (end == _LAST))
        keys, place = jax.lax.sort((flat(source, drawn), jnp.arange(m)), num_keys=1)  # stable: added in their order
        _, rank, out["sizes"]["mass"] = _distinct(keys, m)
        out["mass"] = [_mass(masses, part, column, last & (end == c), place, rank) for c, column in s.codes]
    return out


def _mass(
    masses: Sequence[jax.Array], part: Any, column: int, hit: jax.Array, place: jax.Array, rank: jax.Array
) -> Any:
    """Sums of mass, of hit less mass, and of mass (1 - mass)."""
    mass = functools.reduce(jnp.add, [part(x)[:, :, column] for x in masses])
    mass = jnp.minimum(mass.astype(jnp.float64), 1.0)
    mass = jnp.pad(mass, ((0, 0), (0, 1))).reshape(-1)[place]
    values = mass, hit.reshape(-1)[place] - mass, mass * (1 - mass)
    return [jnp.zeros(len(rank)).at[rank].add(v, mode="drop", indices_are_sorted=True) for v in values]


def adder(shelf: Shelf, order: int, rule: Rule, group: np.ndarray) -> Callable[[], Iterator[Added]]:
    """Compile what adds up everything on the shelf, some rollouts at a time; to be called when all are sampled.

    Parameters
    ----------
    shelf : Shelf
    order : int
        Tokens in a state.
    rule : Rule
    group : int array, shape (n,)
        Of each rollout, rising in steps of at most one.
    """
    job, plan = shelf.plan.job, shelf.plan
    tables, longest = _tables(rule, plan.shape.config.vocab)
    rows = min(shelf.rows, 1 << max(0, (MOST // (job.max_tokens + 1)).bit_length() - 1))
    columns = {name: i for i, name in enumerate(job.classes)}
    codes = tuple((CODES[name], columns[name]) for name in sorted(OUTCOMES[:_LAST]) if name in columns)
    before = max(order, longest - 1)
    symbols = (plan.shape.config.vocab + 1).bit_length()
    s = Sizes(order, rows, job.max_tokens, symbols, before, codes, rule.refusal_at)
    program = _sums_program(shelf, s, tables)

    def fill(values: np.ndarray, blank: int) -> np.ndarray:
        spare = np.full((shelf.rows - len(job), *values.shape[1:]), blank)
        return np.concatenate([values, spare]).astype(np.int32)

    def run() -> Iterator[Added]:
        told = fill(shelf.length, 0), fill(_before(job.forced, before), -1), fill(group, int(group[-1]))
        here = plan.shape.home.sharding()  # the sums are made in one home
        kept = [jax.device_put(k.token, here) for k in shelf.kept], [jax.device_put(k.mass, here) for k in shelf.kept]
        for begin in range(0, len(job), rows):
            own = group[begin : begin + rows]
            first, last = int(own[0]), int(own[-1])
            with jax.enable_x64(True):  # of this thread, for as long as the block lasts
                out = program(*kept, np.int32(begin), *told, tables)
                part = _fetch(out, s, first, last + 1 - first, int(group[-1]) + 1, shelf.fetched)
            yield part

    return run


def _sums_program(shelf: Shelf, s: Sizes, tables: dict[str, Any]) -> Any:
    plan, rows, classes = shelf.plan, shelf.rows, len(shelf.plan.job.classes)
    spec = plan.shape.spec
    kept = (
        [spec(rows, s.most)] * plan.workers,
        [spec(rows, s.most, classes, dtype=jnp.float32)] * plan.workers,
    )
    rule = jax.tree.map(lambda x: spec(*x.shape, dtype=x.dtype), tables)
    arguments = (*kept, spec(), spec(rows), spec(rows, s.before), spec(rows), rule)

    def lower() -> Any:
        with jax.enable_x64(True):
            return jax.jit(functools.partial(_sums, s=s)).lower(*arguments)

    return compiled(("sums", s, plan.shape.home, str(arguments)), lower)


def _tables(rule: Rule, vocab: int) -> tuple[dict[str, Any], int]:
    """The rule as arrays: ids as masks of the vocabulary, longer sequences padded in front with -2, their sizes."""

    def mask(ids: Sequence[int]) -> np.ndarray:
        flags = np.zeros(vocab, bool)
        flags[[i for i in ids if i < vocab]] = True
        return flags

    def entries(sequences: Sequence[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        longer = [e for e in sequences if len(e) > 1]
        table = np.full((len(longer), max(map(len, longer), default=1)), -2, np.int32)
        for i, ids in enumerate(longer):
            table[i, table.shape[1] - len(ids) :] = ids
        return mask([e[0] for e in sequences if len(e) == 1]), table, np.array([len(e) for e in longer], np.int32)

    made = {"harm": entries(rule.harm), "refusal": entries(rule.refusal), "ends": mask(rule.ends)}
    return made, max(made["harm"][1].shape[1], made["refusal"][1].shape[1])


def _before(forced: Sequence[np.ndarray], size: int) -> np.ndarray:
    """The last `size` forced tokens of each rollout, -1 in front, shape (n, size)."""
    table = np.full((len(forced), size), -1, np.int32)
    for row, ids in zip(table, forced):
        many = min(len(ids), size)
        row[size - many :] = ids[len(ids) - many :]
    return table


def _fetch(out: dict[str, Any], s: Sizes, first: int, here: int, groups: int, fetched: list[int]) -> Added:
    """Bring the rows that mean something to the host, and take their keys apart."""

    def get(x: Any, size: int) -> np.ndarray:
        step = 1 << max(5, size.bit_length() - 3)  # few sizes, for each is a program; less than a quarter too much
        values = np.asarray(x[: min(-(-size // step) * step, x.shape[0])])
        fetched.append(values.nbytes)
        return values[:size]

    sizes = {name: int(size) for name, size in out["sizes"].items()}
    fetched.append(8 * len(sizes))
    mask, states = (1 << s.bits) - 1, sizes["states"]
    key, count = (get(x, sizes["moves"]) for x in out["moves"])
    target = key & mask
    target = np.where(target >= s.states, states + target - s.states, target)
    moves = {"group": (key >> 2 * s.bits) + first, "source": (key >> s.bits) & mask, "target": target, "count": count}
    key, count = (get(x, sizes["through"]) for x in out["through"])
    through = {"group": (key >> s.bits + 2) + first, "source": (key >> 2) & mask}
    through |= {"target": states + (key & 3), "count": count}
    outcomes = np.zeros((groups, len(OUTCOMES)), np.int64)
    outcomes[first : first + here] = get(out["ends"], here)
    tables = {"transitions": moves, "passages": through}
    if s.codes:
        drawn = target != states + _LAST  # to be cut off is no token
        pair = moves["group"][drawn] * states + moves["source"][drawn]
        begin = np.flatnonzero(np.diff(pair, prepend=-1))
        keys = {"group": moves["group"][drawn][begin], "source": moves["source"][drawn][begin]}
        steps = np.add.reduceat(moves["count"][drawn], begin) if len(begin) else np.zeros(0, np.int64)
        for (code, _), sums in zip(s.codes, out["mass"]):
            total, surprise, variance = (get(x, sizes["mass"]) for x in sums)
            values = {"total": total, "steps": steps, "surprise": surprise, "variance": variance}
            tables[f"mass_{OUTCOMES[code]}"] = keys | values
    return Added(_grams([get(w, states) for w in out["words"]], s, states), outcomes, tables)


def _grams(words: list[np.ndarray], s: Sizes, states: int) -> np.ndarray:
    """Tokens of each state, oldest first, -1 before the answer began, shape (states, order)."""
    columns = []
    for word, many in zip(words, s.words):
        columns += [(word >> s.symbols * back) & ((1 << s.symbols) - 1) for back in range(many - 1, -1, -1)]
    return np.stack(columns, 1).astype(np.int32) - 1 if columns else np.zeros((states, 0), np.int32)
