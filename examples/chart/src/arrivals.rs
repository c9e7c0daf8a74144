//! Requests that arrive, are answered and leave, without a model: how many pages their sequences use over time.

use std::collections::VecDeque;

use anyhow::{Result, ensure};
use indicatif::ProgressBar;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, LogNormal, Poisson};
use wgpu_kvcache::{CacheOptions, DType, Gpu, LayerShape, SequenceCache, SequenceId, TensorView};

/// Tokens of a page.
pub(crate) const PAGE: usize = 16;
/// New tokens of a step at most: those that decode first, then pieces of prompts.
const STEP_TOKENS: usize = 256;
/// Steps that are recorded into one pass.
const STEPS_A_PASS: usize = 32;

/// What arrives, and how much runs at a time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Traffic {
    pub(crate) requests: usize,
    /// Requests that run at a time at most; others wait.
    pub(crate) running: usize,
    /// Requests that arrive in a step on average (a Poisson process).
    pub(crate) rate: f64,
    /// Medians of the lengths of prompts and answers, in tokens, and the spread of their logarithms.
    pub(crate) prompt: (f64, f64),
    pub(crate) answer: (f64, f64),
    /// The longest prompt and the longest answer.
    pub(crate) longest: usize,
    pub(crate) seed: u64,
}

/// The state after a step.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sample {
    pub(crate) pages_used: usize,
    /// Pages that a batch of the same sequences takes if all rows are as long as the longest one.
    pub(crate) padded: usize,
    /// Live tokens of all sequences.
    pub(crate) tokens: usize,
}

struct Request {
    prompt: usize,
    answer: usize,
}

struct Running {
    id: SequenceId,
    /// Tokens of the prompt that are not prefilled yet, and of the answer that are not decoded yet.
    prompt: usize,
    answer: usize,
    len: usize,
}

/// Runs all requests through a cache of one small layer, and returns a sample a step. After each step the pages
/// in use must be those of the sequences that run, and at the end none.
pub(crate) fn run(gpu: &Gpu, traffic: Traffic, bar: &ProgressBar) -> Result<Vec<Sample>> {
    let mut random = StdRng::seed_from_u64(traffic.seed);
    let mut lengths = |(median, spread): (f64, f64)| -> Result<Vec<usize>> {
        let of = LogNormal::new(median.ln(), spread)?;
        let tokens = of.sample_iter(&mut random).take(traffic.requests);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped")]
        Ok(tokens.map(|it| (it.ceil() as usize).clamp(1, traffic.longest)).collect())
    };
    let (prompts, answers) = (lengths(traffic.prompt)?, lengths(traffic.answer)?);
    let requests = prompts.into_iter().zip(answers);
    let mut requests = requests.map(|(prompt, answer)| Request { prompt, answer });
    let arrivals = Poisson::new(traffic.rate)?;

    let layer = LayerShape { dtype: DType::F32, heads: 1, key_dim: 4, value_dim: 4 };
    let options = CacheOptions::default().with_page_tokens(PAGE);
    let mut cache = SequenceCache::with_options(gpu, &[layer], options)?;
    let packed = gpu.upload(&[1.0_f32; STEP_TOKENS * 4], &[1, STEP_TOKENS, 1, 4])?;
    let mut waiting: VecDeque<Request> = VecDeque::new();
    let mut running: Vec<Running> = Vec::new();
    let (mut samples, mut done) = (Vec::new(), 0);
    while done < traffic.requests {
        gpu.submit_pass("steps", |pass| -> Result<()> {
            for _ in 0..STEPS_A_PASS {
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "few")]
                let arrived = arrivals.sample(&mut random) as usize;
                waiting.extend(requests.by_ref().take(arrived));
                while running.len() < traffic.running {
                    let Some(Request { prompt, answer }) = waiting.pop_front() else { break };
                    running.push(Running { id: cache.add()?, prompt, answer, len: 0 });
                }
                let counts = counts(&mut running);
                if !counts.is_empty() {
                    let step = cache.plan_step(pass, &counts)?;
                    let shape = [step.total_tokens(), 1, 4];
                    let packed = TensorView::packed(packed.buffer(), DType::F32, shape)?;
                    cache.update(pass, &step, 0, &packed, &packed)?;
                }
                let pages: usize = running.iter().map(|it| it.len.div_ceil(PAGE)).sum();
                let used = usize::try_from(cache.stats().pages_used)?;
                ensure!(used == pages, "{used} pages are in use, and the sequences have {pages}");
                let longest = running.iter().map(|it| it.len).max().unwrap_or(0);
                samples.push(Sample {
                    pages_used: used,
                    padded: running.len() * longest.div_ceil(PAGE),
                    tokens: running.iter().map(|it| it.len).sum(),
                });
                let (ended, others) =
                    running.drain(..).partition(|it| it.prompt == 0 && it.answer == 0);
                running = others;
                for Running { id, .. } in ended as Vec<Running> {
                    cache.remove(id)?;
                    done += 1;
                }
            }
            Ok(())
        })?;
        bar.set_position(done as u64);
    }
    let stats = cache.stats();
    ensure!(stats.pages_used == 0, "{} pages were lost", stats.pages_used);
    Ok(samples)
}

/// The new tokens of a step: one for each sequence that decodes, and pieces of prompts.
fn counts(running: &mut [Running]) -> Vec<(SequenceId, usize)> {
    let decoding = running.iter().filter(|it| it.prompt == 0).count();
    let mut left = STEP_TOKENS - decoding;
    let mut counts = Vec::new();
    for it in running {
        let count = if it.prompt == 0 { 1 } else { it.prompt.min(left) };
        if count == 0 {
            continue;
        }
        if it.prompt == 0 {
            it.answer -= 1;
        } else {
            it.prompt -= count;
            left -= count;
        }
        it.len += count;
        counts.push((it.id, count));
    }
    counts
}

/// A small server: 16 requests at a time.
pub(crate) const SERVER: Traffic = Traffic {
    requests: 2000,
    running: 16,
    rate: 0.1,
    prompt: (150.0, 1.0),
    answer: (100.0, 0.8),
    longest: 2000,
    seed: 7,
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_thousand_requests_come_and_go_and_no_page_is_lost() {
        let gpu = Gpu::headless().unwrap_or_else(|error| panic!("{error}"));
        let samples = run(&gpu, SERVER, &ProgressBar::hidden()).expect("no page is lost");
        let sum = |of: fn(&Sample) -> usize| samples.iter().map(of).sum::<usize>();
        let (used, padded) = (sum(|it| it.pages_used), sum(|it| it.padded));
        assert!(used > 0 && used < padded, "{used} pages, {padded} padded");
        // A sequence wastes less than a page.
        assert!(samples.iter().all(|it| it.pages_used * PAGE < it.tokens + 16 * PAGE));
    }
}
