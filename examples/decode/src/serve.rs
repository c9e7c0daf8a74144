//! Several prompts at once: continuous batching over a [`SequenceCache`].
//!
//! A sequence of the cache serves one prompt. When it ends, it leaves the [`Batch`] that is decoded, and the next prompt
//! that waits joins.
//!
//! The shared prefix of all prompts is prefilled once, as a sequence of its own. Each prompt starts as a fork of it,
//! which shares its pages.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use pollster::block_on;
use wgpu_kvcache::{SequenceCache, SequenceId, Stats};

use crate::blocking::Engine;
use crate::generate::Settings;
use engine::{Batch, Piece};

/// A prompt to serve.
#[derive(Clone, Debug)]
pub struct Request {
    /// Its token ids, after those of the shared prefix: at least one.
    pub ids: Vec<u32>,
    /// The most tokens to generate, if not as many as for the other prompts.
    pub max_new_tokens: Option<usize>,
}

/// What happens to a prompt, named by its number among the requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Its sequence joined.
    Joined(usize),
    /// A token was chosen.
    Token(usize, u32),
    /// Its sequence ended and left.
    Ended(usize),
}

/// What came out, and how long it took.
#[derive(Debug, Default)]
pub struct Served {
    /// Generated ids of each prompt, without the end token.
    pub ids: Vec<Vec<u32>>,
    /// Tokens of prompts in steps that only prefill: at first, and whenever no sequence decodes.
    pub prompt_tokens: usize,
    /// The time of these steps.
    pub prompt_time: Duration,
    /// Tokens chosen in the other steps by sequences that decode.
    pub decoded_tokens: usize,
    /// The time of the other steps, one by one. Some of them prefill as well.
    pub step_times: Vec<Duration>,
    /// Sequences that decoded in the last step.
    pub last_decoding: usize,
}

/// Generates greedily after each prompt, for as many at a time as the engine takes in a step. `shared` is the
/// shared prefix of all prompts, and may be empty. Each prompt gets the ids that it gets alone. `on_event` hears of
/// each token as it comes, with the cache's counts.
///
/// # Errors
///
/// For a prompt without a token of its own, where a step fails, or where `on_event` does.
pub fn serve(
    engine: &mut Engine,
    cache: &mut SequenceCache,
    shared: &[u32],
    requests: &[Request],
    settings: Settings,
    on_event: &mut dyn FnMut(Event, &Stats) -> Result<()>,
) -> Result<Served> {
    ensure!(requests.iter().all(|it| !it.ids.is_empty()), "a prompt has no token of its own");
    let banned = settings.end.filter(|_| settings.ignore_end);
    let mut served = Served { ids: vec![Vec::new(); requests.len()], ..Default::default() };
    let mut waiting: VecDeque<usize> = (0..requests.len()).collect();
    let mut batch = Batch::default();
    let mut sequences = vec![None; requests.len()];
    let mut parent = prefill_shared(engine, cache, shared, &mut served)?;

    while !(waiting.is_empty() && batch.is_empty()) {
        while batch.len() < engine.max_batch() {
            let Some(prompt) = waiting.pop_front() else { break };
            let id = match parent {
                Some(parent) => cache.fork(parent, shared.len())?,
                None => cache.add()?,
            };
            batch.join(prompt, id, requests[prompt].ids.clone())?;
            sequences[prompt] = Some(id);
            on_event(Event::Joined(prompt), &cache.stats())?;
        }
        // All forks are made. Without their parent, the last one to write into a shared page needs no copy of it.
        if let Some(id) = parent.take_if(|_| waiting.is_empty()) {
            cache.remove(id)?;
        }

        let decoding = batch.decoding();
        let start = Instant::now();
        let step = block_on(batch.step(engine, cache, banned))?;
        if decoding == 0 {
            served.prompt_tokens += step.tokens;
            served.prompt_time += start.elapsed();
        } else {
            served.decoded_tokens += decoding;
            served.step_times.push(start.elapsed());
            served.last_decoding = decoding;
        }

        for (prompt, token) in step.chosen {
            let most = requests[prompt].max_new_tokens.unwrap_or(settings.max_new_tokens);
            let ids = &mut served.ids[prompt];
            let mut has_ended = Some(token) == settings.end || most == 0;
            if !has_ended {
                ids.push(token);
                has_ended = ids.len() == most;
                on_event(Event::Token(prompt, token), &cache.stats())?;
            }
            if has_ended {
                batch.leave(prompt);
                sequences[prompt].take().map_or(Ok(()), |id| cache.remove(id))?;
                on_event(Event::Ended(prompt), &cache.stats())?;
            }
        }
    }
    Ok(served)
}

/// Prefills the shared prefix as a sequence of its own. Returns no sequence if the prefix is empty.
fn prefill_shared(
    engine: &mut Engine,
    cache: &mut SequenceCache,
    shared: &[u32],
    served: &mut Served,
) -> Result<Option<SequenceId>> {
    if shared.is_empty() {
        return Ok(None);
    }
    let start = Instant::now();
    let id = cache.add()?;
    for tokens in shared.chunks(engine.step_tokens()) {
        let piece = Piece { id, tokens, is_last: false };
        block_on(engine.next_of_sequences(cache, &[piece], None))?;
    }
    served.prompt_tokens += shared.len();
    served.prompt_time += start.elapsed();
    Ok(Some(id))
}
