//! Where new K and V may lie, in every type: offsets, strides, broadcasts, fused tensors, pools larger
//! than a binding. What `get` gives back is compared bit for bit with plain vectors, on a
//! device with all that the adapter offers and on one with WebGPU's default limits and no feature.

use wgpu_kvcache::wgpu::{Buffer, BufferUsages};
use wgpu_kvcache::{
    CacheOptions, CachePosition, DType, DynamicKVCache, Error, Gpu, KVCache, StaticKVCache,
    TensorView,
};

use crate::model::{Block, Model};
use crate::rig::{Rig, buffer, compare, plain_gpu, upload};
use crate::wait::ReadLayer;
use crate::{gpu, shared_plain_gpu};

pub(crate) const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Parameters travel in two ways, by what the device has; both must come out right.
pub(crate) fn devices() -> [(&'static str, Gpu); 2] {
    [("full device", gpu()), ("plain device", shared_plain_gpu())]
}

/// A buffer that holds `bytes`.
fn pooled(gpu: &Gpu, bytes: &[u8]) -> Buffer {
    let size = bytes.len() as u64;
    let buffer = buffer(gpu, size, BufferUsages::STORAGE | BufferUsages::COPY_DST);
    gpu.queue().write_buffer(&buffer, 0, bytes);
    buffer
}

/// The bytes of a pool, of `elements` elements.
fn noise(elements: usize, dtype: DType, seed: u64) -> Vec<u8> {
    Block::noise([1, 1, 1, elements], dtype.size(), seed).bytes
}

/// A view as the test describes it: where it starts and how it steps, in elements.
#[derive(Clone, Copy, Debug)]
struct Piece {
    offset: usize,
    shape: [usize; 4],
    strides: [usize; 4],
}

impl Piece {
    fn view<'a>(&self, buffer: &'a Buffer, dtype: DType) -> TensorView<'a> {
        TensorView::new(buffer, dtype, &self.shape)
            .expect("a shape of rank 4")
            .with_offset((self.offset * dtype.size()) as u64)
            .with_strides(self.strides)
    }

    /// The same elements, picked from `pool` one by one.
    fn block(&self, pool: &[u8], dtype: DType) -> Block {
        let [b, h, t, d] = self.shape;
        let size = dtype.size();
        let mut bytes = Vec::with_capacity(b * h * t * d * size);
        for index in 0..b * h * t * d {
            let place = [index / d / t / h, index / d / t % h, index / d % t, index % d];
            let steps: usize = place.iter().zip(self.strides).map(|(i, stride)| i * stride).sum();
            bytes.extend(&pool[(self.offset + steps) * size..][..size]);
        }
        Block { shape: self.shape, element: size, bytes }
    }
}

/// Appends K and V from one pool twice, and compares.
fn from_one_pool(elements: usize, key: Piece, value: Piece) {
    for (device, gpu) in devices() {
        for dtype in DTYPES {
            let context = format!("{device}, {dtype}, K {key:?}, V {value:?}");
            let pool = noise(elements, dtype, 7);
            let buffer = pooled(&gpu, &pool);
            let (mut cache, mut model) = (DynamicKVCache::new(&gpu), Model::dynamic());
            for _ in 0..2 {
                let (k, v) = (key.view(&buffer, dtype), value.view(&buffer, dtype));
                gpu.submit_pass("append", |pass| {
                    cache.update(pass, &k, &v, 0, CachePosition::Append).map(|_| ())
                })
                .unwrap_or_else(|error| panic!("{context}: {error}"));
                let (k, v) = (key.block(&pool, dtype), value.block(&pool, dtype));
                model.update(0, &k, &v, CachePosition::Append).expect("shapes that agree");
            }
            compare(cache.read(0).expect("what was submitted"), model.get(0), &context);
        }
    }
}

#[test]
fn tokens_before_heads() {
    for (device, gpu) in devices() {
        for dtype in DTYPES {
            for [b, t, h, d] in [[2, 5, 3, 4], [1, 7, 2, 64], [3, 1, 8, 6], [2, 9, 1, 10]] {
                let context = format!("{device}, {dtype}, (B, T, H, D) {:?}", [b, t, h, d]);
                let lying = |dim| Piece {
                    offset: 0,
                    shape: [b, h, t, dim],
                    strides: [t * h * dim, dim, h * dim, 1],
                };
                let (pools, dims) =
                    ([3, 4].map(|s| noise(b * t * h * (d + 2), dtype, s)), [d, d + 2]);
                let [k, v] = [0, 1].map(|i| pooled(&gpu, &pools[i]));
                let key = TensorView::bthd(&k, dtype, &[b, t, h, d]).expect("rank 4");
                let value = TensorView::bthd(&v, dtype, &[b, t, h, d + 2]).expect("rank 4");
                assert_eq!(key.shape(), [b, h, t, d]);
                let mut cache = StaticKVCache::with_options(
                    &gpu,
                    CacheOptions::default().with_max_cache_len(t + 2).with_num_layers(1),
                )
                .expect("both options");
                gpu.submit_pass("update", |pass| {
                    cache.update(pass, &key, &value, 0, CachePosition::Append).map(|_| ())
                })
                .unwrap_or_else(|error| panic!("{context}: {error}"));
                let [k, v] = [0, 1].map(|i| lying(dims[i]).block(&pools[i], dtype));
                compare(cache.read(0).expect("what was submitted"), Some((k, v)), &context);
            }
        }
    }
}

#[test]
fn slices_of_a_fused_qkv_tensor() {
    // (B, T, query heads + 2 * heads, D), for widths that are whole vectors and that are not.
    for [b, t, query, h, d] in
        [[2, 5, 8, 2, 64], [3, 4, 3, 3, 6], [1, 17, 4, 1, 2], [2, 1, 2, 2, 20]]
    {
        let row = (query + 2 * h) * d;
        let piece = |head: usize| Piece {
            offset: head * d,
            shape: [b, h, t, d],
            strides: [t * row, d, row, 1],
        };
        from_one_pool(b * t * row, piece(query), piece(query + h));
    }
}

#[test]
fn pieces_of_a_pool_at_any_word() {
    for offset in [2, 4, 6, 8, 10, 62, 64, 1030] {
        for d in [2, 4, 8, 12] {
            let [b, h, t] = [2, 3, 4];
            let tight = [h * t * d, t * d, d, 1];
            // Rows, heads and tokens with room between them.
            let loose = [h * (t + 1) * (d + 2) + 6, (t + 1) * (d + 2), d + 2, 1];
            let key = Piece { offset, shape: [b, h, t, d], strides: tight };
            let value = Piece { offset: offset + 2, shape: [b, h, t, d], strides: loose };
            from_one_pool(offset + 2 + b * loose[0], key, value);
        }
    }
}

#[test]
fn axes_in_any_order_and_repeated_ones() {
    let [b, h, t, d] = [3, 2, 5, 4];
    let shape = [b, h, t, d];
    let orders = [
        [h * t * d, t * d, d, 1],
        [d, b * d, h * b * d, 1],
        [t * d, b * t * d, d, 1],
        [0, t * d, d, 1],
        [0, 0, d, 1],
        [h * d, d, 0, 1],
        [0, 0, 0, 1],
        // Windows that overlap.
        [2, 2, 2, 1],
    ];
    for key in orders {
        for value in orders {
            let piece = |offset, strides| Piece { offset, shape, strides };
            from_one_pool(b * h * t * d + 4, piece(0, key), piece(4, value));
        }
    }
}

/// Parameters of one call must not leak into another that runs in the same pass or submit.
#[test]
fn many_calls_in_one_pass_and_many_passes_in_one_submit() {
    for (device, gpu) in devices() {
        for passes in [1, 3] {
            let mut rig = Rig::new(&gpu, Box::new(DynamicKVCache::new(&gpu)), Model::dynamic());
            for round in 0..4 {
                let mut encoders: Vec<_> = (0..passes)
                    .map(|_| gpu.device().create_command_encoder(&Default::default()))
                    .collect();
                for (number, encoder) in encoders.iter_mut().enumerate() {
                    // Two passes in every encoder.
                    for half in 0..2 {
                        let mut pass = encoder.begin_compute_pass(&Default::default());
                        record_all(&mut rig, &mut pass, 10 * round + 2 * number + half);
                    }
                }
                gpu.queue().submit(encoders.into_iter().map(|encoder| encoder.finish()));
                rig.check(&format!("{device}, {passes} encoders, round {round}"));
            }
        }
    }
}

/// Updates of several layers in every form of position, then changes of the batch, all in `pass`.
fn record_all(rig: &mut Rig, pass: &mut wgpu_kvcache::wgpu::ComputePass<'_>, round: usize) {
    for layer in 0..4 {
        let batch = rig.model.batch(layer).max(3);
        let [h, t, d] = [layer + 1, 1 + (round + layer) % 3, 4 << layer];
        let (key, value) = rig.noise(DType::F32, [batch, h, t, d], d + layer);
        let far = u32::try_from(rig.model.len(layer) + 2).expect("short");
        let list: Vec<u32> = (0..).map(|i| far - 3 * i % 2).take(t).collect();
        let rows: Vec<Vec<u32>> =
            (0..).take(batch).map(|row| (far - row % 3..).take(t).collect()).collect();
        let position = match (round + layer) % 4 {
            0 if t == 1 => CachePosition::At(far - 2),
            1 => CachePosition::PerToken(&list),
            2 => CachePosition::PerRow(&rows),
            _ => CachePosition::Append,
        };
        let (k, v) = (upload(&rig.gpu, DType::F32, &key), upload(&rig.gpu, DType::F32, &value));
        rig.cache.update(pass, &k.view(), &v.view(), layer, position).expect("a valid update");
        rig.model.update(layer, &key, &value, position).expect("a valid update");
    }
    rig.crop(40);
    let batch = u32::try_from(rig.model.batch(0)).expect("small");
    let turned: Vec<u32> = (0..batch).map(|row| (row + 1) % batch).collect();
    rig.cache.reorder_cache(pass, &turned).expect("a valid order");
    rig.model.select(&turned).expect("a valid order");
    if round.is_multiple_of(3) {
        rig.cache.batch_repeat_interleave(pass, 2).expect("a valid count");
        rig.model.repeat_interleave(2).expect("a valid count");
        let kept = [batch, 0, 2];
        rig.cache.batch_select_indices(pass, &kept).expect("a valid selection");
        rig.model.select(&kept).expect("a valid selection");
    }
}

/// A pool larger than the device binds at once: only the piece that a view spans is bound.
#[test]
fn a_pool_larger_than_a_binding() {
    let gpu = plain_gpu(|limits| {
        limits.max_storage_buffer_binding_size = 1 << 20;
        limits.max_buffer_size = 4 << 20;
    });
    for dtype in DTYPES {
        let elements = (3 << 20) / dtype.size();
        let pool = noise(elements, dtype, 9);
        let buffer = pooled(&gpu, &pool);
        let [b, h, t, d] = [2, 2, 3, 10];
        let shape = [b, h, t, d];
        let tight = [h * t * d, t * d, d, 1];
        let wide = [100_000, 40_000, 4, 1];
        let last = |strides: [usize; 4]| {
            let steps: usize = shape.iter().zip(strides).map(|(n, stride)| (n - 1) * stride).sum();
            elements - 1 - steps
        };
        let even = |offset: usize| offset / 2 * 2;
        for (key, value) in [
            (
                Piece { offset: 0, shape, strides: tight },
                Piece { offset: 300, shape, strides: wide },
            ),
            (
                Piece { offset: 400_002, shape, strides: wide },
                Piece { offset: even(last(tight)), shape, strides: tight },
            ),
            (
                Piece { offset: even(last(wide)), shape, strides: wide },
                Piece { offset: 2, shape, strides: tight },
            ),
        ] {
            let mut cache = DynamicKVCache::new(&gpu);
            gpu.submit_pass("update", |pass| {
                let (k, v) = (key.view(&buffer, dtype), value.view(&buffer, dtype));
                cache.update(pass, &k, &v, 0, CachePosition::Append).map(|_| ())
            })
            .unwrap_or_else(|error| panic!("{dtype}, {key:?}, {value:?}: {error}"));
            let expected = Some((key.block(&pool, dtype), value.block(&pool, dtype)));
            compare(
                cache.read(0).expect("submitted"),
                expected,
                &format!("{dtype}, {key:?}, {value:?}"),
            );
        }
    }
}

/// Another layer's buffers, and another cache's, are inputs like any other.
#[test]
fn another_layer_as_the_input() -> Result<(), Error> {
    for (device, gpu) in devices() {
        let mut rig = Rig::dynamic(&gpu);
        rig.update(0, [2, 3, 6, 4], 8, CachePosition::Append);
        let view = rig.cache.view(0)?.expect("layer 0 was written");
        let (key, value) = (view.key().clone(), view.value().clone());
        let strides = (view.key_strides(), view.value_strides());
        let first = u64::try_from(view.start()).expect("small");
        let k = TensorView::new(&key, DType::F32, &[2, 3, 6, 4])?.with_strides(strides.0);
        let v = TensorView::new(&value, DType::F32, &[2, 3, 6, 8])?.with_strides(strides.1);
        let (k, v) = (k.with_offset(first * 16), v.with_offset(first * 32));
        gpu.submit_pass("copy", |pass| {
            rig.cache.update(pass, &k, &v, 1, CachePosition::Append).map(|_| ())
        })?;
        let (held_k, held_v) = rig.model.get(0).expect("layer 0 was written");
        rig.model.update(1, &held_k, &held_v, CachePosition::Append).expect("a valid update");
        rig.update(0, [2, 3, 1, 4], 8, CachePosition::Append);
        rig.check(device);
    }
    Ok(())
}
