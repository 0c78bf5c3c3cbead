"""Compiled loops of `dissection`: breadth-first searches and the borders of fronts."""

from __future__ import annotations

import numpy as np

from ..compiled_kernels import njit

__all__ = ["borders", "broadest", "by_front", "dissect", "room", "split", "symmetric"]


@njit(cache=True)
def broadest(indptr, indices, limit):
    """Most states in a level of the search from state 0; 0 as soon as a level has more than `limit`."""
    n = len(indptr) - 1
    seen = np.zeros(n, np.bool_)
    queue = np.empty(n, np.int64)
    queue[0], seen[0] = 0, True
    low, high, most = 0, 1, 1
    while low < high:
        top = high
        for q in range(low, high):
            i = queue[q]
            for p in range(indptr[i], indptr[i + 1]):
                j = indices[p]
                if not seen[j]:
                    seen[j] = True
                    queue[top] = j
                    top += 1
            if top - high > limit:
                return 0
        most = max(most, top - high)
        low, high = high, top
    return most


@njit(cache=True)
def symmetric(indptr, indices):
    """Neighbours in either direction, each once, without the state itself."""
    n = len(indptr) - 1
    into = np.zeros(n + 1, np.int64)
    for p in range(indptr[n]):
        into[indices[p] + 1] += 1
    into = np.cumsum(into)
    heads, at = np.empty(indptr[n], np.int64), into[:-1].copy()
    for i in range(n):
        for p in range(indptr[i], indptr[i + 1]):
            j = indices[p]
            heads[at[j]] = i
            at[j] += 1
    last = np.full(n, -1, np.int64)
    ptr, adjacent, found = np.empty(n + 1, np.int64), np.empty(2 * indptr[n], np.int64), 0
    ptr[0] = 0
    for i in range(n):
        last[i] = i
        for p in range(indptr[i], indptr[i + 1]):
            j = np.int64(indices[p])
            if last[j] != i:
                last[j] = i
                adjacent[found] = j
                found += 1
        for p in range(into[i], into[i + 1]):
            j = heads[p]
            if last[j] != i:
                last[j] = i
                adjacent[found] = j
                found += 1
        ptr[i + 1] = found
    return ptr, adjacent[:found].copy()


@njit(cache=True)
def _levels(ptr, adjacent, start, part, mine, level, queue):
    """Breadth-first search from a state within the part `mine`; fills level and queue, returns the states reached."""
    queue[0], level[start] = start, 0
    low, high = 0, 1
    while low < high:
        i = queue[low]
        low += 1
        for p in range(ptr[i], ptr[i + 1]):
            j = adjacent[p]
            if part[j] == mine and level[j] < 0:
                level[j] = level[i] + 1
                queue[high] = j
                high += 1
    return high


@njit(cache=True)
def _cut(level, queue, size):
    """The level with the fewest states in the middle of a search; 0 or the last if there is no middle."""
    depth = level[queue[size - 1]]
    best, fewest, before, count, at = -1, size + 1, 0, 0, 0
    for d in range(depth + 1):
        count = 0
        while at < size and level[queue[at]] == d:
            at += 1
            count += 1
        middle = before + count / 2
        if 0.3 * size <= middle <= 0.7 * size and count < fewest:
            best, fewest = d, count
        before += count
    if best < 0:
        best = level[queue[size // 2]]
    return best


@njit(cache=True)
def dissect(ptr, adjacent, leaf):
    """Split into fronts of pivots; returns order, begin and parent, children before parents."""
    n = len(ptr) - 1
    nodes, part, level = np.arange(n), np.zeros(n, np.int64), np.full(n, -1, np.int64)
    queue = np.empty(n, np.int64)
    lows, highs, owners = np.zeros(n + 1, np.int64), np.zeros(n + 1, np.int64), np.full(n + 1, -1, np.int64)
    first, last, above = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    fronts, depth, parts = 0, 1, 0
    highs[0] = n
    while depth:
        depth -= 1
        low, high, owner = lows[depth], highs[depth], owners[depth]
        size = high - low
        half, sep = size, 0
        if size > leaf:
            parts += 1
            for q in range(low, high):
                part[nodes[q]] = parts
                level[nodes[q]] = -1
            start = nodes[low]
            reached = 0
            for _ in range(2):
                for q in range(reached):
                    level[queue[q]] = -1
                reached = _levels(ptr, adjacent, start, part, parts, level, queue)
                start = queue[reached - 1]
            if reached < size:  # two pieces that do not touch
                half = reached
                rest = high
                for q in range(high - 1, low - 1, -1):
                    if level[nodes[q]] < 0:
                        rest -= 1
                        nodes[rest] = nodes[q]
                for q in range(reached):
                    nodes[low + q] = queue[q]
            else:
                depth_of = level[queue[size - 1]]
                cut = _cut(level, queue, size)
                if 0 < cut < depth_of:
                    half, far = 0, 0
                    for q in range(size):
                        i = queue[q]
                        if level[i] > cut:
                            far += 1
                            continue
                        beyond = False
                        if level[i] == cut:
                            for p in range(ptr[i], ptr[i + 1]):
                                j = adjacent[p]
                                if part[j] == parts and level[j] > cut:
                                    beyond = True
                                    break
                        if beyond:
                            sep += 1
                            nodes[high - sep] = i
                        else:
                            nodes[low + half] = i
                            half += 1
                    for q in range(far):
                        nodes[low + half + q] = queue[size - far + q]
        if half == size:
            first[fronts], last[fronts], above[fronts] = low, high, owner
            fronts += 1
            continue
        if sep:
            first[fronts], last[fronts], above[fronts] = high - sep, high, owner
            owner = fronts
            fronts += 1
        for a, b in ((low, low + half), (low + half, high - sep)):
            if b > a:
                lows[depth], highs[depth], owners[depth] = a, b, owner
                depth += 1
    turn = np.argsort(first[:fronts])
    rank = np.empty(fronts, np.int64)
    rank[turn] = np.arange(fronts)
    begin, parent = np.empty(fronts + 1, np.int64), np.empty(fronts, np.int64)
    for a in range(fronts):
        begin[a] = first[turn[a]]
        up = above[turn[a]]
        parent[a] = rank[up] if up >= 0 else -1
    begin[fronts] = n
    return nodes, begin, parent


@njit(cache=True)
def borders(ptr, adjacent, order, begin, parent):
    """The later states that each front touches, itself or through its children; returns edge and border."""
    n, fronts = len(order), len(parent)
    rank = np.empty(n, np.int64)
    rank[order] = np.arange(n)
    mark = np.full(n, -1, np.int64)
    child, sibling = np.full(fronts, -1, np.int64), np.full(fronts, -1, np.int64)
    edge, border, found = np.zeros(fronts + 1, np.int64), np.empty(4 * n + 16, np.int64), 0
    for a in range(fronts):
        end = begin[a + 1]
        room = found + n - end
        if room > len(border):
            grown = np.empty(2 * room, np.int64)
            grown[:found] = border[:found]
            border = grown
        for k in range(begin[a], end):
            i = order[k]
            for p in range(ptr[i], ptr[i + 1]):
                j = rank[adjacent[p]]
                if j >= end and mark[j] != a:
                    mark[j] = a
                    border[found] = j
                    found += 1
        c = child[a]
        while c >= 0:
            for q in range(edge[c], edge[c + 1]):
                j = border[q]
                if j >= end and mark[j] != a:
                    mark[j] = a
                    border[found] = j
                    found += 1
            c = sibling[c]
        border[edge[a] : found].sort()
        edge[a + 1] = found
        if parent[a] >= 0:
            sibling[a] = child[parent[a]]
            child[parent[a]] = a
    return edge, border[:found].copy()


@njit(cache=True)
def by_front(starts, ends, indices, data, own, place, order, begin):
    """Rates inside a class sorted by the front that needs them, and what leaves the class.

    `place`, of the length of the chain, is -1 everywhere, and so again afterwards. Returns entries, rows, cols, vals
    and exit as `elimination_kernels.eliminate` takes them.
    """
    m, n_fronts = len(order), len(begin) - 1
    front = np.empty(m, np.int64)
    for a in range(n_fronts):
        for k in range(begin[a], begin[a + 1]):
            front[k] = a
    for k in range(m):
        place[own[order[k]]] = k
    entries, exit = np.zeros(n_fronts + 2, np.int64), np.zeros(m)
    for k in range(m):
        i = own[order[k]]
        for p in range(np.int64(starts[i]), np.int64(ends[i])):
            j = place[indices[p]]
            if j >= 0:
                entries[front[min(k, j)] + 2] += 1
            else:
                exit[k] += data[p]
    for a in range(n_fronts):
        entries[a + 2] += entries[a + 1]
    found = entries[n_fronts + 1]
    rows, cols, vals = np.empty(found, np.int64), np.empty(found, np.int64), np.empty(found)
    for k in range(m):
        i = own[order[k]]
        for p in range(np.int64(starts[i]), np.int64(ends[i])):
            j = np.int64(place[indices[p]])
            if j >= 0:
                a = front[min(k, j)] + 1
                at = entries[a]
                entries[a] += 1
                rows[at], cols[at], vals[at] = k, j, data[p]
    for k in range(m):
        place[own[order[k]]] = -1
    return entries, rows, cols, vals, exit


@njit(cache=True)
def room(begin, parent, edge):
    """Numbers that the pending updates of an elimination need at most, and the largest front."""
    n_fronts = len(parent)
    stack, depth, held, deepest, largest = np.empty(n_fronts + 1, np.int64), 0, 0, 1, 1
    for a in range(n_fronts):
        b = edge[a + 1] - edge[a]
        f = begin[a + 1] - begin[a] + b
        largest = max(largest, f * (f + 1))
        while depth and parent[stack[depth - 1]] == a:
            depth -= 1
            c = edge[stack[depth] + 1] - edge[stack[depth]]
            held -= c * (c + 1)
        if b:
            stack[depth] = a
            depth += 1
            held += b * (b + 1)
            deepest = max(deepest, held)
    return deepest, largest


@njit(cache=True)
def split(starts, ends, indices, data, own, place):
    """The rows of a class as two matrices in rows: to its own states (numbered anew) and to all others.

    `place`, of the length of the chain, is -1 everywhere, and so again afterwards.
    """
    m = len(own)
    near, far = np.zeros(m + 1, np.int64), np.zeros(m + 1, np.int64)
    for i in range(m):
        place[own[i]] = i
    for i in range(m):
        inner, outer = 0, 0
        for p in range(np.int64(starts[own[i]]), np.int64(ends[own[i]])):
            if place[indices[p]] >= 0:
                inner += 1
            else:
                outer += 1
        near[i + 1], far[i + 1] = near[i] + inner, far[i] + outer
    near_col, near_val = np.empty(near[m], np.int64), np.empty(near[m])
    far_col, far_val = np.empty(far[m], np.int64), np.empty(far[m])
    for i in range(m):
        a, b = near[i], far[i]
        for p in range(np.int64(starts[own[i]]), np.int64(ends[own[i]])):
            j = place[indices[p]]
            if j >= 0:
                near_col[a], near_val[a] = j, data[p]
                a += 1
            else:
                far_col[b], far_val[b] = indices[p], data[p]
                b += 1
    for i in range(m):
        place[own[i]] = -1
    return (near, near_col, near_val), (far, far_col, far_val)
