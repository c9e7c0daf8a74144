//! What must be refused is refused from counts: before the host's memory grows, however much was asked for.
//!
//! A binary of its own, because it counts every byte that the process allocates.

use std::sync::{Mutex, PoisonError};

use peak_alloc::PeakAlloc;
use wgpu_kvcache::wgpu::{Buffer, BufferDescriptor, BufferUsages, ComputePass, Limits};
use wgpu_kvcache::{
    BatchChange, Cache, CacheOptions, CachePosition, DType, DynamicKVCache, EncoderDecoderCache,
    Error, Gpu, HeadlessOptions, KVCache, PagedKVCache, Side, StaticKVCache, TensorView,
};

#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;
/// One test at a time: the heap cannot tell them apart.
static ALONE: Mutex<()> = Mutex::new(());

const APPEND: CachePosition<'_> = CachePosition::Append;
/// What a refusal may take of the host's memory, in bytes.
const MOST: usize = 10_000_000;

/// WebGPU's default limits: 128 MiB for a binding.
fn gpu() -> Gpu {
    let limits = Some(Limits::default());
    Gpu::headless_with(&HeadlessOptions::default().with_limits(limits))
        .unwrap_or_else(|error| panic!("{error}"))
}

fn source(gpu: &Gpu) -> Buffer {
    gpu.device().create_buffer(&BufferDescriptor {
        label: Some("source"),
        size: 4096,
        usage: BufferUsages::STORAGE,
        mapped_at_creation: false,
    })
}

/// `batch` rows of `tokens` tokens, one head of one element each, all of them the same element.
fn tokens(source: &Buffer, batch: usize, tokens: usize) -> TensorView<'_> {
    let view = TensorView::new(source, DType::F32, &[batch, 1, tokens, 1]).expect("four extents");
    view.with_strides([0, 0, 0, 1])
}

/// The answer of `call`, which may take no more than `MOST` bytes while it runs.
fn frugal<T>(name: &str, call: impl FnOnce() -> T) -> T {
    let before = HEAP.current_usage();
    HEAP.reset_peak_usage();
    let answer = call();
    let taken = HEAP.peak_usage().saturating_sub(before);
    assert!(taken < MOST, "{name}: {taken} bytes");
    answer
}

fn refused<T>(name: &str, call: impl FnOnce() -> Result<T, Error>) -> Error {
    match frugal(name, call) {
        Err(error) => error,
        Ok(_) => panic!("{name}: was not refused"),
    }
}

fn paged(gpu: &Gpu, page_tokens: usize, max_pages: Option<usize>) -> PagedKVCache {
    let options = CacheOptions::default().with_page_tokens(page_tokens).with_max_pages(max_pages);
    PagedKVCache::with_options(gpu, options).expect("a power of two")
}

/// A cache of each kind, its name first.
fn caches(gpu: &Gpu) -> Vec<(&'static str, Box<dyn KVCache>)> {
    vec![
        ("dynamic", Box::new(DynamicKVCache::new(gpu))),
        (
            "static",
            Box::new(
                StaticKVCache::with_options(
                    gpu,
                    CacheOptions::default().with_max_cache_len(64).with_num_layers(4),
                )
                .expect("both options"),
            ),
        ),
        ("pages of 1", Box::new(paged(gpu, 1, None))),
        ("pages of 16", Box::new(paged(gpu, 16, None))),
        ("a pool of 9 pages", Box::new(paged(gpu, 4, Some(9)))),
    ]
}

fn update(
    gpu: &Gpu,
    cache: &mut dyn KVCache,
    layer: usize,
    new: &TensorView<'_>,
    position: CachePosition<'_>,
) -> Result<(), Error> {
    gpu.submit_pass("update", |pass| cache.update(pass, new, new, layer, position).map(|_| ()))
}

#[test]
fn more_rows_than_there_is_memory_for() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let gpu = gpu();
    let source = source(&gpu);
    let few = [0, 0, 1];
    for (name, mut cache) in caches(&gpu) {
        for layer in 0..2 {
            update(&gpu, cache.as_mut(), layer, &tokens(&source, 2, 5), APPEND).expect("room");
        }
        for is_empty in [false, true] {
            if is_empty {
                cache.crop(0);
            }
            let before = cache.stats();
            let most = usize::try_from(u32::MAX).expect("64 bits");
            for repeats in [500_000_000, 1_000_000_000, most / 2, most, most + 1, usize::MAX] {
                let name = format!("{name}, empty: {is_empty}, {repeats} times");
                let mut call = |change: &mut dyn FnMut(
                    &mut dyn KVCache,
                    &mut ComputePass<'_>,
                ) -> Result<(), Error>| {
                    let error = refused(&name, || {
                        gpu.submit_pass("refused", |pass| change(cache.as_mut(), pass))
                    });
                    assert!(
                        matches!(
                            error,
                            Error::LayerTooLarge { .. }
                                | Error::ListTooLarge { .. }
                                | Error::SizeOverflow { .. }
                        ),
                        "{name}: {error:?}"
                    );
                    assert_eq!(cache.stats(), before, "{name}");
                };
                call(&mut |cache, pass| cache.batch_repeat_interleave(pass, repeats));
                call(&mut |cache, _| cache.prepare_batch(BatchChange::Repeat(repeats)));
            }
            gpu.submit_pass("valid", |pass| cache.reorder_cache(pass, &few)).expect("rows");
            gpu.submit_pass("valid", |pass| cache.reorder_cache(pass, &[2, 1])).expect("rows");
        }
    }
    // The layer that refuses comes after one that would have room.
    let mut cache = DynamicKVCache::new(&gpu);
    update(&gpu, &mut cache, 0, &tokens(&source, 1, 1), APPEND).expect("room");
    update(&gpu, &mut cache, 1, &tokens(&source, 1, 3000), APPEND).expect("room");
    let error = refused("the second layer", || {
        gpu.submit_pass("refused", |pass| cache.batch_repeat_interleave(pass, 30_000_000))
    });
    assert!(matches!(error, Error::LayerTooLarge { layer: 1, .. }), "{error:?}");
    // A selection that is the caller's own list takes no second one.
    let many = vec![0_u32; 40_000_000];
    for (name, mut cache) in caches(&gpu) {
        update(&gpu, cache.as_mut(), 0, &tokens(&source, 1, 1), APPEND).expect("room");
        let call = || gpu.submit_pass("refused", |pass| cache.reorder_cache(pass, &many));
        refused(&format!("{name}, a long selection"), call);
    }
}

#[test]
fn a_first_update_of_more_rows_than_there_is_memory_for() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let gpu = gpu();
    let source = source(&gpu);
    for (name, mut cache) in caches(&gpu) {
        for batch in [1 << 28, 1 << 32, 1 << 40, 1 << 60] {
            for count in [1, 7] {
                let name = format!("{name}, {batch} rows of {count} tokens");
                let new = tokens(&source, batch, count);
                let error = refused(&name, || update(&gpu, cache.as_mut(), 0, &new, APPEND));
                assert!(
                    matches!(
                        error,
                        Error::LayerTooLarge { .. }
                            | Error::OutOfPages { .. }
                            | Error::SizeOverflow { .. }
                    ),
                    "{name}: {error:?}"
                );
                assert_eq!(cache.stats(), Default::default(), "{name}");
            }
        }
        update(&gpu, cache.as_mut(), 0, &tokens(&source, 2, 3), APPEND).expect("room");
    }
}

/// A gap is a range, however long: no list is as long as it.
#[test]
fn positions_far_behind_the_last_token() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let gpu = gpu();
    let source = source(&gpu);
    let two = |far| [vec![5, far], vec![far - 1, 4]];
    for (name, mut cache) in caches(&gpu) {
        for layer in 0..2 {
            update(&gpu, cache.as_mut(), layer, &tokens(&source, 2, 3), APPEND).expect("room");
        }
        for far in [40_000_000, 400_000_000, u32::MAX / 2 - 1, u32::MAX] {
            let (list, rows) = ([5, far], two(far));
            for position in [CachePosition::PerToken(&list), CachePosition::PerRow(&rows)] {
                let name = format!("{name}, {position:?}");
                let new = tokens(&source, 2, 2);
                let error = refused(&name, || update(&gpu, cache.as_mut(), 0, &new, position));
                assert!(!matches!(error, Error::ListTooLarge { .. }), "{name}: {error:?}");
                assert_eq!(cache.get_seq_length(0), Ok(3), "{name}");
            }
        }
    }
    // Where the layer has room, so has the list.
    for (name, mut cache) in [
        ("dynamic", Box::new(DynamicKVCache::new(&gpu)) as Box<dyn KVCache>),
        ("pages", Box::new(paged(&gpu, 1024, None))),
    ] {
        let list = [5, 20_000_000];
        let (new, position) = (tokens(&source, 1, 2), CachePosition::PerToken(&list));
        frugal(name, || update(&gpu, cache.as_mut(), 0, &new, position)).expect("room");
        assert_eq!(cache.get_seq_length(0), Ok(20_000_001), "{name}");
    }
}

/// Whatever its index, a layer of the cross side takes what one layer takes.
#[test]
fn a_cross_layer_of_any_index() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let gpu = gpu();
    let source = source(&gpu);
    let mut cache = EncoderDecoderCache::dynamic(&gpu);
    for layer in [0, 40_000_000, 4_000_000_000, 1_000_000_000_000_000, usize::MAX] {
        let new = tokens(&source, 2, 3);
        frugal(&format!("layer {layer}"), || {
            gpu.submit_pass("cross", |pass| {
                cache.update(pass, &new, &new, layer, APPEND, Side::CrossAttention).map(|_| ())
            })
        })
        .expect("room");
        assert!(cache.is_updated(layer) && !cache.is_updated(layer / 2 + 1), "layer {layer}");
        assert_eq!(cache.get_seq_length(layer, Side::CrossAttention), Ok(3));
    }
    cache.reset();
    assert!(!cache.is_updated(usize::MAX));
}
