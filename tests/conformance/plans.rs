//! What a plan foresees is what a cache takes, to the byte; and what does not fit, and the longest that does.

use wgpu_kvcache::{
    CacheKind, CacheLoad, CacheOptions, CachePlan, CachePosition, DType, DynamicKVCache, Error,
    Gpu, KVCache, LayerShape, PagedKVCache, SequenceCache, StaticKVCache, Stats, TensorView,
};

use crate::attention::{DTYPES, Random, upload};
use crate::rig::plain_gpu;
use crate::{cases, gpu, shared_plain_gpu};

const APPEND: CachePosition<'_> = CachePosition::Append;
const KINDS: [CacheKind; 4] =
    [CacheKind::Dynamic, CacheKind::Static, CacheKind::Paged, CacheKind::Sequences];

fn random_layer(random: &mut Random) -> LayerShape {
    LayerShape {
        dtype: DTYPES[random.below(3)],
        heads: 1 + random.below(3),
        key_dim: 2 + 2 * random.below(10),
        value_dim: 2 + 2 * random.below(10),
    }
}

/// The statistics of a cache that takes such a load.
fn run(
    gpu: &Gpu,
    kind: CacheKind,
    layers: &[LayerShape],
    options: CacheOptions<'_>,
    load: CacheLoad,
) -> Result<Stats, Error> {
    let CacheLoad { batch, tokens, chunk } = load;
    let pieces = (0..tokens).step_by(chunk).map(|first| chunk.min(tokens - first));
    if kind == CacheKind::Sequences {
        let mut cache = SequenceCache::with_options(gpu, layers, options)?;
        let ids: Vec<_> = (0..batch).map(|_| cache.add()).collect::<Result<_, _>>()?;
        for count in pieces {
            let counts: Vec<_> = ids.iter().map(|&id| (id, count)).collect();
            gpu.submit_pass("step", |pass| {
                let step = cache.plan_step(pass, &counts)?;
                for (at, layer) in layers.iter().enumerate() {
                    let [key, value] = [layer.key_dim, layer.value_dim].map(|dim| {
                        let shape = [1, batch * count, layer.heads, dim];
                        let zeros = vec![0.0; shape.iter().product()];
                        (upload(gpu, layer.dtype, &zeros, &shape), shape)
                    });
                    let [key, value] = [&key, &value].map(|(tensor, [_, t, h, d])| {
                        TensorView::packed(tensor.buffer(), layer.dtype, [*t, *h, *d])
                            .expect("a shape")
                    });
                    cache.update(pass, &step, at, &key, &value)?;
                }
                Ok::<_, Error>(())
            })?;
        }
        return Ok(cache.stats());
    }
    let mut cache: Box<dyn KVCache> = match kind {
        CacheKind::Dynamic => Box::new(DynamicKVCache::with_options(gpu, options)?),
        CacheKind::Static => {
            let options = options.with_num_layers(layers.len());
            Box::new(StaticKVCache::with_options(gpu, options)?)
        }
        _ => Box::new(PagedKVCache::with_options(gpu, options)?),
    };
    for count in pieces {
        for (at, layer) in layers.iter().enumerate() {
            let [key, value] = [layer.key_dim, layer.value_dim].map(|dim| {
                let shape = [batch, layer.heads, count, dim];
                upload(gpu, layer.dtype, &vec![0.0; shape.iter().product()], &shape)
            });
            gpu.submit_pass("piece", |pass| {
                cache.update(pass, &key.view(), &value.view(), at, APPEND).map(|_| ())
            })?;
        }
    }
    Ok(cache.stats())
}

/// Options of a kind, some of them set; windows only where the kind has them.
fn random_options<'a>(
    kind: CacheKind,
    windows: &'a [Option<usize>],
    load: CacheLoad,
    random: &mut Random,
) -> CacheOptions<'a> {
    let plain = CacheOptions::default();
    let some = |is_given: usize, value: usize| (is_given == 0).then_some(value);
    let given = [(); 3].map(|()| random.below(2));
    let windows = if random.below(3) == 0 { &[] } else { windows };
    match kind {
        CacheKind::Dynamic => {
            plain.with_capacity(some(given[0], random.below(300))).with_windows(windows)
        }
        CacheKind::Static => {
            let length = load.tokens + random.below(50);
            plain.with_max_cache_len(length).with_windows(windows).with_max_chunk(load.chunk)
        }
        _ => {
            let pages = (load.tokens + 17) * load.batch + random.below(9);
            let plain = plain.with_page_tokens([1, 4, 16][random.below(3)]);
            let plain = plain.with_max_cache_len(some(given[1], load.tokens + 3));
            let plain = plain.with_max_pages(some(given[2], pages));
            plain.with_windows(windows)
        }
    }
}

#[test]
fn a_plan_foresees_what_a_cache_takes_to_the_byte() {
    let gpus = [gpu(), shared_plain_gpu()];
    let mut random = Random(71);
    for number in 0..cases(160) {
        let gpu = &gpus[number % 2];
        let kind = KINDS[number % 4];
        let layers: Vec<LayerShape> =
            (0..1 + random.below(4)).map(|_| random_layer(&mut random)).collect();
        let windows: Vec<Option<usize>> = layers
            .iter()
            .map(|_| [None, Some(1 + random.below(90)), Some(1 + random.below(3))][random.below(3)])
            .collect();
        let tokens = 1 + random.below(400);
        let chunk = [1 + random.below(tokens), 1 + random.below(7)][random.below(2)];
        let load = CacheLoad { batch: 1 + random.below(3), tokens, chunk };
        let options = random_options(kind, &windows, load, &mut random);
        let limits = gpu.device().limits();
        let plan = CachePlan::new(kind, &layers, options, load, &limits).expect("it is counted");
        let context = format!("{kind:?}, {layers:?}, {options:?}, {load:?}");
        assert_eq!(plan.fits(), Ok(()), "{context}");
        let stats = run(gpu, kind, &layers, options, load)
            .unwrap_or_else(|error| panic!("{context}: {error}"));
        assert_eq!(plan.bytes_allocated(), stats.bytes_allocated, "{context}");
        assert_eq!(plan.peak_bytes_allocated(), stats.peak_bytes_allocated, "{context}");
        assert_eq!(plan.buffers(), stats.buffers, "{context}");
        assert_eq!(plan.pages_used(), stats.pages_used, "{context}");
        assert!(plan.longest().is_none_or(|longest| longest >= tokens), "{context}");
    }
}

/// Pools of a bounded size: those of layers that keep all are made whole, and those of a window take what it needs.
#[test]
fn a_bound_of_pages_leaves_windows_with_what_they_need() {
    const PAGES: usize = 128;
    let gpu = gpu();
    let layer = LayerShape { dtype: DType::F32, heads: 2, key_dim: 8, value_dim: 8 };
    let page_bytes = 2 * 2 * 16 * 8 * 4;
    let windows = [Some(40), Some(40), Some(40), None];
    let bounded = CacheOptions::default().with_max_pages(PAGES).with_windows(&windows);
    for (batch, tokens, chunk) in [(1, 1, 1), (1, 2000, 60), (3, 500, 20), (2, 900, 900)] {
        let load = CacheLoad { batch, tokens, chunk };
        for kind in [CacheKind::Sequences, CacheKind::Paged] {
            let limits = gpu.device().limits();
            let plan = CachePlan::new(kind, &[layer; 4], bounded, load, &limits).expect("counted");
            let context = format!("{kind:?}, {load:?}");
            assert_eq!(plan.fits(), Ok(()), "{context}");
            let stats = run(&gpu, kind, &[layer; 4], bounded, load).expect("it fits");
            assert_eq!(plan.bytes_allocated(), stats.bytes_allocated, "{context}");
            assert_eq!(plan.peak_bytes_allocated(), stats.peak_bytes_allocated, "{context}");
            let whole = (PAGES * page_bytes) as u64;
            // The window, the longest update, and a page that both end in; doubled.
            let most = 2 * batch * ((39 + chunk).div_ceil(16) + 1) * page_bytes;
            let windowed = stats.bytes_allocated - whole;
            assert!(windowed <= 3 * whole.min(most as u64), "{context}: {windowed} bytes");
        }
    }
}

/// On a device that binds little: the longest length that a plan names is run, and one token more is refused.
#[test]
#[cfg_attr(
    target_arch = "wasm32",
    ignore = "browsers make no device of lower limits than the defaults"
)]
fn the_longest_length_that_fits_fits_and_one_more_does_not() {
    const LIMIT: u64 = 128 << 10;
    let gpu = plain_gpu(|limits| limits.max_storage_buffer_binding_size = LIMIT);
    let layer = LayerShape { dtype: DType::F32, heads: 2, key_dim: 16, value_dim: 8 };
    let limits = gpu.device().limits();
    for kind in KINDS {
        for (batch, chunk) in [(1, 64), (3, 100), (2, 1000)] {
            let plain = CacheOptions::default();
            let of_length = |tokens: usize| match kind {
                CacheKind::Static => plain.with_max_cache_len(tokens),
                _ => plain,
            };
            let plan = |tokens: usize| {
                let load = CacheLoad { batch, tokens, chunk };
                CachePlan::new(kind, &[layer], of_length(tokens), load, &limits).expect("counted")
            };
            // What a buffer of K holds, in whole pages.
            let fits = 128 * 1024 / (2 * 16 * 4 * batch);
            let longest = match kind {
                CacheKind::Dynamic => plan(10).longest().expect("a bound"),
                CacheKind::Static => fits,
                _ => plan(10).longest().expect("a bound"),
            };
            assert!(longest <= fits && longest + 16 > fits, "{kind:?}: {longest} of {fits}");
            let context = format!("{kind:?}, batch {batch}, pieces of {chunk}: {longest}");
            let load = CacheLoad { batch, tokens: longest, chunk };
            assert_eq!(plan(longest).fits(), Ok(()), "{context}");
            run(&gpu, kind, &[layer], of_length(longest), load)
                .unwrap_or_else(|error| panic!("{context}: {error}"));
            let past = plan(longest + 1);
            assert!(past.fits().is_err(), "{context}");
            assert!(past.fits().expect_err("no room").to_string().contains("131072"), "{context}");
            let load = CacheLoad { tokens: longest + 1, ..load };
            assert!(run(&gpu, kind, &[layer], of_length(longest + 1), load).is_err(), "{context}");
        }
    }
    // Where every layer has a window, any length does, in pieces that fit.
    let load = CacheLoad { batch: 1, tokens: 5000, chunk: 100 };
    let windowed = CacheOptions::default().with_windows(&[Some(300)]);
    let plan = CachePlan::new(CacheKind::Dynamic, &[layer], windowed, load, &limits);
    let plan = plan.expect("counted");
    assert_eq!((plan.longest(), plan.fits()), (None, Ok(())));
    let stats = run(&gpu, CacheKind::Dynamic, &[layer], windowed, load).expect("it fits");
    assert_eq!(plan.bytes_allocated(), stats.bytes_allocated);
}

#[test]
fn loads_and_options_that_do_not_go_together() {
    let gpu = gpu();
    let layer = LayerShape { dtype: DType::F16, heads: 2, key_dim: 16, value_dim: 8 };
    let limits = gpu.device().limits();
    let load = CacheLoad { batch: 1, tokens: 100, chunk: 10 };
    let plain = CacheOptions::default();
    let plan = |kind, layers: &[LayerShape], options, load| {
        CachePlan::new(kind, layers, options, load, &limits)
    };
    let none = CacheLoad { chunk: 0, ..load };
    let odd = LayerShape { key_dim: 3, ..layer };
    for (answer, words) in [
        (plan(CacheKind::Dynamic, &[layer], plain, none), "zero"),
        (plan(CacheKind::Dynamic, &[], plain, load), "zero"),
        (plan(CacheKind::Dynamic, &[odd], plain, load), "3"),
        (plan(CacheKind::Dynamic, &[layer], plain.with_max_pages(3), load), "max_pages"),
        (plan(CacheKind::Static, &[layer], plain, load), "max_cache_len"),
        (plan(CacheKind::Paged, &[layer], plain.with_page_tokens(3), load), "3"),
        (plan(CacheKind::Dynamic, &[layer], plain.with_windows(&[Some(0)]), load), "window"),
    ] {
        let error = answer.expect_err("it does not fit together").to_string();
        assert!(error.contains(words), "'{words}' is not in '{error}'");
    }
    for (answer, words) in [
        (plan(CacheKind::Static, &[layer], plain.with_max_cache_len(99), load), "99"),
        (plan(CacheKind::Paged, &[layer], plain.with_max_pages(6), load), "6"),
        (plan(CacheKind::Paged, &[layer], plain.with_max_cache_len(99), load), "99"),
        (
            plan(
                CacheKind::Static,
                &[layer],
                plain.with_max_cache_len(200).with_windows(&[Some(9)]),
                load,
            ),
            "with_max_chunk(10)",
        ),
    ] {
        let error = answer.expect("it is counted").fits().expect_err("no room").to_string();
        assert!(error.contains(words), "'{words}' is not in '{error}'");
    }
}
