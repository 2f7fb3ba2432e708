//! The reference: the module's formula as plain f64 loops, and tests of the kernel against it.

use super::*;
use crate::tensor::testing::{any_float, any_lay, each_index, wild, Lay, Owned, Uniform};
use crate::tensor::DType;
use proptest::prelude::*;

/// loss and d_student, in f64, of row-major values.
fn truth(
    shape: [usize; 4], s: &[f64], t: &[f64], w: Option<&[f64]>, normalise: &str, scale: f64,
) -> (f64, Vec<f64>) {
    let [b, c, h, w_] = shape;
    let weight = |n: usize, y: usize, x: usize| w.map_or(1.0, |w| w[(n * h + y) * w_ + x]);
    let divisor = match (normalise, w) {
        ("area", Some(w)) => c as f64 * w.iter().sum::<f64>(),
        _ => (b * c * h * w_) as f64,
    };
    if divisor == 0.0 {
        return (0.0, vec![0.0; s.len()]);
    }
    let (mut loss, mut d_student) = (0.0, Vec::with_capacity(s.len()));
    each_index(&shape, |index| {
        let i = d_student.len();
        let (weight, difference) = (weight(index[0], index[2], index[3]), s[i] - t[i]);
        loss += scale / divisor * weight * difference * difference;
        d_student.push(2.0 * scale / divisor * weight * difference);
    });
    (loss, d_student)
}

/// One call's tensors.
struct Case {
    student: Owned,
    teacher: Owned,
    weight: Option<Owned>,
    normalise: &'static str,
    scale: f64,
}

impl Case {
    fn new(
        shape: [usize; 4], dtype: DType, lays: [Lay; 2], weight: Option<Owned>, seed: u64,
    ) -> Self {
        let numel = shape.iter().product();
        let [s, t] = [1, 2].map(|i| Uniform(seed ^ i).take(numel));
        let student = Owned::new(&shape, dtype, lays[0], |i| 4.0 * s[i] - 2.0);
        let teacher = Owned::new(&shape, dtype, lays[1], |i| 4.0 * t[i] - 2.0);
        Self { student, teacher, weight, normalise: "elements", scale: 1.0 }
    }

    /// The loss and the gradient, or the message of the error.
    fn run(&self, gradient: Lay, threads: usize) -> std::result::Result<(f64, Owned), String> {
        let dtype = self.student.view.dtype;
        let loss = Owned::empty(&[], dtype.accumulator(), Lay::Contiguous);
        let d_student = Owned::empty(self.student.view.sizes(), dtype, gradient);
        let args = Args {
            student: &self.student.view,
            teacher: &self.teacher.view,
            weight: self.weight.as_ref().map(|w| &w.view),
            normalise: self.normalise,
            scale: self.scale,
        };
        let run = threads.into();
        args.forward(&loss.view, Some(&d_student.view), &run).map_err(|error| error.to_string())?;
        let both = loss.values()[0];
        args.forward(&loss.view, None, &run).map_err(|error| error.to_string())?;
        let alone = loss.values()[0];
        assert!(
            close(alone, both, 2e-6 * both.abs()),
            "the loss without the gradient is {alone}, not {both}"
        );
        assert!(loss.is_intact_around() && d_student.is_intact_around());
        Ok((both, d_student))
    }

    fn truth(&self) -> (f64, Vec<f64>) {
        let shape: [usize; 4] = self.student.view.sizes().try_into().expect("four dimensions");
        let weight = self.weight.as_ref().map(Owned::values);
        let (s, t) = (self.student.values(), self.teacher.values());
        truth(shape, &s, &t, weight.as_deref(), self.normalise, self.scale)
    }
}

fn close(actual: f64, expected: f64, tolerance: f64) -> bool {
    actual == expected
        || (actual.is_nan() && expected.is_nan())
        || (actual - expected).abs() <= tolerance
}

/// Half a unit in a gradient's last place, and the rounding of the arithmetic before it.
fn rounding(dtype: DType, value: f64) -> f64 {
    match dtype {
        DType::F64 => 1e-15 * value.abs(),
        DType::F32 => 3e-7 * value.abs() + 1e-40,
        DType::F16 => 5.1e-4 * value.abs() + 3e-8,
        _ => 4e-3 * value.abs() + 1e-38,
    }
}

fn agrees(case: &Case, gradient: Lay, threads: usize) {
    let dtype = case.student.view.dtype;
    let (loss, d_student) = case.run(gradient, threads).expect("a valid call");
    let (expected, d_expected) = case.truth();
    // In f64 the sum of the loops, one term after another, is the less exact of the two.
    let summed = d_expected.len().max(64) as f64 * f64::EPSILON;
    let tolerance = if dtype == DType::F64 { summed } else { 2e-6 };
    assert!(close(loss, expected, tolerance * expected.abs()), "loss {loss} is not {expected}");
    for (i, (actual, expected)) in d_student.values().into_iter().zip(d_expected).enumerate() {
        assert!(
            close(actual, expected, rounding(dtype, expected)),
            "d_student[{i}] {actual} is not {expected}"
        );
    }
}

fn weights(shape: [usize; 4], rank: usize, dtype: DType, lay: Lay, seed: u64) -> Owned {
    let [b, _, h, w] = shape;
    let sizes = if rank == 4 { vec![b, 1, h, w] } else { vec![b, h, w] };
    let values = Uniform(seed ^ 3).take(b * h * w);
    Owned::new(&sizes, dtype, lay, |i| (4.0 * values[i]).floor())
}

/// Planes of a few cells, planes above a tile, more channels than a tile has lanes, empty ones.
fn any_shape() -> impl Strategy<Value = [usize; 4]> {
    prop_oneof![
        70 => [0..4usize, 0..10usize, 0..7usize, 0..7usize],
        20 => [0..4usize, 0..40usize, 0..12usize, 0..12usize],
        2 => [1..3usize, 1..4usize, 40..70usize, 40..70usize],
        3 => [1..3usize, 100..300usize, 1..6usize, 1..6usize],
        2 => [1..3usize, 2000..4200usize, 1..3usize, 1..3usize],
        2 => [100..300usize, 1..4usize, 1..3usize, 1..3usize],
        1 => [1..2usize, 1..3usize, 150..200usize, 180..220usize],
    ]
}

proptest! {
    #![proptest_config(crate::tensor::testing::cases(300))]

    #[test]
    fn loss_and_gradient_agree_with_the_formula(
        shape in any_shape(), dtypes in [any_float(), any_float()],
        lays in [any_lay(), any_lay(), any_lay()], last in any::<bool>(), rank in 2..5usize,
        area in any::<bool>(), threads in 0..4usize, seed in any::<u64>(),
    ) {
        let weight = (rank > 2).then(|| weights(shape, rank, dtypes[1], lays[2], seed));
        let mut case = Case::new(shape, dtypes[0], [lays[0], lays[1]], weight, seed);
        case.normalise = if area { "area" } else { "elements" };
        case.scale = 1.5;
        agrees(&case, if last { Lay::ChannelsLast } else { Lay::Contiguous }, threads);
    }

    #[test]
    fn special_values_agree_with_the_formula(
        shape in any_shape(), dtypes in [any_float(), any_float()],
        lays in [any_lay(), any_lay(), any_lay()], weighted in any::<bool>(),
        threads in 0..4usize, seed in any::<u64>(),
    ) {
        let weight = weighted.then(|| weights(shape, 3, dtypes[1], lays[2], seed));
        let mut case = Case::new(shape, dtypes[0], [lays[0], lays[1]], weight, seed);
        let values = wild(seed, shape.iter().product());
        case.student = Owned::new(&shape, dtypes[0], lays[0], |i| values[i]);
        agrees(&case, Lay::Contiguous, threads);
    }

    #[test]
    fn the_fast_paths_agree_with_the_formula(
        shape in any_shape(), dtype in any_float(), weighted in any::<bool>(),
        last in any::<bool>(), seed in any::<u64>(),
    ) {
        let lay = if last { Lay::ChannelsLast } else { Lay::Contiguous };
        let weight = weighted.then(|| weights(shape, 3, DType::F32, Lay::Contiguous, seed));
        agrees(&Case::new(shape, dtype, [lay; 2], weight, seed), lay, 2);
    }
}

#[test]
fn the_number_of_threads_and_the_instruction_set_change_no_bit() {
    let shape = [3, 130, 17, 19];
    for (dtype, lay) in
        [(DType::F32, Lay::Contiguous), (DType::BF16, Lay::ChannelsLast), (DType::F64, Lay::Sliced)]
    {
        let weight = weights(shape, 3, DType::F32, Lay::Contiguous, 1);
        let case = Case::new(shape, dtype, [lay; 2], Some(weight), 5);
        let gradient = if lay == Lay::ChannelsLast { lay } else { Lay::Contiguous };
        let (loss, d_student) = case.run(gradient, 1).expect("a valid call");
        for threads in [2, 3, 8] {
            let (again, d_again) = case.run(gradient, threads).expect("a valid call");
            assert_eq!(loss.to_bits(), again.to_bits());
            assert_eq!(d_student.values(), d_again.values());
        }
    }
}
