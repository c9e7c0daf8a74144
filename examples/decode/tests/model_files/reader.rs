//! Reads files one after the other, and holds each to its bounds of time and memory.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use decode_engine::{ChatTemplate, Tokenizer, load, open};
use wgpu_kvcache::{Gpu, wgpu};

use crate::MEMORY;
use crate::seed::{Seed, seeds};

/// Far more than any file here takes, and far less than a hang.
const BOUND: Duration = Duration::from_secs(10);
/// Memory that a file of any size may take.
const BYTES: usize = 4 << 20;
/// Memory that it may take for each of its bytes: the least row of a texture is 4 KiB, and 32 rows of a matrix
/// take the room of whole panels.
const BYTES_A_BYTE: usize = 128;

/// A device without a driver.
pub(crate) fn noop_gpu() -> Gpu {
    let (device, queue) = wgpu::Device::noop(&wgpu::DeviceDescriptor::default());
    Gpu::new(device, queue).unwrap_or_else(|error| panic!("{error}"))
}

/// Reads files one after the other, and holds each to its bounds.
pub(crate) struct Reader {
    path: PathBuf,
    /// Files begun.
    pub(crate) files: AtomicU64,
    /// Memory is counted for the whole process, so tests take turns.
    _turn: MutexGuard<'static, ()>,
}

impl Reader {
    pub(crate) fn new() -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let path = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("model-{}.gguf", std::process::id()));
        Self { path, files: AtomicU64::new(0), _turn: turn }
    }

    /// What `read` answers, after its bounds were seen to hold.
    pub(crate) fn try_file(&self, gpu: &Gpu, bytes: &[u8]) -> anyhow::Result<()> {
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
        let mut file = open(&self.path)?;
        let tokenizer = Tokenizer::from_gguf(&file).and_then(|tokenizer| {
            let ids = tokenizer.encode("ab c, 12 é")?;
            tokenizer.decode(&ids)?;
            let mut stream = tokenizer.stream();
            for id in 0..10 {
                stream.push(id)?;
            }
            stream.finish()
        });
        // Most files have no template, and a damaged one may refuse the message.
        let _ = ChatTemplate::from_gguf(&file).and_then(|chat| chat.render("ab"));
        // A file with a bad tokenizer goes on to be asked for its weights.
        let model = load(gpu, &mut file, &mut |_| ());
        tokenizer.and(model).map(|_| ())
    }

    /// What is wrong with a seed in which some numbers under keys are others: the first seed that has the keys.
    pub(crate) fn refusal(&self, changes: &[(&str, u64)]) -> String {
        let has =
            |seed: &Seed, key: &str| seed.bytes.windows(key.len()).any(|it| it == key.as_bytes());
        let has_all = |seed: &Seed| changes.iter().all(|(key, _)| has(seed, key));
        let mut seed = seeds().into_iter().skip(1).find(has_all).expect("a seed with the keys");
        for &(key, number) in changes {
            let at = seed.bytes.windows(key.len()).position(|window| window == key.as_bytes());
            let value = at.expect("a key of the seed") + key.len() + 4;
            let &(_, width) =
                seed.numbers.iter().find(|(place, _)| *place == value).expect("a number");
            seed.bytes[value..value + width].copy_from_slice(&number.to_le_bytes()[..width]);
        }
        self.refusal_of(&seed)
    }

    /// What is wrong with a seed.
    pub(crate) fn refusal_of(&self, seed: &Seed) -> String {
        let answer = self.try_file(&noop_gpu(), &seed.bytes);
        format!("{:#}", answer.expect_err("a file that is not sane"))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // Nothing depends on whether this works.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Straight to the terminal: the test harness holds back what a passing test prints.
pub(crate) fn say(line: &str) {
    std::io::stderr().write_all(format!("{line}\n").as_bytes()).expect("a stderr");
}

/// Runs `work`, and ends the process where one file takes longer than the bound: a loop without an end
/// cannot be stopped otherwise. The file stays where it is.
pub(crate) fn watched(reader: &Reader, work: impl FnOnce()) {
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
