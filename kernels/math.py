"""Pointer-free device functions `<name>_and_grad`: values in, (loss, gradients...) out, in float32.

Each is the twin of one torch reference in `detloss_triton/ops`. A caller that drops a result pays
nothing for it: the compiler removes what is unused. Ties of a minimum or maximum give half of the
gradient to each side, as torch does. Only what every Triton target has is used: no libdevice.
"""

import triton
import triton.language as tl

FOUR_OVER_PI_SQUARED: tl.constexpr = tl.constexpr(0.4052847345693511)
# Under the plain IoU, as in ops/regression.py, which works without Triton.
UNION_EPS: tl.constexpr = tl.constexpr(1e-6)


@triton.jit
def log1p(u):
    """log(1 + u) for u >= 0, exact where 1 + u rounds: the rounding of y is divided out again."""
    y = 1.0 + u
    exact = y == 1.0
    return tl.where(exact, u, tl.log(y) * (u / tl.where(exact, 1.0, y - 1.0)))


@triton.jit
def logistic(x):
    """(softplus(x), sigmoid(x), 1 - sigmoid(x)), none of which overflows or cancels."""
    u = tl.exp(-tl.abs(x))
    one_plus_u = 1.0 + u
    softplus = tl.where(x > 0, x, tl.where(x == x, 0.0, x)) + log1p(u)
    p = tl.where(x >= 0, 1.0, u) / one_plus_u
    q = tl.where(x >= 0, u, 1.0) / one_plus_u
    return softplus, p, q


@triton.jit
def power(x, N: tl.constexpr):
    """x^N for x >= 0, without a logarithm where N is a small whole number."""
    if N == 0.0:
        y = x * 0.0 + 1.0
    elif N == 1.0:
        y = x
    elif N == 2.0:
        y = x * x
    else:
        y = tl.exp(N * tl.log(x))
    return y


@triton.jit
def bce_and_grad(x, t):
    softplus, p, _ = logistic(x)
    return softplus - x * t, p - t


@triton.jit
def focal_and_grad(x, t, ALPHA: tl.constexpr, GAMMA: tl.constexpr):
    softplus, p, q = logistic(x)
    wrong = q * t + p * (1.0 - t)
    balance = t * 0.0 + 1.0
    if ALPHA >= 0:
        balance = ALPHA * t + (1.0 - ALPHA) * (1.0 - t)
    bce = softplus - x * t
    loss = balance * power(wrong, GAMMA) * bce
    if GAMMA == 0.0:
        dx = balance * (p - t)
    else:
        d_wrong = GAMMA * power(wrong, GAMMA - 1.0) * p * q * (1.0 - 2.0 * t)
        dx = balance * (d_wrong * bce + power(wrong, GAMMA) * (p - t))
    return loss, dx


@triton.jit
def quality_focal_and_grad(x, t, BETA: tl.constexpr):
    softplus, p, q = logistic(x)
    bce = softplus - x * t
    distance = tl.abs(t - p)
    scale = power(distance, BETA)
    if BETA == 0.0:
        dx = p - t
    else:
        sign = tl.where(p > t, 1.0, tl.where(p < t, -1.0, 0.0))
        dx = BETA * power(distance, BETA - 1.0) * sign * p * q * bce + scale * (p - t)
    return scale * bce, dx


@triton.jit
def varifocal_and_grad(x, t, is_label, ALPHA: tl.constexpr, GAMMA: tl.constexpr):
    softplus, p, _ = logistic(x)
    scale = tl.where(is_label, t, ALPHA * power(p, GAMMA))
    return scale * (softplus - x * t), scale * (p - t)


@triton.jit
def l1_and_grad(d):
    return tl.abs(d), tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d * 0.0))


@triton.jit
def smooth_l1_and_grad(d, BETA: tl.constexpr):
    size, sign = l1_and_grad(d)
    near = size < BETA
    loss = tl.where(near, 0.5 * d * d / BETA, size - 0.5 * BETA)
    return loss, tl.where(near, d / BETA, sign)


@triton.jit
def at_least(x, low):
    """(max(x, low), its derivative by x); NaN passes; at a tie the clamp is transparent."""
    below = x < low
    return tl.where(below, low, x), tl.where(below, 0.0, 1.0)


@triton.jit
def larger(a, b):
    """(max(a, b), derivative by a): a half each at a tie; NaN passes, as in torch."""
    high = tl.where((a > b) | (a != a), a, b)
    return high, tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0))


@triton.jit
def smaller(a, b):
    """(min(a, b), derivative by a): a half each at a tie; NaN passes, as in torch."""
    low = tl.where((a < b) | (a != a), a, b)
    return low, tl.where(a < b, 1.0, tl.where(a == b, 0.5, 0.0))


@triton.jit
def atan(x):
    """Arc tangent to 2 units in the last place: folded to [0, tan(pi/8)], an odd polynomial."""
    size = tl.abs(x)
    steep = size > 1.0
    z = tl.where(steep, 1.0 / tl.where(steep, size, 1.0), size)
    upper = z > 0.4142135623730950
    z = tl.where(upper, (z - 1.0) / (z + 1.0), z)
    s = z * z
    y = 8.05374449538e-2 * s - 1.38776856032e-1
    y = (y * s + 1.99777106478e-1) * s - 3.33329491539e-1
    y = y * s * z + z
    y = tl.where(upper, y + 0.7853981633974483, y)
    y = tl.where(steep, 1.5707963267948966 - y, y)
    return tl.where(x < 0, -y, y)


@triton.jit
def overlap_1d(p1, p2, t1, t2):
    """Overlap of [p1, p2] and [t1, t2], clamped at 0; its derivatives by p1, p2, t1, t2."""
    low, by_p1 = larger(p1, t1)
    high, by_p2 = smaller(p2, t2)
    width, clear = at_least(high - low, 0.0)
    return width, -by_p1 * clear, by_p2 * clear, (by_p1 - 1.0) * clear, (1.0 - by_p2) * clear


@triton.jit
def hull_1d(p1, p2, t1, t2):
    """Length of the smallest interval around both; its derivatives by p1, p2, t1, t2."""
    low, by_p1 = smaller(p1, t1)
    high, by_p2 = larger(p2, t2)
    return high - low, -by_p1, by_p2, by_p1 - 1.0, 1.0 - by_p2


@triton.jit
def iou_and_grad(px1, py1, px2, py2, tx1, ty1, tx2, ty2, EPS: tl.constexpr, ADD_EPS: tl.constexpr):
    """(IoU, union, d IoU by the intersection, d IoU by an area, whether the union is its own).

    The union has EPS added (`ADD_EPS`), or is at least EPS.
    """
    w, _, _, _, _ = overlap_1d(px1, px2, tx1, tx2)
    h, _, _, _, _ = overlap_1d(py1, py2, ty1, ty2)
    inter = w * h
    total = (px2 - px1) * (py2 - py1) + (tx2 - tx1) * (ty2 - ty1) - inter
    if ADD_EPS:
        union = total + EPS
        clear = 1.0
    else:
        union, clear = at_least(total, EPS)
    iou = inter / union
    by_area = -iou / union * clear
    return iou, union, 1.0 / union - by_area, by_area, clear


@triton.jit
def area_chain(px1, py1, px2, py2, tx1, ty1, tx2, ty2, by_inter, by_area):
    """Gradients by the 8 coordinates of a function of the intersection and the sum of the areas."""
    w, wp1, wp2, wt1, wt2 = overlap_1d(px1, px2, tx1, tx2)
    h, hp1, hp2, ht1, ht2 = overlap_1d(py1, py2, ty1, ty2)
    pw = (px2 - px1) * by_area
    ph = (py2 - py1) * by_area
    tw = (tx2 - tx1) * by_area
    th = (ty2 - ty1) * by_area
    w = w * by_inter
    h = h * by_inter
    return (
        h * wp1 - ph,
        w * hp1 - pw,
        h * wp2 + ph,
        w * hp2 + pw,
        h * wt1 - th,
        w * ht1 - tw,
        h * wt2 + th,
        w * ht2 + tw,
    )


@triton.jit
def iou_loss_and_grad(
    px1, py1, px2, py2, tx1, ty1, tx2, ty2, MODE: tl.constexpr, EPS: tl.constexpr
):
    iou, _, by_inter, by_area, _ = iou_and_grad(
        px1, py1, px2, py2, tx1, ty1, tx2, ty2, UNION_EPS, False
    )
    iou, clear = at_least(iou, EPS)
    if MODE == "log":
        loss = -tl.log(iou)
        slope = -clear / iou
    elif MODE == "square":
        loss = 1.0 - iou * iou
        slope = -2.0 * clear * iou
    else:
        loss = 1.0 - iou
        slope = -clear
    a, b, c, d, e, f, g, h = area_chain(
        px1, py1, px2, py2, tx1, ty1, tx2, ty2, slope * by_inter, slope * by_area
    )
    return loss, a, b, c, d, e, f, g, h


@triton.jit
def giou_loss_and_grad(px1, py1, px2, py2, tx1, ty1, tx2, ty2, EPS: tl.constexpr):
    iou, union, by_inter, by_area, clear = iou_and_grad(
        px1, py1, px2, py2, tx1, ty1, tx2, ty2, EPS, False
    )
    raw_w, wp1, wp2, wt1, wt2 = hull_1d(px1, px2, tx1, tx2)
    raw_h, hp1, hp2, ht1, ht2 = hull_1d(py1, py2, ty1, ty2)
    w, w_clear = at_least(raw_w, 0.0)
    h, h_clear = at_least(raw_h, 0.0)
    hull, hull_clear = at_least(w * h, EPS)
    loss = 1.0 - iou + (hull - union) / hull
    # d loss = -d iou - d union / hull + union / hull^2 d hull
    a, b, c, d, e, f, g, i = area_chain(
        px1, py1, px2, py2, tx1, ty1, tx2, ty2,
        clear / hull - by_inter, -clear / hull - by_area,
    )  # fmt: skip
    by_hull = union / hull / hull * hull_clear
    w = w * h_clear * by_hull
    h = h * w_clear * by_hull
    return (
        loss,
        a + h * wp1,
        b + w * hp1,
        c + h * wp2,
        d + w * hp2,
        e + h * wt1,
        f + w * ht1,
        g + h * wt2,
        i + w * ht2,
    )


@triton.jit
def centre_and_grad(px1, py1, px2, py2, tx1, ty1, tx2, ty2, EPS: tl.constexpr):
    """Squared centre distance over the squared hull diagonal (plus EPS), and its 8 derivatives."""
    sx = px1 + px2 - tx1 - tx2
    sy = py1 + py2 - ty1 - ty2
    w, wp1, wp2, wt1, wt2 = hull_1d(px1, px2, tx1, tx2)
    h, hp1, hp2, ht1, ht2 = hull_1d(py1, py2, ty1, ty2)
    diagonal = w * w + h * h + EPS
    ratio = (sx * sx + sy * sy) * 0.25 / diagonal
    sx = 0.5 * sx / diagonal
    sy = 0.5 * sy / diagonal
    w = -2.0 * w * ratio / diagonal
    h = -2.0 * h * ratio / diagonal
    return (
        ratio,
        sx + w * wp1,
        sy + h * hp1,
        sx + w * wp2,
        sy + h * hp2,
        w * wt1 - sx,
        h * ht1 - sy,
        w * wt2 - sx,
        h * ht2 - sy,
    )


@triton.jit
def diou_loss_and_grad(px1, py1, px2, py2, tx1, ty1, tx2, ty2, EPS: tl.constexpr):
    iou, _, by_inter, by_area, _ = iou_and_grad(px1, py1, px2, py2, tx1, ty1, tx2, ty2, EPS, True)
    ratio, a, b, c, d, e, f, g, h = centre_and_grad(px1, py1, px2, py2, tx1, ty1, tx2, ty2, EPS)
    i, j, k, m, n, o, p, q = area_chain(px1, py1, px2, py2, tx1, ty1, tx2, ty2, -by_inter, -by_area)
    return 1.0 - iou + ratio, a + i, b + j, c + k, d + m, e + n, f + o, g + p, h + q


@triton.jit
def aspect_and_grad(pw, ph, tw, th, iou, EPS: tl.constexpr, ALPHA_GRAD: tl.constexpr):
    """alpha v of the CIoU, and its derivatives by (iou, pw, ph, tw, th): widths and heights.

    v = 4 / pi^2 (atan(pw / ph) - atan(tw / th))^2, alpha = v / (v - iou + 1 + EPS), EPS added to
    the heights. Without ALPHA_GRAD alpha is a constant.
    """
    ph = ph + EPS
    th = th + EPS
    angle = atan(pw / ph) - atan(tw / th)
    v = FOUR_OVER_PI_SQUARED * angle * angle
    alpha = v / (v - iou + 1.0 + EPS)
    if ALPHA_GRAD:
        by_iou = alpha * alpha
        by_angle = alpha * (2.0 - alpha) * (2.0 * FOUR_OVER_PI_SQUARED) * angle
    else:
        by_iou = 0.0
        by_angle = alpha * (2.0 * FOUR_OVER_PI_SQUARED) * angle
    p_scale = by_angle / (pw * pw + ph * ph)
    t_scale = -by_angle / (tw * tw + th * th)
    return alpha * v, by_iou, ph * p_scale, -pw * p_scale, th * t_scale, -tw * t_scale


@triton.jit
def ciou_loss_and_grad(
    px1, py1, px2, py2, tx1, ty1, tx2, ty2, EPS: tl.constexpr, ALPHA_GRAD: tl.constexpr
):
    iou, _, by_inter, by_area, _ = iou_and_grad(px1, py1, px2, py2, tx1, ty1, tx2, ty2, EPS, True)
    ratio, a, b, c, d, e, f, g, h = centre_and_grad(px1, py1, px2, py2, tx1, ty1, tx2, ty2, EPS)
    aspect, by_iou, pw, ph, tw, th = aspect_and_grad(
        px2 - px1, py2 - py1, tx2 - tx1, ty2 - ty1, iou, EPS, ALPHA_GRAD
    )
    by_iou = by_iou - 1.0
    i, j, k, m, n, o, p, q = area_chain(
        px1, py1, px2, py2, tx1, ty1, tx2, ty2, by_iou * by_inter, by_iou * by_area
    )
    return (
        1.0 - iou + ratio + aspect,
        a + i - pw,
        b + j - ph,
        c + k + pw,
        d + m + ph,
        e + n - tw,
        f + o - th,
        g + p + tw,
        h + q + th,
    )


@triton.jit
def two_bin_and_grad(x, is_left, is_right, weight_left, weight_right):
    """-(weight_left log p[left] + weight_right log p[right]) of each row, p = softmax(x).

    x [BR, BK] is -inf beyond the last bin; is_left, is_right [BR, BK] mark bins, weights [BR, 1].
    """
    top = tl.max(x, axis=1)[:, None]
    top = tl.where(top == float("-inf"), 0.0, top)
    e = tl.exp(x - top)
    total = tl.sum(e, axis=1)[:, None]
    weight = tl.where(is_left, weight_left, 0.0) + tl.where(is_right, weight_right, 0.0)
    log_p = x - top - tl.log(total)
    loss = -tl.sum(tl.where(weight != 0.0, weight * log_p, 0.0), axis=1)
    return loss, (weight_left + weight_right) * (e / total) - weight


@triton.jit
def delta_decode_1d(delta, log_ratio, low, high, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
    """One axis of a box decoded from its deltas: (low, high), d low, d high by (delta, log_ratio).

    |log_ratio| is clamped to LIMIT; where SHIFT > 0 only from above, and the centre moves by SHIFT
    at most.
    """
    size = high - low
    shift = delta * size
    below = log_ratio < -LIMIT
    above = log_ratio > LIMIT
    slope = size
    if SHIFT > 0:
        slope = tl.where(tl.abs(shift) > SHIFT, 0.0, size)
        shift = tl.where(shift > SHIFT, SHIFT, tl.where(shift < -SHIFT, -SHIFT, shift))
        below = log_ratio < float("-inf")  # nothing is, and NaN stays NaN
    ratio = tl.where(above, LIMIT, tl.where(below, -LIMIT, log_ratio))
    half = 0.5 * size * tl.exp(ratio)
    centre = 0.5 * (low + high) + shift
    return centre - half, centre + half, slope, tl.where(above | below, 0.0, half)


@triton.jit
def distillation_and_grad(x, t, m_column, TEMPERATURE: tl.constexpr):
    """T^2 KL(softmax(t / T) || softmax(x / T)) of each row [BR, BK] and its gradient by x."""
    low = float("-inf")
    x = tl.where(m_column, x / TEMPERATURE, low)
    t = tl.where(m_column, t / TEMPERATURE, low)
    x = x - tl.max(x, axis=1)[:, None]
    t = t - tl.max(t, axis=1)[:, None]
    e_x = tl.exp(x)
    e_t = tl.exp(t)
    sum_x = tl.sum(e_x, axis=1)[:, None]
    sum_t = tl.sum(e_t, axis=1)[:, None]
    p_x = e_x / sum_x
    p_t = e_t / sum_t
    gap = (t - tl.log(sum_t)) - (x - tl.log(sum_x))
    # 0 times infinity counts as 0, but NaN as NaN.
    terms = tl.where(m_column & (p_t != 0.0), p_t * gap, 0.0)
    return TEMPERATURE * TEMPERATURE * tl.sum(terms, axis=1), TEMPERATURE * (p_x - p_t)
