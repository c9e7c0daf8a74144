//! A real model, decoded through the cache, gives the tokens that the reference gives.
//!
//! `reference/smollm2.json` holds what transformers on torch answered in f32. The tests need the
//! model, which `examples/decode/setup.sh` gets. Its place may be given in the variable `KV_MODEL`.

mod rig;

use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use wgpu_kvcache::{DynamicKVCache, Format, Gpu, HeadlessOptions, SequenceCache, wgpu};

use decode_engine::{
    Engine, Event, Generation, Known, Options, Request, Settings, beam_search, greedy, load, open,
    serve,
};
use rig::{Case, Kind, Loaded};

fn reference() -> Vec<Case> {
    rig::cases(include_str!("reference/smollm2.json"))
}

/// Where the model is.
fn model_path() -> PathBuf {
    rig::model_path(Known::SMOLLM2, "KV_MODEL")
}

fn loaded() -> MutexGuard<'static, Loaded> {
    static LOADED: OnceLock<Mutex<Loaded>> = OnceLock::new();
    let loaded = LOADED.get_or_init(|| Mutex::new(Loaded::from_file(&model_path())));
    loaded.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Decodes a prompt of the reference, and checks what is streamed.
fn decoded(loaded: &Loaded, case: &Case, kind: Kind, format: Format) -> Vec<u32> {
    let room = case.prompt_ids.len() + case.greedy.len();
    let mut engine = loaded.engine(format, room, 1);
    let mut cache = loaded.cache(&engine, kind, room);
    let settings = loaded.settings(case.greedy.len());
    let mut streamed = Vec::new();
    let generation =
        greedy(&mut engine, cache.as_mut(), &case.prompt_ids, settings, &mut |token| {
            streamed.push(token);
            Ok(())
        });
    let ids = generation.expect("a generation").beams.remove(0);
    assert_eq!(streamed, ids, "what is streamed is what is returned");
    ids
}

#[test]
fn weights_take_what_the_file_takes() {
    loaded().check_memory();
}

/// A device whose textures are small takes a matrix in parts.
#[test]
fn a_matrix_beyond_one_texture_is_bound_in_parts() {
    let adapter_limits = loaded().gpu.device().limits();
    let limits = wgpu::Limits { max_texture_dimension_2d: 512, ..adapter_limits };
    let options = HeadlessOptions::default().with_limits(limits);
    let gpu = Gpu::headless_with(&options).unwrap_or_else(|error| panic!("{error}"));
    let mut file = open(&model_path()).expect("the model opens");
    let model = load(&gpu, &mut file, &mut |_| ()).expect("the weights load");
    assert!(model.embedding.parts() > 2, "{} parts", model.embedding.parts());
    let case = &reference()[0];
    let room = case.prompt_ids.len() + 8;
    let options = Options { formats: Format::F32.into(), max_tokens: room, max_batch: 1 };
    let mut engine = Engine::new(&gpu, &model, options).expect("an engine");
    let mut cache = DynamicKVCache::new(&gpu);
    let settings = Settings { max_new_tokens: 8, end: None, ignore_end: true };
    let generation = greedy(&mut engine, &mut cache, &case.prompt_ids, settings, &mut |_| Ok(()));
    assert_eq!(generation.expect("a generation").beams[0], case.greedy[..8]);
}

#[test]
fn the_tokenizer_gives_the_ids_and_the_text() {
    let loaded = loaded();
    for case in reference() {
        let tokenizer = &loaded.tokenizer;
        assert_eq!(tokenizer.encode(&case.prompt).unwrap(), case.prompt_ids, "{}", case.prompt);
        assert_eq!(tokenizer.decode(&case.greedy).unwrap(), case.greedy_text, "{}", case.prompt);
        let mut stream = tokenizer.stream();
        let mut text = String::new();
        for &id in &case.greedy {
            text += &stream.push(id).unwrap();
        }
        text += &stream.finish().unwrap();
        assert_eq!(text, case.greedy_text, "streamed");
    }
}

#[test]
fn greedy_ids_with_an_f32_cache() {
    let loaded = loaded();
    for case in reference() {
        for kind in [Kind::Dynamic, Kind::Static] {
            let ids = decoded(&loaded, &case, kind, Format::F32);
            assert_eq!(ids, case.greedy, "{kind:?}, {}", case.prompt);
        }
    }
}

#[test]
fn greedy_ids_with_an_f16_cache_where_the_margin_allows() {
    let loaded = loaded();
    let mut compared = 0;
    for case in reference().iter().filter(|case| case.greedy_min_margin > 0.05) {
        let ids = decoded(&loaded, case, Kind::Dynamic, Format::F16);
        assert_eq!(ids, case.greedy, "{}", case.prompt);
        compared += 1;
    }
    assert!(compared > 0, "no case has a margin above 0.05");
}

#[test]
fn a_bf16_cache_goes_through_the_whole_engine() {
    let loaded = loaded();
    // 8 bits of mantissa are too few to promise the reference's ids; the first token has margin enough.
    let case = &reference()[0];
    let ids = decoded(&loaded, case, Kind::Static, Format::BF16);
    assert_eq!(ids.len(), case.greedy.len());
    assert_eq!(ids[0], case.greedy[0]);
}

#[test]
fn greedy_ids_with_a_paged_cache() {
    let loaded = loaded();
    // The longest text crosses into the most pages.
    let case = reference().into_iter().max_by_key(|case| case.greedy.len()).expect("a case");
    let ids = decoded(&loaded, &case, Kind::Paged, Format::F32);
    assert_eq!(ids, case.greedy, "{}", case.prompt);
}

#[test]
fn the_best_of_four_beams_and_its_score() {
    let loaded = loaded();
    let kinds = [Kind::Dynamic, Kind::Paged, Kind::Static];
    for (number, case) in reference().into_iter().enumerate() {
        let tokens = case.beams[0].len();
        let room = case.prompt_ids.len() + tokens;
        let mut engine = loaded.engine(Format::F32, room, 4);
        // One kind moves its rows, the other shares and copies pages; the third differs from the first in
        // its bound alone, so one case is enough for it.
        let kinds = if number == 0 { &kinds[..] } else { &kinds[..2] };
        let mut first: Option<Generation> = None;
        for &kind in kinds {
            let mut cache = loaded.cache(&engine, kind, room);
            let settings = loaded.settings(tokens);
            let generation =
                beam_search(&mut engine, cache.as_mut(), &case.prompt_ids, 4, settings)
                    .expect("a generation");
            assert_eq!(generation.beams[0], case.beams[0], "{kind:?}, {}", case.prompt);
            let difference = (generation.scores[0] - case.beam_scores[0]).abs();
            assert!(
                difference <= 0.01,
                "{kind:?}, {}: the score is off by {difference}",
                case.prompt
            );
            // All four beams are the same ones whatever the kind, the last of them included.
            let Some(first) = &first else {
                first = Some(generation);
                continue;
            };
            assert_eq!(generation.beams, first.beams, "{kind:?}, {}", case.prompt);
            assert_eq!((generation.beams.len(), generation.scores.len()), (4, 4));
            for (score, due) in generation.scores.iter().zip(&first.scores) {
                let difference = (score - due).abs();
                assert!(difference <= 1e-3, "{kind:?}, {}: {score} for {due}", case.prompt);
            }
        }
    }
}

/// Tokens of a page.
const PAGE: usize = 16;

fn sequences(engine: &Engine, gpu: &Gpu) -> SequenceCache {
    let options = engine.cache_options().with_page_tokens(PAGE);
    SequenceCache::with_options(gpu, &engine.layer_shapes(), options).expect("a cache")
}

/// 300 tokens: more than a step holds, and no whole number of pages.
fn long_text() -> Vec<u32> {
    let texts = reference().into_iter().map(|case| [case.prompt_ids, case.greedy].concat());
    texts.flatten().take(300).collect()
}

/// Three of the prompts at a time. They have different lengths, so some join while others decode.
#[test]
fn all_prompts_in_one_run_get_the_ids_that_each_gets_alone() {
    let loaded = loaded();
    let cases = reference();
    let request = |case: &Case| Request {
        ids: case.prompt_ids.clone(),
        max_new_tokens: Some(case.greedy.len()),
    };
    // The longest one first, and one that ends early, so that no two end in the same step.
    let mut order: Vec<usize> = (0..cases.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(cases[i].greedy.len()));
    let mut requests: Vec<Request> = order.iter().map(|&i| request(&cases[i])).collect();
    requests[1].max_new_tokens = Some(7);
    // One that is prefilled in two pieces: of the first, 256 tokens less those of the others are left.
    let long = long_text();
    let new = 4;
    requests.insert(2, Request { ids: long.clone(), max_new_tokens: Some(new) });
    let mut engine = loaded.engine(Format::F32, 310, 3);
    let mut alone = loaded.cache(&engine, Kind::Dynamic, 0);
    let long = greedy(&mut engine, alone.as_mut(), &long, loaded.settings(new), &mut |_| Ok(()));
    let mut due: Vec<Vec<u32>> = order.iter().map(|&i| cases[i].greedy.clone()).collect();
    due[1].truncate(7);
    due.insert(2, long.expect("a generation").beams.remove(0));
    let mut cache = sequences(&engine, &loaded.gpu);
    let (mut active, mut most_active, mut streamed) = (0, 0, vec![Vec::new(); due.len()]);
    let settings = loaded.settings(0);
    let served = serve(&mut engine, &mut cache, &[], &requests, settings, &mut |event, stats| {
        match event {
            Event::Joined(_) => active += 1,
            Event::Token(prompt, token) => streamed[prompt].push(token),
            Event::Ended(_) => active -= 1,
        }
        most_active = most_active.max(active);
        assert!(stats.pages_used <= stats.peak_pages_used);
        Ok(())
    })
    .expect("a run");
    assert_eq!(served.ids, due);
    assert_eq!(streamed, served.ids, "what is streamed is what is returned");
    assert_eq!((active, most_active), (0, 3));
    assert_eq!(cache.stats().pages_used, 0, "all have left");
}

/// The pages of a shared prefix are in the pool once, and each prompt goes on from them as if they were its own.
#[test]
fn prompts_that_begin_alike_share_pages() {
    const NEW: usize = 4;
    let loaded = loaded();
    let cases = reference();
    let shared = long_text();
    let eighth = cases[0].greedy[..9].to_vec();
    let own = cases.iter().map(|case| case.prompt_ids.clone()).chain([eighth]);
    let requests: Vec<Request> = own.map(|ids| Request { ids, max_new_tokens: None }).collect();
    assert_eq!((shared.len(), requests.len()), (300, 8));

    let mut engine = loaded.engine(Format::F32, 330, 8);
    let mut cache = sequences(&engine, &loaded.gpu);
    let settings = loaded.settings(NEW);
    let served =
        serve(&mut engine, &mut cache, &shared, &requests, settings, &mut |_, _| Ok(())).unwrap();
    // Whole pages of the prefix are shared. Behind them each sequence has its own, the first of which begins with a
    // copy of the rest. The last token is not stored.
    let tail = |it: &Request| (shared.len() % PAGE + it.ids.len() + NEW - 1).div_ceil(PAGE);
    let bound = shared.len() / PAGE + requests.iter().map(tail).sum::<usize>();
    let peak = cache.stats().peak_pages_used;
    assert!(peak <= bound as u64, "{peak} pages, and {bound} are enough");

    // Alone, a prompt follows the same ids in a cache of its own; the prefix is run once for all.
    let mut alone = loaded.cache(&engine, Kind::Dynamic, 0);
    engine.next_tokens(alone.as_mut(), &shared, 1, None).unwrap();
    for (request, ids) in requests.iter().zip(&served.ids) {
        let generation =
            greedy(&mut engine, alone.as_mut(), &request.ids, settings, &mut |_| Ok(()));
        assert_eq!(*ids, generation.unwrap().beams[0], "after {:?}", request.ids);
        alone.truncate(shared.len());
    }
}

/// Runs the program.
fn decode(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_decode")).args(arguments).output().expect("the program runs")
}

/// What the program reports of a prompt, in a run that must go well and print nothing else.
fn report(prompt: &str, arguments: &[&str]) -> serde_json::Value {
    let path = model_path();
    let path = path.to_str().expect("a plain path");
    let given = ["--model", path, "--prompt", prompt, "--ignore-eos", "--json"];
    let output = decode(&[&given, arguments].concat());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    serde_json::from_slice(&output.stdout).expect("exactly one JSON value")
}

#[test]
fn json_is_one_object_and_nothing_else() {
    let case = &reference()[0];
    let report =
        report(&case.prompt, &["--max-new-tokens", "3", "--beams", "2", "--cache", "static"]);
    assert_eq!(report["prompt_ids"], serde_json::json!(case.prompt_ids));
    assert_eq!(report["beams"].as_array().map(Vec::len), Some(2));
    assert_eq!(report["ids"], report["beams"][0]);
    assert_eq!(report["beam_scores"].as_array().map(Vec::len), Some(2));
    assert!(report["text"].as_str().is_some_and(|text| !text.is_empty()));
    assert!(report["backend"].as_str().is_some_and(|backend| !backend.is_empty()));
    assert!(report["tokens_per_second"].as_f64().is_some_and(|rate| rate > 0.0));
    // 30 layers of K and V, 2 rows, 3 heads, a prompt of 5 and 3 new tokens, 64 elements of 4 bytes.
    assert_eq!(report["cache_bytes"], 30 * 2 * 2 * 3 * 8 * 64 * 4);
}

/// `--chat` writes the prompt as the file's template says, and the answer is one to a message.
#[test]
fn a_chat_wraps_the_prompt_in_the_template_of_the_file() {
    let prompt = "What is the capital of France?";
    let report = report(prompt, &["--chat", "--max-new-tokens", "7"]);
    let text = format!(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
         <|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    );
    let ids = loaded().tokenizer.encode(&text).expect("ids");
    assert_eq!(report["prompt_ids"], serde_json::json!(ids));
    assert_eq!(report["text"], "The capital of France is Paris.");
}

/// The program hands its options on: beams that share pages, and the reference's ids all the same.
#[test]
fn four_beams_in_pages_from_the_command_line() {
    let case = &reference()[0];
    let tokens = case.beams[0].len().to_string();
    let report =
        report(&case.prompt, &["--max-new-tokens", &tokens, "--beams", "4", "--cache", "paged"]);
    assert_eq!(report["ids"], serde_json::json!(case.beams[0]));
    assert_eq!(report["beams"].as_array().map(Vec::len), Some(4));
    assert_eq!(report["beams"][0], report["ids"]);
    let score = report["beam_scores"][0].as_f64().expect("a score");
    assert!((score - case.beam_scores[0]).abs() <= 0.01, "a score of {score}");
    // Of each of 30 layers K and V, 8 pages: 4 rows end in the second page of their own.
    assert_eq!(report["cache_bytes"], 30 * 2 * 8 * 3 * 16 * 64 * 4);
}

/// The program serves several prompts: from flags as JSON, and from a file as text.
#[test]
fn several_prompts_from_the_command_line() {
    let cases = reference();
    let [first, second, third] = [&cases[0], &cases[2], &cases[6]];
    let file = std::env::temp_dir().join(format!("kvcache-prompts-{}.txt", std::process::id()));
    let lines = format!("{}\n\n{}\r\n   \n{}", first.prompt, second.prompt, third.prompt);
    std::fs::write(&file, lines).expect("a scratch file");
    let path = model_path();
    let path = path.to_str().expect("a plain path");
    let options = ["--max-sequences", "2", "--max-new-tokens", "5", "--ignore-eos"];
    let given = ["--model", path, "--prompts", file.to_str().expect("a plain path")];
    let output = decode(&[&given[..], &options].concat());
    std::fs::remove_file(&file).expect("the scratch file goes");
    let [printed, said] = [output.stdout, output.stderr].map(|it| String::from_utf8(it).unwrap());
    assert!(output.status.success(), "{said}");
    for (number, case) in (1..).zip([first, second, third]) {
        let text = loaded().tokenizer.decode(&case.greedy[..5]).unwrap();
        assert!(printed.contains(&format!("{number}: {text}\n")), "{number}: {text:?}: {printed}");
    }
    assert!(said.contains("pages at the peak"), "{said}");

    let more = ["--prompt", &second.prompt, "--system", &third.prompt, "--cache", "paged"];
    let report = report(&first.prompt, &[&options[..4], &more].concat());
    let sequences = report["sequences"].as_array().expect("a list");
    assert_eq!(sequences.len(), 2);
    for (sequence, case) in sequences.iter().zip([first, second]) {
        assert_eq!(sequence["prompt"], case.prompt);
        let ids = [&third.prompt_ids[..], &case.prompt_ids].concat();
        assert_eq!(sequence["prompt_ids"], serde_json::json!(ids));
        assert_eq!(sequence["ids"].as_array().map(Vec::len), Some(5));
        assert!(sequence["text"].as_str().is_some_and(|text| !text.is_empty()));
    }
    for name in ["prompt_ids", "ids", "text"] {
        assert_eq!(report[name], sequences[0][name], "{name} is that of the first");
    }
    // 6 tokens of the system text, at most 5 of a prompt, and 4 stored ones: a page each, one of them a copy.
    assert_eq!(report["peak_pages"], 2);
    assert!(report["tokens_per_second"].as_f64().is_some_and(|rate| rate > 0.0));
    assert!(report["cache_share"].as_f64().is_some_and(|share| share < 1.0));
}

/// The cache takes the bytes of the formats that the arguments ask for: each with those of one token of one head of 64
/// elements, K and V.
#[test]
fn formats_from_the_command_line() {
    let cases = reference();
    let case = &cases[0];
    let fixed = ["--max-new-tokens", "3", "--cache", "static"];
    let runs: [(&[&str], u64); 4] = [
        (&[], 256 + 256),
        (&["--dtype", "f16", "--value-format", "q4_0"], 128 + 36),
        (&["--key-format", "q8_0"], 68 + 256),
        (&["--dtype", "q4_0", "--key-format", "q8_0", "--value-format", "f32"], 68 + 256),
    ];
    for (arguments, token_bytes) in runs {
        let report = report(&case.prompt, &[&fixed[..], arguments].concat());
        // 30 layers, 3 heads, a prompt of 5 and 3 new tokens.
        assert_eq!(report["cache_bytes"], 30 * 3 * 8 * token_bytes, "{arguments:?}");
        assert_eq!(report["ids"][0], case.greedy[0], "{arguments:?}");
    }

    // Sequences take the formats, too.
    let quantized = ["--dtype", "q8_0", "--max-new-tokens", "4"];
    let several = ["--prompt", cases[2].prompt.as_str()];
    let report = report(&case.prompt, &[&quantized[..], &several].concat());
    // A page of each of two prompts, in pools that begin with room for 64 tokens.
    assert_eq!(report["peak_pages"], 2);
    assert_eq!(report["cache_bytes"], 30 * 3 * 64 * (68 + 68));
    for (sequence, case) in [0, 2].map(|i| &cases[i]).into_iter().enumerate() {
        assert_eq!(report["sequences"][sequence]["ids"], serde_json::json!(case.greedy[..4]));
    }
}

/// Each refusal: the arguments behind `--prompt x`, the exit code, and words of the message.
#[test]
fn bad_input_gets_an_error_of_its_own() {
    // Loading is measured first: what this reads into memory would count as well.
    drop(loaded());
    let scratch = std::env::temp_dir().join(format!("kvcache-decode-{}", std::process::id()));
    std::fs::create_dir_all(&scratch).expect("a scratch folder");
    let write = |name: &str, bytes: &[u8]| {
        let path = scratch.join(name);
        std::fs::write(&path, bytes).expect("a scratch file");
        path.to_str().expect("a plain path").to_owned()
    };
    let whole = std::fs::read(model_path()).expect("the model");
    let cut = write("cut.gguf", &whole[..whole.len() / 2]);
    let stub = write("stub.gguf", &whole[..1000]);
    let text = write("text.gguf", b"this is not a model at all, but long enough to be one");
    // The architecture is the value of the first key; another name of the same length is put there.
    let at = whole.windows(5).position(|window| window == b"llama").expect("an architecture");
    let mut other = whole.clone();
    other[at..at + 5].copy_from_slice(b"gpt99");
    let other = write("other.gguf", &other);
    drop(whole);

    let cases: [(&[&str], i32, &[&str]); 12] = [
        (&["--model", &cut], 1, &["cut short"]),
        (&["--model", &stub], 1, &["cut short"]),
        (&["--model", &text], 1, &["GGUF"]),
        (&["--model", &other], 1, &["gpt99", "llama"]),
        (&["--model", "/nowhere.gguf"], 1, &["/nowhere.gguf"]),
        (&["--model", &cut, "--frobnicate"], 2, &["--frobnicate", "--help"]),
        (&["--model", &cut, "--cache", "elastic"], 2, &["elastic", "dynamic", "static", "paged"]),
        (&["--model", &cut, "--dtype", "f64"], 2, &["f64", "bf16"]),
        (&["--model", &cut, "--key-format", "q5_0"], 2, &["--key-format", "unknown format 'q5_0'"]),
        (&["--model", &cut, "--value-format", "Q8"], 2, &["--value-format", "unknown format 'Q8'"]),
        (&["--model", &cut, "--beams", "0"], 2, &["--beams"]),
        (&["--model", &cut, "--max-new-tokens", "-3"], 2, &["-3"]),
    ];
    for (arguments, code, words) in cases {
        let arguments = [&["--prompt", "x"], arguments].concat();
        let output = decode(&arguments);
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {message}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
        for word in words {
            assert!(message.contains(word), "{arguments:?}: '{word}' is not in: {message}");
        }
    }
    let path = model_path();
    let path = path.to_str().expect("a plain path");
    for (arguments, word) in [
        (["--prompt", "", "--max-new-tokens", "1"], "empty"),
        (["--prompt", "x", "--max-new-tokens", "9000"], "8192"),
    ] {
        let output = decode(&[&["--model", path], &arguments[..]].concat());
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {message}");
        assert!(message.contains(word), "{arguments:?}: '{word}' is not in: {message}");
    }
    // Before the model is even opened.
    let blank = write("blank.txt", b"\n  \n\r\n");
    let one = write("one.txt", b"x\n");
    let several = ["--prompt", "x", "--prompt", "y"];
    let cases: [(&[&str], i32, &[&str]); 12] = [
        (&["--prompt", "x", "--chat", "--system", "s"], 2, &["--chat", "--system"]),
        (&[], 2, &["--prompt"]),
        (&["--prompt", "x", "--prompts", &one], 2, &["--prompts", "cannot be used"]),
        (&["--prompts", "/nowhere.txt"], 1, &["/nowhere.txt"]),
        (&["--prompts", &blank], 1, &["blank.txt", "empty"]),
        (&["--prompt", "x", "--prompt", ""], 1, &["prompt 2 is empty", "--prompt"]),
        (&["--prompt", "x", "--system", ""], 1, &["empty", "--system"]),
        (&[&several[..], &["--beams", "2"]].concat(), 1, &["--beams 2"]),
        (&[&several[..], &["--cache", "dynamic"]].concat(), 1, &["--cache", "paged"]),
        (&["--prompts", &one, "--cache", "static"], 1, &["--cache", "paged"]),
        (&["--prompt", "x", "--system", "s", "--beams", "4"], 1, &["--beams 4"]),
        (&[&several[..], &["--max-sequences", "0"]].concat(), 2, &["--max-sequences"]),
    ];
    for (arguments, code, words) in cases {
        let output = decode(&[&["--model", "/nowhere.gguf"], arguments].concat());
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {message}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
        for word in words {
            assert!(message.contains(word), "{arguments:?}: '{word}' is not in: {message}");
        }
    }
    // The second prompt is too long for the model's context of 8192 tokens.
    let long = write("long.txt", format!("x\n{}\n", "and so on ".repeat(3000)).as_bytes());
    let output = decode(&["--model", path, "--prompts", &long]);
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("prompt 2 has") && message.contains("8192"), "{message}");
    let help = decode(&["--help"]);
    assert!(help.status.success());
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    for option in [
        "--model",
        "--chat",
        "smollm2",
        "gemma3",
        "--prompt",
        "--prompts",
        "--system",
        "--max-sequences",
        "--max-new-tokens",
        "--beams",
        "--cache",
        "--dtype",
        "--key-format",
        "--value-format",
    ] {
        assert!(help.contains(option), "--help does not name {option}");
    }
    std::fs::remove_dir_all(&scratch).expect("the scratch folder goes");
}
