//! How much of a step the cache takes.

use std::time::Duration;

use anyhow::Result;
use wgpu_kvcache::KVCache;

use crate::engine::Engine;
use crate::generate::Generation;

/// Times that a pass is repeated; the median is taken.
const REPEATS: usize = 15;

/// The share of a decode step that the cache's own dispatches take, from 0 to 1; nothing where
/// there was no step.
///
/// Timestamps inside a pass are an optional feature and on software adapters say little, so the
/// cache's dispatches of one step are run again alone, in a pass of their own, several times. From
/// the median of these, the median of an empty pass is taken off, because the step pays for its
/// submission anyway. What the cache held is spoiled.
///
/// # Errors
///
/// Where a pass fails.
pub fn cache_share(
    engine: &Engine,
    cache: &mut dyn KVCache,
    generation: &Generation,
) -> Result<Option<f64>> {
    let Some(step) = median(generation.step_times.clone()) else {
        return Ok(None);
    };
    let mut time = |parents: Option<&[u32]>| -> Result<Duration> {
        // The first time may compile something.
        engine.time_cache_alone(cache, parents)?;
        let times =
            (0..REPEATS).map(|_| engine.time_cache_alone(cache, parents)).collect::<Result<_>>()?;
        Ok(median(times).unwrap_or_default())
    };
    let empty = time(None)?;
    let alone = time(Some(&generation.last_parents))?;
    Ok(Some(alone.saturating_sub(empty).as_secs_f64() / step.as_secs_f64()))
}

/// The middle one of some times.
fn median(mut times: Vec<Duration>) -> Option<Duration> {
    times.sort_unstable();
    times.get(times.len() / 2).copied()
}
