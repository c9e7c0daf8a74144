//! Submits that fail, on a device whose engine takes errors for itself: wgpu then reports the work as done,
//! although none of it ran. The cache notices when it is read back, and says so until it is reset.
//!
//! The backend without a driver runs no kernel, whether a submit fails or not, so there nothing can be
//! noticed: `assert_noticed` says what is promised there.

use wgpu_kvcache::wgpu::{
    BufferDescriptor, BufferUsages, CommandEncoder, ErrorFilter, Features, PollType,
};
use wgpu_kvcache::{
    Attention, BatchChange, CachePosition, DType, DynamicKVCache, EncoderDecoderCache, Error, Gpu,
    KVCache, Side, TensorView,
};

use crate::model::Block;
use crate::rig::{Rig, buffer, plain_gpu, upload};
use crate::wait::{ReadLayer, ReadSide, wait};
use crate::{kernels_run, open};

const APPEND: CachePosition<'_> = CachePosition::Append;

/// A device whose errors nobody panics about.
fn lenient_gpu() -> Gpu {
    let gpu = open(Features::IMMEDIATES, None);
    gpu.device().on_uncaptured_error(std::sync::Arc::new(|_| ()));
    gpu
}

/// A cache of each kind with 64 tokens, which fill the first allocation of a ring that grows.
fn rigs(gpu: &Gpu) -> [Rig; 3] {
    [Rig::dynamic(gpu), Rig::fixed(gpu, 80, 2), Rig::paged(gpu, 16)].map(|mut rig| {
        rig.update(0, [2, 2, 64, 4], 4, APPEND);
        rig
    })
}

/// How a submit comes to fail.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    /// The encoder holds a mistake of the engine's own.
    BadCommand,
    /// A command buffer beside it does.
    BadNeighbour,
    SourceDestroyed,
    SourceMapped,
    PassLeftOpen,
}

const WAYS: [Way; 5] = [
    Way::BadCommand,
    Way::BadNeighbour,
    Way::SourceDestroyed,
    Way::SourceMapped,
    Way::PassLeftOpen,
];

/// A call that writes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Call {
    Append,
    Reorder,
    Repeat,
}

fn mistake(gpu: &Gpu, encoder: &mut CommandEncoder) {
    let target = buffer(gpu, 8, BufferUsages::COPY_DST);
    encoder.clear_buffer(&target, 1, None);
}

/// Records `call` and submits it in such a way that nothing runs.
fn fail(rig: &mut Rig, call: Call, way: Way) {
    let gpu = rig.gpu.clone();
    // Mapped from the start, and never unmapped.
    let source = gpu.device().create_buffer(&BufferDescriptor {
        label: Some("source"),
        size: 2 * 2 * 4 * 4,
        usage: BufferUsages::STORAGE,
        mapped_at_creation: way == Way::SourceMapped,
    });
    let view = TensorView::new(&source, DType::F32, &[2, 2, 1, 4]).expect("a shape");
    let mut encoder = gpu.device().create_command_encoder(&Default::default());
    let mut pass = encoder.begin_compute_pass(&Default::default()).forget_lifetime();
    match call {
        Call::Append => rig.cache.update(&mut pass, &view, &view, 0, APPEND).map(|_| ()),
        Call::Reorder => rig.cache.reorder_cache(&mut pass, &[1, 0]),
        Call::Repeat => rig.cache.batch_repeat_interleave(&mut pass, 2),
    }
    .expect("a valid call");
    let mut commands = Vec::new();
    if way == Way::PassLeftOpen {
        commands.push(encoder.finish());
        drop(pass);
    } else {
        drop(pass);
        match way {
            Way::BadCommand => mistake(&gpu, &mut encoder),
            Way::SourceDestroyed => source.destroy(),
            _ => (),
        }
        commands.push(encoder.finish());
    }
    if way == Way::BadNeighbour {
        let mut neighbour = gpu.device().create_command_encoder(&Default::default());
        mistake(&gpu, &mut neighbour);
        commands.push(neighbour.finish());
    }
    gpu.queue().submit(commands);
}

/// Every call that would show or use what is not there says so, until a reset.
fn assert_noticed(rig: &mut Rig, calls: u64, context: &str) {
    if !kernels_run() {
        // All that is promised without a driver: no panic, no hang.
        for _ in 0..2 {
            let _ = rig.cache.read(0);
        }
        return rig.reset();
    }
    let due = Error::PassDropped { calls };
    assert_eq!(rig.cache.read(0).err(), Some(due.clone()), "{context}");
    let gpu = rig.gpu.clone();
    let token = upload(&gpu, DType::F32, &Block::noise([2, 2, 1, 4], 4, 7));
    for _ in 0..2 {
        assert_eq!(rig.cache.read(0).err(), Some(due.clone()), "{context}");
        let read = wait(rig.cache.get_async(0));
        assert_eq!(read.err(), Some(due.clone()), "{context}");
        assert_eq!(rig.cache.view(0).err(), Some(due.clone()), "{context}");
        assert_eq!(rig.cache.get_seq_length(0), Err(due.clone()), "{context}");
        gpu.submit_pass("refused", |pass| {
            let view = token.view();
            let refused = [
                rig.cache.update(pass, &view, &view, 0, APPEND).map(|_| ()),
                rig.cache.update(pass, &view, &view, 1, APPEND).map(|_| ()),
                rig.cache.reorder_cache(pass, &[0, 0]),
                rig.cache.batch_repeat_interleave(pass, 2),
                rig.cache.prepare_batch(BatchChange::Repeat(2)),
            ];
            assert!(refused.iter().all(|it| *it == Err(due.clone())), "{context}: {refused:?}");
        });
    }
    rig.reset();
}

#[test]
fn a_submit_that_fails_is_noticed() {
    let gpu = lenient_gpu();
    for is_scoped in [false, true] {
        for call in [Call::Append, Call::Reorder, Call::Repeat] {
            for way in WAYS {
                if matches!(way, Way::SourceDestroyed | Way::SourceMapped) && call != Call::Append {
                    // Other calls read no buffer of the engine's.
                    continue;
                }
                for (kind, mut rig) in rigs(&gpu).into_iter().enumerate() {
                    let context = format!("kind {kind}, {call:?}, {way:?}, scope: {is_scoped}");
                    let scope =
                        is_scoped.then(|| gpu.device().push_error_scope(ErrorFilter::Validation));
                    fail(&mut rig, call, way);
                    if let Some(scope) = scope {
                        assert!(wait(scope.pop()).is_some(), "{context}");
                    }
                    if kind == 2 && call != Call::Append {
                        // A change of the batch in pages is made on the host alone: nothing was lost.
                        match call {
                            Call::Reorder => rig.model.select(&[1, 0]).expect("two rows"),
                            _ => rig.model.repeat_interleave(2).expect("a count"),
                        }
                    } else {
                        assert_noticed(&mut rig, 1, &context);
                        rig.update(0, [2, 2, 9, 4], 4, APPEND);
                    }
                    rig.check(&context);
                    let [batch, ..] = rig.cache.view(0).unwrap().unwrap().key_shape();
                    rig.update(0, [batch, 2, 3, 4], 4, APPEND);
                    rig.check(&format!("{context}, written on"));
                }
            }
        }
    }
}

/// What comes after it ran, which makes up for nothing.
#[test]
fn a_submit_that_fails_among_others_is_noticed() {
    let gpu = lenient_gpu();
    for mut rig in rigs(&gpu) {
        fail(&mut rig, Call::Append, Way::BadCommand);
        let token = upload(&gpu, DType::F32, &Block::noise([2, 2, 1, 4], 4, 7));
        for _ in 0..3 {
            gpu.submit_pass("good", |pass| {
                rig.cache.update(pass, &token.view(), &token.view(), 0, APPEND).map(|_| ())
            })
            .expect("nothing is known yet");
        }
        fail(&mut rig, Call::Append, Way::BadNeighbour);
        assert_noticed(&mut rig, 2, "two of five");
        rig.update(0, [1, 2, 9, 4], 4, APPEND);
        rig.check("after a reset");
    }
}

/// What has failed counts, and so does what is still to be submitted.
#[test]
fn a_submit_that_fails_before_one_that_is_still_due() {
    let gpu = lenient_gpu();
    for mut rig in rigs(&gpu) {
        fail(&mut rig, Call::Append, Way::BadCommand);
        let token = upload(&gpu, DType::F32, &Block::noise([2, 2, 1, 4], 4, 7));
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        rig.cache
            .update(
                &mut encoder.begin_compute_pass(&Default::default()),
                &token.view(),
                &token.view(),
                0,
                APPEND,
            )
            .map(|_| ())
            .expect("nothing is known yet");
        assert!(rig.cache.read(0).is_err(), "neither ran");
        gpu.queue().submit([encoder.finish()]);
        assert_noticed(&mut rig, 1, "one of two");
    }
}

/// More caches than a page of witnesses has words for, and each of them, used again and again, answers for
/// itself alone.
#[test]
fn many_caches_do_not_mix_up_what_ran() {
    let gpu = plain_gpu(|_| ());
    let token = upload(&gpu, DType::F32, &Block::noise([1, 1, 1, 4], 4, 7));
    let mut caches: Vec<DynamicKVCache> = (0..600).map(|_| DynamicKVCache::new(&gpu)).collect();
    let step = |caches: &mut [DynamicKVCache]| {
        gpu.submit_pass("all", |pass| {
            for cache in caches {
                let view = token.view();
                cache.update(pass, &view, &view, 0, APPEND).map(|_| ()).expect("a valid update");
            }
        });
    };
    step(&mut caches);
    step(&mut caches[300..]);
    for turn in 0..3 {
        for (i, cache) in caches.iter().enumerate().step_by(97) {
            let (key, _) = cache.read(0).expect("submitted").expect("written");
            let due = if turn == 0 { 1 + usize::from(i >= 300) } else { turn };
            assert_eq!(key.shape()[2], due, "cache {i}, turn {turn}");
        }
        caches.truncate(400);
        caches.extend((0..200).map(|_| DynamicKVCache::new(&gpu)));
        wgpu_kvcache::Cache::reset(&mut caches[0]);
        caches.iter_mut().for_each(wgpu_kvcache::Cache::reset);
        for _ in 0..=turn {
            step(&mut caches);
        }
    }
}

/// Work of a cache that is gone, submitted later, is not taken for that of a new one.
#[test]
fn a_late_pass_of_a_dropped_cache_is_not_counted_for_another() {
    let gpu = lenient_gpu();
    let token = upload(&gpu, DType::F32, &Block::noise([2, 2, 1, 4], 4, 7));
    let mut old = DynamicKVCache::new(&gpu);
    let mut late = gpu.device().create_command_encoder(&Default::default());
    old.update(
        &mut late.begin_compute_pass(&Default::default()),
        &token.view(),
        &token.view(),
        0,
        APPEND,
    )
    .map(|_| ())
    .expect("a valid update");
    drop(old);
    for mut rig in rigs(&gpu) {
        rig.check("beside a late pass");
        fail(&mut rig, Call::Append, Way::BadCommand);
        let encoder = gpu.device().create_command_encoder(&Default::default());
        let late = std::mem::replace(&mut late, encoder);
        gpu.queue().submit([late.finish()]);
        assert_noticed(&mut rig, 1, "the late pass ran in its place");
    }
}

/// The cross side is written once and then only viewed.
#[test]
fn the_encoder_memory_is_not_there_after_its_pass_was_lost() {
    for is_dropped in [true, false] {
        if !is_dropped && !kernels_run() {
            // Whether a submit failed cannot be noticed there.
            continue;
        }
        let gpu = lenient_gpu();
        let mut pair = EncoderDecoderCache::dynamic(&gpu);
        let memory = upload(&gpu, DType::F32, &Block::noise([1, 2, 6, 4], 4, 3));
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        let mut pass = encoder.begin_compute_pass(&Default::default());
        pair.update(&mut pass, &memory.view(), &memory.view(), 0, APPEND, Side::CrossAttention)
            .map(|_| ())
            .expect("a valid update");
        drop(pass);
        assert!(pair.is_updated(0));
        if is_dropped {
            drop(encoder);
        } else {
            mistake(&gpu, &mut encoder);
            gpu.queue().submit([encoder.finish()]);
            assert_eq!(
                pair.read(0, Side::CrossAttention).err(),
                Some(Error::PassDropped { calls: 1 })
            );
        }
        let due = Error::PassDropped { calls: 1 };
        assert!(!pair.is_updated(0), "dropped: {is_dropped}");
        assert_eq!(pair.view(0, Side::CrossAttention).err(), Some(due.clone()));
        assert_eq!(pair.get_seq_length(0, Side::CrossAttention), Err(due.clone()));
        assert_eq!(pair.read(0, Side::CrossAttention).err(), Some(due));
        wgpu_kvcache::Cache::reset(&mut pair);
        assert!(!pair.is_updated(0));
        gpu.submit_pass("memory", |pass| {
            pair.update(pass, &memory.view(), &memory.view(), 0, APPEND, Side::CrossAttention)
                .map(|_| ())
        })
        .expect("a valid update");
        assert!(pair.is_updated(0));
        assert_eq!(
            pair.read(0, Side::CrossAttention).expect("submitted").expect("written").0.shape(),
            [1, 2, 6, 4]
        );
    }
}

/// A view that was taken before the pass was lost shows what is not there.
#[test]
fn attention_over_a_lost_pass_is_refused() {
    let gpu = lenient_gpu();
    for mut rig in rigs(&gpu) {
        let token = upload(&gpu, DType::F32, &Block::noise([2, 2, 1, 4], 4, 7));
        let output = upload(&gpu, DType::F32, &Block::noise([2, 2, 1, 4], 4, 8));
        let mut attention = Attention::new(&gpu);
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        let mut pass = encoder.begin_compute_pass(&Default::default());
        let view = rig
            .cache
            .update(&mut pass, &token.view(), &token.view(), 0, APPEND)
            .expect("a valid update");
        attention
            .record(&mut pass, &token.view(), &view, &output.view(), Default::default())
            .expect("nothing is lost yet");
        drop(pass);
        drop(encoder);
        gpu.submit_pass("attention", |pass| {
            let refused =
                attention.record(pass, &token.view(), &view, &output.view(), Default::default());
            assert_eq!(refused, Err(Error::PassDropped { calls: 1 }));
        });
        assert_eq!(rig.cache.view(0).err(), Some(Error::PassDropped { calls: 1 }));
        assert_eq!(rig.cache.get_seq_length(1), Err(Error::PassDropped { calls: 1 }));
    }
}

/// A read-back beside submits of other threads answers with what was recorded, or says what is due.
#[test]
fn reads_beside_a_thread_that_submits() {
    let gpu = lenient_gpu();
    let token = upload(&gpu, DType::F32, &Block::noise([2, 2, 1, 4], 4, 7));
    for mut rig in rigs(&gpu) {
        for delay in [0, 100, 1000, 20_000] {
            let mut encoder = gpu.device().create_command_encoder(&Default::default());
            let mut pass = encoder.begin_compute_pass(&Default::default());
            rig.cache
                .update(&mut pass, &token.view(), &token.view(), 0, APPEND)
                .map(|_| ())
                .expect("a valid update");
            drop(pass);
            let block = Block::noise([2, 2, 1, 4], 4, 7);
            rig.model.update(0, &block, &block, APPEND).expect("the same");
            std::thread::scope(|scope| {
                let gpu = &gpu;
                scope.spawn(move || {
                    std::thread::sleep(std::time::Duration::from_micros(delay));
                    gpu.queue().submit([encoder.finish()]);
                    gpu.device().poll(PollType::Poll).expect("a live device");
                });
                match rig.cache.read(0) {
                    Ok(_) => rig.check("read"),
                    Err(error) => assert!(matches!(error, Error::NotSubmitted { .. }), "{error}"),
                }
            });
            rig.check("submitted");
        }
    }
}
