//! Attention that is refused, over every kind of view: it says why, and leaves the output as it was.

use wgpu_kvcache::wgpu::BufferUsages;
use wgpu_kvcache::{Attention, AttentionOptions, BitMask, DType, Error, Gpu, KVCache, TensorView};

use crate::attention::{BOUND, Case, Form, Lie, Placed, Random, attend, distance, filled, upload};
use crate::rig::buffer;
use crate::wait::ReadLayer;
use crate::{gpu, kernels_run};

const LIES: [Lie; 3] = [Lie::Contiguous, Lie::Wrapped, Lie::Paged(4)];

/// Two query heads a K/V head, over nine tokens.
fn case(lie: Lie, dtype: DType, dim: usize, value_dim: usize) -> Case {
    Case {
        lie,
        dtype,
        batch: 2,
        heads: 2,
        group: 2,
        len: 9,
        tokens: 1,
        dim,
        value_dim,
        is_causal: true,
        scale: None,
        forms: [Form::HeadsFirst; 2],
    }
}

fn layer(gpu: &Gpu, case: &Case) -> Box<dyn KVCache> {
    let rows = case.batch * case.heads * case.len;
    let [key, value] = [case.dim, case.value_dim].map(|dim| Random(5).floats(rows * dim, 1.0));
    filled(gpu, case, &key, &value)
}

/// An output that holds what no attention would give.
fn untouched(gpu: &Gpu, shape: [usize; 4]) -> Placed {
    Placed::new(gpu, Form::HeadsFirst, shape, &vec![-7.0; shape.iter().product()])
}

/// The error of a call in a pass that is submitted all the same, after which `output` is untouched.
fn refused(
    gpu: &Gpu,
    attention: &mut Attention,
    query: &TensorView<'_>,
    cache: &dyn KVCache,
    output: &Placed,
    change: impl FnOnce(TensorView<'_>) -> TensorView<'_>,
) -> Error {
    let view = cache.view(0).expect("it exists").expect("it was written");
    let to = change(output.view());
    let error = gpu
        .submit_pass("refused", |pass| {
            attention.record(pass, query, &view, &to, Default::default())
        })
        .expect_err("it does not fit");
    assert!(output.read(gpu).iter().all(|&x| x == -7.0), "written all the same: {error}");
    error
}

/// What follows a refusal is right.
fn serves(gpu: &Gpu, attention: &mut Attention, case: &Case, cache: &dyn KVCache) {
    let q = Random(9).floats(case.shapes()[0].iter().product(), 1.0);
    if let Some((got, expected)) = attend(gpu, attention, case, &q, cache) {
        assert!(distance(&got, &expected) < BOUND, "{case:?}");
    }
}

#[test]
fn shapes_that_do_not_fit() {
    let gpu = gpu();
    let mut attention = Attention::new(&gpu);
    for lie in LIES {
        let case = case(lie, DType::F32, 8, 6);
        let cache = layer(&gpu, &case);
        for (query, output, words) in [
            ([1, 4, 1, 8], [1, 4, 1, 6], "differ in batch rows"),
            ([2, 3, 1, 8], [2, 3, 1, 6], "no multiple"),
            ([2, 4, 1, 6], [2, 4, 1, 6], "differ in head_dim"),
            ([2, 4, 1, 8], [2, 4, 1, 8], "output must be"),
            ([2, 4, 2, 8], [2, 4, 1, 6], "output must be"),
            ([2, 4, 10, 8], [2, 4, 10, 6], "every new token"),
        ] {
            let q = untouched(&gpu, query);
            let output = untouched(&gpu, output);
            let error =
                refused(&gpu, &mut attention, &q.view(), cache.as_ref(), &output, |view| view);
            assert!(matches!(error, Error::AttentionShape { .. }), "{lie:?}: {error:?}");
            assert!(error.to_string().contains(words), "{lie:?}: '{words}' is not in '{error}'");
            assert!(error.to_string().contains(&format!("{query:?}")), "{lie:?}: {error}");
        }
        serves(&gpu, &mut attention, &case, cache.as_ref());
    }
}

/// 1024 elements are served, for K as for V, and more are not.
#[test]
fn heads_too_large() {
    let gpu = gpu();
    let mut attention = Attention::new(&gpu);
    for lie in LIES {
        for dtype in [DType::F32, DType::BF16] {
            for (dim, value_dim) in [(1026, 8), (8, 1026), (1028, 1028), (2048, 2048)] {
                let case = case(lie, dtype, dim, value_dim);
                let cache = layer(&gpu, &case);
                let [query, output] = case.shapes().map(|shape| untouched(&gpu, shape));
                let query = query.view();
                let error =
                    refused(&gpu, &mut attention, &query, cache.as_ref(), &output, |view| view);
                assert!(matches!(error, Error::AttentionShape { .. }), "{lie:?}: {error:?}");
                assert!(error.to_string().contains("more than the 1024"), "{lie:?}: {error}");
                assert!(error.to_string().contains("shader of your own"), "{lie:?}: {error}");
            }
            for (dim, value_dim) in [(1024, 8), (8, 1024)] {
                let case = case(lie, dtype, dim, value_dim);
                serves(&gpu, &mut attention, &case, layer(&gpu, &case).as_ref());
            }
        }
    }
}

#[test]
fn types_and_views_that_a_kernel_cannot_take() {
    let gpu = gpu();
    let mut attention = Attention::new(&gpu);
    for lie in LIES {
        let case = case(lie, DType::F16, 8, 6);
        let cache = layer(&gpu, &case);
        let [query, output] = case.shapes().map(|shape| untouched(&gpu, shape));
        let mut refused = |query: &TensorView<'_>, change: fn(TensorView<'_>) -> TensorView<'_>| {
            refused(&gpu, &mut attention, query, cache.as_ref(), &output, change)
        };
        let good = query.view();

        // Two elements of 16 bits share a word, so heads of an odd number would share one.
        let half = upload(&gpu, DType::F16, &[0.5; 64], &[2, 4, 1, 8]);
        let error = refused(&half.view().with_strides([32, 9, 8, 1]), |view| view);
        assert!(matches!(error, Error::Misaligned { what: "query", .. }), "{lie:?}: {error:?}");

        let error = refused(&good.with_offset(2), |view| view);
        assert!(matches!(error, Error::Misaligned { what: "query", .. }), "{lie:?}: {error:?}");
        let error = refused(&good, |view| view.with_offset(2));
        assert!(matches!(error, Error::Misaligned { what: "output", .. }), "{lie:?}: {error:?}");
        let error = refused(&good.with_strides([32, 8, 8, 2]), |view| view);
        assert!(matches!(error, Error::InnerStride { what: "query", .. }), "{lie:?}: {error:?}");
        let error = refused(&good, |view| view.with_strides([24, 6, 6, 2]));
        assert!(matches!(error, Error::InnerStride { what: "output", .. }), "{lie:?}: {error:?}");
        let error = refused(&good.with_offset(4), |view| view);
        assert!(matches!(error, Error::BufferTooShort { what: "query", .. }), "{lie:?}: {error:?}");
        let error = refused(&good, |view| view.with_offset(4));
        assert!(
            matches!(error, Error::BufferTooShort { what: "output", .. }),
            "{lie:?}: {error:?}"
        );
        let unbound = buffer(&gpu, 256, BufferUsages::COPY_DST | BufferUsages::COPY_SRC);
        let unbound = TensorView::new(&unbound, DType::F32, &[2, 4, 1, 8]).expect("a shape");
        let error = refused(&unbound, |view| view);
        assert!(matches!(error, Error::MissingUsage { what: "query" }), "{lie:?}: {error:?}");
        serves(&gpu, &mut attention, &case, cache.as_ref());
    }
}

/// An output in a buffer that is read would be read and written at once.
#[test]
fn an_output_that_is_read() {
    let gpu = gpu();
    let mut attention = Attention::new(&gpu);
    for lie in LIES {
        let case = case(lie, DType::F32, 8, 6);
        let cache = layer(&gpu, &case);
        let before = cache.read(0).expect("it is submitted");
        let view = cache.view(0).expect("it exists").expect("it was written");
        let query = untouched(&gpu, case.shapes()[0]);
        let from = query.view();
        for (what, buffer) in [("query", from.buffer()), ("K", view.key()), ("V", view.value())] {
            let output = TensorView::new(buffer, DType::F32, &case.shapes()[1]).expect("a shape");
            let error = gpu
                .submit_pass("refused", |pass| {
                    attention.record(pass, &from, &view, &output, Default::default())
                })
                .expect_err("it is read");
            if what == "query" {
                // 16 heads, of 8 elements and of 6.
                let (query, output) = (0..256, 0..192);
                assert_eq!(error, Error::OutputOverlapsQuery { query, output }, "{lie:?}");
            } else {
                assert_eq!(error, Error::OutputIsRead { what }, "{lie:?}");
            }
        }
        assert!(query.read(&gpu).iter().all(|&x| x == -7.0), "{lie:?}");
        let after = cache.read(0).expect("it is submitted");
        assert!(!kernels_run() || before == after, "{lie:?}: written all the same");
        serves(&gpu, &mut attention, &case, cache.as_ref());
    }
}

#[test]
fn a_layer_without_tokens() {
    let gpu = gpu();
    let mut attention = Attention::new(&gpu);
    for lie in LIES {
        let case = case(lie, DType::F32, 8, 6);
        let mut cache = layer(&gpu, &case);
        cache.crop(0);
        let [query, output] = case.shapes().map(|shape| untouched(&gpu, shape));
        let query = query.view();
        let error = refused(&gpu, &mut attention, &query, cache.as_ref(), &output, |view| view);
        assert!(error.to_string().contains("no token"), "{lie:?}: {error}");
    }
}

/// Masks, slopes, sinks, starts and numbers that do not fit: each says what and why, and nothing is written.
#[test]
fn options_that_do_not_fit() {
    let gpu = gpu();
    let mut attention = Attention::new(&gpu);
    let ones =
        |shape: [usize; 4]| upload(&gpu, DType::F32, &vec![1.0; shape.iter().product()], &shape);
    for lie in LIES {
        let case = case(lie, DType::F32, 8, 6);
        let cache = layer(&gpu, &case);
        let view = cache.view(0).expect("it exists").expect("it was written");
        let [query, output] = case.shapes().map(|shape| untouched(&gpu, shape));
        let plain = AttentionOptions::default();
        let half = upload(&gpu, DType::F16, &[1.0; 10], &[1, 1, 1, 10]);
        let words = ones([1, 1, 1, 1]);
        let outside = BitMask::new(words.buffer(), [1, 4, 1, 40]);
        let shifted = BitMask::new(words.buffer(), [1, 1, 1, 9]).with_offset(2);
        let masks = [[3, 1, 1, 9], [1, 2, 1, 9], [1, 1, 2, 9]].map(|shape| (ones(shape), shape));
        let mut cases = vec![
            (plain.with_mask(half.view()), "f16"),
            (plain.with_bit_mask(outside), "bit mask"),
            (plain.with_bit_mask(shifted), "bit mask"),
            (plain.with_alibi_slopes(&[0.5; 3][..]), "as many numbers as the query has heads"),
            (plain.with_sink_logits(&[0.5; 5][..]), "as many numbers as the query has heads"),
            (plain.with_alibi_slopes(&[0.5, f32::NAN, 0.0, 0.0][..]), "must be finite"),
            (plain.with_alibi_slopes(&[0.5, f32::NEG_INFINITY, 0.0, 0.0][..]), "must be finite"),
            (plain.with_sink_logits(&[0.5, f32::INFINITY, 0.0, 0.0][..]), "must be finite"),
            (plain.with_row_starts(&[0_u32][..]), "as many starts as there are batch rows"),
            (plain.with_row_starts(&[0_u32, 10][..]), "10"),
            (plain.with_window(0), "window of 1"),
            (plain.with_soft_cap(-1.0), "above zero"),
            (plain.with_scale(f32::NAN), "must be finite"),
        ];
        cases.extend(masks.iter().flat_map(|(mask, shape)| {
            let bits = BitMask::new(mask.buffer(), *shape);
            [
                (plain.with_mask(mask.view()), "(B or 1, Hq or 1"),
                (plain.with_bit_mask(bits), "(B or 1"),
            ]
        }));
        for (options, words) in cases {
            let error = gpu
                .submit_pass("refused", |pass| {
                    attention.record(pass, &query.view(), &view, &output.view(), options)
                })
                .expect_err("it does not fit");
            assert!(error.to_string().contains(words), "{lie:?}: '{words}' is not in '{error}'");
        }
        // A mask in the buffer of the output would be read and written at once.
        let overlapping = TensorView::new(output.view().buffer(), DType::F32, &[1, 1, 1, 9]);
        let error = gpu
            .submit_pass("refused", |pass| {
                let options = plain.with_mask(overlapping?);
                attention.record(pass, &query.view(), &view, &output.view(), options)
            })
            .expect_err("it is written");
        assert_eq!(error, Error::OutputIsRead { what: "the mask" });
        assert!(output.read(&gpu).iter().all(|&x| x == -7.0), "{lie:?}: written all the same");
        serves(&gpu, &mut attention, &case, cache.as_ref());
    }
}
