"""Pointer-free device functions `<name>_and_grad`: values in, (loss, gradients...) out, in float32.

Each is the twin of one torch reference in `detloss_triton/ops`; `<name>_background` is a class loss
of entries that are not their row's label. A box is a tuple (x1, y1, x2, y2), and so is a gradient
by one; an interval is (low, high). A caller that drops a result pays nothing for it: the compiler
removes what is unused. Ties of a minimum or maximum give half of the gradient to each side, as
torch does. Only what every Triton target has is used: no libdevice.
"""

import math

import triton
import triton.language as tl

FOUR_OVER_PI_SQUARED: tl.constexpr = tl.constexpr(4 / math.pi**2)
LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))
HALF_PI: tl.constexpr = tl.constexpr(math.pi / 2)
QUARTER_PI: tl.constexpr = tl.constexpr(math.pi / 4)
TAN_EIGHTH_PI: tl.constexpr = tl.constexpr(math.sqrt(2) - 1)


@triton.jit
def log1p(u):
    """log(1 + u) for 0 <= u <= 1 to 1.3 units in the last place: u times a minimax polynomial."""
    y = -3.2439807e-3 * u + 1.9851262e-2
    y = (y * u - 5.6959160e-2) * u + 1.0603617e-1
    y = (y * u - 1.5305570e-1) * u + 1.9675931e-1
    y = (y * u - 2.4954133e-1) * u + 3.3329964e-1
    y = (y * u - 4.9999902e-1) * u + 1.0
    return y * u


@triton.jit
def logistic(x):
    """(softplus(x), sigmoid(x), 1 - sigmoid(x)), none of which overflows or cancels."""
    # On NVIDIA this takes 4 instructions less than exp: denormals become 0.
    u = tl.exp2(tl.abs(x) * -LOG2_E)
    high = 1.0 / (1.0 + u)
    low = u * high
    # The maximum skips NaN, which u brings back.
    softplus = tl.maximum(x, 0.0) + log1p(u)
    return softplus, tl.where(x >= 0, high, low), tl.where(x >= 0, low, high)


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
def varifocal_and_grad(x, t):
    """At the label."""
    softplus, p, _ = logistic(x)
    return t * (softplus - x * t), t * (p - t)


@triton.jit
def matchability_and_grad(x, q, GAMMA: tl.constexpr):
    """At the label."""
    return bce_and_grad(x, power(q, GAMMA))


@triton.jit
def iou_aware_and_grad(x, q, ALPHA: tl.constexpr, LEAST: tl.constexpr):
    """At the label."""
    _, p, _ = logistic(x)
    t, _ = at_least(power(p, ALPHA) * power(q, 1.0 - ALPHA), LEAST)
    return bce_and_grad(x, t)


@triton.jit
def bce_background(x):
    softplus, p, _ = logistic(x)
    return softplus, p


@triton.jit
def focal_background(x, ALPHA: tl.constexpr, GAMMA: tl.constexpr):
    softplus, p, q = logistic(x)
    scale = power(p, GAMMA)
    if ALPHA >= 0:
        scale *= 1.0 - ALPHA
    if GAMMA == 0.0:
        dx = scale * p
    else:
        dx = scale * (p + GAMMA * q * softplus)
    return scale * softplus, dx


@triton.jit
def quality_focal_background(x, BETA: tl.constexpr):
    return focal_background(x, -1.0, BETA)


@triton.jit
def varifocal_background(x, ALPHA: tl.constexpr, GAMMA: tl.constexpr):
    softplus, p, _ = logistic(x)
    scale = ALPHA * power(p, GAMMA)
    return scale * softplus, scale * p


@triton.jit
def l1_and_grad(x):
    return tl.abs(x), tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x * 0.0))


@triton.jit
def smooth_l1_and_grad(x, BETA: tl.constexpr):
    size, sign = l1_and_grad(x)
    near = size < BETA
    loss = tl.where(near, 0.5 * x * x / BETA, size - 0.5 * BETA)
    return loss, tl.where(near, x / BETA, sign)


@triton.jit
def at_least(x, low):
    """(max(x, low), its derivative by x): 1 at a tie; NaN passes, as in torch's clamp."""
    below = x < low
    return tl.where(below, low, x), tl.where(below, 0.0, 1.0)


@triton.jit
def larger(a, b):
    """(max(a, b), its derivative by a): 0.5 at a tie; NaN passes, as in torch."""
    high = tl.where((a > b) | (a != a), a, b)
    return high, tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0))


@triton.jit
def smaller(a, b):
    """(min(a, b), its derivative by a): 0.5 at a tie; NaN passes, as in torch."""
    low = tl.where((a < b) | (a != a), a, b)
    return low, tl.where(a < b, 1.0, tl.where(a == b, 0.5, 0.0))


@triton.jit
def atan(x):
    """Arc tangent to 2 units in the last place: folded to [0, tan(pi/8)], an odd polynomial."""
    size = tl.abs(x)
    steep = size > 1.0
    z = tl.where(steep, 1.0 / tl.where(steep, size, 1.0), size)
    upper = z > TAN_EIGHTH_PI
    z = tl.where(upper, (z - 1.0) / (z + 1.0), z)
    s = z * z
    y = 8.05374449538e-2 * s - 1.38776856032e-1
    y = (y * s + 1.99777106478e-1) * s - 3.33329491539e-1
    y = y * s * z + z
    y = tl.where(upper, y + QUARTER_PI, y)
    y = tl.where(steep, HALF_PI - y, y)
    return tl.where(x < 0, -y, y)


@triton.jit
def xs(box):
    """The interval that a box covers in x."""
    return box[0], box[2]


@triton.jit
def ys(box):
    return box[1], box[3]


@triton.jit
def size(box):
    """(width, height)."""
    return box[2] - box[0], box[3] - box[1]


@triton.jit
def corners(box):
    """A box cxcywh as xyxy."""
    x, y, w, h = box
    return x - 0.5 * w, y - 0.5 * h, x + 0.5 * w, y + 0.5 * h


@triton.jit
def added(a, b):
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]


@triton.jit
def times(box, factor):
    return box[0] * factor, box[1] * factor, box[2] * factor, box[3] * factor


@triton.jit
def masked(box, mask):
    """The box where the mask is set, else 0."""
    return (
        tl.where(mask, box[0], 0.0),
        tl.where(mask, box[1], 0.0),
        tl.where(mask, box[2], 0.0),
        tl.where(mask, box[3], 0.0),
    )


@triton.jit
def by_extents(by_w, w_by_x, by_h, h_by_y):
    """Derivative by a box of a function of a width and a height: the chain rule.

    w_by_x, h_by_y: derivatives of the width and the height by the box's intervals in x and y.
    """
    return by_w * w_by_x[0], by_h * h_by_y[0], by_w * w_by_x[1], by_h * h_by_y[1]


@triton.jit
def by_size(by_w, by_h):
    """Derivative by a box of a function of its own width and height."""
    return by_extents(by_w, (-1.0, 1.0), by_h, (-1.0, 1.0))


@triton.jit
def overlap_1d(p, t):
    """Overlap of two intervals, clamped at 0; its derivatives by p and by t."""
    low, by_p1 = larger(p[0], t[0])
    high, by_p2 = smaller(p[1], t[1])
    length, clear = at_least(high - low, 0.0)
    return length, (-by_p1 * clear, by_p2 * clear), ((by_p1 - 1.0) * clear, (1.0 - by_p2) * clear)


@triton.jit
def hull_1d(p, t):
    """Length of the smallest interval around both; its derivatives by p and by t."""
    low, by_p1 = smaller(p[0], t[0])
    high, by_p2 = larger(p[1], t[1])
    return high - low, (-by_p1, by_p2), (by_p1 - 1.0, 1.0 - by_p2)


@triton.jit
def iou_and_grad(p, t, EPS: tl.constexpr, ADD_EPS: tl.constexpr):
    """(IoU, union, d IoU / d intersection, d IoU / d area, 0 where the union is clamped else 1).

    The union has EPS added with ADD_EPS, else it is at least EPS.
    """
    w, _, _ = overlap_1d(xs(p), xs(t))
    h, _, _ = overlap_1d(ys(p), ys(t))
    inter = w * h
    p_w, p_h = size(p)
    t_w, t_h = size(t)
    total = p_w * p_h + t_w * t_h - inter
    if ADD_EPS:
        union = total + EPS
        clear = 1.0
    else:
        union, clear = at_least(total, EPS)
    iou = inter / union
    by_area = -iou / union * clear
    return iou, union, 1.0 / union - by_area, by_area, clear


@triton.jit
def area_chain(p, t, by_inter, by_area):
    """Derivatives by p and by t of a function of their intersection and the sum of their areas."""
    w, w_by_p, w_by_t = overlap_1d(xs(p), xs(t))
    h, h_by_p, h_by_t = overlap_1d(ys(p), ys(t))
    p_w, p_h = size(p)
    t_w, t_h = size(t)
    by_w = h * by_inter
    by_h = w * by_inter
    return (
        added(by_extents(by_w, w_by_p, by_h, h_by_p), by_size(p_h * by_area, p_w * by_area)),
        added(by_extents(by_w, w_by_t, by_h, h_by_t), by_size(t_h * by_area, t_w * by_area)),
    )


@triton.jit
def iou_loss_and_grad(p, t, UNION_EPS: tl.constexpr, EPS: tl.constexpr, MODE: tl.constexpr):
    iou, _, by_inter, by_area, _ = iou_and_grad(p, t, UNION_EPS, False)
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
    dp, dt = area_chain(p, t, slope * by_inter, slope * by_area)
    return loss, dp, dt


@triton.jit
def giou_loss_and_grad(p, t, EPS: tl.constexpr):
    iou, union, by_inter, by_area, clear = iou_and_grad(p, t, EPS, False)
    w, w_by_p, w_by_t = hull_1d(xs(p), xs(t))
    h, h_by_p, h_by_t = hull_1d(ys(p), ys(t))
    w, w_clear = at_least(w, 0.0)
    h, h_clear = at_least(h, 0.0)
    hull, hull_clear = at_least(w * h, EPS)
    loss = 1.0 - iou + (hull - union) / hull
    # d loss = -d iou - d union / hull + union / hull^2 d hull
    dp, dt = area_chain(p, t, clear / hull - by_inter, -clear / hull - by_area)
    by_hull = union / hull / hull * hull_clear
    by_w = h * w_clear * by_hull
    by_h = w * h_clear * by_hull
    return (
        loss,
        added(dp, by_extents(by_w, w_by_p, by_h, h_by_p)),
        added(dt, by_extents(by_w, w_by_t, by_h, h_by_t)),
    )


@triton.jit
def centre_and_grad(p, t, EPS: tl.constexpr):
    """Squared centre distance over squared hull diagonal (plus EPS), its derivatives by p and t."""
    x = p[0] + p[2] - t[0] - t[2]
    y = p[1] + p[3] - t[1] - t[3]
    w, w_by_p, w_by_t = hull_1d(xs(p), xs(t))
    h, h_by_p, h_by_t = hull_1d(ys(p), ys(t))
    diagonal = w * w + h * h + EPS
    ratio = (x * x + y * y) * 0.25 / diagonal
    by_x = 0.5 * x / diagonal
    by_y = 0.5 * y / diagonal
    by_w = -2.0 * w * ratio / diagonal
    by_h = -2.0 * h * ratio / diagonal
    return (
        ratio,
        added(by_extents(by_w, w_by_p, by_h, h_by_p), (by_x, by_y, by_x, by_y)),
        added(by_extents(by_w, w_by_t, by_h, h_by_t), (-by_x, -by_y, -by_x, -by_y)),
    )


@triton.jit
def diou_loss_and_grad(p, t, EPS: tl.constexpr):
    iou, _, by_inter, by_area, _ = iou_and_grad(p, t, EPS, True)
    ratio, dp, dt = centre_and_grad(p, t, EPS)
    iou_by_p, iou_by_t = area_chain(p, t, -by_inter, -by_area)
    return 1.0 - iou + ratio, added(dp, iou_by_p), added(dt, iou_by_t)


@triton.jit
def aspect_and_grad(p_size, t_size, iou, EPS: tl.constexpr, ALPHA_GRAD: tl.constexpr):
    """(alpha v of the CIoU, its derivatives by the IoU, by p and by t), sizes (width, height).

    v = 4 / pi^2 (atan(pw / ph) - atan(tw / th))^2, alpha = v / (v - iou + 1 + EPS), EPS added to
    the heights. Without ALPHA_GRAD alpha is a constant.
    """
    p_w, p_h = p_size
    t_w, t_h = t_size
    p_h += EPS
    t_h += EPS
    angle = atan(p_w / p_h) - atan(t_w / t_h)
    v = FOUR_OVER_PI_SQUARED * angle * angle
    alpha = v / (v - iou + 1.0 + EPS)
    if ALPHA_GRAD:
        by_iou = alpha * alpha
        by_angle = alpha * (2.0 - alpha) * (2.0 * FOUR_OVER_PI_SQUARED) * angle
    else:
        by_iou = 0.0
        by_angle = alpha * (2.0 * FOUR_OVER_PI_SQUARED) * angle
    p_scale = by_angle / (p_w * p_w + p_h * p_h)
    t_scale = -by_angle / (t_w * t_w + t_h * t_h)
    dp = by_size(p_h * p_scale, -p_w * p_scale)
    dt = by_size(t_h * t_scale, -t_w * t_scale)
    return alpha * v, by_iou, dp, dt


@triton.jit
def ciou_loss_and_grad(p, t, EPS: tl.constexpr, ALPHA_GRAD: tl.constexpr):
    iou, _, by_inter, by_area, _ = iou_and_grad(p, t, EPS, True)
    ratio, dp, dt = centre_and_grad(p, t, EPS)
    aspect, by_iou, aspect_by_p, aspect_by_t = aspect_and_grad(
        size(p), size(t), iou, EPS, ALPHA_GRAD
    )
    by_iou = by_iou - 1.0
    iou_by_p, iou_by_t = area_chain(p, t, by_iou * by_inter, by_iou * by_area)
    return (
        1.0 - iou + ratio + aspect,
        added(added(dp, iou_by_p), aspect_by_p),
        added(added(dt, iou_by_t), aspect_by_t),
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
def log_sum_exp(top, total, x):
    """(largest entry, sum of exponentials over its own) of rows [BR], with a tile [BR, BC] more."""
    old = top
    top = tl.maximum(top, tl.max(x, axis=1))
    least = tl.where(top == float("-inf"), 0.0, top)
    # The maximum skips NaN, which the sum brings back.
    return top, total * tl.exp(old - least) + tl.sum(tl.exp(x - least[:, None]), axis=1)


@triton.jit
def bin_position(bin, n_bins, up, scale):
    """W(n), the distance that a bin stands for: 0 in the middle, 2 |up scale| at the last."""
    last = n_bins // 2
    n = bin - last
    steps = tl.abs(n).to(tl.float32)
    u = tl.abs(up) * tl.abs(scale)
    size = tl.exp(steps * (2.0 / (n_bins - 3) * tl.log(u + 1.0))) - 1.0
    size = tl.where(tl.abs(n) == last, 2.0 * u, size)
    return tl.where(n < 0, -size, tl.where(n > 0, size, 0.0))


@triton.jit
def delta_decode_1d(delta, log_ratio, anchor, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
    """One axis of a box from its deltas: (low, high, d centre / d delta, d high / d log_ratio).

    d low / d log_ratio is the negative of d high / d log_ratio. |log_ratio| is clamped to LIMIT;
    where SHIFT > 0 only from above, and the centre moves by SHIFT at most.
    """
    low, high = anchor
    size = high - low
    shift = delta * size
    below = log_ratio < -LIMIT
    above = log_ratio > LIMIT
    slope = size
    if SHIFT > 0:
        slope = tl.where(tl.abs(shift) > SHIFT, 0.0, size)
        shift = tl.where(shift > SHIFT, SHIFT, tl.where(shift < -SHIFT, -SHIFT, shift))
        below = log_ratio < float("-inf")  # never
    ratio = tl.where(above, LIMIT, tl.where(below, -LIMIT, log_ratio))
    half = 0.5 * size * tl.exp(ratio)
    centre = 0.5 * (low + high) + shift
    return centre - half, centre + half, slope, tl.where(above | below, 0.0, half)


@triton.jit
def delta_decode(deltas, anchor, CODE: tl.constexpr):
    """A box xyxy from normalised deltas, and what its gradient is multiplied with for theirs.

    CODE is (name, four means, four deviations, limit, shift).
    """
    x, y, w, h = deltas
    x1, x2, by_x, by_w = delta_decode_1d(
        x * CODE[5] + CODE[1], w * CODE[7] + CODE[3], xs(anchor), CODE[9], CODE[10]
    )
    y1, y2, by_y, by_h = delta_decode_1d(
        y * CODE[6] + CODE[2], h * CODE[8] + CODE[4], ys(anchor), CODE[9], CODE[10]
    )
    slopes = (by_x * CODE[5], by_y * CODE[6], by_w * CODE[7], by_h * CODE[8])
    return (x1, y1, x2, y2), slopes


@triton.jit
def delta_encode(box, anchor, CODE: tl.constexpr):
    """Normalised deltas that turn an anchor into a box; CODE is (name, four means, deviations)."""
    width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x = (0.5 * (box[0] + box[2]) - 0.5 * (anchor[0] + anchor[2])) / width
    y = (0.5 * (box[1] + box[3]) - 0.5 * (anchor[1] + anchor[3])) / height
    w = tl.log((box[2] - box[0]) / width)
    h = tl.log((box[3] - box[1]) / height)
    return (
        (x - CODE[1]) / CODE[5],
        (y - CODE[2]) / CODE[6],
        (w - CODE[3]) / CODE[7],
        (h - CODE[4]) / CODE[8],
    )


@triton.jit
def by_deltas(by_box, slopes):
    """The gradient by deltas of what has this gradient by the box they make."""
    dx1, dy1, dx2, dy2 = by_box
    return (
        (dx1 + dx2) * slopes[0],
        (dy1 + dy2) * slopes[1],
        (dx2 - dx1) * slopes[2],
        (dy2 - dy1) * slopes[3],
    )


@triton.jit
def centerness(anchor, box):
    """How central the centre of an anchor is in a box: 1 in the middle, 0 outside."""
    x = 0.5 * (anchor[0] + anchor[2])
    y = 0.5 * (anchor[1] + anchor[3])
    near_x, _ = smaller(x - box[0], box[2] - x)
    far_x, _ = larger(x - box[0], box[2] - x)
    near_y, _ = smaller(y - box[1], box[3] - y)
    far_y, _ = larger(y - box[1], box[3] - y)
    square, _ = at_least(near_x / far_x * (near_y / far_y), 0.0)
    return tl.sqrt(square)


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
    # 0 times an infinite gap is 0; NaN stays NaN.
    terms = tl.where(m_column & (p_t != 0.0), p_t * gap, 0.0)
    return TEMPERATURE * TEMPERATURE * tl.sum(terms, axis=1), TEMPERATURE * (p_x - p_t)
