//! The share of a step's time that the cache takes.

use std::time::Duration;

use anyhow::Result;
use wgpu_kvcache::KVCache;

use crate::engine::Engine;
use crate::generate::Generation;

/// How often a pass is repeated for a median.
const REPEATS: usize = 15;

/// The share of a decode step that the cache's own dispatches take, from 0 to 1; `None` if there was no step.
///
/// Timestamps inside a pass are an optional feature and mean little on software adapters. So the cache's dispatches of
/// one step are run again, alone in a pass, several times. The median of an empty pass is subtracted from their
/// median, because the step has the cost of its submission anyway. The cache's content is overwritten.
///
/// # Errors
///
/// If a pass fails.
pub fn cache_share(
    engine: &Engine,
    cache: &mut dyn KVCache,
    generation: &Generation,
) -> Result<Option<f64>> {
    let Some(step) = median(generation.step_times.clone()) else {
        return Ok(None);
    };
    let mut time = |parents: Option<&[u32]>| -> Result<Duration> {
        // The first run may compile something.
        engine.time_cache_alone(cache, parents)?;
        let times =
            (0..REPEATS).map(|_| engine.time_cache_alone(cache, parents)).collect::<Result<_>>()?;
        Ok(median(times).unwrap_or_default())
    };
    let empty = time(None)?;
    let alone = time(Some(&generation.last_parents))?;
    Ok(Some(alone.saturating_sub(empty).as_secs_f64() / step.as_secs_f64()))
}

/// The median of some times.
fn median(mut times: Vec<Duration>) -> Option<Duration> {
    times.sort_unstable();
    times.get(times.len() / 2).copied()
}
