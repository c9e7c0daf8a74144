//! The steps of a reference, fed to an engine one by one whatever it would have chosen itself.

use decode_engine::{Engine, Rows};

use crate::rig::{Case, Kind, Loaded};

/// The logits of every step of a case: after its prompt, and after each of its ids but the last.
pub(crate) fn logits<P>(loaded: &Loaded, engine: &mut Engine, case: &Case<P>) -> Vec<Vec<f32>> {
    let mut cache = loaded.cache(engine, Kind::Dynamic, 0);
    let (_, fed) = case.greedy.split_last().expect("an id");
    let steps = std::iter::once(&case.prompt_ids[..]).chain(fed.chunks(1));
    let logits = |tokens| engine.logits(cache.as_mut(), tokens, 1, Rows::Keep).expect("logits");
    steps.map(logits).collect()
}

/// The best token, and how far its logit is above that of the second best one. The reference never chooses `end`.
pub(crate) fn best(logits: &[f32], end: Option<u32>) -> (u32, f32) {
    let (mut best, mut second) = ((0, f32::NEG_INFINITY), f32::NEG_INFINITY);
    for (token, &logit) in (0..).zip(logits).filter(|&(token, _)| Some(token) != end) {
        assert!(!logit.is_nan(), "token {token} has no logit");
        if logit > best.1 {
            (best, second) = ((token, logit), best.1);
        } else {
            second = second.max(logit);
        }
    }
    (best.0, best.1 - second)
}
