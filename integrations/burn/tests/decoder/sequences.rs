//! Sequences of different length, packed, against each of them alone in burn.

use crate::support::model::{Concatenated, Form};
use crate::support::*;
use wgpu_kvcache_burn::wgpu_kvcache::{CacheOptions, DType, LayerShape, SequenceCache, SequenceId};
use wgpu_kvcache_burn::{BurnSequenceCache, Error};

/// A sequence, and the cache of it alone.
struct Run {
    id: SequenceId,
    alone: Concatenated,
    /// What it decodes next.
    next: Vec<u32>,
    position: usize,
}

fn empty() -> BurnSequenceCache {
    let shared = shared();
    let layer = LayerShape { dtype: DType::F32, heads: 2, key_dim: 16, value_dim: 16 };
    let options = CacheOptions::default().with_page_tokens(8);
    let cache = SequenceCache::with_options(shared.gpu(), &[layer; 2], options).expect("a cache");
    BurnSequenceCache::new(&shared, cache)
}

#[test]
fn sequences_that_join_fork_and_leave_are_those_of_burn() {
    let decoder = decoder();
    let mut cache = empty();
    let mut runs: Vec<Run> = Vec::new();
    for step in 0..30 {
        // A new one each fifth step, with a prompt of another length; a fork; and one that leaves.
        if step % 5 == 0 {
            let id = cache.inner_mut().add().expect("a sequence");
            let next = PROMPT[..2 + step % 9].to_vec();
            runs.push(Run { id, alone: Concatenated::new(Form::Matmul, 2), next, position: 0 });
        }
        if step == 12 {
            let parent = &runs[0];
            let id = cache.inner_mut().fork(parent.id, parent.position).expect("a fork");
            let alone = Concatenated { form: Form::Matmul, layers: parent.alone.layers.clone() };
            runs.push(Run { id, alone, next: vec![7], position: parent.position });
        }
        if step == 20 {
            cache.inner_mut().remove(runs.remove(1).id).expect("it is there");
        }
        let planned: Vec<_> = runs.iter().map(|run| (run.id, run.next.len())).collect();
        let plan = cache.plan_step(&planned).expect("a step");
        let packed = vec![runs.iter().flat_map(|run| run.next.clone()).collect::<Vec<_>>()];
        let positions = vec![plan.positions().iter().map(|&p| p as usize).collect::<Vec<_>>()];
        let logits = decoder.forward(&packed, &positions, &mut |layer, q, k, v| {
            let [q, k, v] = [q, k, v].map(|x: burn::tensor::Tensor<4>| x.squeeze_dim::<3>(0));
            let context = cache.attend(&plan, layer, q, k, v, Default::default());
            context.expect("attention").unsqueeze_dim::<4>(0)
        });
        let mut first = 0;
        for run in &mut runs {
            let count = run.next.len();
            let positions = vec![(run.position..run.position + count).collect::<Vec<_>>()];
            let tokens = vec![run.next.clone()];
            let expected = decoder.forward(&tokens, &positions, &mut run.alone);
            let got = logits.clone().narrow(1, first, count);
            run.next = best(&expected);
            let difference = difference(expected, got);
            assert!(difference < 1e-4, "step {step}: {difference}");
            run.position += count;
            first += count;
        }
    }
}

#[test]
fn a_stale_step_is_refused() {
    let shared = shared();
    let mut cache = empty();
    let id = cache.inner_mut().add().expect("a sequence");
    let stale = cache.plan_step(&[(id, 1)]).expect("a step");
    cache.inner_mut().cancel_step().expect("taken back");
    let step = cache.plan_step(&[(id, 2)]).expect("a step");
    let ones = |heads| burn::tensor::Tensor::<3>::ones([2, heads, 16], shared.device());
    let error = cache.attend(&stale, 0, ones(4), ones(2), ones(2), Default::default());
    assert!(matches!(error, Err(Error::Cache(_))));
    let context = cache.attend(&step, 0, ones(4), ones(2), ones(2), Default::default());
    assert_eq!(context.expect("attention").dims(), [2, 4, 16]);
}
