//! q and the output of attention in one buffer, and outputs that lie where they must not.

use wgpu_kvcache::wgpu::{Buffer, BufferUsages};
use wgpu_kvcache::{
    Attention, AttentionOptions, CacheOptions, CachePosition, DType, DynamicKVCache, Error, Gpu,
    KVCache, PagedKVCache, StaticKVCache, TensorView,
};

use crate::attention::{Case, Form, Lie, Placed, Random, filled, lies_and_dtypes};
use crate::rig::{buffer, plain_gpu, read_buffer, same_bits};
use crate::wait::ReadLayer;
use crate::{gpu, kernels_run, shared_plain_gpu};

const HEADS: usize = 2;
const GROUP: usize = 3;

fn case(lie: Lie, dtype: DType, len: usize, tokens: usize, dim: usize) -> Case {
    Case {
        lie,
        dtype,
        batch: 2,
        heads: HEADS,
        group: GROUP,
        len,
        tokens,
        dim,
        value_dim: dim,
        is_causal: true,
        scale: None,
        forms: [Form::HeadsFirst; 2],
    }
}

fn layer(gpu: &Gpu, case: &Case) -> Box<dyn KVCache> {
    let count = case.batch * case.heads * case.len * case.dim;
    let values = || Random(41).floats(count, 1.0);
    filled(gpu, case, &values(), &values())
}

/// A buffer of f32 that holds nothing but `values` from element `at` on.
fn pool(gpu: &Gpu, elements: usize) -> Buffer {
    let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
    buffer(gpu, 4 * elements as u64, usage)
}

/// Where q and the output lie in one buffer: offsets in elements, and strides.
#[derive(Clone, Copy, Debug)]
struct Pooled {
    elements: usize,
    offsets: [usize; 2],
    strides: [[usize; 4]; 2],
}

/// What a call gives whose q and output lie in one buffer, and what one gives with a buffer for each.
fn check(gpu: &Gpu, attention: &mut Attention, case: &Case, cache: &dyn KVCache, at: Pooled) {
    let [shape, _] = case.shapes();
    let q = Random(43).floats(shape.iter().product(), 1.0);
    let apart = [
        Placed::new(gpu, Form::HeadsFirst, shape, &q),
        Placed::new(gpu, Form::HeadsFirst, shape, &vec![-7.0; q.len()]),
    ];
    let shared = pool(gpu, at.elements);
    let places = |which: usize| {
        let [b, h, t, d] = shape;
        let [sb, sh, st, _] = at.strides[which];
        let mut places = Vec::new();
        for i in 0..b * h * t {
            let row = at.offsets[which] + i / (h * t) * sb + i / t % h * sh + i % t * st;
            places.extend(row..row + d);
        }
        places
    };
    let mut content = vec![-7.0_f32; at.elements];
    for (place, &element) in places(0).into_iter().zip(&q) {
        content[place] = element;
    }
    gpu.queue().write_buffer(&shared, 0, bytemuck::cast_slice(&content));
    let [query, output] = [0, 1].map(|which| {
        TensorView::new(&shared, DType::F32, &shape)
            .expect("a shape")
            .with_offset(4 * at.offsets[which] as u64)
            .with_strides(at.strides[which])
    });
    let view = cache.view(0).expect("it exists").expect("it was written");
    gpu.submit_pass("attention", |pass| {
        let options = AttentionOptions::default();
        attention.record(pass, &apart[0].view(), &view, &apart[1].view(), options)?;
        attention.record(pass, &query, &view, &output, options)
    })
    .unwrap_or_else(|error| panic!("{case:?}, {at:?}: {error}"));
    let results = apart[1].read(gpu);
    for (place, result) in places(1).into_iter().zip(results) {
        content[place] = result;
    }
    // q, and what lies between, is as it was.
    let got = read_buffer(gpu, &shared);
    assert!(same_bits(&got, bytemuck::cast_slice(&content)), "{case:?}, {at:?}");
}

/// The strides of a (B, H, T, D) and of a (B, T, H, D) tensor whose rows have `columns` elements.
fn strides([_, h, t, d]: [usize; 4], columns: usize) -> [[usize; 4]; 2] {
    [[h * t * d, t * d, d, 1], [t * columns, d, columns, 1]]
}

#[test]
fn ranges_and_columns_of_one_buffer() {
    let gpus = [gpu(), shared_plain_gpu()];
    let mut attention = gpus.each_ref().map(Attention::new);
    // Each layout and each type, and not all pairs: each pair is a kernel to compile.
    for (number, (lie, dtype)) in lies_and_dtypes().into_iter().step_by(4).enumerate() {
        // The last is split, so that two dispatches take part.
        for (len, tokens, dim) in [(1, 1, 16), (9, 3, 20), (9, 2, 256), (2100, 1, 16)] {
            let gpu = &gpus[number % 2];
            let case = case(lie, dtype, len, tokens, dim);
            let cache = layer(gpu, &case);
            let shape = case.shapes()[0];
            let count: usize = shape.iter().product();
            let row = HEADS * GROUP * dim;
            let [first, _] = strides(shape, row);
            let [_, fused] = strides(shape, 2 * row + 8);
            let rows = shape[0] * shape[2] * (2 * row + 8);
            for at in [
                // One after the other, the other way round, and columns of the same rows.
                Pooled { elements: 2 * count, offsets: [0, count], strides: [first; 2] },
                Pooled { elements: 2 * count + 4, offsets: [count + 4, 1], strides: [first; 2] },
                Pooled { elements: rows, offsets: [0, row + 4], strides: [fused; 2] },
                Pooled { elements: rows, offsets: [row + 8, 4], strides: [fused; 2] },
            ] {
                check(gpu, &mut attention[number % 2], &case, cache.as_ref(), at);
            }
        }
    }
}

/// A pool larger than the device binds at once: near one another both are bound in one window, and far apart
/// the results go through another buffer.
#[test]
fn ranges_of_a_buffer_larger_than_a_binding() {
    let gpu = plain_gpu(|limits| limits.max_storage_buffer_binding_size = 1 << 20);
    let mut attention = Attention::new(&gpu);
    let elements = 1 << 20;
    for (len, tokens) in [(1, 1), (9, 3), (2100, 1)] {
        let case = case(Lie::Contiguous, DType::F32, len, tokens, 16);
        let cache = layer(&gpu, &case);
        let shape = case.shapes()[0];
        let count: usize = shape.iter().product();
        let [first, _] = strides(shape, 0);
        for offsets in [
            [0, count],
            [elements - count, elements - 3 * count],
            [0, elements - count],
            [elements - count, 4],
            [elements / 2, elements / 2 + 100_000],
        ] {
            let at = Pooled { elements, offsets, strides: [first; 2] };
            check(&gpu, &mut attention, &case, cache.as_ref(), at);
        }
    }
}

/// The error of a call in a pass that is submitted all the same.
fn refused(
    gpu: &Gpu,
    query: &TensorView<'_>,
    cache: &dyn KVCache,
    output: &TensorView<'_>,
    options: AttentionOptions<'_>,
) -> Error {
    let view = cache.view(0).expect("it exists").expect("it was written");
    let mut attention = Attention::new(gpu);
    gpu.submit_pass("refused", |pass| attention.record(pass, query, &view, output, options))
        .expect_err("it must be refused")
}

#[test]
fn an_output_that_overlaps_the_query() {
    let gpu = gpu();
    let case = case(Lie::Contiguous, DType::F32, 9, 2, 8);
    let cache = layer(&gpu, &case);
    let shape = case.shapes()[0];
    let count: usize = shape.iter().product();
    let shared = pool(&gpu, 4 * count);
    let before = read_buffer(&gpu, &shared);
    let plain = TensorView::new(&shared, DType::F32, &shape).expect("a shape");
    let row = HEADS * GROUP * 8;
    let [_, fused] = strides(shape, 2 * row);
    for (query, output) in [
        (plain, plain),
        (plain, plain.with_offset(4)),
        (plain.with_offset(4 * count as u64 - 4), plain),
        (plain.with_strides(fused), plain.with_strides(fused).with_offset(4 * row as u64 - 4)),
        (plain.with_strides(fused), plain.with_offset(8)),
    ] {
        let error = refused(&gpu, &query, cache.as_ref(), &output, Default::default());
        assert!(matches!(error, Error::OutputOverlapsQuery { .. }), "{error:?}");
    }
    assert_eq!(read_buffer(&gpu, &shared), before, "written all the same");
}

#[test]
fn an_output_whose_elements_overlap() {
    let gpu = gpu();
    let case = case(Lie::Contiguous, DType::F32, 9, 3, 8);
    let cache = layer(&gpu, &case);
    let shape @ [_, h, t, d] = case.shapes()[0];
    let query = Placed::new(&gpu, Form::HeadsFirst, shape, &vec![1.0; shape.iter().product()]);
    let to = pool(&gpu, 4096);
    let before = read_buffer(&gpu, &to);
    let output = TensorView::new(&to, DType::F32, &shape).expect("a shape");
    for strides in [
        [h * t * d, t * d, d - 1, 1],
        [h * t * d, d, d, 1],
        [t * d, t * d, d, 1],
        [4, t * d, d, 1],
        [h * t * d, 12, 20, 1],
    ] {
        let output = output.with_strides(strides);
        let error = refused(&gpu, &query.view(), cache.as_ref(), &output, Default::default());
        assert!(matches!(error, Error::AttentionShape { what: "output", .. }), "{error:?}");
        assert!(error.to_string().contains("in one place"), "{error}");
    }
    assert_eq!(read_buffer(&gpu, &to), before, "written all the same");
    // Odd strides with which none overlap are served: six heads 50 apart, and three tokens 16 apart.
    let output = output.with_strides([400, 50, 16, 1]);
    let view = cache.view(0).expect("it exists").expect("it was written");
    gpu.submit_pass("served", |pass| {
        Attention::new(&gpu).record(pass, &query.view(), &view, &output, Default::default())
    })
    .expect("no two elements share a place");
}

#[test]
fn an_output_in_a_buffer_of_any_cache() {
    let gpu = gpu();
    let case = case(Lie::Contiguous, DType::F32, 9, 2, 8);
    let cache = layer(&gpu, &case);
    let shape = case.shapes()[0];
    let query = Placed::new(&gpu, Form::HeadsFirst, shape, &vec![1.0; shape.iter().product()]);
    let content = gpu.upload(&vec![5.0_f32; 2 * 64 * 8], &[1, 2, 64, 8]).expect("it fits");
    let others: [Box<dyn KVCache>; 3] = [
        Box::new(DynamicKVCache::new(&gpu)),
        Box::new(
            StaticKVCache::with_options(
                &gpu,
                CacheOptions::default().with_max_cache_len(64).with_num_layers(4),
            )
            .expect("both options"),
        ),
        Box::new(PagedKVCache::new(&gpu)),
    ];
    for mut other in others {
        gpu.submit_pass("fill", |pass| {
            let content = content.view();
            other.update(pass, &content, &content, 3, CachePosition::Append).map(|_| ())
        })
        .expect("it fits");
        let before = other.read(3).expect("it is submitted");
        let view = other.view(3).expect("it exists").expect("it was written");
        let mut buffers = vec![view.key().clone(), view.value().clone()];
        buffers.extend(view.page_table().cloned());
        for buffer in &buffers {
            let output = TensorView::new(buffer, DType::F32, &shape).expect("a shape");
            let error = refused(&gpu, &query.view(), cache.as_ref(), &output, Default::default());
            assert!(matches!(error, Error::OutputIsRead { .. }), "{error:?}");
        }
        assert!(!kernels_run() || before == other.read(3).expect("it is submitted"));
        // What a dropped cache has left is its owner's.
        drop(other);
        let output = TensorView::new(&buffers[0], DType::F32, &shape).expect("a shape");
        let view = cache.view(0).expect("it exists").expect("it was written");
        gpu.submit_pass("served", |pass| {
            Attention::new(&gpu).record(pass, &query.view(), &view, &output, Default::default())
        })
        .unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn a_scale_that_is_no_number() {
    let gpu = gpu();
    let case = case(Lie::Contiguous, DType::F32, 9, 2, 8);
    let cache = layer(&gpu, &case);
    let shape = case.shapes()[0];
    let values = vec![-7.0; shape.iter().product()];
    let [query, output] = [0, 1].map(|_| Placed::new(&gpu, Form::HeadsFirst, shape, &values));
    for scale in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let options = AttentionOptions::default().with_scale(scale);
        let error = refused(&gpu, &query.view(), cache.as_ref(), &output.view(), options);
        assert!(matches!(error, Error::AttentionOption { .. }), "{error:?}");
        assert!(error.to_string().contains(&scale.to_string()), "{error}");
    }
    assert!(output.read(&gpu).iter().all(|&x| x == -7.0), "written all the same");
}

/// A buffer that is too large is refused with its size and the limit, and nobody is told to make a device.
#[test]
fn an_upload_above_the_limit() {
    let gpu = plain_gpu(|limits| {
        limits.max_storage_buffer_binding_size = 1 << 20;
        limits.max_buffer_size = 1 << 20;
    });
    let error = gpu.upload(&vec![0.0_f32; (1 << 18) + 1], &[1, 1, 1, (1 << 18) + 1]);
    let error = error.expect_err("a byte too many");
    let expected = Error::BufferTooLarge {
        label: "kvcache upload".to_owned(),
        bytes: (1 << 20) + 4,
        limit: 1 << 20,
    };
    assert_eq!(error, expected);
    assert!(!error.to_string().contains("lost"), "{error}");
}
