//! Draws what this crate gains: the time of a decode step and the bytes of a reorder, beside a cache
//! that concatenates, measured in one run on the adapter at hand.
//!
//! ```sh
//! cargo run --release -p chart
//! cargo run --release -p chart -- --pool docs/pool.svg
//! ```
//!
//! The second draws something else: the pages in use while 2,000 requests arrive, are answered and leave.
//!
//! Another kind of cache is one more entry of `KINDS` in `kinds.rs`.

mod arrivals;
mod draw;
mod kinds;
mod measure;
mod pool;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use wgpu_kvcache::Gpu;

use kinds::Shape;
use measure::{MAPS, Measured};

/// Measures decode steps and reorders on this machine's adapter, and draws them as one SVG. The same
/// numbers go to stdout as Markdown.
///
/// Room is made beforehand, so a step is one between two growths. All kinds of cache are alive at once
/// and take turns, which needs memory: at the default lengths and shape about 3.5 GiB.
#[derive(Parser)]
#[command(name = "chart")]
struct Arguments {
    /// Layers of the model; a step writes one token into each.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = positive)]
    layers: usize,
    /// Batch rows of a step. A reorder always has eight.
    #[arg(long, value_name = "B", default_value_t = 4, value_parser = positive)]
    batch: usize,
    /// K/V heads.
    #[arg(long, value_name = "H", default_value_t = 8, value_parser = positive)]
    heads: usize,
    /// Elements of a head, in f32: a multiple of four.
    #[arg(long, value_name = "D", default_value_t = 64, value_parser = positive)]
    head_dim: usize,
    /// Tokens that the cache holds when a step is timed. The longest is reordered.
    #[arg(
        long,
        value_name = "T,T,...",
        value_delimiter = ',',
        default_value = "128,256,512,1024,2048,4096",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    lengths: Vec<u32>,
    /// Timed steps of each kind at each length; the median counts.
    #[arg(long, value_name = "N", default_value_t = 61, value_parser = positive)]
    repeats: usize,
    /// Where the picture goes.
    #[arg(long, value_name = "FILE", default_value = "docs/speed.svg")]
    out: PathBuf,
    /// Draw the pages of sequences that come and go into this file, in place of the speed. No model runs: requests
    /// arrive at random, and their lengths are random.
    #[arg(long, value_name = "FILE")]
    pool: Option<PathBuf>,
    /// Date in the title.
    #[arg(long, value_name = "DATE", default_value_t = today())]
    date: String,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<()> {
    if let Some(out) = &arguments.pool {
        return draw_pool(out);
    }
    let Arguments { layers, batch, heads, head_dim: dim, mut lengths, repeats, out, date, .. } =
        arguments;
    ensure!(dim.is_multiple_of(4), "--head-dim is {dim}, and must be a multiple of four");
    lengths.sort_unstable();
    lengths.dedup();
    // Found out before the minutes of measuring, not after them.
    let folder = out.parent().context("--out names no file")?;
    std::fs::create_dir_all(folder).with_context(|| format!("no folder for {}", out.display()))?;

    let gpu = Gpu::headless()?;
    let shape = Shape { layers, batch, heads, dim };
    let bar = ProgressBar::new(measure::turns(&lengths, repeats))
        .with_style(ProgressStyle::with_template("measuring {bar:40} {pos} of {len}, {eta} left")?);
    let measured = measure::all(&gpu, shape, &lengths, repeats, &bar)?;
    bar.finish_and_clear();

    print_markdown(&lengths, &measured);
    let info = gpu.device().adapter_info();
    let subtitle = format!(
        "{}, {} {}, {:?}, {date}.  {layers} layers, B {batch}, H {heads}, D {dim}, f32",
        info.name, info.driver, info.driver_info, info.backend
    );
    draw::chart(&out, &subtitle, &lengths, &measured)
        .with_context(|| format!("cannot draw {}", out.display()))?;
    eprintln!("{} is drawn", out.display());
    Ok(())
}

/// Simulates a small server and draws its pages over time.
fn draw_pool(out: &Path) -> Result<()> {
    let folder = out.parent().context("--pool names no file")?;
    std::fs::create_dir_all(folder).with_context(|| format!("no folder for {}", out.display()))?;
    let gpu = Gpu::headless()?;
    let traffic = arrivals::SERVER;
    let bar = ProgressBar::new(traffic.requests as u64)
        .with_style(ProgressStyle::with_template("requests {bar:40} {pos} of {len}, {eta} left")?);
    let samples = arrivals::run(&gpu, traffic, &bar)?;
    bar.finish_and_clear();
    let sum = |of: fn(&arrivals::Sample) -> usize| samples.iter().map(of).sum::<usize>();
    let peak = |of: fn(&arrivals::Sample) -> usize| samples.iter().map(of).max().unwrap_or(0);
    let subtitle = format!(
        "{} requests at random (Poisson arrivals, log-normal lengths), at most {} at a time; \
         peak {} pages, padded {}; on average {} % of the padded batch",
        traffic.requests,
        traffic.running,
        peak(|it| it.pages_used),
        peak(|it| it.padded),
        100 * sum(|it| it.pages_used) / sum(|it| it.padded).max(1),
    );
    println!("{subtitle}");
    pool::chart(out, &subtitle, &samples)
        .with_context(|| format!("cannot draw {}", out.display()))?;
    eprintln!("{} is drawn", out.display());
    Ok(())
}

fn print_markdown(lengths: &[u32], measured: &[Measured]) {
    let names: Vec<_> = measured.iter().map(|measured| measured.kind.name).collect();
    let head = |first: &str| {
        println!("| {first} | {} |", names.join(" | "));
        println!("| ---: |{}", " ---: |".repeat(names.len()));
    };
    head("tokens in the cache");
    for (at, tokens) in lengths.iter().enumerate() {
        let steps: Vec<_> =
            measured.iter().map(|measured| format!("{:.3} ms", measured.steps[at])).collect();
        println!("| {tokens} | {} |", steps.join(" | "));
    }
    println!();
    head("beams that change");
    for (at, map) in MAPS.iter().enumerate() {
        let reorders: Vec<_> =
            measured.iter().map(|measured| format!("{:.1} MiB", measured.reorders[at])).collect();
        println!("| {} | {} |", map.name, reorders.join(" | "));
    }
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(error) => Err(error.to_string()),
    }
}

/// The date in UTC.
fn today() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    civil_from_days(since.as_secs() / (24 * 60 * 60))
}

/// The date that is `days` days after 1970-01-01. Years are counted from March here, so that a leap day
/// is the last of its year, in eras of 400 years, which all have the same days.
fn civil_from_days(days: u64) -> String {
    let days = days + 719_468; // since 0000-03-01
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let year = 400 * era + year + month / 10;
    format!("{year:04}-{:02}-{day:02}", (month + 2) % 12 + 1)
}
