//! Text generation: the greedy loop, and beam search.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use wgpu_kvcache::KVCache;

use crate::blocking::Engine;
use engine::Rows;

/// When generation ends.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The most tokens to generate.
    pub max_new_tokens: usize,
    /// The token that ends an answer.
    pub end: Option<u32>,
    /// Never choose `end`, so that `max_new_tokens` tokens are generated.
    pub ignore_end: bool,
}

/// The generated tokens, and the times.
#[derive(Debug, Default)]
pub struct Generation {
    /// Generated ids, without the end token: the best list first, and only one for greedy decoding.
    pub beams: Vec<Vec<u32>>,
    /// For each list of a beam search, the sum of the log-probabilities of its tokens. Empty for greedy decoding, which
    /// does not read the logits.
    pub scores: Vec<f64>,
    /// From the prompt to the first choice.
    pub prompt_time: Duration,
    /// The times of the steps after that.
    pub step_times: Vec<Duration>,
    /// How the cache's batch rows moved before the last step: `[0]` for greedy decoding.
    pub last_parents: Vec<u32>,
}

/// Chooses the best token at every step, and passes it to `on_token`.
///
/// # Errors
///
/// If a step or `on_token` fails.
pub fn greedy(
    engine: &mut Engine,
    cache: &mut dyn KVCache,
    prompt: &[u32],
    settings: Settings,
    on_token: &mut dyn FnMut(u32) -> Result<()>,
) -> Result<Generation> {
    let banned = settings.end.filter(|_| settings.ignore_end);
    let mut result = Generation { last_parents: vec![0], ..Default::default() };
    let mut ids = Vec::new();

    let start = Instant::now();
    let mut token = engine.next_tokens(cache, prompt, 1, banned)?[0];
    result.prompt_time = start.elapsed();
    while Some(token) != settings.end && ids.len() < settings.max_new_tokens {
        ids.push(token);
        on_token(token)?;
        if ids.len() < settings.max_new_tokens {
            let start = Instant::now();
            token = engine.next_tokens(cache, &[token], 1, banned)?[0];
            result.step_times.push(start.elapsed());
        }
    }
    result.beams.push(ids);
    Ok(result)
}

/// A list of generated ids and its score: the sum of the log-probabilities of its tokens.
#[derive(Clone, Debug)]
struct Beam {
    ids: Vec<u32>,
    score: f64,
}

/// A continuation: a beam, and the next token.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    score: f64,
    beam: usize,
    token: u32,
}

/// Keeps the `width` best lists of ids at every step. Scores are sums of log-probabilities, without a correction for
/// length. A list that chooses the end token is finished and keeps its score.
///
/// The prompt is prefilled once, in one batch row of the cache. That row is then repeated for each beam. Before every
/// further step, the rows are reordered: new row i is the row of beam i's parent.
///
/// # Errors
///
/// If a step fails.
pub fn beam_search(
    engine: &mut Engine,
    cache: &mut dyn KVCache,
    prompt: &[u32],
    width: usize,
    settings: Settings,
) -> Result<Generation> {
    let vocabulary = engine.config().vocabulary;
    // The first step has candidates from one row only, and the end token may be one of them.
    ensure!(
        width > 0 && width < vocabulary,
        "{width} beams were requested, but the model has {vocabulary} tokens; use at least 1 and fewer than that"
    );
    let mut result = Generation::default();
    let mut finished = Vec::new();
    let mut beams = vec![Beam { ids: Vec::new(), score: 0.0 }];
    let mut parents = Vec::new();

    for step in 0..settings.max_new_tokens {
        let start = Instant::now();
        let logits = match step {
            0 => engine.logits(cache, prompt, 1, Rows::Keep)?,
            _ => {
                let tokens: Vec<u32> =
                    beams.iter().filter_map(|beam| beam.ids.last().copied()).collect();
                let rows = if step == 1 { Rows::Repeat(width) } else { Rows::Reorder(&parents) };
                engine.logits(cache, &tokens, width, rows)?
            }
        };
        let candidates = best_candidates(&logits, &beams, vocabulary, width, settings);
        parents.clear();
        let mut next = Vec::with_capacity(width);
        for Candidate { score, beam, token } in candidates {
            let mut ids = beams[beam].ids.clone();
            if Some(token) == settings.end {
                finished.push(Beam { ids, score });
            } else if next.len() < width {
                ids.push(token);
                next.push(Beam { ids, score });
                parents.push(u32::try_from(beam)?);
            }
        }
        beams = next;
        match step {
            0 => result.prompt_time = start.elapsed(),
            _ => result.step_times.push(start.elapsed()),
        }

        // Scores only decrease, so finished lists that are better than all others are the result.
        finished.sort_by(|a: &Beam, b| b.score.total_cmp(&a.score));
        finished.truncate(width);
        if finished.len() == width && finished[width - 1].score >= beams[0].score {
            break;
        }
    }

    beams.extend(finished);
    beams.sort_by(|a, b| b.score.total_cmp(&a.score));
    beams.truncate(width);
    result.last_parents =
        if parents.len() == width { parents } else { (0..).take(width).collect() };
    (result.beams, result.scores) = beams.into_iter().map(|beam| (beam.ids, beam.score)).unzip();
    Ok(result)
}

/// The best continuations of `beams`, best first: enough that at least `width` of them do not end. `logits` are
/// `[beams, vocabulary]`.
fn best_candidates(
    logits: &[f32],
    beams: &[Beam],
    vocabulary: usize,
    width: usize,
    settings: Settings,
) -> Vec<Candidate> {
    // At most one candidate per beam is the end token.
    let enough = width + beams.len();
    let banned = settings.end.filter(|_| settings.ignore_end);
    let mut best: Vec<Candidate> = Vec::with_capacity(enough + 1);
    for (beam, (row, &Beam { score, .. })) in logits.chunks_exact(vocabulary).zip(beams).enumerate()
    {
        let base = score - log_sum_exp(row);
        for (token, &logit) in (0..).zip(row) {
            let score = base + f64::from(logit);
            let full = best.len() == enough;
            if Some(token) == banned || (full && score <= best[enough - 1].score) {
                continue;
            }
            let at = best.partition_point(|other| other.score >= score);
            best.insert(at, Candidate { score, beam, token });
            best.truncate(enough);
        }
    }
    best
}

/// The logarithm of the sum of the exponentials. The maximum is subtracted first, so that none overflows.
fn log_sum_exp(row: &[f32]) -> f64 {
    let highest = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    highest + row.iter().map(|&logit| (f64::from(logit) - highest).exp()).sum::<f64>().ln()
}
