//! Beam search over a toy model: the cache follows the beams, and no byte of K or V is copied to the host.
//!
//! `cargo run --release --example beam_search`

use wgpu_kvcache::{Cache, CacheOptions, CachePosition, Gpu, KVCache, PagedKVCache};

const VOCABULARY: u16 = 6;
const BEAMS: usize = 3;

/// The log-probability that `next` follows `token`, in a language of six words.
fn score(token: u16, next: u16) -> f32 {
    -f32::from((token * 5 + next * 3 + 4) % 7) / 4.0 - 0.1
}

fn main() -> Result<(), wgpu_kvcache::Error> {
    let gpu = Gpu::headless()?;
    let options = CacheOptions::default().with_page_tokens(4);
    let mut cache = PagedKVCache::with_options(&gpu, options)?;
    let mut beams: Vec<(f32, Vec<u16>)> = vec![(0.0, vec![0])];
    // K and V of a token are its number, in one head of one element.
    let upload = |tokens: &[u16]| {
        let values: Vec<f32> = tokens.iter().copied().map(f32::from).collect();
        gpu.upload(&values, &[tokens.len(), 1, 1, 1])
    };
    let prompt = upload(&[0])?;
    gpu.submit_pass("prompt", |pass| {
        cache.update(pass, &prompt.view(), &prompt.view(), 0, CachePosition::Append).map(|_| ())
    })?;
    for _ in 0..8 {
        // All continuations of all beams, best first.
        let mut continued: Vec<(f32, u32, u16)> = Vec::new();
        for (beam, (sum, tokens)) in (0..).zip(&beams) {
            let last = tokens[tokens.len() - 1];
            continued.extend((0..VOCABULARY).map(|next| (sum + score(last, next), beam, next)));
        }
        continued.sort_by(|a, b| b.0.total_cmp(&a.0));
        continued.truncate(BEAMS);
        let parents: Vec<u32> = continued.iter().map(|&(_, beam, _)| beam).collect();
        let next: Vec<u16> = continued.iter().map(|&(_, _, next)| next).collect();
        beams = continued
            .iter()
            .map(|&(sum, beam, next)| (sum, [&beams[beam as usize].1[..], &[next]].concat()))
            .collect();
        // Row i of the cache becomes the row of beam i's parent, then the new token is appended.
        let tokens = upload(&next)?;
        gpu.submit_pass("step", |pass| {
            cache.reorder_cache(pass, &parents)?;
            cache.update(pass, &tokens.view(), &tokens.view(), 0, CachePosition::Append).map(|_| ())
        })?;
    }
    // Read back once, to show that each row holds its beam's tokens.
    let (keys, _) = cache.get(0)?.expect("layer 0 was written");
    for ((sum, tokens), row) in beams.iter().zip(keys.to_f32().chunks(9)) {
        println!("{sum:7.3}  {tokens:?}");
        assert!(row.iter().zip(tokens).all(|(&held, &token)| held == f32::from(token)));
    }
    let stats = cache.stats();
    println!("{} pages in use, {} of them shared", stats.pages_used, stats.pages_shared);
    Ok(())
}
