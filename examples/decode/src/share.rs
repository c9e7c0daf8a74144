//! The share of a step's time that the cache takes.

use std::time::{Duration, Instant};

use anyhow::Result;
use wgpu_kvcache::{KVCache, SequenceCache, wgpu};

use crate::blocking::Engine;
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
        time(engine, |pass| match is_empty {
            true => Ok(()),
            false => engine.record_cache_alone(pass, cache, parents),
        })
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
        time(engine, |pass| match is_empty || sequences.is_empty() {
            true => Ok(()),
            false => engine.record_sequences_alone(pass, cache, &sequences),
        })
    })?;
    sequences.into_iter().try_for_each(|id| cache.remove(id))?;
    Ok(share)
}

/// The time of a pass, from recording to the end of its work.
fn time(
    engine: &Engine,
    record: impl FnOnce(&mut wgpu::ComputePass<'_>) -> Result<()>,
) -> Result<Duration> {
    let (gpu, start) = (engine.gpu(), Instant::now());
    gpu.submit_pass("the cache alone", record)?;
    gpu.device().poll(wgpu::PollType::wait_indefinitely())?;
    Ok(start.elapsed())
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
