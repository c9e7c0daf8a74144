//! A small decoder in burn, four loops side by side: K and V that grow by `cat`, with two matmuls or with burn's
//! attention; K and V that are written by `slice_assign`, with burn's attention; and this crate.
//!
//! `cargo run --example decoder -- --help`

#[expect(dead_code, reason = "the tests use the rest")]
mod model;

use std::time::{Duration, Instant};

use burn::tensor::{Tensor, TensorData};
use model::{Assigned, Attend, Concatenated, Decoder, Form, Shape, noise};
use wgpu_kvcache_burn::wgpu_kvcache::DynamicKVCache;
use wgpu_kvcache_burn::{AttendOptions, BurnCache, SharedDevice};

const HELP: &str = "\
A small decoder with random weights, in burn: its K and V grow by cat, are written by slice_assign, or lie in
wgpu-kvcache. Prints the tokens of each and the largest difference of the logits.

usage: decoder [--head-dim N] [--kv-heads N] [--tokens N] [--bench [--lengths A,B,..] [--steps N]
               [--rows N]]

  --head-dim N     elements a head, of 8 heads and 2 layers (default 32)
  --kv-heads N     heads of K and V, which the 8 query heads share: 1, 2, 4 or 8 (default 8)
  --tokens N       tokens to decode (default 40)
  --bench          measure a step at several lengths instead, in turns, and print a table
  --lengths A,B    the lengths (default 64,512,2048,8192)
  --steps N        steps a turn (default 5)
  --rows N         batch rows (default 1)
";

/// The decoder, with so many heads of K and V, of so many elements.
fn shape(kv_heads: usize, head_dim: usize) -> Result<Shape, Error> {
    let heads: usize = 8;
    if !heads.is_multiple_of(kv_heads) {
        return Err(format!("--kv-heads {kv_heads}: {heads} query heads cannot share them").into());
    }
    Ok(Shape { layers: 2, heads, kv_heads, head_dim, vocabulary: 256 })
}

/// This crate's cache as the attention of the decoder: all that a model needs to change.
struct Cached(BurnCache<DynamicKVCache>);

impl Cached {
    fn new(shared: &SharedDevice) -> Self {
        Self(BurnCache::new(shared, DynamicKVCache::new(shared.gpu())))
    }
}

impl Attend for Cached {
    fn attend(&mut self, layer: usize, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
        self.0.attend(layer, q, k, v, AttendOptions::default().bthd()).expect("attention")
    }
}

type Error = Box<dyn std::error::Error>;

/// The argument after `name`.
fn value<'a>(arguments: &'a [String], name: &str) -> Option<&'a str> {
    let at = arguments.iter().position(|argument| argument == name)?;
    arguments.get(at + 1).map(String::as_str)
}

fn main() -> Result<(), Error> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--help" || argument == "-h") {
        print!("{HELP}");
        return Ok(());
    }
    let number = |name, default: usize| value(&arguments, name).map_or(Ok(default), str::parse);
    let shape = shape(number("--kv-heads", 8)?, number("--head-dim", 32)?)?;
    let shared = SharedDevice::new()?;
    let decoder = Decoder::new(shape, shared.device());
    if arguments.iter().any(|argument| argument == "--bench") {
        let lengths = value(&arguments, "--lengths").unwrap_or("64,512,2048,8192");
        let lengths: Vec<usize> = lengths.split(',').map(str::parse).collect::<Result<_, _>>()?;
        let bench = Bench { shared: &shared, decoder: &decoder, rows: number("--rows", 1)? };
        return bench.run(&lengths, number("--steps", 5)?);
    }
    compare(&shared, &decoder, number("--tokens", 40)?)
}

/// The loops.
const NAMES: [&str; 4] = ["cat, matmul", "cat, attention", "slice_assign, attention", "this crate"];
const TURNS: usize = 5;

/// The loops by name, for so many rows of at most `capacity` tokens.
fn loops(
    shared: &SharedDevice,
    shape: Shape,
    rows: usize,
    capacity: usize,
) -> Vec<(&'static str, Box<dyn Attend>)> {
    let assigned = Assigned::new(Form::Module, shape, rows, capacity, shared.device());
    vec![
        (NAMES[0], Box::new(Concatenated::new(Form::Matmul, shape.layers))),
        (NAMES[1], Box::new(Concatenated::new(Form::Module, shape.layers))),
        (NAMES[2], Box::new(assigned)),
        (NAMES[3], Box::new(Cached::new(shared))),
    ]
}

/// The numbers of a tensor.
fn read(tensor: Tensor<3>) -> Result<Vec<f32>, Error> {
    tensor.try_into_vec_as::<f32>().map_err(|error| format!("{error:?}").into())
}

/// Decodes the same tokens with all loops.
fn compare(shared: &SharedDevice, decoder: &Decoder, tokens: usize) -> Result<(), Error> {
    let mut loops = loops(shared, decoder.shape, 1, tokens + 8);
    let mut next = vec![(1..=8).collect::<Vec<u32>>()];
    let mut decoded = Vec::new();
    let mut differences = vec![0.0_f32; loops.len()];
    let mut position = 0;
    for _ in 0..tokens {
        let count = next[0].len();
        let positions = vec![(position..position + count).collect::<Vec<_>>()];
        position += count;
        let mut first: Option<Vec<f32>> = None;
        for ((_, attend), most) in loops.iter_mut().zip(&mut differences) {
            let logits = decoder.forward(&next, &positions, &mut **attend).narrow(1, count - 1, 1);
            let logits = read(logits)?;
            let first = first.get_or_insert_with(|| logits.clone());
            let difference = first.iter().zip(&logits).map(|(a, b)| (a - b).abs());
            *most = difference.fold(*most, f32::max);
        }
        let logits = first.unwrap_or_default();
        let best = (0_u32..).zip(&logits).max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |it| it.0);
        decoded.push(best);
        next = vec![vec![best]];
    }
    println!("{decoded:?}");
    for ((name, _), difference) in loops.iter().zip(differences) {
        println!("{name:24} differs from the first by {difference:e}");
    }
    Ok(())
}

/// A loop and what was measured of it.
struct Measured {
    attend: Box<dyn Attend>,
    position: usize,
    times: Vec<Duration>,
}

impl Measured {
    /// The median, in milliseconds.
    fn median(&mut self) -> f64 {
        self.times.sort();
        self.times[self.times.len() / 2].as_secs_f64() * 1e3
    }
}

/// What is measured.
struct Bench<'a> {
    shared: &'a SharedDevice,
    decoder: &'a Decoder,
    rows: usize,
}

impl Bench<'_> {
    /// Measures steps at these lengths, in turns: of the whole decoder, and of attention of all layers alone.
    fn run(&self, lengths: &[usize], steps: usize) -> Result<(), Error> {
        let (shape, rows) = (self.decoder.shape, self.rows);
        println!(
            "{shape:?}, {rows} rows; ms a step, in brackets this crate's time as a part of it"
        );
        println!("| tokens | of | {} |", NAMES.join(" | "));
        println!("| --: | :-- | --: | --: | --: | --: |");
        for &length in lengths {
            let mut loops = self.filled(length, 2 * steps * (TURNS + 1))?;
            let new = self.random(1);
            for what in ["the decoder", "attention alone"] {
                // The first turn compiles and tunes.
                for turn in 0..=TURNS {
                    for measured in &mut loops {
                        for _ in 0..steps {
                            let start = Instant::now();
                            match what {
                                "the decoder" => self.step(measured)?,
                                _ => self.attend(&mut *measured.attend, &new)?,
                            }
                            measured.position += 1;
                            if turn > 0 {
                                measured.times.push(start.elapsed());
                            }
                        }
                    }
                }
                let medians: Vec<f64> = loops.iter_mut().map(Measured::median).collect();
                let own = medians[medians.len() - 1];
                let cells = medians.iter().map(|its| format!("{its:.1} ({:.2})", own / its));
                println!("| {length} | {what} | {} |", cells.collect::<Vec<_>>().join(" | "));
                loops.iter_mut().for_each(|measured| measured.times.clear());
            }
        }
        Ok(())
    }

    /// The next token of each row through the decoder.
    fn step(&self, measured: &mut Measured) -> Result<(), Error> {
        let at = vec![vec![measured.position]; self.rows];
        let tokens = vec![vec![5]; self.rows];
        read(self.decoder.forward(&tokens, &at, &mut *measured.attend)).map(|_| ())
    }

    /// Random q, K and V of some tokens of each row, (B, T, heads, D).
    fn random(&self, tokens: usize) -> [Tensor<4>; 3] {
        let Shape { heads, kv_heads, head_dim, .. } = self.decoder.shape;
        [heads, kv_heads, kv_heads].map(|heads| {
            let shape = [self.rows, tokens, heads, head_dim];
            let values = noise(&mut 5, shape.iter().product());
            Tensor::from_data(TensorData::new(values, shape), self.shared.device())
        })
    }

    /// Attention of all layers, of the same q, K and V.
    fn attend(&self, attend: &mut dyn Attend, new: &[Tensor<4>; 3]) -> Result<(), Error> {
        let layers = self.decoder.shape.layers;
        for layer in 0..layers {
            let [q, k, v] = new.each_ref().map(Tensor::clone);
            let context = attend.attend(layer, q, k, v);
            if layer + 1 == layers {
                read(context.narrow(1, 0, 1).flatten(0, 1))?;
            }
        }
        Ok(())
    }

    /// The loops, with caches that hold `length` tokens a row and have space for more.
    fn filled(&self, length: usize, more: usize) -> Result<Vec<Measured>, Error> {
        let mut all = Vec::new();
        for (_, mut attend) in loops(self.shared, self.decoder.shape, self.rows, length + more) {
            let mut position = 0;
            // With one query a piece: attention of all would take minutes.
            let [query, ..] = self.random(1);
            while position < length {
                let count = (length - position).min(256);
                let [_, key, value] = self.random(count);
                self.attend(&mut *attend, &[query.clone(), key, value])?;
                position += count;
            }
            all.push(Measured { attend, position, times: Vec::new() });
        }
        Ok(all)
    }
}
