//! Passes, queues and handles that are not the cache's own, and passes that are not the latest.

use wgpu_kvcache::{
    Attention, CachePosition, DType, DynamicKVCache, Error, Gpu, KVCache, PagedKVCache, TensorView,
};

use crate::model::Block;
use crate::rig::{Rig, plain_gpu, upload};
use crate::wait::ReadLayer;
use crate::{gpu, kernels_run};

const APPEND: CachePosition<'_> = CachePosition::Append;

fn rigs(gpu: &Gpu) -> [Rig; 3] {
    [Rig::dynamic(gpu), Rig::fixed(gpu, 80, 2), Rig::paged(gpu, 4)].map(|mut rig| {
        rig.update(0, [2, 2, 6, 4], 4, APPEND);
        rig
    })
}

fn token(gpu: &Gpu) -> wgpu_kvcache::Tensor {
    upload(gpu, DType::F32, &Block::noise([2, 2, 1, 4], 4, 3))
}

#[test]
#[cfg_attr(target_arch = "wasm32", ignore = "browsers report it to the engine, later")]
fn a_pass_of_another_instance_is_refused() {
    if !kernels_run() {
        return;
    }
    let gpu = plain_gpu(|_| ());
    for mut rig in rigs(&gpu) {
        // Nothing is compiled on it, so the cache's pipelines have numbers that are nobody's there.
        let other = plain_gpu(|_| ());
        let token = token(&gpu);
        for layer in [0, 1] {
            let error = other.submit_pass("foreign", |pass| {
                rig.cache.update(pass, &token.view(), &token.view(), layer, APPEND).err()
            });
            assert_eq!(error, Some(Error::OtherDevice { what: "the pass" }));
        }
        let error = other.submit_pass("foreign", |pass| rig.cache.reorder_cache(pass, &[1, 1]));
        // In pages a reorder has no dispatch that could go wrong.
        if let Err(error) = error {
            assert_eq!(error, Error::OtherDevice { what: "the pass" });
            rig.check("after the refusals");
            rig.update(0, [2, 2, 1, 4], 4, APPEND);
            rig.check("after the next update");
        }
    }
}

#[test]
fn a_pass_that_is_not_the_latest_is_refused() {
    let gpu = gpu();
    for mut rig in rigs(&gpu) {
        let token = token(&gpu);
        let mut attention = Attention::new(&gpu);
        let output = upload(&gpu, DType::F32, &Block::noise([2, 2, 1, 4], 4, 5));
        let mut encoders = [0, 1].map(|_| gpu.device().create_command_encoder(&Default::default()));
        let [first, second] = &mut encoders;
        let mut first = first.begin_compute_pass(&Default::default());
        let mut second = second.begin_compute_pass(&Default::default());
        for (nth, pass) in [&mut first, &mut second].into_iter().enumerate() {
            rig.cache
                .update(pass, &token.view(), &token.view(), 0, APPEND)
                .unwrap_or_else(|error| panic!("pass {nth}: {error}"));
        }
        let before = rig.cache.stats();
        let view = rig.cache.view(0).expect("it exists").expect("it was written");
        let update = rig.cache.update(&mut first, &token.view(), &token.view(), 0, APPEND);
        assert_eq!(update.err(), Some(Error::EarlierPass));
        assert_eq!(rig.cache.reorder_cache(&mut first, &[1, 0]), Err(Error::EarlierPass));
        assert_eq!(rig.cache.reserve(&mut first, 1000), Err(Error::EarlierPass));
        let options = Default::default();
        let record = attention.record(&mut first, &token.view(), &view, &output.view(), options);
        assert_eq!(record, Err(Error::EarlierPass));
        assert_eq!(rig.cache.stats(), before);
        // The latest goes on, and so does a new one.
        rig.cache.update(&mut second, &token.view(), &token.view(), 0, APPEND).expect("the latest");
        drop((first, second));
        gpu.queue().submit(encoders.map(wgpu_kvcache::wgpu::CommandEncoder::finish));
        gpu.submit_pass("new", |pass| {
            rig.cache.update(pass, &token.view(), &token.view(), 0, APPEND).map(|_| ())
        })
        .expect("a new pass");
        assert_eq!(rig.cache.get_seq_length(0), Ok(10));
        assert!(rig.cache.read(0).is_ok());
    }
}

#[test]
#[cfg_attr(target_arch = "wasm32", ignore = "browsers report it to the engine, later")]
fn a_queue_of_another_device_is_refused() {
    if !kernels_run() {
        return;
    }
    let [ours, theirs] = [plain_gpu(|_| ()), plain_gpu(|_| ())];
    let error = Gpu::new(ours.device().clone(), theirs.queue().clone()).err();
    assert_eq!(error, Some(Error::OtherDevice { what: "the queue" }));
    Gpu::new(ours.device().clone(), ours.queue().clone()).expect("its own");
}

#[test]
#[cfg_attr(target_arch = "wasm32", ignore = "browsers report it to the engine, later")]
fn an_output_in_a_cache_of_another_handle_of_the_device_is_refused() {
    let gpu = gpu();
    let other = Gpu::new(gpu.device().clone(), gpu.queue().clone()).expect("the same device");
    let token = upload(&gpu, DType::F32, &Block::noise([1, 1, 1, 4], 4, 3));
    let mut caches: [Box<dyn KVCache>; 2] =
        [Box::new(DynamicKVCache::new(&gpu)), Box::new(PagedKVCache::new(&gpu))];
    let mut theirs = DynamicKVCache::new(&other);
    let mut attention = Attention::new(&other);
    gpu.submit_pass("two handles", |pass| {
        let view = theirs.update(pass, &token.view(), &token.view(), 0, APPEND).expect("updates");
        for cache in &mut caches {
            let own = cache.update(pass, &token.view(), &token.view(), 0, APPEND).expect("updates");
            for buffer in [Some(own.key()), Some(own.value()), own.page_table()] {
                let Some(buffer) = buffer else { continue };
                let output = TensorView::new(buffer, DType::F32, &[1, 1, 1, 4]).expect("a shape");
                let record =
                    attention.record(pass, &token.view(), &view, &output, Default::default());
                assert!(matches!(record, Err(Error::OutputIsRead { .. })), "{record:?}");
            }
        }
    });
}
