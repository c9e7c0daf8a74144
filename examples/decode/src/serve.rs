//! Several prompts at once: continuous batching over a [`SequenceCache`].
//!
//! A sequence of the cache serves one prompt. In each step a sequence that decodes gets one token, and one that
//! prefills gets a piece of its prompt, so that a long prompt does not hold up the others. When a sequence ends, it
//! leaves, and the next prompt that waits joins.
//!
//! The shared prefix of all prompts is prefilled once, as a sequence of its own. Each prompt starts as a fork of it,
//! which shares its pages.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use wgpu_kvcache::{SequenceCache, SequenceId, Stats};

use crate::engine::{Engine, Piece};
use crate::generate::Settings;

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

/// A prompt that is being served.
struct Active {
    /// Its number.
    prompt: usize,
    id: SequenceId,
    /// How many of its own ids are in the cache: fewer than all while it prefills.
    prefilled: usize,
}

impl Active {
    /// What is left to prefill: nothing once it decodes.
    fn rest<'a>(&self, requests: &'a [Request]) -> &'a [u32] {
        &requests[self.prompt].ids[self.prefilled..]
    }
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
    let mut active: Vec<Active> = Vec::new();
    let mut parent = prefill_shared(engine, cache, shared, &mut served)?;

    while !(waiting.is_empty() && active.is_empty()) {
        while active.len() < engine.max_batch() {
            let Some(prompt) = waiting.pop_front() else { break };
            let id = match parent {
                Some(parent) => cache.fork(parent, shared.len())?,
                None => cache.add()?,
            };
            active.push(Active { prompt, id, prefilled: 0 });
            on_event(Event::Joined(prompt), &cache.stats())?;
        }
        // All forks are made. Without their parent, the last one to write into a shared page needs no copy of it.
        if let Some(id) = parent.take_if(|_| waiting.is_empty()) {
            cache.remove(id)?;
        }

        let pieces = plan(&active, requests, &served.ids, engine.step_tokens());
        let tokens: usize = pieces.iter().map(|piece| piece.tokens.len()).sum();
        let decoding = active.iter().filter(|it| it.rest(requests).is_empty()).count();
        let start = Instant::now();
        let chosen = engine.next_of_sequences(cache, &pieces, banned)?;
        if decoding == 0 {
            served.prompt_tokens += tokens;
            served.prompt_time += start.elapsed();
        } else {
            served.decoded_tokens += decoding;
            served.step_times.push(start.elapsed());
            served.last_decoding = decoding;
        }
        let pieces: Vec<_> = pieces.iter().map(|piece| (piece.id, piece.tokens.len())).collect();

        for ((id, count), token) in pieces.into_iter().zip(chosen) {
            let Some(at) = active.iter().position(|it| it.id == id) else { continue };
            let Active { prompt, prefilled, .. } = active[at];
            let Request { ids, max_new_tokens } = &requests[prompt];
            let most = max_new_tokens.unwrap_or(settings.max_new_tokens);
            active[at].prefilled = ids.len().min(prefilled + count);
            let Some(token) = token else { continue };
            let ids = &mut served.ids[prompt];
            let mut has_ended = Some(token) == settings.end || most == 0;
            if !has_ended {
                ids.push(token);
                has_ended = ids.len() == most;
                on_event(Event::Token(prompt, token), &cache.stats())?;
            }
            if has_ended {
                cache.remove(id)?;
                active.remove(at);
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
        engine.next_of_sequences(cache, &[Piece { id, tokens, is_last: false }], None)?;
    }
    served.prompt_tokens += shared.len();
    served.prompt_time += start.elapsed();
    Ok(Some(id))
}

/// The next step: one token of each sequence that decodes, and pieces of prompts in what is left of `room`, for those
/// that joined first.
fn plan<'a>(
    active: &[Active],
    requests: &'a [Request],
    generated: &'a [Vec<u32>],
    room: usize,
) -> Vec<Piece<'a>> {
    let decoding = active.iter().filter(|it| it.rest(requests).is_empty()).count();
    let mut left = room.saturating_sub(decoding);
    let piece = |it: &Active| {
        let rest = it.rest(requests);
        let tokens = match generated[it.prompt].last() {
            // The token chosen last is not in the cache yet.
            Some(token) if rest.is_empty() => std::slice::from_ref(token),
            _ => &rest[..rest.len().min(left)],
        };
        if !rest.is_empty() {
            left -= tokens.len();
        }
        Piece { id: it.id, tokens, is_last: tokens.len() >= rest.len() }
    };
    let pieces = active.iter().map(piece);
    // A prompt for which nothing is left waits for the next step.
    pieces.filter(|piece| !piece.tokens.is_empty()).collect()
}
