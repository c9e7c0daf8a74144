//! The page table that a view hands out stays as it is while a pass that was recorded with it may run,
//! whatever becomes of the cache in the meantime.

use wgpu_kvcache::wgpu::PollType;
use wgpu_kvcache::{
    CacheOptions, CachePosition, DType, DynamicKVCache, Gpu, KVCache, PagedKVCache,
};

use crate::gpu;
use crate::layouts::Reader;
use crate::model::Block;
use crate::rig::{Rig, same_bits, upload};

const APPEND: CachePosition<'_> = CachePosition::Append;

/// Pages of one token, so that a table is large: 80 rows of 200 tokens fill a buffer of small data.
fn options() -> CacheOptions<'static> {
    CacheOptions::default().with_page_tokens(1)
}

/// Six updates with as large a table each, recorded in one pass, which is submitted after `first`.
fn write_on(gpu: &Gpu, cache: &mut dyn KVCache, first: wgpu_kvcache::wgpu::CommandEncoder) {
    let mut encoder = gpu.device().create_command_encoder(&Default::default());
    let mut pass = encoder.begin_compute_pass(&Default::default());
    for tokens in [390, 1, 1, 1, 1, 1] {
        let new = upload(gpu, DType::F32, &Block::noise([40, 1, tokens, 2], 4, 5));
        cache
            .update(&mut pass, &new.view(), &new.view(), 0, APPEND)
            .map(|_| ())
            .expect("a valid update");
    }
    drop(pass);
    gpu.queue().submit([first.finish(), encoder.finish()]);
}

#[derive(Clone, Copy, Debug)]
enum End {
    Reset,
    Drop,
    /// The pass of the next update is dropped, and then the cache.
    LosePass,
    /// Rows are selected, and then the cache is reset.
    SelectAndReset,
}

#[test]
fn a_table_stays_while_a_pass_that_reads_it_is_due() {
    let gpu = gpu();
    for end in [End::Reset, End::Drop, End::LosePass, End::SelectAndReset] {
        for steps in [0, 3] {
            let context = format!("{end:?} after {steps} steps");
            let mut rig = Rig::paged(&gpu, 1);
            rig.update(0, [80, 1, 200 - steps, 2], 2, APPEND);
            for _ in 0..steps {
                rig.update(0, [80, 1, 1, 2], 2, APPEND);
            }
            gpu.device().poll(PollType::wait_indefinitely()).expect("a live device");
            let (key, value) = rig.model.get(0).expect("it was written");
            let reader = Reader::new(&gpu, &rig.cache.view(0).unwrap().expect("it was written"));
            let mut encoder = gpu.device().create_command_encoder(&Default::default());
            reader.record(&mut encoder.begin_compute_pass(&Default::default()));
            let mut other: Box<dyn KVCache> =
                Box::new(PagedKVCache::with_options(&gpu, options()).expect("a power of two"));
            match end {
                End::Reset => {
                    rig.cache.reset();
                    write_on(&gpu, rig.cache.as_mut(), encoder);
                }
                End::Drop => {
                    rig.cache = Box::new(DynamicKVCache::new(&gpu));
                    write_on(&gpu, other.as_mut(), encoder);
                }
                End::LosePass => {
                    let new = upload(&gpu, DType::F32, &Block::noise([80, 1, 1, 2], 4, 5));
                    let mut lost = gpu.device().create_command_encoder(&Default::default());
                    let mut pass = lost.begin_compute_pass(&Default::default());
                    rig.cache
                        .update(&mut pass, &new.view(), &new.view(), 0, APPEND)
                        .map(|_| ())
                        .expect("a valid update");
                    drop(pass);
                    drop(lost);
                    rig.cache = Box::new(DynamicKVCache::new(&gpu));
                    write_on(&gpu, other.as_mut(), encoder);
                }
                End::SelectAndReset => {
                    let rows: Vec<u32> = (0..80).rev().collect();
                    rig.cache
                        .reorder_cache(&mut encoder.begin_compute_pass(&Default::default()), &rows)
                        .expect("these rows exist");
                    rig.cache.reset();
                    write_on(&gpu, rig.cache.as_mut(), encoder);
                }
            }
            let [keys, values] = reader.read();
            assert!(same_bits(&keys, &key.bytes), "K, {context}");
            assert!(same_bits(&values, &value.bytes), "V, {context}");
        }
    }
}

/// Small data of one thread is put into a fresh buffer while another thread submits work that binds it, too.
/// wgpu clears what was never written of a buffer when it is first bound, which must not reach that data.
#[test]
fn small_data_of_a_thread_survives_the_submits_of_another() {
    let gpu = gpu();
    std::thread::scope(|scope| {
        for thread in 0..4_u32 {
            let gpu = &gpu;
            scope.spawn(move || {
                for turn in 0..60 {
                    // Each paged cache that goes leaves a fresh buffer behind.
                    let mut paged = Rig::paged(gpu, 4);
                    paged.update(0, [3, 1, 9, 4], 4, APPEND);
                    let mut ring = Rig::fixed(gpu, 10, 1);
                    ring.update(0, [16, 2, 10, 4], 4, APPEND);
                    let rows: Vec<u32> =
                        (0..16).map(|row| (row * 7 + thread + turn) % 16).collect();
                    paged.select(&[2, thread % 3, turn % 3, 0]);
                    ring.select(&rows);
                    paged.update(0, [4, 1, 2, 4], 4, CachePosition::PerToken(&[3, 12]));
                    paged.check(&format!("pages, thread {thread}, turn {turn}"));
                    ring.check(&format!("ring, thread {thread}, turn {turn}"));
                }
            });
        }
    });
}
