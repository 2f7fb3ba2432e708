//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011); normals.
//!
//! Noise is never stored: it is a function of the seed and of the element's logical index, so the
//! backward draws it again, whatever the strides, threads and devices. Counter words: noise: `(p /
//! 4, 0, plane)` with `plane = n*C + c`, `p = y*W + x`, each as 64 bits in two words, low word
//! first; the four output words serve the positions `p % 4`. Policy draws: `(block, 0xFFFFFFFF,
//! counter)`. Both have the seed as key, and their counters differ: a plane has fewer than 2^32
//! blocks of four, so the second word of noise is 0.

#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::simd::{Level, Simd, LANES};

pub(super) const MULTIPLIERS: [u64; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;
pub(super) const LOW: u64 = 0xffff_ffff;
const DRAW_TAG: u32 = u32::MAX;

/// The root of one half, as bits: fractions between it and its double are close to 1.
pub(super) const ROOT_HALF: i32 = 0x3f35_04f3;
/// (ln(1 + f) - f + f^2 / 2) / f^3, highest power first.
pub(super) const LN: [f32; 9] = [
    7.037_683_6e-2, -1.151_461e-1, 1.167_699_87e-1, -1.242_014_1e-1, 1.424_932_3e-1,
    -1.666_805_8e-1, 2.000_071_5e-1, -2.499_999_4e-1, 3.333_333e-1,
];
/// ln 2 in two parts.
pub(super) const LN_TWO: [f32; 2] = [355.0 / 512.0, -2.121_944_4e-4];
/// (sin x - x) / x^3 and (cos x - 1 + x^2 / 2) / x^4 in x^2, highest power first.
pub(super) const SIN: [f32; 3] = [-1.951_529_6e-4, 8.332_161e-3, -1.666_665_5e-1];
pub(super) const COS: [f32; 3] = [2.443_315_7e-5, -1.388_731_6e-3, 4.166_664_6e-2];
/// Radians in 2^-32 of a turn.
pub(super) const TURN: f32 = std::f32::consts::TAU / 4_294_967_296.0;

/// The keys of all rounds, from a seed.
#[derive(Clone, Copy)]
pub(crate) struct Keys(pub(super) [[u64; 2]; ROUNDS]);

impl Keys {
    /// Expands a seed.
    pub(crate) fn new(seed: u64) -> Self {
        let mut key = [seed as u32, (seed >> 32) as u32];
        let mut keys = [[0; 2]; ROUNDS];
        for round in &mut keys {
            *round = key.map(u64::from);
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        Self(keys)
    }
}

/// `N` counters at a time; words in the low halves of u64, which the vector multiplier takes.
#[inline(always)]
fn rounds<const N: usize>(keys: &[[u64; 2]], mut c: [[u64; N]; 4]) -> [[u32; N]; 4] {
    for key in keys {
        for i in 0..N {
            let even = (c[0][i] & LOW) * MULTIPLIERS[0];
            let odd = (c[2][i] & LOW) * MULTIPLIERS[1];
            c[0][i] = (odd >> 32) ^ c[1][i] ^ key[0];
            c[2][i] = (even >> 32) ^ c[3][i] ^ key[1];
            // The high halves are left dirty: only low halves are ever multiplied or kept.
            c[1][i] = odd;
            c[3][i] = even;
        }
    }
    c.map(|word| word.map(|w| w as u32))
}

/// One block of four words.
pub(crate) fn block(seed: u64, counter: [u32; 4]) -> [u32; 4] {
    rounds::<1>(&Keys::new(seed).0, counter.map(|w| [u64::from(w)])).map(|[w]| w)
}

/// Two normals from two words, by Box and Muller.
#[inline(always)]
fn normal_pair(radius: u32, angle: u32) -> (f32, f32) {
    let uniform = (radius as f32).mul_add(1.0 / 4_294_967_296.0, 0.5 / 4_294_967_296.0);
    let r = (-2.0 * ln(uniform)).sqrt();
    let (sin, cos) = sin_cos_turn(angle as i32);
    (r * cos, r * sin)
}

/// Natural logarithm on [2^-33, 1], to about 1 ulp, with the same rounding at every level.
#[inline(always)]
fn ln(x: f32) -> f32 {
    let shifted = (x.to_bits() as i32).wrapping_sub(ROOT_HALF);
    let exponent = (shifted >> 23) as f32;
    let f = f32::from_bits(((shifted & 0x007f_ffff) + ROOT_HALF) as u32) - 1.0;
    let square = f * f;
    let mut p = LN[0];
    for c in &LN[1..] {
        p = p.mul_add(f, *c);
    }
    let tail = exponent.mul_add(LN_TWO[1], p * f * square);
    exponent.mul_add(LN_TWO[0], (-0.5f32).mul_add(square, tail) + f)
}

/// Sine and cosine of a signed turn in 2^-32: an exact quadrant, a polynomial for the rest.
#[inline(always)]
fn sin_cos_turn(turn: i32) -> (f32, f32) {
    let quadrant = turn.wrapping_add(1 << 29) >> 30;
    let rest = turn.wrapping_sub(quadrant.wrapping_shl(30));
    let x = rest as f32 * TURN;
    let z = x * x;
    let s = SIN[0].mul_add(z, SIN[1]).mul_add(z, SIN[2]);
    let sin = (s * z).mul_add(x, x);
    let c = COS[0].mul_add(z, COS[1]).mul_add(z, COS[2]);
    let cos = (c * z).mul_add(z, (-0.5f32).mul_add(z, 1.0));
    let swap = quadrant & 1 != 0;
    let (s, c) = if swap { (cos, sin) } else { (sin, cos) };
    let flip = |v: f32, bit: i32| f32::from_bits(v.to_bits() ^ (((bit & 2) as u32) << 30));
    (flip(s, quadrant), flip(c, quadrant + 1))
}

/// [`LANES`] planes; what depends on the plane alone in the first two rounds, computed once.
///
/// Even lanes come before odd ones, so that registers of 64-bit lanes merge into 32-bit words.
pub(crate) struct Planes<'a> {
    pub(super) keys: &'a Keys,
    /// Third counter word after the first round, but for the position's part.
    pub(super) third: [u64; LANES],
    /// After round two: first word without `third`'s product, third without the position's, fourth.
    pub(super) second_round: [[u64; LANES]; 3],
}

impl<'a> Planes<'a> {
    /// For one plane number in each lane.
    pub(crate) fn new(keys: &'a Keys, planes: &[u64; LANES]) -> Self {
        let halves: [u64; LANES] = std::array::from_fn(|i| planes[lane_at(i)]);
        let [first, second] = [keys.0[0], keys.0[1]];
        let odd = halves.map(|plane| (plane & LOW) * MULTIPLIERS[1]);
        let even = odd.map(|odd| ((odd >> 32) ^ first[0]) * MULTIPLIERS[0]);
        Self {
            keys,
            third: halves.map(|plane| (plane >> 32) ^ first[1]),
            second_round: [
                odd.map(|odd| (odd & LOW) ^ second[0]),
                even.map(|e| (e >> 32) ^ second[1]),
                even,
            ],
        }
    }

    /// The normals of positions `4*quad ..`, as many rows of lanes as there are, four at a time.
    #[inline(always)]
    pub(crate) fn normals<S: Simd>(&self, simd: S, quad: u32, out: &mut [[f32; LANES]]) {
        let fours = out.as_chunks_mut::<4>().0;
        match simd.level() {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(simd) => {
                // SAFETY: the token proves the features.
                return unsafe { avx512::normals_avx512(simd, self, quad, fours) };
            }
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(simd) => {
                // SAFETY: as above.
                return unsafe { avx2::normals_avx2(simd, self, quad, fours) };
            }
            Level::Scalar => {}
        }
        for (i, four) in fours.iter_mut().enumerate() {
            let words = self.words_any(quad + i as u32);
            for pair in 0..2 {
                for l in 0..LANES {
                    let (a, b) = normal_pair(words[2 * pair][l], words[2 * pair + 1][l]);
                    four[2 * pair][l] = a;
                    four[2 * pair + 1][l] = b;
                }
            }
        }
    }

    /// The words at [`Level::Scalar`].
    #[inline(always)]
    fn words_any(&self, quad: u32) -> [[u32; LANES]; 4] {
        let [first, third, fourth] = &self.second_round;
        let position = u64::from(quad) * MULTIPLIERS[0];
        let odd = self.third.map(|third| (third ^ position >> 32) * MULTIPLIERS[1]);
        let c0 = std::array::from_fn(|i| (odd[i] >> 32) ^ first[i]);
        let c2 = third.map(|third| third ^ (position & LOW));
        let words = rounds(&self.keys.0[2..], [c0, odd, c2, *fourth]);
        words.map(|word| std::array::from_fn(|l| word[(l % 2) * LANES / 2 + l / 2]))
    }
}

/// The lane whose plane is at `i` of the arrays of [`Planes`].
fn lane_at(i: usize) -> usize {
    2 * (i % (LANES / 2)) + i / (LANES / 2)
}

/// The noise of one element (the naive loops and the tests use it).
#[cfg(test)]
pub(crate) fn normal(seed: u64, plane: u64, position: u64) -> f32 {
    let counter =
        [(position >> 2) as u32, (position >> 34) as u32, plane as u32, (plane >> 32) as u32];
    let words = block(seed, counter);
    let first = position as usize & 2;
    let (even, odd) = normal_pair(words[first], words[first + 1]);
    if position & 1 == 0 {
        even
    } else {
        odd
    }
}

/// What a policy draws in one step: uniforms in (0, 1), and the seed of the noise.
pub(crate) fn draw(seed: u64, counter: u64, uniforms: &mut [f32]) -> i64 {
    let words = |i: u32| block(seed, [i, DRAW_TAG, counter as u32, (counter >> 32) as u32]);
    for (i, four) in uniforms.chunks_mut(4).enumerate() {
        for (u, word) in four.iter_mut().zip(words(1 + i as u32)) {
            *u = ((word >> 9) as f32 + 0.5) * (1.0 / 8_388_608.0);
        }
    }
    let first = words(0);
    (u64::from(first[0]) | u64::from(first[1]) << 32) as i64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{run_at, WithSimd};

    #[test]
    fn known_answers_of_random123() {
        let ones = u32::MAX;
        assert_eq!(block(0, [0; 4]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(block(u64::MAX, [ones; 4]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        let key = 0xa409_3822 | 0x299f_31d0 << 32;
        let counter = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(block(key, counter), [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]);
    }

    #[test]
    fn logarithm_and_sine_are_accurate() {
        for i in 1..200_000u32 {
            let u = (i.wrapping_mul(21_474) as f32)
                .mul_add(1.0 / 4_294_967_296.0, 0.5 / 4_294_967_296.0);
            let exact = f64::from(u).ln();
            assert!((f64::from(ln(u)) - exact).abs() <= 2e-7 * exact.abs() + 1e-9, "ln {u:e}");
            let turn = i.wrapping_mul(2_654_435_761) as i32;
            let angle = f64::from(turn) * std::f64::consts::TAU / 4_294_967_296.0;
            let (s, c) = sin_cos_turn(turn);
            assert!(
                (f64::from(s) - angle.sin()).abs() < 1.5e-7
                    && (f64::from(c) - angle.cos()).abs() < 1.5e-7,
                "{turn}"
            );
        }
    }

    struct Lanes(Keys, u32, [u64; LANES]);
    impl WithSimd for Lanes {
        type Out = [[f32; LANES]; 4];
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> Self::Out {
            let mut out = [[0.0; LANES]; 4];
            Planes::new(&self.0, &self.2).normals(simd, self.1, &mut out);
            out
        }
    }

    #[test]
    fn every_level_draws_the_bits_of_one_element_alone() {
        let seed = 0x1234_5678_9abc_def0;
        let planes = std::array::from_fn(|i| 7 + (i as u64) * 0x4000_0001);
        for level in Level::available() {
            for quad in [0, 1, 99] {
                let four = run_at(level, Lanes(Keys::new(seed), quad, planes));
                for (p, lanes) in four.iter().enumerate() {
                    for (lane, value) in lanes.iter().enumerate() {
                        let alone = normal(seed, planes[lane], u64::from(quad) * 4 + p as u64);
                        assert_eq!(value.to_bits(), alone.to_bits(), "{level:?} {quad} {p} {lane}");
                    }
                }
            }
        }
    }

    #[test]
    fn every_multiplier_gives_the_words_of_one_block_alone() {
        let (seed, quad) = (0xfedc_ba98_7654_3210, 0x8000_0001);
        let planes: [u64; LANES] = std::array::from_fn(|i| 3 + (i as u64) * 0x9000_0001);
        for level in Level::available() {
            let keys = Keys::new(seed);
            let lanes = Planes::new(&keys, &planes);
            let words = match level {
                // SAFETY: the token proves the features.
                #[cfg(target_arch = "x86_64")]
                Level::Avx512(simd) => unsafe { avx512::words_avx512(simd, &lanes, quad) },
                // SAFETY: the token proves the features.
                #[cfg(target_arch = "x86_64")]
                Level::Avx2(simd) => unsafe { avx2::words_avx2(simd, &lanes, quad) },
                Level::Scalar => lanes.words_any(quad),
            };
            for (l, plane) in planes.iter().enumerate() {
                let alone = block(seed, [quad, 0, *plane as u32, (*plane >> 32) as u32]);
                assert_eq!(words.map(|word| word[l]), alone, "{level:?} {l}");
            }
        }
    }

    #[test]
    fn draws_lie_inside_the_unit_interval_and_move_with_the_counter() {
        let mut a = [0f32; 1001];
        let mut b = [0f32; 1001];
        assert_ne!(draw(5, 0, &mut a), draw(5, 1, &mut b));
        assert!(a.iter().chain(&b).all(|u| *u > 0.0 && *u < 1.0));
        assert!(a.iter().zip(&b).filter(|(x, y)| x == y).count() < 3);
        let mean = a.iter().sum::<f32>() / 1001.0;
        assert!((mean - 0.5).abs() < 0.03, "{mean}");
    }
}
