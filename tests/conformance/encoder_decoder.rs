//! The pair of caches of an encoder-decoder model: which side a call concerns, and that a call which
//! one side refuses changes neither.

use wgpu_kvcache::{
    BatchChange, Cache, CacheOptions, CachePosition, DType, DynamicKVCache, EncoderDecoderCache,
    Error, Gpu, KVCache, Side, StaticKVCache, Stats,
};

use crate::gpu;
use crate::model::{Block, Model};
use crate::rig::{compare, plain_gpu, read_back, upload, with_read_back};
use crate::wait::ReadSide;

/// Self-attention side, cross-attention side.
const SIDES: [Side; 2] = [Side::SelfAttention, Side::CrossAttention];

struct Pair<S, C> {
    gpu: Gpu,
    cache: EncoderDecoderCache<S, C>,
    models: [Model; 2],
    seed: u64,
}

impl<S: KVCache, C: KVCache> Pair<S, C> {
    fn new(gpu: &Gpu, self_side: S, cross_side: C, models: [Model; 2]) -> Self {
        let cache = EncoderDecoderCache::new(self_side, cross_side);
        Self { gpu: gpu.clone(), cache, models, seed: 0 }
    }

    fn update(&mut self, side: Side, layer: usize, shape: [usize; 4]) {
        self.seed += 2;
        let key = Block::noise(shape, 4, self.seed);
        let value = Block::noise(shape, 4, self.seed + 1);
        let [k, v] = [&key, &value].map(|block| upload(&self.gpu, DType::F32, block));
        let append = CachePosition::Append;
        self.gpu
            .submit_pass("update", |pass| {
                let views = (k.view(), v.view());
                self.cache.update(pass, &views.0, &views.1, layer, append, side).map(|_| ())
            })
            .unwrap_or_else(|error| panic!("{error}"));
        let model = &mut self.models[side as usize];
        model.update(layer, &key, &value, append).expect("the model takes it too");
    }

    fn select(&mut self, indices: &[u32]) -> Result<(), Error> {
        self.gpu.submit_pass("select", |pass| self.cache.reorder_cache(pass, indices))
    }

    fn repeat_interleave(&mut self, repeats: usize) -> Result<(), Error> {
        self.gpu.submit_pass("repeat", |pass| self.cache.batch_repeat_interleave(pass, repeats))
    }

    fn check(&self, context: &str) {
        for (side, model) in SIDES.into_iter().zip(&self.models) {
            for layer in 0..2 {
                let context = format!("{context}, {side:?}, layer {layer}");
                let length = self.cache.get_seq_length(layer, side);
                assert_eq!(length, Ok(model.len(layer)), "{context}");
                let view = self.cache.view(layer, side).expect("the layer exists");
                let shapes = view.map(|view| (view.key_shape(), view.value_shape()));
                let expected = model.get(layer);
                let right = expected.as_ref().map(|(key, value)| (key.shape, value.shape));
                assert_eq!(shapes, right, "{context}");
                // Of the pair's statistics, so that a read of one side does not count for the other.
                let get = || self.cache.read(layer, side);
                let got = read_back(|| self.cache.stats(), get, &context).expect("submitted");
                compare(got, expected, &context);
            }
        }
    }

    /// The statistics, but for what `check` itself adds to.
    fn stats(&self) -> Stats {
        with_read_back(self.cache.stats(), 0)
    }
}

fn dynamic() -> Pair<DynamicKVCache, DynamicKVCache> {
    let gpu = gpu();
    let [decoder, encoder] = [0, 1].map(|_| DynamicKVCache::new(&gpu));
    Pair::new(&gpu, decoder, encoder, [Model::dynamic(), Model::dynamic()])
}

#[test]
fn the_encoder_side_is_not_cut() {
    let mut pair = dynamic();
    for layer in 0..2 {
        pair.update(Side::CrossAttention, layer, [2, 2, 9, 4]);
        pair.update(Side::SelfAttention, layer, [2, 2, 6, 4]);
    }
    pair.check("filled");
    pair.cache.crop(5);
    pair.models[0].crop(5);
    pair.check("cropped");
    pair.cache.truncate(3);
    pair.models[0].truncate(3);
    pair.check("truncated");
    pair.update(Side::SelfAttention, 0, [2, 2, 2, 4]);
    pair.check("written on");
}

#[test]
fn batch_operations_concern_both_sides() {
    let mut pair = dynamic();
    pair.update(Side::CrossAttention, 0, [3, 2, 9, 4]);
    pair.update(Side::SelfAttention, 0, [3, 1, 6, 2]);
    pair.update(Side::SelfAttention, 1, [3, 1, 4, 2]);
    for indices in [&[2, 0, 1][..], &[1, 1], &[0, 1, 1, 0]] {
        pair.select(indices).expect("both have these rows");
        pair.models.iter_mut().for_each(|model| model.select(indices).expect("the same"));
        pair.check(&format!("{indices:?}"));
    }
    pair.repeat_interleave(3).expect("there is room");
    pair.models.iter_mut().for_each(|model| model.repeat_interleave(3).expect("the same"));
    pair.check("repeated");
    let sides =
        pair.cache.self_attention_cache().stats() + pair.cache.cross_attention_cache().stats();
    assert_eq!(pair.cache.stats(), sides);
}

#[test]
fn an_index_that_is_bad_for_one_side_changes_neither() {
    for cross_rows in [2, 4] {
        let mut pair = dynamic();
        pair.update(Side::CrossAttention, 0, [cross_rows, 2, 9, 4]);
        pair.update(Side::SelfAttention, 0, [6 - cross_rows, 1, 6, 2]);
        let before = pair.stats();
        for indices in [&[1, 3][..], &[1, 0, 2, 1, 0, 1], &[9], &[]] {
            let refused = pair.select(indices).expect_err("one side has two rows");
            match indices {
                [] => assert_eq!(refused, Error::NoIndices),
                _ => assert!(matches!(refused, Error::IndexOutOfRange { .. }), "{refused}"),
            }
            let prepared = pair.cache.prepare_batch(BatchChange::Select(indices));
            assert_eq!(prepared, Err(refused));
            pair.check(&format!("{cross_rows} rows, {indices:?}"));
            assert_eq!(pair.stats(), before, "{cross_rows} rows, {indices:?}");
        }
        assert_eq!(pair.repeat_interleave(0), Err(Error::ZeroRepeats));
        assert_eq!(pair.stats(), before);
        pair.select(&[1, 0, 1]).expect("both have two rows");
        pair.models.iter_mut().for_each(|model| model.select(&[1, 0, 1]).expect("the same"));
        pair.check("after a good call");
    }
}

/// Memory for the side that would have had room must not stay behind.
#[test]
#[cfg_attr(
    target_arch = "wasm32",
    ignore = "browsers make no device of lower limits than the defaults"
)]
fn no_room_on_one_side_changes_neither() {
    let gpu = plain_gpu(|limits| {
        limits.max_storage_buffer_binding_size = 1 << 20;
        limits.max_buffer_size = 1 << 20;
    });
    for (self_tokens, cross_tokens) in [(10, 600), (600, 10)] {
        let [decoder, encoder] = [0, 1].map(|_| DynamicKVCache::new(&gpu));
        let mut pair = Pair::new(&gpu, decoder, encoder, [Model::dynamic(), Model::dynamic()]);
        pair.update(Side::SelfAttention, 0, [2, 2, self_tokens, 64]);
        pair.update(Side::CrossAttention, 0, [2, 2, cross_tokens, 64]);
        let before = pair.stats();
        let refused = pair.repeat_interleave(2).expect_err("more than a binding");
        assert!(matches!(refused, Error::LayerTooLarge { tokens: 600, .. }), "{refused}");
        let refused = pair.select(&[1, 0, 1, 0]).expect_err("more than a binding");
        assert!(matches!(refused, Error::LayerTooLarge { tokens: 600, .. }), "{refused}");
        assert_eq!(pair.stats(), before);
        pair.check("after what was refused");
        pair.select(&[1, 0]).expect("nothing grows");
        pair.models.iter_mut().for_each(|model| model.select(&[1, 0]).expect("the same"));
        pair.check("after a good call");
        assert_eq!(pair.stats().bytes_allocated, before.bytes_allocated);
    }
}

#[test]
fn the_encoder_memory_is_known_to_be_there() {
    let mut pair = dynamic();
    assert!(!pair.cache.is_updated(0) && !pair.cache.is_updated(7));
    pair.update(Side::SelfAttention, 0, [1, 1, 2, 2]);
    assert!(!pair.cache.is_updated(0), "the decoder's side does not count");
    pair.update(Side::CrossAttention, 1, [1, 1, 2, 2]);
    assert!(!pair.cache.is_updated(0) && pair.cache.is_updated(1) && !pair.cache.is_updated(2));
    let wrong = upload(&pair.gpu, DType::F32, &Block::noise([1, 1, 1, 2], 4, 1));
    let two = CachePosition::PerToken(&[0, 1]);
    let refused = pair.gpu.submit_pass("refused", |pass| {
        pair.cache
            .update(pass, &wrong.view(), &wrong.view(), 0, two, Side::CrossAttention)
            .map(|_| ())
    });
    assert!(refused.is_err() && !pair.cache.is_updated(0), "a refused call does not count");
    pair.cache.crop(1);
    pair.cache.truncate(0);
    assert!(pair.cache.is_updated(1));
    pair.cache.reset();
    assert!(!pair.cache.is_updated(1));
    pair.models.iter_mut().for_each(Model::reset);
    pair.check("reset");
    pair.update(Side::CrossAttention, 1, [2, 1, 2, 4]);
    assert!(pair.cache.is_updated(1));
    pair.check("another shape");
}

#[test]
fn sides_of_different_kinds() {
    let gpu = gpu();
    let models = [Model::dynamic(), Model::fixed(6, 2)];
    let fixed = StaticKVCache::with_options(
        &gpu,
        CacheOptions::default().with_max_cache_len(6).with_num_layers(2),
    )
    .expect("both options");
    let mut pair = Pair::new(&gpu, DynamicKVCache::new(&gpu), fixed, models);
    assert_eq!(pair.cache.get_max_cache_shape(), None);
    pair.update(Side::CrossAttention, 0, [2, 1, 6, 2]);
    pair.update(Side::SelfAttention, 0, [2, 1, 60, 2]);
    pair.check("dynamic and static");
    assert!(matches!(pair.cache.read(2, Side::CrossAttention), Err(Error::LayerOutOfRange { .. })));
    assert_eq!(pair.cache.read(2, Side::SelfAttention), Ok(None));
    pair.cache.self_attention_cache_mut().crop(2);
    pair.models[0].crop(2);
    pair.cache.cross_attention_cache_mut().crop(3);
    pair.models[1].crop(3);
    pair.check("cut side by side");
    let mut shared: Box<dyn Cache> = Box::new(pair.cache);
    gpu.submit_pass("by trait", |pass| shared.reorder_cache(pass, &[1])).expect("two rows");
    let bounded: EncoderDecoderCache<_, DynamicKVCache> = EncoderDecoderCache::new(
        StaticKVCache::with_options(
            &gpu,
            CacheOptions::default().with_max_cache_len(5).with_num_layers(1),
        )
        .expect("both options"),
        DynamicKVCache::new(&gpu),
    );
    assert_eq!(bounded.get_max_cache_shape(), Some(5));
}

/// Memory of one row that all beams share stays as it is, whatever becomes of the batch.
#[test]
fn shared_memory_takes_no_part_in_changes_of_the_batch() {
    let mut pair = dynamic();
    pair.cache = EncoderDecoderCache::dynamic(&pair.gpu).with_shared_memory();
    pair.update(Side::CrossAttention, 0, [1, 2, 9, 4]);
    pair.update(Side::SelfAttention, 0, [1, 2, 3, 4]);
    let [decoder, _] = &mut pair.models;
    let repeated =
        pair.gpu.submit_pass("repeat", |pass| pair.cache.batch_repeat_interleave(pass, 3));
    assert_eq!(repeated, Ok(()));
    decoder.repeat_interleave(3).expect("three beams");
    pair.check("three beams");
    pair.update(Side::SelfAttention, 0, [3, 2, 1, 4]);
    let indices = [2, 0, 0, 1];
    assert_eq!(pair.select(&indices), Ok(()));
    let [decoder, _] = &mut pair.models;
    decoder.select(&indices).expect("rows exist");
    pair.check("four beams");
    // A change that the decoder's side refuses, and memory of two rows: nothing changes.
    assert!(pair.select(&[4]).is_err());
    let two = upload(&pair.gpu, DType::F32, &Block::noise([2, 2, 9, 4], 4, 90));
    let refused = pair.gpu.submit_pass("two rows", |pass| {
        let (view, append) = (two.view(), CachePosition::Append);
        pair.cache.update(pass, &view, &view, 1, append, Side::CrossAttention).map(|_| ())
    });
    assert_eq!(refused, Err(Error::SharedMemory { batch: 2 }));
    pair.check("after refusals");
}

/// Both sides in one file.
#[cfg(all(feature = "safetensors", not(target_arch = "wasm32")))]
mod saved {
    use std::ops::Range;

    use safetensors::SafeTensors;
    use wgpu_kvcache::{PagedKVCache, StoringError};

    use super::*;

    const ALL: Range<usize> = 0..usize::MAX;

    fn fixed(gpu: &Gpu, tokens: usize) -> StaticKVCache {
        let options = CacheOptions::default().with_max_cache_len(tokens).with_num_layers(3);
        StaticKVCache::with_options(gpu, options).expect("options of the kind")
    }

    fn paged(gpu: &Gpu) -> PagedKVCache {
        let options = CacheOptions::default().with_page_tokens(4);
        PagedKVCache::with_options(gpu, options).expect("options of the kind")
    }

    /// Beams over memory, a file of them, and that the file holds what it says.
    fn save<S: KVCache, C: KVCache>(
        gpu: &Gpu,
        own: S,
        memory: C,
    ) -> ([Model; 2], Vec<u8>, Vec<u8>) {
        let mut pair = Pair::new(gpu, own, memory, [Model::dynamic(), Model::dynamic()]);
        pair.update(Side::CrossAttention, 0, [2, 2, 9, 4]);
        pair.update(Side::CrossAttention, 1, [2, 2, 9, 4]);
        pair.update(Side::SelfAttention, 0, [2, 2, 6, 4]);
        pair.repeat_interleave(2).expect("room");
        pair.models.iter_mut().for_each(|model| model.repeat_interleave(2).expect("the same"));
        pair.cache.crop(4);
        pair.models[0].crop(4);
        let bytes = pair.cache.save(ALL).expect("it was submitted");
        assert!(bytes == pollster::block_on(pair.cache.save_async(ALL)).expect("the same"));
        // A reader of the format finds each side's tensors by its name.
        let file = SafeTensors::deserialize(&bytes).expect("a reader of the format");
        let mut names = file.names();
        names.sort_unstable();
        let of = |layer: &str| ["key", "pages", "rows", "value"].map(|it| format!("{layer}.{it}"));
        let layers =
            ["cross_attention.layer.0", "cross_attention.layer.1", "self_attention.layer.0"];
        assert_eq!(names, layers.map(of).concat());
        let one = pair.cache.save(1..2).expect("it was submitted");
        (pair.models, bytes, one)
    }

    /// Both sides are restored, and go on as they would have.
    fn restore<S: KVCache, C: KVCache>(
        gpu: &Gpu,
        (own, memory): (S, C),
        models: &[Model; 2],
        bytes: &[u8],
        context: &str,
    ) {
        let mut pair = Pair::new(gpu, own, memory, models.clone());
        pair.seed = 90;
        gpu.submit_pass("restore", |pass| pair.cache.restore(pass, bytes))
            .unwrap_or_else(|error| panic!("{context}: {error}"));
        pair.check(context);
        let position = pair.cache.get_next_position(0, Side::SelfAttention);
        assert_eq!(position, Ok(6), "{context}");
        assert_eq!([0, 1, 2].map(|it| pair.cache.is_updated(it)), [true, true, false]);
        pair.update(Side::SelfAttention, 0, [4, 2, 1, 4]);
        pair.select(&[3, 1]).expect("both have these rows");
        pair.models.iter_mut().for_each(|it| it.select(&[3, 1]).expect("the same"));
        pair.check(context);
        pair.cache.reset();
        assert!(!pair.cache.is_updated(0), "{context}");
    }

    #[test]
    fn both_sides_go_through_a_file_from_every_kind_into_every_kind() {
        let gpu = gpu();
        let dynamic = || DynamicKVCache::new(&gpu);
        let files = [
            save(&gpu, dynamic(), dynamic()),
            save(&gpu, fixed(&gpu, 20), paged(&gpu)),
            save(&gpu, paged(&gpu), fixed(&gpu, 20)),
        ];
        for (from, (models, bytes, one)) in files.iter().enumerate() {
            let context = format!("file {from}");
            restore(&gpu, (dynamic(), paged(&gpu)), models, bytes, &context);
            restore(&gpu, (fixed(&gpu, 9), dynamic()), models, bytes, &context);
            restore(&gpu, (paged(&gpu), fixed(&gpu, 9)), models, bytes, &context);
            // Layers of a range, of which one holds the memory alone.
            let mut cache = EncoderDecoderCache::dynamic(&gpu);
            gpu.submit_pass("restore", |pass| cache.restore(pass, one)).expect("it fits");
            let lens = SIDES.map(|side| cache.get_seq_length(1, side).expect("a layer"));
            assert_eq!(lens, [0, 9], "{context}");
            assert_eq!([0, 1].map(|it| cache.is_updated(it)), [false, true], "{context}");
        }
    }

    /// What a side refuses leaves both as they were.
    #[test]
    fn sides_that_cannot_be_restored_hold_what_they_held() {
        let mut pair = dynamic();
        let gpu = pair.gpu.clone();
        pair.update(Side::CrossAttention, 0, [2, 2, 9, 4]);
        pair.update(Side::SelfAttention, 0, [2, 2, 6, 4]);
        let bytes = pair.cache.save(ALL).expect("it was submitted");
        let alone = pair.cache.self_attention_cache().save(ALL).expect("it was submitted");
        let is_bad = |error: &Error| matches!(error, Error::Storing(StoringError::BadSave { .. }));
        let refuse = |cache: &mut EncoderDecoderCache, bytes: &[u8]| {
            gpu.submit_pass("refused", |pass| cache.restore(pass, bytes)).expect_err("refused")
        };
        // A file of one cache, a damaged one; a cache of one side that is given both.
        let mut empty = dynamic();
        for bytes in [&alone[..], &bytes[..bytes.len() - 1], b"GGUF"] {
            let error = refuse(&mut empty.cache, bytes);
            assert!(is_bad(&error), "{error}");
            empty.check("refused");
        }
        let mut side = DynamicKVCache::new(&gpu);
        let error =
            gpu.submit_pass("refused", |pass| side.restore(pass, &bytes)).expect_err("sides");
        assert!(is_bad(&error) && error.to_string().contains("EncoderDecoderCache"), "{error}");
        // The memory has too many rows to be shared.
        let mut shared = EncoderDecoderCache::dynamic(&gpu).with_shared_memory();
        let error = refuse(&mut shared, &bytes);
        assert_eq!(error, Error::SharedMemory { batch: 2 });
        // The second side stores another format, or has too few tokens of room: the first holds nothing either.
        let models = [Model::dynamic(), Model::fixed(8, 3)];
        let mut small = Pair::new(&gpu, DynamicKVCache::new(&gpu), fixed(&gpu, 8), models);
        let error = gpu
            .submit_pass("refused", |pass| small.cache.restore(pass, &bytes))
            .expect_err("nine tokens of memory");
        assert!(matches!(error, Error::SequenceTooLong { .. }), "{error}");
        assert!(!small.cache.is_updated(0));
        assert_eq!(SIDES.map(|side| small.cache.get_seq_length(0, side)), [Ok(0), Ok(0)]);
        small.update(Side::SelfAttention, 0, [1, 1, 2, 4]);
        // A side that holds tokens keeps them.
        for side in SIDES {
            let mut held = dynamic();
            held.update(side, 0, [1, 1, 2, 4]);
            let error = refuse(&mut held.cache, &bytes);
            assert!(matches!(error, Error::NotSupported { .. }), "{error}");
            held.check("refused");
            assert_eq!(held.cache.is_updated(0), side == Side::CrossAttention);
        }
        // Memory of one row is shared again.
        let mut one = EncoderDecoderCache::dynamic(&gpu).with_shared_memory();
        let tokens = upload(&gpu, DType::F32, &Block::noise([1, 2, 3, 4], 4, 9));
        gpu.submit_pass("one row", |pass| {
            SIDES.into_iter().try_for_each(|side| {
                let append = CachePosition::Append;
                one.update(pass, &tokens.view(), &tokens.view(), 0, append, side).map(|_| ())
            })
        })
        .expect("room");
        gpu.submit_pass("beams", |pass| one.batch_repeat_interleave(pass, 3)).expect("room");
        let bytes = one.save(ALL).expect("it was submitted");
        gpu.submit_pass("restore", |pass| shared.restore(pass, &bytes)).expect("it fits");
        let rows = SIDES.map(|side| shared.view(0, side).unwrap().expect("tokens").key_shape()[0]);
        assert_eq!(rows, [3, 1]);
    }
}
