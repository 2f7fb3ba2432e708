//! The reference: the module's formula as plain f64 loops, one element at a time, and tests of the
//! kernels against it.

use super::*;
use crate::random::philox::normal;
use crate::tensor::testing::{any_float, any_lay, wild, Lay, Owned, Uniform};
use proptest::prelude::*;

/// Everything that one call needs, in f64.
#[derive(Clone, Debug)]
struct Case {
    shape: [usize; 4],
    features: Vec<f64>,
    upstream: Vec<f64>,
    theta: Option<Vec<[f64; 6]>>,
    hole: Option<Vec<[i64; 4]>>,
    sigma: Option<Vec<f64>>,
    perm: Option<Vec<Vec<i64>>>,
    keep: Option<Vec<Vec<bool>>>,
    seed: u64,
}

fn group<T>(part: &Option<Vec<T>>, n: usize) -> Option<&T> {
    part.as_ref().map(|groups| &groups[if groups.len() == 1 { 0 } else { n }])
}

/// One sampled value and its derivatives by ix and iy; `touch` is called with every inner corner
/// and its weight.
fn bilinear(
    plane: &dyn Fn(usize, usize) -> f64, h: usize, w: usize, ix: f64, iy: f64,
    mut touch: impl FnMut(usize, usize, f64),
) -> [f64; 3] {
    let (x0, y0) = (ix.floor(), iy.floor());
    let (fx, fy) = (ix - x0, iy - y0);
    let mut out = [0.0; 3];
    for (dx, dy) in [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)] {
        let (x, y) = (x0 + dx, y0 + dy);
        if x < 0.0 || y < 0.0 || x >= w as f64 || y >= h as f64 {
            continue;
        }
        let (wx, wy) =
            (if dx == 0.0 { 1.0 - fx } else { fx }, if dy == 0.0 { 1.0 - fy } else { fy });
        let value = plane(y as usize, x as usize);
        out[0] += wx * wy * value;
        out[1] += (2.0 * dx - 1.0) * wy * value;
        out[2] += (2.0 * dy - 1.0) * wx * value;
        touch(y as usize, x as usize, wx * wy);
    }
    out
}

#[derive(Debug, Default)]
struct Truth {
    refined: Vec<f64>,
    d_features: Vec<f64>,
    d_theta: Vec<[f64; 6]>,
    d_sigma: Vec<f64>,
    d_straight: Vec<f64>,
    /// Of each sample: <upstream, refined> and <refined, refined>.
    dots: Vec<[f64; 2]>,
}

fn truth(case: &Case) -> Truth {
    let [b, c, h, w] = case.shape;
    let mut t = Truth { d_features: vec![0.0; case.features.len()], ..Truth::default() };
    let at = |n: usize, ch: usize, y: usize, x: usize| ((n * c + ch) * h + y) * w + x;
    let (cx, cy) = ((w as f64 - 1.0) / 2.0, (h as f64 - 1.0) / 2.0);
    let (wf, hf) = (w as f64, h as f64);
    for n in 0..b {
        let theta = group(&case.theta, n).copied().unwrap_or([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]);
        let sigma = group(&case.sigma, n).copied().unwrap_or(0.0);
        let (mut d_theta, mut d_sigma, mut d_straight) = ([0.0; 6], 0.0, 0.0);
        let mut dots = [0.0; 2];
        for ch in 0..c {
            let source = group(&case.perm, n).map_or(ch, |perm| perm[ch] as usize);
            let kept = group(&case.keep, n).is_none_or(|keep| keep[ch]);
            for y in 0..h {
                for x in 0..w {
                    let u = case.upstream[at(n, ch, y, x)];
                    d_straight += u;
                    if !kept {
                        t.refined.push(0.0);
                        continue;
                    }
                    let (dx, dy) = (x as f64 - cx, y as f64 - cy);
                    let ix = theta[0] * dx + theta[1] * (wf / hf) * dy + theta[2] * wf / 2.0 + cx;
                    let iy = theta[3] * (hf / wf) * dx + theta[4] * dy + theta[5] * hf / 2.0 + cy;
                    let holed = group(&case.hole, n).is_some_and(|o| {
                        (o[0]..o[2]).contains(&(y as i64)) && (o[1]..o[3]).contains(&(x as i64))
                    });
                    let plane = |py: usize, px: usize| case.features[at(n, source, py, px)];
                    let mut v = if holed {
                        [0.0; 3]
                    } else {
                        let d = &mut t.d_features;
                        bilinear(&plane, h, w, ix, iy, |py, px, weight| {
                            d[at(n, source, py, px)] += weight * u
                        })
                    };
                    if case.theta.is_none() && !holed {
                        v[0] = plane(y, x); // no weight of 0, which makes NaN of an infinite value
                    }
                    let eps = f64::from(normal(case.seed, (n * c + ch) as u64, (y * w + x) as u64));
                    let value = v[0] + if sigma == 0.0 { 0.0 } else { sigma * eps };
                    t.refined.push(value);
                    dots[0] += u * value;
                    dots[1] += value * value;
                    d_sigma += u * eps;
                    let by = [dx, dy * wf / hf, wf / 2.0];
                    let by_y = [dx * hf / wf, dy, hf / 2.0];
                    for i in 0..3 {
                        d_theta[i] += u * v[1] * by[i];
                        d_theta[3 + i] += u * v[2] * by_y[i];
                    }
                }
            }
        }
        t.d_theta.push(d_theta);
        t.d_sigma.push(d_sigma);
        t.d_straight.push(d_straight);
        t.dots.push(dots);
    }
    t
}

/// The plan of a case, and the memory that it views.
struct OwnedPlan {
    _parts: [Option<Owned>; 5],
    plan: Plan,
}

impl OwnedPlan {
    fn new(parts: [Option<Owned>; 5], seed: u64) -> Self {
        let [theta, hole, sigma, perm, keep] =
            parts.each_ref().map(|part| part.as_ref().map(|owned| owned.view.clone()));
        Self { _parts: parts, plan: Plan { theta, hole, sigma, perm, keep, seed: seed.into() } }
    }

    fn of(case: &Case) -> Self {
        let c = case.shape[1];
        let theta = case.theta.as_ref().map(|t| {
            Owned::new(&[t.len(), 2, 3], DType::F64, Lay::Contiguous, |i| t[i / 6][i % 6])
        });
        let hole = case.hole.as_ref().map(|h| {
            Owned::new(&[h.len(), 4], DType::I64, Lay::Contiguous, |i| h[i / 4][i % 4] as f64)
        });
        let sigma = case
            .sigma
            .as_ref()
            .map(|s| Owned::new(&[s.len()], DType::F64, Lay::Contiguous, |i| s[i]));
        let perm = case.perm.as_ref().map(|p| {
            Owned::new(&[p.len(), c], DType::I32, Lay::Contiguous, |i| p[i / c][i % c] as f64)
        });
        let keep = case.keep.as_ref().map(|k| {
            Owned::new(&[k.len(), c], DType::Bool, Lay::Contiguous, |i| f64::from(k[i / c][i % c]))
        });
        Self::new([theta, hole, sigma, perm, keep], case.seed)
    }

    fn args<'a>(&'a self, features: &'a Owned) -> Args<'a> {
        Args { features: &features.view, plan: &self.plan }
    }
}

fn shuffled(count: usize, mut state: u64) -> Vec<i64> {
    let mut order: Vec<i64> = (0..count as i64).collect();
    for i in (1..count).rev() {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        order.swap(i, (state >> 33) as usize % (i + 1));
    }
    order
}

/// Planes below a vector's length, and several vectors.
fn any_shape() -> impl Strategy<Value = [usize; 4]> {
    prop_oneof![
        5 => [1..4usize, 1..10usize, 1..8usize, 1..8usize],
        1 => [1..4usize, 1..35usize, 1..20usize, 1..20usize],
    ]
}

prop_compose! {
    fn case()(
        shape in any_shape(),
        random in any::<u64>(),
        present in [0..3u8, 0..3u8, 0..3u8, 0..3u8, 0..3u8],
    ) -> Case {
        let mut numbers = Uniform(random);
        let mut uniform = move || numbers.next();
        let [b, c, h, w] = shape;
        let count = b * c * h * w;
        let features = (0..count).map(|_| (uniform() * 4.0 - 2.0) as f32 as f64).collect();
        let upstream = (0..count).map(|_| (uniform() * 4.0 - 2.0) as f32 as f64).collect();
        let groups = |present: u8| [0, 1, b][present as usize];
        let some = |present: u8| (present > 0).then(|| groups(present));
        let theta = some(present[0]).map(|g| (0..g).map(|_| {
            let base = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0];
            std::array::from_fn(|i| base[i] + (uniform() - 0.5) * 0.9)
        }).collect());
        let mut side = |s: usize| (uniform() * (s as f64 + 1.0)) as i64;
        let hole = some(present[1]).map(|g| {
            (0..g).map(|_| [side(h) - 1, side(w) - 1, side(h), side(w) + 1]).collect()
        });
        let sigma = some(present[2]).map(|g| (0..g).map(|_| uniform() * 0.5).collect());
        let perm = some(present[3])
            .map(|g| (0..g).map(|i| shuffled(c, random ^ i as u64)).collect());
        let keep = some(present[4])
            .map(|g| (0..g).map(|_| (0..c).map(|_| uniform() > 0.4).collect()).collect());
        Case { shape, features, upstream, theta, hole, sigma, perm, keep, seed: random }
    }
}

fn close(actual: &[f64], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        let same = a == e || (a.is_nan() && e.is_nan());
        let near = (a - e).abs() <= tolerance * (1.0 + e.abs());
        assert!(same || near, "{what}[{i}]: {a} instead of {e}");
    }
}

/// The tolerance of one rounding of a value near 1.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-12,
        DType::F16 => 2e-3,
        DType::BF16 => 1.6e-2,
        _ => 3e-6,
    }
}

proptest! {
    #![proptest_config(crate::tensor::testing::cases(150))]

    #[test]
    fn forward_is_the_formula(
        mut case in case(), dtype in any_float(), lay in any_lay(), out in 0..2usize,
        threads in 1..4usize, special in any::<bool>(),
    ) {
        if special {
            case.theta = None;
            case.features = wild(case.seed, case.features.len());
        }
        let features = Owned::new(&case.shape, dtype, lay, |i| case.features[i]);
        case.features = features.values();
        let out = [Lay::Contiguous, Lay::ChannelsLast][out];
        let refined = Owned::new(&case.shape, dtype, out, |_| f64::NAN);
        OwnedPlan::of(&case).args(&features).forward(&refined.view, &threads.into()).unwrap();
        close(&refined.values(), &truth(&case).refined, tolerance(dtype), "refined");
        prop_assert!(refined.is_intact_around());
    }

    #[test]
    fn backward_is_the_gradient(
        mut case in case(), dtype in any_float(), lays in [any_lay(), any_lay()],
        out in 0..2usize, threads in 1..4usize,
    ) {
        let features = Owned::new(&case.shape, dtype, lays[0], |i| case.features[i]);
        let upstream = Owned::new(&case.shape, dtype, lays[1], |i| case.upstream[i]);
        (case.features, case.upstream) = (features.values(), upstream.values());
        let b = case.shape[0];
        let plain = |shape: &[usize]| Owned::new(shape, DType::F64, Lay::Contiguous, |_| f64::NAN);
        let out = [Lay::Contiguous, Lay::ChannelsLast][out];
        let d_features = Owned::new(&case.shape, dtype, out, |_| f64::NAN);
        let (d_theta, d_sigma, d_straight) = (plain(&[b, 2, 3]), plain(&[1]), plain(&[b]));
        let gradients = Gradients {
            d_features: Some(&d_features.view),
            d_theta: Some(&d_theta.view),
            d_sigma: Some(&d_sigma.view),
            d_straight: Some(&d_straight.view),
        };
        let plan = OwnedPlan::of(&case);
        plan.args(&features).backward(&gradients, &upstream.view, &threads.into()).unwrap();
        let truth = truth(&case);
        close(&d_features.values(), &truth.d_features, 4.0 * tolerance(dtype), "d_features");
        let each = if dtype == DType::F64 { 1e-11 } else { 3e-6 };
        let scale = each * case.shape.iter().product::<usize>() as f64 * 4.0;
        close(&d_theta.values(), truth.d_theta.as_flattened(), scale, "d_theta");
        close(&d_sigma.values(), &[truth.d_sigma.iter().sum()], scale, "d_sigma");
        close(&d_straight.values(), &truth.d_straight, scale, "d_straight");
        for output in [&d_features, &d_theta, &d_sigma, &d_straight] {
            prop_assert!(output.is_intact_around());
        }
    }

    #[test]
    fn dots_are_inner_products_with_the_forward(
        mut cases in proptest::collection::vec(case(), 1..6), dtype in any_float(),
        lay in any_lay(), threads in 1..4usize,
    ) {
        let first = cases[0].clone();
        let features = Owned::new(&first.shape, dtype, lay, |i| first.features[i]);
        let upstream = Owned::new(&first.shape, dtype, Lay::Contiguous, |i| first.upstream[i]);
        let [b, c, ..] = first.shape;
        for (v, case) in cases.iter_mut().enumerate() {
            // Every plan on the first case's map: parts that all plans have, for one group or for
            // all.
            let identity = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0];
            let groups = if v % 2 == 0 && b > 1 { b } else { 1 };
            case.theta = Some(vec![case.theta.as_ref().map_or(identity, |t| t[0]); groups]);
            case.hole = Some(vec![case.hole.as_ref().map_or([0; 4], |h| h[0])]);
            case.sigma = Some(vec![case.sigma.as_ref().map_or(0.0, |s| s[0])]);
            let in_order = v % 3 == 0;
            let perm = if in_order { (0..c as i64).collect() } else { shuffled(c, v as u64) };
            case.perm = Some(vec![perm]);
            case.keep = Some(vec![(0..c).map(|i| (i + v) % 4 > 0).collect()]);
            (case.shape, case.seed) = (first.shape, first.seed);
            (case.features, case.upstream) = (features.values(), upstream.values());
        }
        let v = cases.len();
        let stack = |shape: &[usize], dtype, value: &dyn Fn(usize, usize) -> f64| {
            let each: usize = shape.iter().product();
            let full: Vec<usize> = [&[v], shape].concat();
            Owned::new(&full, dtype, Lay::Contiguous, |i| value(i / each.max(1), i % each.max(1)))
        };
        let groups = if v > 1 || b > 1 { b } else { 1 };
        let theta_of = |p: usize, i: usize| cases[p].theta.as_ref().unwrap()[0][i % 6];
        let theta = stack(&[groups, 2, 3], DType::F64, &theta_of);
        let hole = stack(&[1, 4], DType::I64, &|p, i| cases[p].hole.as_ref().unwrap()[0][i] as f64);
        let sigma = stack(&[1], DType::F64, &|p, _| cases[p].sigma.as_ref().unwrap()[0]);
        let perm = stack(&[1, c], DType::I64, &|p, i| cases[p].perm.as_ref().unwrap()[0][i] as f64);
        let kept = |p: usize, i: usize| f64::from(cases[p].keep.as_ref().unwrap()[0][i]);
        let keep = stack(&[1, c], DType::Bool, &kept);
        let stacked = OwnedPlan::new([theta, hole, sigma, perm, keep].map(Some), first.seed);
        let out = Owned::new(&[v], DType::F64, Lay::Contiguous, |_| f64::NAN);
        stacked.args(&features).dots(&out.view, &upstream.view, &threads.into()).unwrap();
        let expected: Vec<Vec<[f64; 2]>> = cases.iter().map(|case| truth(case).dots).collect();
        let sums: Vec<f64> =
            expected.iter().map(|dots| dots.iter().map(|dot| dot[0]).sum()).collect();
        let scale = if dtype == DType::F64 { 1e-11 } else { 1e-6 } * first.features.len() as f64;
        close(&out.values(), &sums, scale.max(1e-11), "dots");
        prop_assert!(out.is_intact_around());
        let out = Owned::new(&[2, v, b], DType::F64, Lay::Contiguous, |_| f64::NAN);
        stacked.args(&features).dots(&out.view, &upstream.view, &threads.into()).unwrap();
        let each: Vec<f64> = (0..2 * v * b)
            .map(|i| expected[i / b % v][i % b][i / (v * b)])
            .collect();
        close(&out.values(), &each, scale.max(1e-11), "dots by sample");
        prop_assert!(out.is_intact_around());
    }
}

#[test]
fn identity_copies_bits_and_bad_values_are_refused() {
    let shape = [2, 3, 4, 5];
    let features = Owned::new(&shape, DType::F32, Lay::Contiguous, |i| {
        if i == 7 {
            f64::INFINITY
        } else {
            (i as f64).sin()
        }
    });
    let refined = Owned::new(&shape, DType::F32, Lay::ChannelsLast, |_| f64::NAN);
    let run = |part: usize, values: Owned| {
        let mut parts = [const { None }; 5];
        parts[part] = Some(values);
        let refined = &refined.view;
        OwnedPlan::new(parts, 0)
            .args(&features)
            .forward(refined, &2.into())
            .map_err(|e| e.to_string())
    };
    let theta =
        |values: [f64; 6]| Owned::new(&[1, 2, 3], DType::F32, Lay::Contiguous, |i| values[i]);
    run(0, theta([1.0, 0.0, 0.0, 0.0, 1.0, 0.0])).unwrap();
    assert_eq!(refined.values(), features.values());
    let refused = |part, values, text: &str| assert_eq!(run(part, values).unwrap_err(), text);
    refused(0, theta([f64::NAN; 6]), "refine: theta must be finite, got NaN at [0, 0, 0]");
    let infinite = Owned::new(&[2], DType::F32, Lay::Contiguous, |i| [0.0, f64::INFINITY][i]);
    refused(2, infinite, "refine: sigma must be finite, got inf at [1]");
    for (values, text) in [
        ([0.0, 0.0, 1.0], "0 at [0, 1]"),
        ([0.0, 1.0, 3.0], "3 at [0, 2]"),
        ([0.0, -1.0, 1.0], "-1 at [0, 1]"),
    ] {
        let perm = Owned::new(&[1, 3], DType::I64, Lay::Contiguous, |i| values[i]);
        let text = format!("refine: perm must be a permutation of 0 to 2, got {text}");
        refused(3, perm, &text);
    }
}
