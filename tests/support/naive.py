"""The operators as float64 loops over single elements, unlike the vectorised twin."""

import math

import numpy as np

MASK = 0xFFFFFFFF


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10, one counter, in Python's own integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(second >> 32) ^ c[1] ^ k[0], second & MASK, (first >> 32) ^ c[3] ^ k[1], first & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def key_of(seed: int) -> list[int]:
    return [seed & MASK, (seed >> 32) & MASK]


def normal(seed: int, plane: int, position: int) -> float:
    """The standard normal of one element."""
    block = position >> 2
    words = philox([block & MASK, block >> 32, plane & MASK, plane >> 32], key_of(seed))
    even, odd = words[0:2] if position & 3 < 2 else words[2:4]
    uniform = float(np.float32(np.float32(even) * np.float32(2.0**-32) + np.float32(2.0**-33)))
    signed = odd - 2**32 if odd >= 2**31 else odd
    angle = 2 * math.pi * float(np.float32(signed)) * 2.0**-32
    radius = math.sqrt(-2 * math.log(uniform))
    return radius * (math.cos(angle) if position & 1 == 0 else math.sin(angle))


def draw(seed: int, counter: int, n: int) -> tuple[list[float], int]:
    """Uniforms and the noise seed."""

    def words(block: int) -> list[int]:
        return philox([block, MASK, *key_of(counter)], key_of(seed))

    uniforms = [((words(1 + i // 4)[i % 4] >> 9) + 0.5) * 2.0**-23 for i in range(n)]
    low, high = words(0)[:2]
    noise_seed = low | high << 32
    return uniforms, noise_seed - 2**64 if noise_seed >= 2**63 else noise_seed


def sample(plane: np.ndarray, theta: np.ndarray, y: int, x: int) -> float:
    """One cell of affine_grid + grid_sample(align_corners=False), as PyTorch documents them."""
    height, width = plane.shape
    u, v = (2 * x + 1) / width - 1, (2 * y + 1) / height - 1
    ix = ((theta[0] @ (u, v, 1) + 1) * width - 1) / 2
    iy = ((theta[1] @ (u, v, 1) + 1) * height - 1) / 2
    total = 0.0
    for row in (math.floor(iy), math.floor(iy) + 1):
        for column in (math.floor(ix), math.floor(ix) + 1):
            if 0 <= row < height and 0 <= column < width:
                total += plane[row, column] * (1 - abs(ix - column)) * (1 - abs(iy - row))
    return total


def refine(features, theta=None, hole=None, sigma=None, perm=None, keep=None, seed=0):  # type: ignore[no-untyped-def]
    """All arguments as float64 / int arrays of NumPy or None."""
    out = np.zeros(features.shape)

    def of(part, n):  # type: ignore[no-untyped-def]
        return None if part is None else part[n if len(part) > 1 else 0]

    for n, c, y, x in np.ndindex(*features.shape):
        if keep is not None and not of(keep, n)[c]:
            continue
        plane = features[n, c if perm is None else of(perm, n)[c]]
        value = plane[y, x] if theta is None else sample(plane, of(theta, n), y, x)
        if hole is not None:
            y0, x0, y1, x1 = of(hole, n)
            value = 0.0 if y0 <= y < y1 and x0 <= x < x1 else value
        if sigma is not None:
            where = n * features.shape[1] + c, y * features.shape[3] + x
            value += of(sigma, n) * normal(seed, *where)
        out[n, c, y, x] = value
    return out


def areas(heat, size, offset, k, kernel):  # type: ignore[no-untyped-def]
    """Coverage, boxes and scores of float64 maps."""
    batch, maps, height, width = heat.shape
    coverage, boxes = (
        np.zeros((batch, height, width)),
        np.tile(np.array([0, 0, -1, -1]), (batch, k, 1)),
    )
    scores, reach = np.zeros((batch, k)), kernel // 2
    for n in range(batch):
        peaks = []
        for a, y, x in np.ndindex(maps, height, width):
            window = heat[
                n, a, max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1
            ]
            # false for a NaN on either side
            if heat[n, a, y, x] > 0 and np.all(heat[n, a, y, x] >= window):
                peaks.append((-heat[n, a, y, x], (a * height + y) * width + x))
        for slot, (negative, flat) in enumerate(sorted(peaks)[:k]):
            y, x = flat // width % height, flat % width
            (w, h), (dx, dy) = size[n, :, y, x], offset[n, :, y, x]
            y0, y1 = (int(min(max(y + dy + s * h / 2, 0), height - 1)) for s in (-1, 1))
            x0, x1 = (int(min(max(x + dx + s * w / 2, 0), width - 1)) for s in (-1, 1))
            boxes[n, slot], scores[n, slot] = (y0, x0, y1, x1), -negative
            coverage[n, y0 : y1 + 1, x0 : x1 + 1] += 1
    return coverage, boxes, scores


def masked_mse(student, teacher, weight, normalise):  # type: ignore[no-untyped-def]
    """Loss and the student's gradient of float64 maps; weight [B, H, W]."""
    batch, channels, height, width = student.shape
    norm = channels * weight.sum() if normalise == "area" else student.size
    loss, d_student = 0.0, np.zeros(student.shape)
    if norm == 0:
        return loss, d_student
    for n, c, y, x in np.ndindex(batch, channels, height, width):
        difference = student[n, c, y, x] - teacher[n, c, y, x]
        loss += weight[n, y, x] * difference**2 / norm
        d_student[n, c, y, x] = 2 * weight[n, y, x] * difference / norm
    return loss, d_student
