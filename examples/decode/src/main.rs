//! Generates text with a Llama or Gemma model whose K/V cache is on the GPU.
//!
//! ```sh
//! cargo run --release -p decode -- --model smollm2 --prompt "The capital of France is"
//! ```
//!
//! With several prompts, `--prompts` or `--system` it serves them together, each as a sequence of a `SequenceCache`.
//! Start reading at `engine.rs` of `../engine`.

mod progress;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use wgpu_kvcache::{
    DynamicKVCache, Format, Formats, Gpu, KVCache, Layout, PagedKVCache, SequenceCache,
    StaticKVCache, Stats,
};

use decode_engine::{
    ChatTemplate, Config, Engine, Generation, GgufFile, Known, Model, Options, Request, Settings,
    Tokenizer, beam_search, cache_share, greedy, load, open, sequences_share, serve,
};

use crate::progress::Progress;

/// Generates text with a Llama or Gemma model, its K/V cache kept on the GPU.
#[derive(Parser)]
#[command(name = "decode")]
struct Arguments {
    #[arg(
        long,
        value_name = "NAME|FILE",
        help = "Model: smollm2 or gemma3, which examples/decode/setup.sh downloads, or a GGUF file of the architecture llama or gemma3 (F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q8_0, Q4_K or Q6_K)"
    )]
    model: PathBuf,
    /// Text to go on from, taken as it is unless --chat is given. May be given several times: the prompts are then decoded together.
    #[arg(long, value_name = "TEXT", required_unless_present = "prompts")]
    prompt: Vec<String>,
    /// File of prompts, one a line; empty lines are skipped.
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    prompts: Option<PathBuf>,
    /// Shared prefix of all prompts. It is prefilled once, and its K and V are cached once. It is tokenised by itself,
    /// and so is each prompt: the ids of a prompt are appended to those of this text.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Take each prompt as a user's message of a chat, written as the model file's chat template says. Not with
    /// --system, whose text is taken as it is.
    #[arg(long, conflicts_with = "system")]
    chat: bool,
    /// Most prompts to decode at a time. The others wait, and join as some end.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = positive)]
    max_sequences: usize,
    /// Most tokens to generate, of each prompt.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = positive)]
    max_new_tokens: usize,
    /// Beams of a beam search; 1 takes the best token at every step. The text of a search comes at
    /// its end. For one prompt only.
    #[arg(long, value_name = "K", default_value_t = 1, value_parser = positive)]
    beams: usize,
    /// Kind of cache [default: dynamic]. With several prompts, --prompts or --system it is always paged.
    #[arg(long, value_enum)]
    cache: Option<CacheKind>,
    #[arg(
        long,
        value_name = "FORMAT",
        default_value_t = Format::F32,
        help = "Format in which the cache stores K and V: f32, f16, bf16, q8_0 or q4_0. The model computes K and V in f32, and the cache converts them as it writes them. q8_0 and q4_0 store 32 elements of a head as integers of 8 or 4 bits with one scale"
    )]
    dtype: Format,
    /// Format in which the cache stores K, if not that of --dtype.
    #[arg(long, value_name = "FORMAT")]
    key_format: Option<Format>,
    /// Format in which the cache stores V, if not that of --dtype.
    #[arg(long, value_name = "FORMAT")]
    value_format: Option<Format>,
    /// Write the cache to FILE after the prompt, in the format safetensors. For one prompt only.
    #[arg(long, value_name = "FILE", conflicts_with = "load")]
    save: Option<PathBuf>,
    /// Take the cache from FILE, which --save wrote after the same prompt, instead of prefilling the prompt. The model and
    /// the formats must be those of then; the kind of cache may be another one. For one prompt only.
    #[arg(long, value_name = "FILE")]
    load: Option<PathBuf>,
    /// Never choose the end token, so that --max-new-tokens tokens are generated.
    #[arg(long)]
    ignore_eos: bool,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum CacheKind {
    /// Grows with the text.
    Dynamic,
    /// Allocated at once for the prompt and all new tokens.
    Static,
    /// In pages that beams and prompts share; grows with the text.
    Paged,
}

impl Arguments {
    /// Whether prompts are served as sequences.
    fn has_sequences(&self) -> bool {
        self.prompt.len() > 1 || self.prompts.is_some() || self.system.is_some()
    }

    /// The texts of the prompts. Refuses what can be refused without the model.
    fn texts(&self) -> Result<Vec<String>> {
        if self.has_sequences() {
            ensure!(
                self.beams == 1,
                "--beams {}: a beam search takes one --prompt, without --prompts and --system",
                self.beams
            );
            ensure!(
                self.save.is_none() && self.load.is_none(),
                "--save and --load take one --prompt, without --prompts and --system"
            );
            ensure!(
                matches!(self.cache, None | Some(CacheKind::Paged)),
                "several prompts, --prompts and --system need a paged cache: say --cache paged or leave it out"
            );
        }
        ensure!(
            self.system.as_ref().is_none_or(|text| !text.is_empty()),
            "the text of --system is empty; it takes the shared prefix of all prompts"
        );
        let Some(path) = &self.prompts else {
            for (number, text) in (1..).zip(&self.prompt) {
                ensure!(
                    !text.is_empty(),
                    "{} is empty; --prompt takes the text to go on from",
                    self.name_of(number)
                );
            }
            return Ok(self.prompt.clone());
        };
        let file = std::fs::read_to_string(path);
        let file = file.with_context(|| format!("cannot read the prompts {}", path.display()))?;
        let lines = file.lines().filter(|line| !line.trim().is_empty());
        let texts: Vec<String> = lines.map(str::to_owned).collect();
        ensure!(!texts.is_empty(), "{} is empty; it takes a prompt a line", path.display());
        Ok(texts)
    }

    /// What messages call a prompt.
    fn name_of(&self, number: usize) -> String {
        if self.has_sequences() { format!("prompt {number}") } else { "the prompt".to_owned() }
    }

    /// A side's own flag goes before that of both.
    fn formats(&self) -> Formats {
        let [key, value] =
            [self.key_format, self.value_format].map(|format| format.or(Some(self.dtype)));
        Formats { key, value }
    }

    /// The bytes of `--load`. Refuses files that cannot be read, and a `--save` into no folder.
    fn saved(&self) -> Result<Option<Vec<u8>>> {
        let folder = self.save.as_deref().and_then(Path::parent);
        if let Some(folder) = folder.filter(|folder| !folder.as_os_str().is_empty()) {
            ensure!(folder.is_dir(), "--save: there is no folder {}", folder.display());
        }
        let read = |path: &PathBuf| {
            let bytes = std::fs::read(path);
            bytes.with_context(|| format!("cannot read the saved cache {}", path.display()))
        };
        self.load.as_ref().map(read).transpose()
    }

    fn settings(&self, tokenizer: &Tokenizer) -> Settings {
        let end_of_turn = tokenizer.end_of_turn.filter(|_| self.chat);
        Settings {
            max_new_tokens: self.max_new_tokens,
            end: end_of_turn.or(tokenizer.end),
            ignore_end: self.ignore_eos,
        }
    }
}

/// The prompts of a run, as text and as ids.
struct Work {
    texts: Vec<String>,
    /// The ids of the shared prefix; none without --system.
    shared: Vec<u32>,
    /// The ids of each prompt after that.
    own: Vec<Vec<u32>>,
    /// Tokens of the longest prompt, with the new ones.
    max_tokens: usize,
}

/// What `--json` prints. Of several prompts: `ids`, `text` and the like are those of the first one.
#[derive(Serialize)]
struct Report {
    prompt_ids: Vec<u32>,
    /// Generated ids, of the best beam.
    ids: Vec<u32>,
    /// Their text.
    text: String,
    /// All lists of ids, best first; one without beam search.
    beams: Vec<Vec<u32>>,
    /// Sums of log-probabilities; none without beam search.
    beam_scores: Vec<f64>,
    /// Of decoding: tokens a second of a prompt's best beam, or of all sequences together. Their steps may also
    /// prefill prompts that join. Null where the first token was the last.
    tokens_per_second: Option<f64>,
    /// In steps that only prefill.
    prompt_tokens_per_second: Option<f64>,
    /// Bytes that the cache has allocated for K and V, in their formats, scales included.
    cache_bytes: u64,
    /// Share of a decode step that the cache's own dispatches take.
    cache_share: Option<f64>,
    /// The most pages in use at a time, of one layer: all have the same. 0 for caches without pages.
    peak_pages: u64,
    /// Every prompt, in the order given.
    sequences: Vec<Sequence>,
    adapter: String,
    /// The backend through which the adapter is used.
    backend: String,
}

/// One prompt and what came of it.
#[derive(Serialize)]
struct Sequence {
    prompt: String,
    /// Ids of the system text, if there is one, and of the prompt.
    prompt_ids: Vec<u32>,
    /// Generated ids.
    ids: Vec<u32>,
    /// Their text.
    text: String,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    // What can be refused without the weights is refused before they are read.
    let texts = arguments.texts()?;
    let saved = arguments.saved()?;
    let mut file = open(&Known::resolve(&arguments.model)?)?;
    let config = Config::from_gguf(&file)?;
    let chat = arguments.chat.then(|| ChatTemplate::from_gguf(&file)).transpose()?;
    let tokenizer = Tokenizer::from_gguf(&file)?;
    let work = Work::new(arguments, &config, &tokenizer, chat.as_ref(), texts)?;

    let gpu = Gpu::headless()?;
    let model = load_visibly(&gpu, &mut file)?;
    let max_batch = if arguments.has_sequences() {
        arguments.max_sequences.min(work.own.len())
    } else {
        arguments.beams
    };
    let max_tokens = work.max_tokens;
    let options = Options { formats: arguments.formats(), max_tokens, max_batch };
    let mut engine = Engine::new(&gpu, &model, options)?;
    let report = if arguments.has_sequences() {
        serve_all(arguments, &gpu, &mut engine, &tokenizer, work)?
    } else {
        generate_one(arguments, &gpu, &mut engine, &tokenizer, (work, saved))?
    };
    if arguments.json {
        writeln!(io::stdout(), "{}", serde_json::to_string(&report)?)?;
    } else {
        summarise(&report);
    }
    Ok(())
}

impl Work {
    /// Splits texts into tokens. Refuses prompts that are too long for the model.
    fn new(
        arguments: &Arguments,
        config: &Config,
        tokenizer: &Tokenizer,
        chat: Option<&ChatTemplate>,
        texts: Vec<String>,
    ) -> Result<Self> {
        let shared = arguments.system.as_ref().map(|text| tokenizer.encode(text)).transpose()?;
        let mut own = Vec::with_capacity(texts.len());
        let mut max_tokens = 0;
        for (number, text) in (1..).zip(&texts) {
            let ids = match (&shared, chat) {
                (Some(_), _) => tokenizer.encode_more(text)?,
                (None, Some(chat)) => tokenizer.encode(&chat.render(text)?)?,
                (None, None) => tokenizer.encode(text)?,
            };
            let which = arguments.name_of(number);
            ensure!(!ids.is_empty(), "{which} has no token");
            let count = shared.as_ref().map_or(0, Vec::len) + ids.len();
            let tokens = count.saturating_add(arguments.max_new_tokens);
            ensure!(
                tokens <= config.context,
                "{which} has {count} tokens{}, and with {} new ones that is more than the {} of the model's context",
                if shared.is_some() { " with the system text" } else { "" },
                arguments.max_new_tokens,
                config.context
            );
            max_tokens = max_tokens.max(tokens);
            own.push(ids);
        }
        Ok(Self { texts, shared: shared.unwrap_or_default(), own, max_tokens })
    }

    /// Every prompt with the ids that came of it.
    fn into_sequences(self, tokenizer: &Tokenizer, ids: Vec<Vec<u32>>) -> Result<Vec<Sequence>> {
        let prompts = self.texts.into_iter().zip(self.own);
        let sequences = prompts.zip(ids).map(|((prompt, own), ids)| {
            let prompt_ids = [self.shared.as_slice(), own.as_slice()].concat();
            Ok(Sequence { prompt, prompt_ids, text: tokenizer.decode(&ids)?, ids })
        });
        sequences.collect()
    }
}

/// One prompt, in the kind of cache that is asked for.
fn generate_one(
    arguments: &Arguments,
    gpu: &Gpu,
    engine: &mut Engine,
    tokenizer: &Tokenizer,
    (work, saved): (Work, Option<Vec<u8>>),
) -> Result<Report> {
    let options = engine.cache_options();
    let (mut cache, layout): (Box<dyn KVCache>, _) = match arguments
        .cache
        .unwrap_or(CacheKind::Dynamic)
    {
        CacheKind::Dynamic => {
            (Box::new(DynamicKVCache::with_options(gpu, options)?), Layout::Contiguous)
        }
        CacheKind::Static => {
            let options =
                options.with_max_cache_len(work.max_tokens).with_num_layers(engine.config().layers);
            (Box::new(StaticKVCache::with_options(gpu, options)?), Layout::Contiguous)
        }
        CacheKind::Paged => (Box::new(PagedKVCache::with_options(gpu, options)?), Layout::Paged),
    };
    engine.warm_up(layout)?;
    let prompt = &work.own[0];
    let prompt = prefilled(arguments, gpu, engine, cache.as_mut(), prompt, saved.as_deref())?;
    let generation = generate(arguments, engine, cache.as_mut(), tokenizer, prompt)?;
    let rates = [
        per_second(generation.step_times.len(), generation.step_times.iter().sum()),
        per_second(prompt.len(), generation.prompt_time),
    ];
    let stats = cache.stats();
    let share = cache_share(engine, cache.as_mut(), &generation)?;
    let ids = generation.beams.first().cloned().unwrap_or_default();
    let sequences = work.into_sequences(tokenizer, vec![ids])?;
    let beams = (generation.beams, generation.scores);
    Ok(Report::new(gpu, sequences, beams, rates, share, stats))
}

/// The part of the prompt that is still to be prefilled: its last token, if a saved cache holds the others, or one is
/// saved now.
fn prefilled<'a>(
    arguments: &Arguments,
    gpu: &Gpu,
    engine: &mut Engine,
    cache: &mut dyn KVCache,
    prompt: &'a [u32],
    saved: Option<&[u8]>,
) -> Result<&'a [u32]> {
    match (saved, &arguments.save) {
        (None, None) => return Ok(prompt),
        (Some(bytes), _) => {
            gpu.submit_pass("restore", |pass| cache.restore(pass, bytes)).context("--load")?;
            for layer in 0..engine.config().layers {
                let tokens = cache.get_next_position(layer)?;
                ensure!(
                    tokens == prompt.len(),
                    "--load: the saved cache holds {tokens} tokens in layer {layer}, and the prompt has {}; give the prompt after which it was saved",
                    prompt.len()
                );
            }
        }
        (None, Some(path)) => {
            engine.next_tokens(cache, prompt, 1, None)?;
            let bytes = cache.save(0..usize::MAX)?;
            std::fs::write(path, bytes)
                .with_context(|| format!("cannot write the cache to {}", path.display()))?;
        }
    }
    // The last token comes again, so that a token is chosen after it.
    cache.drop_latest(1)?;
    Ok(&prompt[prompt.len() - 1..])
}

/// Several prompts, or prompts with a shared prefix, as sequences of one cache.
fn serve_all(
    arguments: &Arguments,
    gpu: &Gpu,
    engine: &mut Engine,
    tokenizer: &Tokenizer,
    work: Work,
) -> Result<Report> {
    let options = engine.cache_options().with_max_cache_len(work.max_tokens);
    let mut cache = SequenceCache::with_options(gpu, &engine.layer_shapes(), options)?;
    engine.warm_up(Layout::RaggedPaged)?;
    let mut progress = Progress::new(tokenizer, work.own.len(), !arguments.json);
    let requests = work.own.iter().map(|ids| Request { ids: ids.clone(), max_new_tokens: None });
    let requests: Vec<_> = requests.collect();
    let served = serve(
        engine,
        &mut cache,
        &work.shared,
        &requests,
        arguments.settings(tokenizer),
        &mut |event, stats| progress.follow(event, stats),
    )?;
    progress.finish();
    let rates = [
        per_second(served.decoded_tokens, served.step_times.iter().sum()),
        per_second(served.prompt_tokens, served.prompt_time),
    ];
    let stats = cache.stats();
    let share = sequences_share(engine, &mut cache, &served)?;
    let sequences = work.into_sequences(tokenizer, served.ids)?;
    let beams = (vec![sequences[0].ids.clone()], Vec::new());
    Ok(Report::new(gpu, sequences, beams, rates, share, stats))
}

impl Report {
    /// `rates`: tokens a second of decoding and of prefilling.
    fn new(
        gpu: &Gpu,
        sequences: Vec<Sequence>,
        (beams, beam_scores): (Vec<Vec<u32>>, Vec<f64>),
        [tokens_per_second, prompt_tokens_per_second]: [Option<f64>; 2],
        cache_share: Option<f64>,
        stats: Stats,
    ) -> Self {
        let info = gpu.device().adapter_info();
        let Sequence { prompt_ids, ids, text, .. } = &sequences[0];
        Self {
            prompt_ids: prompt_ids.clone(),
            ids: ids.clone(),
            text: text.clone(),
            beams,
            beam_scores,
            tokens_per_second,
            prompt_tokens_per_second,
            cache_bytes: stats.bytes_allocated,
            cache_share,
            peak_pages: stats.peak_pages_used,
            sequences,
            adapter: info.name,
            backend: format!("{:?}", info.backend),
        }
    }
}

/// Reads and uploads the weights behind a progress bar on stderr.
fn load_visibly(gpu: &Gpu, file: &mut GgufFile) -> Result<Model> {
    let style = ProgressStyle::with_template("loading {bar:40} {bytes} of {total_bytes}")?;
    let bar = ProgressBar::new(file.tensor_bytes()).with_style(style);
    let model = load(gpu, file, &mut |bytes| bar.set_position(bytes));
    bar.finish_and_clear();
    model
}

/// Generates text, and prints it token by token unless --json is given.
fn generate(
    arguments: &Arguments,
    engine: &mut Engine,
    cache: &mut dyn KVCache,
    tokenizer: &Tokenizer,
    prompt: &[u32],
) -> Result<Generation> {
    let settings = arguments.settings(tokenizer);
    let mut out = io::stdout().lock();
    let mut print = |text: &str| -> io::Result<()> {
        if arguments.json {
            return Ok(());
        }
        out.write_all(text.as_bytes())?;
        out.flush()
    };
    let generation = if arguments.beams == 1 {
        let mut stream = tokenizer.stream();
        let generation =
            greedy(engine, cache, prompt, settings, &mut |token| Ok(print(&stream.push(token)?)?))?;
        print(&stream.finish()?)?;
        generation
    } else {
        let generation = beam_search(engine, cache, prompt, arguments.beams, settings)?;
        print(&tokenizer.decode(&generation.beams[0])?)?;
        generation
    };
    print("\n")?;
    Ok(generation)
}

/// Prints the figures of a run to stderr.
fn summarise(report: &Report) {
    let rate = |rate: Option<f64>| rate.map_or("-".to_owned(), |rate| format!("{rate:.1}"));
    eprintln!("prompt   {} tokens/s", rate(report.prompt_tokens_per_second));
    eprintln!("decode   {} tokens/s", rate(report.tokens_per_second));
    eprintln!("cache    {} bytes", report.cache_bytes);
    if report.peak_pages > 0 {
        eprintln!("         {} pages at the peak, in each layer", report.peak_pages);
    }
    if let Some(share) = report.cache_share {
        eprintln!("         {:.2} % of a decode step", 100.0 * share);
    }
    eprintln!("adapter  {}, {}", report.adapter, report.backend);
}

fn per_second(count: usize, time: Duration) -> Option<f64> {
    let count = u32::try_from(count).ok().filter(|&count| count > 0)?;
    Some(f64::from(count) / time.as_secs_f64())
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(error) => Err(error.to_string()),
    }
}
