"""The tail's search as the specification has it, in float64, and what else rounding may make of it."""

import math

import numpy as np
import oracle


class Plain:
    """What the specification says of a spectrum, in float64, and how far rounding in `eps` may move it."""

    def __init__(self, values, tail, eps):
        if tail.min_eigenvalue is not None:
            least = np.float32(tail.min_eigenvalue)  # as a number of the spectrum's precision
            values = values[values > least] if (values > least).any() else values
        self.values, self.tail, self.eps = values, tail, eps
        self.first = int((values <= 0).sum())
        with np.errstate(divide="ignore"):
            self.logs = np.log(values / (values[-1] if values[-1] > 0 else 1))

    def fit(self, i):
        """(alpha, distance) of the oracle from index i on, and the error of each; alpha is infinite for equal ones."""
        logs, count = self.logs[i:], len(self.values) - i
        spread = (logs - logs[0]).sum()
        # Of sums of logarithms, and of logarithms that were themselves rounded.
        error = self.eps * (8 * np.abs(logs).sum() + 8 * count * abs(logs[0]) + 8 * count)
        # The oracle's logarithms are not relative to the largest value.
        error += 8 * np.finfo(np.float64).eps * count * abs(math.log(self.values[-1]))
        if spread <= error:
            return math.inf, 0.0, math.inf, math.inf
        alpha, distance = oracle.fit(self.values, i)
        relative = error / spread
        return alpha, distance, alpha * relative, relative + 8 * self.eps * (1 + alpha * (1 + abs(logs[0])))

    def is_flat(self, i):
        """Whether the values from i on are equal to within rounding; None where rounding decides."""
        mean = (self.logs[i:] - self.logs[i]).mean()
        slack = self.eps * (8 + 8 * abs(self.logs[i]))
        return True if mean < max(0, 8 * self.eps - slack) else False if mean > 8 * self.eps + slack else None

    def candidates(self):
        """Indices that may be the threshold: (certain, possible) for each peak that the histogram may have."""
        usable = range(self.first, len(self.values) - 1)
        if self.tail.xmin == "ks":
            yield set(usable), set(usable)
            return
        if self.first >= len(self.values):
            return
        low, width = self.logs[self.first], -self.logs[self.first] or math.log(10)
        places = (self.logs[self.first :] - low) / width * self.tail.bins
        slack = 64 * self.eps * self.tail.bins * (1 + (abs(low) + 1) / width)
        least, most = np.zeros(self.tail.bins, int), np.zeros(self.tail.bins, int)
        for place in places:
            bins = {min(max(int(place + move), 0), self.tail.bins - 1) for move in (-slack, slack)}
            for number in range(min(bins), max(bins) + 1):
                most[number] += 1
                least[number] += len(bins) == 1
        for peak in np.flatnonzero(most >= least.max()):
            x = self.values[-1] * math.exp(low + peak * width / self.tail.bins)
            near = 1e-5 if self.eps > 1e-10 else 1e-12  # relative, of x and what is made of it
            bottom, top = np.log10(0.95 * x), 1.5 * x
            possible = {i for i in usable if bottom - near * (1 + abs(bottom)) <= self.values[i] <= top * (1 + near)}
            certain = {i for i in possible if bottom + near * (1 + abs(bottom)) <= self.values[i] <= top * (1 - near)}
            yield certain, possible


def agrees(found, plain, certain, possible):
    """Whether a fit is what the plain search over candidates may give: a threshold whose distance is the smallest."""
    alpha, distance, xmin, _ = found
    certain = {i for i in certain if plain.is_flat(i) is False}
    possible = {i for i in possible if plain.is_flat(i) is not True}
    fits = {i: plain.fit(i) for i in possible}
    if alpha == 0:
        return not certain and (distance, xmin) == (1, 0)
    near = [i for i in possible if math.isclose(plain.values[i], xmin, rel_tol=4 * plain.eps)]
    best = min((fits[i][1] + fits[i][3] for i in certain), default=1)
    return any(
        abs(alpha - fits[i][0]) <= fits[i][2] and abs(distance - fits[i][1]) <= fits[i][3]
        and fits[i][1] - fits[i][3] <= best
        for i in near
    )  # fmt: skip


def check_fit(found, values, tail, eps):
    plain = Plain(values, tail, eps)
    assert found[3] == len(plain.values)
    if tail.xmin == "median":
        index = max(int(len(plain.values) / tail.xmin_pos), plain.first)
        choices = [({index} & set(range(len(plain.values))),) * 2]
    else:
        choices = list(plain.candidates()) or [(set(), set())]
    assert any(agrees(found, plain, *choice) for choice in choices), (found, values.tolist())
