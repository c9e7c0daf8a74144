//! A step of a paged cache, and its statistics, cost what changes, however many pages there are.
//!
//! A binary of its own, because it counts every byte that the process allocates.

use peak_alloc::PeakAlloc;
use wgpu_kvcache::wgpu::{BufferDescriptor, BufferUsages, Limits};
use wgpu_kvcache::{
    Cache, CacheOptions, CachePosition, DType, Gpu, HeadlessOptions, KVCache, PagedKVCache,
    TensorView,
};

#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;

/// Bytes that the host takes while a step is recorded: what a copy of the table would exceed many times.
const MOST: usize = 64 << 10;

fn taken<T>(call: impl FnOnce() -> T) -> (usize, T) {
    let before = HEAP.current_usage();
    HEAP.reset_peak_usage();
    let answer = call();
    (HEAP.peak_usage().saturating_sub(before), answer)
}

#[test]
fn a_step_takes_no_more_of_the_host_for_more_pages() {
    let limits = Some(Limits::default());
    let gpu = Gpu::headless_with(&HeadlessOptions::default().with_limits(limits))
        .unwrap_or_else(|error| panic!("{error}"));
    let source = gpu.device().create_buffer(&BufferDescriptor {
        label: Some("source"),
        size: 4096,
        usage: BufferUsages::STORAGE,
        mapped_at_creation: false,
    });
    let tokens = |rows, tokens| {
        let view = TensorView::new(&source, DType::F32, &[rows, 1, tokens, 1]);
        view.expect("four extents").with_strides([0, 0, 0, 1])
    };
    // Rows, tokens of a row, tokens of a page: 62 pages and 200,000.
    for (rows, len, page_tokens) in [(2, 31, 1), (2, 100_000, 1), (1, 200_000, 1), (4, 400_010, 8)]
    {
        let options = CacheOptions::default().with_page_tokens(page_tokens);
        let mut cache = PagedKVCache::with_options(&gpu, options).expect("a power of two");
        let step = |cache: &mut PagedKVCache, count, position| {
            let mut encoder = gpu.device().create_command_encoder(&Default::default());
            let mut pass = encoder.begin_compute_pass(&Default::default());
            let new = tokens(rows, count);
            let (bytes, ()) = taken(|| {
                for layer in 0..2 {
                    cache.update(&mut pass, &new, &new, layer, position).expect("room");
                }
            });
            drop(pass);
            gpu.queue().submit([encoder.finish()]);
            bytes
        };
        step(&mut cache, len, CachePosition::Append);
        for _ in 0..4 {
            step(&mut cache, 1, CachePosition::Append);
        }
        for number in 0..40 {
            let name = format!("{rows} rows of {len} tokens, pages of {page_tokens}, {number}");
            let position = match number % 4 {
                // Into the middle, which no row shares.
                3 => CachePosition::At(7),
                _ => CachePosition::Append,
            };
            let bytes = step(&mut cache, 1, position);
            assert!(bytes < MOST, "{name}: a step took {bytes} bytes");
            let (bytes, stats) = taken(|| cache.stats());
            assert_eq!(bytes, 0, "{name}: the statistics");
            let pages = (cache.get_seq_length(0).expect("it exists")).div_ceil(page_tokens);
            assert_eq!(stats.pages_used, (rows * pages) as u64, "{name}");
            let (bytes, ()) = taken(|| {
                let length = cache.get_seq_length(0).expect("it exists");
                cache.truncate(length - 1);
            });
            assert!(bytes < MOST, "{name}: a roll-back took {bytes} bytes");
        }
    }
}
