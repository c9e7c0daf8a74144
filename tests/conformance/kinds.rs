//! What each kind of cache promises of its tokens: growth, windows, roll-back, reset, gaps, bounds.

use wgpu_kvcache::wgpu::Buffer;
use wgpu_kvcache::{
    Cache, CacheOptions, CachePosition, DType, DynamicKVCache, Error, KVCache, PagedKVCache,
    StaticKVCache,
};

use crate::gpu;
use crate::model::Model;
use crate::rig::{Rig, but_pages, compare, read_back};
use crate::wait::{ReadLayer, wait};

const APPEND: CachePosition<'_> = CachePosition::Append;

/// A layer's buffers, to see whether they are still the same ones.
fn buffers(cache: &dyn KVCache, layer: usize) -> [Buffer; 2] {
    let view = cache.view(layer).expect("the layer exists").expect("the layer was written");
    [view.key().clone(), view.value().clone()]
}

fn is_wrapped(rig: &Rig, layer: usize) -> bool {
    !rig.cache.view(layer).expect("it exists").expect("it was written").is_contiguous()
}

/// A cache of each kind with room for `bound` tokens.
fn all(bound: usize) -> [(&'static str, Rig); 5] {
    let gpu = gpu();
    [
        ("dynamic", Rig::dynamic(&gpu)),
        ("static", Rig::fixed(&gpu, bound, 4)),
        ("pages of 1", Rig::paged(&gpu, 1)),
        ("pages of 4", Rig::paged_fixed(&gpu, 4, bound, 4)),
        ("pages of 16", Rig::paged(&gpu, 16)),
    ]
}

#[test]
fn a_dynamic_cache_grows_token_by_token() {
    let mut rig = Rig::dynamic(&gpu());
    let mut allocations = 0;
    let mut before = None;
    for step in 0..600 {
        rig.update(0, [2, 2, 1, 4], 6, APPEND);
        rig.update_as(DType::F16, 1, [2, 1, 1, 2], 2, APPEND);
        let now = Some(buffers(rig.cache.as_ref(), 0));
        allocations += u32::from(now != before);
        before = now;
        if step % 60 == 0 {
            rig.check(&format!("step {step}"));
        }
    }
    rig.check("the end");
    // Doubling from 1 would be 11 sizes.
    assert!(allocations <= 11, "{allocations} allocations for 600 tokens");
}

/// Also where the last token just did not fit: then most has been copied for the least that lies there.
#[test]
fn growth_copies_at_most_twice_what_lies_there_in_the_end() {
    let gpu = gpu();
    let one = gpu.upload(&[0.5_f32, 1.5], &[1, 1, 1, 2]).expect("a token");
    let mut cache = DynamicKVCache::new(&gpu);
    let token = 2 * 8;
    for tokens in 1..=8193_u64 {
        gpu.submit_pass("grow", |pass| {
            cache.update(pass, &one.view(), &one.view(), 0, APPEND).map(|_| ())
        })
        .expect("a token more");
        let stats = cache.stats();
        let grown = stats.bytes_moved - tokens * token;
        assert!(grown <= 2 * tokens * token, "{grown} bytes copied by growth to {tokens} tokens");
    }
}

#[test]
fn a_capacity_given_in_advance_is_never_outgrown() {
    let gpu = gpu();
    let cache = Box::new(
        DynamicKVCache::with_options(&gpu, CacheOptions::default().with_capacity(100))
            .expect("a capacity"),
    );
    let mut rig = Rig::new(&gpu, cache, Model::dynamic());
    assert_eq!(rig.cache.stats().bytes_allocated, 0);
    rig.update(0, [2, 2, 1, 4], 6, APPEND);
    let (first, stats) = (buffers(rig.cache.as_ref(), 0), rig.cache.stats());
    assert!(rig.cache.view(0).unwrap().unwrap().capacity() >= 100);
    for step in 1..100 {
        rig.update(0, [2, 2, 1, 4], 6, APPEND);
        assert_eq!(buffers(rig.cache.as_ref(), 0), first, "step {step}");
    }
    assert_eq!(rig.cache.stats().bytes_allocated, stats.bytes_allocated);
    assert_eq!(rig.since(stats).0, 99, "one dispatch a token, and no growth");
    rig.check("full");
    rig.update(0, [2, 2, 70, 4], 6, APPEND);
    rig.check("past the capacity");
}

/// A window goes round in its memory: over the end of a ring, and through pages that were given back.
#[test]
fn a_sliding_window_goes_round_and_keeps_its_buffers() {
    for (kind, mut rig) in all(19) {
        let (mut written, mut wrapped) = (0, 0);
        let mut settled = None;
        for step in 0..120 {
            let context = format!("{kind}, step {step}");
            rig.update(0, [2, 3, 1 + step % 3, 2], 4, APPEND);
            rig.update_as(DType::BF16, 1, [2, 1, 1 + step % 3, 2], 18, APPEND);
            rig.crop(16);
            written += 1 + step % 3;
            // Nothing moves, so the oldest token lies where it was written: that far on in the ring, or in
            // the row's first page.
            let view = rig.cache.view(0).expect("it exists").expect("it was written");
            let start = (written - view.len()) % view.capacity();
            assert_eq!(view.start(), start, "{context}");
            wrapped += usize::from(view.start() + view.len() > view.capacity());
            rig.check(&context);
            if step == 40 {
                settled = Some(buffers(rig.cache.as_ref(), 0));
            } else if step > 40 {
                assert_eq!(settled, Some(buffers(rig.cache.as_ref(), 0)), "{context}");
            }
        }
        let view = rig.cache.view(0).expect("it exists").expect("it was written");
        if view.page_table().is_some() {
            let stats = rig.cache.stats();
            // Of both rows, at whatever step: the window, the new tokens, and what their pages round up to.
            let most = 2 * (19 + 2 * (view.capacity() as u64 - 1));
            let peak = stats.peak_pages_used * view.capacity() as u64;
            assert!(peak <= most, "{kind}: {peak} slots in use for two rows of 19 tokens");
            let slots = (stats.pages_used + stats.pages_free) * view.capacity() as u64;
            assert!(slots < 2 * written as u64, "{kind}: {slots} slots, so none was used twice");
        } else {
            assert!(wrapped > 0, "{kind}: the live tokens never wrapped");
        }
    }
}

#[test]
fn growth_straightens_a_wrapped_layer() {
    let mut rig = Rig::dynamic(&gpu());
    for crop in [1, 2, 5, 11, 20] {
        rig.reset();
        rig.update(0, [2, 2, 30, 4], 6, APPEND);
        let capacity = rig.cache.view(0).unwrap().unwrap().capacity();
        rig.update(0, [2, 2, capacity - 30 + 1, 4], 6, APPEND);
        let capacity = rig.cache.view(0).unwrap().unwrap().capacity();
        let live = rig.model.len(0);
        rig.crop(crop.min(live));
        rig.update(0, [2, 2, capacity - crop, 4], 6, APPEND);
        assert!(is_wrapped(&rig, 0), "full after a crop of {crop}");
        rig.check("wrapped");
        rig.update(0, [2, 2, 3, 4], 6, APPEND);
        rig.check("grown");
    }
}

#[test]
fn cut_and_written_again() {
    for (kind, mut rig) in all(24) {
        for (step, (keep_first, length)) in
            [(true, 5), (false, 4), (true, 3), (false, 0), (true, 0), (false, usize::MAX)]
                .into_iter()
                .enumerate()
        {
            let context = format!("{kind}, step {step}");
            let room = 20 - rig.model.len(0);
            rig.update(0, [2, 2, room, 4], 2, APPEND);
            rig.update(2, [2, 1, 1, 3], 1, APPEND);
            let stats = rig.cache.stats();
            if keep_first {
                rig.truncate(length);
            } else {
                rig.crop(length);
            }
            assert_eq!(rig.since(stats), (0, 0), "{context}: nothing moves");
            rig.check(&context);
        }
        rig.truncate(usize::MAX);
        rig.check(kind);
        rig.truncate(7);
        rig.crop(3);
        rig.update(0, [2, 2, 2, 4], 2, CachePosition::PerToken(&[1, 3]));
        rig.check(kind);
    }
}

#[test]
fn a_reset_cache_is_new_but_for_its_memory() {
    for (kind, mut rig) in all(40) {
        for layer in 0..3 {
            rig.update(layer, [2, 2, 33, 4], 6, APPEND);
        }
        let stats = rig.cache.stats();
        rig.reset();
        for layer in 0..4 {
            assert_eq!(rig.cache.get_seq_length(layer), Ok(0));
            assert_eq!(rig.cache.read(layer), Ok(None));
            assert!(rig.cache.view(layer).unwrap().is_none());
        }
        rig.select_nothing(kind);
        assert_eq!(rig.cache.stats(), but_pages(stats), "{kind}: memory kept, nothing done");
        for layer in 0..3 {
            rig.update(layer, [2, 2, 33, 4], 6, APPEND);
            rig.check(kind);
        }
        let again = rig.cache.stats();
        assert_eq!(again.bytes_allocated, stats.bytes_allocated, "{kind}: reused");
        assert_eq!(again.peak_bytes_allocated, stats.peak_bytes_allocated, "{kind}: reused");
        // Other shapes and types: smaller in all, smaller in part, larger.
        for (dtype, shape, value_dim) in [
            (DType::F16, [1, 1, 3, 2], 4),
            (DType::F32, [5, 1, 9, 3], 1),
            (DType::BF16, [3, 4, 40, 8], 16),
            (DType::F32, [2, 2, 33, 4], 6),
        ] {
            rig.reset();
            rig.update_as(dtype, 1, shape, value_dim, APPEND);
            rig.check(&format!("{kind}, {dtype}, {shape:?}"));
            rig.repeat_interleave(2);
            rig.check(&format!("{kind}, {dtype}, {shape:?}, doubled"));
        }
    }
}

/// Memory that held tokens before must read as zero where a later write leaves a gap.
#[test]
fn gaps_read_as_zero_over_older_tokens() {
    type Cut = (&'static str, fn(&mut Rig));
    let cuts: [Cut; 7] = [
        ("nothing", |_| ()),
        ("truncate 3", |rig| rig.truncate(3)),
        ("truncate 0", |rig| rig.truncate(0)),
        ("crop 2", |rig| rig.crop(2)),
        ("crop 0", |rig| rig.crop(0)),
        ("crop 5, truncate 1", |rig| {
            rig.crop(5);
            rig.truncate(1);
        }),
        ("reset", Rig::reset),
    ];
    let turned = [vec![9, 4, 9, 12], vec![0, 1, 2, 3], vec![15, 2, 15, 2]];
    let near = [vec![5, 5, 5, 5], vec![7, 6, 5, 4], vec![6, 0, 6, 1]];
    let same = vec![vec![14, 13, 12, 11]; 3];
    let positions = [
        CachePosition::PerToken(&[8, 9, 10, 11]),
        CachePosition::PerToken(&[12, 8, 15, 5]),
        CachePosition::PerToken(&[10, 10, 10, 2]),
        CachePosition::PerRow(&turned),
        CachePosition::PerRow(&near),
        CachePosition::PerRow(&same),
    ];
    for dtype in [DType::F32, DType::F16] {
        for (cut, make) in cuts {
            for position in positions {
                for (kind, mut rig) in all(16) {
                    let context = format!("{kind}, {dtype}, {cut}, then {position:?}");
                    rig.update_as(dtype, 0, [3, 2, 13, 4], 10, APPEND);
                    rig.crop(12);
                    rig.update_as(dtype, 0, [3, 2, 4, 4], 10, APPEND);
                    make(&mut rig);
                    rig.update_as(dtype, 0, [3, 2, 4, 4], 10, position);
                    rig.check(&context);
                    let far = CachePosition::At(15);
                    rig.update_as(dtype, 0, [3, 2, 1, 4], 10, far);
                    rig.check(&format!("{context}, then {far:?}"));
                }
            }
        }
    }
}

#[test]
fn far_positions_grow_a_dynamic_cache() {
    let rows = [vec![700, 3], vec![2, 900]];
    for position in [
        CachePosition::PerToken(&[500, 501]),
        CachePosition::PerToken(&[1200, 7]),
        CachePosition::PerRow(&rows),
    ] {
        for (prepared, is_paged) in [(false, false), (true, false), (false, true), (true, true)] {
            let mut rig = if is_paged { Rig::paged(&gpu(), 4) } else { Rig::dynamic(&gpu()) };
            if prepared {
                rig.update(3, [2, 2, 5, 4], 6, APPEND);
                rig.crop(4);
            }
            rig.update(3, [2, 2, 2, 4], 6, position);
            rig.check(&format!("{position:?}, prepared: {prepared}"));
            rig.update(3, [2, 2, 2, 4], 6, APPEND);
            rig.check(&format!("{position:?}, prepared: {prepared}, then an append"));
        }
    }
    // Layers are independent, in any order, and those between stay unwritten.
    let mut rig = Rig::dynamic(&gpu());
    rig.update(9, [1, 1, 2, 2], 2, APPEND);
    rig.update(4, [1, 3, 1, 6], 2, CachePosition::At(2));
    rig.update(usize::MAX, [1, 1, 3, 2], 4, APPEND);
    rig.check("layers 9 and 4, and the last one");
    assert_eq!((rig.cache.get_seq_length(7), rig.cache.read(7)), (Ok(0), Ok(None)));
    assert_eq!(rig.cache.read(1000), Ok(None));
    assert_eq!(rig.cache.get_max_cache_shape(), None);
}

#[test]
fn a_static_cache_is_filled_to_its_bound_and_wraps() {
    let mut rig = Rig::fixed(&gpu(), 10, 2);
    assert_eq!(rig.cache.get_max_cache_shape(), Some(10));
    rig.update(1, [2, 2, 4, 4], 6, APPEND);
    let first = buffers(rig.cache.as_ref(), 1);
    rig.update(1, [2, 2, 1, 4], 6, CachePosition::At(9));
    rig.check("full, with a gap");
    let mut wrapped = 0;
    for keep in [9, 7, 3, 8, 1, 0, 6, 5] {
        rig.crop(keep);
        rig.update(1, [2, 2, 10 - keep, 4], 6, APPEND);
        rig.check(&format!("full again after a crop to {keep}"));
        wrapped += usize::from(is_wrapped(&rig, 1));
        let over: Vec<u32> = (3..8).rev().collect();
        rig.update(1, [2, 2, 5, 4], 6, CachePosition::PerToken(&over));
        rig.check(&format!("written over after a crop to {keep}"));
    }
    assert!(wrapped > 3, "the live tokens wrapped {wrapped} times");
    assert_eq!(buffers(rig.cache.as_ref(), 1), first);
    assert_eq!(rig.cache.read(0), Ok(None));
}

#[test]
fn caches_behind_one_trait() -> Result<(), Error> {
    let gpu = gpu();
    let caches: Vec<(Box<dyn KVCache>, Model)> = vec![
        (Box::new(DynamicKVCache::new(&gpu)), Model::dynamic()),
        (
            Box::new(
                StaticKVCache::with_options(
                    &gpu,
                    CacheOptions::default().with_max_cache_len(8).with_num_layers(1),
                )
                .expect("both options"),
            ),
            Model::fixed(8, 1),
        ),
        (Box::new(PagedKVCache::new(&gpu)), Model::dynamic().in_pages(16)),
    ];
    for (cache, model) in caches {
        let mut rig = Rig::new(&gpu, cache, model);
        rig.update(0, [2, 2, 3, 4], 6, APPEND);
        let get = || wait(rig.cache.get_async(0));
        let got = read_back(|| rig.cache.stats(), get, "get_async")?;
        compare(got, rig.model.get(0), "get_async");
        assert_eq!(rig.cache.read(0), wait(rig.cache.get_async(0)));
        let other: &mut dyn Cache = &mut DynamicKVCache::new(&gpu);
        other.reset();
        assert_eq!(other.get_max_cache_shape(), None);
    }
    Ok(())
}
