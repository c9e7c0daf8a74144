//! Of the latest tokens some stay, in the order named: the accepted path of a tree of drafted tokens.

use wgpu_kvcache::{
    Attention, AttentionOptions, BitMask, CacheOptions, CachePosition, DType, DynamicKVCache,
    EncoderDecoderCache, Error, Gpu, KVCache, LayerShape, PagedKVCache, SequenceCache, SequenceId,
    Side, StaticKVCache, TensorView, WindowError,
};

use crate::attention::{BOUND, Random, distance, upload as upload_floats};
use crate::model::Block;
use crate::rig::{same_bits, upload};
use crate::wait::{ReadLayer, ReadSequence};
use crate::{gpu, kernels_run, shared_plain_gpu};

const APPEND: CachePosition<'_> = CachePosition::Append;

fn caches(gpu: &Gpu, windows: &[Option<usize>]) -> Vec<Box<dyn KVCache>> {
    let plain = CacheOptions::default().with_windows(windows);
    let fixed = plain.with_num_layers(2).with_max_cache_len(200).with_max_chunk(64);
    let paged = |size| PagedKVCache::with_options(gpu, plain.with_page_tokens(size));
    vec![
        Box::new(DynamicKVCache::with_options(gpu, plain).expect("options of the kind")),
        Box::new(StaticKVCache::with_options(gpu, fixed).expect("options of the kind")),
        Box::new(paged(1).expect("a power of two")),
        Box::new(paged(4).expect("a power of two")),
        Box::new(paged(16).expect("a power of two")),
    ]
}

/// The tokens of every row and head, in bytes: [B, H, T, D] taken apart.
fn tokens(
    gpu: &Gpu,
    cache: &dyn KVCache,
    layer: usize,
    dim: usize,
    size: usize,
) -> Vec<Vec<Vec<u8>>> {
    let _ = gpu;
    let (key, _) = cache.read(layer).expect("submitted").expect("it was written");
    let [batch, heads, len, _] = key.shape();
    let rows = key.bytes().chunks(len * dim * size).take(batch * heads);
    rows.map(|row| row.chunks(dim * size).map(<[u8]>::to_vec).collect()).collect()
}

/// Random trees over every kind: after wrapping, with shared pages, in every type; each row and head keeps the same
/// tokens, what is before them stays, and appends follow behind.
#[test]
fn those_that_are_named_stay_in_their_order() {
    let gpus = [gpu(), shared_plain_gpu()];
    let mut random = Random(73);
    let mut seed = 0;
    for run in 0..12 {
        let gpu = &gpus[run % 2];
        let dtype = [DType::F32, DType::F16, DType::BF16][run % 3];
        let dims = [[4, 6], [8, 8]][run % 2];
        for (kind, mut cache) in caches(gpu, &[]).into_iter().enumerate() {
            let mut append = |cache: &mut dyn KVCache, batch: usize, count: usize| {
                for (layer, dim) in dims.into_iter().enumerate() {
                    seed += 1;
                    let block = Block::noise([batch, 2, count, dim], dtype.size(), seed);
                    let new = upload(gpu, dtype, &block);
                    gpu.submit_pass("append", |pass| {
                        cache.update(pass, &new.view(), &new.view(), layer, APPEND).map(|_| ())
                    })
                    .unwrap_or_else(|error| panic!("{error}"));
                }
            };
            append(cache.as_mut(), 1, 30 + random.below(30));
            // Rings that do not begin at their first slot, and rows that share pages.
            cache.crop(25);
            gpu.submit_pass("fork", |pass| cache.batch_repeat_interleave(pass, 2)).expect("room");
            if kind == 1 {
                append(cache.as_mut(), 2, 60);
                append(cache.as_mut(), 2, 60);
                cache.crop(30);
                append(cache.as_mut(), 2, 60);
            }
            for _ in 0..3 {
                let count = 1 + random.below(20);
                append(cache.as_mut(), 2, count);
                // Some of them, mostly in the order of a path; or in any, some twice.
                let mut keep: Vec<u32> = (0..u32::try_from(count).expect("few"))
                    .filter(|_| random.below(2) == 0)
                    .collect();
                match random.below(4) {
                    0 => keep.reverse(),
                    1 => keep.extend(keep.clone().first()),
                    _ => {}
                }
                let size = dtype.size();
                let before: Vec<_> = (0..2)
                    .map(|layer| tokens(gpu, cache.as_ref(), layer, dims[layer], size))
                    .collect();
                let position = cache.get_next_position(0).expect("it exists");
                gpu.submit_pass("keep", |pass| cache.keep_latest(pass, count, &keep))
                    .unwrap_or_else(|error| panic!("{error}"));
                let context = format!("run {run}, kind {kind}, {keep:?} of {count}");
                let next = cache.get_next_position(0);
                assert_eq!(next, Ok(position - count + keep.len()), "{context}");
                for (layer, before) in before.iter().enumerate() {
                    let after = tokens(gpu, cache.as_ref(), layer, dims[layer], size);
                    assert_eq!(before.len(), after.len(), "{context}");
                    for (before, after) in before.iter().zip(&after) {
                        let first = before.len() - count;
                        let kept = keep.iter().map(|&at| &before[first + at as usize]);
                        let expected: Vec<_> = before[..first].iter().chain(kept).collect();
                        assert_eq!(expected.len(), after.len(), "{context}");
                        let is_same = expected.iter().zip(after).all(|(a, b)| same_bits(b, a));
                        assert!(is_same, "{context}, layer {layer}");
                    }
                }
            }
        }
    }
}

/// A tree is verified in one call with a bit mask over its tokens, and its accepted path gives what the same tokens
/// give one after the other.
#[test]
fn a_tree_of_drafted_tokens_is_verified_and_its_path_kept() {
    const DIM: usize = 8;
    let gpu = gpu();
    let mut random = Random(79);
    let parents = [None, Some(0), Some(0), Some(2), Some(1), Some(3), Some(3)];
    let paths: [&[u32]; 7] =
        [&[0], &[0, 1], &[0, 2], &[0, 2, 3], &[0, 1, 4], &[0, 2, 3, 5], &[0, 2, 3, 6]];
    let words = BitMask::words_of_tree(&parents);
    let floats: Vec<f32> = words.iter().map(|&word| f32::from_bits(word)).collect();
    let words = upload_floats(&gpu, DType::F32, &floats, &[1, 1, 1, parents.len()]);
    for mut cache in caches(&gpu, &[]) {
        let mut attention = Attention::new(&gpu);
        let mut attend = |cache: &mut dyn KVCache,
                          parts: [&[f32]; 3],
                          mask: Option<BitMask<'_>>| {
            let count = parts[0].len() / DIM;
            let [q, k, v] =
                parts.map(|part| upload_floats(&gpu, DType::F32, part, &[1, 1, count, DIM]));
            let out = upload_floats(&gpu, DType::F32, &vec![0.0; count * DIM], &[1, 1, count, DIM]);
            gpu.submit_pass("tree", |pass| {
                let view = cache.update(pass, &k.view(), &v.view(), 0, APPEND)?;
                // All tokens of the tree are new: the mask alone says who sees whom.
                let options = AttentionOptions::default().with_bit_mask(mask);
                let options = if mask.is_some() { options.unmasked() } else { options };
                attention.record(pass, &q.view(), &view, &out.view(), options)
            })
            .unwrap_or_else(|error| panic!("{error}"));
            crate::attention::read(&gpu, &out)
        };
        let prompt = [(); 3].map(|()| random.floats(21 * DIM, 1.0));
        attend(cache.as_mut(), prompt.each_ref().map(Vec::as_slice), None);
        let tree = [(); 3].map(|()| random.floats(parents.len() * DIM, 1.0));
        let shape = [1, 1, parents.len(), parents.len()];
        let mask = BitMask::new(words.buffer(), shape);
        let verified = attend(cache.as_mut(), tree.each_ref().map(Vec::as_slice), Some(mask));
        let row = |values: &[f32], at: u32| values[at as usize * DIM..][..DIM].to_vec();
        // The longest path last, since what is kept stays.
        for path in paths {
            cache.drop_latest(parents.len()).expect("they are live");
            let [q, k, v] = tree
                .each_ref()
                .map(|values| path.iter().flat_map(|&at| row(values, at)).collect::<Vec<f32>>());
            let alone = attend(cache.as_mut(), [&q, &k, &v], None);
            if kernels_run() {
                let expected: Vec<f64> =
                    alone[alone.len() - DIM..].iter().copied().map(f64::from).collect();
                let last = *path.last().expect("a root at least");
                let apart = distance(&row(&verified, last), &expected);
                assert!(apart < BOUND, "{path:?}: {apart}");
            }
            cache.drop_latest(path.len()).expect("they are live");
            attend(cache.as_mut(), tree.each_ref().map(Vec::as_slice), Some(mask));
        }
        let path = [0, 2, 3, 6];
        gpu.submit_pass("accept", |pass| cache.keep_latest(pass, parents.len(), &path))
            .expect("all are live");
        let next = [(); 3].map(|()| random.floats(DIM, 1.0));
        let after = attend(cache.as_mut(), next.each_ref().map(Vec::as_slice), None);
        cache.drop_latest(5).expect("they are live");
        let [_, k, v] = tree
            .each_ref()
            .map(|values| path.iter().flat_map(|&at| row(values, at)).collect::<Vec<f32>>());
        attend(cache.as_mut(), [&k, &k, &v], None);
        let expected = attend(cache.as_mut(), next.each_ref().map(Vec::as_slice), None);
        assert_eq!(after, expected, "the path kept, and the path written");
    }
}

#[test]
fn what_cannot_be_kept_is_refused_and_changes_nothing() {
    let gpu = gpu();
    let new = upload(&gpu, DType::F32, &Block::noise([2, 2, 9, 4], 4, 7));
    let append = |cache: &mut dyn KVCache, layer: usize| {
        gpu.submit_pass("append", |pass| {
            cache.update(pass, &new.view(), &new.view(), layer, APPEND).map(|_| ())
        })
        .unwrap_or_else(|error| panic!("{error}"));
    };
    for (kind, mut cache) in caches(&gpu, &[Some(4), None]).into_iter().enumerate() {
        append(cache.as_mut(), 0);
        append(cache.as_mut(), 0);
        append(cache.as_mut(), 1);
        let held = [0, 1].map(|layer| cache.read(layer).expect("submitted"));
        let keep = |cache: &mut dyn KVCache, count: usize, keep: &[u32]| {
            gpu.submit_pass("keep", |pass| cache.keep_latest(pass, count, keep))
        };
        let past = Error::PositionOutOfBounds { position: 3, bound: 3 };
        assert_eq!(keep(cache.as_mut(), 3, &[0, 3]), Err(past));
        let few = Error::TooFewTokens { layer: 1, live: 9, asked: 10 };
        assert_eq!(keep(cache.as_mut(), 10, &[1, 2, 3, 4, 5]), Err(few), "kind {kind}");
        // Layer 0 keeps 3 tokens before its latest 9, and the next token looks back on 3.
        assert_eq!(keep(cache.as_mut(), 9, &[4]), Ok(()));
        let lengths = [0, 1].map(|layer| cache.get_seq_length(layer));
        assert_eq!(lengths, [Ok(4), Ok(1)]);
        cache.reset();
        append(cache.as_mut(), 0);
        append(cache.as_mut(), 0);
        append(cache.as_mut(), 1);
        let error = keep(cache.as_mut(), 12, &[0, 1]).expect_err("gone, or never there");
        assert!(
            matches!(
                error,
                Error::Window(WindowError::PastWindow { .. }) | Error::TooFewTokens { .. }
            ),
            "{error}"
        );
        let after = [0, 1].map(|layer| cache.read(layer).expect("submitted"));
        assert!(!kernels_run() || held == after, "kind {kind}: changed all the same");
        cache.truncate_rows(&[13, 14]).expect("two rows");
        let error = keep(cache.as_mut(), 2, &[0]).expect_err("ragged");
        assert!(matches!(error, Error::NotSupported { .. }), "{error}");
    }
    // Nothing to keep is a roll-back, and of two caches the self side is meant.
    let mut pair = EncoderDecoderCache::dynamic(&gpu);
    gpu.submit_pass("both", |pass| {
        for side in [Side::SelfAttention, Side::CrossAttention] {
            pair.update(pass, &new.view(), &new.view(), 0, APPEND, side)?;
        }
        wgpu_kvcache::Cache::keep_latest(&mut pair, pass, 4, &[])
    })
    .expect("both sides");
    let lengths =
        [Side::SelfAttention, Side::CrossAttention].map(|side| pair.get_seq_length(0, side));
    assert_eq!(lengths, [Ok(5), Ok(9)]);
}

/// The same of one sequence among others that share its pages, in layers with a window and without.
#[test]
fn of_a_sequence_those_that_are_named_stay() {
    let gpus = [gpu(), shared_plain_gpu()];
    let mut random = Random(97);
    let mut seed = 0;
    for run in 0..16 {
        let gpu = &gpus[run % 2];
        let dtype = [DType::F32, DType::F16, DType::BF16][run % 3];
        let dims = [[4, 6], [8, 8]][run % 2];
        let layers = dims.map(|dim| LayerShape { dtype, heads: 2, key_dim: dim, value_dim: dim });
        let windows = [None, Some(8)];
        let options = CacheOptions::default().with_page_tokens([1, 4, 16][run % 3]);
        let options = if run % 4 == 0 { options } else { options.with_windows(&windows) };
        let mut cache = SequenceCache::with_options(gpu, &layers, options).expect("options");
        let mut append = |cache: &mut SequenceCache, counts: &[(SequenceId, usize)]| {
            let total: usize = counts.iter().map(|(_, count)| count).sum();
            gpu.submit_pass("step", |pass| {
                let step = cache.plan_step(pass, counts)?;
                for (layer, dim) in dims.into_iter().enumerate() {
                    seed += 1;
                    let block = Block::noise([1, total, 2, dim], dtype.size(), seed);
                    let new = upload(gpu, dtype, &block);
                    let new = TensorView::packed(new.buffer(), dtype, [total, 2, dim])?;
                    cache.update(pass, &step, layer, &new, &new)?;
                }
                Ok::<_, Error>(step)
            })
            .unwrap_or_else(|error| panic!("{error}"))
        };
        let held = |cache: &SequenceCache, id: SequenceId| -> Vec<Vec<Vec<u8>>> {
            let rows = dims.into_iter().enumerate().flat_map(|(layer, dim)| {
                let (key, _) = cache.read(id, layer).expect("submitted").expect("it has tokens");
                let width = dim * dtype.size();
                let rows = key.bytes().chunks(key.shape()[2] * width);
                let tokens = rows.map(|row| row.chunks(width).map(<[u8]>::to_vec).collect());
                tokens.collect::<Vec<_>>()
            });
            rows.collect()
        };
        let parent = cache.add().expect("nothing is lost");
        append(&mut cache, &[(parent, 21)]);
        let child = cache.fork(parent, 21).expect("all of it");
        for _ in 0..4 {
            let count = 1 + random.below(12);
            let step = append(&mut cache, &[(parent, 2), (child, count)]);
            let keep: Vec<u32> =
                (0..u32::try_from(count).expect("few")).filter(|_| random.below(2) == 0).collect();
            let before = [parent, child].map(|id| held(&cache, id));
            let position = cache.next_position(child).expect("it is there");
            gpu.submit_pass("keep", |pass| cache.keep_latest(pass, child, count, &keep))
                .unwrap_or_else(|error| panic!("{error}"));
            let context = format!("run {run}, {keep:?} of {count}");
            let next = cache.next_position(child);
            assert_eq!(next, Ok(position - count + keep.len()), "{context}");
            let after = [parent, child].map(|id| held(&cache, id));
            assert!(!kernels_run() || before[0] == after[0], "{context}: another sequence");
            for (before, after) in before[1].iter().zip(&after[1]) {
                let first = before.len() - count;
                let kept = keep.iter().map(|&at| &before[first + at as usize]);
                let expected: Vec<_> = before[..first].iter().chain(kept).collect();
                assert_eq!(expected.len(), after.len(), "{context}");
                let is_same = expected.iter().zip(after).all(|(a, b)| same_bits(b, a));
                assert!(is_same, "{context}");
            }
            if !keep.is_empty() {
                assert!(cache.view(&step, 0).is_err(), "{context}: the step shows what is gone");
            }
        }
        let lengths = [parent, child].map(|id| cache.len(id).expect("it is there"));
        let refusals = [
            gpu.submit_pass("keep", |pass| cache.keep_latest(pass, child, 3, &[3])),
            gpu.submit_pass("keep", |pass| cache.keep_latest(pass, child, 99, &[1])),
        ];
        assert!(refusals.iter().all(Result::is_err), "{refusals:?}");
        assert_eq!(lengths, [parent, child].map(|id| cache.len(id).expect("it is there")));
        cache.remove(parent).expect("it is there");
        cache.remove(child).expect("it is there");
        assert_eq!(cache.stats().pages_used, 0);
    }
}

/// A page that a sequence shares and keeps tokens in is copied, also where the pool has no page left.
#[test]
fn kept_tokens_of_a_fork_may_need_a_larger_pool() {
    let gpu = gpu();
    let layer = LayerShape { dtype: DType::F32, heads: 2, key_dim: 4, value_dim: 4 };
    for windows in [&[][..], &[None, Some(30)][..]] {
        let options = CacheOptions::default().with_page_tokens(4).with_windows(windows);
        // As long as it may be: what is kept takes the place of what goes.
        let options = options.with_max_cache_len(64);
        let mut cache = SequenceCache::with_options(&gpu, &[layer; 2], options).expect("options");
        let parent = cache.add().expect("nothing is lost");
        let new = upload(&gpu, DType::F32, &Block::noise([1, 64, 2, 4], 4, 5));
        let new = TensorView::packed(new.buffer(), DType::F32, [64, 2, 4]).expect("a shape");
        gpu.submit_pass("step", |pass| {
            let step = cache.plan_step(pass, &[(parent, 64)])?;
            (0..2).try_for_each(|layer| cache.update(pass, &step, layer, &new, &new).map(|_| ()))
        })
        .expect("the pool grows");
        assert_eq!((cache.stats().pages_used, cache.stats().pages_free), (16, 0));
        let child = cache.fork(parent, 64).expect("all of it");
        let held = |cache: &SequenceCache, id: SequenceId, layer: usize| {
            let (key, _) = cache.read(id, layer).expect("submitted").expect("it has tokens");
            let rows = key.bytes().chunks(key.shape()[2] * 16).map(<[u8]>::to_vec);
            rows.collect::<Vec<_>>()
        };
        let before = [0, 1].map(|layer| held(&cache, parent, layer));
        gpu.submit_pass("keep", |pass| cache.keep_latest(pass, child, 2, &[1]))
            .expect("the pool grows");
        assert_eq!(cache.stats().pages_used, 17);
        for (layer, before) in before.iter().enumerate() {
            let after = [parent, child].map(|id| held(&cache, id, layer));
            for (head, before) in before.iter().enumerate() {
                assert!(same_bits(&after[0][head], before), "layer {layer}: the parent's");
                let tail = before.len() - 32;
                let expected = [&before[..tail], &before[before.len() - 16..]].concat();
                assert!(same_bits(&after[1][head], &expected), "layer {layer}: the child's");
            }
        }
    }
}
