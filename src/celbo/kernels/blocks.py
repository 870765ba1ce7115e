"""Compute softmax, log-likelihood and derivatives of blocks of cells and genes, in Triton for `celbo.kernels.gpu`.

Only sums over a cell, values computed from them, and two differences at counts above zero are float64, because float64
is up to 64 times slower on many devices. These forms avoid cancellation:

- `_log1p` computes ``t - log1p(t)`` by its own series.
- The log-probability of a count above zero is its largest value over all means, less a deviance (saddle-point form).
  With S(y) the remainder of Stirling's formula for ``lgamma(y)``, and KL that of two Bernoulli distributions::

      log NB(x) = -(log(2 pi x) + log1p(x / theta)) / 2 + S(x + theta) - S(theta) - S(x)
                  - (x + theta) KL(x / (x + theta) || mu / (mu + theta))

- ``s(y) = digamma(y) - log(y)`` rises by ``e(1 / y)`` from y to y + 1, with ``e(t) = t - log1p(t)``. Sums of these
  steps shift small y to values at which the asymptotic series is exact. The derivative in log theta is
  ``theta (s(x + theta) - s(theta) - e(u))`` with u = (x - mu) / (theta + mu). At small theta its large terms are
  combined: with w = 1 - theta u, ``theta (e(1 / theta) - e(u)) = w + theta log1p(-w / (1 + theta))``.

Elementary functions are polynomials instead of the device's approximations, so that results are nearly the same bits
on every device and in Triton's interpreter.
"""

import triton
import triton.language as tl

__all__ = ["nb", "poisson"]

_LOWEST = tl.constexpr(-3.0e38)
"""Finite value below any logit, so that differences are defined."""
_LOG_2_PI = tl.constexpr(1.8378770664093453)
_LEAST_LOG_THETA = tl.constexpr(-60.0)
"""The range of log theta is wider than that of any model, and narrow enough to avoid overflow."""
_MOST_LOG_THETA = tl.constexpr(40.0)
_SERIES_FROM = tl.constexpr(4.0)
"""Above this value the asymptotic series of lgamma and digamma are exact in float32."""


@triton.jit
def poisson(
    x_at, logits_at, log_library_at, value_at, d_library_at, d_logits_at, n_cells, n_genes,
    WANT: tl.constexpr, CELLS: tl.constexpr, GENES: tl.constexpr,
):  # fmt: skip
    """Compute the Poisson log-probability of each cell, its derivative in log library and, if wanted, in the logits."""
    cells, of_cells, rows = _my_cells(n_cells, n_genes, CELLS)
    top, total = _softmax_sums(logits_at, rows, of_cells, n_genes, CELLS, GENES)
    log_library = tl.load(log_library_at + cells, mask=of_cells, other=0.0).to(tl.float64)
    library = tl.exp(log_library)
    scale = (library / total).to(tl.float32)[:, None]
    shift = (log_library - top - tl.log(total))[:, None]

    log_prob = tl.zeros([CELLS], tl.float64)
    sum_x = tl.zeros([CELLS], tl.float64)
    for start in range(0, n_genes, GENES):
        genes, inside, at = _my_genes(start, rows, of_cells, n_genes, GENES)
        x = tl.load(x_at + at, mask=inside, other=0.0)
        logits = tl.load(logits_at + at, mask=inside, other=0.0)
        counted = x > 0
        n = tl.where(counted, x, 1.0)
        _, _, excess, log_n, _ = _against_counts(n, logits, shift)
        mu = _exp(logits - top[:, None]) * scale
        log_poisson = tl.where(counted, -0.5 * (_LOG_2_PI + log_n) - _stirling(n) - n * excess, -mu)
        log_prob += tl.sum(tl.where(genes < n_genes, log_poisson, 0.0), 1).to(tl.float64)
        sum_x += tl.sum(x.to(tl.float64), 1)

    # The means of a cell always sum to its library, so that the derivatives in the logits are x - share sum(x).
    _store_sums(value_at, d_library_at, log_prob, sum_x - library, total, cells, of_cells)
    if WANT:
        _through_softmax(logits_at, x_at, d_logits_at, top, sum_x / total, rows, of_cells, n_genes, GENES)


@triton.jit
def nb(
    x_at, logits_at, log_library_at, log_theta_at, gates_at, value_at, d_library_at, d_logits_at, d_theta_at,
    theta_step, n_cells, n_genes,
    WANT: tl.constexpr, INFLATED: tl.constexpr, CELLS: tl.constexpr, GENES: tl.constexpr,
):  # fmt: skip
    """Compute the negative binomial, zero-inflated if ``INFLATED``; derivatives in the logits of gates replace these.

    ``theta_step`` is the distance between the log theta of successive cells: 0 if all share one row. Derivatives in log
    theta have a row for each cell.
    """
    cells, of_cells, rows = _my_cells(n_cells, n_genes, CELLS)
    top, total = _softmax_sums(logits_at, rows, of_cells, n_genes, CELLS, GENES)
    log_library = tl.load(log_library_at + cells, mask=of_cells, other=0.0).to(tl.float64)
    scale = (tl.exp(log_library) / total).to(tl.float32)[:, None]
    shift = (log_library - top - tl.log(total))[:, None]

    log_prob = tl.zeros([CELLS], tl.float64)
    sum_mu = tl.zeros([CELLS], tl.float64)
    for start in range(0, n_genes, GENES):
        genes, inside, at = _my_genes(start, rows, of_cells, n_genes, GENES)
        x = tl.load(x_at + at, mask=inside, other=0.0)
        logits = tl.load(logits_at + at, mask=inside, other=0.0)
        of_theta = cells.to(tl.int64)[:, None] * theta_step + genes
        log_theta = tl.load(log_theta_at + of_theta, mask=inside, other=0.0)
        log_theta = tl.where(log_theta < _LEAST_LOG_THETA, _LEAST_LOG_THETA, log_theta)
        log_theta = tl.where(log_theta > _MOST_LOG_THETA, _MOST_LOG_THETA, log_theta)
        theta = _exp(log_theta)
        mu = _exp(logits - top[:, None]) * scale
        of_zero, zero_d_mu, zero_d_theta = _zeros(mu, theta)
        counted = x > 0
        n = tl.where(counted, x, 1.0)
        of_count, count_d_mu, count_d_theta = _counts(n, theta, log_theta, logits, shift)
        if INFLATED:
            gates = tl.load(gates_at + at, mask=inside, other=0.0)
            of_zero, of_nb, zero_d_gate, passed, count_d_gate = _through_gates(of_zero, gates)
            of_count += passed
            zero_d_mu *= of_nb
            zero_d_theta *= of_nb
            if WANT:
                tl.store(gates_at + at, tl.where(counted, count_d_gate, zero_d_gate), mask=inside)
        d_mu = tl.where(counted, count_d_mu, zero_d_mu)
        log_prob += tl.sum(tl.where(genes < n_genes, tl.where(counted, of_count, of_zero), 0.0), 1).to(tl.float64)
        sum_mu += tl.sum(tl.where(genes < n_genes, d_mu, 0.0).to(tl.float64), 1)
        if WANT:
            tl.store(d_logits_at + at, d_mu, mask=inside)
            tl.store(d_theta_at + at, tl.where(counted, count_d_theta, zero_d_theta), mask=inside)

    _store_sums(value_at, d_library_at, log_prob, sum_mu, total, cells, of_cells)
    if WANT:
        tl.debug_barrier()  # the next step reads values that other threads of this program stored
        _through_softmax(logits_at, d_logits_at, d_logits_at, top, sum_mu / total, rows, of_cells, n_genes, GENES)


@triton.jit
def _my_cells(n_cells, n_genes, CELLS: tl.constexpr):
    """Return the cells of this program, which of them exist, and the positions of their rows."""
    cells = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    return cells, cells < n_cells, cells.to(tl.int64)[:, None] * n_genes


@triton.jit
def _my_genes(start, rows, of_cells, n_genes, GENES: tl.constexpr):
    """Return genes from ``start``, which cells and genes exist, and their positions."""
    genes = start + tl.arange(0, GENES)[None, :]
    return genes, of_cells[:, None] & (genes < n_genes), rows + genes


@triton.jit
def _softmax_sums(logits_at, rows, of_cells, n_genes, CELLS: tl.constexpr, GENES: tl.constexpr):
    """Return the largest logit of each cell, and ``sum(exp(logits - largest))``."""
    top = tl.full([CELLS], _LOWEST, tl.float32)
    total = tl.zeros([CELLS], tl.float64)
    for start in range(0, n_genes, GENES):
        genes, inside, at = _my_genes(start, rows, of_cells, n_genes, GENES)
        logits = tl.load(logits_at + at, mask=inside, other=0.0)
        before, top = top, tl.maximum(top, tl.max(tl.where(genes < n_genes, logits, _LOWEST), 1))
        shares = tl.where(genes < n_genes, _exp(logits - top[:, None]), 0.0)
        total = total * _exp(before - top) + tl.sum(shares.to(tl.float64), 1)
    return top, total


@triton.jit
def _store_sums(value_at, d_library_at, log_prob, sum_mu, total, cells, of_cells):
    not_a_number = total - total  # restores NaN that branches may have lost; otherwise zero
    tl.store(value_at + cells, (log_prob + not_a_number).to(tl.float32), mask=of_cells)
    tl.store(d_library_at + cells, sum_mu.to(tl.float32), mask=of_cells)


@triton.jit
def _through_softmax(logits_at, from_at, to_at, top, factor, rows, of_cells, n_genes, GENES: tl.constexpr):
    """Turn derivatives in log mu into derivatives in the logits, ``d - share sum(d)``; factor is ``sum(d) / total``.

    It computes in float64, because the terms nearly cancel if one gene has nearly all counts of a cell.
    """
    for start in range(0, n_genes, GENES):
        _, inside, at = _my_genes(start, rows, of_cells, n_genes, GENES)
        d_mu = tl.load(from_at + at, mask=inside, other=0.0).to(tl.float64)
        logits = tl.load(logits_at + at, mask=inside, other=0.0)
        shares = _exp(logits - top[:, None]).to(tl.float64)
        tl.store(to_at + at, (d_mu - factor[:, None] * shares).to(tl.float32), mask=inside)


@triton.jit
def _zeros(mu, theta):
    """Compute the log-probability of a zero, ``-theta log1p(mu / theta)``; derivatives in log mu and log theta."""
    r = mu / theta
    success = r / (1.0 + r)
    softplus, excess = _log1p(r, 1.0 + r)
    # log1p(r) - r / (1 + r)
    difference = tl.where(r < 1.0, r * success - excess, softplus - success)
    return -theta * softplus, -theta * success, -theta * difference


@triton.jit
def _counts(x, theta, log_theta, logits, shift):
    """Compute the log-probability of a count above zero; derivatives in log mu and log theta."""
    log_ratio, relative, _, log_x, misses = _against_counts(x, logits, shift)
    mu = tl.where(log_ratio < -0.5, x * _exp(log_ratio), x - misses)
    x_theta, mu_theta = x + theta, mu + theta

    u = misses / mu_theta
    sum_ratio = x_theta / mu_theta  # 1 + u
    log1p_u, excess_u = _log1p(u, sum_ratio)
    # With p = x / (x + theta), q = mu / (mu + theta): b = p / q - 1.
    back = misses / mu
    b = theta / x_theta * back
    log1p_b, excess_b = _log1p(b, 1.0 + b)
    log1p_b = tl.where(b < 1.0, log1p_b, -log_ratio - log1p_u)
    # x log(p / q) + theta log((1 - p) / (1 - q)); if p and q are near, without the terms that cancel.
    p, a = x / x_theta, -misses / x_theta
    near = theta * (excess_u + a * u - p * relative * back) - x * excess_b
    divergence = tl.where(tl.abs(log_ratio) < 0.5, near, x * log1p_b - theta * log1p_u)

    # float64: at theta = 0.001, d_mu may be 1 - 1e-3, and w needs the exact difference from 1.
    odds = tl.exp(logits.to(tl.float64) + shift - log_theta.to(tl.float64))
    w = (1.0 - (x.to(tl.float64) - odds * theta.to(tl.float64)) / (1.0 + odds)).to(tl.float32)
    more = 1.0 + theta
    log1p_w, _ = _log1p(-w / more, sum_ratio * theta / more)
    small, rise, rise_of_gamma = _rises(x, theta)
    d_theta = theta * rise + tl.where(small, w + theta * log1p_w, -theta * excess_u)

    best = -0.5 * (_LOG_2_PI + log_x + _log(1.0 + x / theta)) + rise_of_gamma - _stirling(x)
    return best - divergence, theta * u, d_theta


@triton.jit
def _against_counts(x, logits, shift):
    """Compute ``log(mu / x)``, ``mu / x - 1``, ``mu / x - 1 - log(mu / x)``, ``log(x)`` and ``x - mu``.

    The logarithms are float64: they nearly cancel if mu is near a large count, which multiplies their difference.
    """
    log_x = tl.log(x.to(tl.float64))
    log_ratio = (logits.to(tl.float64) + shift - log_x).to(tl.float32)
    relative, excess = _expm1(log_ratio)
    return log_ratio, relative, excess, log_x.to(tl.float32), -x * relative


@triton.jit
def _through_gates(log_nb, gates):
    """Compute the effect of gates on the log-probability.

    For a zero: ``logaddexp(gate, log NB(0)) - softplus(gate)``, the share of the negative binomial in it, and the
    derivative in the gate. For a count above zero: ``-softplus(gate)`` and its derivative.
    """
    less, _ = _expm1(log_nb)  # 1 - NB(0) would lose precision at NB(0) near 1
    a = _exp(-tl.abs(gates))
    opened = tl.where(gates > 0, 1.0, a) / (1.0 + a)
    shut = tl.where(gates > 0, a, 1.0) / (1.0 + a)
    log1p_a, _ = _log1p(a, 1.0 + a)
    softplus = tl.where(gates > 0, gates, 0.0) + log1p_a
    apart = log_nb - gates
    b = _exp(-tl.abs(apart))
    of_nb = tl.where(apart < 0, b, 1.0) / (1.0 + b)
    of_gate = tl.where(apart < 0, 1.0, b) / (1.0 + b)
    log1p_b, _ = _log1p(b, 1.0 + b)
    value = tl.where(apart < 0, gates, log_nb) + log1p_b - softplus
    return value, of_nb, of_gate * -less * shut, -softplus, -opened


@triton.jit
def _rises(x, theta):
    """Return whether theta is small, and the rises of s (if so, without its first step) and S from theta by x."""
    small = theta < _SERIES_FROM
    theta_steps, theta_steps_of_gamma = _steps(theta, 1)
    sum_steps, sum_steps_of_gamma = _steps(x + theta, 0)
    shifted = tl.where(small, theta + 4.0, theta)
    i, j = 1.0 / shifted, 1.0 / (shifted + x)
    rise = 0.5 * x * i * j + (_digamma_series(i) - _digamma_series(j))
    rise += tl.where(small, theta_steps - sum_steps, 0.0)
    rise_of_gamma = _gamma_series(j) - _gamma_series(i)
    rise_of_gamma += tl.where(small, sum_steps_of_gamma - theta_steps_of_gamma, 0.0)
    return small, rise, rise_of_gamma


@triton.jit
def _stirling(y):
    """Compute the remainder of Stirling's formula, ``S(y) = lgamma(y) - ((y - 1/2) log(y) - y + log(2 pi) / 2)``."""
    small = y < _SERIES_FROM
    _, steps = _steps(y, 0)
    return _gamma_series(1.0 / tl.where(small, y + 4.0, y)) + tl.where(small, steps, 0.0)


@triton.jit
def _steps(y, FIRST: tl.constexpr):
    """Compute the rise of s from y + FIRST to y + 4, and the fall of S from y to y + 4."""
    of_digamma = y * 0.0
    of_gamma = y * 0.0
    for k in tl.static_range(4):
        t = 1.0 / (y + k)
        log1p, excess = _log1p(t, 1.0 + t)
        if k >= FIRST:
            of_digamma += excess
        of_gamma += (y + (k + 0.5)) * log1p - 1.0
    return of_digamma, of_gamma


@triton.jit
def _gamma_series(i):
    """Compute S(y) for large y = 1 / i."""
    square = i * i
    return i * (0.08333333333 - square * (0.002777777778 - square * (0.0007936507937 - square * 0.0005952380952)))


@triton.jit
def _digamma_series(i):
    """Compute ``log(y) - 1 / (2 y) - digamma(y)`` for large y = 1 / i."""
    square = i * i
    p = 0.004166666667 - square * 0.007575757576
    return square * (0.08333333333 - square * (0.008333333333 - square * (0.003968253968 - square * p)))


# The polynomials of exp and log are from Cephes (Moshier 1989).


@triton.jit
def _exp(x):
    x = tl.where(x < -87.0, -87.0, x)  # keeps NaN, unlike minimum and maximum
    x = tl.where(x > 88.0, 88.0, x)
    n = tl.floor(x * 1.44269504 + 0.5)
    n = tl.where(x == x, n, 0.0)  # avoids numpy's warning about NaN as an integer
    r = x - n * 0.693359375 + n * 2.12194440e-4
    p = 1.9875691500e-4
    p = p * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return (p * r * r + r + 1.0) * power


@triton.jit
def _expm1(x):
    """Compute ``exp(x) - 1`` and ``exp(x) - 1 - x``, without cancellation."""
    p = 1.0 / 362880
    p = p * x + 1.0 / 40320
    p = p * x + 1.0 / 5040
    p = p * x + 1.0 / 720
    p = p * x + 1.0 / 120
    p = p * x + 1.0 / 24
    p = p * x + 1.0 / 6
    p = p * x + 1.0 / 2
    near = tl.abs(x) < 0.5
    excess = p * x * x
    far = _exp(x) - 1.0
    return tl.where(near, x + excess, far), tl.where(near, excess, far - x)


@triton.jit
def _log(y):
    bits = y.to(tl.int32, bitcast=True)
    n = (bits - 0x3F3504F3) >> 23  # so that the mantissa lies around 1
    f = (bits - (n << 23)).to(tl.float32, bitcast=True) - 1.0
    p = 7.0376836292e-2
    p = p * f - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    n = n.to(tl.float32)
    return f + (p * f * f * f - n * 2.12194440e-4 - 0.5 * f * f) + n * 0.693359375


@triton.jit
def _log1p(t, above):
    """Compute ``log1p(t)`` and ``t - log1p(t)``; ``above`` is 1 + t, computed exactly if t is near -1.

    With s = t / (2 + t), log1p(t) is ``2 s + 2 s**3 / 3 + 2 s**5 / 5 + ...``, and ``t - 2 s = t s``.
    """
    s = t / (2.0 + t)
    square = s * s
    p = 1.0 / 17
    p = p * square + 1.0 / 15
    p = p * square + 1.0 / 13
    p = p * square + 1.0 / 11
    p = p * square + 1.0 / 9
    p = p * square + 1.0 / 7
    p = p * square + 1.0 / 5
    p = p * square + 1.0 / 3
    near = (t > -0.5) & (t < 1.0)
    excess = s * (t - 2.0 * square * p)
    log = _log(above)
    return tl.where(near, t - excess, log), tl.where(near, excess, t - log)
