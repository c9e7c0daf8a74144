//! What quantized K and V change in the answers of a real model, against a cache in f32.
//!
//! `SmolLM2` is fed each prompt of `reference/smollm2.json` and then the reference's ids one by one, whatever it would
//! have chosen itself, so that caches of different formats are compared over the same texts. The tests need the model, which
//! `examples/decode/setup.sh` gets. Its place may be given in the variable `KV_MODEL`.
//!
//! This prints how far each format is from f32, over all prompts:
//!
//! ```sh
//! cargo test --workspace --profile quick --test formats -- --ignored --nocapture
//! ```

#[expect(dead_code, reason = "other tests check what loading takes")]
mod rig;
#[path = "rig/steps.rs"]
mod steps;

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use decode_engine::{Engine, Known, Request, beam_search, greedy, serve};
use rig::{Case, Kind, Loaded};
use steps::{best, logits};
use wgpu_kvcache::{Format, Formats, SequenceCache};

/// Above this margin of the f32 cache, `q8_0` must not change the best token.
const MARGIN: f32 = 0.3;

/// K takes more bits than V.
const MIXED: Formats = Formats { key: Some(Format::Q8_0), value: Some(Format::Q4_0) };

fn reference() -> Vec<Case> {
    rig::cases(include_str!("reference/smollm2.json"))
}

fn loaded() -> MutexGuard<'static, Loaded> {
    static LOADED: OnceLock<Mutex<Loaded>> = OnceLock::new();
    let path = || rig::model_path(Known::SMOLLM2, "KV_MODEL");
    let loaded = LOADED.get_or_init(|| Mutex::new(Loaded::from_file(&path())));
    loaded.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An engine for any of the cases, one at a time or in two beams.
fn engine(loaded: &Loaded, formats: impl Into<Formats>, cases: &[Case]) -> Engine {
    let tokens = |case: &Case| case.prompt_ids.len() + case.greedy.len();
    loaded.engine(formats, cases.iter().map(tokens).max().expect("a case"), 2)
}

/// Where the choice is not close, K and V in `q8_0` do not change it.
#[test]
fn q8_0_chooses_the_tokens_of_the_reference_where_the_margin_allows() {
    let loaded = loaded();
    let cases = reference();
    let end = loaded.tokenizer.end;
    let mut plain = engine(&loaded, Format::F32, &cases);
    let mut quantized = engine(&loaded, Format::Q8_0, &cases);
    let (mut steps, mut checked, mut wrong) = (0, 0, Vec::new());
    for case in &cases {
        let pairs = logits(&loaded, &mut plain, case)
            .into_iter()
            .zip(logits(&loaded, &mut quantized, case))
            .zip(&case.greedy);
        for (step, ((plain, quantized), &due)) in pairs.enumerate() {
            let (own, margin) = best(&plain, end);
            assert_eq!(own, due, "f32 at step {step} of {:?}", case.prompt);
            assert!(plain != quantized, "the formats give the same logits bit for bit");
            steps += 1;
            if margin > MARGIN {
                checked += 1;
                let (found, by) = best(&quantized, end);
                if found != due {
                    wrong.push(format!(
                        "{:?}, step {step}: {found} by {by} instead of {due}, which f32 chooses by {margin}",
                        case.prompt
                    ));
                }
            }
        }
    }
    assert_eq!(steps, cases.iter().map(|case| case.greedy.len()).sum::<usize>());
    assert!(checked > steps / 2, "only {checked} of {steps} steps have a margin above {MARGIN}");
    assert!(wrong.is_empty(), "{} of {checked} steps: {wrong:#?}", wrong.len());
}

/// Formats go through every kind of cache, and none of them changes what is stored.
#[test]
fn every_kind_of_cache_gives_the_same_ids() {
    const NEW: usize = 12;
    let loaded = loaded();
    let mut cases = reference();
    cases.truncate(2);
    let mut engine = engine(&loaded, MIXED, &cases);
    let settings = loaded.settings(NEW);
    let options = engine.cache_options();
    let mut sequences = SequenceCache::with_options(&loaded.gpu, &engine.layer_shapes(), options)
        .expect("the options");
    for case in &cases {
        let request = [Request { ids: case.prompt_ids.clone(), max_new_tokens: None }];
        let served =
            serve(&mut engine, &mut sequences, &[], &request, settings, &mut |_, _| Ok(()))
                .expect("a run");
        assert_eq!(served.ids[0].len(), NEW);
        for kind in [Kind::Dynamic, Kind::Static, Kind::Paged] {
            let mut cache = loaded.cache(&engine, kind, case.prompt_ids.len() + NEW);
            let prompt = &case.prompt_ids;
            let generation = greedy(&mut engine, cache.as_mut(), prompt, settings, &mut |_| Ok(()));
            let ids = generation.expect("a generation").beams.remove(0);
            assert_eq!(ids, served.ids[0], "{kind:?}, {:?}", case.prompt);
        }
        // One kind moves the rows of beams, scales included, and the other shares pages.
        let [moved, shared] = [Kind::Dynamic, Kind::Paged].map(|kind| {
            let mut cache = loaded.cache(&engine, kind, 0);
            beam_search(&mut engine, cache.as_mut(), &case.prompt_ids, 2, settings)
                .expect("a generation")
        });
        assert_eq!(moved.beams, shared.beams, "{:?}", case.prompt);
        for (score, due) in moved.scores.iter().zip(&shared.scores) {
            assert!((score - due).abs() <= 1e-3, "{:?}: {score} for {due}", case.prompt);
        }
    }
}

/// Log-probabilities, summed in f64.
fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let highest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - highest).exp()).sum();
    logits.iter().map(|&logit| f64::from(logit) - highest - sum.ln()).collect()
}

/// KL(p || q) in nats.
fn divergence(p: &[f64], q: &[f64]) -> f64 {
    p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum()
}

/// Bytes of K and V of one token in all layers, as the cache counts them.
fn token_bytes(loaded: &Loaded, engine: &mut Engine) -> u64 {
    const TOKENS: u64 = 2;
    let mut cache = loaded.cache(engine, Kind::Static, 2);
    engine.next_tokens(cache.as_mut(), &[1, 1], 1, None).expect("a step");
    cache.stats().bytes_allocated / TOKENS
}

/// Prints how far the distribution of the next token is from that of a cache in f32, by format.
#[test]
#[ignore = "a table to print; the bounds are in the other tests"]
fn table_of_divergences() {
    let loaded = loaded();
    let cases = reference();
    let end = loaded.tokenizer.end;
    let mut plain = engine(&loaded, Format::F32, &cases);
    let due: Vec<Vec<Vec<f32>>> =
        cases.iter().map(|case| logits(&loaded, &mut plain, case)).collect();
    let steps = due.iter().flatten().count();
    let clear = due.iter().flatten().filter(|it| best(it, end).1 > MARGIN).count();
    let steps = f64::from(u32::try_from(steps).expect("few"));
    let info = loaded.gpu.device().adapter_info();
    println!("{steps} steps of {} prompts; {}, {:?}", cases.len(), info.name, info.backend);
    println!(
        "| K | V | bytes a token | mean KL | highest KL | other best token, of {steps} | of {clear} with a margin above {MARGIN} |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    println!("| f32 | f32 | {} | 0 | 0 | 0 | 0 |", token_bytes(&loaded, &mut plain));
    let mut means = Vec::new();
    for formats in [Format::F16.into(), Format::Q8_0.into(), MIXED, Format::Q4_0.into()] {
        let mut engine = engine(&loaded, formats, &cases);
        let (mut sum, mut highest, mut others, mut clear_others) = (0.0, 0.0_f64, 0, 0);
        for (case, due) in cases.iter().zip(&due) {
            for (due, found) in due.iter().zip(logits(&loaded, &mut engine, case)) {
                let kl = divergence(&log_softmax(due), &log_softmax(&found));
                sum += kl;
                highest = highest.max(kl);
                let (token, margin) = best(due, end);
                let is_other = token != best(&found, end).0;
                others += usize::from(is_other);
                clear_others += usize::from(is_other && margin > MARGIN);
            }
        }
        let mean: f64 = sum / steps;
        let [key, value] = [formats.key, formats.value].map(|it| it.expect("given").name());
        let bytes = token_bytes(&loaded, &mut engine);
        println!(
            "| {key} | {value} | {bytes} | {mean:.2e} | {highest:.2e} | {others} | {clear_others} |"
        );
        means.push(mean);
    }
    // Fewer bits are further away: what would contradict that is a fault of the measurement.
    assert!(means.is_sorted() && means[0] > 0.0, "{means:?}");
}
