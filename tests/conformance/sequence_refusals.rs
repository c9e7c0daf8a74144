//! What a cache of sequences refuses; a refusal changes nothing.

use wgpu_kvcache::{
    Attention, CacheOptions, DType, Error, ErrorKind, Gpu, LayerShape, SequenceCache,
    SequenceError, SequenceId, Step, Tensor, TensorView,
};

use crate::wait::ReadSequence;
use crate::{gpu, kernels_run};

const LAYER: LayerShape = LayerShape { dtype: DType::F32, heads: 2, key_dim: 4, value_dim: 4 };

fn tensor(gpu: &Gpu, tokens: usize) -> Tensor {
    let count = u16::try_from(tokens * 8).expect("few");
    let values: Vec<f32> = (0..count).map(f32::from).collect();
    gpu.upload(&values, &[1, tokens, 2, 4]).expect("a shape")
}

fn view(tensor: &Tensor) -> TensorView<'_> {
    let tokens = tensor.view().shape()[2].max(tensor.view().shape()[1]);
    let _ = tokens;
    let elements = usize::try_from(tensor.buffer().size() / 4).expect("few");
    TensorView::packed(tensor.buffer(), DType::F32, [elements / 8, 2, 4]).expect("a shape")
}

/// A cache of two layers, with sequences of 5 and 3 tokens.
fn filled(gpu: &Gpu) -> (SequenceCache, [SequenceId; 2]) {
    let mut cache = SequenceCache::new(gpu, &[LAYER; 2]).expect("layers");
    let ids = [(); 2].map(|()| cache.add().expect("nothing was lost"));
    let input = tensor(gpu, 8);
    step(gpu, &mut cache, &[(ids[0], 5), (ids[1], 3)], &input).expect("room");
    (cache, ids)
}

fn step(
    gpu: &Gpu,
    cache: &mut SequenceCache,
    counts: &[(SequenceId, usize)],
    input: &Tensor,
) -> Result<Step, Error> {
    gpu.submit_pass("step", |pass| {
        let step = cache.plan_step(pass, counts)?;
        for layer in 0..cache.num_layers() {
            cache.update(pass, &step, layer, &view(input), &view(input))?;
        }
        Ok(step)
    })
}

/// Everything that can be asked of a cache.
fn state(cache: &SequenceCache, ids: &[SequenceId]) -> (Vec<Vec<u8>>, String) {
    let tensors = ids.iter().flat_map(|&id| {
        let (key, value) = cache.read(id, 0).expect("it is submitted").expect("it has tokens");
        [key, value].map(|it| bytemuck::cast_slice(it.as_slice::<f32>().expect("f32")).to_vec())
    });
    let tensors = tensors.collect();
    let lengths: Vec<_> = ids.iter().map(|&id| (cache.len(id), cache.next_position(id))).collect();
    let stats = cache.stats();
    (tensors, format!("{lengths:?} {:?}", (stats.dispatches, stats.pages_used, stats.bytes_moved)))
}

#[test]
fn steps_that_cannot_be_planned() {
    let gpu = gpu();
    let (mut cache, [a, b]) = filled(&gpu);
    let gone = cache.fork(a, 2).expect("a fork");
    cache.remove(gone).expect("it is there");
    let mut other = SequenceCache::new(&gpu, &[LAYER]).expect("layers");
    let theirs = other.add().expect("nothing was lost");
    let before = state(&cache, &[a, b]);
    let too_long = usize::try_from(u32::MAX / 2).expect("32 bits");
    let cases: [(&[(SequenceId, usize)], Error); 6] = [
        (&[], Error::Sequence(SequenceError::EmptyStep)),
        (&[(a, 1), (b, 1), (a, 1)], Error::Sequence(SequenceError::SequenceTwice { id: a })),
        (&[(a, 1), (b, 0)], Error::Sequence(SequenceError::NoNewTokens { id: b })),
        (&[(a, 1), (gone, 1)], Error::Sequence(SequenceError::UnknownSequence { id: gone })),
        (&[(theirs, 1)], Error::Sequence(SequenceError::UnknownSequence { id: theirs })),
        (
            &[(a, usize::MAX)],
            Error::SequenceTooLong { len: 5, new_tokens: usize::MAX, bound: too_long },
        ),
    ];
    for (counts, expected) in cases {
        let got = gpu.submit_pass("step", |pass| cache.plan_step(pass, counts)).map(|_| ());
        assert_eq!(got, Err(expected));
        assert_eq!(state(&cache, &[a, b]), before);
    }
    // Nothing of so many pages is allocated before it is refused.
    let got = gpu.submit_pass("step", |pass| cache.plan_step(pass, &[(a, too_long - 5)]));
    assert!(got.is_err_and(|error| error.kind() == ErrorKind::NoRoom));
    assert_eq!(state(&cache, &[a, b]), before);
}

#[test]
fn names_that_are_not_there_and_forks_past_the_end() {
    let gpu = gpu();
    let (mut cache, [a, b]) = filled(&gpu);
    let gone = cache.add().expect("nothing was lost");
    cache.remove(gone).expect("it is there");
    let reused = cache.add().expect("nothing was lost");
    assert_ne!(gone, reused);
    let unknown = Err(Error::Sequence(SequenceError::UnknownSequence { id: gone }));
    assert_eq!(cache.remove(gone), unknown);
    assert_eq!(cache.truncate(gone, 0), unknown);
    assert_eq!(cache.crop(gone, 0), unknown);
    assert_eq!(cache.drop_latest(gone, 0), unknown);
    assert_eq!(cache.remember_prefix(gone, &[]), unknown);
    assert_eq!(cache.fork(gone, 0).map(|_| ()), unknown);
    assert_eq!(cache.len(gone).map(|_| ()), unknown);
    assert_eq!(cache.next_position(gone).map(|_| ()), unknown);
    assert_eq!(cache.read(gone, 0).map(|_| ()), unknown);
    let before = state(&cache, &[a, b]);
    assert_eq!(
        cache.fork(a, 6),
        Err(Error::Sequence(SequenceError::ForkPastEnd { id: a, asked: 6, len: 5 }))
    );
    let expected =
        Error::Sequence(SequenceError::PrefixTokens { id: b, tokens: 4, len: 3, dropped: 0 });
    assert_eq!(cache.remember_prefix(b, &[1, 2, 3, 4]), Err(expected));
    assert_eq!(state(&cache, &[a, b]), before);
    cache.crop(b, 2).expect("it is there");
    let expected =
        Error::Sequence(SequenceError::PrefixTokens { id: b, tokens: 1, len: 2, dropped: 1 });
    assert_eq!(cache.remember_prefix(b, &[1]), Err(expected));
    assert_eq!(
        cache.read(a, 2).map(|_| ()),
        Err(Error::LayerOutOfRange { layer: 2, num_layers: 2 })
    );
}

#[test]
fn tensors_that_are_not_those_of_the_step() {
    let gpu = gpu();
    let (mut cache, [a, b]) = filled(&gpu);
    let (right, short) = (tensor(&gpu, 4), tensor(&gpu, 3));
    let step = gpu.submit_pass("step", |pass| cache.plan_step(pass, &[(a, 1), (b, 3)]));
    let step = step.expect("room");
    let dispatches = cache.stats().dispatches;
    let mut refused = |layer, key: &TensorView<'_>, value: &TensorView<'_>| {
        let got = gpu.submit_pass("update", |pass| cache.update(pass, &step, layer, key, value));
        got.map(|_| ()).expect_err("a refusal")
    };
    let expected = Error::Sequence(SequenceError::StepTokens { tokens: 4, shape: [1, 2, 3, 4] });
    assert_eq!(refused(0, &view(&short), &view(&right)), expected);
    assert_eq!(refused(0, &view(&right), &view(&short)), expected);
    let rows = TensorView::bthd(right.buffer(), DType::F32, &[2, 2, 2, 4]).expect("a shape");
    assert_eq!(
        refused(0, &rows, &rows),
        Error::Sequence(SequenceError::StepTokens { tokens: 4, shape: [2, 2, 2, 4] })
    );
    let heads = TensorView::packed(right.buffer(), DType::F32, [4, 1, 4]).expect("a shape");
    assert!(matches!(refused(1, &heads, &heads), Error::LayerShape { layer: 1, .. }));
    let half = TensorView::packed(right.buffer(), DType::F16, [4, 2, 4]).expect("a shape");
    assert!(matches!(refused(1, &view(&right), &half), Error::WrongDType { what: "value", .. }));
    let last = refused(2, &view(&right), &view(&right));
    assert_eq!(last, Error::LayerOutOfRange { layer: 2, num_layers: 2 });
    assert_eq!(cache.stats().dispatches, dispatches, "an error changes nothing");
}

#[test]
fn steps_of_before_and_of_other_caches_and_steps_that_are_not_finished() {
    let gpu = gpu();
    let (mut cache, [a, b]) = filled(&gpu);
    let input = tensor(&gpu, 1);
    let old = step(&gpu, &mut cache, &[(a, 1)], &input).expect("room");
    let latest = step(&gpu, &mut cache, &[(b, 1)], &input).expect("room");
    let stale = |error: Error| matches!(error, Error::Sequence(SequenceError::StaleStep { .. }));
    let (mut others, _) = filled(&gpu);
    gpu.submit_pass("update", |pass| {
        let key = view(&input);
        assert!(stale(cache.update(pass, &old, 0, &key, &key).expect_err("an old step")));
        assert!(stale(others.update(pass, &latest, 0, &key, &key).expect_err("not its step")));
        assert!(stale(cache.view(&old, 0).expect_err("an old step")));
        // Once more the same is fine.
        cache.update(pass, &latest, 0, &key, &key).map(|_| ())
    })
    .expect("the latest step");

    let before = state(&cache, &[a, b]);
    let planned = gpu.submit_pass("plan", |pass| cache.plan_step(pass, &[(a, 1)])).expect("room");
    let next = gpu.submit_pass("update", |pass| {
        cache.update(pass, &planned, 0, &view(&input), &view(&input))?;
        cache.plan_step(pass, &[(b, 1)])
    });
    let unfinished = Error::Sequence(SequenceError::StepUnfinished { layer: 1 });
    assert_eq!(next.map(|_| ()), Err(unfinished.clone()));
    // What is not in all layers yet is not handed on.
    assert_eq!(cache.fork(a, 7).map(|_| ()), Err(unfinished.clone()));
    assert_eq!(cache.remember_prefix(a, &[0; 7]), Err(unfinished.clone()));
    assert_eq!(cache.read(a, 1).map(|_| ()), Err(unfinished.clone()));
    assert_eq!(cache.view(&planned, 1).map(|_| ()), Err(unfinished));
    assert!(cache.read(b, 1).is_ok(), "another sequence");
    let fork = cache.fork(a, 6).expect("tokens of before");
    cache.remove(fork).expect("it is there");
    cache.cancel_step().expect("nothing was lost");
    assert_eq!(state(&cache, &[a, b]).0, before.0);
    assert!(stale(cache.view(&planned, 0).expect_err("a cancelled step")));
    step(&gpu, &mut cache, &[(a, 1)], &input).expect("the cache goes on");
}

#[test]
fn a_step_that_is_dropped_with_its_pass_is_an_error_until_a_reset() {
    let gpu = gpu();
    let (mut cache, [a, _]) = filled(&gpu);
    let input = tensor(&gpu, 1);
    let mut encoder = gpu.device().create_command_encoder(&Default::default());
    {
        let mut pass = encoder.begin_compute_pass(&Default::default());
        let step = cache.plan_step(&mut pass, &[(a, 1)]).expect("room");
        cache.update(&mut pass, &step, 0, &view(&input), &view(&input)).expect("it fits");
    }
    drop(encoder);
    let lost = |error: Error| matches!(error, Error::PassDropped { .. });
    assert!(lost(cache.len(a).expect_err("lost")));
    assert!(lost(cache.add().expect_err("lost")));
    assert!(lost(cache.read(a, 0).map(|_| ()).expect_err("lost")));
    assert!(lost(cache.cancel_step().expect_err("lost")));
    let planned = gpu.submit_pass("step", |pass| cache.plan_step(pass, &[(a, 1)]));
    assert!(lost(planned.map(|_| ()).expect_err("lost")));
    cache.reset();
    assert_eq!(cache.len(a), Err(Error::Sequence(SequenceError::UnknownSequence { id: a })));
    let id = cache.add().expect("nothing is lost any more");
    step(&gpu, &mut cache, &[(id, 1)], &input).expect("room");
    let (key, _) = cache.read(id, 0).expect("it is submitted").expect("a token");
    if kernels_run() {
        assert_eq!(key.as_slice::<f32>().expect("f32"), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
    }
}

#[test]
fn options_and_layers() {
    let gpu = gpu();
    let new = |layers: &[LayerShape], options| {
        SequenceCache::with_options(&gpu, layers, options).map(|_| ()).expect_err("a refusal")
    };
    let plain = CacheOptions::default();
    assert_eq!(new(&[], plain), Error::Sequence(SequenceError::NoLayers));
    assert!(matches!(new(&[LayerShape { heads: 0, ..LAYER }], plain), Error::ZeroExtent { .. }));
    let odd = LayerShape { dtype: DType::F16, key_dim: 5, ..LAYER };
    assert!(matches!(new(&[LAYER, odd], plain), Error::OddHeadDim { what: "key", .. }));
    assert!(matches!(new(&[LAYER], plain.with_page_tokens(3)), Error::PageSize { page_tokens: 3 }));
    let unused = |options| matches!(new(&[LAYER], options), Error::UnusedOption { .. });
    assert!(unused(plain.with_num_layers(1)) && unused(plain.with_capacity(1)));
    let options = plain.with_max_cache_len(4);
    let mut cache = SequenceCache::with_options(&gpu, &[LAYER], options).expect("options");
    let id = cache.add().expect("nothing was lost");
    let got = gpu.submit_pass("step", |pass| cache.plan_step(pass, &[(id, 5)])).map(|_| ());
    assert_eq!(got, Err(Error::SequenceTooLong { len: 0, new_tokens: 5, bound: 4 }));
    assert_eq!(cache.get_max_cache_shape(), Some(4));
}

#[test]
fn queries_that_are_not_those_of_the_step() {
    let gpu = gpu();
    let (mut cache, [a, b]) = filled(&gpu);
    let input = tensor(&gpu, 4);
    let step = step(&gpu, &mut cache, &[(a, 1), (b, 3)], &input).expect("room");
    let layer = cache.view(&step, 0).expect("the latest step");
    let mut attention = Attention::new(&gpu);
    let output = tensor(&gpu, 4);
    let wrong = tensor(&gpu, 3);
    let rows = TensorView::bthd(input.buffer(), DType::F32, &[2, 2, 2, 4]).expect("a shape");
    for query in [view(&wrong), rows] {
        let got = gpu.submit_pass("attention", |pass| {
            attention.record(pass, &query, &layer, &view(&output), Default::default())
        });
        assert!(matches!(got, Err(Error::AttentionShape { .. })), "{got:?}");
    }
}
