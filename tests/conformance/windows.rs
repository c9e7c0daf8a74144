//! Layers that keep what their window needs, beside layers that keep all.

use std::collections::HashMap;

use wgpu_kvcache::{
    Attention, AttentionOptions, BitMask, CacheKind, CacheLoad, CacheOptions, CachePlan,
    CachePosition, DType, DynamicKVCache, Error, Gpu, KVCache, LayerShape, PagedKVCache,
    SequenceCache, SequenceId, StaticKVCache, Tensor, TensorView, WindowError,
};

use crate::attention::{Random, distance, upload as upload_floats};
use crate::model::{Block, Model};
use crate::rig::{compare, same_bits, upload};
use crate::wait::{ReadLayer, ReadSequence};
use crate::{cases, gpu, kernels_run, shared_plain_gpu};

const APPEND: CachePosition<'_> = CachePosition::Append;
const HEADS: usize = 2;
const DIM: usize = 4;
/// The longest update.
const CHUNK: usize = 9;
/// Of layers 0 to 3.
const WINDOWS: [Option<usize>; 4] = [Some(5), None, Some(1), Some(16)];

/// A cache of each kind.
fn caches(gpu: &Gpu, windows: &[Option<usize>], tokens: usize) -> Vec<(bool, Box<dyn KVCache>)> {
    let plain = CacheOptions::default().with_windows(windows);
    let fixed = plain.with_num_layers(windows.len()).with_max_cache_len(tokens);
    let fixed = fixed.with_max_chunk(CHUNK);
    let paged = |size| PagedKVCache::with_options(gpu, plain.with_page_tokens(size));
    vec![
        (true, Box::new(DynamicKVCache::with_options(gpu, plain).expect("options of the kind"))),
        (true, Box::new(StaticKVCache::with_options(gpu, fixed).expect("options of the kind"))),
        (false, Box::new(paged(1).expect("a power of two"))),
        (false, Box::new(paged(4).expect("a power of two"))),
    ]
}

/// What a layer must hold: its own tokens, and those of the same layer without a window.
struct Layer {
    window: Option<usize>,
    own: Model,
    whole: Model,
}

impl Layer {
    /// Tokens that are gone for the window alone.
    fn let_go(&self) -> usize {
        self.whole.len(0) - self.own.len(0)
    }

    /// Whether, of `kept` tokens, counted without the window, all are there that the next query looks back on.
    fn keeps_enough(&self, kept: usize) -> bool {
        let Some(window) = self.window else { return true };
        let is_cut = kept < self.whole.len(0);
        !is_cut || (kept + 1).saturating_sub(window) >= self.let_go()
    }

    fn append(&mut self, key: &Block, value: &Block) {
        self.own.crop(self.window.map_or(usize::MAX, |window| window - 1));
        for model in [&mut self.own, &mut self.whole] {
            model.update(0, key, value, APPEND).expect("it fits");
        }
    }

    fn truncate(&mut self, kept: usize) {
        let own = kept.saturating_sub(self.let_go());
        self.own.truncate(own);
        self.whole.truncate(kept);
    }
}

struct Run<'a> {
    gpu: &'a Gpu,
    cache: Box<dyn KVCache>,
    is_ring: bool,
    layers: Vec<Layer>,
    batch: usize,
    longest: usize,
}

impl Run<'_> {
    fn append(&mut self, tokens: usize, seed: &mut u64) {
        self.longest = self.longest.max(tokens);
        for (at, layer) in self.layers.iter_mut().enumerate() {
            *seed += 2;
            let shape = [self.batch, HEADS, tokens, DIM];
            let [key, value] = [0, 1].map(|i| Block::noise(shape, 4, *seed + i));
            let [k, v] = [&key, &value].map(|block| upload(self.gpu, DType::F32, block));
            let view = self
                .gpu
                .submit_pass("append", |pass| {
                    self.cache.update(pass, &k.view(), &v.view(), at, APPEND)
                })
                .unwrap_or_else(|error| panic!("layer {at}: {error}"));
            layer.append(&key, &value);
            assert_eq!(view.len(), layer.own.len(0), "layer {at}");
        }
    }

    fn check(&self, context: &str) {
        for (at, layer) in self.layers.iter().enumerate() {
            let context = format!("{context}, layer {at}");
            assert_eq!(self.cache.get_seq_length(at), Ok(layer.own.len(0)), "{context}");
            // Positions go on counting as in the layer that keeps all.
            let position = self.cache.get_next_position(at);
            assert_eq!(position, self.cache.get_next_position(1), "{context}");
            compare(self.cache.read(at).expect("submitted"), layer.own.get(0), &context);
            let view = self.cache.view(at).expect("it exists");
            if let (Some(window), Some(view)) = (layer.window, view) {
                assert!(view.len() < window + self.longest, "{context}: {}", view.len());
                // A static layer has memory for the longest update that it was made for.
                let longest = self.longest.max(CHUNK);
                assert!(
                    !self.is_ring || view.capacity() <= window + longest,
                    "{context}: room for {} tokens",
                    view.capacity()
                );
            }
        }
    }
}

/// Histories of appends, cuts and changes of the batch: each layer holds what its window needs, bit for bit, and a
/// roll-back past that is an error and changes nothing.
#[test]
fn layers_keep_what_their_windows_need_after_any_history() {
    let gpus = [gpu(), shared_plain_gpu()];
    let mut random = Random(61);
    let mut seed = 0;
    let (mut refused, mut apart, mut cropped) = (0, 0, 0);
    for history in 0..cases(24) {
        let gpu = &gpus[history % 2];
        for (kind, (is_ring, cache)) in caches(gpu, &WINDOWS, 4000).into_iter().enumerate() {
            let layers = WINDOWS.map(|window| Layer {
                window,
                own: Model::dynamic(),
                whole: Model::dynamic(),
            });
            let layers = Vec::from(layers);
            let batch = 1 + random.below(3);
            let mut run = Run { gpu, cache, is_ring, layers, batch, longest: 0 };
            for call in 0..30 {
                let context = format!("history {history}, kind {kind}, call {call}");
                let length = run.layers[1].own.len(0);
                match random.below(12) {
                    10 | 11 => {
                        let lengths: Vec<usize> = match random.below(3) {
                            0 => vec![random.below(30); run.batch],
                            1 => (0..run.batch).map(|_| random.below(6)).collect(),
                            _ => (0..run.batch).map(|_| random.below(40)).collect(),
                        };
                        // Tokens of each row that count and are gone.
                        let gone = |layer: &Layer| {
                            let (own, whole) = (layer.own.len(0), layer.whole.len(0));
                            let row = |&most: &usize| whole.min(most) - own.min(most);
                            lengths.iter().map(row).collect::<Vec<_>>()
                        };
                        let is_even = |gone: Vec<usize>| gone.iter().all(|it| *it == gone[0]);
                        let answer = run.cache.crop_rows(&lengths);
                        if run.longest > 0 && !run.layers.iter().map(gone).all(is_even) {
                            apart += 1;
                            let error = answer.expect_err("rows differ");
                            assert!(
                                matches!(error, Error::Window(WindowError::RowsApart { .. })),
                                "{context}: {error}"
                            );
                        } else {
                            assert_eq!(answer, Ok(()), "{context}, {lengths:?}");
                            cropped += usize::from(run.longest > 0 && run.batch > 1);
                            for layer in &mut run.layers {
                                for model in [&mut layer.own, &mut layer.whole] {
                                    model.cut_rows(&lengths, true).expect("as many rows");
                                }
                            }
                            run.check(&context);
                            // Rows of one length again.
                            run.append(1 + random.below(CHUNK), &mut seed);
                        }
                    }
                    0..=4 => run.append(1 + random.below(CHUNK), &mut seed),
                    5 => {
                        let dropped = random.below(8);
                        let kept = length.saturating_sub(dropped);
                        let answer = run.cache.drop_latest(dropped);
                        if run.layers.iter().all(|layer| layer.keeps_enough(kept)) {
                            assert_eq!(answer, Ok(()), "{context}");
                            run.layers.iter_mut().for_each(|layer| layer.truncate(kept));
                        } else {
                            refused += 1;
                            let error = answer.expect_err("tokens are missing");
                            assert!(
                                matches!(error, Error::Window(WindowError::PastWindow { .. })),
                                "{context}: {error}"
                            );
                        }
                    }
                    6 => {
                        let kept = length.saturating_sub(random.below(4));
                        let answer = run.cache.truncate_rows(&vec![kept; run.batch]);
                        if run.layers.iter().all(|layer| layer.keeps_enough(kept)) {
                            assert_eq!(answer, Ok(()), "{context}");
                            run.layers.iter_mut().for_each(|layer| layer.truncate(kept));
                        } else {
                            assert!(answer.is_err(), "{context}");
                        }
                    }
                    7 => {
                        let kept = length.saturating_sub(random.below(3));
                        if run.layers.iter().all(|layer| layer.keeps_enough(kept)) {
                            run.cache.truncate(kept);
                            run.layers.iter_mut().for_each(|layer| layer.truncate(kept));
                        }
                    }
                    8 => {
                        let most = random.below(25);
                        run.cache.crop(most);
                        for layer in &mut run.layers {
                            layer.own.crop(most);
                            layer.whole.crop(most);
                        }
                    }
                    _ if run.longest > 0 => {
                        let rows = 1 + random.below(3);
                        let index = |_| u32::try_from(random.below(run.batch)).expect("few");
                        let indices: Vec<u32> = (0..rows).map(index).collect();
                        gpu.submit_pass("select", |pass| run.cache.reorder_cache(pass, &indices))
                            .unwrap_or_else(|error| panic!("{context}: {error}"));
                        for layer in &mut run.layers {
                            for model in [&mut layer.own, &mut layer.whole] {
                                model.select(&indices).expect("rows exist");
                            }
                        }
                        run.batch = rows;
                    }
                    _ => {}
                }
                run.check(&context);
            }
        }
    }
    assert!(refused > 5, "{refused} roll-backs were refused");
    assert!(apart > 5 && cropped > 5, "{apart} crops of rows were refused, {cropped} were not");
}

/// A roll-back that cannot answer for itself changes nothing, and every later call says what was wrong, until a
/// reset.
#[test]
fn a_truncation_past_a_window_is_said_by_every_later_call() {
    let gpu = gpu();
    for (_, mut cache) in caches(&gpu, &[Some(4), None], 100) {
        let tokens = upload(&gpu, DType::F32, &Block::noise([1, HEADS, 9, DIM], 4, 3));
        let append = |cache: &mut dyn KVCache| {
            gpu.submit_pass("append", |pass| {
                for layer in [0, 1] {
                    cache.update(pass, &tokens.view(), &tokens.view(), layer, APPEND)?;
                }
                Ok::<_, Error>(())
            })
        };
        append(cache.as_mut()).expect("it fits");
        append(cache.as_mut()).expect("it fits");
        // Live: 3 + 9 and 18. The latest update goes back whole, and one more token does not.
        cache.truncate(9);
        assert_eq!([cache.get_seq_length(0), cache.get_seq_length(1)], [Ok(3), Ok(9)]);
        let past = Error::from(WindowError::PastWindow {
            layer: 0,
            window: 4,
            live: 3,
            most: 0,
            asked: 1,
        });
        assert_eq!(cache.drop_latest(1), Err(past.clone()));
        assert_eq!([cache.get_seq_length(0), cache.get_seq_length(1)], [Ok(3), Ok(9)]);
        cache.truncate(8);
        assert_eq!(cache.get_seq_length(1), Err(past.clone()));
        assert_eq!(cache.read(0).map(|_| ()), Err(past.clone()));
        assert_eq!(append(cache.as_mut()), Err(past));
        cache.reset();
        append(cache.as_mut()).expect("a reset cache is whole");
        assert_eq!([cache.get_seq_length(0), cache.get_seq_length(1)], [Ok(9), Ok(9)]);
    }
}

/// Attention with a window over a layer that keeps only that: as over one that keeps all, whatever the pieces.
#[test]
fn pieces_of_any_size_give_what_one_token_at_a_time_gives() {
    let gpu = gpu();
    let mut random = Random(67);
    let total = 60;
    for window in [1, 4, 7, 100] {
        let [q, k, v] = [(); 3].map(|()| random.floats(total * HEADS * DIM, 1.0));
        let mut one_by_one: Option<Vec<f64>> = None;
        // With a window in the cache, and without: pieces of one, of 9 at most, and all the same.
        let windows = [Some(window)];
        let mut kinds = caches(&gpu, &windows, total);
        kinds.extend(caches(&gpu, &[], total).into_iter().filter(|(is_ring, _)| !is_ring));
        for (kind, (_, mut cache)) in kinds.into_iter().enumerate() {
            let mut attention = Attention::new(&gpu);
            for longest in [1, CHUNK] {
                cache.reset();
                let mut got = vec![0.0; total * HEADS * DIM];
                let mut first = 0;
                while first < total {
                    let count = (1 + random.below(longest)).min(total - first);
                    let row = HEADS * DIM;
                    let part = |values: &[f32]| values[first * row..][..count * row].to_vec();
                    let shape = [1, count, HEADS, DIM];
                    let [q, k, v] = [&q, &k, &v]
                        .map(|values| upload_floats(&gpu, DType::F32, &part(values), &shape));
                    let output = upload_floats(&gpu, DType::F32, &vec![0.0; count * row], &shape);
                    let [q, k, v, out] = [&q, &k, &v, &output].map(|tensor| {
                        TensorView::bthd(tensor.buffer(), DType::F32, &shape).expect("a shape")
                    });
                    gpu.submit_pass("piece", |pass| {
                        let view = cache.update(pass, &k, &v, 0, APPEND)?;
                        // A layer that keeps a window is attended with it, told or not.
                        let is_told = view.window().is_none() || random.below(2) == 0;
                        let options = AttentionOptions::default();
                        let options = options.with_window(is_told.then_some(window));
                        attention.record(pass, &q, &view, &out, options)
                    })
                    .unwrap_or_else(|error| panic!("{error}"));
                    let read = crate::attention::read(&gpu, &output);
                    got[first * row..][..count * row].copy_from_slice(&read);
                    first += count;
                }
                if !kernels_run() {
                    continue;
                }
                match &one_by_one {
                    None => one_by_one = Some(got.into_iter().map(f64::from).collect()),
                    Some(expected) => {
                        let apart = distance(&got, expected);
                        assert!(apart < 1e-6, "window {window}, kind {kind}, {longest}: {apart}");
                    }
                }
            }
        }
    }
}

/// Two drafted continuations of one token, side by side in a layer with a window: each looks back from its own depth, and not
/// from its place among the live tokens, as the bit mask says.
#[test]
fn a_tree_over_a_window_sees_what_its_bit_mask_says() {
    let gpu = gpu();
    // K is zero, so that a result is the mean of V, which is the token's number.
    let numbers = |from: u16, count: u16| {
        let values: Vec<f32> = (0..HEADS)
            .flat_map(|_| (from..from + count).flat_map(|token| [f32::from(token); DIM]))
            .collect();
        let shape = [1, HEADS, usize::from(count), DIM];
        [vec![0.0; values.len()], values].map(|it| upload_floats(&gpu, DType::F32, &it, &shape))
    };
    // Tokens 3, 4 and 5, and of tokens 6 and 7 the query's own: both are the seventh token of their path, and their window
    // is 4.
    let words = [0b0_1111, 0b1_0111].map(f32::from_bits);
    let words = upload_floats(&gpu, DType::F32, &words, &[1, 1, 1, 2]);
    for (_, mut cache) in caches(&gpu, &[Some(4)], 20) {
        let mut attention = Attention::new(&gpu);
        let [_, output] = numbers(0, 2);
        gpu.submit_pass("tree", |pass| {
            for token in 0..6 {
                let [key, value] = numbers(token, 1);
                cache.update(pass, &key.view(), &value.view(), 0, APPEND)?;
            }
            let [key, value] = numbers(6, 2);
            let view = cache.update(pass, &key.view(), &value.view(), 0, APPEND)?;
            assert_eq!((view.window(), view.len()), (Some(4), 5));
            let mask = BitMask::new(words.buffer(), [1, 1, 2, 5]);
            let options = AttentionOptions::default().unmasked().with_bit_mask(mask);
            attention.record(pass, &key.view(), &view, &output.view(), options)
        })
        .unwrap_or_else(|error| panic!("{error}"));
        let due: Vec<f64> = [4.5, 4.75]
            .into_iter()
            .flat_map(|it| [it; DIM])
            .cycle()
            .take(2 * HEADS * DIM)
            .collect();
        let got = crate::attention::read(&gpu, &output);
        assert!(!kernels_run() || distance(&got, &due) < 1e-6, "{got:?}");
    }
}

/// What a window cannot be, and updates longer than a static layer was made for.
#[test]
fn windows_and_updates_that_do_not_fit() {
    let gpu = gpu();
    let none = CacheOptions::default().with_windows(&[None, Some(0)]);
    let error = DynamicKVCache::with_options(&gpu, none).expect_err("a window of nothing");
    assert_eq!(error, WindowError::NoWindow { layer: 1 }.into());
    let chunk = CacheOptions::default().with_max_chunk(4);
    let error = DynamicKVCache::with_options(&gpu, chunk).expect_err("it grows");
    assert!(matches!(error, Error::UnusedOption { option: "max_chunk", .. }), "{error}");
    let options = CacheOptions::default().with_windows(&[Some(4)]);
    let options = options.with_num_layers(1).with_max_cache_len(100);
    let mut cache = StaticKVCache::with_options(&gpu, options).expect("all options");
    let long = upload(&gpu, DType::F32, &Block::noise([1, HEADS, 5, DIM], 4, 3));
    let append = |cache: &mut StaticKVCache| {
        gpu.submit_pass("append", |pass| {
            cache.update(pass, &long.view(), &long.view(), 0, APPEND).map(|view| view.capacity())
        })
    };
    let refused = WindowError::ChunkTooLong { layer: 0, tokens: 5, most: 4, window: 4 }.into();
    assert_eq!(append(&mut cache), Err(refused));
    let mut cache =
        StaticKVCache::with_options(&gpu, options.with_max_chunk(5)).expect("all options");
    for _ in 0..30 {
        // Never full: what is behind the window makes room.
        assert_eq!(append(&mut cache), Ok(8));
    }
    assert_eq!((cache.get_seq_length(0), cache.get_next_position(0)), (Ok(8), Ok(150)));
}

/// The layers of Gemma 3 270M at 8,192 tokens, prefilled in pieces of 512: less than a third of a cache that keeps all.
#[test]
fn gemma_takes_less_than_a_third() {
    let gpu = gpu();
    let windows: Vec<Option<usize>> =
        (0..18).map(|layer| (layer % 6 != 5).then_some(512)).collect();
    let piece = upload_floats(&gpu, DType::F32, &vec![0.5; 512 * 256], &[1, 1, 512, 256]);
    let bytes = |windows: &[Option<usize>]| {
        let options = CacheOptions::default().with_windows(windows);
        let planned = options.with_max_cache_len(8192);
        let plans = [
            (CacheKind::Dynamic, options),
            (CacheKind::Static, planned),
            (CacheKind::Paged, options),
        ];
        let load = CacheLoad { batch: 1, tokens: 8192, chunk: 512 };
        let layer = LayerShape { dtype: DType::F32, heads: 1, key_dim: 256, value_dim: 256 };
        let limits = gpu.device().limits();
        let foreseen = plans.map(|(kind, options)| {
            let plan = CachePlan::new(kind, &[layer; 18], options, load, &limits);
            plan.expect("it is counted").bytes_allocated()
        });
        let fixed = planned.with_num_layers(18);
        let caches: [Box<dyn KVCache>; 3] = [
            Box::new(DynamicKVCache::with_options(&gpu, options).expect("options of the kind")),
            Box::new(StaticKVCache::with_options(&gpu, fixed).expect("options of the kind")),
            Box::new(PagedKVCache::with_options(&gpu, options).expect("options of the kind")),
        ];
        let taken = caches.map(|mut cache| {
            for _ in 0..16 {
                gpu.submit_pass("piece", |pass| {
                    for layer in 0..18 {
                        cache
                            .update(pass, &piece.view(), &piece.view(), layer, APPEND)
                            .unwrap_or_else(|error| panic!("{error}"));
                    }
                });
            }
            cache.stats().bytes_allocated
        });
        assert_eq!(taken, foreseen, "as planned");
        taken
    };
    let whole = bytes(&[]);
    let windowed = bytes(&windows);
    for (windowed, whole) in windowed.into_iter().zip(whole) {
        assert_eq!(whole, 18 * 2 * 8192 * 256 * 4);
        assert!(3 * windowed < whole, "{windowed} of {whole} bytes");
    }
}

/// Sequences that join, decode, prefill, fork, roll back and leave, in layers with windows and without: attention is
/// that of a cache which keeps all, and pages before a window go back.
#[test]
fn sequences_keep_what_windows_need() {
    let gpu = gpu();
    let mut random = Random(83);
    let layer = LayerShape { dtype: DType::F32, heads: HEADS, key_dim: DIM, value_dim: DIM };
    let windows = [Some(6), None, Some(6), Some(20)];
    for page in [1, 4] {
        let plain = CacheOptions::default().with_page_tokens(page);
        let options = [plain, plain.with_windows(&windows)];
        let mut caches = options.map(|options| {
            SequenceCache::with_options(&gpu, &[layer; 4], options).expect("options of the kind")
        });
        let mut attention = Attention::new(&gpu);
        // The same sequences in both caches.
        let mut ids: Vec<[SequenceId; 2]> = Vec::new();
        let mut refused = 0;
        for call in 0..60 {
            let both = |caches: &mut [SequenceCache; 2], id: [SequenceId; 2], change: Change| {
                let [whole, own] = caches;
                let answer = change(own, id[1]);
                if answer.is_ok() {
                    change(whole, id[0]).expect("it keeps all");
                }
                answer
            };
            let any = |random: &mut Random, ids: &[[SequenceId; 2]]| ids[random.below(ids.len())];
            match random.below(8) {
                0 | 1 => {
                    ids.push(caches.each_mut().map(|cache| cache.add().expect("nothing is lost")));
                }
                2 if !ids.is_empty() => {
                    let id = any(&mut random, &ids);
                    let dropped = random.below(12);
                    let change: Change = &|cache, id| cache.drop_latest(id, dropped);
                    refused += usize::from(both(&mut caches, id, change).is_err());
                }
                3 if !ids.is_empty() => {
                    let id = any(&mut random, &ids);
                    let len = caches[0].len(id[0]).expect("it is there");
                    let kept = len.saturating_sub(random.below(4));
                    if let Ok(own) = caches[1].fork(id[1], kept) {
                        let whole = caches[0].fork(id[0], kept).expect("it keeps all");
                        ids.push([whole, own]);
                    }
                }
                4 if ids.len() > 3 => {
                    let id = ids.swap_remove(random.below(ids.len()));
                    both(&mut caches, id, &|cache, id| cache.remove(id)).expect("it is there");
                }
                5 if !ids.is_empty() => {
                    let id = any(&mut random, &ids);
                    let most = random.below(30);
                    both(&mut caches, id, &|cache, id| cache.crop(id, most)).expect("it is there");
                }
                _ if !ids.is_empty() => {
                    let counts: Vec<usize> = ids
                        .iter()
                        .map(|_| [0, 1, 1, 1 + random.below(25)][random.below(4)])
                        .collect();
                    let total: usize = counts.iter().sum();
                    if total == 0 {
                        continue;
                    }
                    let shape = [1, total, HEADS, DIM];
                    let [q, k, v] = [(); 3].map(|()| {
                        let floats = random.floats(total * HEADS * DIM, 1.0);
                        upload_floats(&gpu, DType::F32, &floats, &shape)
                    });
                    let mut answers: Vec<Vec<Vec<f32>>> = Vec::new();
                    for (which, cache) in caches.iter_mut().enumerate() {
                        let step: Vec<(SequenceId, usize)> = ids
                            .iter()
                            .zip(&counts)
                            .filter(|(_, count)| **count > 0)
                            .map(|(id, &count)| (id[which], count))
                            .collect();
                        let mut outputs = Vec::new();
                        gpu.submit_pass("step", |pass| {
                            let step = cache.plan_step(pass, &step)?;
                            for (at, window) in windows.into_iter().enumerate() {
                                let out = vec![0.0; total * HEADS * DIM];
                                let out = upload_floats(&gpu, DType::F32, &out, &shape);
                                let [q, k, v, to] = [&q, &k, &v, &out].map(|tensor| {
                                    let shape = [total, HEADS, DIM];
                                    TensorView::packed(tensor.buffer(), DType::F32, shape)
                                        .expect("a shape")
                                });
                                let view = cache.update(pass, &step, at, &k, &v)?;
                                let is_told = view.window() != window || call % 2 == 0;
                                let options = AttentionOptions::default();
                                let options = options.with_window(window.filter(|_| is_told));
                                attention.record(pass, &q, &view, &to, options)?;
                                outputs.push(out);
                            }
                            Ok::<_, Error>(())
                        })
                        .unwrap_or_else(|error| panic!("call {call}: {error}"));
                        let read = |out: &Tensor| crate::attention::read(&gpu, out);
                        answers.push(outputs.iter().map(read).collect());
                    }
                    for (layer, (whole, own)) in answers[0].iter().zip(&answers[1]).enumerate() {
                        let whole: Vec<f64> = whole.iter().copied().map(f64::from).collect();
                        if kernels_run() {
                            let apart = distance(own, &whole);
                            assert!(apart < 1e-6, "call {call}, layer {layer}: {apart}");
                        }
                    }
                }
                _ => {}
            }
            for id in &ids {
                let [whole, own] = [0, 1].map(|at| {
                    let cache = &caches[at];
                    (cache.len(id[at]), cache.next_position(id[at]))
                });
                assert_eq!(whole, own, "call {call}");
                for (layer, window) in windows.into_iter().enumerate() {
                    let held = caches[1].read(id[1], layer).expect("submitted");
                    let held = held.map_or(0, |(key, _)| key.shape()[2]);
                    let most = window.map_or(usize::MAX, |window| window - 1 + 25);
                    assert!(held <= most, "call {call}, layer {layer}: {held} tokens");
                }
            }
        }
        assert!(refused > 0, "no roll-back was refused");
        for id in ids {
            caches[0].remove(id[0]).expect("it is there");
            caches[1].remove(id[1]).expect("it is there");
        }
        assert_eq!(caches.map(|cache| cache.stats().pages_used), [0, 0]);
    }
    // A long sequence in layers of which all have a window takes few pages.
    let options = CacheOptions::default().with_page_tokens(4).with_windows(&[Some(6)]);
    let mut cache = SequenceCache::with_options(&gpu, &[layer], options).expect("options");
    let id = cache.add().expect("nothing is lost");
    let token = upload_floats(&gpu, DType::F32, &[0.5; HEADS * DIM], &[1, 1, HEADS, DIM]);
    for _ in 0..100 {
        gpu.submit_pass("token", |pass| {
            let step = cache.plan_step(pass, &[(id, 1)])?;
            let new = TensorView::packed(token.buffer(), DType::F32, [1, HEADS, DIM])?;
            cache.update(pass, &step, 0, &new, &new).map(|_| ())
        })
        .unwrap_or_else(|error| panic!("{error}"));
        assert!(cache.stats().pages_used <= 3, "{:?}", cache.stats());
    }
    assert_eq!((cache.len(id), cache.next_position(id)), (Ok(100), Ok(100)));
}

/// A change of a sequence.
type Change<'a> = &'a dyn Fn(&mut SequenceCache, SequenceId) -> Result<(), Error>;

/// Which tokens of each window's layers are noted: of a page, named by all tokens up to its end, the first one.
type NotedTokens = HashMap<Vec<u32>, usize>;

/// What a prefix is, told token by token.
struct Prefixes {
    page: usize,
    windows: Vec<Option<usize>>,
    noted: Vec<NotedTokens>,
}

impl Prefixes {
    /// Notes the full pages of these tokens, of which each layer has the latest of `len` as many as `live` says.
    fn note(&mut self, tokens: &[u32], len: usize, live: &[usize]) {
        for (noted, live) in self.noted.iter_mut().zip(live) {
            let gone = len - live;
            for end in (self.page..=tokens.len()).step_by(self.page).filter(|&end| end > gone) {
                let first = gone.max(end - self.page);
                let held = noted.entry(tokens[..end].to_vec()).or_insert(first);
                *held = first.min(*held);
            }
        }
    }

    /// The most tokens, in whole pages, of which each layer has noted all that the next token looks back on.
    fn longest(&self, tokens: &[u32]) -> usize {
        let is_there = |len: usize| {
            self.windows.iter().zip(&self.noted).all(|(window, noted)| {
                let first = window.map_or(0, |window| (len + 1).saturating_sub(window));
                (first..len).all(|token| {
                    let end = (token / self.page + 1) * self.page;
                    noted.get(&tokens[..end]).is_some_and(|&held| held <= token)
                })
            })
        };
        let ends = (0..=tokens.len()).step_by(self.page).collect::<Vec<_>>();
        ends.into_iter().rev().find(|&len| is_there(len)).expect("no token at least")
    }
}

/// An element of K or V of the last of these tokens, which depends on all of them.
fn content(tokens: &[u32], layer: usize, element: usize) -> f32 {
    let mix = |all: u64, token: &u32| {
        (all ^ u64::from(*token)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23)
    };
    let all = tokens.iter().fold((layer * 64 + element + 1) as u64, mix);
    f32::from(u16::try_from(all >> 48).expect("16 bits"))
}

/// Sequences with prefixes in layers with windows: one begins with as many noted tokens as all layers still have what
/// the next token looks back on, and with no others; and it holds what was written for these tokens.
#[test]
fn prefixes_are_reused_as_far_as_windows_keep_them() {
    let gpu = gpu();
    let mut random = Random(89);
    let shape = LayerShape { dtype: DType::F32, heads: 1, key_dim: DIM, value_dim: DIM };
    let windows = [Some(6), None, Some(20), Some(1), Some(6)];
    // All layers; those with windows; with little room, in which prefixes make way.
    let mut reused = [0; 3];
    for (number, page) in [(0, 4), (1, 1), (2, 4), (0, 1), (1, 4)] {
        let most = (number == 2).then_some(40);
        let windows = if number == 1 { &windows[2..] } else { &windows[..] };
        let options = CacheOptions::default().with_page_tokens(page).with_max_pages(most);
        let shapes = vec![shape; windows.len()];
        let options = options.with_windows(windows);
        let mut cache = SequenceCache::with_options(&gpu, &shapes, options).expect("options");
        let noted = vec![NotedTokens::new(); windows.len()];
        let mut prefixes = Prefixes { page, windows: windows.to_vec(), noted };
        // Texts that part at some token.
        let mut texts: Vec<Vec<u32>> = vec![(0..90).collect()];
        for text in 1..6 {
            let mut other = texts[random.below(texts.len())].clone();
            let at = random.below(60);
            other[at..].iter_mut().for_each(|token| *token += 100 * text);
            texts.push(other);
        }
        let mut sequences: Vec<(SequenceId, usize, usize)> = Vec::new();
        let live = |cache: &SequenceCache, id: SequenceId, layer: usize| {
            let held = cache.read(id, layer).expect("submitted");
            held.map_or(Vec::new(), |(key, _)| key.as_slice::<f32>().expect("floats").to_vec())
        };
        for call in 0..120 {
            let context = format!("windows {windows:?}, pages of {page}, call {call}");
            match random.below(9) {
                0 | 1 => {
                    let text = random.below(texts.len());
                    let asked = &texts[text][..random.below(91)];
                    let cached = cache.cached_prefix(asked).expect("nothing is lost");
                    let longest = prefixes.longest(asked);
                    assert!(cached == longest || most.is_some() && cached < longest, "{context}");
                    let (id, len) = cache.add_with_prefix(asked).expect("nothing is lost");
                    assert_eq!(len, cached, "{context}");
                    assert_eq!((cache.len(id), cache.next_position(id)), (Ok(len), Ok(len)));
                    reused[number] += usize::from(len > 20);
                    sequences.push((id, text, len));
                }
                2..=5 if !sequences.is_empty() => {
                    let at = random.below(sequences.len());
                    let (id, text, len) = sequences[at];
                    let count = (1 + random.below(25)).min(90 - len);
                    if count == 0 {
                        continue;
                    }
                    let tokens = &texts[text][..len + count];
                    let tensors: Vec<Tensor> = (0..windows.len())
                        .map(|layer| {
                            let token =
                                |end| (0..DIM).map(move |i| content(&tokens[..end], layer, i));
                            let floats: Vec<f32> =
                                (len + 1..=len + count).flat_map(token).collect();
                            upload_floats(&gpu, DType::F32, &floats, &[1, count, 1, DIM])
                        })
                        .collect();
                    let answer = gpu.submit_pass("step", |pass| {
                        let step = cache.plan_step(pass, &[(id, count)])?;
                        for (layer, tensor) in tensors.iter().enumerate() {
                            let packed = [count, 1, DIM];
                            let new = TensorView::packed(tensor.buffer(), DType::F32, packed)?;
                            cache.update(pass, &step, layer, &new, &new)?;
                        }
                        Ok::<_, Error>(())
                    });
                    match answer {
                        Ok(()) => sequences[at].2 += count,
                        Err(error) => {
                            assert!(
                                most.is_some() && matches!(error, Error::OutOfPages { .. }),
                                "{error}"
                            );
                        }
                    }
                }
                6 if !sequences.is_empty() => {
                    let (id, text, len) = sequences[random.below(sequences.len())];
                    let tokens = &texts[text][..random.below(len + 1)];
                    cache.remember_prefix(id, tokens).expect("its tokens");
                    let held = |layer| live(&cache, id, layer).len() / DIM;
                    let held: Vec<usize> = (0..windows.len()).map(held).collect();
                    prefixes.note(tokens, len, &held);
                }
                7 if !sequences.is_empty() => {
                    let at = random.below(sequences.len());
                    let (id, text, len) = sequences[at];
                    let kept = len - random.below(len.min(8) + 1);
                    if cache.truncate(id, kept).is_ok() {
                        sequences[at].2 = kept;
                    }
                    if let Ok(fork) = cache.fork(id, kept) {
                        sequences.push((fork, text, kept));
                    }
                }
                _ if sequences.len() > 3 => {
                    let (id, ..) = sequences.swap_remove(random.below(sequences.len()));
                    cache.remove(id).expect("it is there");
                }
                _ => {}
            }
            let Some(&(id, text, len)) = sequences.last() else { continue };
            for (layer, window) in windows.iter().enumerate() {
                let held = live(&cache, id, layer);
                let count = held.len() / DIM;
                let needed = window.map_or(len, |window| len.min(window - 1));
                assert!(count >= needed, "{context}, layer {layer}: {count} of {len} tokens");
                let token = |end| (0..DIM).map(move |i| (end, i));
                let due = (len - count + 1..=len).flat_map(token);
                let due = due.map(|(end, i)| content(&texts[text][..end], layer, i));
                let due: Vec<f32> = due.collect();
                let is_same = same_bits(bytemuck::cast_slice(&held), bytemuck::cast_slice(&due));
                assert!(is_same, "{context}, layer {layer}: {held:?} for {due:?}");
            }
        }
        for (id, ..) in sequences {
            cache.remove(id).expect("it is there");
        }
        cache.forget_prefixes().expect("nothing is lost");
        assert_eq!(cache.stats().pages_used, 0);
    }
    assert!(reused.iter().all(|&times| times > 2), "{reused:?} long prefixes were reused");
}

/// A prefix goes on in a sequence that was saved, restored and noted again.
#[cfg(all(feature = "safetensors", not(target_arch = "wasm32")))]
#[test]
fn prefixes_of_restored_sequences() {
    let gpu = gpu();
    let layer = LayerShape { dtype: DType::F32, heads: 1, key_dim: DIM, value_dim: DIM };
    let options = CacheOptions::default().with_page_tokens(4).with_windows(&[Some(7), None]);
    let make = || SequenceCache::with_options(&gpu, &[layer; 2], options).expect("options");
    let mut cache = make();
    let id = cache.add().expect("nothing is lost");
    let step = |cache: &mut SequenceCache, id, count: usize| {
        let tokens = upload_floats(&gpu, DType::F32, &vec![0.5; count * DIM], &[1, count, 1, DIM]);
        gpu.submit_pass("step", |pass| {
            let step = cache.plan_step(pass, &[(id, count)])?;
            let new = TensorView::packed(tokens.buffer(), DType::F32, [count, 1, DIM])?;
            (0..2).try_for_each(|at| cache.update(pass, &step, at, &new, &new).map(|_| ()))
        })
        .unwrap_or_else(|error: Error| panic!("{error}"));
    };
    for count in [21, 2] {
        step(&mut cache, id, count);
    }
    // Layer 0 holds tokens 15 to 22.
    let bytes = cache.save(id).expect("submitted");
    let mut other = make();
    let id = gpu.submit_pass("restore", |pass| other.restore(pass, &bytes)).expect("it fits");
    step(&mut other, id, 2);
    let ids: Vec<u32> = (0..25).collect();
    other.remember_prefix(id, &ids).expect("its tokens");
    // Layer 0 has let go of all before token 17, and the next one behind 24 looks back on token 18.
    assert_eq!(other.cached_prefix(&ids), Ok(24));
    assert_eq!(other.cached_prefix(&ids[..23]), Ok(0));
    let (next, len) = other.add_with_prefix(&ids).expect("nothing is lost");
    assert_eq!(len, 24);
    step(&mut other, next, 1);
    assert_eq!(other.next_position(next), Ok(25));
}
