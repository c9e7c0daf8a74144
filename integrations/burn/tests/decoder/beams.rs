//! Beam search on this crate gives the beams of burn alone.

use crate::support::model::{Concatenated, Form};
use crate::support::*;
use wgpu_kvcache_burn::BurnCache;
use wgpu_kvcache_burn::wgpu_kvcache::{DynamicKVCache, KVCache, PagedKVCache};

const BEAMS: usize = 3;

/// The best continuations of all beams: parents, tokens, sums of log-probabilities.
fn continue_beams(logits: &[f32], sums: &[f32]) -> (Vec<u32>, Vec<u32>, Vec<f32>) {
    let words = SHAPE.vocabulary;
    let mut all = Vec::new();
    for (beam, (row, sum)) in logits.chunks(words).zip(sums).enumerate() {
        let most = row.iter().copied().fold(f32::MIN, f32::max);
        let total = row.iter().map(|x| (x - most).exp()).sum::<f32>().ln() + most;
        all.extend(row.iter().enumerate().map(|(word, x)| (sum + x - total, beam, word)));
    }
    all.sort_by(|a, b| b.0.total_cmp(&a.0));
    all.truncate(BEAMS);
    let parents = all.iter().map(|&(_, beam, _)| u32::try_from(beam).expect("few beams")).collect();
    let words = all.iter().map(|&(_, _, word)| u32::try_from(word).expect("few words")).collect();
    (parents, words, all.iter().map(|&(sum, _, _)| sum).collect())
}

fn compare<C: KVCache>(mut cache: BurnCache<C>) {
    let decoder = decoder();
    let mut alone = Concatenated::new(Form::Matmul, SHAPE.layers);
    let prompt = vec![PROMPT.to_vec()];
    let positions = vec![(0..PROMPT.len()).collect::<Vec<_>>()];
    let last = PROMPT.len() - 1;
    let expected = decoder.forward(&prompt, &positions, &mut alone).narrow(1, last, 1);
    let got = decoder.forward(&prompt, &positions, &mut through(&mut cache, Order::Bthd));
    assert!(difference(expected.clone(), got.narrow(1, last, 1)) < 1e-4);
    let mut logits = expected.try_into_vec_as::<f32>().expect("f32");
    let mut sums = vec![0.0];
    let mut moved = 0;
    for step in 0..25 {
        let (parents, words, next) = continue_beams(&logits, &sums);
        moved += usize::from(step > 0 && parents != [0, 1, 2]);
        sums = next;
        alone.reorder(&parents);
        cache.reorder_cache(&parents).expect("a reorder");
        let tokens: Vec<Vec<u32>> = words.into_iter().map(|word| vec![word]).collect();
        let positions = vec![vec![PROMPT.len() + step]; BEAMS];
        let expected = decoder.forward(&tokens, &positions, &mut alone);
        let got = decoder.forward(&tokens, &positions, &mut through(&mut cache, Order::Bthd));
        let difference = difference(expected.clone(), got);
        assert!(difference < 1e-4, "step {step}: {difference}");
        logits = expected.try_into_vec_as::<f32>().expect("f32");
    }
    assert!(moved > 3, "the beams should change places: {moved}");
}

#[test]
fn beams_of_a_dynamic_and_a_paged_cache_are_those_of_burn() {
    let shared = shared();
    compare(BurnCache::new(&shared, DynamicKVCache::new(shared.gpu())));
    compare(BurnCache::new(&shared, PagedKVCache::new(shared.gpu())));
}
