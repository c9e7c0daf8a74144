//! A layer that needs more than the device binds as one buffer: the error says how many tokens would
//! fit, exactly that many do fit, and nothing has changed.

use wgpu_kvcache::wgpu::BufferUsages;
use wgpu_kvcache::{
    Cache, CacheOptions, CachePosition, DType, DynamicKVCache, Error, Gpu, KVCache, StaticKVCache,
    TensorView,
};

use crate::model::Model;
use crate::refusals::{Due, refused};
use crate::rig::{Rig, buffer, plain_gpu};
use crate::wait::ReadLayer;

const APPEND: CachePosition<'_> = CachePosition::Append;
/// Bytes of a binding and of a buffer.
const LIMIT: u64 = 1 << 20;

/// A token of a row takes 2 heads of 48 elements in f32, 384 bytes: 2730 of them fit, and 256 bytes
/// are left over.
const HEADS: usize = 2;
const DIM: usize = 48;
const FITS: usize = FITS_U32 as usize;
/// The same, as a position is given.
const FITS_U32: u32 = 2730;

fn small_gpu() -> Gpu {
    plain_gpu(|limits| {
        limits.max_storage_buffer_binding_size = LIMIT;
        limits.max_buffer_size = LIMIT;
    })
}

/// One update of `tokens` equal tokens of zeros, from a buffer that holds one of them: the source
/// itself must not meet the limit.
fn update(
    gpu: &Gpu,
    cache: &mut dyn KVCache,
    (batch, dim): (usize, usize),
    tokens: usize,
    position: CachePosition<'_>,
) -> Result<usize, Error> {
    let source = buffer(gpu, 4096, BufferUsages::STORAGE);
    let view = TensorView::new(&source, DType::F32, &[batch, HEADS, tokens, dim])?
        .with_strides([0, dim, 0, 1]);
    gpu.submit_pass("update", |pass| {
        cache.update(pass, &view, &view, 0, position).map(|view| view.len())
    })
}

/// The error's count of tokens that would fit, after a look at the rest of it.
fn fitting(result: Result<usize, Error>, asked: usize) -> usize {
    let error = result.expect_err("more than a binding");
    let Error::LayerTooLarge { needed, limit, tokens, fits, .. } = error else {
        panic!("{error:?}");
    };
    assert_eq!((limit, tokens), (LIMIT, asked));
    assert!(needed > limit);
    let text = error.to_string();
    for word in [
        match needed {
            u64::MAX => "needs more than 2^64 bytes".to_owned(),
            _ => format!("needs {needed} bytes"),
        },
        format!("{asked} tokens"),
        format!("{limit} bytes"),
        format!("{fits} tokens would fit"),
        "or batch rows".into(),
        "max_storage_buffer_binding_size".into(),
    ] {
        assert!(text.contains(&word), "'{word}' is not in '{text}'");
    }
    fits
}

#[test]
#[cfg_attr(
    target_arch = "wasm32",
    ignore = "browsers make no device of lower limits than the defaults"
)]
fn at_the_first_update() {
    let gpu = small_gpu();
    for (batch, dim) in [(1, DIM), (2, DIM), (3, 5), (1, 64), (7, 1)] {
        let right = (1 << 20) / (batch * HEADS * dim * 4);
        for asked in [right + 1, right + 2, 2 * right, 100 * right] {
            let mut cache = DynamicKVCache::new(&gpu);
            let result = update(&gpu, &mut cache, (batch, dim), asked, APPEND);
            assert_eq!(fitting(result, asked), right);
            assert_eq!(cache.stats(), Default::default());
            assert_eq!((cache.get_seq_length(0), cache.read(0)), (Ok(0), Ok(None)));
            let last = CachePosition::At(u32::try_from(asked - 1).expect("small"));
            let result = update(&gpu, &mut cache, (batch, dim), 1, last);
            assert_eq!(fitting(result, asked), right);
            let result = update(&gpu, &mut cache, (batch, dim), right, APPEND);
            assert_eq!(result, Ok(right));
            let result = update(&gpu, &mut cache, (batch, dim), 1, APPEND);
            assert_eq!(fitting(result, right + 1), right);
            let (key, _) = cache.read(0).expect("submitted").expect("written");
            assert_eq!(key.shape(), [batch, HEADS, right, dim]);
        }
    }
}

#[test]
#[cfg_attr(
    target_arch = "wasm32",
    ignore = "browsers make no device of lower limits than the defaults"
)]
fn where_a_layer_grows() {
    let gpu = small_gpu();
    for filled in [1, 100, 1365, 1366, 2000, FITS - 1] {
        let make = || {
            let mut rig = Rig::dynamic(&gpu);
            for _ in 0..filled / 400 {
                rig.update(0, [1, HEADS, 400, DIM], DIM - 1, APPEND);
            }
            if filled % 400 > 0 {
                rig.update(0, [1, HEADS, filled % 400, DIM], DIM - 1, APPEND);
            }
            rig
        };
        let mut rig = make();
        let before = rig.cache.stats();
        let (key, value) = rig.noise(DType::F32, [1, HEADS, 1, DIM], DIM - 1);
        let k = crate::rig::upload(&gpu, DType::F32, &key);
        let v = crate::rig::upload(&gpu, DType::F32, &value);
        for (tokens, position) in [
            (FITS + 1, CachePosition::At(FITS_U32)),
            (FITS + 9, CachePosition::PerToken(&[FITS_U32 + 8])),
            (100 * FITS, CachePosition::At(100 * FITS_U32 - 1)),
        ] {
            let result = gpu.submit_pass("refused", |pass| {
                let view = rig.cache.update(pass, &k.view(), &v.view(), 0, position);
                view.map(|view| view.len())
            });
            assert_eq!(fitting(result, tokens), FITS, "{filled} tokens, {position:?}");
            assert_eq!(rig.cache.stats(), before, "{filled} tokens, {position:?}");
        }
        rig.check(&format!("{filled} tokens, after what was refused"));
        // Exactly as many as were said to fit do, by one step or by many.
        rig.update(0, [1, HEADS, 1, DIM], DIM - 1, APPEND);
        while rig.model.len(0) < FITS {
            let room = (FITS - rig.model.len(0)).min(601);
            rig.update(0, [1, HEADS, room, DIM], DIM - 1, APPEND);
        }
        rig.check(&format!("{filled} tokens, then full"));
        let result = gpu.submit_pass("refused", |pass| {
            rig.cache.update(pass, &k.view(), &v.view(), 0, APPEND).map(|view| view.len())
        });
        assert_eq!(fitting(result, FITS + 1), FITS);
        rig.crop(FITS - 1);
        rig.update(0, [1, HEADS, 1, DIM], DIM - 1, APPEND);
        rig.check("full and cropped");
    }
}

/// A batch of 3 times 1000 tokens is too much; 910 tokens a row are not.
#[test]
#[cfg_attr(
    target_arch = "wasm32",
    ignore = "browsers make no device of lower limits than the defaults"
)]
fn where_a_batch_grows() {
    let gpu = small_gpu();
    for other in [0, 1, 2] {
        // Layer `other` is the large one, and the ones beside it would fit.
        let make = || {
            let mut rig = Rig::dynamic(&gpu);
            for layer in 0..3 {
                if layer == other {
                    for _ in 0..2 {
                        rig.update(layer, [2, HEADS, 300, DIM], 8, APPEND);
                    }
                } else {
                    rig.update(layer, [2, 1, 5, 4], 6, APPEND);
                }
            }
            rig
        };
        let right = (1 << 20) / (6 * HEADS * DIM * 4);
        let mut rig = make();
        for is_selected in [false, true] {
            let before = rig.cache.stats();
            let result = gpu.submit_pass("refused", |pass| {
                if is_selected {
                    rig.cache.batch_select_indices(pass, &[0, 1, 1, 0, 0, 0])
                } else {
                    rig.cache.batch_repeat_interleave(pass, 3)
                }
            });
            let at = matches!(result, Err(Error::LayerTooLarge { layer, batch: 6, .. }) if layer == other);
            assert!(at, "{result:?}");
            assert_eq!(fitting(result.map(|()| 0), 600), right);
            assert_eq!(rig.cache.stats(), before, "large layer {other}, select: {is_selected}");
            rig.check("after what was refused");
            // In the same cache, the tokens that were said to fit do.
            let mut cut = make();
            cut.crop(right);
            if is_selected {
                cut.select(&[0, 1, 1, 0, 0, 0]);
            } else {
                cut.repeat_interleave(3);
            }
            cut.check("cropped to what fits");
        }
        rig.select(&[1, 0]);
        rig.check("a valid call afterwards");
        let due: Due = |error| matches!(error, Error::LayerTooLarge { .. });
        if other != 2 {
            continue;
        }
        // The same through the common checks, on a cache of two layers.
        let two = || {
            let mut rig = Rig::dynamic(&gpu);
            rig.update(0, [2, 1, 5, 4], 6, APPEND);
            rig.update(1, [2, HEADS, 300, DIM], 8, APPEND);
            rig.update(1, [2, HEADS, 300, DIM], 8, APPEND);
            rig
        };
        refused(two, "repeat", |cache, pass| cache.batch_repeat_interleave(pass, 3), due, &[]);
    }
}

#[test]
#[cfg_attr(
    target_arch = "wasm32",
    ignore = "browsers make no device of lower limits than the defaults"
)]
fn static_caches() {
    let gpu = small_gpu();
    for bound in [FITS + 1, 3 * FITS, usize::MAX / 2] {
        let mut cache = StaticKVCache::with_options(
            &gpu,
            CacheOptions::default().with_max_cache_len(bound).with_num_layers(1),
        )
        .expect("both options");
        let result = update(&gpu, &mut cache, (1, DIM), 1, APPEND);
        assert_eq!(fitting(result, bound), FITS);
        assert_eq!(cache.stats(), Default::default());
        assert_eq!((cache.get_seq_length(0), cache.read(0)), (Ok(0), Ok(None)));
    }
    let mut rig = Rig::new(
        &gpu,
        Box::new(
            StaticKVCache::with_options(
                &gpu,
                CacheOptions::default().with_max_cache_len(FITS).with_num_layers(1),
            )
            .expect("both options"),
        ),
        Model::fixed(FITS, 1),
    );
    rig.update(0, [1, HEADS, 600, DIM], 3, APPEND);
    rig.update(0, [1, HEADS, 1, DIM], 3, CachePosition::At(FITS_U32 - 1));
    rig.check("exactly what fits");
    let before = rig.cache.stats();
    rig.crop(2);
    for _ in 0..2 {
        // Few tokens are live, but a row is as long as the bound.
        let repeated =
            gpu.submit_pass("refused", |pass| rig.cache.batch_repeat_interleave(pass, 2));
        assert_eq!(fitting(repeated.map(|()| 0), FITS), FITS / 2);
        let selected = gpu.submit_pass("refused", |pass| rig.cache.reorder_cache(pass, &[0, 0]));
        assert_eq!(fitting(selected.map(|()| 0), FITS), FITS / 2);
        assert_eq!(rig.cache.stats().bytes_allocated, before.bytes_allocated);
        assert_eq!(rig.cache.stats().peak_bytes_allocated, before.peak_bytes_allocated);
        rig.check("after what was refused");
    }
    rig.select(&[0]);
    rig.update(0, [1, HEADS, 3, DIM], 3, APPEND);
    rig.check("valid calls afterwards");
}

/// A view that spans more of its buffer than the device binds.
#[test]
#[cfg_attr(
    target_arch = "wasm32",
    ignore = "browsers make no device of lower limits than the defaults"
)]
fn a_source_larger_than_a_binding() {
    let gpu = plain_gpu(|limits| {
        limits.max_storage_buffer_binding_size = LIMIT;
        limits.max_buffer_size = 4 * LIMIT;
    });
    let pool = buffer(&gpu, 3 * LIMIT, BufferUsages::STORAGE);
    let shape = [2, 1, 1, 4];
    let far = TensorView::new(&pool, DType::F32, &shape)
        .expect("rank 4")
        .with_strides([300_000, 4, 4, 1]);
    let near = far.with_strides([4, 4, 4, 1]).with_offset(2 * LIMIT);
    let make = || {
        let mut rig = Rig::dynamic(&gpu);
        rig.update(0, shape, 4, APPEND);
        rig
    };
    let due: Due = |error| matches!(error, Error::SourceTooLarge { limit: LIMIT, .. });
    let words = ["1048576", "fewer tokens", "max_storage_buffer_binding_size"];
    for (layer, key, value) in [(0, far, near), (2, near, far), (0, far, far)] {
        let call = |cache: &mut dyn KVCache, pass: &mut wgpu_kvcache::wgpu::ComputePass<'_>| {
            cache.update(pass, &key, &value, layer, APPEND).map(|_| ())
        };
        refused(make, "a source of more than a binding", call, due, &words);
    }
}

/// What a cache was made for holds for every shape that a reset lets a layer have.
#[test]
fn a_capacity_that_was_asked_for_after_a_reset() {
    let gpu = small_gpu();
    let shapes = [[1, 1, 1, 4], [2, 1, 1, 4], [1, 1, 1, 16], [1, 3, 1, 2], [7, 1, 1, 1]];
    for (first, second) in shapes.into_iter().flat_map(|first| shapes.map(|second| (first, second)))
    {
        let dynamic = Box::new(
            DynamicKVCache::with_options(&gpu, CacheOptions::default().with_capacity(100))
                .expect("a capacity"),
        ) as Box<dyn KVCache>;
        for cache in [
            dynamic,
            Box::new(
                StaticKVCache::with_options(
                    &gpu,
                    CacheOptions::default().with_max_cache_len(100).with_num_layers(1),
                )
                .expect("both options"),
            ),
        ] {
            let bound = cache.get_max_cache_shape();
            let model = bound.map_or_else(Model::dynamic, |bound| Model::fixed(bound, 1));
            let mut rig = Rig::new(&gpu, cache, model);
            for shape in [first, second, first] {
                let context = format!("{bound:?}: {first:?}, then {second:?}: {shape:?}");
                rig.reset();
                rig.update(0, shape, shape[3], APPEND);
                let shown = |rig: &Rig| {
                    let view = rig.cache.view(0).expect("it exists").expect("it was written");
                    (view.key().clone(), view.value().clone(), view.capacity())
                };
                let made = shown(&rig);
                assert!(made.2 >= 100, "{context}: room for {}", made.2);
                let [b, h, _, d] = shape;
                rig.update(0, [b, h, 99, d], d, APPEND);
                assert_eq!(shown(&rig), made, "{context}");
                rig.check(&context);
            }
        }
    }
}
