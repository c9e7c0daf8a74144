//! Caches that are saved after a prompt and some tokens, and restored into other kinds on another device, go on to the
//! same ids.

mod rig;

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use decode_engine::{Engine, Known, Rows, Settings};
use rig::{Case, Kind, Loaded};
use wgpu_kvcache::{Format, KVCache};

/// The longest prompt of the reference.
fn case() -> Case {
    let cases = rig::cases(include_str!("reference/smollm2.json"));
    cases.into_iter().max_by_key(|case: &Case| case.prompt_ids.len()).expect("a prompt")
}

/// The model on two devices.
fn loaded() -> MutexGuard<'static, [Loaded; 2]> {
    static LOADED: OnceLock<Mutex<[Loaded; 2]>> = OnceLock::new();
    let path = || rig::model_path(Known::SMOLLM2, "KV_MODEL");
    let both = || {
        let both = [(); 2].map(|()| Loaded::from_file(&path()));
        both[0].check_memory();
        Mutex::new(both)
    };
    LOADED.get_or_init(both).lock().unwrap_or_else(PoisonError::into_inner)
}

/// Goes on greedily from `token`, without the end token, as the reference does.
fn decode(
    engine: &mut Engine,
    cache: &mut dyn KVCache,
    mut token: u32,
    settings: Settings,
) -> Vec<u32> {
    let next = |_| {
        token = engine.next_tokens(cache, &[token], 1, settings.end).expect("a step")[0];
        token
    };
    (0..settings.max_new_tokens).map(next).collect()
}

#[test]
fn every_kind_goes_on_in_every_other_on_another_device() {
    let loaded = loaded();
    let (case, tokens) = (case(), 6);
    let settings = loaded[0].settings(tokens);
    let most = case.prompt_ids.len() + 2 * tokens + 1;
    for format in [Format::F32, Format::Q8_0] {
        let mut engines = loaded.each_ref().map(|loaded| loaded.engine(format, most, 1));
        let kinds = [Kind::Dynamic, Kind::Static, Kind::Paged];
        for (number, from) in kinds.into_iter().enumerate() {
            let to = kinds[(number + 1) % 3];
            let mut cache = loaded[0].cache(&engines[0], from, most);
            let prompt = &case.prompt_ids;
            let first = engines[0]
                .next_tokens(cache.as_mut(), prompt, 1, settings.end)
                .expect("a prompt")[0];
            let begun = decode(&mut engines[0], cache.as_mut(), first, settings);
            let bytes = cache.save(0..usize::MAX).expect("it was submitted");
            let last = *begun.last().expect("six tokens");
            let expected = decode(&mut engines[0], cache.as_mut(), last, settings);
            if format == Format::F32 {
                let all = [&[first][..], &begun, &expected].concat();
                assert!(case.greedy.starts_with(&all), "the ids are those of the reference");
            }
            let mut restored = loaded[1].cache(&engines[1], to, most);
            let gpu = &loaded[1].gpu;
            gpu.submit_pass("restore", |pass| restored.restore(pass, &bytes)).expect("it fits");
            let got = decode(&mut engines[1], restored.as_mut(), last, settings);
            assert_eq!(got, expected, "{format}, {from:?} to {to:?}");
        }
    }
}

/// Four beams over pages that share a prompt: the file is no larger than the pages in use, and the beams go on alike.
#[test]
fn beams_that_share_a_prompt_are_saved_with_it_once() {
    let loaded = loaded();
    let case = case();
    // Longer than two pages, so that beams share whole ones.
    let prompt = [&case.prompt_ids[..], &case.greedy[..30]].concat();
    let most = prompt.len() + 16;
    for format in [Format::F32, Format::Q8_0] {
        let mut engines = loaded.each_ref().map(|loaded| loaded.engine(format, most, 4));
        let mut cache = loaded[0].cache(&engines[0], Kind::Paged, most);
        engines[0].logits(cache.as_mut(), &prompt, 1, Rows::Keep).expect("a prompt");
        let mut tokens = case.greedy[..4].to_vec();
        let step =
            |engine: &mut Engine, cache: &mut dyn KVCache, tokens: &[u32], rows: Rows<'_>| {
                engine.logits(cache, tokens, 4, rows).expect("a step")
            };
        step(&mut engines[0], cache.as_mut(), &tokens, Rows::Repeat(4));
        tokens.rotate_left(1);
        step(&mut engines[0], cache.as_mut(), &tokens, Rows::Reorder(&[0, 0, 2, 1]));
        let bytes = cache.save(0..usize::MAX).expect("it was submitted");
        let stats = cache.stats();
        assert!(stats.pages_shared > 0 && stats.pages_used > 4);
        let config = engines[0].config();
        let token = 2 * config.kv_heads as u64 * format.token_bytes(config.head_dim);
        let used = stats.pages_used * 16 * token * config.layers as u64;
        assert!(10 * bytes.len() as u64 <= 11 * used, "{} bytes for {used} in use", bytes.len());
        let mut restored = loaded[1].cache(&engines[1], Kind::Paged, most);
        let gpu = &loaded[1].gpu;
        gpu.submit_pass("restore", |pass| restored.restore(pass, &bytes)).expect("it fits");
        let shared = |cache: &dyn KVCache| (cache.stats().pages_used, cache.stats().pages_shared);
        assert_eq!(shared(restored.as_ref()), shared(cache.as_ref()));
        tokens.rotate_left(1);
        let rows = Rows::Reorder(&[3, 1, 0, 0]);
        let expected = step(&mut engines[0], cache.as_mut(), &tokens, rows);
        let got = step(&mut engines[1], restored.as_mut(), &tokens, rows);
        assert!(got == expected, "{format}: the same logits, bit for bit");
    }
}
