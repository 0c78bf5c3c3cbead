"""Exact gradient descent on the logits of a trajectory, compiled: a hundred thousand steps in a second."""

from __future__ import annotations

import numpy as np

from ..compiled_kernels import njit

__all__ = ["descend"]


@njit(cache=True, error_model="numpy")
def descend(base, start, tail, beta, rate, marks, out):
    """Hazards after `marks` steps.

    base (L, 3): go on, refuse, harm; start (L,): law of the depth at which an answer begins; marks (S,) rising;
    out (S, L, 3). Minimised is the mean over `start` of P(harm) + beta KL(answer || base).
    """
    L = len(base)
    z, p, fall = np.zeros((L, 3)), np.empty((L, 3)), np.empty((L, 3))  # z: log ratio to base, before normalising
    value = np.empty(L + 1)
    value[L] = tail
    done, step = 0, 0
    while done < len(marks):
        for t in range(L):
            most = max(z[t, 0], z[t, 1], z[t, 2])
            total = 0.0
            for j in range(3):
                p[t, j] = base[t, j] * np.exp(z[t, j] - most)
                total += p[t, j]
            log = np.log(total) + most
            for j in range(3):
                p[t, j] /= total
                fall[t, j] = beta * (z[t, j] - log)  # beta log(p / base)
        while done < len(marks) and marks[done] == step:
            out[done] = p
            done += 1
        for t in range(L - 1, -1, -1):
            kl = 0.0
            for j in range(3):
                kl += p[t, j] * fall[t, j]
            value[t] = p[t, 2] + p[t, 0] * value[t + 1] + kl
        here = 0.0
        for t in range(L):
            here += start[t]
            cost = fall[t, 0] + value[t + 1], fall[t, 1], fall[t, 2] + 1.0
            mean = p[t, 0] * cost[0] + p[t, 1] * cost[1] + p[t, 2] * cost[2]
            for j in range(3):
                z[t, j] -= rate * here * p[t, j] * (cost[j] - mean)
            here *= p[t, 0]
        step += 1
