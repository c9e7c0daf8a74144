//! A model with its weights on the GPU, and the caches that it is decoded through.

use std::path::{Path, PathBuf};

use decode_engine::{Engine, Known, Model, Options, Settings, Tokenizer, load, open};
use serde::Deserialize;
use wgpu_kvcache::{DynamicKVCache, Formats, Gpu, KVCache, PagedKVCache, StaticKVCache};

/// Where a model is: at the path in `variable`, or where `setup.sh` puts it. A missing model is a failure that says how
/// to get it.
pub(crate) fn model_path(known: Known, variable: &str) -> PathBuf {
    let path = std::env::var_os(variable).map_or_else(|| known.path(), PathBuf::from);
    assert!(
        path.is_file(),
        "there is no model at {}; examples/decode/setup.sh --model {} gets it, tests/run.sh calls that",
        path.display(),
        known.name
    );
    path
}

/// What a reference answered, as the files in `reference/` say.
#[derive(Deserialize)]
struct Reference<P> {
    cases: Vec<Case<P>>,
}

/// A prompt, and what follows it. A list that a reference does not have is empty.
#[derive(Deserialize)]
#[expect(dead_code, reason = "no test reads all of it")]
pub(crate) struct Case<P = ()> {
    pub(crate) prompt: String,
    pub(crate) prompt_ids: Vec<u32>,
    pub(crate) greedy: Vec<u32>,
    pub(crate) greedy_text: String,
    /// How far the best logit is above the second best one at each step of `greedy`.
    #[serde(default)]
    pub(crate) greedy_margins: Vec<f32>,
    /// The least of these.
    pub(crate) greedy_min_margin: f64,
    pub(crate) top5_ids: Vec<u32>,
    pub(crate) top5_logits: Vec<f32>,
    #[serde(default)]
    pub(crate) beams: Vec<Vec<u32>>,
    #[serde(default)]
    pub(crate) beam_scores: Vec<f64>,
    /// Of prompts that are longer than the window of a model that has one.
    #[serde(default = "Vec::new")]
    pub(crate) window_probes: Vec<P>,
}

/// The cases of a reference, from the text of its file.
pub(crate) fn cases<'a, P: Deserialize<'a>>(text: &'a str) -> Vec<Case<P>> {
    serde_json::from_str::<Reference<P>>(text).expect("a well-formed reference").cases
}

/// A model with its weights on the GPU. A test binary loads it once, and its tests take turns: loading takes longest.
pub(crate) struct Loaded {
    pub(crate) gpu: Gpu,
    pub(crate) model: Model,
    pub(crate) tokenizer: Tokenizer,
    /// Bytes of the file's tensors.
    stored: u64,
    /// Bytes of memory that the process took at most while it loaded, where the system tells.
    loading: Option<u64>,
}

/// A figure of this process from Linux, in bytes.
fn memory(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

/// The kinds of cache of one batch.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    Dynamic,
    Static,
    Paged,
}

impl Loaded {
    pub(crate) fn from_file(path: &Path) -> Self {
        let mut file = open(path).expect("the model opens");
        let gpu = Gpu::headless().unwrap_or_else(|error| panic!("{error}"));
        let tokenizer = Tokenizer::from_gguf(&file).expect("a tokenizer");
        let before = memory("VmRSS");
        let model = load(&gpu, &mut file, &mut |_| ()).expect("the weights load");
        let loading = memory("VmHWM").zip(before).map(|(most, before)| most.saturating_sub(before));
        let stored = file.tensor_bytes();
        Self { gpu, model, tokenizer, stored, loading }
    }

    /// Weights stay as the file stores them. What a software adapter holds counts as memory of the process, too.
    pub(crate) fn check_memory(&self) {
        let Self { ref model, stored, loading, .. } = *self;
        let bound = stored + stored / 10;
        assert!(model.bytes <= bound, "{} bytes on the GPU for {stored} in the file", model.bytes);
        if cfg!(target_os = "linux") {
            let loading = loading.expect("Linux tells");
            assert!(loading <= stored + stored / 2, "{loading} bytes to load {stored}");
        }
    }

    pub(crate) fn engine(
        &self,
        formats: impl Into<Formats>,
        max_tokens: usize,
        max_batch: usize,
    ) -> Engine {
        self.engine_of(&self.model, formats, max_tokens, max_batch)
    }

    /// An engine of this model with some of its settings changed.
    pub(crate) fn engine_of(
        &self,
        model: &Model,
        formats: impl Into<Formats>,
        max_tokens: usize,
        max_batch: usize,
    ) -> Engine {
        let options = Options { formats: formats.into(), max_tokens, max_batch };
        Engine::new(&self.gpu, model, options).expect("an engine")
    }

    pub(crate) fn cache(&self, engine: &Engine, kind: Kind, max_tokens: usize) -> Box<dyn KVCache> {
        let (gpu, options) = (&self.gpu, engine.cache_options());
        match kind {
            Kind::Dynamic => {
                Box::new(DynamicKVCache::with_options(gpu, options).expect("the options"))
            }
            Kind::Static => {
                let options = options
                    .with_max_cache_len(max_tokens)
                    .with_max_chunk(engine.step_tokens())
                    .with_num_layers(self.model.config.layers);
                Box::new(StaticKVCache::with_options(gpu, options).expect("the options"))
            }
            Kind::Paged => Box::new(PagedKVCache::with_options(gpu, options).expect("the options")),
        }
    }

    pub(crate) fn settings(&self, max_new_tokens: usize) -> Settings {
        Settings { max_new_tokens, end: self.tokenizer.end, ignore_end: true }
    }
}
