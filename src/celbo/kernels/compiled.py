"""Loop over genes and counts, compiled by numba for `celbo.kernels.cpu`.

Loops of ``_vector`` functions have no branches or tables, so that the compiler vectorises them.
"""

import math
from typing import Any

import numpy as np
from numba import njit

from celbo.kernels.cached import cached

__all__ = ["adam", "nb", "poisson", "times"]

# Without an explicit False a function inherits its caller's fastmath, which removes compensation of rounding errors.
_scalar: Any = njit(nogil=True, error_model="numpy", fastmath=False)
# Vector instructions sum in any order; NaN and infinity keep their meaning.
_vector: Any = njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz", "arcp"})
# Only public functions are cached, and each is called with one set of types: processes that begin at once and fill
# one cache then write the same code under the same name.

_f = np.float32
_SMALL = 16
"""Up to this count Gamma(x + theta) / Gamma(theta) is a product of x factors; larger counts use log Gamma."""
_LOG_FACTORIALS = np.array([math.lgamma(k + 1) for k in range(1024)])
_HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)
_BLOCK = 1024
"""Number of genes in a float32 sum; float64 adds up these sums."""


@cached
@_scalar
def poisson(starts, columns, values, logits, top, log_library, weight, want, value, d_library):
    """Compute the Poisson log-probability of each cell; if ``want``, its derivatives replace the logits."""
    n_cells, n_genes = logits.shape
    shares = np.empty(n_genes, np.float32)
    d_mu = np.empty(np.diff(starts[: n_cells + 1]).max())
    for cell in range(n_cells):
        row, first, last = logits[cell], starts[cell], starts[cell + 1]
        total = _exponentials(row, top[cell], shares)
        scale = math.exp(log_library[cell]) / total
        shift = log_library[cell] - top[cell] - math.log(total)
        log_prob, counted, sum_counted = 0.0, 0.0, 0.0
        for k in range(first, last):
            x, gene = float(values[k]), columns[k]
            log_mu = float(row[gene]) + shift
            mu = shares[gene] * scale if x <= _SMALL else math.exp(log_mu)
            d_mu[k - first] = x - mu
            sum_counted += x - mu
            counted += mu
            if x > 0:
                log_prob += x * log_mu - _log_factorial(x)
        library = math.exp(log_library[cell])
        sum_mu = sum_counted - (library - counted)
        value[cell] = log_prob - library
        d_library[cell] = weight[cell] * sum_mu
        if want:
            _scaled(shares, _f(-scale), row)
            for k in range(first, last):
                row[columns[k]] = d_mu[k - first]
            _through_softmax(shares, _f(sum_mu / total), weight[cell], row)


@cached
@_scalar
def nb(
    starts, columns, values, logits, top, log_library, log_thetas, thetas, thetas_32, inverse_32, gates, weight, want,
    value, d_library, d_theta,
):  # fmt: skip
    """Compute the negative binomial log-probability of each cell, zero-inflated if there are gates; see `poisson`.

    Theta and d_theta have a row for each cell, or one for all.
    """
    n_cells, n_genes = logits.shape
    work = np.empty(
        (4, n_genes), np.float32
    )  # one array: the compiler does not vectorise loops over arrays that may overlap
    shares, gate, unused_mu, unused_gate = work[0], work[1], work[2], work[3]
    most = np.diff(starts[: n_cells + 1]).max()
    genes, kept = np.empty(most, np.int32), np.empty(most, np.float32)
    # Rows must not be a multiple of 4,096 bytes apart, because they would compete for the same cache lines.
    counts = np.empty((8, most // 64 * 64 + 72), np.float64)
    zero_inflated = len(gates) > 0
    for cell in range(n_cells):
        row, w = logits[cell], weight[cell]
        if zero_inflated:
            gate[:] = gates[cell]
        of_theta = cell if len(thetas) > 1 else 0
        log_theta, theta = log_thetas[of_theta], thetas[of_theta]
        theta_32, inverse, d_theta_row = thetas_32[of_theta], inverse_32[of_theta], d_theta[of_theta]
        total = _exponentials(row, top[cell], shares)
        scale = _f(math.exp(log_library[cell]) / total)
        shift = log_library[cell] - top[cell] - math.log(total)

        # Remove counts above zero from the row: a zero with a mean of zero adds nothing to any sum.
        n = 0
        for k in range(starts[cell], starts[cell + 1]):
            if values[k] > 0:
                gene = columns[k]
                genes[n], kept[n] = gene, shares[gene]
                counts[0, n] = values[k]
                counts[1, n] = theta[gene]
                counts[2, n] = float(row[gene]) - log_theta[gene]
                counts[3, n] = gate[gene]
                shares[gene] = 0
                n += 1

        d_mu = row if want else unused_mu
        d_gate = gates[cell] if want and zero_inflated else unused_gate
        log_prob, sum_mu = 0.0, 0.0
        for b in range(0, n_genes, _BLOCK):
            e = b + _BLOCK
            if zero_inflated:
                sums = _inflated_zeros(
                    shares[b:e], scale, theta_32[b:e], inverse[b:e], gate[b:e], w, d_mu[b:e], d_theta_row[b:e],
                    d_gate[b:e],
                )  # fmt: skip
            else:
                sums = _zeros(shares[b:e], scale, theta_32[b:e], inverse[b:e], w, d_mu[b:e], d_theta_row[b:e])
            log_prob += sums[0]
            sum_mu += sums[1]

        log_prob += _counts(counts, kept[:n], scale, shift)
        if zero_inflated:
            log_prob += _open_gates(counts[3][:n])
        for k in range(n):
            gene = genes[k]
            shares[gene] = kept[k]
            d_mu[gene] = counts[0, k]
            sum_mu += counts[0, k]
            d_theta_row[gene] += w * _f(counts[1, k])
            if zero_inflated:
                d_gate[gene] = w * _f(counts[3, k])
        value[cell] = log_prob
        d_library[cell] = w * sum_mu
        if want:
            _through_softmax(shares, _f(sum_mu / total), w, row)


@_vector
def _counts(counts, shares, scale, shift):
    """Sum the log-probability of counts above zero.

    Rows are x, theta and ``log mu - log theta`` (without ``shift``). The first becomes the derivative in log mu, the
    second the derivative in log theta. Each loop uses few rows, because the compiler can check only few for overlap.
    """
    n = len(shares)
    xs, thetas, log_odds = counts[0][:n], counts[1][:n], counts[2][:n]
    mus, product, derivative, log_rest = counts[4][:n], counts[5][:n], counts[6][:n], counts[7][:n]
    for k in range(len(xs)):
        mus[k] = shares[k] * scale
    for k in range(len(xs)):
        log_odds[k] += shift
    product[:] = 1.0
    derivative[:] = 0.0
    # Gamma(x + theta) / Gamma(theta) is a product of x factors. All counts run _SMALL steps, to avoid branches.
    for i in range(_SMALL):
        _multiply(xs, thetas, float(i), product, derivative)
    for k in range(len(xs)):
        derivative[k] /= product[k]  # now the derivative of the logarithm
    for k in range(len(xs)):
        x = xs[k]
        if x <= _SMALL and x == np.floor(x):
            log_rest[k] = -_LOG_FACTORIALS[int(x)]
        else:
            theta = thetas[k]
            of_sum, digamma_of_sum = _log_gamma(x + theta)
            of_theta, digamma_of_theta = _log_gamma(theta)
            product[k] = 1.0
            derivative[k] = math.log1p(x / theta) + digamma_of_sum - digamma_of_theta
            log_rest[k] = of_sum - of_theta - _log_factorial(x)
            mus[k] = theta * math.exp(log_odds[k])
    total = 0.0
    for k in range(len(xs)):
        total += _log_64(product[k]) + log_rest[k]
    softplus = product  # reuses the memory
    for k in range(len(xs)):
        softplus[k] = _log1p_64(mus[k] / thetas[k])
    for k in range(len(xs)):
        total += xs[k] * log_odds[k] - (xs[k] + thetas[k]) * softplus[k]
    for k in range(len(xs)):
        xs[k] = (xs[k] - mus[k]) / (thetas[k] + mus[k])
    for k in range(len(xs)):
        derivative[k] -= softplus[k] + xs[k]
    for k in range(len(xs)):
        xs[k] *= thetas[k]
    for k in range(len(xs)):
        thetas[k] *= derivative[k]
    return total


@_vector
def _multiply(xs, thetas, i, product, derivative):
    """Multiply products of more than i factors by ``theta + i``, and update their derivatives in theta."""
    for k in range(len(xs)):
        factor = thetas[k] + i
        is_factor = i < xs[k]
        p, d = product[k], derivative[k]
        derivative[k] = d * factor + p if is_factor else d
        product[k] = p * factor if is_factor else p


@_scalar
def _log_factorial(x):
    if x < len(_LOG_FACTORIALS) and x == int(x):
        return _LOG_FACTORIALS[int(x)]
    return _log_gamma(x + 1)[0]


@_scalar
def _log_gamma(y):
    """Compute ``log Gamma(y)`` and ``digamma(y) - log(y)`` by asymptotic series, after a shift to y of at least 10.

    The function of the C library writes to a global variable, which slows threads down.
    """
    shifted, product, back = y, 1.0, 0.0
    while shifted < 10:
        product *= shifted
        back += 1 / shifted
        shifted += 1
    inverse = 1 / shifted
    square = inverse * inverse
    log = math.log(shifted)
    p = 1 / 12 - square * (
        1 / 360 - square * (1 / 1260 - square * (1 / 1680 - square * (1 / 1188 - square * 691 / 360360)))
    )
    log_gamma = (shifted - 0.5) * log - shifted + _HALF_LOG_2_PI + inverse * p
    p = 1 / 12 - square * (
        1 / 120 - square * (1 / 252 - square * (1 / 240 - square * (1 / 132 - square * 691 / 32760)))
    )
    digamma_minus_log = -0.5 * inverse - square * p
    if shifted > y:
        log_gamma -= math.log(product)
        digamma_minus_log += math.log(shifted / y) - back
    return log_gamma, digamma_minus_log


@_vector
def _exponentials(logits, top, into):
    """Write ``exp(logits - top)``, and return its sum."""
    total = 0.0
    for gene in range(len(logits)):
        e = _exp(logits[gene] - top)
        into[gene] = e
        total += e
    return total


@_vector
def _zeros(shares, scale, theta, inverse, w, d_mu, d_theta):
    """Sum the log-probability of zeros, ``-theta log1p(r)`` with r = mu / theta, and its derivative in log mu."""
    log_prob, sum_mu = _f(0), _f(0)
    for gene in range(len(shares)):
        r = shares[gene] * scale * inverse[gene]
        success = r / (_f(1) + r)
        softplus = _log1p(r)
        t = theta[gene]
        log_prob -= t * softplus
        d = -t * success
        d_mu[gene] = d
        sum_mu += d
        d_theta[gene] -= w * t * _softplus_less_success(softplus, success)
    return log_prob, sum_mu


@_vector
def _inflated_zeros(shares, scale, theta, inverse, gate, w, d_mu, d_theta, d_gate):
    """Sum ``logaddexp(gate, log NB(0)) - softplus(gate)``, with derivatives as in `_zeros` and in the gate."""
    log_prob, sum_mu = _f(0), _f(0)
    for gene in range(len(shares)):
        r = shares[gene] * scale * inverse[gene]
        success = r / (_f(1) + r)
        softplus = _log1p(r)
        t, g = theta[gene], gate[gene]
        log_nb = -t * softplus
        nb = _exp(log_nb)
        p = _f(1) + log_nb * _f(1 / 5)  # series of -expm1: 1 - nb would cancel at nb near 1
        p = _f(1) + log_nb * _f(1 / 4) * p
        p = _f(1) + log_nb * _f(1 / 3) * p
        p = _f(1) + log_nb * _f(1 / 2) * p
        not_zero = -log_nb * p if log_nb > _f(-0.1) else _f(1) - nb
        a = _exp(-abs(g))
        shut = (a if g > 0 else _f(1)) / (_f(1) + a)  # sigmoid(-gate)
        apart = log_nb - g
        b = _exp(-abs(apart))
        of_nb = (b if apart < 0 else _f(1)) / (_f(1) + b)
        of_gate = (_f(1) if apart < 0 else b) / (_f(1) + b)
        log_prob += max(log_nb, g) + _log1p(b) - max(g, _f(0)) - _log1p(a)
        d = -of_nb * t * success
        d_mu[gene] = d
        sum_mu += d
        d_theta[gene] -= w * of_nb * t * _softplus_less_success(softplus, success)
        d_gate[gene] = w * of_gate * not_zero * shut
    return log_prob, sum_mu


@_vector
def _open_gates(gates):
    """Sum the log-probability that gates are open; its derivatives replace the logits of the gates."""
    total = 0.0
    for k in range(len(gates)):
        g = _f(gates[k])
        a = _exp(-abs(g))
        total -= max(g, _f(0)) + _log1p(a)
        gates[k] = -(_f(1) if g > 0 else a) / (_f(1) + a)
    return total


@_vector
def _scaled(shares, factor, into):
    for gene in range(len(shares)):
        into[gene] = factor * shares[gene]


@_vector
def _through_softmax(shares, factor, w, d_mu):
    """Compute the derivative in the logits, ``w (d_mu - share sum(d_mu))``, in place."""
    for gene in range(len(shares)):
        d_mu[gene] = w * (d_mu[gene] - factor * shares[gene])


@cached
@_vector
def times(starts, columns, values, dense, out):
    """Compute ``x @ dense`` for sparse x, four values of a row at a time."""
    for row in range(len(out)):
        into = out[row]
        into[:] = 0
        k, end = starts[row], starts[row + 1]
        while k + 4 <= end:
            a, b, c, d = dense[columns[k]], dense[columns[k + 1]], dense[columns[k + 2]], dense[columns[k + 3]]
            u, v, w, y = values[k], values[k + 1], values[k + 2], values[k + 3]
            for i in range(len(into)):
                into[i] += (u * a[i] + v * b[i]) + (w * c[i] + y * d[i])
            k += 4
        while k < end:
            a, u = dense[columns[k]], values[k]
            for i in range(len(into)):
                into[i] += u * a[i]
            k += 1


@cached
@_vector
def adam(weights, gradient, first, second, average, factor, rate, floor, share):
    """Take a step of Adam and update the running average; see `celbo.kernels.reference.adam`."""
    for k in range(len(weights)):
        g = gradient[k] * factor
        m = first[k] + _f(0.1) * (g - first[k])
        v = second[k] + _f(0.001) * (g * g - second[k])
        w = weights[k] - rate * m / (np.sqrt(v) + floor)
        first[k], second[k], weights[k] = m, v, w
        average[k] += share * (w - average[k])


# Elementary functions have no branches or tables, so that the compiler vectorises loops over them. Relative errors are
# 1e-7 (float32) and 2e-16 (float64). Argument reduction and polynomials are from Cephes (Moshier 1989) for float32, and
# from fdlibm (Sun 1993) for the logarithm in float64.


@_scalar
def _exp(x):
    x = min(max(x, _f(-87)), _f(88))
    n = np.floor(x * _f(1.44269504) + _f(0.5))
    r = x - n * _f(0.693359375) + n * _f(2.12194440e-4)
    p = _f(1.9875691500e-4)
    p = p * r + _f(1.3981999507e-3)
    p = p * r + _f(8.3334519073e-3)
    p = p * r + _f(4.1665795894e-2)
    p = p * r + _f(1.6666665459e-1)
    p = p * r + _f(5.0000001201e-1)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (p * r * r + r + _f(1)) * power


@_scalar
def _log1p(x):
    u = _f(1) + x
    bits = _f(u).view(np.int32)
    n = (bits - np.int32(0x3F3504F3)) >> np.int32(23)  # so that the mantissa lies around 1
    f = np.int32(bits - (n << np.int32(23))).view(np.float32) - _f(1)
    p = _f(7.0376836292e-2)
    p = p * f + _f(-1.1514610310e-1)
    p = p * f + _f(1.1676998740e-1)
    p = p * f + _f(-1.2420140846e-1)
    p = p * f + _f(1.4249322787e-1)
    p = p * f + _f(-1.6668057665e-1)
    p = p * f + _f(2.0000714765e-1)
    p = p * f + _f(-2.4999993993e-1)
    p = p * f + _f(3.3333331174e-1)
    rounded = (x - (u - _f(1))) / u  # the rounding error of 1 + x
    n_32 = _f(n)
    return f + (p * f * f * f + n_32 * _f(-2.12194440e-4) - _f(0.5) * f * f + rounded) + n_32 * _f(0.693359375)


@_scalar
def _softplus_less_success(softplus, success):
    """Compute ``log1p(r) - r / (1 + r)``, by a series in ``r / (1 + r)`` if the terms nearly cancel."""
    q = success
    p = _f(1 / 8)
    p = p * q + _f(1 / 7)
    p = p * q + _f(1 / 6)
    p = p * q + _f(1 / 5)
    p = p * q + _f(1 / 4)
    p = p * q + _f(1 / 3)
    p = p * q + _f(1 / 2)
    return q * q * p if q < _f(0.1) else softplus - q


@_scalar
def _log_64(x):
    bits = np.float64(x).view(np.int64)
    n = (bits - np.int64(0x3FE6A09E667F3BCD)) >> np.int64(52)
    f = np.int64(bits - (n << np.int64(52))).view(np.float64) - 1.0
    s = f / (2.0 + f)
    z = s * s
    p = 1.479819860511658591e-01
    p = p * z + 1.531383769920937332e-01
    p = p * z + 1.818357216161805012e-01
    p = p * z + 2.222219843214978396e-01
    p = p * z + 2.857142874366239149e-01
    p = p * z + 3.999999999940941908e-01
    p = p * z + 6.666666666666735130e-01
    half = 0.5 * f * f
    n_64 = float(n)
    return n_64 * 6.93147180369123816490e-01 - ((half - (s * (half + z * p) + n_64 * 1.90821492927058770002e-10)) - f)


@_scalar
def _log1p_64(x):
    u = 1.0 + x
    return _log_64(u) + (x - (u - 1.0)) / u
