//! The share of a step's time that the cache takes.

use std::time::Duration;

use anyhow::Result;
use wgpu_kvcache::{KVCache, SequenceCache};

use crate::engine::Engine;
use crate::generate::Generation;
use crate::serve::Served;

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
    share(&generation.step_times, |is_empty| {
        let parents = &generation.last_parents;
        engine.time_cache_alone(cache, (!is_empty).then_some(parents))
    })
}

/// The same for a step of as many sequences as decoded in the last one.
///
/// # Errors
///
/// If a pass fails.
pub fn sequences_share(
    engine: &Engine,
    cache: &mut SequenceCache,
    served: &Served,
) -> Result<Option<f64>> {
    let sequences =
        (0..served.last_decoding).map(|_| cache.add()).collect::<Result<Vec<_>, _>>()?;
    let share = share(&served.step_times, |is_empty| {
        for &id in &sequences {
            cache.truncate(id, 0)?;
        }
        engine.time_sequences_alone(cache, if is_empty { &[] } else { &sequences })
    })?;
    sequences.into_iter().try_for_each(|id| cache.remove(id))?;
    Ok(share)
}

/// Compares the median of `step_times` to what `time` takes, less what it takes if its pass is empty.
fn share(
    step_times: &[Duration],
    mut time: impl FnMut(bool) -> Result<Duration>,
) -> Result<Option<f64>> {
    let Some(step) = median(step_times.to_vec()) else {
        return Ok(None);
    };
    let mut typical = |is_empty| -> Result<Duration> {
        // The first time may compile something.
        time(is_empty)?;
        let times = (0..REPEATS).map(|_| time(is_empty)).collect::<Result<_>>()?;
        Ok(median(times).unwrap_or_default())
    };
    let (empty, alone) = (typical(true)?, typical(false)?);
    Ok(Some(alone.saturating_sub(empty).as_secs_f64() / step.as_secs_f64()))
}

/// The median of some times.
fn median(mut times: Vec<Duration>) -> Option<Duration> {
    times.sort_unstable();
    times.get(times.len() / 2).copied()
}
