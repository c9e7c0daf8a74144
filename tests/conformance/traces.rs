//! Replays recorded runs of the system whose interface this crate implements. `tests/traces/README.md`
//! gives the format.
//!
//! The variable `KV_TRACES` names a further folder of traces to replay. With few histories (`KV_HISTORIES`) each trace is
//! replayed in some types and formats, in turn.

use std::path::Path;

use half::{bf16, f16};
use serde::Deserialize;
use wgpu_kvcache::{
    CacheOptions, CachePosition, DynamicKVCache, Element, Error, Format, Formats, Gpu, KVCache,
    PagedKVCache, StaticKVCache,
};

use crate::rig::{read_back, same_bits};
use crate::wait::ReadLayer;
use crate::{cases, gpu, kernels_run};

#[derive(Deserialize)]
struct Trace {
    cache: Kind,
    steps: Vec<Step>,
}

#[derive(Deserialize)]
struct Kind {
    kind: String,
    head_dim: usize,
    num_layers: usize,
    max_cache_len: Option<usize>,
}

#[derive(Deserialize)]
struct Step {
    #[serde(flatten)]
    op: Op,
    #[serde(default)]
    error: bool,
}

#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
enum Op {
    Update { layer: usize, shape: Vec<usize>, base: u64, position: Option<Position> },
    Get { layer: usize, expect: Option<Contents> },
    GetSeqLength { layer: usize, expect: usize },
    GetMaxCacheShape { expect: Option<usize> },
    ReorderCache { indices: Vec<u32> },
    BatchSelectIndices { indices: Vec<u32> },
    BatchRepeatInterleave { repeats: usize },
    Crop { max_length: usize },
    Reset,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Position {
    One(u32),
    PerToken(Vec<u32>),
    PerRow(Vec<Vec<u32>>),
}

#[derive(Deserialize)]
struct Contents {
    shape: [usize; 4],
    key: Vec<f32>,
    value: Vec<f32>,
}

/// An element type that small whole numbers are exact in.
trait Number: Element + PartialEq + std::fmt::Debug {
    fn of(number: f32) -> Self;
}

impl Number for f32 {
    fn of(number: f32) -> Self {
        number
    }
}

impl Number for f16 {
    fn of(number: f32) -> Self {
        Self::from_f32(number)
    }
}

impl Number for bf16 {
    fn of(number: f32) -> Self {
        Self::from_f32(number)
    }
}

/// The tensors of an update: element i is ((base + i) * factor mod modulus) - half.
fn made<E: Number>(base: u64, count: usize, factor: u64, modulus: u64, half: i16) -> Vec<E> {
    (base..)
        .take(count)
        .map(|i| {
            let number = i16::try_from(i * factor % modulus).expect("the modulus is small");
            E::of(f32::from(number - half))
        })
        .collect()
}

fn update<E: Number>(
    gpu: &Gpu,
    cache: &mut dyn KVCache,
    (layer, shape, base, position): (usize, &[usize], u64, &Option<Position>),
) -> Result<(), Error> {
    let count = shape.iter().product();
    let key = gpu.upload(&made::<E>(base, count, 7919, 251, 125), shape)?;
    let value = gpu.upload(&made::<E>(base, count, 104_729, 241, 120), shape)?;
    let position = match position {
        None => CachePosition::Append,
        Some(Position::One(position)) => CachePosition::At(*position),
        Some(Position::PerToken(positions)) => CachePosition::PerToken(positions),
        Some(Position::PerRow(rows)) => CachePosition::PerRow(rows),
    };
    gpu.submit_pass("update", |pass| {
        cache.update(pass, &key.view(), &value.view(), layer, position).map(|_| ())
    })
}

/// One step; `Err` is the cache's own refusal.
fn step<E: Number>(
    gpu: &Gpu,
    cache: &mut dyn KVCache,
    op: &Op,
    context: &str,
) -> Result<(), Error> {
    match op {
        Op::Update { layer, shape, base, position } => {
            update::<E>(gpu, cache, (*layer, shape, *base, position))?;
        }
        Op::Get { layer, expect } => {
            let got = read_back(|| cache.stats(), || cache.read(*layer), context)?;
            assert_eq!(got.is_some(), expect.is_some(), "{context}: presence");
            if let (Some((key, value)), Some(expect)) = (got, expect) {
                for (what, tensor, numbers) in
                    [("key", key, &expect.key), ("value", value, &expect.value)]
                {
                    assert_eq!(tensor.shape(), expect.shape, "{context}: shape of {what}");
                    let numbers: Vec<E> = numbers.iter().map(|&number| E::of(number)).collect();
                    let bits: &[u8] = bytemuck::cast_slice(&numbers);
                    assert!(same_bits(tensor.bytes(), bits), "{context}: bits of {what}");
                }
            }
        }
        Op::GetSeqLength { layer, expect } => {
            assert_eq!(cache.get_seq_length(*layer)?, *expect, "{context}");
        }
        Op::GetMaxCacheShape { expect } => {
            assert_eq!(cache.get_max_cache_shape(), *expect, "{context}");
        }
        Op::ReorderCache { indices } => {
            gpu.submit_pass("reorder", |pass| cache.reorder_cache(pass, indices))?;
        }
        Op::BatchSelectIndices { indices } => {
            gpu.submit_pass("select", |pass| cache.batch_select_indices(pass, indices))?;
        }
        Op::BatchRepeatInterleave { repeats } => {
            gpu.submit_pass("repeat", |pass| cache.batch_repeat_interleave(pass, *repeats))?;
        }
        Op::Crop { max_length } => cache.crop(*max_length),
        Op::Reset => cache.reset(),
    }
    Ok(())
}

/// The cache that a trace was recorded on, then paged ones with the same bounds.
fn caches(gpu: &Gpu, trace: &Trace, name: &str, formats: Formats) -> Vec<Box<dyn KVCache>> {
    let bound = trace.cache.max_cache_len;
    let stored = CacheOptions::default().with_formats(formats);
    let recorded: Box<dyn KVCache> = match (trace.cache.kind.as_str(), trace.cache.max_cache_len) {
        ("dynamic", None) => {
            Box::new(DynamicKVCache::with_options(gpu, stored).expect("its options"))
        }
        ("static", Some(bound)) => Box::new(
            StaticKVCache::with_options(
                gpu,
                stored.with_max_cache_len(bound).with_num_layers(trace.cache.num_layers),
            )
            .expect("both options"),
        ),
        (kind, bound) => panic!("{name}: no cache of kind {kind} with bound {bound:?}"),
    };
    let paged = [1, 4, 16].map(|page_tokens| {
        let num_layers = bound.map(|_| trace.cache.num_layers);
        let options = stored
            .with_page_tokens(page_tokens)
            .with_max_cache_len(bound)
            .with_num_layers(num_layers);
        let cache = PagedKVCache::with_options(gpu, options).expect("a power of two");
        Box::new(cache) as Box<dyn KVCache>
    });
    [recorded].into_iter().chain(paged).collect()
}

fn replay<E: Number>(gpu: &Gpu, trace: &Trace, name: &str) {
    for (kind, mut cache) in caches(gpu, trace, name, Formats::default()).into_iter().enumerate() {
        for (number, Step { op, error }) in trace.steps.iter().enumerate() {
            let context = format!("{name}, {}, cache {kind}, step {number}", E::DTYPE);
            let result = step::<E>(gpu, cache.as_mut(), op, &context);
            assert_eq!(result.is_err(), *error, "{context}: answered {result:?}");
        }
    }
}

/// Replays a trace with f32 tensors that are stored in `format`. What is read back is near what was recorded: as near as
/// the format has numbers, and zero where a whole head is.
fn replay_stored(gpu: &Gpu, trace: &Trace, name: &str, format: Format) {
    // Numbers of up to 125: exact in 8 bits and more, half a step of 125 / 127 away, or a whole step of 125 / 8, since 7 is
    // the highest number of q4_0.
    let bound = match format {
        Format::Q8_0 => 0.5,
        Format::Q4_0 => 15.7,
        _ => 0.0,
    };
    let near = |got: &[f32], expected: &[f32], context: &str| {
        for (got, expected) in
            got.chunks(trace.cache.head_dim).zip(expected.chunks(trace.cache.head_dim))
        {
            let is_zero = expected.iter().all(|x| *x == 0.0);
            let bound = if is_zero { 0.0 } else { bound };
            let mut pairs = got.iter().zip(expected);
            assert!(pairs.all(|(a, b)| (a - b).abs() <= bound), "{context}: {got:?}, {expected:?}");
        }
    };
    for (kind, mut cache) in caches(gpu, trace, name, format.into()).into_iter().enumerate() {
        for (number, Step { op, error }) in trace.steps.iter().enumerate() {
            let context = format!("{name}, {format}, cache {kind}, step {number}");
            if let Op::Get { layer, expect: Some(expect) } = op {
                let (key, value) = cache.read(*layer).unwrap().expect("the trace has tokens");
                assert_eq!([key.shape(), value.shape()], [expect.shape; 2], "{context}");
                if kernels_run() {
                    near(&key.to_f32(), &expect.key, &context);
                    near(&value.to_f32(), &expect.value, &context);
                }
                continue;
            }
            let result = step::<f32>(gpu, cache.as_mut(), op, &context);
            assert_eq!(result.is_err(), *error, "{context}: answered {result:?}");
        }
    }
}

/// The traces of a folder, and their names.
#[cfg(not(target_arch = "wasm32"))]
fn files_of(folder: &Path) -> Vec<(String, String)> {
    let entries = std::fs::read_dir(folder)
        .unwrap_or_else(|error| panic!("cannot read {}: {error}", folder.display()));
    let mut files: Vec<_> = entries
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .collect();
    files.sort();
    let read = |path: std::path::PathBuf| {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{name}: {error}"));
        (name, text)
    };
    files.into_iter().map(read).collect()
}

/// The traces, which the page has fetched.
#[cfg(target_arch = "wasm32")]
fn files_of(_: &Path) -> Vec<(String, std::rc::Rc<str>)> {
    crate::browser::files()
}

/// Replays a trace in one type or format.
type Way = fn(&Gpu, &Trace, &str);

const WAYS: [Way; 7] = [
    replay::<f32>,
    |gpu, trace, name| replay_stored(gpu, trace, name, Format::Q8_0),
    |gpu, trace, name| replay_stored(gpu, trace, name, Format::Q4_0),
    replay::<f16>,
    replay::<bf16>,
    |gpu, trace, name| replay_stored(gpu, trace, name, Format::F16),
    |gpu, trace, name| replay_stored(gpu, trace, name, Format::BF16),
];

/// How many of them, from the first on, take heads of an odd number of elements.
const WAYS_OF_ODD_HEADS: usize = 3;

/// Replays a folder in every type and format that fits, or in some of them in turn where few cases are asked for, and
/// returns how many traces it holds.
fn replay_folder(folder: &Path) -> usize {
    let gpu = gpu();
    let files = files_of(folder);
    for (number, (name, text)) in files.iter().enumerate() {
        let trace: Trace =
            serde_json::from_str(text).unwrap_or_else(|error| panic!("{name}: {error}"));
        let fit =
            if trace.cache.head_dim.is_multiple_of(2) { WAYS.len() } else { WAYS_OF_ODD_HEADS };
        let some = cases(fit).min(fit);
        for replay in WAYS[..fit].iter().cycle().skip(number % fit).take(some) {
            replay(&gpu, &trace, name);
        }
    }
    assert!(!files.is_empty(), "{} holds no *.json to replay", folder.display());
    files.len()
}

#[test]
fn the_crate_answers_as_the_traces_do() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/traces");
    assert_eq!(replay_folder(&folder), 80);
}

#[test]
fn further_traces_are_answered_as_well() {
    let Some(folder) = std::env::var_os("KV_TRACES") else { return };
    let replayed = replay_folder(Path::new(&folder));
    // Straight to the terminal: the test harness holds back what a passing test prints.
    let line = format!("replayed {replayed} further traces from {}\n", folder.display());
    std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes()).expect("a stderr");
}
