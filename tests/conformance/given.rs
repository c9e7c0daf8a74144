//! Caches in memory that an engine gives: ranges of its buffers.

use std::sync::Arc;

use wgpu_kvcache::wgpu::{Buffer, BufferBinding, BufferSize, BufferUsages, PollType};
use wgpu_kvcache::{
    Attention, AttentionOptions, Cache, CacheKind, CacheLoad, CacheOptions, CachePlan,
    CachePosition, DType, Error, ErrorKind, Format, Formats, Gpu, KVCache, LayerMemory, LayerShape,
    StaticKVCache, StoringError, TensorView,
};

use crate::attention::{Random, read, upload};
use crate::model::Block;
use crate::rig::{buffer, read_buffer, same_bits};
use crate::wait::ReadLayer;
use crate::{gpu, kernels_run};

const APPEND: CachePosition<'_> = CachePosition::Append;
/// What a pool holds before anything is written to it: a NaN in every type.
const BEFORE: u8 = 0xff;
/// Bytes between two ranges, and before the first one.
const GAP: u64 = 256;

fn index(byte: u64) -> usize {
    usize::try_from(byte).expect("a small pool")
}

/// A buffer of an engine's with ranges for K and V of some layers, and gaps between them.
pub(crate) struct Pool {
    pub(crate) buffer: Option<Buffer>,
    /// First byte and bytes, of K and of V of each layer.
    ranges: Vec<[(u64, u64); 2]>,
}

impl Pool {
    pub(crate) fn new(gpu: &Gpu, bytes: &[[u64; 2]]) -> Self {
        Self::with_usage(gpu, bytes, BufferUsages::STORAGE | BufferUsages::COPY_SRC)
    }

    fn with_usage(gpu: &Gpu, bytes: &[[u64; 2]], usage: BufferUsages) -> Self {
        let mut end = GAP;
        let mut place = |bytes: u64| {
            let begin = end;
            end = (begin + bytes).next_multiple_of(GAP) + GAP;
            (begin, bytes)
        };
        let ranges: Vec<_> = bytes.iter().map(|sides| sides.map(&mut place)).collect();
        let buffer = (!bytes.is_empty()).then(|| {
            let pool = buffer(gpu, end, usage | BufferUsages::COPY_DST);
            gpu.queue().write_buffer(&pool, 0, &vec![BEFORE; index(end)]);
            pool
        });
        Self { buffer, ranges }
    }

    /// The buffer.
    fn all(&self) -> &Buffer {
        self.buffer.as_ref().expect("a pool of some layers")
    }

    fn range(&self, layer: usize, side: usize) -> BufferBinding<'_> {
        let (offset, bytes) = self.ranges[layer][side];
        BufferBinding { buffer: self.all(), offset, size: BufferSize::new(bytes) }
    }

    pub(crate) fn memory(&self, is_value_in_key: bool) -> Vec<LayerMemory> {
        let memory = |layer| match is_value_in_key {
            true => LayerMemory::of_key(self.range(layer, 0)),
            false => LayerMemory::new(self.range(layer, 0), self.range(layer, 1)),
        };
        (0..self.ranges.len()).map(memory).collect()
    }

    /// Asks that nothing was written between the ranges.
    pub(crate) fn check(&self, gpu: &Gpu) {
        let Some(buffer) = &self.buffer else { return };
        let bytes = read_buffer(gpu, buffer);
        let mut from = 0;
        for &(offset, size) in self.ranges.iter().flatten() {
            let gap = &bytes[index(from)..index(offset)];
            assert!(gap.iter().all(|&byte| byte == BEFORE), "bytes {from} to {offset}");
            from = offset + size;
        }
        assert!(bytes[index(from)..].iter().all(|&byte| byte == BEFORE), "from byte {from} on");
    }
}

fn options(tokens: usize) -> CacheOptions<'static> {
    CacheOptions::default().with_max_cache_len(tokens)
}

fn floats(gpu: &Gpu, shape: [usize; 4], seed: u64) -> (wgpu_kvcache::Tensor, Vec<f32>) {
    let values = Random(seed).floats(shape.iter().product(), 1.0);
    (upload(gpu, DType::F32, &values, &shape), values)
}

/// A buffer's live tokens are those of an engine's tensor [B, H, capacity, D], at the byte that the view names.
#[test]
fn live_tokens_are_a_slice_of_the_engines_tensor() {
    let gpu = gpu();
    let ([batch, heads, capacity], dims) = ([2, 3, 10], [8, 4]);
    let bytes = dims.map(|dim| (batch * heads * capacity * dim * 4) as u64);
    let pool = Pool::new(&gpu, &[bytes, bytes]);
    let mut cache =
        StaticKVCache::in_memory(&gpu, options(capacity), &pool.memory(false)).expect("memory");
    assert_eq!(cache.get_max_cache_shape(), Some(capacity));
    let mut expected = vec![vec![vec![0.0_f32; 0]; 2]; 2];
    for layer in [1, 0] {
        let tensors = [0, 1]
            .map(|side| floats(&gpu, [batch, heads, 7, dims[side]], (layer * 2 + side) as u64 + 1));
        let view = gpu
            .submit_pass("update", |pass| {
                let [(key, _), (value, _)] = &tensors;
                cache.update(pass, &key.view(), &value.view(), layer, APPEND)
            })
            .expect("room");
        assert!(view.is_contiguous() && view.start() == 0 && view.capacity() == capacity);
        assert!(view.key() == pool.all() && view.value() == pool.all());
        let offsets = [view.key_offset(), view.value_offset()];
        assert_eq!(offsets, pool.ranges[layer].map(|(offset, _)| offset));
        let [key, value] = [view.key_binding(), view.value_binding()];
        assert_eq!([key.offset, value.offset], offsets);
        assert_eq!([key.size, value.size], bytes.map(BufferSize::new));
        assert!(!view.is_value_in_key());
        expected[layer] = tensors.map(|(_, values)| values).to_vec();
    }
    pool.check(&gpu);
    let all = read_buffer(&gpu, pool.all());
    for layer in [0, 1] {
        for side in [0, 1] {
            let (offset, dim) = (index(pool.ranges[layer][side].0), dims[side]);
            for row in 0..batch * heads {
                let live = &all[offset + row * capacity * dim * 4..][..7 * dim * 4];
                let due = &expected[layer][side][row * 7 * dim..][..7 * dim];
                assert!(same_bits(live, bytemuck::cast_slice(due)), "layer {layer}, row {row}");
            }
        }
        let (key, value) = cache.read(layer).expect("read back").expect("written");
        for (side, got) in [key, value].into_iter().enumerate() {
            assert!(same_bits(got.bytes(), bytemuck::cast_slice(&expected[layer][side])));
        }
    }
    let stats = cache.stats();
    assert_eq!((stats.buffers, stats.bytes_allocated), (4, 2 * bytes.iter().sum::<u64>()));
}

/// A cache in memory that an engine gives answers as one in memory of its own: all formats, K alone, windows, wraps,
/// ragged rows, changes of the batch, attention, and a buffer that cannot be copied from.
#[test]
fn attention_and_content_are_those_of_a_cache_in_its_own_memory() {
    let gpu = gpu();
    let [heads, dim, tokens] = [2, 64, 12];
    let stored = BufferUsages::STORAGE;
    let cases = [
        (Formats::default(), false, None, stored | BufferUsages::COPY_SRC),
        (Formats::default(), false, Some(4), stored),
        (Formats::default(), true, None, stored),
        (Formats::from(Format::Q8_0), false, None, stored | BufferUsages::COPY_SRC),
        (Formats { key: Some(Format::F16), value: Some(Format::Q4_0) }, false, Some(4), stored),
    ];
    for (formats, is_value_in_key, window, usage) in cases {
        let windows = [window];
        let options = options(tokens).with_formats(formats).with_windows(&windows);
        let options = if is_value_in_key { options.with_value_in_key() } else { options };
        let layers = [LayerShape { dtype: DType::F32, heads, key_dim: dim, value_dim: dim }];
        let load = CacheLoad { batch: 3, tokens, chunk: 4 };
        let plan =
            CachePlan::new(CacheKind::Static, &layers, options, load, &gpu.device().limits());
        let bytes = plan.expect("a plan").bytes_of_layers().to_vec();
        assert_eq!(bytes[0][1] == 0, is_value_in_key);
        let pool = Pool::with_usage(&gpu, &bytes, usage);
        let memory = pool.memory(is_value_in_key);
        let given = StaticKVCache::in_memory(&gpu, options, &memory).expect("memory");
        let own = StaticKVCache::with_options(&gpu, options.with_num_layers(1)).expect("options");
        let mut caches = [given, own];
        let mut attention = Attention::new(&gpu);
        let mut seen = Vec::new();
        // Three tokens, a cut, and on until the ring wraps.
        for (step, count) in [3, 1, 4, 1, 4, 2].into_iter().enumerate() {
            let batch = if step < 3 { 2 } else { 3 };
            let shape = [batch, heads, count, dim];
            let [key, value] = [0, 1].map(|side| floats(&gpu, shape, (7 * step + side) as u64).0);
            let query = floats(&gpu, [batch, 2 * heads, count, dim], 99 + step as u64).0;
            let attend = AttentionOptions::default().with_window(window);
            let outputs = caches.each_mut().map(|cache| {
                let zeros = vec![0.0; query.shape().iter().product()];
                let output = upload(&gpu, DType::F32, &zeros, &query.shape());
                let value = if is_value_in_key { key.view() } else { value.view() };
                gpu.submit_pass("step", |pass| {
                    let view = cache.update(pass, &key.view(), &value, 0, APPEND)?;
                    attention.record(pass, &query.view(), &view, &output.view(), attend)?;
                    match step {
                        0 => cache.crop(2),
                        2 => cache.batch_select_indices(pass, &[1, 0, 1])?,
                        3 => cache.reorder_cache(pass, &[2, 0, 0])?,
                        4 if window.is_none() => cache.truncate_rows(&[5, 4, 6])?,
                        _ => {}
                    }
                    Ok::<_, Error>(())
                })
                .expect("a step");
                seen.push(cache.view(0).expect("it is there").expect("written").layout());
                read(&gpu, &output)
            });
            assert!(same_bits(
                bytemuck::cast_slice(&outputs[0]),
                bytemuck::cast_slice(&outputs[1])
            ));
            let [given, own] = caches.each_ref().map(|it| it.read(0).expect("read").expect("held"));
            let [given, own] = [given, own].map(|(k, v)| (Block::of(&k), Block::of(&v)));
            assert!(same_bits(&given.0.bytes, &own.0.bytes), "K, step {step}, {formats:?}");
            assert!(same_bits(&given.1.bytes, &own.1.bytes), "V, step {step}, {formats:?}");
        }
        seen.dedup();
        assert!(seen.len() > 1, "several layouts: {seen:?}");
        if usage.contains(BufferUsages::COPY_SRC) {
            pool.check(&gpu);
        }
        let error = gpu.submit_pass("too many", |pass| caches[0].batch_repeat_interleave(pass, 2));
        let Err(Error::Storing(StoringError::MemoryTooShort { given, needed, batch: 6, .. })) =
            error
        else {
            panic!("{error:?}");
        };
        assert!(bytes[0].contains(&given) && needed == 2 * given);
        let stats = caches[0].stats();
        caches[0].reset();
        assert_eq!(caches[0].stats().bytes_allocated, stats.bytes_allocated);
        assert_eq!(caches[0].stats().bytes_allocated, bytes[0].iter().sum::<u64>());
    }
}

/// After a reset the memory takes a layer of another shape, as long as it fits: a few long heads, or more short ones.
#[test]
fn a_reset_cache_takes_other_shapes_that_fit() {
    let gpu = gpu();
    let pool = Pool::new(&gpu, &[[4 * 4 * 8 * 16; 2]]);
    let mut cache =
        StaticKVCache::in_memory(&gpu, options(8), &pool.memory(false)).expect("memory");
    for shape in [[1, 4, 2, 16], [4, 1, 8, 16], [2, 8, 3, 4], [1, 1, 1, 64], [16, 2, 5, 2]] {
        let (tensor, values) = floats(&gpu, shape, 5);
        gpu.submit_pass("update", |pass| {
            cache.update(pass, &tensor.view(), &tensor.view(), 0, APPEND).map(|_| ())
        })
        .expect("it fits");
        let (key, _) = cache.read(0).expect("read back").expect("written");
        assert!(same_bits(key.bytes(), bytemuck::cast_slice(&values)), "{shape:?}");
        cache.reset();
    }
    let stats = cache.stats();
    for shape in [[5, 1, 1, 16], [1, 5, 1, 16], [1, 1, 1, 80]] {
        let (tensor, _) = floats(&gpu, shape, 5);
        let error = gpu
            .submit_pass("update", |pass| {
                cache.update(pass, &tensor.view(), &tensor.view(), 0, APPEND).map(|_| ())
            })
            .expect_err("no room");
        assert_eq!(error.kind(), ErrorKind::NoRoom);
        let text = error.to_string();
        for part in ["layer 0", "2560 bytes of K", "has 2048", "max_cache_len", "bytes_of_layers"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(cache.stats(), stats);
        assert!(matches!(cache.view(0), Ok(None)));
    }
    pool.check(&gpu);
}

#[test]
fn memory_that_does_not_do_is_refused() {
    let gpu = gpu();
    let usage = BufferUsages::STORAGE | BufferUsages::COPY_DST;
    let pool = buffer(&gpu, 4096, usage);
    let range =
        |offset, bytes| BufferBinding { buffer: &pool, offset, size: BufferSize::new(bytes) };
    let make = |memory: &[LayerMemory], options: CacheOptions<'_>| {
        StaticKVCache::in_memory(&gpu, options, memory).expect_err("refused")
    };
    let right = LayerMemory::new(range(0, 512), range(512, 512));
    // Off the alignment, past the buffer's end, and past all counts.
    for (offset, bytes) in [(4, 512), (1000, 512), (3840, 512), (8192, 512), (u64::MAX - 255, 512)]
    {
        for (side, memory) in [
            ("K", LayerMemory::new(range(offset, bytes), range(0, 512))),
            ("V", LayerMemory::new(range(1024, 512), range(offset, bytes))),
        ] {
            let error =
                make(&[right.clone(), memory.clone()][usize::from(side == "K")..], options(4));
            let Error::Storing(StoringError::MemoryRange { side: of, offset: at, .. }) = error
            else {
                panic!("{error:?}");
            };
            assert_eq!((of, at), (side, offset));
            let text = error.to_string();
            assert!(
                text.contains(&format!("byte {offset}")) && text.contains("multiple"),
                "{text}"
            );
        }
    }
    // A range without a size ends with the buffer; one that begins there is empty.
    let empty = BufferBinding { buffer: &pool, offset: 4096, size: None };
    let error = make(&[LayerMemory::new(empty, range(0, 512))], options(4));
    assert!(
        matches!(error, Error::Storing(StoringError::MemoryRange { size: 0, .. })),
        "{error:?}"
    );
    let rest = BufferBinding { buffer: &pool, offset: 512, size: None };
    let rest = LayerMemory::new(range(0, 512), rest);
    assert!(StaticKVCache::in_memory(&gpu, options(4), std::slice::from_ref(&rest)).is_ok());

    let error = make(&[rest, LayerMemory::new(range(3072, 256), range(3328, 256))], options(4));
    let due = StoringError::MemoryOverlaps { sides: ["V", "K"], layers: [0, 1] };
    assert_eq!(error, Error::Storing(due));
    let twice = LayerMemory::new(range(0, 512), range(256, 512));
    let due = StoringError::MemoryOverlaps { sides: ["K", "V"], layers: [0, 0] };
    assert_eq!(make(&[twice], options(4)), Error::Storing(due));

    let alone = LayerMemory::of_key(range(1024, 512));
    let error = make(&[right.clone(), alone.clone()], options(4));
    assert!(matches!(error, Error::Storing(StoringError::MemorySides { layer: 1, .. })), "{error}");
    assert!(error.to_string().contains("LayerMemory::new"), "{error}");
    let error = make(&[alone, right.clone()], options(4).with_value_in_key());
    assert!(matches!(error, Error::Storing(StoringError::MemorySides { layer: 1, .. })), "{error}");
    assert!(error.to_string().contains("LayerMemory::of_key"), "{error}");

    let error = make(std::slice::from_ref(&right), options(4).with_num_layers(2));
    let due = StoringError::MemoryCount { given: 1, num_layers: 2 };
    assert_eq!(error, Error::Storing(due));
    let error = make(std::slice::from_ref(&right), CacheOptions::default());
    assert!(matches!(error, Error::MissingOption { option: "max_cache_len", .. }), "{error}");
    let unbound = buffer(&gpu, 1024, BufferUsages::COPY_DST);
    let all = BufferBinding { buffer: &unbound, offset: 0, size: None };
    let error = make(&[LayerMemory::new(range(0, 512), all)], options(4));
    assert_eq!(error, Error::MissingUsage { what: "the memory for V" });
    assert!(StaticKVCache::in_memory(&gpu, options(4), &[right]).is_ok());
}

/// A kernel cannot read a buffer that it writes: new K and V, q and the output in the buffer of the memory.
#[test]
fn the_buffer_of_the_memory_is_not_read_and_written_at_once() {
    let gpu = gpu();
    let pool = Pool::new(&gpu, &[[1024; 2], [1024; 2]]);
    let mut cache =
        StaticKVCache::in_memory(&gpu, options(8), &pool.memory(false)).expect("memory");
    let (tokens, _) = floats(&gpu, [1, 2, 3, 16], 1);
    let view = gpu
        .submit_pass("update", |pass| cache.update(pass, &tokens.view(), &tokens.view(), 0, APPEND))
        .expect("room");
    let stats = cache.stats();
    let inside = TensorView::new(pool.all(), DType::F32, &[1, 2, 3, 16]).expect("a shape");
    for (key, value) in [(inside, tokens.view()), (tokens.view(), inside)] {
        for layer in [0, 1] {
            let error = gpu.submit_pass("update", |pass| {
                cache.update(pass, &key, &value, layer, APPEND).map(|_| ())
            });
            assert!(matches!(error, Err(Error::SourceIsCache { layer: l, .. }) if l == layer));
        }
    }
    let mut attention = Attention::new(&gpu);
    let error = gpu.submit_pass("attention", |pass| {
        attention.record(pass, &tokens.view(), &view, &inside, Default::default())
    });
    assert!(matches!(error, Err(Error::OutputIsRead { .. })), "{error:?}");
    assert_eq!(cache.stats(), stats);
    // q is read, as K and V are. Of tokens that no engine has written there, it is what the pool held before.
    let output = upload(&gpu, DType::F32, &[0.0; 96], &[1, 2, 3, 16]);
    let query = inside.with_offset(pool.ranges[0][0].0).with_strides([256, 128, 16, 1]);
    gpu.submit_pass("attention", |pass| {
        attention.record(pass, &query, &view, &output.view(), Default::default())
    })
    .expect("q may lie there");
    assert!(!kernels_run() || read(&gpu, &output).iter().all(|it| it.is_finite()));
}

/// The memory is in use until the cache and its views are dropped, and the work on it has run.
#[test]
#[cfg_attr(target_arch = "wasm32", ignore = "waits for the device")]
fn a_guard_is_kept_until_nothing_uses_the_memory() {
    let gpu = gpu();
    let wait = || {
        gpu.device().poll(PollType::wait_indefinitely()).expect("the device answers");
    };
    let (tokens, _) = floats(&gpu, [1, 2, 3, 16], 1);
    let output = upload(&gpu, DType::F32, &[0.0; 96], &[1, 2, 3, 16]);
    for is_dropped in [false, true] {
        for what in ["update", "attention"] {
            let pool = Pool::new(&gpu, &[[1024; 2]]);
            let guard = Arc::new(());
            let memory = pool.memory(false).pop().expect("one layer");
            let memory = memory.held_by(Arc::clone(&guard));
            let mut cache = StaticKVCache::in_memory(&gpu, options(8), &[memory]).expect("memory");
            let mut encoder = gpu.device().create_command_encoder(&Default::default());
            let update = |cache: &mut StaticKVCache,
                          pass: &mut wgpu_kvcache::wgpu::ComputePass<'_>| {
                cache.update(pass, &tokens.view(), &tokens.view(), 0, APPEND)
            };
            if what == "update" {
                gpu.encode(&mut encoder, "update", |pass| update(&mut cache, pass).map(|_| ()))
                    .expect("room");
                drop(cache);
            } else {
                let view =
                    gpu.submit_pass("before", |pass| update(&mut cache, pass)).expect("room");
                gpu.encode(&mut encoder, "attention", |pass| {
                    let mut attention = Attention::new(&gpu);
                    let [query, output] = [tokens.view(), output.view()];
                    attention.record(pass, &query, &view, &output, Default::default())
                })
                .expect("attention");
                drop(cache);
                wait();
                assert!(Arc::strong_count(&guard) > 1, "a view is there");
                drop(view);
            }
            wait();
            assert!(Arc::strong_count(&guard) > 1, "{what}: before the submit");
            match is_dropped {
                true => drop(encoder),
                false => drop(gpu.queue().submit([encoder.finish()])),
            }
            wait();
            assert_eq!(Arc::strong_count(&guard), 1, "{what}, dropped: {is_dropped}");
        }
    }
}

/// A saved cache is restored into memory that was given, if it fits there.
#[cfg(all(feature = "safetensors", not(target_arch = "wasm32")))]
#[test]
fn what_was_saved_is_restored_into_it() {
    let gpu = gpu();
    let mut from = wgpu_kvcache::DynamicKVCache::new(&gpu);
    let (key, value) = (floats(&gpu, [2, 2, 5, 8], 1).0, floats(&gpu, [2, 2, 5, 4], 2).0);
    gpu.submit_pass("update", |pass| {
        for layer in [0, 1] {
            from.update(pass, &key.view(), &value.view(), layer, APPEND)?;
        }
        Ok::<_, Error>(())
    })
    .expect("room");
    let bytes = from.save(0..2).expect("saved");
    let needed = [2 * 2 * 6 * 8 * 4, 2 * 2 * 6 * 4 * 4];
    let pool = Pool::new(&gpu, &[needed; 2]);
    let memory = pool.memory(false);
    let mut cache = StaticKVCache::in_memory(&gpu, options(6), &memory).expect("memory");
    gpu.submit_pass("restore", |pass| cache.restore(pass, &bytes)).expect("it fits");
    for layer in [0, 1] {
        let [got, due] = [cache.read(layer), from.read(layer)]
            .map(|read| read.expect("read back").expect("written"));
        assert!(same_bits(got.0.bytes(), due.0.bytes()) && same_bits(got.1.bytes(), due.1.bytes()));
        assert!(cache.view(layer).expect("it is there").expect("held").key() == pool.all());
    }
    pool.check(&gpu);

    let few = Pool::new(&gpu, &[needed, [needed[0], needed[1] - 256]]);
    let memory = few.memory(false);
    let mut cache = StaticKVCache::in_memory(&gpu, options(6), &memory).expect("memory");
    let error = gpu.submit_pass("restore", |pass| cache.restore(pass, &bytes));
    let due = StoringError::MemoryTooShort {
        layer: 1,
        side: "V",
        needed: needed[1],
        given: needed[1] - 256,
        batch: 2,
        tokens: 6,
        heads: 2,
    };
    assert_eq!(error, Err(Error::Storing(due)));
    assert!([0, 1].iter().all(|&layer| matches!(cache.view(layer), Ok(None))), "nothing changed");
}
