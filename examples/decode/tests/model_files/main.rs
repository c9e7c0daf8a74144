//! Model files that are damaged: whatever their bytes, the decode example reads them or says what is wrong,
//! in bounded time and with memory in proportion to the file. It never panics.
//!
//! Small valid files are built here and damaged at random: bits, bytes, numbers that count or point, ends
//! cut off, pieces moved. Weights are uploaded to wgpu's backend without a driver, so no GPU is needed.
//!
//! The variable `KV_FUZZ_CASES` sets how many files are tried, `KV_FUZZ_SECONDS` how long.

mod damage;
mod reader;
mod seed;

use std::cell::Cell;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use peak_alloc::PeakAlloc;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestRunner};

use damage::damage;
use reader::{Reader, noop_gpu, say, watched};
use seed::{Seed, endless_merges, seeds};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Files that are tried where no variable says how many.
const CASES: u64 = 100_000;

fn variable(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text}")))
}

#[test]
fn the_files_to_damage_are_whole() {
    let reader = Reader::new();
    for seed in seeds() {
        reader.try_file(&noop_gpu(), &seed.bytes).unwrap_or_else(|error| panic!("{error:#}"));
    }
}

#[test]
fn every_file_cut_short_is_refused() {
    let (reader, gpu) = (Reader::new(), noop_gpu());
    for seed in seeds() {
        for length in 0..seed.bytes.len() {
            let error = reader.try_file(&gpu, &seed.bytes[..length]).expect_err("a part of a file");
            assert!(format!("{error:#}").contains("cut short"), "{length} bytes: {error:#}");
        }
    }
}

#[test]
fn dimensions_that_are_not_sane_are_refused() {
    let reader = Reader::new();
    for (changes, words) in [
        (&[("llama.block_count", u64::MAX)][..], "blk.2"),
        (&[("llama.feed_forward_length", 0)], "multiples of 4 above 0"),
        (&[("llama.embedding_length", 0)], "multiples of 4 above 0"),
        (&[("llama.attention.head_count", 0)], "head_count is 0"),
        (&[("llama.attention.key_length", u64::MAX - 3)], "at most 256"),
        (&[("llama.rope.freq_base", u64::from(f32::NAN.to_bits()))], "not sane"),
        (&[("llama.attention.layer_norm_rms_epsilon", 0xff80_0000)], "not sane"),
        (&[("tokenizer.ggml.bos_token_id", 8)], "lists 8 tokens"),
        (&[("tokenizer.ggml.unknown_token_id", 8)], "lists 8 tokens"),
        (&[("gemma3.block_count", u64::MAX)], "blk.2"),
        (&[("gemma3.attention.sliding_window", 0)], "sliding_window is 0"),
        (&[("gemma3.attention.sliding_window_pattern", 0)], "sliding_window_pattern is 0"),
        (&[("gemma3.rope.freq_base_swa", 0)], "not sane"),
    ] {
        let refusal = reader.refusal(changes);
        assert!(refusal.contains(words), "{changes:?}: {refusal}");
    }
}

/// The reader makes room for as many keys as the header promises, before it has read one.
#[test]
fn a_header_that_promises_many_keys_takes_no_memory_for_them() {
    let (reader, gpu) = (Reader::new(), noop_gpu());
    for keys in [100_000_u64, u64::MAX] {
        let bytes = [b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0".as_slice(), &keys.to_le_bytes()].concat();
        MEMORY.reset_peak_usage();
        let before = MEMORY.current_usage();
        let error = reader.try_file(&gpu, &bytes).expect_err("no key is there");
        assert!(MEMORY.peak_usage() - before < 1 << 18, "{keys} keys: {error:#}");
        assert!(format!("{error:#}").contains("fetch it again"), "{error:#}");
    }
}

/// Tokens that are merged from others in very many ways would take far more memory than the file has bytes.
#[test]
fn a_vocabulary_of_endless_merges_is_refused() {
    let refusal = Reader::new().refusal_of(&endless_merges());
    assert!(refusal.contains("can be merged from others"), "{refusal}");
}

/// Tries some files, and returns how many of them were still whole.
fn try_some(reader: &Reader, seeds: &[Seed]) -> u64 {
    let gpu = noop_gpu();
    let whole = Cell::new(0);
    let config = Config { cases: 500, failure_persistence: None, ..Config::default() };
    let strategy = (any::<Index>(), prop::collection::vec(damage(), 1..5));
    TestRunner::new(config)
        .run(&strategy, |(seed, damages)| {
            let Seed { bytes, numbers } = seed.get(seeds);
            let mut bytes = bytes.clone();
            damages.iter().for_each(|damage| damage.apply(&mut bytes, numbers, seeds));
            whole.set(whole.get() + u64::from(reader.try_file(&gpu, &bytes).is_ok()));
            Ok(())
        })
        .unwrap_or_else(|failure| panic!("{failure}"));
    whole.get()
}

#[test]
fn damaged_files_are_read_or_refused() {
    let (reader, seeds) = (Reader::new(), seeds());
    let seconds = variable("KV_FUZZ_SECONDS").map(Duration::from_secs);
    let cases =
        variable("KV_FUZZ_CASES").unwrap_or(if seconds.is_some() { u64::MAX } else { CASES });
    let start = Instant::now();
    let files = || reader.files.load(Ordering::Relaxed);
    let is_over = || files() >= cases || seconds.is_some_and(|bound| start.elapsed() >= bound);
    let mut whole = 0;
    watched(&reader, || {
        while !is_over() {
            // The tokenizers' library keeps something for every tokenizer as long as its thread lives.
            let some =
                || std::thread::scope(|scope| scope.spawn(|| try_some(&reader, &seeds)).join());
            whole += some().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    });
    let took = start.elapsed().as_secs();
    say(&format!("{} damaged files in {took} s, {whole} of them still whole", files()));
}
