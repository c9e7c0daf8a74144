//! Gemma 3 270M, decoded through every kind of cache, gives the tokens that the reference gives: also beyond the
//! sliding window of its local layers.
//!
//! `reference/gemma3.json` says how it was made. The tests need the model, which `examples/decode/setup.sh --model
//! gemma3` gets. Its place may be given in the variable `KV_GEMMA3`. Long prompts take minutes on a software adapter, so
//! each kind gets some of the cases; `cargo test --workspace --test gemma3 -- --ignored` runs every case in every kind.

mod rig;
#[path = "rig/steps.rs"]
mod steps;

use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use decode_engine::{Engine, Generation, Known, Request, Rows, beam_search, greedy, serve};
use rig::{Kind, Loaded, model_path};
use serde::Deserialize;
use steps::{best, logits};
use wgpu_kvcache::{DynamicKVCache, Format, KVCache, SequenceCache};

/// A case with logits beyond the window.
type Case = rig::Case<Probe>;

/// Logits that tell the right window from one that is a token longer or shorter.
#[derive(Deserialize)]
struct Probe {
    /// After the first tokens of the prompt.
    tokens: usize,
    wrong_window: usize,
    ids: Vec<usize>,
    logits: Vec<f32>,
    wrong_logits: Vec<f32>,
}

fn reference() -> Vec<Case> {
    let cases: Vec<Case> = rig::cases(include_str!("reference/gemma3.json"));
    assert_eq!(cases.iter().filter(|case| case.is_long()).count(), 2);
    cases
}

impl Case {
    /// Whether the prompt is longer than the window.
    fn is_long(&self) -> bool {
        !self.window_probes.is_empty()
    }

    /// Tokens of the prompt and the answer.
    fn tokens(&self) -> usize {
        self.prompt_ids.len() + self.greedy.len()
    }
}

/// Tokens of the longest of these prompts and its answer.
fn room(cases: &[Case]) -> usize {
    cases.iter().map(Case::tokens).max().expect("a case")
}

fn loaded() -> MutexGuard<'static, Loaded> {
    static LOADED: OnceLock<Mutex<Loaded>> = OnceLock::new();
    let loaded = LOADED
        .get_or_init(|| Mutex::new(Loaded::from_file(&model_path(Known::GEMMA3, "KV_GEMMA3"))));
    loaded.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Prefills a prompt up to each probe, checks the logits there, and decodes after the rest of it.
fn check(loaded: &Loaded, engine: &mut Engine, case: &Case, kind: Kind) {
    let mut cache = loaded.cache(engine, kind, case.tokens());
    let which = format!("{kind:?}, after {} tokens", case.prompt_ids.len());
    let mut done = 0;
    for probe in &case.window_probes {
        let tokens = &case.prompt_ids[done..probe.tokens];
        let logits = engine.logits(cache.as_mut(), tokens, 1, Rows::Keep).expect("logits");
        probe.check(&logits, &which);
        done = probe.tokens;
    }
    let (rest, settings) = (&case.prompt_ids[done..], loaded.settings(case.greedy.len()));
    let generation = greedy(engine, cache.as_mut(), rest, settings, &mut |_| Ok(()));
    assert_eq!(generation.expect("a generation").beams[0], case.greedy, "{which}");
    let position = cache.get_next_position(0).expect("a layer");
    assert_eq!(position, case.tokens() - 1, "{which}: all but the last token were appended");
    // Layer 5 is global. The others keep the window, the last token's own among it.
    let [local, global] = [4, 5].map(|layer| cache.get_seq_length(layer).expect("a layer"));
    assert_eq!((local, global), (position.min(512), position), "{which}");
}

impl Probe {
    /// The logits must be at least five times nearer to those of the right window.
    fn check(&self, logits: &[f32], which: &str) {
        let distance = |due: &[f32]| {
            let pairs = self.ids.iter().map(|&id| logits[id]).zip(due);
            pairs.map(|(logit, due)| f64::from((logit - due).abs())).fold(0.0, f64::max)
        };
        let (right, wrong) = (distance(&self.logits), distance(&self.wrong_logits));
        assert!(
            5.0 * right <= wrong,
            "{which}: after {} tokens the logits are {right} from those of the window and {wrong} from those of a window of {} tokens",
            self.tokens,
            self.wrong_window
        );
    }
}

#[test]
fn weights_take_what_the_file_takes() {
    loaded().check_memory();
}

#[test]
fn the_tokenizer_gives_the_ids_and_the_text() {
    let loaded = loaded();
    let tokenizer = &loaded.tokenizer;
    for case in reference() {
        assert_eq!(tokenizer.encode(&case.prompt).unwrap(), case.prompt_ids, "{}", case.prompt);
        assert_eq!(tokenizer.decode(&case.prompt_ids).unwrap(), case.prompt);
        assert_eq!(tokenizer.decode(&case.greedy).unwrap(), case.greedy_text, "{}", case.prompt);
        let mut stream = tokenizer.stream();
        let mut text = String::new();
        for &id in &case.greedy {
            text += &stream.push(id).unwrap();
        }
        text += &stream.finish().unwrap();
        assert_eq!(text, case.greedy_text, "streamed");
    }
    // Spaces, line feeds and tabs in runs; characters that have no token and become those of their bytes.
    for text in ["  two\n\n\n \tx ", "\u{1f9a9}\u{fe0f} \u{12039}", "▁ _", "Größe, 東京, ৳"]
    {
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(tokenizer.decode(&ids).unwrap(), text.replace('▁', " "), "{ids:?}");
    }
    // The token that opens a text is not doubled if the text begins with it, as a chat template's does.
    assert_eq!(tokenizer.encode("<bos>a").unwrap(), tokenizer.encode("a").unwrap());
}

#[test]
fn greedy_ids_of_every_case_in_a_dynamic_cache() {
    let loaded = loaded();
    let cases = reference();
    let mut engine = loaded.engine(Format::F32, room(&cases), 1);
    for case in cases {
        check(&loaded, &mut engine, &case, Kind::Dynamic);
    }
}

#[test]
fn greedy_ids_in_a_static_and_a_paged_cache() {
    let loaded = loaded();
    let cases = reference();
    let mut engine = loaded.engine(Format::F32, room(&cases), 1);
    let mut long: Vec<&Case> = cases.iter().filter(|case| case.is_long()).collect();
    for kind in [Kind::Static, Kind::Paged] {
        let short = cases.iter().filter(|case| case.prompt_ids.len() < 100);
        for case in short.chain(long.pop()) {
            check(&loaded, &mut engine, case, kind);
        }
    }
}

/// All prompts but one in one run: long ones are prefilled by pieces while others decode.
#[test]
fn greedy_ids_in_sequences() {
    let mut cases = reference();
    let long = cases.iter().position(Case::is_long).expect("a long case");
    cases.remove(long);
    check_in_sequences(&loaded(), &cases);
}

fn check_in_sequences(loaded: &Loaded, cases: &[Case]) {
    let mut engine = loaded.engine(Format::F32, room(cases), 3);
    let mut cache = sequences(loaded, &engine);
    let requests = cases.iter().map(|case| Request {
        ids: case.prompt_ids.clone(),
        max_new_tokens: Some(case.greedy.len()),
    });
    let requests: Vec<_> = requests.collect();
    let settings = loaded.settings(0);
    let served = serve(&mut engine, &mut cache, &[], &requests, settings, &mut |_, _| Ok(()));
    for (ids, case) in served.expect("a run").ids.iter().zip(cases) {
        assert_eq!(*ids, case.greedy, "after {} tokens", case.prompt_ids.len());
    }
}

/// All of what the three tests above run in parts.
#[test]
#[ignore = "ten minutes on a software adapter"]
fn greedy_ids_of_every_case_in_every_kind() {
    let loaded = loaded();
    let cases = reference();
    let mut engine = loaded.engine(Format::F32, room(&cases), 1);
    for kind in [Kind::Dynamic, Kind::Static, Kind::Paged] {
        for case in &cases {
            check(&loaded, &mut engine, case, kind);
        }
    }
    check_in_sequences(&loaded, &cases);
}

fn sequences(loaded: &Loaded, engine: &Engine) -> SequenceCache {
    let options = engine.cache_options();
    SequenceCache::with_options(&loaded.gpu, &engine.layer_shapes(), options).expect("a cache")
}

/// K and V in `q8_0`, of heads of 256 elements: where the reference's choice is not close, it is the same.
#[test]
fn q8_0_chooses_the_tokens_of_the_reference_where_the_margin_allows() {
    const MARGIN: f32 = 0.5;
    let loaded = loaded();
    let cases = reference();
    let case = cases.iter().min_by_key(|case| case.tokens()).expect("a case");
    let mut engine = loaded.engine(Format::Q8_0, case.tokens(), 1);
    let steps = logits(&loaded, &mut engine, case);
    assert_eq!([case.greedy.len(), case.greedy_margins.len()], [steps.len(); 2]);
    let first = case.top5_ids.iter().zip(&case.top5_logits);
    let apart = first.map(|(&id, due)| (steps[0][id as usize] - due).abs()).fold(0.0, f32::max);
    assert!(apart > 1e-4, "the logits are those of K and V in f32: {apart}");
    let mut clear = 0;
    for (step, (logits, &due)) in steps.iter().zip(&case.greedy).enumerate() {
        let margin = case.greedy_margins[step];
        if margin > MARGIN {
            clear += 1;
            let (found, by) = best(logits, loaded.tokenizer.end);
            assert_eq!(found, due, "step {step}, by {by}: the reference chooses {due} by {margin}");
        }
    }
    assert!(clear > steps.len() / 2, "only {clear} steps have a margin above {MARGIN}");
}

/// The window of local layers, in tokens, where it need not be the model's own.
const NARROW: usize = 40;

/// An engine whose local layers have a window of `NARROW` tokens, beyond which a prompt need not be long. Weights that
/// were trained with 512 give poor text with it, but the same text whatever the cache lets go.
fn narrow(loaded: &Loaded, max_tokens: usize, max_batch: usize) -> Engine {
    let mut model = loaded.model.clone();
    model.config.local.as_mut().expect("local layers").window = NARROW;
    loaded.engine_of(&model, Format::F32, max_tokens, max_batch)
}

/// The first tokens of a long prompt.
fn beginning(tokens: usize) -> Vec<u32> {
    let cases = reference();
    let long = cases.iter().find(|case| case.is_long()).expect("a long case");
    long.prompt_ids[..tokens].to_vec()
}

/// Sequences that go on from a shared prefix which the window does not span: each forks what its layers keep of it.
#[test]
fn a_shared_prefix_longer_than_the_window() {
    const NEW: usize = 8;
    let loaded = loaded();
    let prompt = beginning(3 * NARROW);
    let (shared, rest) = prompt.split_at(NARROW + 35);
    let mut engine = narrow(&loaded, prompt.len() + NEW, 2);
    // This cache keeps all tokens: attention alone looks back no further than the window.
    let mut all = DynamicKVCache::new(&loaded.gpu);
    let settings = loaded.settings(NEW);
    let due = greedy(&mut engine, &mut all, &prompt, settings, &mut |_| Ok(()));
    let due = due.expect("a generation");
    assert_eq!(all.get_seq_length(0).expect("a layer"), prompt.len() + NEW - 1);

    let mut cache = sequences(&loaded, &engine);
    let requests = vec![Request { ids: rest.to_vec(), max_new_tokens: Some(NEW) }; 2];
    let settings = loaded.settings(0);
    let served = serve(&mut engine, &mut cache, shared, &requests, settings, &mut |_, _| Ok(()));
    for ids in served.expect("a run").ids {
        assert_eq!(ids, due.beams[0]);
    }
}

/// Beams move the rows of layers that have let tokens go, and share their pages: the same lists as in a cache that keeps
/// all tokens.
#[test]
fn beams_beyond_the_window() {
    const BEAMS: usize = 3;
    const NEW: usize = 6;
    let loaded = loaded();
    let prompt = beginning(NARROW + 18);
    let mut engine = narrow(&loaded, prompt.len() + NEW, BEAMS);
    let all: Box<dyn KVCache> = Box::new(DynamicKVCache::new(&loaded.gpu));
    let windowed = [Kind::Dynamic, Kind::Paged].map(|kind| loaded.cache(&engine, kind, 0));
    let mut first: Option<Generation> = None;
    for (number, mut cache) in [all].into_iter().chain(windowed).enumerate() {
        let settings = loaded.settings(NEW);
        let found = beam_search(&mut engine, cache.as_mut(), &prompt, BEAMS, settings)
            .expect("a generation");
        let kept = cache.get_seq_length(0).expect("a layer");
        assert_eq!(kept, if number == 0 { prompt.len() + NEW - 1 } else { NARROW });
        let Some(first) = &first else {
            first = Some(found);
            continue;
        };
        assert_eq!(found.beams, first.beams, "cache {number}");
        for (score, due) in found.scores.iter().zip(&first.scores) {
            assert!((score - due).abs() <= 1e-3, "cache {number}: {score} for {due}");
        }
    }
}

/// The logits are those of the reference, not only their order: the scale of embeddings, norms and rotary bases.
#[test]
fn the_best_logits_after_a_prompt() {
    let loaded = loaded();
    for case in reference().iter().filter(|case| case.prompt_ids.len() < 100) {
        let mut engine = loaded.engine(Format::F32, case.prompt_ids.len(), 1);
        let mut cache = loaded.cache(&engine, Kind::Dynamic, 0);
        let logits = engine.logits(cache.as_mut(), &case.prompt_ids, 1, Rows::Keep).unwrap();
        for (&id, due) in case.top5_ids.iter().zip(&case.top5_logits) {
            let logit = logits[id as usize];
            assert!((logit - due).abs() <= 0.01, "{}: token {id}: {logit} for {due}", case.prompt);
        }
    }
}

/// The base model was not trained to chat, and its file has no template.
#[test]
fn a_chat_without_a_template_is_refused() {
    let path = model_path(Known::GEMMA3, "KV_GEMMA3");
    let mut program = Command::new(env!("CARGO_BIN_EXE_decode"));
    let output = program.arg("--model").arg(path).args(["--chat", "--prompt", "x"]).output();
    let output = output.expect("the program runs");
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    for word in ["tokenizer.chat_template", "--chat"] {
        assert!(message.contains(word), "'{word}' is not in: {message}");
    }
}
