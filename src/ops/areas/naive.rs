//! The truth: the definition as plain f64 loops over all cells, and tests of the kernel against it.

use super::*;
use crate::tensor::testing::{any_float, any_lay, each_index, Lay, Owned, Uniform};
use proptest::prelude::*;

/// What is computed in is f32 but for f64 maps; each step is rounded to it.
fn round(dtype: DType, value: f64) -> f64 {
    if dtype == DType::F64 {
        value
    } else {
        f64::from(value as f32)
    }
}

/// heat, size, offset: row-major values and their shape's A.
struct Maps {
    heat: Vec<f64>,
    size: Vec<f64>,
    offset: Vec<f64>,
}

impl Maps {
    fn read(owned: &[Owned; 3]) -> Self {
        let [heat, size, offset] = owned.each_ref().map(Owned::values);
        Self { heat, size, offset }
    }

    fn mutual(dtype: DType, s: Self, t: Self) -> Self {
        let r = |value| round(dtype, value);
        let root = |a: &f64, b: &f64| r(r(a * b).sqrt());
        let mean = |a: &f64, b: &f64| r(r(a + b) / 2.0);
        let both = |a: &[f64], b: &[f64], f: &dyn Fn(&f64, &f64) -> f64| {
            a.iter().zip(b).map(|(a, b)| f(a, b)).collect()
        };
        Self {
            heat: both(&s.heat, &t.heat, &root),
            size: both(&s.size, &t.size, &mean),
            offset: both(&s.offset, &t.offset, &mean),
        }
    }
}

#[derive(Debug, PartialEq)]
struct Found {
    coverage: Vec<f64>,
    boxes: Vec<f64>,
    scores: Vec<f64>,
}

fn truth([b, a, h, w]: [usize; 4], dtype: DType, maps: &Maps, k: usize, kernel: usize) -> Found {
    let mut found = Found { coverage: vec![0.0; b * h * w], boxes: vec![], scores: vec![] };
    for n in 0..b {
        let heat = &maps.heat[n * a * h * w..(n + 1) * a * h * w];
        let is_peak = |flat: usize| {
            let (map, y, x) = (flat / (h * w), flat / w % h, flat % w);
            let near = |at: usize, last: usize| {
                at.saturating_sub(kernel / 2)..last.min(at + kernel / 2 + 1)
            };
            near(y, h).all(|q| near(x, w).all(|p| heat[flat] >= heat[(map * h + q) * w + p]))
        };
        let mut peaks: Vec<usize> =
            (0..a * h * w).filter(|flat| heat[*flat] > 0.0 && is_peak(*flat)).collect();
        peaks.sort_by(|p, q| heat[*q].partial_cmp(&heat[*p]).expect("no NaN").then(p.cmp(q)));
        for slot in 0..k {
            let Some(flat) = peaks.get(slot) else {
                found.boxes.extend([0.0, 0.0, -1.0, -1.0]);
                found.scores.push(0.0);
                continue;
            };
            let cell = flat % (h * w);
            let corner = |d: usize, sign: f64| {
                let r = |value| round(dtype, value);
                let (at, last) = if d == 0 { (cell % w, w - 1) } else { (cell / w, h - 1) };
                let i = (2 * n + d) * h * w + cell;
                let value = r(r(at as f64 + maps.offset[i]) + sign * r(maps.size[i] / 2.0));
                if value.is_nan() {
                    0.0
                } else {
                    value.clamp(0.0, last as f64).trunc()
                }
            };
            let corners = [corner(1, -1.0), corner(0, -1.0), corner(1, 1.0), corner(0, 1.0)];
            for y in corners[0] as i64..=corners[2] as i64 {
                for x in corners[1] as i64..=corners[3] as i64 {
                    found.coverage[(n * h + y as usize) * w + x as usize] += 1.0;
                }
            }
            found.boxes.extend(corners);
            found.scores.push(heat[*flat]);
        }
    }
    found
}

/// One call's tensors; heat, size and offset of the student, and of a teacher.
struct Case {
    shape: [usize; 4],
    dtype: DType,
    student: [Owned; 3],
    teacher: Option<[Owned; 3]>,
    k: usize,
    kernel: usize,
}

impl Case {
    fn run(&self, threads: usize) -> std::result::Result<Found, String> {
        let [b, _, h, w] = self.shape;
        let coverage = Owned::empty(&[b, h, w], DType::F32, Lay::Contiguous);
        let boxes = Owned::empty(&[b, self.k, 4], DType::I64, Lay::Contiguous);
        let scores = Owned::empty(&[b, self.k], self.dtype.accumulator(), Lay::Contiguous);
        let [heat, size, offset] = self.student.each_ref().map(|owned| &owned.view);
        let teacher =
            self.teacher.as_ref().map(|teacher| teacher.each_ref().map(|owned| &owned.view));
        let (k, kernel) = (self.k as i64, self.kernel as i64);
        let args = Args { heat, size, offset, teacher, k, kernel };
        let outputs =
            Outputs { coverage: &coverage.view, boxes: &boxes.view, scores: &scores.view };
        args.forward(&outputs, &threads.into()).map_err(|error| error.to_string())?;
        assert!([&coverage, &boxes, &scores].iter().all(|owned| owned.is_intact_around()));
        Ok(Found { coverage: coverage.values(), boxes: boxes.values(), scores: scores.values() })
    }

    fn truth(&self) -> Found {
        let own = Maps::read(&self.student);
        let maps = match &self.teacher {
            Some(teacher) => Maps::mutual(self.dtype, own, Maps::read(teacher)),
            None => own,
        };
        truth(self.shape, self.dtype, &maps, self.k, self.kernel)
    }
}

/// The kind of heat.
#[derive(Clone, Copy, Debug)]
enum Heat {
    /// Any number in [0, 1).
    Random,
    /// A handful of levels: ties everywhere.
    Levels(u32),
    /// Waves, whose peaks are wide and few.
    Smooth,
    /// With NaN, infinities and negative numbers among them.
    Wild,
}

fn any_heat() -> impl Strategy<Value = Heat> {
    prop_oneof![
        Just(Heat::Random),
        (1..5u32).prop_map(Heat::Levels),
        Just(Heat::Smooth),
        Just(Heat::Wild)
    ]
}

impl Heat {
    fn values(self, [b, a, h, w]: [usize; 4], seed: u64) -> Vec<f64> {
        let mut uniform = Uniform(seed);
        let wave = |at: &[usize]| {
            let t = (at[0] * 7 + at[1] * 3) as f64 + seed as f64 % 10.0;
            0.5 + 0.25 * ((at[2] as f64 * 0.7 + t).sin() + (at[3] as f64 * 0.6 + t * t).sin())
        };
        let wild = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, -0.0, 0.0];
        let mut value = |at: &[usize]| match self {
            Self::Random => uniform.next(),
            Self::Levels(levels) => {
                (uniform.next() * f64::from(levels)).floor() / f64::from(levels)
            }
            Self::Smooth => wave(at),
            Self::Wild => wild
                .get((uniform.next() * 20.0) as usize)
                .copied()
                .unwrap_or_else(|| uniform.next()),
        };
        let mut values = Vec::with_capacity(b * a * h * w);
        each_index(&[b, a, h, w], |at| values.push(value(at)));
        values
    }
}

fn maps(shape: [usize; 4], dtype: DType, lays: [Lay; 3], heat: Heat, seed: u64) -> [Owned; 3] {
    let [b, _, h, w] = shape;
    let values = heat.values(shape, seed);
    let pairs = [5, 6].map(|i| {
        let mut uniform = Uniform(seed ^ i);
        let odd = [f64::NAN, f64::INFINITY, -3.0];
        let wild = matches!(heat, Heat::Wild);
        let mut value = move || {
            let plain = uniform.next() * if i == 5 { 5.0 } else { 1.0 };
            if wild {
                odd.get((uniform.next() * 12.0) as usize).copied().unwrap_or(plain)
            } else {
                plain
            }
        };
        (0..b * 2 * h * w).map(|_| value()).collect::<Vec<_>>()
    });
    [
        Owned::new(&shape, dtype, lays[0], |i| values[i]),
        Owned::new(&[b, 2, h, w], dtype, lays[1], |i| pairs[0][i]),
        Owned::new(&[b, 2, h, w], dtype, lays[2], |i| pairs[1][i]),
    ]
}

/// Odd sides, one tile and several, one image larger than a chunk.
fn any_shape() -> impl Strategy<Value = [usize; 4]> {
    prop_oneof![
        70 => [0..4usize, 1..10usize, 1..8usize, 1..8usize],
        20 => [0..4usize, 1..30usize, 1..12usize, 1..12usize],
        8 => [1..3usize, 60..140usize, 4..9usize, 4..9usize],
        1 => [1..2usize, 1..4usize, 150..200usize, 150..200usize],
    ]
}

fn lays() -> impl Strategy<Value = [Lay; 3]> {
    [any_lay(), any_lay(), any_lay()]
}

proptest! {
    #![proptest_config(crate::tensor::testing::cases(400))]

    #[test]
    fn areas_agree_with_the_definition(
        shape in any_shape(), dtype in any_float(), lays in [lays(), lays()],
        teacher in any::<bool>(), heat in any_heat(), share in 0.0..1.0f64, few in 1..20usize,
        reach in 0..3usize, threads in 0..4usize, seed in any::<u64>(),
    ) {
        let cells: usize = shape[1..].iter().product();
        let k = if cells > 4000 || share < 0.7 {
            few.min(cells)
        } else {
            1 + (share * share * cells as f64) as usize
        };
        let student = maps(shape, dtype, lays[0], heat, seed);
        let teacher = teacher.then(|| maps(shape, dtype, lays[1], heat, seed ^ 77));
        let case = Case { shape, dtype, student, teacher, k: k.min(cells), kernel: 2 * reach + 1 };
        let found = case.run(threads).expect("a valid call");
        prop_assert_eq!(found, case.truth());
    }
}
