//! Attention of packed queries over sequences of different length, against f64 and against each sequence alone.

use wgpu_kvcache::wgpu::BufferUsages;
use wgpu_kvcache::{
    Attention, AttentionOptions, CacheOptions, DType, Gpu, LayerShape, SequenceCache, SequenceId,
    TensorView,
};

use crate::attention::{
    BOUND, Case, DTYPES, Form, Lie, Placed, Random, distance, reference, upload,
};
use crate::rig::{buffer, plain_gpu, read_buffer};
use crate::wait::ReadSequence;
use crate::{gpu, kernels_run};

/// Sequences in one step, and the shape of their heads.
#[derive(Clone, Debug)]
struct Batch {
    dtype: DType,
    page: usize,
    heads: usize,
    group: usize,
    dim: usize,
    value_dim: usize,
    is_causal: bool,
    /// Live tokens after the step, and how many of them are new.
    sequences: Vec<(usize, usize)>,
}

impl Batch {
    fn layer(&self) -> LayerShape {
        let Self { dtype, heads, dim: key_dim, value_dim, .. } = *self;
        LayerShape { dtype, heads, key_dim, value_dim }
    }

    fn options(&self) -> AttentionOptions<'static> {
        let options = AttentionOptions::default();
        if self.is_causal { options.causal() } else { options.unmasked() }
    }
}

/// K or V of some tokens of a sequence, [tokens, H, D].
type Rows = Vec<f32>;

fn append(
    gpu: &Gpu,
    cache: &mut SequenceCache,
    batch: &Batch,
    counts: &[(SequenceId, usize)],
    [key, value]: [&Rows; 2],
) -> wgpu_kvcache::Step {
    let Batch { dtype, heads, dim, value_dim, .. } = *batch;
    let total: usize = counts.iter().map(|(_, count)| count).sum();
    let key = upload(gpu, dtype, key, &[1, total, heads, dim]);
    let value = upload(gpu, dtype, value, &[1, total, heads, value_dim]);
    gpu.submit_pass("step", |pass| {
        let step = cache.plan_step(pass, counts)?;
        let key = TensorView::packed(key.buffer(), dtype, [total, heads, dim])?;
        let value = TensorView::packed(value.buffer(), dtype, [total, heads, value_dim])?;
        cache.update(pass, &step, 0, &key, &value)?;
        Ok::<_, wgpu_kvcache::Error>(step)
    })
    .unwrap_or_else(|error| panic!("{batch:?}: {error}"))
}

/// Attention of q [total, Hq, D] over a step: [total, Hq, D of V].
fn attend(
    gpu: &Gpu,
    attention: &mut Attention,
    cache: &SequenceCache,
    step: &wgpu_kvcache::Step,
    (batch, form): (&Batch, Form),
    q: &[f32],
) -> Vec<f32> {
    let heads = batch.heads * batch.group;
    let total = step.total_tokens();
    // Placed takes (B, H, T, D): heads first.
    let by_head = |values: &[f32], dim: usize| -> Vec<f32> {
        let rows = (0..heads).flat_map(|h| (0..total).map(move |t| (t * heads + h) * dim));
        rows.flat_map(|at| values[at..at + dim].to_vec()).collect()
    };
    let query = Placed::new(gpu, form, [1, heads, total, batch.dim], &by_head(q, batch.dim));
    let shape = [1, heads, total, batch.value_dim];
    let output = Placed::new(gpu, form, shape, &vec![f32::NAN; shape.iter().product()]);
    let view = cache.view(step, 0).expect("the latest step");
    gpu.submit_pass("attention", |pass| {
        attention.record(pass, &query.view(), &view, &output.view(), batch.options())
    })
    .unwrap_or_else(|error| panic!("{batch:?}: {error}"));
    let got = output.read(gpu);
    let dim = batch.value_dim;
    let rows = (0..total).flat_map(|t| (0..heads).map(move |h| (h * total + t) * dim));
    rows.flat_map(|at| got[at..at + dim].to_vec()).collect()
}

/// The worst distance from f64, and from the same sequence alone.
fn check(
    gpu: &Gpu,
    attention: &mut Attention,
    batch: &Batch,
    form: Form,
    random: &mut Random,
) -> [f64; 2] {
    let Batch { heads, group, dim, value_dim, .. } = *batch;
    let options = CacheOptions::default().with_page_tokens(batch.page);
    let mut cache = SequenceCache::with_options(gpu, &[batch.layer()], options).expect("options");
    let ids: Vec<SequenceId> =
        batch.sequences.iter().map(|_| cache.add().expect("nothing was lost")).collect();
    // What is there before the step.
    let old: Vec<(SequenceId, usize)> = ids
        .iter()
        .zip(&batch.sequences)
        .filter(|(_, (len, new))| len > new)
        .map(|(&id, (len, new))| (id, len - new))
        .collect();
    if !old.is_empty() {
        let tokens: usize = old.iter().map(|(_, count)| count).sum();
        let key = random.floats(tokens * heads * dim, 1.0);
        let value = random.floats(tokens * heads * value_dim, 1.0);
        append(gpu, &mut cache, batch, &old, [&key, &value]);
    }
    let counts: Vec<(SequenceId, usize)> =
        ids.iter().zip(&batch.sequences).map(|(&id, &(_, new))| (id, new)).collect();
    let total: usize = counts.iter().map(|(_, count)| count).sum();
    let key = random.floats(total * heads * dim, 1.0);
    let value = random.floats(total * heads * value_dim, 1.0);
    let q = random.floats(total * heads * group * dim, 1.0);
    let step = append(gpu, &mut cache, batch, &counts, [&key, &value]);
    let got = attend(gpu, attention, &cache, &step, (batch, form), &q);
    let mut worst = [0.0_f64; 2];
    for (i, (&id, &(len, new))) in ids.iter().zip(&batch.sequences).enumerate() {
        let own = step.tokens(i).expect("a sequence of the step");
        let rows = |values: &[f32], row: usize| values[own.start * row..own.end * row].to_vec();
        let (own_q, own_out) =
            (rows(&q, heads * group * dim), rows(&got, heads * group * value_dim));
        let (k, v) = cache.read(id, 0).expect("it is submitted").expect("it has tokens");
        if !kernels_run() {
            continue;
        }
        assert!(own_out.iter().all(|it| it.is_finite()), "{batch:?}");
        // The reference is in the order (H, T, D).
        let case = Case {
            lie: Lie::Contiguous,
            dtype: batch.dtype,
            batch: 1,
            heads,
            group,
            len,
            tokens: new,
            dim,
            value_dim,
            is_causal: batch.is_causal,
            scale: None,
            forms: [Form::HeadsFirst; 2],
        };
        let by_head = |values: &[f32], dim: usize| -> Vec<f32> {
            let heads = heads * group;
            let rows = (0..heads).flat_map(|h| (0..new).map(move |t| (t * heads + h) * dim));
            rows.flat_map(|at| values[at..at + dim].to_vec()).collect()
        };
        let expected = reference(&case, &by_head(&own_q, dim), &k.to_f32(), &v.to_f32());
        let apart = distance(&by_head(&own_out, value_dim), &expected);
        assert!(apart < BOUND, "{batch:?}, sequence {i}: {apart}");
        worst[0] = worst[0].max(apart);
        // The same tokens once more, alone in a step.
        cache.drop_latest(id, new).expect("it is there");
        let (own_key, own_value) = (rows(&key, heads * dim), rows(&value, heads * value_dim));
        let alone = append(gpu, &mut cache, batch, &[(id, new)], [&own_key, &own_value]);
        let alone = attend(gpu, attention, &cache, &alone, (batch, form), &own_q);
        let alone: Vec<f64> = alone.into_iter().map(f64::from).collect();
        let apart = distance(&own_out, &alone);
        assert!(apart < 1e-6, "{batch:?}, sequence {i} alone: {apart}");
        worst[1] = worst[1].max(apart);
    }
    worst
}

#[test]
fn v_of_ones_gives_ones_whatever_the_lengths() {
    let gpu = gpu();
    let layer = LayerShape { dtype: DType::F32, heads: 1, key_dim: 1, value_dim: 1 };
    let mut cache = SequenceCache::new(&gpu, &[layer]).expect("a layer");
    let mut attention = Attention::new(&gpu);
    let ids = [(); 2].map(|()| cache.add().expect("nothing was lost"));
    let batch = Batch {
        dtype: DType::F32,
        page: 16,
        heads: 1,
        group: 1,
        dim: 1,
        value_dim: 1,
        is_causal: true,
        sequences: vec![(4, 4), (2, 2)],
    };
    let (zeros, ones) = (vec![0.0; 6], vec![1.0; 6]);
    let counts = [(ids[0], 4), (ids[1], 2)];
    let step = append(&gpu, &mut cache, &batch, &counts, [&zeros, &ones]);
    let form = Form::TokensFirst;
    let got = attend(&gpu, &mut attention, &cache, &step, (&batch, form), &zeros);
    if kernels_run() {
        assert_eq!(got, [1.0; 6]);
    }
}

#[test]
fn prefill_pieces_beside_decodes_in_every_type_and_page_size() {
    let gpu = gpu();
    let mut attention = Attention::new(&gpu);
    let mut random = Random(17);
    let sequences = vec![(1, 1), (40, 1), (7, 7), (100, 3), (33, 1), (64, 16), (5, 2)];
    for (number, dtype) in DTYPES.into_iter().enumerate() {
        for page in [1, 4, 16] {
            let form = [Form::HeadsFirst, Form::TokensFirst, Form::Fused][number];
            let sequences = sequences.clone();
            let batch = Batch {
                dtype,
                page,
                heads: 2,
                group: 3,
                dim: 16,
                value_dim: 16,
                is_causal: true,
                sequences,
            };
            check(&gpu, &mut attention, &batch, form, &mut random);
        }
    }
}

#[test]
fn heads_of_other_sizes_and_queries_that_see_all() {
    let gpu = gpu();
    let mut attention = Attention::new(&gpu);
    let mut random = Random(18);
    for (dim, value_dim, is_causal) in [(20, 12, true), (64, 64, false), (2, 6, true)] {
        let batch = Batch {
            dtype: DType::F32,
            page: 4,
            heads: 1,
            group: 2,
            dim,
            value_dim,
            is_causal,
            sequences: vec![(9, 2), (30, 1), (3, 3)],
        };
        check(&gpu, &mut attention, &batch, Form::TokensFirst, &mut random);
    }
}

/// `KV_SEQUENCES=N` runs so many random batches.
#[test]
fn random_batches_of_up_to_33_sequences_of_up_to_5000_tokens() {
    let gpu = gpu();
    let mut attention = Attention::new(&gpu);
    let mut random = Random(19);
    let batches = std::env::var("KV_SEQUENCES").map_or(6, |count| {
        count.parse().unwrap_or_else(|_| panic!("KV_SEQUENCES is no number: {count}"))
    });
    for _ in 0..batches {
        // Lengths of every size are as likely: most are short, and some very long.
        let count = 1 + random.below(33);
        let sequences = (0..count)
            .map(|_| {
                let most = [1, 8, 60, 500, 5000][random.below(5)];
                let len = 1 + random.below(most);
                let new = if random.below(3) == 0 { 1 + random.below(len.min(40)) } else { 1 };
                (len, new)
            })
            .collect();
        let batch = Batch {
            dtype: DType::F32,
            page: [4, 16][random.below(2)],
            heads: 1 + random.below(2),
            group: 1 + random.below(3),
            dim: 16,
            value_dim: 16,
            is_causal: true,
            sequences,
        };
        check(&gpu, &mut attention, &batch, Form::TokensFirst, &mut random);
    }
}

/// q and the output in one buffer, near one another and too far apart for one binding: as with a buffer each.
#[test]
fn packed_queries_and_outputs_in_one_buffer() {
    // Bindings of 4 MiB, buffers of 16.
    let gpu = plain_gpu(|limits| {
        limits.max_storage_buffer_binding_size = 4 << 20;
        limits.max_buffer_size = 16 << 20;
    });
    let layer = LayerShape { dtype: DType::F32, heads: 1, key_dim: 8, value_dim: 8 };
    let mut cache = SequenceCache::new(&gpu, &[layer]).expect("a layer");
    let mut attention = Attention::new(&gpu);
    let mut random = Random(23);
    let batch = Batch {
        dtype: DType::F32,
        page: 16,
        heads: 1,
        group: 2,
        dim: 8,
        value_dim: 8,
        is_causal: true,
        sequences: Vec::new(),
    };
    // One sequence that is split, beside short ones.
    let ids = [(); 3].map(|()| cache.add().expect("nothing was lost"));
    for _ in 0..4 {
        let kv = random.floats(700 * 8, 1.0);
        append(&gpu, &mut cache, &batch, &[(ids[0], 700)], [&kv, &kv]);
    }
    let kv = random.floats(8 * 8, 1.0);
    let counts = [(ids[0], 1), (ids[1], 5), (ids[2], 2)];
    let step = append(&gpu, &mut cache, &batch, &counts, [&kv, &kv]);
    let q = random.floats(8 * 2 * 8, 1.0);
    let expected = attend(&gpu, &mut attention, &cache, &step, (&batch, Form::TokensFirst), &q);
    let view = cache.view(&step, 0).expect("the latest step");
    for far in [1024, 8 << 20] {
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
        let pool = buffer(&gpu, 12 << 20, usage);
        gpu.queue().write_buffer(&pool, 0, bytemuck::cast_slice(&q));
        let packed = TensorView::packed(&pool, DType::F32, [8, 2, 8]).expect("a shape");
        gpu.submit_pass("attention", |pass| {
            let output = packed.with_offset(far);
            attention.record(pass, &packed, &view, &output, AttentionOptions::default())
        })
        .expect("ranges that do not overlap");
        let far = usize::try_from(far).expect("small");
        let bytes = read_buffer(&gpu, &pool);
        let got: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes[far..far + 4 * q.len()]);
        if kernels_run() {
            let expected: Vec<f64> = expected.iter().copied().map(f64::from).collect();
            let apart = distance(&got, &expected);
            assert!(apart < 1e-6, "{far}: {apart}");
            assert_eq!(bytes[..4 * q.len()], *bytemuck::cast_slice::<f32, u8>(&q), "q stays");
        }
    }
}
