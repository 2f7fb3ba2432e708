"""The distillation methods in float64 NumPy, element by element from the papers' formulas."""

import math

import numpy as np

# --- logits [B, K]


def softmax(row, temperature=1.0):
    exponentials = [math.exp((x - max(row)) / temperature) for x in row]
    return np.array([e / sum(exponentials) for e in exponentials])


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def kd(student, teacher, temperature=4.0):
    rows = [
        divergence(softmax(t, temperature), softmax(s, temperature))
        for s, t in zip(student, teacher, strict=True)
    ]
    return temperature**2 * sum(rows) / len(rows)


def standardised(row):
    mean = sum(row) / len(row)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in row) / (len(row) - 1))
    return np.array([(x - mean) / (1e-7 + deviation) for x in row])


def lskd(student, teacher, temperature=2.0):
    return kd([standardised(s) for s in student], [standardised(t) for t in teacher], temperature)


def dkd(student, teacher, target, alpha=1.0, beta=8.0, temperature=4.0):
    loss = 0.0
    for s, t, y in zip(student, teacher, target, strict=True):
        p_s, p_t = softmax(s, temperature), softmax(t, temperature)
        binary = divergence([p_t[y], 1 - p_t[y]], [p_s[y], 1 - p_s[y]])
        others = divergence(
            softmax(np.delete(t, y), temperature), softmax(np.delete(s, y), temperature)
        )  # fmt: skip
        loss += alpha * binary + beta * others
    return temperature**2 * loss / len(student)


def pearson(u, v):
    u, v = u - sum(u) / len(u), v - sum(v) / len(v)
    lengths = math.sqrt(sum(x * x for x in u)) * math.sqrt(sum(x * x for x in v))
    return sum(x * y for x, y in zip(u, v, strict=True)) / (lengths + 1e-8)


def dist(student, teacher, beta=1.0, gamma=1.0, temperature=1.0):
    p_s, p_t = (np.array([softmax(row, temperature) for row in z]) for z in (student, teacher))
    batch, classes = p_s.shape
    inter = sum(pearson(p_s[b], p_t[b]) for b in range(batch)) / batch
    intra = sum(pearson(p_s[:, k], p_t[:, k]) for k in range(classes)) / classes
    return temperature**2 * (beta * (1 - inter) + gamma * (1 - intra))


def transported(p_s, p_t, cost, regularisation, iterations):
    """The cost of the plan after so many steps of Sinkhorn's algorithm."""
    count = range(len(p_s))
    kernel = np.exp(-cost / regularisation)
    u = [1 / len(p_s)] * len(p_s)
    for _ in range(iterations):
        v = [p_t[j] / (sum(kernel[i, j] * u[i] for i in count) + 1e-8) for j in count]
        u = [p_s[i] / (sum(kernel[i, j] * v[j] for j in count) + 1e-8) for i in count]
    return sum(u[i] * kernel[i, j] * cost[i, j] * v[j] for i in count for j in count)


def wkd_logits(
    student, teacher, target, distances, *, transport=10.0, temperature=2.0, sharpness=1.0,
    regularisation=0.05, iterations=10,
):  # fmt: skip
    """The target's row and column of the costs are left out."""
    loss = 0.0
    for s, t, y in zip(student, teacher, target, strict=True):
        others = np.delete(np.delete(distances, y, 0), y, 1)
        p_s, p_t = (softmax(np.delete(each, y), temperature) for each in (s, t))
        cost = 1 - np.exp(-sharpness * others)
        loss += transport * transported(p_s, p_t, cost, regularisation, iterations)
        loss -= softmax(t)[y] * math.log(softmax(s)[y])
    return loss / len(student)


def cka(one, two):
    """Linear, of [N, D] each, from the covariances of their columns."""
    one, two = (each - each.mean(0) for each in (one, two))

    def size(a, b):
        return sum(sum(x * y) ** 2 for x in a.T for y in b.T)

    return size(one, two) / math.sqrt(size(one, one) * size(two, two))


# --- features [B, C, H, W], omega [B, H, W]
def pool(features, height, width):
    """The mean of the cells that each new cell covers."""
    out = np.zeros((*features.shape[:2], height, width))
    rows, columns = features.shape[2:]
    for b, c, y, x in np.ndindex(out.shape):
        top, bottom = y * rows // height, -(-(y + 1) * rows // height)
        left, right = x * columns // width, -(-(x + 1) * columns // width)
        cells = [features[b, c, i, j] for i in range(top, bottom) for j in range(left, right)]
        out[b, c, y, x] = sum(cells) / len(cells)
    return out


def omega_at(weight, features):
    """omega at the size of a smaller or equal map."""
    return pool(weight[:, None], *features.shape[2:])[:, 0]


def masked(features, weight):
    if weight is None:
        return features
    omega, out = omega_at(weight, features), np.zeros(features.shape)
    for b, c, y, x in np.ndindex(features.shape):
        out[b, c, y, x] = math.sqrt(omega[b, y, x]) * features[b, c, y, x]
    return out


def fitnet(student, teacher, weight=None):
    loss = 0.0
    for b, c, y, x in np.ndindex(student.shape):
        omega = 1.0 if weight is None else weight[b, y, x]
        loss += omega * (student[b, c, y, x] - teacher[b, c, y, x]) ** 2
    return loss / student.size


def attention(features, weight):
    """Q [H * W] of one sample."""
    channels, height, width = features.shape
    energy = [
        (1.0 if weight is None else weight[y, x])
        * sum(features[c, y, x] ** 2 for c in range(channels))
        for y, x in np.ndindex(height, width)
    ]
    length = math.sqrt(sum(e * e for e in energy))
    return [e / length for e in energy]


def at(student, teacher, weight=None):
    height, width = (min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True))
    student, teacher = pool(student, height, width), pool(teacher, height, width)
    weight = None if weight is None else omega_at(weight, student)
    loss = 0.0
    for b in range(len(student)):
        omega = None if weight is None else weight[b]
        pairs = zip(attention(student[b], omega), attention(teacher[b], omega), strict=True)
        loss += sum((s - t) ** 2 for s, t in pairs)
    return loss / (len(student) * height * width)


def similarity(features, weight):
    rows = masked(features, weight).reshape(len(features), -1)
    products = np.array([[sum(a * b) for b in rows] for a in rows])
    return np.array([row / math.sqrt(sum(row**2)) for row in products])


def sp(student, teacher, weight=None):
    apart = similarity(student, weight) - similarity(teacher, weight)
    return (apart**2).sum() / len(student) ** 2


def smaller(student, teacher, weight):
    """Both in the smaller size of each axis, masked."""
    size = [min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    return (masked(pool(each, *size), weight) for each in (student, teacher))


def nst(student, teacher, weight=None):
    """The kernel of every two channels."""
    loss = 0.0
    for s, t in zip(*smaller(student, teacher, weight), strict=True):
        own, other = ([row.ravel() / math.sqrt((row**2).sum()) for row in each] for each in (s, t))
        for one, two, factor in ((own, own, 1), (other, other, 1), (own, other, -2)):
            kernels = [sum(a * b) ** 2 for a in one for b in two]
            loss += factor * sum(kernels) / len(kernels)
    return loss / len(student)


def neighbours(points):
    unit = [point / math.sqrt(sum(point**2)) for point in points]
    near = np.array([[(1 + sum(a * b)) / 2 for b in unit] for a in unit])
    return near / near.sum(1, keepdims=True)


def pkt(student, teacher, weight=None):
    p_s, p_t = (neighbours(embedding(each, weight)) for each in (student, teacher))
    pairs = list(zip(p_s.ravel(), p_t.ravel(), strict=True))
    return sum(t * math.log((t + 1e-7) / (s + 1e-7)) for s, t in pairs) / len(pairs)


def cc(student, teacher, weight=None, gamma=0.4, order=2):
    def kernel(features):
        points = embedding(features, weight)
        unit = [point / math.sqrt(sum(point**2)) for point in points]
        return np.array([
            [sum(math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * sum(a * b) ** p
                 for p in range(order + 1)) for b in unit]
            for a in unit
        ])  # fmt: skip

    return ((kernel(student) - kernel(teacher)) ** 2).mean()


def huber(a, b):
    return (a - b) ** 2 / 2 if abs(a - b) < 1 else abs(a - b) - 0.5


def embedding(features, weight):
    return features if features.ndim == 2 else masked(features, weight).mean((2, 3))


def relations(points):
    """Relative distances {(i, j)} and cosines {(i, j, k)} at i."""
    count = range(len(points))
    far = {(i, j): math.sqrt(sum((points[i] - points[j]) ** 2)) for i in count for j in count}
    apart = [d for d in far.values() if d > 0]
    mean = sum(apart) / len(apart) if apart else 1.0

    def direction(i, j):
        return (points[j] - points[i]) / far[i, j] if far[i, j] > 0 else 0 * points[i]

    turns = {
        (i, j, k): sum(direction(i, j) * direction(i, k))
        for i in count
        for j in count
        for k in count
    }
    return {pair: d / mean for pair, d in far.items()}, turns


def rkd(student, teacher, weight=None, distance=25.0, angle=50.0):
    both = (relations(embedding(each, weight)) for each in (student, teacher))
    far, turns = zip(*both, strict=True)
    distances = sum(huber(far[0][key], far[1][key]) for key in far[0]) / len(far[0])
    angles = sum(huber(turns[0][key], turns[1][key]) for key in turns[0]) / len(turns[0])
    return distance * distances + angle * angles


def class_maps(features, head):
    batch, _, height, width = features.shape
    out = np.zeros((batch, len(head), height, width))
    for b, k, y, x in np.ndindex(out.shape):
        out[b, k, y, x] = sum(head[k] * features[b, :, y, x])
    return out


def catkd(student, teacher, weight=None, resolution=2, normalise=True):
    loss = 0.0
    pooled = [pool(masked(each, weight), resolution, resolution) for each in (student, teacher)]
    for b, k in np.ndindex(student.shape[:2]):
        s, t = (each[b, k].ravel() for each in pooled)
        if normalise:
            s, t = (each / max(math.sqrt(sum(each**2)), 1e-12) for each in (s, t))
        loss += sum((s - t) ** 2)
    return loss / (student.shape[0] * student.shape[1] * resolution**2)


def hcl(student, teacher, weight=None):
    student, teacher = masked(student, weight), masked(teacher, weight)
    loss, norm, factor = fitnet(student, teacher), 1.0, 1.0
    for side in (4, 2, 1):
        if side < min(student.shape[2:]):
            factor /= 2
            loss += factor * fitnet(pool(student, side, side), pool(teacher, side, side))
            norm += factor
    return loss / norm


def moments(features, grid):
    """Means and standard deviations [B, C, g, g] over the cells that each region covers."""
    height, width = (min(grid, side) for side in features.shape[2:])
    means = pool(features, height, width)
    deviations = np.zeros(means.shape)
    rows, columns = features.shape[2:]
    for b, c, y, x in np.ndindex(means.shape):
        down = range(y * rows // height, -(-(y + 1) * rows // height))
        across = range(x * columns // width, -(-(x + 1) * columns // width))
        squares = [(features[b, c, i, j] - means[b, c, y, x]) ** 2 for i in down for j in across]
        variance = sum(squares) / (len(squares) - 1) if len(squares) > 1 else 0.0
        deviations[b, c, y, x] = math.sqrt(variance + 1e-5)
    return means, deviations


def wkd_features(student, teacher, weight=None, means=2.0, grid=4):
    (mean_s, deviation_s), (mean_t, deviation_t) = (
        moments(masked(each, weight), grid) for each in (student, teacher)
    )
    loss = means * ((mean_s - mean_t) ** 2).sum() + ((deviation_s - deviation_t) ** 2).sum()
    return loss / (len(student) * mean_s.shape[2] * mean_s.shape[3])


# --- modules: their parameters as arrays
def convolution(features, kernel, bias=None):
    """Zero padding that keeps the size; kernel [C_out, C_in, k, k]."""
    batch, channels, height, width = features.shape
    reach = kernel.shape[2] // 2
    out = np.zeros((batch, len(kernel), height, width))
    for b, o, y, x in np.ndindex(out.shape):
        value = 0.0 if bias is None else bias[o]
        for c, i, j in np.ndindex(channels, kernel.shape[2], kernel.shape[3]):
            row, column = y + i - reach, x + j - reach
            if 0 <= row < height and 0 <= column < width:
                value += kernel[o, c, i, j] * features[b, c, row, column]
        out[b, o, y, x] = value
    return out


def batch_norm(features, gain, shift, mean, variance):
    """BatchNorm with the running statistics."""
    out = np.zeros(features.shape)
    for b, c, y, x in np.ndindex(features.shape):
        scaled = gain[c] * (features[b, c, y, x] - mean[c]) / math.sqrt(variance[c] + 1e-5)
        out[b, c, y, x] = scaled + shift[c]
    return out


def nearest(features, height, width):
    rows, columns = features.shape[2:]
    out = np.zeros((*features.shape[:2], height, width))
    for b, c, y, x in np.ndindex(out.shape):
        out[b, c, y, x] = features[b, c, y * rows // height, x * columns // width]
    return out


def abf(features, deeper, size, reduce, attention_conv, expand):
    """reduce, expand: (kernel, *batch norm); attention_conv: (kernel, bias) or None."""
    fused = batch_norm(convolution(features, reduce[0]), *reduce[1:])
    if deeper is not None:
        deeper = nearest(deeper, *fused.shape[2:])
        logits = convolution(np.concatenate([fused, deeper], 1), *attention_conv)
        share = 1 / (1 + np.exp(-logits))
        fused = share[:, :1] * fused + share[:, 1:] * deeper
    fused = nearest(fused, *size)
    return batch_norm(convolution(fused, expand[0]), *expand[1:]), fused


def generated(features, keep, first, second):
    """MGD's generator on the kept part; first, second: (kernel, bias)."""
    return convolution(np.maximum(convolution(keep * features, *first), 0), *second)


def attentions(features, cells, temperature):
    """FGD's attention over the cells {(y, x): } and the channels [C] of one sample [C, H, W]."""
    energies = {(y, x): np.mean(np.abs(features[:, y, x])) for y, x in cells}
    strengths = [np.mean([abs(channel[y, x]) for y, x in cells]) for channel in features]
    where = len(cells) * softmax(np.array(list(energies.values())), temperature)
    return dict(zip(energies, where, strict=True)), len(features) * softmax(strengths, temperature)


def covered(box, cells, size, input_size):
    """The cells of an image that a box touches."""
    found = []
    for y, x in cells:
        top, bottom = (edge * input_size[0] / size[0] for edge in (y, y + 1))
        left, right = (edge * input_size[1] / size[1] for edge in (x, x + 1))
        if box[0] < right and box[2] > left and box[1] < bottom and box[3] > top:
            found.append((y, x))
    return found


def context(features, cells, score, first, norm, last):
    """GcBlock's addition [C] for one sample; first, norm, last: (weight, bias)."""
    share = softmax([sum(score * features[:, y, x]) for y, x in cells])
    pooled = sum(p * features[:, y, x] for p, (y, x) in zip(share, cells, strict=True))
    hidden = first[0] @ pooled + first[1]
    hidden = (hidden - hidden.mean()) / math.sqrt(hidden.var() + 1e-5) * norm[0] + norm[1]
    return last[0] @ np.maximum(hidden, 0) + last[1]


def fgd(
    student, teacher, boxes, input_size, image_sizes, weight, contexts, *, foreground=1e-3,
    background=5e-4, attention=1e-3, relation=5e-6, temperature=0.5,
):  # fmt: skip
    """contexts: the arguments of `context` after the cells, for each side."""
    loss, size = 0.0, student.shape[2:]
    for b, (f_s, f_t) in enumerate(zip(student, teacher, strict=True)):
        cells = [
            (y, x) for y, x in np.ndindex(size)
            if y * input_size[0] / size[0] < image_sizes[b][0]
            and x * input_size[1] / size[1] < image_sizes[b][1]
        ]  # fmt: skip
        density = dict.fromkeys(cells, 0.0)
        for box in boxes[b]:
            touched = covered(box, cells, size, input_size)
            for cell in touched:
                density[cell] = max(density[cell], 1 / len(touched))
        behind = sum(value == 0 for value in density.values())
        (where_s, which_s), (where_t, which_t) = (
            attentions(each, cells, temperature) for each in (f_s, f_t)
        )
        added = context(f_s, cells, *contexts[0]) - context(f_t, cells, *contexts[1])
        for y, x in cells:
            omega = 1.0 if weight is None else weight[b, y, x]
            focus = foreground * density[y, x] if density[y, x] else background / behind
            difference = f_s[:, y, x] - f_t[:, y, x]
            loss += focus * where_t[y, x] * omega * sum(which_t * difference**2)
            loss += relation * omega * sum((difference + added) ** 2)
            loss += attention * abs(where_s[y, x] - where_t[y, x])
        loss += attention * sum(abs(which_s - which_t))
    return loss / len(student)


def vid(student, teacher, weight, kernels, scale):
    """kernels: of the three 1x1 convolutions; scale [C]."""
    size = [min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    mean, teacher = pool(student, *size), pool(teacher, *size)
    omega = np.ones(mean[:, 0].shape) if weight is None else omega_at(weight, mean)
    for place, kernel in enumerate(kernels):
        mean = convolution(np.maximum(mean, 0) if place else mean, kernel)
    loss = 0.0
    for b, c, y, x in np.ndindex(mean.shape):
        variance = math.log(1 + math.exp(scale[c])) + 1e-5
        distance = (teacher[b, c, y, x] - mean[b, c, y, x]) ** 2
        loss += omega[b, y, x] * 0.5 * (distance / variance + math.log(variance))
    return loss / mean.size


def ofd(student, teacher, weight, margin, kernel, norm):
    """norm: the connector's batch norm; margin [C] or None."""
    size = [min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    own = batch_norm(convolution(pool(student, *size), kernel), *norm)
    teacher = pool(teacher, *size)
    omega = np.ones(own[:, 0].shape) if weight is None else omega_at(weight, own)
    loss = 0.0
    for b, c, y, x in np.ndindex(own.shape):
        negative = teacher[:, c][teacher[:, c] < 0]
        lowest = negative.mean() if margin is None else margin[c]
        s, t = own[b, c, y, x], max(teacher[b, c, y, x], lowest)
        loss += 0.0 if s <= t <= 0 else omega[b, y, x] * (t - s) ** 2
    return loss / len(own)


def normalised(row):
    return row / math.sqrt(sum(row**2))


def contrast(anchor, bank, index, others, temperature, log_z=None):
    """CRD for one side -> loss, log Z."""
    count, scores = len(bank), []
    for v, own, rest in zip(anchor, index, others, strict=True):
        scores.append([math.exp(sum(v * bank[k]) / temperature) for k in (own, *rest)])
    z = count * np.mean(scores) if log_z is None else math.exp(log_z)
    noise = others.shape[1] / count
    loss = 0.0
    for own, *rest in scores:
        loss -= math.log(own / z / (own / z + noise))
        loss -= sum(math.log(noise / (h / z + noise)) for h in rest)
    return loss / len(anchor), math.log(z)


def remembered(bank, index, anchor, momentum):
    bank = bank.copy()
    for k, v in zip(index, anchor, strict=True):
        bank[k] = normalised(momentum * bank[k] + (1 - momentum) * v)
    return bank
