//! Caches that are saved, and restored into every kind, on any device.

use std::collections::HashMap;

use safetensors::SafeTensors;
use wgpu_kvcache::wgpu::Features;
use wgpu_kvcache::{
    BatchChange, Cache, CacheOptions, CachePosition, DType, DynamicKVCache, Error, Format, Formats,
    Gpu, KVCache, LayerShape, PagedKVCache, SequenceCache, SequenceId, StaticKVCache, StoredTensor,
    StoringError, TensorView,
};

use crate::model::{Block, Model};
use crate::rig::{Rig, Storing, same_bits, upload};
use crate::{gpu, open};

const APPEND: CachePosition<'_> = CachePosition::Append;
const ALL: std::ops::Range<usize> = 0..usize::MAX;

/// An empty cache of every kind.
fn kinds(gpu: &Gpu, options: CacheOptions<'_>) -> Vec<(&'static str, Box<dyn KVCache>)> {
    let bound = options.with_max_cache_len(40).with_num_layers(3);
    let paged = |tokens| PagedKVCache::with_options(gpu, options.with_page_tokens(tokens));
    vec![
        ("dynamic", Box::new(DynamicKVCache::with_options(gpu, options).expect("options"))),
        ("static", Box::new(StaticKVCache::with_options(gpu, bound).expect("options"))),
        ("pages of 4", Box::new(paged(4).expect("options"))),
        ("pages of 16", Box::new(paged(16).expect("options"))),
    ]
}

fn same(a: &StoredTensor, b: &StoredTensor) -> bool {
    let scales = |tensor: &StoredTensor| bytemuck::cast_slice::<_, u8>(tensor.scales()).to_vec();
    a.shape() == b.shape()
        && a.format() == b.format()
        && same_bits(a.elements(), b.elements())
        && same_bits(&scales(a), &scales(b))
}

/// Both hold the same tokens, and count the same ones.
fn compare(a: &dyn KVCache, b: &dyn KVCache, layers: &[usize], context: &str) {
    for &layer in layers {
        let (one, other) = (a.get_stored(layer).unwrap(), b.get_stored(layer).unwrap());
        assert_eq!(one.is_some(), other.is_some(), "{context}, layer {layer}");
        if let Some(((ka, va), (kb, vb))) = one.zip(other) {
            assert!(same(&ka, &kb) && same(&va, &vb), "{context}, layer {layer}");
        }
        let [view, its] = [a, b].map(|cache| cache.view(layer).unwrap().expect("it holds tokens"));
        for row in 0..view.key_shape()[0] {
            assert_eq!(view.row_len(row), its.row_len(row), "{context}, layer {layer}, row {row}");
        }
        let next = [a, b].map(|cache| cache.get_next_position(layer).unwrap());
        assert_eq!(next[0], next[1], "{context}, layer {layer}");
    }
}

fn restored(
    gpu: &Gpu,
    mut cache: Box<dyn KVCache>,
    bytes: &[u8],
    context: &str,
) -> Box<dyn KVCache> {
    gpu.submit_pass("restore", |pass| cache.restore(pass, bytes))
        .unwrap_or_else(|error| panic!("{context}: {error}"));
    cache
}

/// What the rigs below have gone through: rows that share, were cropped, and differ in length.
fn histories(gpu: &Gpu, storing: Storing) -> Vec<(&'static str, Rig)> {
    let rigs = || {
        vec![
            ("dynamic", Rig::dynamic_storing(gpu, storing)),
            ("static", Rig::fixed_storing(gpu, 12, 3, storing)),
            ("pages of 4", Rig::in_pages_storing(gpu, 4, None, Model::dynamic(), storing)),
        ]
    };
    let mut all = Vec::new();
    for (name, mut rig) in rigs() {
        for layer in [0, 2] {
            rig.update(layer, [1, 2, 7, 34], 18, APPEND);
        }
        rig.select(&[0, 0, 0]);
        for layer in [0, 2] {
            rig.update(layer, [3, 2, 3, 34], 18, APPEND);
        }
        rig.select(&[2, 0, 2, 1]);
        rig.crop(7);
        for layer in [0, 2] {
            rig.update(layer, [4, 2, 2, 34], 18, APPEND);
        }
        all.push((name, rig));
    }
    for (name, mut rig) in rigs() {
        rig.update(0, [3, 2, 8, 34], 18, APPEND);
        rig.truncate_rows(&[8, 3, 5]);
        all.push((name, rig));
    }
    all
}

#[test]
fn every_kind_is_restored_into_every_kind_and_goes_on() {
    let gpu = gpu();
    let other = open(Features::empty(), None);
    let mixed = Formats { key: Some(Format::Q8_0), value: Some(Format::Q4_0) };
    for (formats, is_value_in_key) in [
        (Formats::default(), false),
        (Format::F16.into(), false),
        (Format::Q8_0.into(), false),
        (mixed, false),
        (Format::Q4_0.into(), true),
    ] {
        let storing = Storing { formats, is_value_in_key };
        for (from, rig) in histories(&gpu, storing) {
            let layers = rig.model.layers();
            let bytes = rig.cache.save(ALL).expect("it was submitted");
            for (number, (to, cache)) in kinds(&other, storing.options()).into_iter().enumerate() {
                let context = format!("{storing:?}, {from} to {to}");
                let mut cache = restored(&other, cache, &bytes, &context);
                compare(rig.cache.as_ref(), cache.as_ref(), &layers, &context);
                if number % 2 == 1 {
                    continue;
                }
                // The restored cache takes more tokens, is saved, and restored into one that is on the first device.
                let shape = rig.cache.view(0).unwrap().expect("written").key_shape();
                let block = Block::numbers([shape[0], 2, 3, 34], DType::F32, 77);
                let key = upload(&other, DType::F32, &block);
                let value = upload(&other, DType::F32, &block.first_elements(18));
                let value = match is_value_in_key {
                    true => key.view().with_head_dim(18),
                    false => value.view(),
                };
                other
                    .submit_pass("more", |pass| {
                        cache.update(pass, &key.view(), &value, 0, APPEND).map(|_| ())
                    })
                    .unwrap_or_else(|error| panic!("{context}: {error}"));
                let bytes = cache.save(ALL).expect("it was submitted");
                let (_, back) = kinds(&gpu, storing.options()).swap_remove(3 - number);
                let back = restored(&gpu, back, &bytes, &context);
                compare(cache.as_ref(), back.as_ref(), &layers, &context);
            }
        }
    }
}

/// Four beams that share a prompt: the file holds it once, and so does the cache that it is restored into.
#[test]
fn shared_pages_are_saved_once_and_shared_again() {
    let gpu = gpu();
    for format in [Format::F32, Format::Q8_0] {
        let storing = Storing { formats: format.into(), is_value_in_key: false };
        let mut rig = Rig::in_pages_storing(&gpu, 16, None, Model::dynamic(), storing);
        rig.update(0, [1, 4, 200, 64], 64, APPEND);
        rig.repeat_interleave(4);
        for _ in 0..5 {
            rig.update(0, [4, 4, 1, 64], 64, APPEND);
            rig.select(&[1, 0, 0, 3]);
        }
        let before = rig.cache.stats();
        let bytes = rig.cache.save(ALL).expect("it was submitted");
        let page = 2 * 4 * 16 * format.token_bytes(64);
        let used = before.pages_used * page;
        assert!(bytes.len() as u64 * 10 <= used * 11, "{} bytes for {used}", bytes.len());
        for (tokens, is_same) in [(16, true), (8, false)] {
            let options = storing.options().with_page_tokens(tokens);
            let cache = PagedKVCache::with_options(&gpu, options).expect("options");
            let cache = restored(&gpu, Box::new(cache), &bytes, "beams");
            compare(rig.cache.as_ref(), cache.as_ref(), &[0], "beams");
            let after = cache.stats();
            assert!(after.pages_shared > 0);
            if is_same {
                let counts = |stats: wgpu_kvcache::Stats| (stats.pages_used, stats.pages_shared);
                assert_eq!(counts(after), counts(before));
            }
        }
    }
}

/// The same content gives the same bytes, of rows and of sequences.
#[test]
fn a_cache_that_is_saved_twice_gives_the_same_bytes() {
    let gpu = gpu();
    let mut rig = Rig::in_pages(&gpu, 4, None, Model::dynamic());
    for layer in 0..6 {
        rig.update(layer, [2, 1, 5, 4], 4, APPEND);
    }
    let mut cache = SequenceCache::new(&gpu, &[SHAPE; 6]).expect("layers");
    let id = cache.add().unwrap();
    step(&gpu, &mut cache, id, 3, 1);
    let saves: [&dyn Fn() -> Vec<u8>; 3] = [
        &|| rig.cache.save(ALL).expect("it was submitted"),
        &|| pollster::block_on(rig.cache.save_async(ALL)).expect("it was submitted"),
        &|| cache.save(id).expect("it was submitted"),
    ];
    for save in saves {
        let first = save();
        assert!((0..8).all(|_| save() == first));
    }
    assert!(saves[0]() == saves[1]());
}

/// A change of the batch that was prepared for an empty cache is not that of the restored one.
#[test]
fn a_prepared_change_does_not_outlive_a_restore() {
    let gpu = gpu();
    let mut rig = Rig::dynamic(&gpu);
    rig.update(0, [2, 1, 5, 4], 4, APPEND);
    let bytes = rig.cache.save(ALL).expect("it was submitted");
    for (kind, mut cache) in kinds(&gpu, CacheOptions::default()) {
        let change = BatchChange::Select(&[1, 1, 0]);
        cache.prepare_batch(change).expect("nothing to do");
        gpu.submit_pass("restore, then select", |pass| {
            cache.restore(pass, &bytes)?;
            cache.batch_select_indices(pass, &[1, 1, 0])
        })
        .unwrap_or_else(|error| panic!("{kind}: {error}"));
        assert_eq!(cache.get(0).unwrap().expect("tokens").0.shape(), [3, 1, 5, 4], "{kind}");
    }
}

/// A reader of the format opens the file, and finds a layer's tensors by their names.
#[test]
fn a_file_is_plain_safetensors() {
    let gpu = gpu();
    let mut rig = Rig::dynamic(&gpu);
    for layer in 0..4 {
        rig.update(layer, [2, 3, 5, 8], 6, APPEND);
    }
    let bytes = rig.cache.save(2..4).expect("it was submitted");
    let file = SafeTensors::deserialize(&bytes).expect("a reader of the format");
    let mut names = file.names();
    names.sort_unstable();
    let of = |layer: usize| {
        ["key", "pages", "rows", "value"].map(|name| format!("layer.{layer}.{name}"))
    };
    assert_eq!(names, [of(2), of(3)].concat());
    let key = file.tensor("layer.3.key").expect("a tensor");
    assert_eq!((key.shape(), key.dtype()), (&[2, 3, 5, 8][..], safetensors::Dtype::F32));
    let (expected, _) = rig.model.get(3).expect("written");
    assert!(same_bits(key.data(), &expected.bytes));
    let tables: HashMap<_, _> = file.tensors().into_iter().collect();
    assert_eq!(tables["layer.2.rows"].data(), bytemuck::cast_slice::<u32, u8>(&[0, 5, 0, 5]));
}

#[test]
fn sequences_are_restored_among_sequences_and_rows() {
    let gpu = gpu();
    let layers = [LayerShape { dtype: DType::F32, heads: 2, key_dim: 32, value_dim: 16 }; 2];
    for formats in [Formats::default(), Format::Q8_0.into()] {
        let options = CacheOptions::default().with_formats(formats).with_page_tokens(4);
        let make = |tokens| {
            let options = options.with_page_tokens(tokens);
            SequenceCache::with_options(&gpu, &layers, options).expect("options")
        };
        let mut cache = make(4);
        let step =
            |cache: &mut SequenceCache, counts: &[(wgpu_kvcache::SequenceId, usize)], seed| {
                let total: usize = counts.iter().map(|(_, count)| count).sum();
                let tensors = [32, 16].map(|dim| {
                    upload(&gpu, DType::F32, &Block::numbers([1, total, 2, dim], DType::F32, seed))
                });
                gpu.submit_pass("step", |pass| {
                    let step = cache.plan_step(pass, counts)?;
                    let [key, value] = &tensors;
                    let key = TensorView::packed(key.buffer(), DType::F32, [total, 2, 32])?;
                    let value = TensorView::packed(value.buffer(), DType::F32, [total, 2, 16])?;
                    for layer in 0..2 {
                        cache.update(pass, &step, layer, &key, &value)?;
                    }
                    Ok::<_, Error>(step)
                })
                .expect("room")
            };
        let (a, b) = (cache.add().unwrap(), cache.add().unwrap());
        step(&mut cache, &[(a, 9), (b, 3)], 1);
        cache.crop(a, 7).unwrap();
        let bytes = cache.save(a).expect("it was submitted");
        let mut other = make(16);
        let c = other.add().unwrap();
        step(&mut other, &[(c, 2)], 2);
        let id = gpu.submit_pass("restore", |pass| other.restore(pass, &bytes)).expect("it fits");
        for layer in 0..2 {
            let (one, two) = (cache.get_stored(a, layer), other.get_stored(id, layer));
            let ((ka, va), (kb, vb)) = one.unwrap().zip(two.unwrap()).expect("tokens");
            assert!(same(&ka, &kb) && same(&va, &vb), "{formats:?}, layer {layer}");
        }
        // Positions go on as they would have.
        let positions =
            |cache: &mut SequenceCache, id| step(cache, &[(id, 2)], 3).positions().to_vec();
        assert_eq!(positions(&mut cache, a), positions(&mut other, id));
        assert_eq!(other.len(c).unwrap(), 2);
        // As a row of a cache of rows, and from there among sequences again.
        let mut rows =
            DynamicKVCache::with_options(&gpu, CacheOptions::default().with_formats(formats))
                .unwrap();
        gpu.submit_pass("rows", |pass| rows.restore(pass, &bytes)).expect("one row");
        assert_eq!(rows.get_next_position(1).unwrap(), 9);
        let again = rows.save(ALL).expect("it was submitted");
        let mut last = make(4);
        let id = gpu.submit_pass("again", |pass| last.restore(pass, &again)).expect("it fits");
        assert_eq!(last.len(id).unwrap(), 7);
        // Of other layers, or of several rows.
        let before = (last.stats().pages_used, last.stats().dispatches);
        let one_layer = rows.save(0..1).expect("it was submitted");
        for bytes in [&one_layer[..], &bytes[..bytes.len() - 1]] {
            let error = gpu.submit_pass("bad", |pass| last.restore(pass, bytes)).expect_err("bad");
            assert!(matches!(error, Error::Storing(StoringError::BadSave { .. })), "{error}");
            assert_eq!((last.stats().pages_used, last.stats().dispatches), before);
        }
    }
}

#[test]
fn layers_with_windows_keep_what_their_windows_need() {
    let gpu = gpu();
    let options = CacheOptions::default().with_windows(&[Some(4), None]);
    let mut cache = DynamicKVCache::with_options(&gpu, options).expect("options");
    let tokens = upload(&gpu, DType::F32, &Block::noise([1, 1, 6, 2], 4, 3));
    let update = |cache: &mut dyn KVCache| {
        gpu.submit_pass("update", |pass| {
            (0..2).try_for_each(|layer| {
                cache.update(pass, &tokens.view(), &tokens.view(), layer, APPEND).map(|_| ())
            })
        })
        .expect("room");
    };
    (0..3).for_each(|_| update(&mut cache));
    let bytes = cache.save(ALL).expect("it was submitted");
    let mut windowed = DynamicKVCache::with_options(&gpu, options).expect("options");
    gpu.submit_pass("restore", |pass| windowed.restore(pass, &bytes)).expect("it fits");
    compare(&cache, &windowed, &[0, 1], "window to window");
    let mut whole = PagedKVCache::new(&gpu);
    gpu.submit_pass("restore", |pass| whole.restore(pass, &bytes)).expect("it fits");
    compare(&cache, &whole, &[0, 1], "window to all");
    // From one that keeps all, a window keeps its own.
    let mut all = DynamicKVCache::new(&gpu);
    (0..3).for_each(|_| update(&mut all));
    let bytes = all.save(ALL).expect("it was submitted");
    let bound = options.with_max_cache_len(30).with_num_layers(2).with_max_chunk(6);
    let mut fixed = StaticKVCache::with_options(&gpu, bound).expect("options");
    gpu.submit_pass("restore", |pass| fixed.restore(pass, &bytes)).expect("it fits");
    assert_eq!([fixed.get_seq_length(0).unwrap(), fixed.get_seq_length(1).unwrap()], [3, 18]);
    assert_eq!(fixed.get_next_position(0).unwrap(), 18);
    for cache in [&mut fixed as &mut dyn KVCache, &mut cache] {
        update(cache);
    }
    let (key, _) = fixed.get(0).unwrap().expect("written");
    let (its, _) = cache.get(0).unwrap().expect("written");
    assert!(same_bits(key.bytes(), its.bytes()));
    // A window of one token needs none, and positions go on counting.
    let options = CacheOptions::default().with_windows(&[Some(1), None]);
    let mut least = DynamicKVCache::with_options(&gpu, options).expect("options");
    gpu.submit_pass("restore", |pass| least.restore(pass, &bytes)).expect("it fits");
    assert_eq!([0, 1].map(|layer| least.get_next_position(layer)), [Ok(18), Ok(18)]);
}

#[test]
fn what_cannot_be_restored_leaves_the_cache_empty_and_of_use() {
    let gpu = gpu();
    let mut rig = Rig::in_pages(&gpu, 4, None, Model::dynamic());
    for layer in 0..2 {
        rig.update(layer, [2, 1, 9, 4], 4, APPEND);
    }
    let bytes = rig.cache.save(ALL).expect("it was submitted");
    let refuse = |cache: &mut dyn KVCache, bytes: &[u8]| {
        let error = gpu.submit_pass("bad", |pass| cache.restore(pass, bytes)).expect_err("refused");
        assert!(cache.view(0).unwrap().is_none() && cache.get(1).unwrap().is_none(), "{error}");
        error
    };
    let fresh = || DynamicKVCache::new(&gpu);
    for bytes in
        [&bytes[..0], &bytes[..100], &bytes[..bytes.len() - 1], b"GGUF and no more", &[0xff; 64]]
    {
        let error = refuse(&mut fresh(), bytes);
        assert!(matches!(error, Error::Storing(StoringError::BadSave { .. })), "{error}");
    }
    let quantized = CacheOptions::default().with_formats(Format::Q8_0);
    let mut cache = DynamicKVCache::with_options(&gpu, quantized).unwrap();
    let error = refuse(&mut cache, &bytes);
    assert!(error.to_string().contains("with_formats"), "{error}");
    let alone = CacheOptions::default().with_value_in_key();
    let error = refuse(&mut DynamicKVCache::with_options(&gpu, alone).unwrap(), &bytes);
    assert!(error.to_string().contains("with_value_in_key"), "{error}");
    let options = CacheOptions::default().with_num_layers(1);
    let error =
        refuse_one_layer(&gpu, DynamicKVCache::with_options(&gpu, options).unwrap(), &bytes);
    assert!(matches!(error, Error::LayerOutOfRange { layer: 1, .. }), "{error}");
    let bound = CacheOptions::default().with_max_cache_len(8).with_num_layers(2);
    let mut short = StaticKVCache::with_options(&gpu, bound).unwrap();
    let error = refuse(&mut short, &bytes);
    assert!(matches!(error, Error::SequenceTooLong { bound: 8, .. }), "{error}");
    let pool = CacheOptions::default().with_page_tokens(4).with_max_pages(4);
    let mut pool = PagedKVCache::with_options(&gpu, pool).unwrap();
    let error = refuse(&mut pool, &bytes);
    assert!(matches!(error, Error::OutOfPages { .. }), "{error}");
    // They are of use afterwards.
    let one = upload(&gpu, DType::F32, &Block::noise([1, 1, 2, 4], 4, 9));
    for cache in [&mut short as &mut dyn KVCache, &mut pool] {
        gpu.submit_pass("use", |pass| {
            cache.update(pass, &one.view(), &one.view(), 0, APPEND).map(|_| ())
        })
        .expect("an empty cache");
        assert_eq!(cache.get_seq_length(0).unwrap(), 2);
        // A cache that holds tokens is left alone.
        let before = cache.stats();
        let error = gpu.submit_pass("full", |pass| cache.restore(pass, &bytes)).expect_err("full");
        assert!(error.to_string().contains("reset()"), "{error}");
        assert_eq!((cache.stats(), cache.get_seq_length(0).unwrap()), (before, 2));
    }
    // Saving what was not submitted is refused, as reading it is.
    let mut pending = fresh();
    let mut encoder = gpu.device().create_command_encoder(&Default::default());
    let mut pass = encoder.begin_compute_pass(&Default::default());
    pending.update(&mut pass, &one.view(), &one.view(), 0, APPEND).map(|_| ()).expect("room");
    drop(pass);
    assert!(matches!(pending.save(ALL), Err(Error::NotSubmitted { .. })));
    gpu.queue().submit([encoder.finish()]);
    assert!(pollster::block_on(pending.save_async(ALL)).is_ok());
    pending.reset();
    // A file without a layer restores nothing.
    let nothing = pending.save(ALL).expect("nothing was lost");
    gpu.submit_pass("nothing", |pass| pending.restore(pass, &nothing)).expect("nothing to do");
    assert!(pending.view(0).unwrap().is_none());
}

fn refuse_one_layer(gpu: &Gpu, mut cache: DynamicKVCache, bytes: &[u8]) -> Error {
    let error = gpu.submit_pass("bad", |pass| cache.restore(pass, bytes)).expect_err("refused");
    assert!(cache.view(0).unwrap().is_none(), "{error}");
    error
}

/// K and V of a step in all layers of a cache of sequences, which has `LAYERS` of them.
fn step(
    gpu: &Gpu,
    cache: &mut SequenceCache,
    id: SequenceId,
    tokens: usize,
    seed: u64,
) -> Vec<u32> {
    let [key, value] = [0, 1].map(|side| {
        upload(gpu, DType::F32, &Block::numbers([1, tokens, 2, 32], DType::F32, seed + side))
    });
    gpu.submit_pass("step", |pass| {
        let step = cache.plan_step(pass, &[(id, tokens)])?;
        for layer in 0..cache.num_layers() {
            let [key, value] = [&key, &value].map(|tensor| {
                TensorView::packed(tensor.buffer(), DType::F32, [tokens, 2, 32]).expect("a shape")
            });
            cache.update(pass, &step, layer, &key, &value)?;
        }
        Ok::<_, Error>(step.positions().to_vec())
    })
    .expect("room")
}

/// The same tokens in every layer, and the same counts of them.
fn same_sequence(a: (&SequenceCache, SequenceId), b: (&SequenceCache, SequenceId), context: &str) {
    let [one, other] = [a, b];
    assert_eq!(one.0.len(one.1), other.0.len(other.1), "{context}");
    assert_eq!(one.0.next_position(one.1), other.0.next_position(other.1), "{context}");
    for layer in 0..one.0.num_layers() {
        let held = [one, other].map(|(cache, id)| cache.get_stored(id, layer).unwrap());
        let [Some((ka, va)), Some((kb, vb))] = held else { panic!("{context}, layer {layer}") };
        assert!(same(&ka, &kb) && same(&va, &vb), "{context}, layer {layer}");
    }
}

const SHAPE: LayerShape = LayerShape { dtype: DType::F32, heads: 2, key_dim: 32, value_dim: 32 };

/// Sequences in layers with windows: saved and restored with what their windows keep, after steps of any length,
/// roll-backs and crops; they go on, and are rolled back, as they would have been. A layer that has let go of nothing
/// is restored with what its window needs.
#[test]
fn sequences_are_restored_into_layers_with_windows() {
    let gpu = gpu();
    let windows = [Some(6), None, Some(6), Some(1), Some(20)];
    for (formats, sizes) in [(Formats::default(), [4, 16]), (Format::Q8_0.into(), [1, 4])] {
        let make = |windows, page| {
            let options = CacheOptions::default().with_formats(formats).with_windows(windows);
            SequenceCache::with_options(&gpu, &[SHAPE; 5], options.with_page_tokens(page))
                .expect("options")
        };
        let mut whole = make(&[], 4);
        let other_whole = whole.add().unwrap();
        step(&gpu, &mut whole, other_whole, 3, 99);
        for (history, (steps, dropped, most)) in [
            (&[9, 1, 4, 1][..], 0, 99),
            (&[30, 2, 7], 3, 99),
            (&[30, 9], 0, 35),
            (&[12, 8], 0, 10),
            (&[25, 3], 1, 2),
            (&[3], 0, 99),
        ]
        .into_iter()
        .enumerate()
        {
            let context = format!("{formats:?}, history {history}");
            let mut cache = make(&windows, sizes[0]);
            let ids = [cache.add().unwrap(), whole.add().unwrap()];
            for (at, &tokens) in steps.iter().enumerate() {
                step(&gpu, &mut cache, ids[0], tokens, at as u64);
                step(&gpu, &mut whole, ids[1], tokens, at as u64);
            }
            for (cache, id) in [&mut cache, &mut whole].into_iter().zip(ids) {
                cache.drop_latest(id, dropped).unwrap();
                cache.crop(id, most).unwrap();
            }
            let bytes = cache.save(ids[0]).expect("it was submitted");
            let mut other = make(&windows, sizes[1]);
            let first = other.add().unwrap();
            step(&gpu, &mut other, first, 5, 50);
            let id =
                gpu.submit_pass("restore", |pass| other.restore(pass, &bytes)).expect("it fits");
            if history < 3 {
                same_sequence((&cache, ids[0]), (&other, id), &context);
            }
            // From one that keeps all, layers keep what their windows need.
            let bytes = whole.save(ids[1]).expect("it was submitted");
            let own =
                gpu.submit_pass("restore", |pass| other.restore(pass, &bytes)).expect("it fits");
            assert_eq!(other.len(own), whole.len(ids[1]), "{context}");
            let len = whole.len(ids[1]).unwrap();
            for (layer, window) in windows.into_iter().enumerate() {
                let (key, _) = other.get(own, layer).unwrap().expect("tokens");
                let most = window.map_or(len, |window: usize| len.min((window - 1).max(1)));
                assert_eq!(key.shape()[2], most, "{context}, layer {layer}");
            }
            // All go on as the first one does.
            let positions = step(&gpu, &mut cache, ids[0], 2, 70);
            for id in [id, own] {
                assert_eq!(step(&gpu, &mut other, id, 2, 70), positions, "{context}");
                same_sequence((&cache, ids[0]), (&other, id), &context);
                other.drop_latest(id, 2).expect("the latest step goes back whole");
                assert_eq!(other.len(id), Ok(len), "{context}");
            }
            assert_eq!(other.len(first), Ok(5));
            for id in [id, own, first] {
                other.remove(id).unwrap();
            }
            assert_eq!((other.stats().pages_used, other.stats().pages_shared), (0, 0), "{context}");
            // A row of a cache of rows with the same windows, and back.
            let options = CacheOptions::default().with_formats(formats).with_windows(&windows);
            let mut rows = DynamicKVCache::with_options(&gpu, options).expect("options");
            let bytes = cache.save(ids[0]).expect("it was submitted");
            gpu.submit_pass("rows", |pass| rows.restore(pass, &bytes)).expect("one row");
            let bytes = rows.save(ALL).expect("it was submitted");
            let id = gpu.submit_pass("back", |pass| other.restore(pass, &bytes)).expect("it fits");
            same_sequence((&cache, ids[0]), (&other, id), &context);
        }
    }
}

/// Tokens that a save does not hold any more are missed by layers that would look back on them.
#[test]
fn layers_that_need_more_than_was_saved_are_refused() {
    let gpu = gpu();
    let make = |windows, pages: Option<usize>| {
        let options = CacheOptions::default().with_windows(windows).with_page_tokens(4);
        SequenceCache::with_options(&gpu, &[SHAPE; 2], options.with_max_pages(pages))
            .expect("options")
    };
    let mut cache = make(&[Some(6), None], None);
    let id = cache.add().unwrap();
    for (at, tokens) in [20, 3].into_iter().enumerate() {
        step(&gpu, &mut cache, id, tokens, at as u64);
    }
    // Layer 0 holds 5 + 3 tokens, layer 1 all 23.
    let bytes = cache.save(id).expect("it was submitted");
    for (windows, pages, words) in [
        (&[][..], None, "layer 0 holds the latest 8 of 23 tokens"),
        (
            &[Some(10), None],
            None,
            "layer 0 holds the latest 8 of 23 tokens, and a window of 10 needs 9",
        ),
        (&[Some(9), None], Some(5), "pages"),
        (&[Some(6)], None, ""),
        (&[Some(9), Some(9)], None, ""),
    ] {
        let mut other = make(windows, pages);
        let own = other.add().unwrap();
        step(&gpu, &mut other, own, 2, 9);
        let before = (other.stats(), other.sequences().unwrap());
        let answer = gpu.submit_pass("restore", |pass| other.restore(pass, &bytes));
        if words.is_empty() {
            assert_eq!(other.len(answer.expect("it holds enough")), Ok(23));
            continue;
        }
        let error = answer.expect_err("tokens are missing, or pages").to_string();
        assert!(error.contains(words), "'{words}' is not in '{error}'");
        assert_eq!((other.stats(), other.sequences().unwrap()), before, "{error}");
        step(&gpu, &mut other, own, 2, 10);
    }
    // What all layers miss alike was never there for a cache that keeps all, as after a crop.
    let mut windowed = make(&[Some(6), Some(6)], None);
    let id = windowed.add().unwrap();
    for (at, tokens) in [20, 3].into_iter().enumerate() {
        step(&gpu, &mut windowed, id, tokens, at as u64);
    }
    let bytes = windowed.save(id).expect("it was submitted");
    let mut all = make(&[], None);
    let id = gpu.submit_pass("restore", |pass| all.restore(pass, &bytes)).expect("it fits");
    assert_eq!((all.len(id), all.next_position(id)), (Ok(8), Ok(23)));
}
