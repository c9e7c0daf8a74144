//! K and V stored in fewer bits than they come in.

use half::{bf16, f16};
use wgpu_kvcache::{
    Attention, Cache, CacheKind, CacheLoad, CacheOptions, CachePlan, CachePosition, DType,
    DynamicKVCache, Error, Format, Formats, Gpu, KVCache, LayerShape, PagedKVCache, SequenceCache,
    StaticKVCache, StoringError, TensorView,
};

use crate::attention::{Case, Lie, Random, attend, distance, filled_as, forms};
use crate::layouts::Reader;
use crate::model::{Block, Model};
use crate::plain_formats::{floats, quantized, stored, with_one_nan};
use crate::rig::{Rig, Storing, compare_blocks, same_bits, upload};
use crate::wait::{ReadLayer, ReadSequence};
use crate::{gpu, kernels_run};

const APPEND: CachePosition<'_> = CachePosition::Append;
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// A cache of one layer that stores in one format, after one update of `values`.
fn filled(gpu: &Gpu, format: Format, dtype: DType, values: &Block) -> DynamicKVCache {
    let options = CacheOptions::default().with_formats(format);
    let mut cache = DynamicKVCache::with_options(gpu, options).expect("its options");
    let tensor = upload(gpu, dtype, values);
    gpu.submit_pass("update", |pass| {
        cache.update(pass, &tensor.view(), &tensor.view(), 0, APPEND).map(|_| ())
    })
    .unwrap_or_else(|error| panic!("{format} of {dtype}: {error}"));
    cache
}

fn block(shape: [usize; 4], values: &[f32]) -> Block {
    Block { shape, element: 4, bytes: bytemuck::pod_collect_to_vec(values) }
}

/// Every pair of 16 bits as f16 and as bf16, into every format.
#[test]
fn all_elements_of_16_bits_are_converted_as_plain_numbers_are() {
    let gpu = gpu();
    let all: Vec<u16> = (0..=u16::MAX).collect();
    let shape = [1, 1, 1024, 64];
    let all = Block { shape, element: 2, bytes: bytemuck::pod_collect_to_vec(&all) };
    for dtype in [DType::F16, DType::BF16] {
        for &format in Format::ALL {
            let (key, value) = filled(&gpu, format, dtype, &all).read(0).unwrap().expect("written");
            let expected = with_one_nan(format, stored(format, dtype, &all));
            for tensor in [key, value] {
                assert_eq!(tensor.dtype(), format.read_dtype());
                let got = with_one_nan(format, Block::of(&tensor));
                let pair = |block: &Block| Some((block.clone(), block.clone()));
                compare_blocks(pair(&got), pair(&expected), &format!("{dtype} to {format}"));
            }
        }
    }
}

/// f32 around every f16 and every middle between two of them, and what is past the largest.
#[test]
fn f32_is_rounded_to_nearest_even() {
    let gpu = gpu();
    let mut all = Vec::new();
    for bits in (0..0x7c00_u16).step_by(13).chain([0x3ff, 0x400, 0x7bff]) {
        let (low, high) = (f16::from_bits(bits).to_f32(), f16::from_bits(bits + 1).to_f32());
        let middle = if high.is_finite() { (low + high) / 2.0 } else { 65520.0 };
        for x in [low, middle, f32::from_bits(middle.to_bits() + 1), middle.next_down()] {
            all.extend([x, -x]);
        }
        let (low, high) = (bf16::from_bits(bits).to_f32(), bf16::from_bits(bits + 1).to_f32());
        all.extend([low, low / 2.0 + high / 2.0, (low / 2.0 + high / 2.0).next_up()]);
    }
    all.extend([f32::MAX, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 65504.0, 65519.9, 65520.0]);
    all.resize(all.len().next_multiple_of(64), 0.0);
    let all = block([1, 1, all.len() / 64, 64], &all);
    for format in [Format::F16, Format::BF16] {
        let (key, _) = filled(&gpu, format, DType::F32, &all).read(0).unwrap().expect("written");
        let expected = with_one_nan(format, stored(format, DType::F32, &all));
        let got = with_one_nan(format, Block::of(&key));
        assert!(same_bits(&got.bytes, &expected.bytes), "{format}");
        if kernels_run() {
            let floats = key.to_f32();
            assert!(floats.contains(&f32::INFINITY) && floats.iter().any(|x| x.is_nan()));
        }
    }
}

/// The scales and the numbers themselves, over random blocks of all sizes, and heads that end within a block.
#[test]
fn blocks_equal_those_of_a_plain_quantizer_bit_for_bit() {
    let gpu = gpu();
    for (number, dim) in [1, 2, 31, 32, 33, 64, 80, 96, 128, 130, 256].into_iter().enumerate() {
        for dtype in DTYPES {
            if dtype != DType::F32 && dim % 2 == 1 {
                continue;
            }
            let values = Block::numbers([1, 3, 200, dim], dtype, number as u64 + 1);
            for format in [Format::Q8_0, Format::Q4_0] {
                let cache = filled(&gpu, format, dtype, &values);
                let (key, value) = cache.read_stored(0).unwrap().expect("it was written");
                assert_eq!((key.format(), key.shape()), (format, values.shape));
                assert!(same_bits(key.elements(), value.elements()));
                let blocks = dim.div_ceil(32);
                assert_eq!(key.scales().len(), 600 * blocks.next_multiple_of(2));
                if !kernels_run() {
                    continue;
                }
                let all = floats(dtype, &values);
                for (row, elements) in all.chunks(dim).enumerate() {
                    for (at, elements) in elements.chunks(32).enumerate() {
                        let (scale, mut numbers) = quantized(format, elements);
                        numbers.resize(32, 0);
                        let context = format!("{format} of {dtype}, {dim}: {elements:?}");
                        let its = key.scales()[row * blocks.next_multiple_of(2) + at];
                        let same = its == scale || its.is_nan() && scale.is_nan();
                        assert!(same, "{context}: scale {its} for {scale}");
                        let size = key.elements().len() / 600 / blocks;
                        let bytes = &key.elements()[(row * blocks + at) * size..][..size];
                        let got: Vec<i32> = (0..32)
                            .map(|i| match format {
                                Format::Q8_0 => i32::from(bytes[i].cast_signed()),
                                _ if i < 16 => i32::from(bytes[i] & 15) - 8,
                                _ => i32::from(bytes[i - 16] >> 4) - 8,
                            })
                            .collect();
                        assert_eq!(got, numbers, "{context}");
                    }
                }
            }
        }
    }
}

/// Where K and V are of different width, a head of the narrower one ends before one of the wider: what is written of a
/// token stays in its slot, in a ring that has wrapped and in pages, in which the next slot may hold an older token.
#[test]
fn a_narrower_head_is_written_to_its_end_and_no_further() {
    let gpu = gpu();
    let each = [Format::Q8_0, Format::Q4_0, Format::F16].map(Formats::from);
    let mixed = Formats { key: Some(Format::Q4_0), value: Some(Format::BF16) };
    for (key_dim, value_dim) in [(64, 128), (128, 64), (192, 128), (64, 256), (40, 128), (64, 72)] {
        for formats in each.into_iter().chain([mixed]) {
            let storing = Storing { formats, is_value_in_key: false };
            let bounded = || Model::fixed(8, 1);
            let rigs = [
                Rig::fixed_storing(&gpu, 8, 1, storing),
                Rig::in_pages_storing(&gpu, 1, None, bounded(), storing),
                Rig::in_pages_storing(&gpu, 4, None, bounded(), storing),
            ];
            for (kind, mut rig) in rigs.into_iter().enumerate() {
                let context = format!("kind {kind}, {formats:?}, K of {key_dim}, V of {value_dim}");
                rig.update(0, [2, 3, 8, key_dim], value_dim, APPEND);
                rig.check(&context);
                rig.crop(5);
                for tokens in [1, 2] {
                    rig.update(0, [2, 3, tokens, key_dim], value_dim, APPEND);
                    rig.check(&format!("{context}, {tokens} more"));
                }
            }
        }
    }
}

/// What has no finite scale shows: the whole block reads as NaN, and no other one.
#[test]
fn what_cannot_be_quantized_reads_as_nan() {
    let gpu = gpu();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1.0e7, f32::MAX] {
        let mut values = vec![1.0_f32; 128];
        values[40] = bad;
        let values = block([1, 1, 2, 64], &values);
        for format in [Format::Q8_0, Format::Q4_0] {
            let (key, _) = filled(&gpu, format, DType::F32, &values).read(0).unwrap().expect("it");
            if kernels_run() {
                for (i, x) in key.to_f32().into_iter().enumerate() {
                    assert_eq!(x.is_nan(), (32..64).contains(&i), "{format}, {bad}: {x} at {i}");
                }
            }
        }
    }
    // The largest that a scale can hold.
    let most = 65504.0 * 127.0;
    let (key, _) = filled(&gpu, Format::Q8_0, DType::F32, &block([1, 1, 1, 32], &[most; 32]))
        .read(0)
        .unwrap()
        .expect("it");
    assert!(!kernels_run() || key.to_f32() == [most; 32]);
}

#[test]
fn memory_is_that_of_the_formats() {
    let gpu = gpu();
    for dim in [64, 128] {
        let bytes = |format: Format| {
            let options = CacheOptions::default().with_formats(format).with_capacity(64);
            let mut cache = DynamicKVCache::with_options(&gpu, options).expect("its options");
            let tensor = upload(&gpu, DType::F32, &Block::noise([1, 2, 64, dim], 4, 1));
            gpu.submit_pass("update", |pass| {
                cache.update(pass, &tensor.view(), &tensor.view(), 0, APPEND).map(|_| ())
            })
            .expect("room");
            let stats = cache.stats();
            assert_eq!(stats.bytes_allocated, 2 * 2 * 64 * format.token_bytes(dim));
            assert_eq!(stats.bytes_moved, stats.bytes_allocated);
            stats.bytes_allocated
        };
        let f32 = bytes(Format::F32);
        assert_eq!(2 * bytes(Format::F16), f32);
        assert!(100 * bytes(Format::Q8_0) <= 27 * f32, "{dim}");
        assert!(100 * bytes(Format::Q4_0) <= 15 * f32, "{dim}");
    }
}

/// Attention over every pair of formats, in every arrangement, against f64 over what the cache says it holds.
#[test]
fn attention_reads_every_pair_of_formats_in_place() {
    let (gpu, mut random) = (gpu(), Random(0x5eed_f0a7));
    let mut attention = Attention::new(&gpu);
    let lies = [Lie::Contiguous, Lie::Wrapped, Lie::Paged(4), Lie::Paged(16)];
    let mut number = 0;
    for &key in Format::ALL {
        for &value in Format::ALL {
            number += 1;

            let dims =
                [[64, 64], [128, 128], [48, 80], [34, 6], [256, 192]][(number + number / 5) % 5];
            let len = 1 + random.below(90);
            let case = Case {
                lie: lies[number % 4],
                dtype: DTYPES[number % 3],
                batch: 1 + random.below(3),
                heads: 1 + random.below(3),
                group: 1 + random.below(3),
                len,
                tokens: 1 + random.below(len.min(6)),
                dim: dims[0],
                value_dim: dims[1],
                is_causal: random.below(3) > 0,
                scale: None,
                forms: forms(number),
            };
            let rows = case.batch * case.heads * case.len;
            let k = random.floats(rows * case.dim, 1.0);
            let v = random.floats(rows * case.value_dim, 1.0);
            let q = random.floats(case.shapes()[0].iter().product(), 1.0);
            let formats = Formats { key: Some(key), value: Some(value) };
            let options = CacheOptions::default().with_formats(formats);
            let cache = filled_as(&gpu, &case, options, &k, &v);
            let view = cache.view(0).unwrap().expect("it was written");
            assert_eq!([view.key_format(), view.value_format()], [key, value]);
            if let Some((got, expected)) = attend(&gpu, &mut attention, &case, &q, cache.as_ref()) {
                let apart = distance(&got, &expected);
                assert!(apart < 1.0e-5, "{formats:?}, {case:?}: off by {apart:e}");
            }
        }
    }
}

/// The public text reads what `get` reads, from a shader of one's own.
#[test]
fn a_shader_of_ones_own_reads_every_format() {
    let (gpu, mut number) = (gpu(), 0);
    for &key in Format::ALL {
        for &value in Format::ALL {
            number += 1;

            let [dim, value_dim] = [[64, 64], [6, 34], [96, 130]][number % 3];
            let formats = Formats { key: Some(key), value: Some(value) };
            let storing = Storing { formats, is_value_in_key: false };
            let mut rig = match number % 2 {
                0 => Rig::dynamic_storing(&gpu, storing),
                _ => Rig::in_pages_storing(&gpu, 4, None, Model::dynamic(), storing),
            };

            rig.update(0, [2, 2, 7, dim], value_dim, APPEND);
            rig.crop(5);
            rig.update(0, [2, 2, 2, dim], value_dim, APPEND);
            let view = rig.cache.view(0).unwrap().expect("it was written");
            let reader = Reader::of_elements(&gpu, &view);
            gpu.submit_pass("elements", |pass| reader.record(pass));
            let (k, v) = rig.cache.read(0).unwrap().expect("it was written");
            for (got, tensor) in reader.read().iter().zip([k, v]) {
                let block =
                    |values: Vec<f32>| with_one_nan(Format::F32, block(tensor.shape(), &values));
                let got = block(bytemuck::pod_collect_to_vec(got));
                // Minus zero and zero are one number here.
                let plus = |block: Block| -> Vec<f32> {
                    floats(DType::F32, &block).iter().map(|x| x + 0.0).collect()
                };
                let (got, right) = (plus(got), plus(block(tensor.to_f32())));
                let same = same_bits(bytemuck::cast_slice(&got), bytemuck::cast_slice(&right));
                assert!(same, "{key} and {value}, {dim} and {value_dim}");
            }
        }
    }
}

/// A sequence cache against one of f32 whose tokens were rounded on the host.
#[test]
fn sequences_store_every_format() {
    let gpu = gpu();
    let shape = LayerShape { dtype: DType::F32, heads: 2, key_dim: 48, value_dim: 34 };
    for (number, &key) in Format::ALL.iter().enumerate() {
        let value = Format::ALL[(number + 2) % 5];
        let formats = Formats { key: Some(key), value: Some(value) };
        let options = CacheOptions::default().with_formats(formats).with_page_tokens(4);
        let mut cache = SequenceCache::with_options(&gpu, &[shape], options).expect("its options");
        let mut rows: Vec<(_, [Vec<f32>; 2])> = Vec::new();
        let mut seed = 100 * number as u64;
        let mut step = |cache: &mut SequenceCache,
                        rows: &mut Vec<(wgpu_kvcache::SequenceId, [Vec<f32>; 2])>,
                        counts: &[(usize, usize)]| {
            let total: usize = counts.iter().map(|(_, count)| count).sum();
            seed += 1;
            let dtype = DTYPES[usize::try_from(seed).expect("small") % 3];
            // (T, H, D), so that the tokens of a sequence are one piece.
            let tensors = [48, 34].map(|dim| Block::numbers([1, total, 2, dim], dtype, seed));
            let buffers = tensors.each_ref().map(|block| upload(&gpu, dtype, block));
            gpu.submit_pass("step", |pass| {
                let counts: Vec<_> =
                    counts.iter().map(|&(at, count)| (rows[at].0, count)).collect();
                let step = cache.plan_step(pass, &counts)?;
                let [key, value] = &buffers;
                let key = TensorView::packed(key.buffer(), dtype, [total, 2, 48])?;
                let value = TensorView::packed(value.buffer(), dtype, [total, 2, 34])?;
                cache.update(pass, &step, 0, &key, &value).map(|_| ())
            })
            .unwrap_or_else(|error| panic!("{formats:?}: {error}"));
            for (side, (block, dim)) in tensors.iter().zip([48, 34]).enumerate() {
                let format = [key, value][side];
                let stored = stored(format, dtype, block);
                let all = floats(format.read_dtype(), &stored);
                let mut tokens = all.chunks(2 * dim);
                for &(at, count) in counts {
                    let its = tokens.by_ref().take(count).flatten();
                    rows[at].1[side].extend(its);
                }
            }
        };
        for _ in 0..3 {
            rows.push((cache.add().expect("a name"), Default::default()));
        }
        step(&mut cache, &mut rows, &[(0, 5), (1, 1), (2, 9)]);
        let (fork, parent) = (cache.fork(rows[2].0, 6).expect("six tokens"), rows[2].1.clone());
        let [k, v] = parent;
        rows.push((fork, [k[..6 * 96].to_vec(), v[..6 * 68].to_vec()]));
        step(&mut cache, &mut rows, &[(3, 2), (0, 1), (2, 1)]);
        // Of the latest three tokens of the first one, the last and the first.
        gpu.submit_pass("keep", |pass| cache.keep_latest(pass, rows[0].0, 3, &[2, 0])).expect("3");
        for (side, row) in [96, 68].into_iter().enumerate() {
            let all = &mut rows[0].1[side];
            let tail = all.split_off(3 * row);
            all.extend(&tail[2 * row..]);
            all.extend(&tail[..row]);
        }
        for (id, expected) in &rows {
            let (k, v) = cache.read(*id, 0).unwrap().expect("tokens");
            for (tensor, (dim, right)) in [k, v].iter().zip([48, 34].into_iter().zip(expected)) {
                let tokens = tensor.shape()[2];
                assert_eq!(right.len(), tokens * 2 * dim);
                // (H, T, D) of (T, H, D).
                let order = (0..2).flat_map(|h| (0..tokens).map(move |t| (t * 2 + h) * dim));
                let right: Vec<f32> = order.flat_map(|at| right[at..at + dim].to_vec()).collect();
                let one = |values: &[f32]| {
                    with_one_nan(Format::F32, block([1, 2, tokens, dim], values)).bytes
                };
                assert!(same_bits(&one(&tensor.to_f32()), &one(&right)), "{formats:?}");
            }
        }
    }
}

/// The accepted path of a tree, in rows of quantized layers and in ones that store K alone.
#[test]
fn kept_tokens_are_moved_as_they_are_stored() {
    let gpu = gpu();
    for &format in Format::ALL {
        for is_value_in_key in [false, true] {
            let storing = Storing { formats: format.into(), is_value_in_key };
            for mut rig in [
                Rig::dynamic_storing(&gpu, storing),
                Rig::fixed_storing(&gpu, 16, 1, storing),
                Rig::in_pages_storing(&gpu, 4, None, Model::dynamic(), storing),
            ] {
                rig.update(0, [2, 2, 9, 66], 34, APPEND);
                let (key, value) = rig.cache.read_stored(0).unwrap().expect("written");
                gpu.submit_pass("keep", |pass| rig.cache.keep_latest(pass, 4, &[3, 1])).expect("4");
                let (k, v) = rig.cache.read_stored(0).unwrap().expect("written");
                let order = [0, 1, 2, 3, 4, 8, 6];
                for (before, after) in [(key, k), (value, v)] {
                    let row = before.elements().len() / (2 * 2 * 9);
                    let heads = before.elements().chunks(9 * row);
                    let right: Vec<u8> = heads
                        .flat_map(|head| order.iter().flat_map(|t| head[t * row..][..row].to_vec()))
                        .collect();
                    assert!(same_bits(after.elements(), &right), "{storing:?}");
                    if let Some(row) =
                        before.scales().len().checked_div(2 * 2 * 9).filter(|&n| n > 0)
                    {
                        let heads = before.scales().chunks(9 * row);
                        let right: Vec<f16> = heads
                            .flat_map(|head| {
                                order.iter().flat_map(|t| head[t * row..][..row].to_vec())
                            })
                            .collect();
                        let bytes = |scales: &[f16]| bytemuck::cast_slice::<_, u8>(scales).to_vec();
                        assert!(same_bits(&bytes(after.scales()), &bytes(&right)), "{storing:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn what_formats_cannot_store_is_refused() {
    let gpu = gpu();
    let run = |cache: &mut dyn KVCache, key: TensorView<'_>, value: TensorView<'_>| {
        let before = cache.stats();
        let error = gpu
            .submit_pass("update", |pass| cache.update(pass, &key, &value, 0, APPEND).map(|_| ()))
            .expect_err("refused");
        assert_eq!(cache.stats(), before);
        assert!(cache.view(0).expect("nothing was lost").is_none());
        error
    };
    let odd = upload(&gpu, DType::F32, &Block::noise([1, 1, 2, 3], 4, 1));
    for format in [Format::F16, Format::BF16] {
        let options =
            CacheOptions::default().with_formats(Formats { key: None, value: Some(format) });
        let mut cache = DynamicKVCache::with_options(&gpu, options).expect("its options");
        let error = run(&mut cache, odd.view(), odd.view());
        assert!(matches!(error, Error::OddHeadDim { what: "value", head_dim: 3, .. }), "{error}");
    }
    let options = CacheOptions::default().with_value_in_key();
    let mut cache = PagedKVCache::with_options(&gpu, options).expect("its options");
    let other = upload(&gpu, DType::F32, &Block::noise([1, 1, 2, 3], 4, 2));
    for value in [other.view(), other.view().with_head_dim(2), odd.view().with_offset(4)] {
        let value = if value.offset() > 0 { value.with_head_dim(2) } else { value };
        let error = run(&mut cache, odd.view(), value);
        assert!(
            matches!(error, Error::Storing(StoringError::ValueNotInKey { layer: 0, .. })),
            "{error}"
        );
        assert!(error.to_string().contains("with_head_dim"), "{error}");
    }
    // One side as it comes in: then all of it comes in as one type.
    let formats = Formats { key: Some(Format::Q8_0), value: None };
    let options = CacheOptions::default().with_formats(formats);
    let options = options.with_max_cache_len(8).with_num_layers(1);
    let mut cache = StaticKVCache::with_options(&gpu, options).expect("its options");
    let f32 = upload(&gpu, DType::F32, &Block::noise([1, 1, 2, 4], 4, 1));
    let f16 = upload(&gpu, DType::F16, &Block::noise([1, 1, 2, 4], 2, 1));
    gpu.submit_pass("f32", |pass| {
        cache.update(pass, &f32.view(), &f32.view(), 0, APPEND).map(|_| ())
    })
    .expect("room");
    let error = gpu
        .submit_pass("f16", |pass| {
            cache.update(pass, &f16.view(), &f16.view(), 0, APPEND).map(|_| ())
        })
        .expect_err("V is f32");
    assert!(
        matches!(error, Error::WrongDType { expected: DType::F32, got: DType::F16, .. }),
        "{error}"
    );
}

/// Plans count what caches of every format take.
#[test]
fn plans_foresee_formats_and_layers_of_k_alone() {
    let (gpu, mut random) = (gpu(), Random(0xfeed));
    for number in 0..40 {
        let format = |random: &mut Random| {
            let at = random.below(6);
            Format::ALL.get(at).copied()
        };
        let formats = Formats { key: format(&mut random), value: format(&mut random) };
        let options = CacheOptions::default().with_formats(formats);
        let is_value_in_key = number % 4 == 0;
        let options = if is_value_in_key { options.with_value_in_key() } else { options };
        let dim = 2 * (1 + random.below(80));
        let value_dim = 2 * (1 + random.below(dim / 2));
        let layer = LayerShape { dtype: DType::F32, heads: 2, key_dim: dim, value_dim };
        let (batch, tokens) = (1 + random.below(3), 1 + random.below(200));
        let load = CacheLoad { batch, tokens, chunk: tokens };
        let kind = [CacheKind::Dynamic, CacheKind::Paged][number / 2 % 2];
        let plan = CachePlan::new(kind, &[layer; 2], options, load, &gpu.device().limits());
        let plan = plan.expect("a plan");
        let mut cache: Box<dyn KVCache> = match kind {
            CacheKind::Dynamic => {
                Box::new(DynamicKVCache::with_options(&gpu, options).expect("it"))
            }
            _ => Box::new(PagedKVCache::with_options(&gpu, options).expect("it")),
        };
        let key = upload(&gpu, DType::F32, &Block::noise([batch, 2, tokens, dim], 4, 1));
        let value = upload(&gpu, DType::F32, &Block::noise([batch, 2, tokens, value_dim], 4, 2));
        let value = match is_value_in_key {
            true => key.view().with_head_dim(value_dim),
            false => value.view(),
        };
        gpu.submit_pass("all", |pass| {
            (0..2).try_for_each(|layer| {
                cache.update(pass, &key.view(), &value, layer, APPEND).map(|_| ())
            })
        })
        .unwrap_or_else(|error| panic!("{formats:?}: {error}"));
        let stats = cache.stats();
        let foreseen = (plan.bytes_allocated(), plan.buffers());
        assert_eq!(foreseen, (stats.bytes_allocated, stats.buffers), "{formats:?}, {kind:?}");
        let sides = if is_value_in_key { 1 } else { 2 };
        assert_eq!(plan.bindings(), sides + u32::from(kind == CacheKind::Paged));
    }
}
