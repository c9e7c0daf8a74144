//! Generates text with a Llama model whose K/V cache is on the GPU.
//!
//! ```sh
//! cargo run --release -p decode -- --model SmolLM2-135M-Instruct.Q4_1.gguf --prompt "The capital of France is"
//! ```
//!
//! Start reading at `engine.rs`.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use wgpu_kvcache::{
    CacheOptions, DType, DynamicKVCache, Gpu, KVCache, PagedKVCache, StaticKVCache,
};

use decode_engine::{
    Config, Engine, Generation, GgufFile, Model, Options, Settings, Tokenizer, beam_search,
    cache_share, greedy,
};

/// Generates text with a Llama model. Its K/V cache is on the GPU.
#[derive(Parser)]
#[command(name = "decode")]
struct Arguments {
    #[arg(
        long,
        value_name = "FILE",
        help = "Model: a GGUF file of the llama architecture (F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q8_0, Q4_K or Q6_K)"
    )]
    model: PathBuf,
    /// Text to continue, without a chat template.
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// The most tokens to generate.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = positive)]
    max_new_tokens: usize,
    /// Beams of a beam search; 1 chooses the best token at every step. The text of a search is printed at its end.
    #[arg(long, value_name = "K", default_value_t = 1, value_parser = positive)]
    beams: usize,
    /// Kind of cache.
    #[arg(long, value_enum, default_value_t = CacheKind::Dynamic)]
    cache: CacheKind,
    /// Type of K and V in the cache: f32, f16 or bf16.
    #[arg(long, default_value_t = DType::F32)]
    dtype: DType,
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
    /// Pages that beams share; grows with the text.
    Paged,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    prompt_ids: &'a [u32],
    /// Generated ids, of the best beam.
    ids: &'a [u32],
    /// Their text.
    text: &'a str,
    /// All lists of ids, best first; a single one without beam search.
    beams: &'a [Vec<u32>],
    /// Sums of log-probabilities; empty without beam search.
    beam_scores: &'a [f64],
    /// Decode steps per second. Null if the first token was the last.
    tokens_per_second: Option<f64>,
    prompt_tokens_per_second: Option<f64>,
    /// Bytes that the cache has allocated.
    cache_bytes: u64,
    /// Share of a decode step that the cache's own dispatches take.
    cache_share: Option<f64>,
    adapter: String,
    /// The backend through which the adapter is used.
    backend: String,
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
    // Checks that need no weights come before they are read.
    ensure!(
        !arguments.prompt.is_empty(),
        "the prompt is empty; --prompt takes the text to continue"
    );
    let mut file = GgufFile::open(&arguments.model)?;
    let config = Config::from_gguf(&file)?;
    let tokenizer = Tokenizer::from_gguf(&file)?;
    let prompt = tokenizer.encode(&arguments.prompt)?;
    let max_tokens = prompt.len().saturating_add(arguments.max_new_tokens);
    ensure!(
        max_tokens <= config.context,
        "the prompt has {} tokens, and with {} new ones that is more than the {} of the model's context",
        prompt.len(),
        arguments.max_new_tokens,
        config.context
    );

    let gpu = Gpu::headless()?;
    let model = load(&gpu, &mut file)?;
    let options = Options { dtype: arguments.dtype, max_tokens, max_batch: arguments.beams };
    let mut engine = Engine::new(&gpu, &model, options)?;
    let make_cache = || -> Box<dyn KVCache> {
        match arguments.cache {
            CacheKind::Dynamic => Box::new(DynamicKVCache::new(&gpu)),
            CacheKind::Static => Box::new(
                StaticKVCache::with_options(
                    &gpu,
                    CacheOptions::default()
                        .with_max_cache_len(max_tokens)
                        .with_num_layers(config.layers),
                )
                .expect("both options"),
            ),
            CacheKind::Paged => Box::new(PagedKVCache::new(&gpu)),
        }
    };
    engine.warm_up(make_cache())?;
    let mut cache = make_cache();

    let generation = generate(arguments, &mut engine, cache.as_mut(), &tokenizer, &prompt)?;
    let ids = generation.beams.first().map_or(&[][..], Vec::as_slice);
    let cache_bytes = cache.stats().bytes_allocated;
    let info = gpu.device().adapter_info();
    let report = Report {
        prompt_ids: &prompt,
        ids,
        text: &tokenizer.decode(ids)?,
        beams: &generation.beams,
        beam_scores: &generation.scores,
        tokens_per_second: per_second(
            generation.step_times.len(),
            generation.step_times.iter().sum(),
        ),
        prompt_tokens_per_second: per_second(prompt.len(), generation.prompt_time),
        cache_bytes,
        cache_share: cache_share(&engine, cache.as_mut(), &generation)?,
        adapter: info.name,
        backend: format!("{:?}", info.backend),
    };
    if arguments.json {
        writeln!(io::stdout(), "{}", serde_json::to_string(&report)?)?;
    } else {
        summarise(&report);
    }
    Ok(())
}

/// Reads and uploads the weights, with a progress bar on stderr.
fn load(gpu: &Gpu, file: &mut GgufFile) -> Result<Model> {
    let style = ProgressStyle::with_template("loading {bar:40} {bytes} of {total_bytes}")?;
    let bar = ProgressBar::new(file.tensor_bytes()).with_style(style);
    let model = Model::load(gpu, file, &mut |bytes| bar.set_position(bytes));
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
    let settings = Settings {
        max_new_tokens: arguments.max_new_tokens,
        end: tokenizer.end,
        ignore_end: arguments.ignore_eos,
    };
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
fn summarise(report: &Report<'_>) {
    let rate = |rate: Option<f64>| rate.map_or("-".to_owned(), |rate| format!("{rate:.1}"));
    eprintln!("prompt   {} tokens/s", rate(report.prompt_tokens_per_second));
    eprintln!("decode   {} tokens/s", rate(report.tokens_per_second));
    eprintln!("cache    {} bytes", report.cache_bytes);
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
