//! Room for a step in all layers at once: afterwards no layer runs out of it, or nothing has changed.

use wgpu_kvcache::wgpu::{Buffer, BufferUsages, ComputePass};
use wgpu_kvcache::{
    BatchChange, Cache, CacheOptions, CachePosition, DType, DynamicKVCache, EncoderDecoderCache,
    Error, KVCache, PagedKVCache, Side, StaticKVCache, Stats, TensorView,
};

use crate::gpu;
use crate::model::Model;
use crate::refusals::{Due, refused};
use crate::rig::{Rig, buffer, plain_gpu};

const APPEND: CachePosition<'_> = CachePosition::Append;
const LAYERS: usize = 8;

fn reserve(rig: &mut Rig, tokens: usize) -> Result<(), Error> {
    let gpu = rig.gpu.clone();
    gpu.submit_pass("reserve", |pass| rig.cache.reserve(pass, tokens))
}

/// Layers of different widths: the seventh is the widest.
fn filled(mut rig: Rig, rows: usize, tokens: usize) -> Rig {
    for layer in 0..LAYERS {
        let dim = if layer == 6 { 64 } else { 4 };
        rig.update(layer, [rows, 1, tokens, dim], dim, APPEND);
    }
    rig
}

fn append(rig: &mut Rig, rows: usize, tokens: usize) {
    for layer in 0..LAYERS {
        let dim = if layer == 6 { 64 } else { 4 };
        rig.update(layer, [rows, 1, tokens, dim], dim, APPEND);
    }
}

fn buffers(rig: &Rig) -> Vec<Buffer> {
    let views = (0..LAYERS).map(|layer| rig.cache.view(layer).unwrap().unwrap());
    views.flat_map(|view| [view.key().clone(), view.value().clone()]).collect()
}

/// The statistics but for what a reserve may change: the memory, and what copying into it took.
fn lengths(stats: Stats) -> (u64, u64) {
    (stats.pages_used, stats.pages_shared)
}

fn rigs() -> Vec<(&'static str, Rig)> {
    let gpu = gpu();
    vec![
        ("dynamic", Rig::dynamic(&gpu)),
        ("static", Rig::fixed(&gpu, 300, LAYERS)),
        ("pages of 1", Rig::paged(&gpu, 1)),
        ("pages of 16", Rig::paged(&gpu, 16)),
        ("a pool", { Rig::in_pages(&gpu, 4, Some(300), Model::dynamic()) }),
    ]
}

#[test]
fn appends_within_what_was_reserved_take_no_memory() {
    for (kind, rig) in rigs() {
        let mut rig = filled(rig, 2, 60);
        rig.crop(50);
        for (step, tokens) in [0, 1, 7, 100].into_iter().enumerate() {
            let context = format!("{kind}, {tokens} tokens");
            let before = lengths(rig.cache.stats());
            reserve(&mut rig, tokens).unwrap_or_else(|error| panic!("{context}: {error}"));
            assert_eq!(lengths(rig.cache.stats()), before, "{context}");
            rig.check(&context);
            let (made, stats) = (buffers(&rig), rig.cache.stats());
            // The same once more is there already.
            reserve(&mut rig, tokens).expect("it is there");
            assert_eq!(rig.cache.stats(), stats, "{context}");
            if step == 2 {
                // Tokens that go make no less room.
                rig.truncate(40);
            }
            for part in [tokens / 2, tokens - tokens / 2] {
                if part > 0 {
                    append(&mut rig, 2, part);
                }
            }
            assert_eq!(buffers(&rig), made, "{context}");
            assert_eq!(rig.cache.stats().bytes_allocated, stats.bytes_allocated, "{context}");
            rig.check(&context);
        }
    }
}

/// Rows that share pages need copies of them with their next token.
#[test]
fn copies_of_shared_pages_are_reserved_as_well() {
    for (tokens, rows, pages) in [(6, 3, 4), (8, 3, 5), (5, 4, 5)] {
        // Six tokens are two pages of four, the second of which two of three rows need a copy of.
        let make = |pages: usize| {
            let mut rig =
                filled(Rig::in_pages(&gpu(), 4, Some(pages), Model::dynamic()), 1, tokens);
            rig.repeat_interleave(rows);
            rig
        };
        let mut rig = make(pages);
        reserve(&mut rig, 1).expect("just enough");
        append(&mut rig, rows, 1);
        rig.check("appended");
        assert_eq!(rig.cache.stats().pages_used, pages as u64);
        let mut rig = make(pages - 1);
        let before = rig.cache.stats();
        let error = reserve(&mut rig, 1).expect_err("one page too few");
        assert!(matches!(error, Error::OutOfPages { .. }), "{error:?}");
        assert_eq!(rig.cache.stats(), before);
        rig.check("after what was refused");
    }
    // Where the pool grows, it grows by the copies, too.
    let mut rig = filled(Rig::paged(&gpu(), 16), 1, 8);
    rig.repeat_interleave(40);
    reserve(&mut rig, 8).expect("room");
    let made = buffers(&rig);
    append(&mut rig, 40, 8);
    assert_eq!(buffers(&rig), made);
    rig.check("forty rows");
}

/// The seventh layer has no room: then no layer has changed.
#[test]
#[cfg_attr(
    target_arch = "wasm32",
    ignore = "browsers make no device of lower limits than the defaults"
)]
fn all_layers_or_none() {
    const LIMIT: u64 = 1 << 20;
    let small = plain_gpu(|limits| {
        limits.max_storage_buffer_binding_size = LIMIT;
        limits.max_buffer_size = LIMIT;
    });
    let grown: [fn(&wgpu_kvcache::Gpu) -> Rig; 3] =
        [Rig::dynamic, |gpu| Rig::paged(gpu, 16), |gpu| Rig::paged(gpu, 1)];
    for make in grown {
        // A row of the widest layer is 256 bytes a token: 4096 tokens fit, in two rows 2048.
        let rig = || filled(make(&small), 2, 100);
        let due: Due = |error| matches!(error, Error::LayerTooLarge { layer: 6, fits: 2048, .. });
        let call = |cache: &mut dyn KVCache, pass: &mut ComputePass<'_>| cache.reserve(pass, 1949);
        let mut asked = rig();
        let before = asked.cache.stats();
        let made = buffers(&asked);
        let gpu = asked.gpu.clone();
        let answer = gpu.submit_pass("refused", |pass| call(asked.cache.as_mut(), pass));
        assert!(answer.as_ref().is_err_and(due), "{answer:?}");
        assert_eq!((asked.cache.stats(), buffers(&asked)), (before, made));
        asked.check("after what was refused");
        reserve(&mut asked, 1948).expect("what is said to fit");
        asked.check("what fits");
    }
    // The same through the common checks.
    let two = || {
        let mut rig = Rig::dynamic(&small);
        rig.update(0, [2, 1, 5, 4], 6, APPEND);
        rig.update(1, [2, 1, 100, 64], 64, APPEND);
        rig
    };
    let due: Due = |error| matches!(error, Error::LayerTooLarge { layer: 1, .. });
    refused(two, "reserve", |cache, pass| cache.reserve(pass, 1949), due, &["2048 tokens"]);
    let bounded = || filled(Rig::fixed(&gpu(), 70, LAYERS), 2, 60);
    let mut rig = bounded();
    let error = reserve(&mut rig, 11).expect_err("past the bound");
    assert_eq!(error, Error::SequenceTooLong { len: 60, new_tokens: 11, bound: 70 });
    reserve(&mut rig, 10).expect("up to the bound");
    let error = reserve(&mut rig, usize::MAX).expect_err("past any count");
    assert!(matches!(error, Error::SequenceTooLong { .. }), "{error:?}");
    let error = reserve(&mut filled(Rig::dynamic(&gpu()), 1, 1), usize::MAX).expect_err("too long");
    assert!(matches!(error, Error::SizeOverflow { .. }), "{error:?}");
}

#[test]
fn reserve_among_other_calls() {
    let gpu = gpu();
    // Nothing written, nothing to do.
    let mut empty = DynamicKVCache::new(&gpu);
    gpu.submit_pass("empty", |pass| empty.reserve(pass, usize::MAX / 2)).expect("no layer");
    assert_eq!(empty.stats(), Stats::default());
    // What was prepared is let go of, and a change of the batch still goes.
    let mut rig = filled(Rig::dynamic(&gpu), 2, 60);
    rig.cache.prepare_batch(BatchChange::Repeat(3)).expect("room");
    reserve(&mut rig, 200).expect("room");
    rig.repeat_interleave(3);
    append(&mut rig, 6, 5);
    rig.check("repeated");
    // Of a pair it is the decoder's side.
    let source = buffer(&gpu, 4096, BufferUsages::STORAGE);
    let view = TensorView::new(&source, DType::F32, &[1, 1, 60, 4]).expect("four extents");
    let mut pair = EncoderDecoderCache::new(
        PagedKVCache::new(&gpu),
        StaticKVCache::with_options(
            &gpu,
            CacheOptions::default().with_max_cache_len(60).with_num_layers(1),
        )
        .expect("both options"),
    );
    gpu.submit_pass("pair", |pass| {
        for side in [Side::SelfAttention, Side::CrossAttention] {
            pair.update(pass, &view, &view, 0, APPEND, side).map(|_| ())?;
        }
        pair.reserve(pass, 500)
    })
    .expect("the encoder's side is full, and stays so");
    let made = pair.view(0, Side::SelfAttention).unwrap().unwrap().key().clone();
    for _ in 0..8 {
        gpu.submit_pass("pair", |pass| {
            pair.update(pass, &view, &view, 0, APPEND, Side::SelfAttention).map(|_| ())
        })
        .expect("room");
    }
    assert_eq!(*pair.view(0, Side::SelfAttention).unwrap().unwrap().key(), made);
}
