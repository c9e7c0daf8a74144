//! What is measured of the kinds of cache.

use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::ProgressBar;
use wgpu_kvcache::{Gpu, Tensor, wgpu};

use crate::kinds::{KINDS, Kind, Shape, Subject, inputs};

/// A map of eight beams to eight beams.
pub(crate) struct Map {
    pub(crate) name: &'static str,
    rows: [u32; 8],
}

pub(crate) const MAPS: &[Map] = &[
    Map { name: "none of eight", rows: [0, 1, 2, 3, 4, 5, 6, 7] },
    Map { name: "two of eight", rows: [0, 1, 2, 2, 4, 5, 6, 6] },
    Map { name: "all of eight", rows: [1, 2, 3, 4, 5, 6, 7, 0] },
];

/// What was found of a kind.
pub(crate) struct Measured {
    pub(crate) kind: &'static Kind,
    /// Milliseconds a decode step, one for each length.
    pub(crate) steps: Vec<f64>,
    /// MiB written a reorder, one for each map.
    pub(crate) reorders: Vec<f64>,
}

/// Steps before a timed one take this long, or are one.
const SETTLE: Duration = Duration::from_millis(20);

/// How often [`all`] moves its progress bar.
pub(crate) fn turns(lengths: &[u32], repeats: usize) -> u64 {
    (KINDS.len() * (lengths.len() * repeats + MAPS.len())) as u64
}

/// Times steps at every length, and counts what reorders of the longest move.
pub(crate) fn all(
    gpu: &Gpu,
    shape: Shape,
    lengths: &[u32],
    repeats: usize,
    bar: &ProgressBar,
) -> Result<Vec<Measured>> {
    let mut measured: Vec<_> = KINDS
        .iter()
        .map(|kind| Measured { kind, steps: Vec::new(), reorders: Vec::new() })
        .collect();
    for &tokens in lengths {
        let steps = times(gpu, shape, tokens as usize, repeats, bar)?;
        measured.iter_mut().zip(steps).for_each(|(measured, step)| measured.steps.push(step));
        wait(gpu)?; // The memory of this length is given back before the next is made.
    }
    let longest = lengths.last().map_or(1, |&tokens| tokens as usize);
    for measured in &mut measured {
        measured.reorders = bytes(gpu, shape, measured.kind, longest, bar)?;
        wait(gpu)?;
    }
    Ok(measured)
}

/// Milliseconds a step of each kind. The kinds take turns, so that whatever slows the machine down for a
/// while slows all of them.
fn times(
    gpu: &Gpu,
    shape: Shape,
    tokens: usize,
    repeats: usize,
    bar: &ProgressBar,
) -> Result<Vec<f64>> {
    let one = inputs(gpu, shape, 1)?;
    let mut subjects =
        KINDS.iter().map(|kind| (kind.make)(gpu, shape, tokens + 2)).collect::<Result<Vec<_>>>()?;
    for subject in &mut subjects {
        subject.hold(tokens)?;
    }
    wait(gpu)?;
    let mut times = vec![Vec::with_capacity(repeats); subjects.len()];
    for _ in 0..repeats {
        for (subject, times) in subjects.iter_mut().zip(&mut times) {
            // The first steps of a turn find the processor's caches full of another kind's data, and its
            // threads where that kind left them. In a decode loop a step follows its own kind.
            let start = Instant::now();
            loop {
                step(gpu, subject.as_mut(), tokens, &one)?;
                if start.elapsed() >= SETTLE {
                    break;
                }
            }
            times.push(step(gpu, subject.as_mut(), tokens, &one)?);
            bar.inc(1);
        }
    }
    Ok(times.into_iter().map(median).collect())
}

/// Milliseconds of one token into every layer: recorded into one pass, submitted, and waited for.
fn step(gpu: &Gpu, subject: &mut dyn Subject, tokens: usize, one: &[Tensor; 2]) -> Result<f64> {
    subject.hold(tokens)?;
    let start = Instant::now();
    gpu.submit_pass("step", |pass| subject.step(pass, one))?;
    wait(gpu)?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

/// MiB that each map writes in a cache of eight rows.
fn bytes(
    gpu: &Gpu,
    shape: Shape,
    kind: &Kind,
    tokens: usize,
    bar: &ProgressBar,
) -> Result<Vec<f64>> {
    let shape = Shape { batch: 8, ..shape };
    let mut subject = (kind.make)(gpu, shape, tokens + 1)?;
    subject.hold(tokens)?;
    let count = |map: &Map| {
        let before = subject.bytes_moved();
        gpu.submit_pass("reorder", |pass| subject.reorder(pass, &map.rows))?;
        wait(gpu)?;
        bar.inc(1);
        let kib = u32::try_from((subject.bytes_moved() - before) / 1024)?;
        Ok(f64::from(kib) / 1024.0)
    };
    MAPS.iter().map(count).collect()
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn wait(gpu: &Gpu) -> Result<()> {
    gpu.device().poll(wgpu::PollType::wait_indefinitely())?;
    Ok(())
}
