//! Refusals of positions, of layers and of changes of the batch; see `refusals` for what is compared.

use std::time::{Duration, Instant};

use wgpu_kvcache::wgpu::ComputePass;
use wgpu_kvcache::{BatchChange, CachePosition, DType, Error, KVCache, TensorView};

use crate::gpu;
use crate::model::Block;
use crate::refusals::{BOUNDED, Due, GROWING, all, refused, update_refused};
use crate::rig::{Rig, upload};
use crate::wait::{ReadLayer, wait};

const APPEND: CachePosition<'_> = CachePosition::Append;

/// New tokens that fit layer 0 of the caches that `refusals` makes: 3 rows, 9 live tokens.
fn tokens_refused(tokens: usize, position: CachePosition<'_>, due: Due, words: &[&str]) {
    let key = upload(&gpu(), DType::F32, &Block::noise([3, 2, tokens, 4], 4, 5));
    let value = upload(&gpu(), DType::F32, &Block::noise([3, 2, tokens, 6], 4, 6));
    update_refused((key.view(), value.view()), (0, position), due, words);
}

#[test]
fn as_many_positions_as_tokens() {
    let due: Due = |error| matches!(error, Error::PositionCount { .. });
    tokens_refused(2, CachePosition::At(0), due, &["T = 2", "T = 1"]);
    for (list, words) in [
        (&[][..], ["2 positions", "got 0"]),
        (&[3], ["2 positions", "got 1"]),
        (&[3, 4, 5], ["2 positions", "got 3"]),
    ] {
        tokens_refused(2, CachePosition::PerToken(list), due, &words);
    }
    for (rows, words) in [
        (vec![], ["3 lists", "got 0"]),
        (vec![vec![1, 2]; 2], ["3 lists", "got 2"]),
        (vec![vec![1, 2]; 4], ["3 lists", "got 4"]),
        (vec![vec![1, 2], vec![1], vec![1, 2]], ["2 positions", "1 in the list of row 1"]),
        (vec![vec![1, 2], vec![1, 2], vec![1, 2, 3]], ["2 positions", "3 in the list of row 2"]),
        (vec![vec![], vec![1, 2], vec![3, 4]], ["2 positions", "0 in the list of row 0"]),
    ] {
        tokens_refused(2, CachePosition::PerRow(&rows), due, &words);
    }
}

/// Caches of 12 tokens a row, of which 9 are live.
#[test]
fn positions_past_a_static_bound() {
    let key = upload(&gpu(), DType::F32, &Block::noise([3, 2, 4, 4], 4, 5));
    let value = upload(&gpu(), DType::F32, &Block::noise([3, 2, 4, 6], 4, 6));
    let one_row = [vec![0, 1, 2, 3], vec![9, 8, 7, 12], vec![4, 5, 6, 7]];
    let all_rows = vec![vec![12, 13, 14, 15]; 3];
    let out: Due = |error| matches!(error, Error::PositionOutOfBounds { bound: 12, .. });
    let long: Due = |error| *error == Error::SequenceTooLong { len: 9, new_tokens: 4, bound: 12 };
    let cases: [(CachePosition<'_>, Due, &[&str]); 7] = [
        (APPEND, long, &["4 new tokens", "9 live", "12 tokens", "crop()"]),
        (CachePosition::PerToken(&[9, 10, 11, 12]), out, &["position 12", "12 tokens", "0 to 11"]),
        (CachePosition::PerToken(&[40, 1, 2, 3]), out, &["position 40", "crop()"]),
        (CachePosition::PerToken(&[1, u32::MAX, 2, 3]), out, &["position 4294967295"]),
        (CachePosition::PerRow(&one_row), out, &["position 12", "0 to 11"]),
        (CachePosition::PerRow(&all_rows), out, &["position 15", "0 to 11"]),
        (CachePosition::PerToken(&[u32::MAX - 1; 4]), out, &["position 4294967294"]),
    ];
    for (position, due, words) in cases {
        let call = |cache: &mut dyn KVCache, pass: &mut ComputePass<'_>| {
            cache.update(pass, &key.view(), &value.view(), 0, position).map(|_| ())
        };
        for make in BOUNDED {
            refused(make, &format!("{position:?}"), call, due, words);
        }
    }
    let one = upload(&gpu(), DType::F32, &Block::noise([3, 2, 1, 6], 4, 6));
    for position in [12, 13, u32::MAX - 1, u32::MAX] {
        let at = CachePosition::At(position);
        let words = [&format!("position {position}"), "12 tokens", "0 to 11", "crop()"];
        for layer in [0, 2] {
            let call = |cache: &mut dyn KVCache, pass: &mut ComputePass<'_>| {
                let key = TensorView::new(one.buffer(), DType::F32, &[3, 2, 1, 4])?;
                cache.update(pass, &key, &one.view(), layer, at).map(|_| ())
            };
            for make in BOUNDED {
                refused(make, &format!("{at:?}, layer {layer}"), call, out, &words);
            }
        }
    }
}

/// Far past anything that a device has room for: refused at once, and nothing is allocated.
#[test]
fn positions_past_any_memory() {
    let due: Due =
        |error| matches!(error, Error::LayerTooLarge { .. } | Error::SizeOverflow { .. });
    for make in GROWING {
        let begin = Instant::now();
        for far in [100_000_000, 1_000_000_000, u32::MAX / 2, u32::MAX - 1, u32::MAX] {
            let list = [far, 3];
            let rows = [vec![0, 1], vec![1, far], vec![2, 3]];
            for position in [CachePosition::PerToken(&list), CachePosition::PerRow(&rows)] {
                let key = upload(&gpu(), DType::F32, &Block::noise([3, 2, 2, 4], 4, 5));
                let value = upload(&gpu(), DType::F32, &Block::noise([3, 2, 2, 6], 4, 6));
                for layer in [0, 2] {
                    let call = |cache: &mut dyn KVCache, pass: &mut ComputePass<'_>| {
                        cache.update(pass, &key.view(), &value.view(), layer, position).map(|_| ())
                    };
                    refused(make, &format!("{position:?}"), call, due, &[]);
                }
            }
            let one = upload(&gpu(), DType::F32, &Block::noise([3, 2, 1, 4], 4, 5));
            let call = |cache: &mut dyn KVCache, pass: &mut ComputePass<'_>| {
                cache.update(pass, &one.view(), &one.view(), 2, CachePosition::At(far)).map(|_| ())
            };
            refused(make, &format!("At({far})"), call, due, &[]);
        }
        assert!(begin.elapsed() < Duration::from_secs(20), "took {:?}", begin.elapsed());
    }
}

/// Whether a cache of `refusals` has no room for `rows` rows: a ring in its buffers, pages in their table,
/// which is all that they need for more rows. A device that binds gigabytes has room for many tables.
fn is_too_many(make: fn() -> Rig, rows: usize) -> bool {
    let rig = make();
    let view = rig.cache.view(0).expect("it exists").expect("it was written");
    let limits = rig.gpu.device().limits();
    let limit = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
    let row = match view.page_table() {
        // Words of the table for one row.
        Some(_) => (view.start() + view.len()).div_ceil(view.capacity()),
        // The wider of the two buffers, each of which is bound by itself.
        None => view.value_strides()[0],
    };
    rows.saturating_mul(4 * row) as u64 > limit || u32::try_from(rows).is_err()
}

#[test]
fn indices_and_counts() {
    for make in all() {
        let selections: [(&[u32], Due, &[&str]); 6] = [
            (&[], |error| *error == Error::NoIndices, &["at least one row", "reset()"]),
            (&[3], past_the_batch, &["index 3", "place 0", "0 to 2", "beam indices"]),
            (&[0, 1, 7], past_the_batch, &["index 7", "place 2", "layer 0", "0 to 2"]),
            (&[0, u32::MAX, 2], past_the_batch, &["index 4294967295", "place 1"]),
            (&[1, 0, 1, 0, 1, 0, 3], past_the_batch, &["index 3", "place 6"]),
            (&[0, 0, 0, 0, 9], past_the_batch, &["index 9", "place 4"]),
        ];
        for (indices, due, words) in selections {
            let name = format!("{indices:?}");
            refused(
                make,
                &name,
                |cache, pass| cache.batch_select_indices(pass, indices),
                due,
                words,
            );
            refused(make, &name, |cache, pass| cache.reorder_cache(pass, indices), due, words);
            let prepare = |cache: &mut dyn KVCache, _: &mut ComputePass<'_>| {
                cache.prepare_batch(BatchChange::Select(indices))
            };
            refused(make, &name, prepare, due, words);
        }
        let zero: Due = |error| *error == Error::ZeroRepeats;
        let words = ["repeats is 0", "at least 1", "reset()"];
        refused(
            make,
            "0 times",
            |cache, pass| cache.batch_repeat_interleave(pass, 0),
            zero,
            &words,
        );
        let large: Due = |error| {
            matches!(
                error,
                Error::LayerTooLarge { .. }
                    | Error::SizeOverflow { .. }
                    | Error::ListTooLarge { .. }
            )
        };
        for repeats in [10_000_000, 12_000_000, 1 << 31, 1 << 40, usize::MAX / 3, usize::MAX] {
            if !is_too_many(make, repeats.saturating_mul(3)) {
                continue;
            }
            let name = format!("{repeats} times");
            let call = |cache: &mut dyn KVCache, pass: &mut ComputePass<'_>| {
                cache.batch_repeat_interleave(pass, repeats)
            };
            refused(make, &name, call, large, &[]);
        }
        for rows in [20_000_000, 40_000_000] {
            if is_too_many(make, rows) {
                let many = vec![1; rows];
                let name = format!("{rows} rows");
                refused(make, &name, |cache, pass| cache.reorder_cache(pass, &many), large, &[]);
                break;
            }
        }
    }
    // Where no layer holds anything there is no batch to be past, but still nothing to do.
    let gpu = gpu();
    for mut rig in empty() {
        gpu.submit_pass("empty", |pass| {
            assert_eq!(rig.cache.reorder_cache(pass, &[]), Err(Error::NoIndices));
            assert_eq!(rig.cache.batch_repeat_interleave(pass, 0), Err(Error::ZeroRepeats));
        });
        assert_eq!(rig.cache.stats(), Default::default());
    }
}

/// A cache of each kind that holds nothing.
fn empty() -> Vec<Rig> {
    let gpu = gpu();
    let paged = [1, 4, 16].map(|size| Rig::paged(&gpu, size));
    [Rig::dynamic(&gpu), Rig::fixed(&gpu, 12, 3)].into_iter().chain(paged).collect()
}

fn past_the_batch(error: &Error) -> bool {
    matches!(error, Error::IndexOutOfRange { layer: 0, batch: 3, .. })
}

/// One layer of a smaller batch among others: then no layer may change, whatever its place.
#[test]
fn one_layer_of_a_smaller_batch() {
    for small in 0..3 {
        for kind in 0..5 {
            let make = || {
                let mut rig = empty().swap_remove(kind);
                for layer in 0..2 {
                    let batch = if layer == small { 2 } else { 4 };
                    rig.update(layer, [batch, 2, 7, 4], 6, APPEND);
                }
                if small == 2 {
                    rig.update(2, [2, 5, 7, 6], 2, APPEND);
                    rig.crop(5);
                }
                rig
            };
            let due: Due =
                |error| matches!(error, Error::IndexOutOfRange { index: 2 | 3, batch: 2, .. });
            let layer = format!("layer {small}");
            // In place, and with rows that need more memory.
            for indices in [&[3, 0][..], &[1, 0, 2, 1], &[0, 1, 0, 1, 0, 1, 2, 3, 0]] {
                let name = format!("{indices:?}, small layer {small}");
                let call = |cache: &mut dyn KVCache, pass: &mut ComputePass<'_>| {
                    cache.batch_select_indices(pass, indices)
                };
                if small < 2 {
                    refused(make, &name, call, due, &[&layer, "0 to 1"]);
                } else {
                    let mut rig = make();
                    let before = rig.cache.stats();
                    let gpu = rig.gpu.clone();
                    let result = gpu.submit_pass("refused", |pass| call(rig.cache.as_mut(), pass));
                    assert!(result.is_err_and(|error| due(&error)));
                    assert_eq!(rig.cache.stats(), before);
                    rig.check(&name);
                }
            }
        }
    }
}

#[test]
fn layers_past_a_static_count() {
    for (layer, make) in
        [3, 4, 1000, usize::MAX].into_iter().flat_map(|layer| BOUNDED.map(|make| (layer, make)))
    {
        let due: Due = |error| matches!(error, Error::LayerOutOfRange { num_layers: 3, .. });
        let words = [&format!("layer {layer}"), "3 layers", "0 to 2"];
        let one = upload(&gpu(), DType::F32, &Block::noise([3, 2, 1, 4], 4, 5));
        let name = format!("layer {layer}");
        refused(
            make,
            &name,
            |cache, pass| {
                let updated = cache.update(pass, &one.view(), &one.view(), layer, APPEND);
                updated.map(|_| ())
            },
            due,
            &words,
        );
        refused(make, &name, |cache, _| cache.view(layer).map(|_| ()), due, &words);
        refused(make, &name, |cache, _| cache.read(layer).map(|_| ()), due, &words);
        refused(make, &name, |cache, _| cache.get_seq_length(layer).map(|_| ()), due, &words);
        let get_async = |cache: &mut dyn KVCache, _: &mut ComputePass<'_>| {
            wait(cache.get_async(layer)).map(|_| ())
        };
        refused(make, &name, get_async, due, &words);
    }
    // A cache that grows has no last layer: those never written are empty.
    for rig in GROWING.map(|make| make()) {
        for layer in [3, 1000, usize::MAX] {
            assert_eq!(rig.cache.read(layer), Ok(None));
            assert_eq!(rig.cache.get_seq_length(layer), Ok(0));
            assert!(matches!(rig.cache.view(layer), Ok(None)));
        }
    }
}

/// Refused calls among valid ones, all in one pass.
#[test]
fn refused_calls_leave_no_trace_in_a_pass() {
    for mut rig in all().map(|make| make()) {
        let gpu = rig.gpu.clone();
        let (key, value) = rig.noise(DType::F32, [3, 2, 1, 4], 6);
        let (k, v) = (upload(&gpu, DType::F32, &key), upload(&gpu, DType::F32, &value));
        gpu.submit_pass("mixed", |pass| {
            for place in [4, 0, 11] {
                let cache = rig.cache.as_mut();
                assert!(cache.update(pass, &v.view(), &k.view(), 0, APPEND).is_err());
                assert!(cache.update(pass, &k.view(), &k.view(), 0, APPEND).is_err());
                assert!(cache.reorder_cache(pass, &[0, 5]).is_err());
                let at = CachePosition::At(place);
                cache.update(pass, &k.view(), &v.view(), 0, at).expect("a valid update");
                assert!(cache.update(pass, &k.view(), &v.view(), 1, at).is_err());
                assert!(cache.batch_repeat_interleave(pass, 0).is_err());
                cache.reorder_cache(pass, &[2, 0, 1]).expect("a valid order");
                assert!(cache.reorder_cache(pass, &[]).is_err());
                rig.model.update(0, &key, &value, at).expect("a valid update");
                rig.model.select(&[2, 0, 1]).expect("a valid order");
            }
        });
        rig.check("refused among valid ones");
    }
}
