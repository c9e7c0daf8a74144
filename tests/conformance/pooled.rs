//! Tensors in memory that an engine allocates itself: ranges of a buffer, heads of a fused tensor, guards, encoders.

use std::sync::Arc;

use wgpu_kvcache::wgpu::{Backend, Buffer, BufferBinding, BufferSize, BufferUsages, PollType};
use wgpu_kvcache::{
    Attention, AttentionOptions, AxisOrder, Cache, CacheOptions, CachePosition, DType,
    DynamicKVCache, Error, Gpu, HeldTensor, KVCache, LayerShape, LayerTensors, PagedKVCache,
    SequenceCache, StaticKVCache, TensorView,
};

use crate::attention::{Random, read, upload};
use crate::model::Block;
use crate::rig::{buffer, read_buffer, same_bits};
use crate::wait::ReadLayer;
use crate::{gpu, kernels_run};

const APPEND: CachePosition<'_> = CachePosition::Append;

/// A pool that holds `values` from its first byte on.
fn pool(gpu: &Gpu, values: &[f32]) -> Buffer {
    let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
    let pool = buffer(gpu, 4 * values.len() as u64, usage);
    gpu.queue().write_buffer(&pool, 0, bytemuck::cast_slice(values));
    pool
}

fn range(buffer: &Buffer, offset: u64, bytes: u64) -> BufferBinding<'_> {
    BufferBinding { buffer, offset, size: BufferSize::new(bytes) }
}

fn floats(gpu: &Gpu, shape: [usize; 4], seed: u64) -> wgpu_kvcache::Tensor {
    let values = Random(seed).floats(shape.iter().product(), 1.0);
    upload(gpu, DType::F32, &values, &shape)
}

/// What a view shows past its binding is another tensor's, and each call refuses it.
#[test]
fn a_view_ends_where_its_binding_does() {
    let gpu = gpu();
    let values = Random(5).floats(1024, 1.0);
    let memory = pool(&gpu, &values);
    let mut cache = DynamicKVCache::new(&gpu);
    let mut attention = Attention::new(&gpu);
    // 48 elements, at bytes 256 to 448 of the pool.
    let bound = range(&memory, 256, 192);
    let view = |order, shape: &[usize]| {
        TensorView::from_binding(bound.clone(), DType::F32, order, shape).expect("a shape")
    };
    let fits = view(AxisOrder::Bthd, &[1, 3, 2, 8]);
    assert_eq!((fits.shape(), fits.offset()), ([1, 2, 3, 8], 256));
    assert_eq!(fits.strides(), [48, 8, 16, 1]);

    let long = view(AxisOrder::Bhtd, &[1, 2, 4, 8]);
    let shifted = fits.with_offset(4);
    let wide = fits.with_strides([48, 24, 12, 1]);
    for (past, needed, offset) in [(long, 256, 0), (shifted, 196, 4), (wide, 4 * (24 + 24 + 8), 0)]
    {
        let own = floats(&gpu, past.shape(), 6);
        for (name, key, value) in [("key", past, own.view()), ("value", own.view(), past)] {
            let error = gpu.submit_pass("past", |pass| {
                cache.update(pass, &key, &value, 0, APPEND).map(|_| ())
            });
            let Err(Error::BufferTooShort { what, needed: n, size, offset: at, .. }) = error else {
                panic!("{name}: {error:?}");
            };
            assert_eq!((what, n, size, at), (name, needed, 192, offset));
        }
    }
    assert_eq!(cache.view(0).expect("a layer that may exist").map(|_| ()), None, "nothing changed");

    // A binding without a size ends with the buffer; one that reaches past the buffer ends there, too.
    let open = BufferBinding { buffer: &memory, offset: 4096 - 192, size: None };
    let beyond = range(&memory, 4096 - 192, 4096);
    for bound in [open, beyond] {
        let view = |shape: &[usize]| {
            TensorView::from_binding(bound.clone(), DType::F32, AxisOrder::Bhtd, shape)
                .expect("a shape")
        };
        let (fits, long) = (view(&[1, 2, 3, 8]), view(&[1, 2, 4, 8]));
        let mut cache = DynamicKVCache::new(&gpu);
        let error = gpu.submit_pass("past", |pass| {
            cache.update(pass, &fits, &fits, 0, APPEND)?;
            cache.update(pass, &long, &long, 0, APPEND).map(|_| ())
        });
        assert!(matches!(error, Err(Error::BufferTooShort { size: 192, .. })), "{error:?}");
        let (key, _) = cache.read(0).expect("read back").expect("written");
        assert!(same_bits(key.bytes(), bytemuck::cast_slice(&values[1024 - 48..])));
    }

    // The same for what attention is given.
    gpu.submit_pass("fill", |pass| cache.update(pass, &fits, &fits, 0, APPEND).map(|_| ()))
        .expect("it fits");
    let layer = cache.view(0).expect("it exists").expect("written");
    let [query, output] = [7, 8].map(|seed| floats(&gpu, [1, 2, 4, 8], seed));
    let unmasked = AttentionOptions::default().unmasked();
    let mask =
        TensorView::from_binding(range(&memory, 0, 44), DType::F32, AxisOrder::Bhtd, &[1, 1, 4, 3]);
    let masked = unmasked.with_mask(mask.expect("a shape"));
    for (what, query, output, options) in [
        ("query", long, output.view(), unmasked),
        ("output", query.view(), long, unmasked),
        ("mask", query.view(), output.view(), masked),
    ] {
        let error = gpu
            .submit_pass("past", |pass| attention.record(pass, &query, &layer, &output, options));
        let is_refused =
            matches!(&error, Err(Error::BufferTooShort { what: it, .. }) if it.contains(what));
        assert!(is_refused, "{what}: {error:?}");
    }
}

/// K and V as heads of one tensor, in either order of axes, somewhere in a pool.
#[test]
fn heads_of_a_fused_tensor_are_read_where_they_lie() {
    let gpu = gpu();
    let [batch, tokens, all, dim] = [2, 3, 7, 4];
    let values = Random(9).floats(64 + batch * tokens * all * dim, 1.0);
    let memory = pool(&gpu, &values);
    for order in [AxisOrder::Bthd, AxisOrder::Bhtd] {
        let shape = match order {
            AxisOrder::Bthd => [batch, tokens, all, dim],
            _ => [batch, all, tokens, dim],
        };
        let bound = BufferBinding { buffer: &memory, offset: 256, size: None };
        let fused = TensorView::from_binding(bound, DType::F32, order, &shape).expect("a shape");
        let [key, value] = [3..5, 5..7].map(|heads| fused.with_heads(heads).expect("its heads"));
        let mut cache = PagedKVCache::new(&gpu);
        gpu.submit_pass("update", |pass| cache.update(pass, &key, &value, 0, APPEND).map(|_| ()))
            .expect("an update");
        let read = cache.read(0).expect("read back").expect("written");
        for (got, first) in [(read.0, 3), (read.1, 5)] {
            let mut expected: Vec<f32> = Vec::new();
            for b in 0..batch {
                for (h, t) in (first..first + 2).flat_map(|h| (0..tokens).map(move |t| (h, t))) {
                    let row = match order {
                        AxisOrder::Bthd => (b * tokens + t) * all + h,
                        _ => (b * all + h) * tokens + t,
                    };
                    expected.extend(&values[64 + row * dim..][..dim]);
                }
            }
            assert!(same_bits(got.bytes(), bytemuck::cast_slice(&expected)), "{order:?}");
        }
        let error = fused.with_heads(5..8).expect_err("there are 7");
        assert!(error.to_string().contains("5..8") && error.to_string().contains('7'), "{error}");
        assert!(matches!(fused.with_heads(7..7), Err(Error::ZeroExtent { .. })));
    }
}

/// A tensor with a guard of its own, and the guard.
fn held(gpu: &Gpu, shape: [usize; 4]) -> (HeldTensor, Arc<()>) {
    let (tensor, guard) = (floats(gpu, shape, 3), Arc::new(()));
    (tensor.view().held_by(Arc::clone(&guard)), guard)
}

/// A call keeps the guards of all that it was given: until its pass has run, or was dropped. A refused call keeps none.
#[test]
#[cfg_attr(target_arch = "wasm32", ignore = "waits for the device")]
fn guards_are_kept_until_the_work_has_run() {
    let gpu = gpu();
    let shapes = [LayerShape { dtype: DType::F32, heads: 2, key_dim: 4, value_dim: 4 }];
    let wait = || {
        gpu.device().poll(PollType::wait_indefinitely()).expect("the device answers");
    };
    for is_dropped in [false, true] {
        let mut attention = Attention::new(&gpu);
        let mut cache = DynamicKVCache::new(&gpu);
        let mut sequences = SequenceCache::new(&gpu, &shapes).expect("a shape");
        let id = sequences.add().expect("room");
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        let mut guards = Vec::new();
        let mut held = |shape| {
            let (tensor, guard) = held(&gpu, shape);
            guards.push(guard);
            tensor
        };
        gpu.encode(&mut encoder, "all calls", |pass| {
            let [key, value] = [(); 2].map(|()| held([1, 2, 5, 4]));
            let view = cache.update(pass, &key.view(), &value.view(), 0, APPEND)?;
            let [query, output] = [(); 2].map(|()| held([1, 2, 5, 4]));
            let mask = held([1, 1, 5, 5]);
            let options = AttentionOptions::default().with_mask(mask.view());
            attention.record(pass, &query.view(), &view, &output.view(), options)?;
            let step = sequences.plan_step(pass, &[(id, 5)])?;
            let [key, value, query, output] = [(); 4].map(|()| held([1, 2, 5, 4]));
            let view = sequences.update(pass, &step, 0, &key.view(), &value.view())?;
            attention.record(pass, &query.view(), &view, &output.view(), Default::default())
        })
        .expect("all calls");
        assert_eq!(guards.len(), 9);
        wait();
        assert!(guards.iter().all(|guard| Arc::strong_count(guard) > 1), "before the submit");
        if is_dropped {
            drop(encoder);
        } else {
            gpu.queue().submit([encoder.finish()]);
            wait();
        }
        let counts: Vec<usize> = guards.iter().map(Arc::strong_count).collect();
        assert_eq!(counts, [1; 9], "dropped: {is_dropped}");
    }

    let (tensor, guard) = held(&gpu, [1, 2, 5, 4]);
    let other = floats(&gpu, [1, 2, 4, 4], 2);
    let mut cache = DynamicKVCache::new(&gpu);
    gpu.submit_pass("refused", |pass| {
        cache.update(pass, &tensor.view(), &other.view(), 0, APPEND).map(|_| ())
    })
    .expect_err("K and V differ");
    drop(tensor);
    assert_eq!(Arc::strong_count(&guard), 1);
}

/// What an engine's encoder holds already is seen by the calls behind it, and what follows sees them.
#[test]
fn calls_stand_in_line_in_an_engines_encoder() {
    let gpu = gpu();
    let values = Random(11).floats(2 * 3 * 4, 1.0);
    let from = pool(&gpu, &values);
    let [memory, output] = [[0.0; 24]; 2].map(|zeros| pool(&gpu, &zeros));
    let shape = [1, 2, 3, 4];
    let [tensor, to] =
        [&memory, &output].map(|it| TensorView::new(it, DType::F32, &shape).expect("a shape"));
    let (mut cache, mut attention) = (DynamicKVCache::new(&gpu), Attention::new(&gpu));
    let mut encoder = gpu.device().create_command_encoder(&Default::default());
    encoder.copy_buffer_to_buffer(&from, 0, &memory, 0, 96);
    let tensors = LayerTensors { query: tensor, key: tensor, value: tensor, output: to };
    gpu.encode(&mut encoder, "layer", |pass| {
        attention.update(pass, &mut cache, 0, &tensors, APPEND, Default::default()).map(|_| ())
    })
    .expect("a layer");
    let copy = pool(&gpu, &[0.0; 24]);
    encoder.copy_buffer_to_buffer(&output, 0, &copy, 0, 96);
    gpu.queue().submit([encoder.finish()]);
    let (key, _) = cache.read(0).expect("read back").expect("written");
    assert!(same_bits(key.bytes(), bytemuck::cast_slice(&values)));
    // The first token of each head sees itself alone.
    let seen: Vec<f32> = bytemuck::pod_collect_to_vec(&read_buffer(&gpu, &copy));
    assert!(!kernels_run() || [0, 12].iter().all(|&at| seen[at..at + 4] == values[at..at + 4]));
}

/// One call gives what two give; and where q or the output does not fit, nothing is written.
#[test]
fn an_update_and_its_attention_in_one_call() {
    let gpu = gpu();
    let options = CacheOptions::default().with_max_cache_len(12).with_num_layers(1);
    let kinds = || -> [Box<dyn KVCache>; 3] {
        [
            Box::new(DynamicKVCache::new(&gpu)),
            Box::new(StaticKVCache::with_options(&gpu, options).expect("its options")),
            Box::new(PagedKVCache::new(&gpu)),
        ]
    };
    let mut attention = Attention::new(&gpu);
    for (mut apart, mut together) in kinds().into_iter().zip(kinds()) {
        for tokens in [5, 1] {
            let [key, value] = [1, 2].map(|seed| floats(&gpu, [2, 2, tokens, 8], seed + 7));
            let query = floats(&gpu, [2, 6, tokens, 8], 21);
            let outputs = [0, 1]
                .map(|_| upload(&gpu, DType::F32, &vec![0.0; 96 * tokens], &[2, 6, tokens, 8]));
            let options = AttentionOptions::default().with_window(3);
            let tensors = LayerTensors {
                query: query.view(),
                key: key.view(),
                value: value.view(),
                output: outputs[1].view(),
            };
            gpu.submit_pass("both", |pass| {
                let view = apart.update(pass, &key.view(), &value.view(), 0, APPEND)?;
                attention.record(pass, &query.view(), &view, &outputs[0].view(), options)?;
                let view =
                    attention.update(pass, together.as_mut(), 0, &tensors, APPEND, options)?;
                assert_eq!(view.key_shape(), apart.view(0)?.expect("written").key_shape());
                Ok::<_, Error>(())
            })
            .expect("both");
            let [first, second] = outputs.each_ref().map(|output| read(&gpu, output));
            assert!(same_bits(bytemuck::cast_slice(&first), bytemuck::cast_slice(&second)));
            let held =
                [&apart, &together].map(|it| it.read(0).expect("read back").expect("written"));
            let [first, second] = held.map(|(key, _)| Block::of(&key));
            assert!(same_bits(&first.bytes, &second.bytes));

            let stats = together.stats();
            let wrong = [
                LayerTensors { query: key.view().with_head_dim(6), ..tensors },
                LayerTensors { output: key.view(), ..tensors },
                LayerTensors { query: query.view().with_heads(0..3).expect("heads"), ..tensors },
            ];
            for tensors in wrong {
                let error = gpu.submit_pass("wrong", |pass| {
                    let cache = together.as_mut();
                    attention.update(pass, cache, 0, &tensors, APPEND, options).map(|_| ())
                });
                assert!(matches!(error, Err(Error::AttentionShape { .. })), "{error:?}");
            }
            // More queries than new tokens, where nothing is written yet and where enough is.
            let long = floats(&gpu, [2, 6, tokens + 1, 8], 22);
            let long = LayerTensors { query: long.view(), output: long.view(), ..tensors };
            let mut empty = DynamicKVCache::new(&gpu);
            for cache in [&mut empty as &mut dyn KVCache, together.as_mut()] {
                let error = gpu.submit_pass("long", |pass| {
                    attention.update(pass, cache, 0, &long, APPEND, options).map(|_| ())
                });
                let is_right = matches!(&error, Err(Error::AttentionShape { reason, remedy, .. })
                    if reason.contains("more queries") && remedy.contains("order of the axes"));
                assert!(is_right, "{error:?}");
            }
            assert_eq!(empty.stats(), Default::default(), "nothing was written");
            let error = gpu.submit_pass("wrong", |pass| {
                let options = options.with_scale(f32::NAN);
                attention.update(pass, together.as_mut(), 0, &tensors, APPEND, options).map(|_| ())
            });
            assert!(matches!(error, Err(Error::AttentionOption { .. })), "{error:?}");
            assert_eq!(together.stats(), stats, "nothing was written");
        }
    }

    let shapes = [LayerShape { dtype: DType::F32, heads: 2, key_dim: 8, value_dim: 8 }];
    let mut caches = [(); 2].map(|()| SequenceCache::new(&gpu, &shapes).expect("a shape"));
    let counts = [3, 1];
    let [key, value] = [1, 2].map(|seed| floats(&gpu, [1, 2, 4, 8], seed + 30));
    let query = floats(&gpu, [1, 6, 4, 8], 33);
    let outputs = [0, 1].map(|_| upload(&gpu, DType::F32, &[0.0; 192], &[1, 6, 4, 8]));
    gpu.submit_pass("steps", |pass| {
        let [mut apart, mut together] = caches.each_mut();
        let steps = [&mut apart, &mut together].map(|cache| {
            let tokens = counts.map(|count| (cache.add().expect("room"), count));
            cache.plan_step(pass, &tokens).expect("room")
        });
        let view = apart.update(pass, &steps[0], 0, &key.view(), &value.view())?;
        attention.record(pass, &query.view(), &view, &outputs[0].view(), Default::default())?;
        let tensors = LayerTensors {
            query: query.view(),
            key: key.view(),
            value: value.view(),
            output: outputs[1].view(),
        };
        let few = LayerTensors { query: value.view().with_head_dim(6), ..tensors };
        let options = AttentionOptions::default();
        let error = attention.update_step(pass, together, &steps[1], 0, &few, options);
        assert!(matches!(error, Err(Error::AttentionShape { .. })), "{error:?}");
        attention.update_step(pass, together, &steps[1], 0, &tensors, options).map(|_| ())
    })
    .expect("steps");
    let [first, second] = outputs.each_ref().map(|output| read(&gpu, output));
    assert!(same_bits(bytemuck::cast_slice(&first), bytemuck::cast_slice(&second)));
}

/// Bind groups keep a pool's buffer alive from the second time on that it comes. `release` lets go of it, and no token is
/// lost.
#[test]
#[cfg_attr(target_arch = "wasm32", ignore = "asks the driver for its memory")]
fn release_lets_go_of_an_engines_buffers() {
    let gpu = gpu();
    let shapes = [LayerShape { dtype: DType::F32, heads: 2, key_dim: 8, value_dim: 8 }];
    let allocated = || {
        gpu.device().poll(PollType::wait_indefinitely()).expect("the device answers");
        gpu.device().generate_allocator_report().map(|report| report.total_allocated_bytes)
    };
    let size: u64 = 64 << 20;
    for is_of_sequences in [false, true] {
        let mut cache = DynamicKVCache::new(&gpu);
        let mut sequences = SequenceCache::new(&gpu, &shapes).expect("a shape");
        let id = sequences.add().expect("room");
        let memory = buffer(&gpu, size, BufferUsages::STORAGE);
        for _ in 0..3 {
            let bound = range(&memory, 1 << 20, 192);
            let view = TensorView::from_binding(bound, DType::F32, AxisOrder::Bhtd, &[1, 2, 3, 8]);
            let view = view.expect("a shape");
            gpu.submit_pass("update", |pass| {
                if is_of_sequences {
                    let step = sequences.plan_step(pass, &[(id, 3)])?;
                    return sequences.update(pass, &step, 0, &view, &view).map(|_| ());
                }
                cache.update(pass, &view, &view, 0, APPEND).map(|_| ())
            })
            .expect("an update");
        }
        drop(memory);
        let kept = allocated();
        cache.release();
        sequences.release();
        let released = allocated();
        let tells = gpu.device().adapter_info().backend == Backend::Vulkan;
        assert!(kept.is_some() || !tells, "Vulkan's allocator tells");
        // Tests beside this one allocate too, but nothing near as large.
        if let Some((kept, released)) = kept.zip(released) {
            assert!(released + size / 2 < kept, "{kept} bytes, then {released}");
        }
        let len = if is_of_sequences {
            sequences.len(id).expect("it lives")
        } else {
            cache.get_seq_length(0).expect("a layer")
        };
        assert_eq!(len, 9);
    }
}
