//! Model files that are damaged: whatever their bytes, the decode example reads them or says what is wrong,
//! in bounded time and with memory in proportion to the file. It never panics.
//!
//! Small valid files are built here and damaged at random: bits, bytes, numbers that count or point, ends
//! cut off, pieces moved. Weights are uploaded to wgpu's backend without a driver, so no GPU is needed.
//!
//! The variable `KV_FUZZ_CASES` sets how many files are tried, `KV_FUZZ_SECONDS` how long.

#[path = "../examples/decode/llama/mod.rs"]
mod llama;

use std::cell::Cell;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use peak_alloc::PeakAlloc;
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestRunner};
use wgpu_kvcache::{Gpu, wgpu};

use llama::{GgufFile, Model, Tokenizer};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Far more than any file here takes, and far less than a hang.
const BOUND: Duration = Duration::from_secs(10);
/// Memory that a file of any size may take.
const BYTES: usize = 4 << 20;
/// Memory that it may take for each of its bytes: stored blocks become `f32`, are brought into the
/// kernels' order, where four rows take the room of 32, and lie in staging buffers on top.
const BYTES_A_BYTE: usize = 512;
/// Files that are tried where no variable says how many.
const CASES: u64 = 100_000;

/// A valid file, and where in it the numbers lie that count, size or point: place and bytes.
#[derive(Default)]
struct Seed {
    bytes: Vec<u8>,
    numbers: Vec<(usize, usize)>,
}

impl Seed {
    fn u32(&mut self, number: u32) {
        self.numbers.push((self.bytes.len(), 4));
        self.bytes.extend(number.to_le_bytes());
    }

    fn u64(&mut self, number: usize) {
        self.numbers.push((self.bytes.len(), 8));
        self.bytes.extend((number as u64).to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.u64(text.len());
        self.bytes.extend(text.as_bytes());
    }

    fn key(&mut self, key: &str, value: &Value<'_>) {
        self.text(key);
        match *value {
            Value::Count(number) => {
                self.u32(4);
                self.u32(number);
            }
            Value::Wide(number) => {
                self.u32(10);
                self.u64(number);
            }
            Value::Number(number) => {
                self.u32(6);
                self.u32(number.to_bits());
            }
            Value::Flag(flag) => {
                self.u32(7);
                self.bytes.push(u8::from(flag));
            }
            Value::Text(text) => {
                self.u32(8);
                self.text(text);
            }
            Value::Texts(texts) => {
                self.list(8, texts.len());
                texts.iter().for_each(|text| self.text(text));
            }
            Value::Integers(integers) => {
                self.list(5, integers.len());
                integers.iter().for_each(|&integer| self.u32(integer));
            }
            Value::Bytes(bytes) => {
                self.list(0, bytes.len());
                self.bytes.extend(bytes);
            }
        }
    }

    fn list(&mut self, kind: u32, length: usize) {
        self.u32(9);
        self.u32(kind);
        self.u64(length);
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(32), 0);
    }
}

/// What lies under a key.
enum Value<'a> {
    Count(u32),
    Wide(usize),
    Number(f32),
    Flag(bool),
    Text(&'a str),
    Texts(&'a [&'a str]),
    Integers(&'a [u32]),
    Bytes(&'a [u8]),
}

/// How numbers are stored: GGUF's number for it, numbers a block, bytes a block.
type Format = (u32, usize, usize);
const F32: Format = (0, 1, 4);
const F16: Format = (1, 1, 2);
const Q4_0: Format = (2, 32, 18);
const Q4_1: Format = (3, 32, 20);
const Q8_0: Format = (8, 32, 34);
const BF16: Format = (30, 1, 2);

/// A model of one or more layers, of two heads that share their K and V.
struct Tiny {
    layers: u32,
    width: usize,
    /// Formats that the matrices take in turn.
    formats: &'static [Format],
    /// With a head of its own, divisors of the rotary frequencies, and keys that may be left out.
    has_all: bool,
}

const TOKENS: [&str; 8] = ["<|endoftext|>", "a", "b", "c", "ab", "bc", "Ġ", "Ġa"];
const KINDS: [u32; 8] = [3, 1, 1, 1, 1, 1, 1, 1];
const MERGES: [&str; 3] = ["a b", "b c", "Ġ a"];

impl Tiny {
    fn tensors(&self) -> Vec<(String, Vec<usize>, Format)> {
        let Self { width, .. } = *self;
        let mut formats = self.formats.iter().copied().cycle();
        let mut matrix = |name: String, inputs: usize, outputs: usize| {
            (name, vec![inputs, outputs], formats.next().expect("a cycle does not end"))
        };
        let vector = |name: String, length: usize| (name, vec![length], F32);
        let mut tensors = vec![
            matrix("token_embd.weight".to_owned(), width, TOKENS.len()),
            vector("output_norm.weight".to_owned(), width),
        ];
        if self.has_all {
            tensors.push(matrix("output.weight".to_owned(), width, TOKENS.len()));
            tensors.push(vector("rope_freqs.weight".to_owned(), width / 4));
        }
        for layer in 0..self.layers {
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            tensors.push(vector(name("attn_norm"), width));
            tensors.push(vector(name("ffn_norm"), width));
            for (part, outputs) in [
                ("attn_q", width),
                ("attn_k", width / 2),
                ("attn_v", width / 2),
                ("attn_output", width),
                ("ffn_gate", width),
                ("ffn_up", width),
                ("ffn_down", width),
            ] {
                tensors.push(matrix(name(part), width, outputs));
            }
        }
        tensors
    }

    fn keys(&self) -> Vec<(&'static str, Value<'static>)> {
        let width = u32::try_from(self.width).expect("tiny");
        let mut keys = vec![
            ("general.architecture", Value::Text("llama")),
            ("llama.block_count", Value::Count(self.layers)),
            ("llama.context_length", Value::Count(64)),
            ("llama.embedding_length", Value::Count(width)),
            ("llama.feed_forward_length", Value::Count(width)),
            ("llama.attention.head_count", Value::Count(2)),
            ("llama.attention.head_count_kv", Value::Count(1)),
            ("llama.attention.layer_norm_rms_epsilon", Value::Number(1e-5)),
            ("tokenizer.ggml.model", Value::Text("gpt2")),
            ("tokenizer.ggml.pre", Value::Text("smollm")),
            ("tokenizer.ggml.tokens", Value::Texts(&TOKENS)),
            ("tokenizer.ggml.token_type", Value::Integers(&KINDS)),
            ("tokenizer.ggml.merges", Value::Texts(&MERGES)),
        ];
        if self.has_all {
            keys.extend([
                ("general.alignment", Value::Count(32)),
                ("general.noise", Value::Bytes(&[7; 40])),
                ("llama.rope.scaling.type", Value::Text("none")),
                ("llama.rope.freq_base", Value::Number(10_000.0)),
                ("llama.rope.dimension_count", Value::Count(width / 2)),
                ("llama.attention.key_length", Value::Wide(self.width / 2)),
                ("llama.attention.value_length", Value::Wide(self.width / 2)),
                ("tokenizer.ggml.add_bos_token", Value::Flag(true)),
                ("tokenizer.ggml.bos_token_id", Value::Count(0)),
                ("tokenizer.ggml.eos_token_id", Value::Count(0)),
            ]);
        }
        keys
    }

    fn seed(&self) -> Seed {
        let (keys, tensors) = (self.keys(), self.tensors());
        let mut seed = Seed::default();
        seed.bytes.extend(b"GGUF");
        seed.u32(3);
        seed.u64(tensors.len());
        seed.u64(keys.len());
        for (key, value) in &keys {
            seed.key(key, value);
        }
        let mut offset = 0;
        let mut sizes = Vec::new();
        for (name, shape, (kind, numbers, bytes)) in &tensors {
            seed.text(name);
            seed.u32(u32::try_from(shape.len()).expect("one or two"));
            shape.iter().for_each(|&extent| seed.u64(extent));
            seed.u32(*kind);
            seed.u64(offset);
            let size = shape.iter().product::<usize>() / numbers * bytes;
            offset += size.next_multiple_of(32);
            sizes.push(size);
        }
        for size in sizes {
            seed.pad();
            seed.bytes.extend((0_u8..=250).cycle().take(size));
        }
        seed
    }
}

fn seeds() -> Vec<Seed> {
    let tiny = [
        Tiny { layers: 1, width: 8, formats: &[F32], has_all: false },
        Tiny { layers: 2, width: 8, formats: &[F16, BF16], has_all: true },
        Tiny { layers: 1, width: 32, formats: &[Q8_0, Q4_0, Q4_1], has_all: true },
    ];
    tiny.iter().map(Tiny::seed).collect()
}

/// One thing that is done to a file. Places are fitted to the length that it has by then.
#[derive(Clone, Debug)]
enum Damage {
    Flip {
        at: Index,
        bit: u8,
    },
    Set {
        at: Index,
        byte: u8,
    },
    /// Writes over one of the numbers that count, size or point.
    Number {
        which: Index,
        number: u64,
    },
    /// Writes a number anywhere.
    Word {
        at: Index,
        is_wide: bool,
        number: u64,
    },
    Truncate {
        at: Index,
    },
    Extend {
        bytes: Vec<u8>,
    },
    Remove {
        at: Index,
        length: usize,
    },
    /// Puts a piece of one of the seeds somewhere, in place of what is there or before it.
    Splice {
        seed: Index,
        from: Index,
        length: usize,
        at: Index,
        is_insert: bool,
    },
}

fn number() -> impl Strategy<Value = u64> {
    let edge = (0..64_u32, -2_i64..=2);
    prop_oneof![
        3 => 0..300_u64,
        3 => edge.prop_map(|(bits, off)| (1_u64 << bits).wrapping_add_signed(off)),
        1 => any::<u64>(),
        1 => any::<f32>().prop_map(|number| u64::from(number.to_bits())),
    ]
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<Index>;
    prop_oneof![
        2 => (at(), 0..8_u8).prop_map(|(at, bit)| Damage::Flip { at, bit }),
        2 => (at(), any::<u8>()).prop_map(|(at, byte)| Damage::Set { at, byte }),
        6 => (at(), number()).prop_map(|(which, number)| Damage::Number { which, number }),
        2 => (at(), any::<bool>(), number())
            .prop_map(|(at, is_wide, number)| Damage::Word { at, is_wide, number }),
        1 => at().prop_map(|at| Damage::Truncate { at }),
        1 => prop::collection::vec(any::<u8>(), 1..64).prop_map(|bytes| Damage::Extend { bytes }),
        1 => (at(), 1..64_usize).prop_map(|(at, length)| Damage::Remove { at, length }),
        2 => (at(), at(), 1..200_usize, at(), any::<bool>()).prop_map(
            |(seed, from, length, at, is_insert)| {
                Damage::Splice { seed, from, length, at, is_insert }
            }
        ),
    ]
}

impl Damage {
    fn apply(&self, bytes: &mut Vec<u8>, numbers: &[(usize, usize)], seeds: &[Seed]) {
        if bytes.is_empty() {
            return;
        }
        let put = |bytes: &mut Vec<u8>, at: usize, piece: &[u8]| {
            let end = bytes.len().min(at + piece.len());
            if at < end {
                bytes[at..end].copy_from_slice(&piece[..end - at]);
            }
        };
        match self {
            Self::Flip { at, bit } => *at.get_mut(bytes) ^= 1 << bit,
            Self::Set { at, byte } => *at.get_mut(bytes) = *byte,
            Self::Number { which, number } => {
                let (at, width) = *which.get(numbers);
                put(bytes, at, &number.to_le_bytes()[..width]);
            }
            Self::Word { at, is_wide, number } => {
                let at = at.index(bytes.len());
                put(bytes, at, &number.to_le_bytes()[..if *is_wide { 8 } else { 4 }]);
            }
            Self::Truncate { at } => bytes.truncate(at.index(bytes.len())),
            Self::Extend { bytes: more } => bytes.extend(more),
            Self::Remove { at, length } => {
                let at = at.index(bytes.len());
                bytes.drain(at..bytes.len().min(at + length));
            }
            Self::Splice { seed, from, length, at, is_insert } => {
                let source = &seed.get(seeds).bytes;
                let (from, at) = (from.index(source.len()), at.index(bytes.len()));
                let piece = &source[from..source.len().min(from + length)];
                if *is_insert {
                    bytes.splice(at..at, piece.iter().copied());
                } else {
                    put(bytes, at, piece);
                }
            }
        }
    }
}

/// A device without a driver.
fn noop_gpu() -> Gpu {
    let (device, queue) = wgpu::Device::noop(&wgpu::DeviceDescriptor::default());
    Gpu::new(device, queue).unwrap_or_else(|error| panic!("{error}"))
}

/// Reads files one after the other, and holds each to its bounds.
struct Reader {
    path: PathBuf,
    /// Files begun.
    files: AtomicU64,
    /// Memory is counted for the whole process, so tests take turns.
    _turn: MutexGuard<'static, ()>,
}

impl Reader {
    fn new() -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let path = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("model-{}.gguf", std::process::id()));
        Self { path, files: AtomicU64::new(0), _turn: turn }
    }

    /// What `read` answers, after its bounds were seen to hold.
    fn try_file(&self, gpu: &Gpu, bytes: &[u8]) -> anyhow::Result<()> {
        self.files.fetch_add(1, Ordering::Relaxed);
        self.write(bytes).unwrap_or_else(|error| panic!("{}: {error}", self.path.display()));
        MEMORY.reset_peak_usage();
        let (before, start) = (MEMORY.current_usage(), Instant::now());
        let answer = self.read(gpu);
        let (took, taken) = (start.elapsed(), MEMORY.peak_usage() - before);
        assert!(took < BOUND, "{} bytes took {took:?}: {answer:?}", bytes.len());
        let bound = BYTES + BYTES_A_BYTE * bytes.len();
        assert!(taken <= bound, "{} bytes took {taken} of memory: {answer:?}", bytes.len());
        if let Err(error) = &answer {
            assert!(!format!("{error:#}").trim().is_empty(), "an error without a word: {error:?}");
        }
        // What was uploaded waits for a submit, and is let go of after one.
        gpu.queue().submit([]);
        gpu.device().poll(wgpu::PollType::Poll).expect("a device");
        answer
    }

    /// Writes over what the file held. To empty it first would cost a wait for the disk.
    fn write(&self, bytes: &[u8]) -> std::io::Result<()> {
        let mut file =
            OpenOptions::new().create(true).write(true).truncate(false).open(&self.path)?;
        file.write_all(bytes)?;
        file.set_len(bytes.len() as u64)
    }

    /// All that the example does with a file, and with the tokenizer that it describes.
    fn read(&self, gpu: &Gpu) -> anyhow::Result<()> {
        let mut file = GgufFile::open(&self.path)?;
        let tokenizer = Tokenizer::from_gguf(&file).and_then(|tokenizer| {
            let ids = tokenizer.encode("ab c, 12 é")?;
            tokenizer.decode(&ids)?;
            let mut stream = tokenizer.stream();
            for id in 0..10 {
                stream.push(id)?;
            }
            stream.finish()
        });
        // A file with a bad tokenizer goes on to be asked for its weights.
        let model = Model::load(gpu, &mut file, &mut |_| ());
        tokenizer.and(model).map(|_| ())
    }

    /// What is wrong with a seed in which some numbers under keys are others.
    fn refusal(&self, changes: &[(&str, u64)]) -> String {
        let mut seed = seeds().remove(1);
        for &(key, number) in changes {
            let at = seed.bytes.windows(key.len()).position(|window| window == key.as_bytes());
            let value = at.expect("a key of the seed") + key.len() + 4;
            let &(_, width) =
                seed.numbers.iter().find(|(place, _)| *place == value).expect("a number");
            seed.bytes[value..value + width].copy_from_slice(&number.to_le_bytes()[..width]);
        }
        format!(
            "{:#}",
            self.try_file(&noop_gpu(), &seed.bytes).expect_err("a file that is not sane")
        )
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // Nothing depends on whether this works.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn variable(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text}")))
}

/// Straight to the terminal: the test harness holds back what a passing test prints.
fn say(line: &str) {
    std::io::stderr().write_all(format!("{line}\n").as_bytes()).expect("a stderr");
}

/// Runs `work`, and ends the process where one file takes longer than the bound: a loop without an end
/// cannot be stopped otherwise. The file stays where it is.
fn watched(reader: &Reader, work: impl FnOnce()) {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut count, mut since) = (0, Instant::now());
            while !over.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(20));
                let now = reader.files.load(Ordering::Relaxed);
                if now != count {
                    (count, since) = (now, Instant::now());
                } else if since.elapsed() > 2 * BOUND {
                    say(&format!("{} is still being read", reader.path.display()));
                    std::process::abort();
                }
            }
        });
        let answer = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        over.store(true, Ordering::Relaxed);
        if let Err(panic) = answer {
            std::panic::resume_unwind(panic);
        }
    });
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
