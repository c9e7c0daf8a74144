//! What an error must say: what was asked, what the limit is, and a remedy that helps. And what it must not.

use wgpu_kvcache::wgpu::BufferUsages;
use wgpu_kvcache::{
    BatchChange, Cache, CacheOptions, CachePosition, DType, DynamicKVCache, Error, Gpu, KVCache,
    LayerShape, PagedKVCache, SequenceCache, StaticKVCache, TensorView,
};

use crate::gpu;
use crate::rig::{buffer, plain_gpu, upload};
use crate::wait::ReadLayer;

const APPEND: CachePosition<'_> = CachePosition::Append;

fn says(error: &Error, words: &[&str], never: &[&str]) {
    let text = error.to_string();
    for word in words {
        assert!(text.contains(word), "'{word}' is not in '{text}'");
    }
    for word in never {
        assert!(!text.contains(word), "'{word}' is in '{text}'");
    }
}

/// One update of equal tokens of zeros.
fn update(
    gpu: &Gpu,
    cache: &mut dyn KVCache,
    (dtype, shape): (DType, [usize; 4]),
    position: CachePosition<'_>,
) -> Result<(), Error> {
    let source = buffer(gpu, 4096, BufferUsages::STORAGE);
    let view = TensorView::new(&source, dtype, &shape)?.with_strides([0, 0, 0, 1]);
    gpu.submit_pass("update", |pass| cache.update(pass, &view, &view, 0, position).map(|_| ()))
}

fn small_gpu() -> Gpu {
    plain_gpu(|limits| {
        limits.max_storage_buffer_binding_size = 1 << 20;
        limits.max_buffer_size = 1 << 20;
    })
}

/// A call is one call, however many dispatches and layers it has.
#[test]
fn calls_are_counted_not_dispatches() {
    let gpu = gpu();
    let fill = |cache: &mut dyn KVCache, tokens| {
        for layer in 0..3 {
            let new =
                upload(&gpu, DType::F32, &crate::model::Block::noise([2, 1, tokens, 4], 4, 1));
            gpu.submit_pass("fill", |pass| {
                cache.update(pass, &new.view(), &new.view(), layer, APPEND).map(|_| ())
            })
            .expect("room");
        }
    };
    for is_paged in [false, true] {
        for way in 0..3 {
            let options = CacheOptions::default().with_page_tokens(4);
            let mut cache: Box<dyn KVCache> = match is_paged {
                false => Box::new(DynamicKVCache::new(&gpu)),
                true => Box::new(PagedKVCache::with_options(&gpu, options).expect("four")),
            };
            fill(cache.as_mut(), 63);
            let mut encoder = gpu.device().create_command_encoder(&Default::default());
            let mut pass = encoder.begin_compute_pass(&Default::default());
            let source = buffer(&gpu, 4096, BufferUsages::STORAGE);
            let tokens = |rows, count| {
                let view = TensorView::new(&source, DType::F32, &[rows, 1, count, 4]);
                view.expect("four extents").with_strides([0, 0, 0, 1])
            };
            let dispatches = cache.stats().dispatches;
            match way {
                // The layer grows, and its live tokens are copied.
                0 => {
                    let new = tokens(2, 70);
                    cache.update(&mut pass, &new, &new, 0, APPEND).map(|_| ()).expect("room");
                }
                // All layers grow.
                1 => cache.reserve(&mut pass, 70).expect("room"),
                // Rows are copied, or share a page that the update copies.
                _ => {
                    cache.batch_repeat_interleave(&mut pass, 2).expect("room");
                    let new = tokens(4, 1);
                    cache.update(&mut pass, &new, &new, 0, APPEND).map(|_| ()).expect("room");
                }
            }
            let calls = if way == 2 { 2 } else { 1 };
            assert!(cache.stats().dispatches - dispatches >= 2, "way {way}");
            assert_eq!(cache.read(0), Err(Error::NotSubmitted { calls }), "way {way}");
            drop(pass);
            drop(encoder);
            assert_eq!(cache.read(0), Err(Error::PassDropped { calls }), "way {way}");
        }
    }
}

/// 640 tokens of two rows that share them: the tokens have room, copies of what is written into have none.
#[test]
#[cfg_attr(
    target_arch = "wasm32",
    ignore = "browsers make no device of lower limits than the defaults"
)]
fn what_has_no_room_are_copies_of_shared_pages() {
    let gpu = small_gpu();
    let mut cache = PagedKVCache::new(&gpu);
    // A page of 16 tokens of 64 elements is 4 KiB: 256 fit.
    update(&gpu, &mut cache, (DType::F32, [1, 1, 2560, 64]), APPEND).expect("160 pages");
    gpu.submit_pass("share", |pass| cache.batch_repeat_interleave(pass, 2)).expect("no byte");
    let before = cache.stats();
    let list: Vec<u32> = (0..2560).collect();
    let error =
        update(&gpu, &mut cache, (DType::F32, [2, 1, 2560, 64]), CachePosition::PerToken(&list))
            .expect_err("160 copies beside 160 pages");
    let due = Error::PoolTooLarge {
        layer: 0,
        used: 160,
        new: 0,
        copies: 160,
        fits: 256,
        limit: 1 << 20,
        page_tokens: 16,
    };
    assert_eq!(error, due);
    says(
        &error,
        &["160 copies", "0 new pages", "160 in use", "256 pages", "1048576 bytes", "append"],
        &["tokens would fit"],
    );
    assert_eq!(cache.stats(), before);
    assert_eq!(cache.get_seq_length(0), Ok(2560));
}

#[test]
#[cfg_attr(
    target_arch = "wasm32",
    ignore = "browsers make no device of lower limits than the defaults"
)]
fn a_gap_is_not_blamed_on_rows() {
    let gpu = small_gpu();
    for mut cache in
        [Box::new(DynamicKVCache::new(&gpu)) as Box<dyn KVCache>, Box::new(PagedKVCache::new(&gpu))]
    {
        // 262,144 tokens of one element fill a binding: a gap of 200,000 fits, as a list it would not.
        let far = CachePosition::PerToken(&[3, 200_000]);
        update(&gpu, cache.as_mut(), (DType::F32, [1, 1, 2, 1]), far).expect("room");
        let far = CachePosition::PerToken(&[3, 300_000]);
        let error = update(&gpu, cache.as_mut(), (DType::F32, [1, 1, 2, 1]), far).expect_err("far");
        assert!(matches!(error, Error::LayerTooLarge { tokens: 300_001, .. }), "{error:?}");
        // A list that is too long is the caller's own.
        let odd: Vec<u32> = (0..200_000).rev().collect();
        let list = CachePosition::PerToken(&odd);
        let error = update(&gpu, cache.as_mut(), (DType::F32, [1, 1, odd.len(), 1]), list)
            .expect_err("long");
        assert!(matches!(error, Error::ListTooLarge { limit: 1_048_576, .. }), "{error:?}");
        says(&error, &["positions", "1600008 bytes", "1048576", "fewer positions"], &["rows, or"]);
        // As long, but the same position again and again.
        let same = vec![3; 200_000];
        let list = CachePosition::PerToken(&same);
        update(&gpu, cache.as_mut(), (DType::F32, [1, 1, same.len(), 1]), list).expect("one");
    }
    let mut cache = PagedKVCache::new(&gpu);
    update(&gpu, &mut cache, (DType::F32, [1, 1, 40, 1]), APPEND).expect("room");
    let error = cache.prepare_batch(BatchChange::Repeat(100_000)).expect_err("three pages a row");
    says(
        &error,
        &["table", "1200000 bytes", "1048576", "fewer rows", "larger pages"],
        &["list of"],
    );
}

#[test]
#[cfg(target_pointer_width = "64")]
fn a_page_size_that_is_a_power_of_two_and_too_large() {
    for page_tokens in [1 << 32, 1 << 40] {
        let options = CacheOptions::default().with_page_tokens(page_tokens);
        let error = PagedKVCache::with_options(&gpu(), options).expect_err("too large");
        says(&error, &[&page_tokens.to_string(), "power of two", "at most 2147483648"], &[]);
    }
    let options = CacheOptions::default().with_page_tokens(1 << 31);
    PagedKVCache::with_options(&gpu(), options).expect("the largest");
}

#[test]
fn a_slice_of_another_type() {
    let gpu = gpu();
    let mut cache = DynamicKVCache::new(&gpu);
    update(&gpu, &mut cache, (DType::F16, [1, 1, 3, 2]), APPEND).expect("room");
    let (key, _) = cache.read(0).expect("submitted").expect("written");
    let error = key.as_slice::<f32>().expect_err("f16");
    assert_eq!(error, Error::SliceType { held: DType::F16, asked: DType::F32 });
    says(&error, &["holds f16", "slice of f32", "to_f32()"], &["convert it first"]);
    assert_eq!(key.to_f32().len(), 6);
}

#[test]
fn a_cache_that_is_made_for_nothing() {
    let gpu = gpu();
    let mut cache = StaticKVCache::with_options(
        &gpu,
        CacheOptions::default().with_max_cache_len(4).with_num_layers(0),
    )
    .expect("both options");
    let error = update(&gpu, &mut cache, (DType::F32, [1, 1, 1, 1]), APPEND).expect_err("none");
    says(&error, &["layer 0", "0 layers (none)", "make it for more"], &["0 to 0"]);
    let mut cache = StaticKVCache::with_options(
        &gpu,
        CacheOptions::default().with_max_cache_len(0).with_num_layers(1),
    )
    .expect("both options");
    let at = CachePosition::At(0);
    let error = update(&gpu, &mut cache, (DType::F32, [1, 1, 1, 1]), at).expect_err("none");
    says(&error, &["position 0", "0 tokens (none)"], &["0 to 0"]);
    let mut cache = StaticKVCache::with_options(
        &gpu,
        CacheOptions::default().with_max_cache_len(1).with_num_layers(1),
    )
    .expect("both options");
    let at = CachePosition::At(1);
    let error = update(&gpu, &mut cache, (DType::F32, [1, 1, 1, 1]), at).expect_err("one");
    says(&error, &["position 1", "1 tokens (0 alone)"], &["0 to 0"]);
    update(&gpu, &mut cache, (DType::F32, [1, 1, 1, 1]), APPEND).expect("room");
    let error = cache.prepare_batch(BatchChange::Select(&[1])).expect_err("one row");
    says(&error, &["index 1", "rows 0 alone"], &["0 to 0"]);
}

#[test]
#[cfg_attr(
    target_arch = "wasm32",
    ignore = "browsers make no device of lower limits than the defaults"
)]
fn a_layer_of_a_16_bit_type_is_not_told_to_use_one() {
    let gpu = small_gpu();
    for (dtype, is_told) in [(DType::F32, true), (DType::F16, false), (DType::BF16, false)] {
        let mut cache = DynamicKVCache::new(&gpu);
        let error = update(&gpu, &mut cache, (dtype, [1, 1, 100_000, 64]), APPEND);
        let error = error.expect_err("more than a binding");
        says(
            &error,
            &[
                "100000 tokens",
                dtype.name(),
                "Use fewer tokens (of the sequence, or as the capacity",
            ],
            &[],
        );
        assert_eq!(error.to_string().contains("store 16 or fewer bits"), is_told, "{error}");
    }
}

#[test]
#[cfg(target_pointer_width = "64")]
fn what_cannot_be_counted_is_named_with_its_limit() {
    let gpu = gpu();
    let error = gpu.upload(&[0.0_f32; 4], &[usize::MAX, 2, 2, 2]).expect_err("too many");
    says(&error, &["18446744073709551615, 2, 2, 2", &usize::MAX.to_string(), "fewer tokens"], &[]);
    let mut cache = DynamicKVCache::new(&gpu);
    let far = CachePosition::At(u32::MAX);
    let error = update(&gpu, &mut cache, (DType::F32, [1, 1, 1, 1]), far).expect_err("far");
    says(&error, &["length of a row", "4294967296 tokens", "2147483647"], &[]);
    update(&gpu, &mut cache, (DType::F32, [2, 1, 1, 1]), APPEND).expect("room");
    let error = cache.prepare_batch(BatchChange::Repeat(1 << 40)).expect_err("many");
    says(&error, &["batch", "1099511627776 times 2 rows", "4294967295"], &[]);
    let source = buffer(&gpu, 64, BufferUsages::STORAGE);
    let view = TensorView::new(&source, DType::F32, &[2, 1, 1, 1]).expect("four extents");
    let view = view.with_strides([usize::MAX, 1, 1, 1]);
    let answer =
        gpu.submit_pass("refused", |pass| cache.update(pass, &view, &view, 0, APPEND).map(|_| ()));
    let error = answer.expect_err("it ends past any buffer");
    says(&error, &["[2, 1, 1, 1]", "strides", "18446744073709551615"], &[]);
}

/// What a cache of sequences says.
#[test]
fn sequences_are_named_with_what_was_asked_and_what_there_is() {
    let gpu = gpu();
    let layer = LayerShape { dtype: DType::F32, heads: 1, key_dim: 4, value_dim: 4 };
    let options = CacheOptions::default().with_page_tokens(4).with_max_pages(3);
    let mut cache = SequenceCache::with_options(&gpu, &[layer; 2], options).expect("options");
    let [a, b] = [(); 2].map(|()| cache.add().expect("nothing was lost"));
    let name = a.to_string();
    let planned = |cache: &mut SequenceCache, counts: &[_]| {
        gpu.submit_pass("step", |pass| cache.plan_step(pass, counts)).map(|_| ())
    };
    planned(&mut cache, &[(a, 9)]).expect("room");
    let unfinished = planned(&mut cache, &[(a, 1)]).expect_err("no layer was updated");
    says(&unfinished, &["layer 0", "cancel_step()"], &[]);
    cache.cancel_step().expect("nothing was lost");
    let full = planned(&mut cache, &[(a, 9), (b, 1)]).expect_err("three pages");
    says(&full, &["4 more pages of 4 tokens", "0 in use", "made for 3"], &["truncate()"]);
    planned(&mut cache, &[(a, 9)]).expect("room");
    cache.cancel_step().expect("nothing was lost");
    let past = cache.fork(a, 1).expect_err("no token");
    says(&past, &["token 1", &name, "0 live tokens"], &[]);
    let twice = planned(&mut cache, &[(a, 1), (a, 1)]).expect_err("twice");
    says(&twice, &[&name, "twice", "once"], &[]);
    let none = planned(&mut cache, &[(a, 0)]).expect_err("no token");
    says(&none, &[&name, "leave it out"], &[]);
    cache.remove(a).expect("it is there");
    says(&cache.len(a).expect_err("it is gone"), &[&name, "removed"], &[]);
}
