//! Random histories: whatever is called, in whatever order, the cache holds what the model holds, and
//! refuses what the model refuses with nothing changed.
//!
//! The variable `KV_HISTORIES` sets how many histories are run on each device, the kinds drawn among them.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use wgpu_kvcache::{
    CachePosition, DType, Error, Format, Formats, Gpu, StaticKVCache, StoringError, TensorView,
};

use crate::given::Pool;
use crate::gpu;
use crate::model::{Block, Model, Refused};
use crate::rig::{Rig, Storing, plain_gpu, upload};

/// Bound and layer count of the static caches.
const BOUND: usize = 300;
const LAYERS: usize = 3;
/// Bytes of K or of V of each layer in memory of an engine's.
const GIVEN: u64 = 1 << 20;
/// What WebGPU's default limits bind, less what a misfit adds.
const MOST_BYTES: usize = 96 << 20;

/// How K and V lie in the buffers that are handed in.
#[derive(Clone, Copy, Debug)]
enum Lie {
    /// Row-major (B, H, T, D), from the first byte on.
    Plain,
    /// Row-major (B, T, H, D).
    TokensFirst,
    /// (B, T, K heads then V heads, D) in one buffer, some words in; K and V of one D only.
    Fused,
}

#[derive(Clone, Debug)]
enum Positions {
    Append,
    At(u32),
    PerToken(Vec<u32>),
    PerRow(Vec<Vec<u32>>),
}

/// One call. Numbers are seeds that are fitted to the state in which the call is made, so that most
/// calls are valid and some are not.
#[derive(Clone, Debug)]
enum Call {
    Update {
        layer: usize,
        tokens: usize,
        lie: Lie,
        form: u8,
        seeds: Vec<u32>,
        misfit: u8,
    },
    Crop(usize),
    Truncate(usize),
    /// Cuts each row: keeps the latest tokens, or the first.
    CutRows {
        lengths: Vec<usize>,
        is_crop: bool,
    },
    Select(Vec<u32>),
    Repeat(usize),
    Reset,
}

/// The cache that a history runs on.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Dynamic,
    Static,
    /// The same, in memory of an engine's, which may be too little for a batch.
    Given,
    /// In pages of so many tokens.
    Paged(usize),
    /// The same, with the bounds of the static kind.
    PagedStatic(usize),
    /// The same without bounds, but from a pool of so many tokens a layer, which may run out.
    Pool(usize, usize),
}

/// The shape that a layer gets when it is first written.
#[derive(Clone, Copy, Debug)]
struct Shape {
    batch: usize,
    heads: usize,
    key_dim: usize,
    value_dim: usize,
    dtype: DType,
}

#[derive(Clone, Debug)]
struct History {
    kind: Kind,
    storing: Storing,
    shapes: Vec<Shape>,
    calls: Vec<Call>,
}

fn dtype() -> impl Strategy<Value = DType> {
    prop_oneof![Just(DType::F32), Just(DType::F16), Just(DType::BF16)]
}

fn dim() -> impl Strategy<Value = usize> {
    // 64 and its multiples have kernels of their own.
    prop_oneof![4 => 1..=16_usize, 2 => Just(64), 1 => Just(128), 1 => 17..=256_usize]
}

fn shape() -> impl Strategy<Value = Shape> {
    let batch = prop_oneof![4 => 1..=4_usize, 1 => 5..=33_usize];
    let heads = prop_oneof![4 => 1..=4_usize, 1 => 5..=17_usize];
    (batch, heads, dim(), dim(), any::<bool>(), dtype()).prop_map(
        |(batch, heads, key_dim, value_dim, is_same, dtype)| {
            // 16-bit types need an even D.
            let even = |dim: usize| if dtype == DType::F32 { dim } else { dim.next_multiple_of(2) };
            let key_dim = even(key_dim);
            let value_dim = if is_same { key_dim } else { even(value_dim) };
            // A layer of `BOUND` tokens stays well within what any device binds.
            let heads = heads.min(MOST_BYTES / 2 / bytes(batch, 1, key_dim.max(value_dim))).max(1);
            Shape { batch, heads, key_dim, value_dim, dtype }
        },
    )
}

/// Bytes of K or V of a layer of `BOUND` tokens, in the widest type.
fn bytes(batch: usize, heads: usize, dim: usize) -> usize {
    batch * heads * dim * BOUND * 4
}

fn call() -> impl Strategy<Value = Call> {
    let lie = prop_oneof![Just(Lie::Plain), Just(Lie::TokensFirst), Just(Lie::Fused)];
    let tokens = prop_oneof![4 => Just(1_usize), 4 => 1..=8_usize, 1 => 9..=150_usize];
    let update =
        (0..LAYERS, tokens, lie, 0..8_u8, prop::collection::vec(any::<u32>(), 8), 0..24_u8)
            .prop_map(|(layer, tokens, lie, form, seeds, misfit)| Call::Update {
                layer,
                tokens,
                lie,
                form,
                seeds,
                misfit,
            });
    prop_oneof![
        12 => update,
        2 => (0..120_usize).prop_map(Call::Crop),
        2 => (0..120_usize).prop_map(Call::Truncate),
        3 => (prop::collection::vec(0..120_usize, 5), any::<bool>())
            .prop_map(|(lengths, is_crop)| Call::CutRows { lengths, is_crop }),
        3 => prop::collection::vec(any::<u32>(), 0..7).prop_map(Call::Select),
        1 => (0..4_usize).prop_map(Call::Repeat),
        1 => Just(Call::Reset),
    ]
}

/// Most caches store what comes in as it is. Each pair of formats, with each type and order of what comes in, is a kernel
/// of its own, so few pairs are drawn; `formats.rs` has all of them.
fn storing() -> impl Strategy<Value = Storing> {
    let formats = prop::sample::select(vec![
        Formats::from(Format::Q8_0),
        Formats { key: Some(Format::Q8_0), value: Some(Format::Q4_0) },
        Formats { key: Some(Format::F16), value: None },
        Formats { key: Some(Format::BF16), value: Some(Format::F32) },
    ]);
    let formats = prop_oneof![5 => Just(Formats::default()), 1 => formats];
    (formats, prop::bool::weighted(0.15))
        .prop_map(|(formats, is_value_in_key)| Storing { formats, is_value_in_key })
}

fn history() -> impl Strategy<Value = History> {
    let page = prop_oneof![Just(1_usize), Just(4), Just(16)];
    let kind = prop_oneof![
        2 => Just(Kind::Dynamic),
        2 => Just(Kind::Static),
        2 => Just(Kind::Given),
        3 => page.clone().prop_map(Kind::Paged),
        1 => page.clone().prop_map(Kind::PagedStatic),
        // From too few for many a batch to enough for most.
        2 => (page, prop_oneof![Just(32_usize), Just(256), Just(1024)])
            .prop_map(|(size, tokens)| Kind::Pool(size, tokens)),
    ];
    let shapes = prop::collection::vec(shape(), LAYERS);
    let calls = prop::collection::vec(call(), 1..14);
    (kind, storing(), shapes, calls).prop_map(|(kind, storing, mut shapes, calls)| {
        if storing.formats != Formats::default() {
            // What may be of 16 bits needs an even D.
            for shape in &mut shapes {
                shape.key_dim = shape.key_dim.next_multiple_of(2);
                shape.value_dim = shape.value_dim.next_multiple_of(2);
            }
        }
        History { kind, storing, shapes, calls }
    })
}

/// Positions of one of the four forms, near the live tokens: duplicates, gaps, and now and then one
/// past a static bound, or a list too many.
fn positions(form: u8, seeds: &[u32], batch: usize, tokens: usize, len: usize) -> Positions {
    let reach = u32::try_from(len + tokens + 6).expect("short sequences");
    let seed = |row: usize, token: usize| {
        let mixed = seeds[(row * 3 + token) % seeds.len()]
            .wrapping_add(u32::try_from(row * 7919 + token * 104_729).expect("small"))
            .wrapping_mul(0x9e37_79b1);
        (mixed >> 8) % reach
    };
    let list = |row: usize| (0..tokens).map(|token| seed(row, token)).collect::<Vec<u32>>();
    match form {
        0..=3 => Positions::Append,
        4 if tokens == 1 || seeds[0].is_multiple_of(8) => Positions::At(seed(0, 0)),
        4 | 5 => Positions::PerToken(list(0)),
        6 => Positions::PerRow((0..batch).map(list).collect()),
        // Ragged appends, as in continuous batching.
        _ => Positions::PerRow(
            (0..batch)
                .map(|row| {
                    let from = seed(row, 0) % u32::try_from(len + 1).expect("short sequences");
                    (from..).take(tokens).collect()
                })
                .collect(),
        ),
    }
}

/// (B, H, T, D) bytes as a buffer of another order holds them.
fn reordered(block: &Block, place: impl Fn([usize; 4]) -> usize, elements: usize) -> Vec<u8> {
    let [batch, heads, tokens, dim] = block.shape;
    let mut bytes = vec![0xa5; elements * block.element];
    for b in 0..batch {
        for h in 0..heads {
            for t in 0..tokens {
                let from = ((b * heads + h) * tokens + t) * dim * block.element;
                let to = place([b, h, t, 0]) * block.element;
                let width = dim * block.element;
                bytes[to..to + width].copy_from_slice(&block.bytes[from..from + width]);
            }
        }
    }
    bytes
}

/// Uploads K and V so that they lie as asked, and updates layer `layer` with them.
fn update(
    rig: &mut Rig,
    (dtype, layer): (DType, usize),
    [key, value]: [&Block; 2],
    lie: Lie,
    position: CachePosition<'_>,
) -> Result<(), Error> {
    let gpu = rig.gpu.clone();
    let row = |elements: usize, bytes: Vec<u8>| {
        let block = Block { shape: [1, 1, 1, elements], element: key.element, bytes };
        upload(&gpu, dtype, &block)
    };
    let (is_value_in_key, value_dim) = (rig.storing.is_value_in_key, value.shape[3]);
    let mut run = |key: TensorView<'_>, value: TensorView<'_>| {
        let value = match is_value_in_key {
            true => key.with_head_dim(value_dim),
            false => value,
        };
        gpu.submit_pass("update", |pass| {
            rig.cache.update(pass, &key, &value, layer, position).map(|_| ())
        })
    };
    let [_, heads, tokens, dim] = key.shape;
    match lie {
        Lie::TokensFirst => {
            let tensors = [key, value].map(|block| {
                let [batch, heads, tokens, dim] = block.shape;
                let all = batch * heads * tokens * dim;
                let place = |[b, h, t, d]: [usize; 4]| ((b * tokens + t) * heads + h) * dim + d;
                let tensor = row(all, reordered(block, place, all));
                (tensor, [batch, tokens, heads, dim])
            });
            let [key, value] = &tensors;
            run(
                TensorView::bthd(key.0.buffer(), dtype, &key.1)?,
                TensorView::bthd(value.0.buffer(), dtype, &value.1)?,
            )
        }
        Lie::Fused if key.shape == value.shape => {
            let batch = key.shape[0];
            // Two elements in: on a word in every type, on a vector in none.
            let (before, line) = (2, 2 * heads * dim);
            let all = before + batch * tokens * line;
            let place = |first: usize| {
                move |[b, h, t, d]: [usize; 4]| {
                    before + (b * tokens + t) * line + (first + h) * dim + d
                }
            };
            let mut bytes = reordered(key, place(0), all);
            let values = reordered(value, place(heads), all);
            for b in 0..batch {
                for t in 0..tokens {
                    let from = place(heads)([b, 0, t, 0]) * key.element;
                    let width = heads * dim * key.element;
                    bytes[from..from + width].copy_from_slice(&values[from..from + width]);
                }
            }
            let tensor = row(all, bytes);
            let view = |first: usize| {
                let offset = (before + first * dim) * key.element;
                TensorView::new(tensor.buffer(), dtype, &key.shape).map(|view| {
                    view.with_offset(offset as u64).with_strides([tokens * line, dim, line, 1])
                })
            };
            run(view(0)?, view(heads)?)
        }
        Lie::Plain | Lie::Fused => {
            let (key, value) = (upload(&gpu, dtype, key), upload(&gpu, dtype, value));
            run(key.view(), value.view())
        }
    }
}

/// Makes one call on the cache and on the model; both take it or both refuse it.
fn make(rig: &mut Rig, history: &History, call: &Call) {
    let before = rig.cache.stats();
    let (answer, due): (Result<(), Error>, Result<(), Refused>) = match call {
        Call::Update { layer, tokens, lie, form, seeds, misfit } => {
            let mut shape = history.shapes[*layer];
            if rig.model.len(*layer) > 0 || rig.model.batch(*layer) > 0 {
                shape.batch = rig.model.batch(*layer);
            } else if rig.model.is_batch_changed() && !seeds[0].is_multiple_of(4) {
                // The rows of a layer that took part in a change of the batch.
                let other = rig.model.layers()[0];
                shape.batch = rig.model.batch(other);
            }
            match misfit {
                0 => shape.batch += 1,
                1 => shape.heads += 1,
                2 => shape.key_dim += 2,
                3 => shape.value_dim += 2,
                _ => {}
            }
            let Storing { formats, is_value_in_key } = history.storing;
            if formats.key.is_some() && (formats.value.is_some() || is_value_in_key) {
                // What is stored in a format of its own may come in as any type.
                shape.dtype = [DType::F32, DType::F16][usize::from(seeds[1].is_multiple_of(8))];
            }
            if is_value_in_key {
                shape.value_dim = shape.value_dim.min(shape.key_dim);
            }
            let Shape { batch, heads, key_dim, value_dim, dtype } = shape;
            let (key, value) = rig.noise(dtype, [batch, heads, *tokens, key_dim], value_dim);
            let positions = positions(*form, seeds, batch, *tokens, rig.model.len(*layer));
            let position = match &positions {
                Positions::Append => CachePosition::Append,
                Positions::At(position) => CachePosition::At(*position),
                Positions::PerToken(list) => CachePosition::PerToken(list),
                Positions::PerRow(rows) => CachePosition::PerRow(rows),
            };
            (update(rig, (dtype, *layer), [&key, &value], *lie, position), {
                let [key, value] = history.storing.stored(dtype, [&key, &value]);
                rig.model.update(*layer, &key, &value, position)
            })
        }
        Call::Crop(length) => {
            rig.crop(*length);
            (Ok(()), Ok(()))
        }
        Call::Truncate(length) => {
            rig.truncate(*length);
            (Ok(()), Ok(()))
        }
        Call::CutRows { lengths, is_crop } => {
            // Near the lengths of the rows, and for layers of other batches as many as the first has.
            let layer = rig.model.layers().first().copied().unwrap_or(0);
            let (rows, len) = (rig.model.row_lens(layer).len(), rig.model.len(layer));
            let seeds = lengths.iter().cycle().enumerate();
            let lengths: Vec<usize> =
                seeds.take(rows).map(|(row, seed)| (seed + row / 5) % (len + 3)).collect();
            let answer = match is_crop {
                true => rig.cache.crop_rows(&lengths),
                false => rig.cache.truncate_rows(&lengths),
            };
            (answer, rig.model.cut_rows(&lengths, *is_crop))
        }
        Call::Select(seeds) => {
            // One in sixteen lists may name a row that is not there.
            let rows: Vec<usize> =
                rig.model.layers().into_iter().map(|layer| rig.model.batch(layer)).collect();
            let least = u32::try_from(rows.into_iter().min().unwrap_or(1)).expect("few rows");
            let past = u32::from(seeds.first().is_some_and(|seed| seed.is_multiple_of(16)));
            let indices: Vec<u32> = seeds.iter().map(|seed| seed % (least + past)).collect();
            let gpu = rig.gpu.clone();
            (
                gpu.submit_pass("select", |pass| rig.cache.reorder_cache(pass, &indices)),
                rig.model.select(&indices),
            )
        }
        Call::Repeat(repeats) => {
            let rows = rig.model.layers().into_iter().map(|layer| rig.model.batch(layer)).max();
            // Batches stay within what is worth testing.
            let is_large = rig.model.layers().into_iter().any(|layer| {
                let Shape { heads, key_dim, value_dim, .. } = history.shapes[layer];
                let rows = rig.model.batch(layer) * repeats;
                bytes(rows, heads + 1, key_dim.max(value_dim) + 2) > MOST_BYTES
            });
            let repeats = if is_large || rows.unwrap_or(0) * repeats > 70 { 1 } else { *repeats };
            let gpu = rig.gpu.clone();
            (
                gpu.submit_pass("repeat", |pass| rig.cache.batch_repeat_interleave(pass, repeats)),
                rig.model.repeat_interleave(repeats),
            )
        }
        Call::Reset => {
            rig.reset();
            (Ok(()), Ok(()))
        }
    };
    assert_eq!(answer.is_ok(), due.is_ok(), "{call:?}: the cache {answer:?}, the model {due:?}");
    if due == Err(Refused::Pages) {
        assert!(matches!(answer, Err(Error::OutOfPages { .. })), "{call:?}: {answer:?}");
    }
    if due == Err(Refused::Room) {
        let is_right = matches!(
            answer,
            Err(Error::Storing(StoringError::MemoryTooShort { given: GIVEN, .. }))
        );
        assert!(is_right, "{call:?}: {answer:?}");
    }
    if answer.is_err() {
        assert_eq!(rig.cache.stats(), before, "{call:?}: {answer:?}");
    }
}

fn run(gpu: &Gpu, history: &History) {
    let storing = history.storing;
    let layers = if matches!(history.kind, Kind::Given) { LAYERS } else { 0 };
    let pool = Pool::new(gpu, &vec![[GIVEN; 2]; layers]);
    let mut rig = match history.kind {
        Kind::Dynamic => Rig::dynamic_storing(gpu, storing),
        Kind::Static => Rig::fixed_storing(gpu, BOUND, LAYERS, storing),
        Kind::Given => {
            let options = storing.options().with_max_cache_len(BOUND);
            let memory = pool.memory(storing.is_value_in_key);
            let cache = StaticKVCache::in_memory(gpu, options, &memory).expect("its options");
            let model = Model::fixed(BOUND, LAYERS).of_at_most_bytes(GIVEN, storing);
            Rig::storing(gpu, Box::new(cache), model, storing)
        }
        Kind::Paged(size) => Rig::in_pages_storing(gpu, size, None, Model::dynamic(), storing),
        Kind::PagedStatic(size) => {
            Rig::in_pages_storing(gpu, size, None, Model::fixed(BOUND, LAYERS), storing)
        }
        Kind::Pool(size, tokens) => {
            let max_pages = Some(tokens / size);
            Rig::in_pages_storing(gpu, size, max_pages, Model::dynamic(), storing)
        }
    };
    for (number, call) in history.calls.iter().enumerate() {
        make(&mut rig, history, call);
        rig.check(&format!("after call {number}, {call:?}"));
    }
    pool.check(gpu);
}

fn histories(gpu: &Gpu) {
    let cases = crate::histories(1000);
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    TestRunner::new(config)
        .run(&history(), |history| {
            run(gpu, &history);
            Ok(())
        })
        .unwrap_or_else(|failure| panic!("{failure}"));
}

#[test]
fn random_histories_on_the_best_device() {
    histories(&gpu());
}

#[test]
fn random_histories_on_a_baseline_device() {
    histories(&plain_gpu(|_| ()));
}
