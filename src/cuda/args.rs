//! The arguments of the kernels: the structures of `common.cuh`, and the grid of a map.

use crate::tensor::{Check, DType, Error, Result, TensorView};

/// A structure of kernel arguments, with its fields' names and types for the test that compares it
/// with the C++ one. Every field is 8 bytes wide, or a structure of such, so both compilers lay it
/// out alike.
macro_rules! mirror {
    ($(#[$about:meta])* $name:ident { $($(#[$of:meta])* $field:ident: $type:ty),* $(,)? }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, Default)]
        #[repr(C)]
        pub(crate) struct $name {
            $($(#[$of])* pub $field: $type),*
        }

        #[cfg(test)]
        impl $name {
            pub(crate) const NAME: &'static str = stringify!($name);
            pub(crate) const FIELDS: &'static [(&'static str, &'static str)] =
                &[$((stringify!($field), stringify!($type))),*];
        }
    };
}
pub(crate) use mirror;

mirror! {
    /// A map `[B, C, H, W]`; all zero if absent.
    Map { pointer: u64, n: i64, c: i64, y: i64, x: i64 }
}

mirror! {
    /// A part of a plan.
    Part {
        pointer: u64,
        dtype: i64,
        /// Stride of the leading V, for `refine_dots`.
        plan: i64,
        /// 0 where one group serves all samples.
        group: i64,
        a: i64,
        b: i64,
    }
}

mirror! {
    /// A gradient `[G, ..]`.
    Out { pointer: u64, dtype: i64, groups: i64, group: i64, a: i64, b: i64 }
}

mirror! {
    /// Sizes of a map, and its tiles and chunks.
    Grid {
        batch: i64,
        channels: i64,
        height: i64,
        width: i64,
        positions_per_block: i64,
        channels_per_block: i64,
        lane_bits: i64,
        tiles: i64,
        chunks: i64,
    }
}

/// The order in which the threads of a warp run over a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Order {
    /// Along the positions of a plane: contiguous maps and any others.
    Planes = 0,
    /// Along the channels of a position: channels_last maps.
    Lanes = 1,
}

impl Order {
    /// The order of this memory.
    pub(crate) fn of(view: &TensorView) -> Self {
        if view.is_channels_last() && !view.is_contiguous() {
            Self::Lanes
        } else {
            Self::Planes
        }
    }

    /// Whether these maps, of one shape and dtype, may be read and written 16 bytes at a time.
    pub(crate) fn is_wide(self, maps: &[&TensorView]) -> bool {
        let sizes = maps[0].sizes();
        let inner = match self {
            Self::Planes => sizes[2] * sizes[3],
            Self::Lanes => sizes[1],
        };
        inner.is_multiple_of(elements(maps[0].dtype)) && self.is_dense(maps)
    }

    /// Whether all of these lie in this order without gaps, aligned to 16 bytes.
    pub(crate) fn is_dense(self, maps: &[&TensorView]) -> bool {
        maps.iter().all(|map| {
            let dense = match self {
                Self::Planes => map.is_contiguous(),
                Self::Lanes => map.is_channels_last(),
            };
            dense && (map.ptr() as usize).is_multiple_of(16)
        })
    }
}

/// E of `common.cuh`: adjacent elements of a map that a thread holds.
pub(crate) fn elements(dtype: DType) -> usize {
    (16 / dtype.size()).max(4)
}

/// The number of a dtype in `common.cuh`.
pub(crate) fn code(dtype: DType) -> i64 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::BF16 => 2,
        DType::F64 => 3,
        DType::I64 => 4,
        DType::I32 => 5,
        DType::I16 => 6,
        DType::I8 => 7,
        DType::U8 => 8,
        DType::Bool => 9,
    }
}

pub(crate) fn address(view: &TensorView) -> u64 {
    view.ptr() as u64
}

impl Map {
    /// A map `[B, C, H, W]`.
    pub(crate) fn of(view: &TensorView) -> Self {
        let [n, c, y, x] = strides(view);
        Self { pointer: address(view), n, c, y, x }
    }

    /// No map, or this one.
    pub(crate) fn of_some(view: Option<&TensorView>) -> Self {
        view.map_or_else(Self::default, Self::of)
    }

    /// One number for each position: `[B, H, W]` or `[B, 1, H, W]`.
    pub(crate) fn of_positions(view: &TensorView) -> Self {
        if view.rank() == 4 {
            return Self::of(view);
        }
        let [n, y, x, _] = strides(view);
        Self { pointer: address(view), n, c: 0, y, x }
    }
}

impl Part {
    /// A part `[G, ..]`, or `[V, G, ..]` where it is stacked.
    pub(crate) fn of(view: Option<&TensorView>, stacked: bool) -> Self {
        let Some(view) = view else { return Self::default() };
        let (plan, one) = if stacked && view.sizes()[0] > 0 {
            (view.strides()[0] as i64, view.select(0))
        } else {
            (0, view.clone())
        };
        let [group, a, b, _] = strides(&one);
        let group = if one.sizes()[0] == 1 { 0 } else { group };
        Self { pointer: address(view), dtype: code(view.dtype), plan, group, a, b }
    }
}

impl Out {
    /// A gradient `[G, ..]`, or none.
    pub(crate) fn of(view: Option<&TensorView>) -> Self {
        let Some(view) = view else { return Self::default() };
        let [group, a, b, _] = strides(view);
        let groups = view.sizes()[0] as i64;
        Self { pointer: address(view), dtype: code(view.dtype), groups, group, a, b }
    }
}

/// The strides, padded with zeros.
fn strides(view: &TensorView) -> [i64; 4] {
    let mut strides = [0; 4];
    for (to, from) in strides.iter_mut().zip(view.strides()) {
        *to = *from as i64;
    }
    strides
}

/// Maps of this many elements get larger blocks.
const LARGE: usize = 1 << 23;

impl Grid {
    /// The grid of a map, defined in `common.cuh`. It depends on shape, dtype and order alone, and
    /// so do the sums' bits.
    pub(crate) fn new(check: Check, map: &TensorView, order: Order, grows: bool) -> Result<Self> {
        let [batch, channels, height, width] = [0, 1, 2, 3].map(|i| map.sizes()[i]);
        let positions = height * width;
        let large = grows && map.numel() >= LARGE;
        let (positions_per_block, channels_per_block, lanes) = match order {
            Order::Planes => {
                let row = positions.next_power_of_two().clamp(32, 256);
                (row, if large { 8192 } else { 4096 } / row, row)
            }
            Order::Lanes => {
                let block = channels.clamp(1, 128);
                let lanes = block.div_ceil(elements(map.dtype)).next_power_of_two().max(4);
                (1024 / lanes, block, lanes)
            }
        };
        let grid = Self {
            batch: batch as i64,
            channels: channels as i64,
            height: height as i64,
            width: width as i64,
            positions_per_block: positions_per_block as i64,
            channels_per_block: channels_per_block as i64,
            lane_bits: i64::from(lanes.ilog2()),
            tiles: positions.div_ceil(positions_per_block) as i64,
            chunks: channels.div_ceil(channels_per_block) as i64,
        };
        let limit = i64::from(i32::MAX);
        let within = [grid.channels, grid.height * grid.width, grid.blocks()];
        if within.iter().any(|count| *count > limit) {
            return Err(Error::Unsupported {
                op: check.0,
                what: format!("maps of shape {} on {}", map.shape_text(), map.device),
                supported: "fewer than 2147483648 channels, positions and blocks".to_owned(),
            });
        }
        Ok(grid)
    }

    /// The number of blocks; 0 if the map is empty.
    pub(crate) fn blocks(&self) -> i64 {
        self.batch * self.tiles * self.chunks
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::cuda::launch::HEADERS;
    use crate::tensor::Device;

    const COMMON: &str = include_str!("common.cuh");

    /// The fields of `struct name` in a CUDA source or in the headers, each with its type in Rust.
    fn fields_in(source: &str, name: &str) -> Vec<(String, String)> {
        let texts = HEADERS.iter().map(|(_, text)| *text).chain([source]);
        let found =
            texts.filter_map(|text| text.split_once(&format!("\nstruct {name} {{\n"))).next();
        let (_, rest) = found.expect(name);
        let body = rest.split_once("\n};").expect("an end").0;
        let lines = body.lines().map(|line| line.split("//").next().unwrap_or_default().trim());
        lines.filter(|line| !line.is_empty()).flat_map(declared).collect()
    }

    /// `long long a, b;`
    fn declared(line: &str) -> Vec<(String, String)> {
        let mut names = line.trim_end_matches(';').split(',').map(str::trim);
        let (of, first) =
            names.next().and_then(|first| first.rsplit_once(' ')).expect("a type and a name");
        let of = match of {
            "unsigned long long" => "u64",
            "long long" => "i64",
            "double" => "f64",
            structure => structure,
        };
        [first].into_iter().chain(names).map(|name| (name.to_owned(), of.to_owned())).collect()
    }

    /// Whether a structure's fields here are the source's: their names, types and order.
    pub(crate) fn assert_mirrors(source: &str, structures: &[(&str, &[(&str, &str)])]) {
        for (name, fields) in structures {
            let found = fields_in(source, name);
            let found: Vec<_> =
                found.iter().map(|(name, of)| (name.as_str(), of.as_str())).collect();
            assert_eq!(&found, fields, "{name}");
        }
    }

    #[test]
    fn the_structures_are_those_of_common_cuh() {
        let all = [
            (Map::NAME, Map::FIELDS),
            (Part::NAME, Part::FIELDS),
            (Out::NAME, Out::FIELDS),
            (Grid::NAME, Grid::FIELDS),
        ];
        assert_mirrors(COMMON, &all);
        assert_eq!(size_of::<Grid>(), 8 * Grid::FIELDS.len());
    }

    #[test]
    #[should_panic(expected = "Grid")]
    fn a_field_of_another_type_is_seen() {
        let other = |(name, of): &(&'static str, &'static str)| {
            (*name, if *name == "tiles" { "f64" } else { *of })
        };
        assert_mirrors(
            COMMON,
            &[(Grid::NAME, &Grid::FIELDS.iter().map(other).collect::<Vec<_>>())],
        );
    }

    #[test]
    fn the_dtypes_are_those_of_common_cuh() {
        let (_, rest) = COMMON.split_once("enum DType {").unwrap();
        let all = [
            DType::F32,
            DType::F16,
            DType::BF16,
            DType::F64,
            DType::I64,
            DType::I32,
            DType::I16,
            DType::I8,
            DType::U8,
            DType::Bool,
        ];
        for (entry, dtype) in rest.split('}').next().unwrap().split(',').zip(all) {
            let (name, number) = entry.split_once('=').unwrap();
            assert_eq!(name.trim().to_lowercase(), format!("{dtype:?}").to_lowercase());
            assert_eq!(number.trim().parse(), Ok(code(dtype)));
        }
    }

    fn view(address: usize, dtype: DType, sizes: [usize; 4], channels_last: bool) -> TensorView {
        let [_, c, h, w] = sizes.map(|s| s as isize);
        let strides =
            if channels_last { [h * w * c, 1, w * c, c] } else { [c * h * w, h * w, w, 1] };
        // SAFETY: never followed.
        unsafe { TensorView::new(address as *mut u8, dtype, Device::Cuda(0), &sizes, &strides) }
            .unwrap()
    }

    #[test]
    fn the_grid_of_a_map() {
        let check = Check("refine");
        // shape, channels_last, dtype -> positions and channels a block, lane bits, tiles, chunks
        for (sizes, last, dtype, expected) in [
            ([2, 3, 5, 7], false, DType::F32, [64, 64, 6, 1, 1]),
            ([64, 128, 16, 16], false, DType::F32, [256, 16, 8, 1, 8]),
            ([64, 128, 32, 32], false, DType::F32, [256, 32, 8, 4, 4]), // 2^23 elements
            ([1, 1, 1, 1], false, DType::F64, [32, 128, 5, 1, 1]),
            ([2, 3, 5, 7], true, DType::F32, [256, 3, 2, 1, 1]),
            ([2, 256, 8, 8], true, DType::BF16, [64, 128, 4, 1, 2]),
            ([2, 130, 8, 8], true, DType::F32, [32, 128, 5, 2, 2]),
            ([2, 130, 8, 8], true, DType::F64, [32, 128, 5, 2, 2]),
            ([0, 3, 4, 4], false, DType::F32, [32, 128, 5, 1, 1]),
            ([2, 0, 4, 4], true, DType::F32, [256, 1, 2, 1, 0]),
            ([2, 3, 0, 4], false, DType::F32, [32, 128, 5, 0, 1]),
        ] {
            let order = if last { Order::Lanes } else { Order::Planes };
            let grid = Grid::new(check, &view(0, dtype, sizes, last), order, true).unwrap();
            let found = [
                grid.positions_per_block, grid.channels_per_block, grid.lane_bits, grid.tiles,
                grid.chunks,
            ];
            assert_eq!(found, expected, "{sizes:?} {last}");
        }
        let large = view(0, DType::F32, [64, 128, 32, 32], false);
        assert_eq!(Grid::new(check, &large, Order::Planes, false).unwrap().channels_per_block, 16);
    }

    #[test]
    fn sixteen_bytes_at_a_time_where_memory_allows() {
        for (address, dtype, sizes, last, order, expected) in [
            (64, DType::F32, [2, 3, 2, 6], false, Order::Planes, true),
            (64, DType::F32, [2, 3, 2, 5], false, Order::Planes, false), // planes of 10
            (64, DType::F16, [2, 3, 2, 6], false, Order::Planes, false), // of 12 halves
            (64, DType::F64, [2, 3, 1, 2], false, Order::Planes, false), // four doubles a thread
            (72, DType::F32, [2, 3, 2, 6], false, Order::Planes, false), // between vectors
            (64, DType::F32, [2, 4, 3, 3], true, Order::Lanes, true),
            (64, DType::BF16, [2, 4, 3, 3], true, Order::Lanes, false),
            (64, DType::F32, [2, 4, 4, 4], true, Order::Planes, false), // of the other order
        ] {
            let map = view(address, dtype, sizes, last);
            assert_eq!(order.is_wide(&[&map]), expected, "{address} {dtype} {sizes:?} {last}");
        }
        let [one, two] = [64, 4].map(|address| view(address, DType::F32, [1, 1, 4, 4], false));
        assert!(!Order::Planes.is_wide(&[&one, &two]), "every map counts");
    }

    #[test]
    fn more_blocks_than_a_launch_takes_are_refused() {
        let map = view(0, DType::F32, [1 << 31, 1, 32, 32], false);
        let error = Grid::new(Check("refine"), &map, Order::Planes, false).unwrap_err();
        let expected = "refine: maps of shape [2147483648, 1, 32, 32] on cuda:0; \
                        supported: fewer than 2147483648 channels, positions and blocks";
        assert_eq!(error.to_string(), expected);
    }
}
