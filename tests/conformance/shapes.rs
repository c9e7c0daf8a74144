//! Every extent and type that K and V may have, on both devices of `inputs`.

use wgpu_kvcache::{CachePosition, DType, Error};

use crate::inputs::{DTYPES, devices};
use crate::rig::Rig;

/// Every combination of extents, up to a size; V's `head_dim` is another one than K's.
#[test]
fn every_shape_and_type() {
    const DIMS: [usize; 11] = [1, 2, 3, 4, 5, 8, 16, 17, 64, 100, 256];
    let mut tried = 0;
    for (device, gpu) in devices() {
        for dtype in DTYPES {
            let suits = |d: &usize| dtype == DType::F32 || d.is_multiple_of(2);
            let dims: Vec<usize> = DIMS.into_iter().filter(suits).collect();
            for (place, &d) in dims.iter().enumerate() {
                for (number, code) in (0..80).enumerate() {
                    let b = [1, 2, 5, 33][code % 4];
                    let h = [1, 3, 8, 17][code / 4 % 4];
                    let t = [1, 2, 5, 70, 300][code / 16];
                    let value_dim = dims[(place + number) % dims.len()];
                    if b * h * t * (d + value_dim) > 40_000 {
                        continue;
                    }
                    let mut rig = Rig::dynamic(&gpu);
                    rig.update_as(dtype, 0, [b, h, t, d], value_dim, CachePosition::Append);
                    rig.update_as(dtype, 0, [b, h, 1, d], value_dim, CachePosition::Append);
                    let context = format!("{device}, {dtype}, {:?}, V {value_dim}", [b, h, t, d]);
                    rig.check(&context);
                    tried += 1;
                }
            }
        }
    }
    assert!(tried > 2000, "only {tried} shapes are small enough");
}

/// A few that are large in one or all extents.
#[test]
fn large_shapes() {
    for (device, gpu) in devices() {
        for (dtype, [b, h, t, d], value_dim) in [
            (DType::F32, [5, 8, 300, 64], 100),
            (DType::F16, [33, 17, 70, 16], 64),
            (DType::BF16, [2, 3, 300, 256], 2),
            (DType::F32, [33, 17, 5, 17], 5),
            (DType::F32, [1, 1, 3000, 3], 1),
            (DType::F16, [300, 1, 2, 2], 258),
        ] {
            let mut rig = Rig::fixed(&gpu, t + 3, 1);
            rig.update_as(dtype, 0, [b, h, t, d], value_dim, CachePosition::Append);
            rig.update_as(dtype, 0, [b, h, 3, d], value_dim, CachePosition::Append);
            rig.check(&format!("{device}, {dtype}, {:?}, V {value_dim}", [b, h, t, d]));
        }
    }
}

/// More heads or tokens than a device starts workgroups in one dimension.
const MANY: [[usize; 4]; 6] = [
    [1, 70_000, 1, 1],
    [1, 1, 70_000, 1],
    [300, 300, 1, 2],
    [2, 1, 70_000, 3],
    [3, 35_000, 2, 4],
    [2, 3, 30_000, 8],
];

/// More rows than that. Mesa's llvmpipe ends a shader's loops without a word after 65,535 rounds, all
/// loops of an invocation counted together, so no thread may loop over all rows at once.
const MANY_ROWS: [[usize; 4]; 4] =
    [[17_000, 1, 2, 2], [33_000, 1, 1, 1], [70_000, 1, 2, 4], [140_001, 1, 1, 3]];

/// Makes a layer of each of `shapes`, on the two devices in turn, does `change` to it, and compares.
fn with(shapes: &[[usize; 4]], what: &str, change: fn(&mut Rig)) {
    let devices = devices();
    for (&shape, (device, gpu)) in shapes.iter().zip(devices.iter().cycle()) {
        let mut rig = Rig::dynamic(gpu);
        rig.update(0, shape, shape[3], CachePosition::Append);
        change(&mut rig);
        rig.check(&format!("{device}, {shape:?}, {what}"));
    }
}

fn append(rig: &mut Rig) {
    let [b, h, _, d] = rig.model.get(0).expect("it was written").0.shape;
    rig.update(0, [b, h, 1, d], d, CachePosition::Append);
    rig.update(0, [b, h, 2, d], d, CachePosition::PerToken(&[3, 0]));
}

/// The rows in reverse order, `times` times over.
fn reverse(rig: &mut Rig, times: usize) {
    let rows = u32::try_from(rig.model.batch(0)).expect("small");
    let reversed: Vec<u32> = (0..rows).rev().collect();
    rig.select(&reversed.repeat(times));
}

#[test]
fn very_many_heads_and_tokens() {
    with(&MANY, "appended to", append);
    with(&MANY, "reversed", |rig| reverse(rig, 1));
}

/// Batches of them grow, or are refused for want of workgroups: then nothing has changed.
#[test]
fn more_rows_of_very_many_heads_and_tokens() {
    with(&MANY, "each row thrice", |rig| {
        let (gpu, before) = (rig.gpu.clone(), rig.cache.stats());
        let rows = u32::try_from(rig.model.batch(0)).expect("small");
        let thrice: Vec<u32> = (0..rows).flat_map(|row| [row; 3]).collect();
        for result in [
            gpu.submit_pass("repeat", |pass| rig.cache.batch_repeat_interleave(pass, 3)),
            gpu.submit_pass("select", |pass| rig.cache.batch_select_indices(pass, &thrice)),
        ] {
            match result {
                Ok(()) => rig.model.select(&thrice).expect("rows that are there"),
                Err(error) => {
                    assert!(matches!(error, Error::TooManyWorkgroups { .. }), "{error}");
                    assert_eq!(rig.cache.stats(), before);
                }
            }
        }
    });
}

#[test]
fn updates_of_very_many_rows() {
    with(&MANY_ROWS, "appended to", append);
}

#[test]
fn reversals_of_very_many_rows() {
    with(&MANY_ROWS, "reversed", |rig| reverse(rig, 1));
}

/// One cycle through all rows.
#[test]
fn rotations_of_very_many_rows() {
    with(&MANY_ROWS, "rotated", |rig| {
        let rows = u32::try_from(rig.model.batch(0)).expect("small");
        let rotated: Vec<u32> = (1..rows).chain([0]).collect();
        rig.select(&rotated);
    });
}

#[test]
fn selections_of_very_many_rows_into_more() {
    with(&MANY_ROWS, "reversed twice over", |rig| reverse(rig, 2));
}

#[test]
fn repeats_of_very_many_rows() {
    with(&MANY_ROWS, "repeated", |rig| rig.repeat_interleave(2));
    with(&MANY_ROWS, "repeated thrice", |rig| rig.repeat_interleave(3));
}
