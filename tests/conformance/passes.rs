//! The caller's passes: what is recorded is there once it is submitted, and not before; and a pass that
//! is dropped is noticed.

use wgpu_kvcache::wgpu::{CommandEncoder, ComputePass};
use wgpu_kvcache::{BatchChange, Cache, CachePosition, DType, Error, KVCache, Tensor};

use crate::gpu;
use crate::model::Block;
use crate::rig::{Rig, but_pages, upload};
use crate::wait::{ReadLayer, wait};

const APPEND: CachePosition<'_> = CachePosition::Append;

/// A cache of each kind whose layers 0 and 1 hold something.
fn rigs() -> [Rig; 3] {
    [Rig::dynamic(&gpu()), Rig::fixed(&gpu(), 20, 3), Rig::paged(&gpu(), 4)].map(|mut rig| {
        rig.update(0, [2, 2, 5, 4], 4, APPEND);
        rig.update(1, [2, 1, 3, 2], 2, APPEND);
        rig
    })
}

fn encoder(rig: &Rig) -> CommandEncoder {
    rig.gpu.device().create_command_encoder(&Default::default())
}

fn token(rig: &Rig, seed: u64) -> (Block, Tensor) {
    let block = Block::noise([2, 2, 1, 4], 4, seed);
    let tensor = upload(&rig.gpu, DType::F32, &block);
    (block, tensor)
}

fn append(cache: &mut dyn KVCache, pass: &mut ComputePass<'_>, new: &Tensor) -> Result<(), Error> {
    cache.update(pass, &new.view(), &new.view(), 0, APPEND).map(|_| ())
}

fn assert_not_submitted(rig: &Rig, calls: u64, when: &str) {
    let due = Some(Error::NotSubmitted { calls });
    assert_eq!(rig.cache.read(0).err(), due, "{when}");
    assert_eq!(wait(rig.cache.get_async(0)).err(), due, "{when}");
    let text = due.map(|error| error.to_string()).unwrap_or_default();
    assert!(text.contains(&format!("{calls} calls")) && text.contains("submit"), "{text}");
}

#[test]
fn what_is_recorded_is_read_back_once_it_is_submitted() {
    for mut rig in rigs() {
        let (block, tensor) = token(&rig, 1);
        let mut encoder = encoder(&rig);
        {
            let mut pass = encoder.begin_compute_pass(&Default::default());
            append(rig.cache.as_mut(), &mut pass, &tensor).expect("a valid update");
            assert_not_submitted(&rig, 1, "in the pass");
            // Lengths and views move on at once.
            assert_eq!(rig.cache.get_seq_length(0), Ok(6));
            assert_eq!(rig.cache.view(0).unwrap().unwrap().len(), 6);
            append(rig.cache.as_mut(), &mut pass, &tensor).expect("a valid update");
            assert_not_submitted(&rig, 2, "after a second call");
        }
        assert_not_submitted(&rig, 2, "after the pass");
        rig.cache
            .reorder_cache(&mut encoder.begin_compute_pass(&Default::default()), &[1, 0])
            .expect("a valid order");
        let commands = encoder.finish();
        assert!(matches!(rig.cache.read(0), Err(Error::NotSubmitted { .. })), "after finish");
        let stats = rig.cache.stats();
        rig.gpu.queue().submit([commands]);
        for _ in 0..2 {
            rig.model.update(0, &block, &block, APPEND).expect("a valid update");
        }
        rig.model.select(&[1, 0]).expect("a valid order");
        rig.check("submitted");
        let read = rig.cache.stats();
        assert!(read.bytes_read_back > stats.bytes_read_back);
        assert_eq!(stats.dispatches, read.dispatches);
    }
}

/// What the four ways of losing a pass leave behind.
fn lose(rig: &mut Rig, way: usize) {
    let (_, tensor) = token(rig, 9);
    let mut encoder = encoder(rig);
    let mut pass = encoder.begin_compute_pass(&Default::default());
    match way {
        0 => append(rig.cache.as_mut(), &mut pass, &tensor).expect("a valid update"),
        1 => rig.cache.reorder_cache(&mut pass, &[1, 0]).expect("a valid order"),
        2 => rig.cache.batch_repeat_interleave(&mut pass, 3).expect("a valid count"),
        _ => {
            append(rig.cache.as_mut(), &mut pass, &tensor).expect("a valid update");
            drop(pass);
            drop(encoder.finish());
            return;
        }
    }
    drop(pass);
    drop(encoder);
}

#[test]
fn a_dropped_pass_is_noticed_until_reset() {
    for way in 0..4 {
        for mut rig in rigs() {
            let (_, tensor) = token(&rig, 1);
            lose(&mut rig, way);
            let stats = rig.cache.stats();
            let gpu = rig.gpu.clone();
            for _ in 0..2 {
                let cache = rig.cache.as_mut();
                gpu.submit_pass("refused", |pass| {
                    for result in [
                        append(cache, pass, &tensor),
                        cache.reorder_cache(pass, &[0]),
                        cache.batch_select_indices(pass, &[0, 0, 1]),
                        cache.batch_repeat_interleave(pass, 2),
                        cache.prepare_batch(BatchChange::Repeat(2)),
                    ] {
                        let error = result.expect_err("the pass was dropped");
                        assert!(matches!(error, Error::PassDropped { .. }), "{way}: {error:?}");
                        let text = error.to_string();
                        assert!(text.contains("dropped") && text.contains("reset()"), "{text}");
                    }
                });
                for layer in 0..2 {
                    let error = rig.cache.read(layer).expect_err("the pass was dropped");
                    assert!(matches!(error, Error::PassDropped { .. }), "{way}: {error:?}");
                    let error = wait(rig.cache.get_async(layer));
                    assert!(matches!(error, Err(Error::PassDropped { .. })), "{way}: {error:?}");
                }
                assert_eq!(but_pages(rig.cache.stats()), but_pages(stats), "way {way}");
                rig.cache.crop(3);
                rig.cache.truncate(2);
            }
            rig.reset();
            assert_eq!(rig.cache.read(0), Ok(None));
            rig.update(0, [3, 1, 9, 6], 4, CachePosition::PerToken(&[8, 0, 1, 2, 3, 4, 5, 6, 11]));
            rig.select(&[2, 0, 1, 1]);
            rig.update(1, [4, 1, 2, 2], 2, APPEND);
            rig.repeat_interleave(2);
            rig.crop(6);
            rig.check("after reset");
        }
    }
}

/// A pass in which nothing of the cache was recorded may be dropped.
#[test]
fn a_dropped_pass_without_work_is_no_loss() {
    for mut rig in rigs() {
        let (_, tensor) = token(&rig, 1);
        {
            let mut encoder = encoder(&rig);
            let mut pass = encoder.begin_compute_pass(&Default::default());
            let cache = rig.cache.as_mut();
            let wrong = CachePosition::PerToken(&[1, 2]);
            let view = tensor.view();
            assert!(cache.update(&mut pass, &view, &view, 0, wrong).is_err());
            assert!(cache.reorder_cache(&mut pass, &[7]).is_err());
            assert!(cache.batch_repeat_interleave(&mut pass, 0).is_err());
            cache.reorder_cache(&mut pass, &[0, 1]).expect("rows that stay");
        }
        rig.crop(4);
        rig.check("after a pass without work");
        rig.update(0, [2, 2, 3, 4], 4, APPEND);
        rig.check("written on");
    }
}

/// A cache with work in a pass that is still open is reset: the pass may be submitted or dropped.
#[test]
fn reset_with_a_pass_still_open() {
    for is_submitted in [false, true] {
        for mut rig in rigs() {
            let (_, tensor) = token(&rig, 1);
            let mut encoder = encoder(&rig);
            let mut pass = encoder.begin_compute_pass(&Default::default());
            append(rig.cache.as_mut(), &mut pass, &tensor).expect("a valid update");
            drop(pass);
            rig.reset();
            if is_submitted {
                rig.gpu.queue().submit([encoder.finish()]);
            } else {
                drop(encoder);
            }
            rig.update(0, [1, 2, 3, 4], 2, CachePosition::PerToken(&[7, 2, 5]));
            rig.check(&format!("submitted: {is_submitted}"));
        }
    }
}

/// Another cache of the same device does not mind.
#[test]
fn a_dropped_pass_is_the_loss_of_one_cache() {
    let [mut lost, mut other, _] = rigs();
    lose(&mut lost, 0);
    other.update(0, [2, 2, 2, 4], 4, APPEND);
    other.check("the other cache");
    let error = lost.cache.read(1).expect_err("the pass was dropped");
    assert_eq!(error, Error::PassDropped { calls: 1 });
    drop(lost);
    other.select(&[1, 0]);
    other.check("the other cache");
    let unwritten: &mut dyn Cache = &mut wgpu_kvcache::DynamicKVCache::new(&gpu());
    unwritten.crop(1);
}
