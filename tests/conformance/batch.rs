//! Changes of the batch: selections, reorders, repeats, on layers of different shapes, and what all of
//! it costs by the cache's own count.

use wgpu_kvcache::{BatchChange, CacheOptions, CachePosition, DType, DynamicKVCache, Error};

use crate::gpu;
use crate::model::{Block, Model};
use crate::rig::{Rig, upload};
use crate::wait::ReadLayer;

const APPEND: CachePosition<'_> = CachePosition::Append;

/// Three layers of different shapes and types, of `batch` rows, wrapped where that is asked for.
fn filled(rig: &mut Rig, batch: usize, is_wrapped: bool) {
    let layers = [(DType::F32, 2, 4, 8), (DType::F16, 1, 2, 6), (DType::BF16, 3, 8, 2)];
    for tokens in if is_wrapped { vec![11, 4] } else { vec![7] } {
        rig.crop(6);
        for (layer, (dtype, heads, dim, value_dim)) in layers.into_iter().enumerate() {
            rig.update_as(dtype, layer, [batch, heads, tokens, dim], value_dim, APPEND);
        }
    }
    for layer in 0..3 {
        let view = rig.cache.view(layer).expect("it exists").expect("it was written");
        assert!(!is_wrapped || rig.model.len(layer) == 10);
        if rig.cache.get_max_cache_shape() == Some(11) {
            assert_eq!(view.is_contiguous(), !is_wrapped);
        }
    }
}

fn rings() -> [(&'static str, Rig); 2] {
    [("dynamic", Rig::dynamic(&gpu())), ("static", Rig::fixed(&gpu(), 11, 4))]
}

fn rigs() -> Vec<(&'static str, Rig)> {
    let paged = [("pages of 1", 1), ("pages of 4", 4), ("pages of 16", 16)];
    let paged = paged.map(|(name, size)| (name, Rig::paged(&gpu(), size)));
    rings().into_iter().chain(paged).collect()
}

/// Every selection of 1 to 4 rows out of 3.
#[test]
fn every_small_selection() {
    for is_wrapped in [false, true] {
        for rows in 1..=4_u32 {
            for code in 0..3_u32.pow(rows) {
                let indices: Vec<u32> = (0..rows).map(|i| code / 3_u32.pow(i) % 3).collect();
                for (kind, mut rig) in rigs() {
                    filled(&mut rig, 3, is_wrapped);
                    rig.select(&indices);
                    rig.check(&format!("{kind}, wrapped: {is_wrapped}, {indices:?}"));
                }
            }
        }
    }
}

/// Long cycles, reversals, shifts and fans, at sizes around those that workgroups come in.
#[test]
fn large_selections() {
    for batch in [1, 2, 7, 16, 33, 64, 65, 300] {
        let last = batch - 1;
        let selections: [Vec<u32>; 8] = [
            (0..batch).map(|row| (row + 1) % batch).collect(),
            (0..batch).map(|row| (row + batch - 1) % batch).collect(),
            (0..batch).rev().collect(),
            (0..batch).map(|row| row ^ 1).map(|row| row.min(last)).collect(),
            vec![last; batch as usize],
            (0..batch).map(|row| row / 2).collect(),
            (0..batch).map(|row| row.wrapping_mul(7) % batch).collect(),
            (0..2 * batch + 1).map(|row| row % batch).rev().collect(),
        ];
        for (kind, mut rig) in rigs() {
            for (number, indices) in selections.iter().enumerate() {
                rig.reset();
                filled(&mut rig, batch as usize, number % 2 == 1);
                rig.select(indices);
                rig.check(&format!("{kind}, batch {batch}, {indices:?}"));
            }
        }
    }
}

/// Shrinks, grows, repeats, appends and crops in turn, on the same layers.
#[test]
fn a_long_walk() {
    for (kind, mut rig) in rigs() {
        filled(&mut rig, 4, true);
        let mut state = 5_u64;
        let mut next = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            usize::try_from(state >> 33).expect("31 bits") % below
        };
        for step in 0..200 {
            let batch = rig.model.batch(0);
            let below = |count| u32::try_from(count).expect("small");
            match next(5) {
                0 if batch < 12 => rig.repeat_interleave(1 + next(3)),
                1 => {
                    let keep = next(11);
                    rig.crop(keep);
                }
                2 => rig.truncate(4 + next(8)),
                3 if rig.model.len(0) < 9 => {
                    let shapes =
                        [(DType::F32, 2, 4, 8), (DType::F16, 1, 2, 6), (DType::BF16, 3, 8, 2)];
                    for (layer, (dtype, heads, dim, value_dim)) in shapes.into_iter().enumerate() {
                        rig.update_as(dtype, layer, [batch, heads, 2, dim], value_dim, APPEND);
                    }
                }
                _ => {
                    let rows = 1 + next(batch + 3);
                    let indices: Vec<u32> = (0..rows).map(|_| below(next(batch))).collect();
                    rig.select(&indices);
                }
            }
            rig.check(&format!("{kind}, step {step}"));
        }
    }
}

#[test]
fn rows_repeated_in_a_row() {
    for (kind, mut rig) in rigs() {
        for batch in [1, 2, 5, 33] {
            for repeats in [1, 2, 3, 7] {
                for is_wrapped in [false, true] {
                    rig.reset();
                    filled(&mut rig, batch, is_wrapped);
                    rig.repeat_interleave(repeats);
                    let context = format!("{kind}, {batch} rows, {repeats} times");
                    rig.check(&context);
                    assert_eq!(rig.cache.read(3), Ok(None));
                    // Into memory that is there already: shrink, then repeat again.
                    rig.select(&[0]);
                    rig.repeat_interleave(repeats);
                    rig.check(&context);
                    let rows = batch * repeats;
                    let first: Vec<u32> = (0..).take(repeats.min(rows)).collect();
                    rig.select(&first);
                    rig.repeat_interleave(2);
                    rig.check(&context);
                }
            }
        }
    }
}

#[test]
fn layers_with_no_live_token_follow_the_batch() {
    for (kind, mut rig) in rigs() {
        filled(&mut rig, 3, true);
        rig.crop(0);
        let stats = rig.cache.stats();
        rig.select(&[2, 0]);
        rig.repeat_interleave(3);
        rig.check(kind);
        assert_eq!(rig.since(stats).1, 0, "{kind}: there is nothing to move");
        rig.update(0, [6, 2, 2, 4], 8, APPEND);
        rig.update_as(DType::F16, 1, [6, 1, 1, 2], 6, CachePosition::At(4));
        rig.check(kind);
    }
}

/// Layers may have batches of different sizes; a selection counts rows of each.
#[test]
fn layers_of_different_batches() {
    let mut rig = Rig::dynamic(&gpu());
    rig.update(0, [4, 2, 3, 4], 4, APPEND);
    rig.update(2, [2, 1, 5, 6], 2, APPEND);
    rig.select(&[1, 0, 0]);
    rig.check("three rows each");
    rig.repeat_interleave(2);
    rig.check("six rows each");
}

/// A layer that was not written when the batch was changed took no part: its first update must have the rows of
/// a layer that did, until a reset.
#[test]
fn a_layer_that_is_written_after_the_batch_was_changed() {
    use BatchChange::{Repeat, Select};
    let mut rigs = rigs();
    rigs.push(("eight pages", crate::pages::bounded(8)));
    for (kind, mut rig) in rigs {
        for (change, rows) in [(Select(&[0, 0, 1]), 3), (Repeat(2), 4), (Select(&[1]), 1)] {
            let name = format!("{kind}, {change:?}");
            rig.reset();
            rig.update(0, [2, 1, 3, 4], 6, APPEND);
            // Rows that stay are no change.
            rig.select(&[0, 1]);
            rig.repeat_interleave(1);
            match change {
                Select(indices) => rig.select(indices),
                Repeat(repeats) => rig.repeat_interleave(repeats),
                _ => unreachable!("no other change is tried"),
            }
            let before = rig.cache.stats();
            for layer in [1, 2] {
                let key = upload(&gpu(), DType::F32, &Block::noise([2, 1, 2, 4], 4, 1));
                let error = gpu()
                    .submit_pass("refused", |pass| {
                        let (k, v) = (key.view(), key.view());
                        rig.cache.update(pass, &k, &v, layer, APPEND).map(|_| ())
                    })
                    .expect_err("two rows are those of before");
                let due = Error::BatchChanged { layer, got: 2, other: 0, batch: rows };
                assert_eq!(error, due, "{name}");
                let text = error.to_string();
                for word in [format!("layer {layer}"), "with 2 rows".into(), "reset()".into()] {
                    assert!(text.contains(&word), "'{word}' is not in '{text}'");
                }
                assert!(text.contains(&format!("layer 0 has {rows} rows")), "{text}");
                assert_eq!(rig.cache.stats(), before, "{name}");
                assert!(matches!(rig.cache.view(layer), Ok(None)), "{name}");
            }
            rig.check(&name);
            rig.update(1, [rows, 2, 2, 2], 2, APPEND);
            rig.check(&name);
            // A reset lets layers differ again.
            rig.reset();
            rig.update(0, [2, 1, 1, 4], 6, APPEND);
            rig.update(1, [3, 2, 2, 2], 2, APPEND);
            rig.check(&name);
        }
    }
}

/// Layers of different batches that were repeated: a layer written afterwards has the rows of one of them.
#[test]
fn a_layer_that_is_written_after_layers_of_different_batches_were_changed() {
    let mut rig = Rig::dynamic(&gpu());
    rig.update(0, [2, 1, 3, 4], 6, APPEND);
    rig.update(1, [3, 1, 3, 4], 6, APPEND);
    rig.repeat_interleave(2);
    for (layer, rows) in [(2, 6), (3, 4)] {
        rig.update(layer, [rows, 1, 3, 4], 6, APPEND);
    }
    let key = upload(&gpu(), DType::F32, &Block::noise([2, 1, 2, 4], 4, 1));
    let answer = gpu().submit_pass("refused", |pass| {
        rig.cache.update(pass, &key.view(), &key.view(), 4, APPEND).map(|_| ())
    });
    assert_eq!(answer, Err(Error::BatchChanged { layer: 4, got: 2, other: 0, batch: 4 }));
    rig.check("layers of two batches");
}

#[test]
fn what_updates_cost() {
    let gpu = gpu();
    let cache = Box::new(
        DynamicKVCache::with_options(&gpu, CacheOptions::default().with_capacity(64))
            .expect("a capacity"),
    );
    let mut rig = Rig::new(&gpu, cache, Model::dynamic());
    let token = 3 * 2 * (4 + 6) * 4;
    assert_eq!(rig.cache.stats(), Default::default());
    rig.update(0, [3, 2, 5, 4], 6, APPEND);
    let mut before = rig.cache.stats();
    assert_eq!((before.dispatches, before.bytes_moved, before.buffers), (1, 5 * token, 2));
    let rows = [vec![0, 1], vec![30, 30], vec![8, 20]];
    for (position, tokens, written) in [
        (APPEND, 2, 2),
        (CachePosition::At(3), 1, 1),
        // A gap is written too: positions 7, 8 and 9.
        (CachePosition::At(9), 1, 3),
        (CachePosition::PerToken(&[0, 4, 4]), 3, 2),
        (CachePosition::PerToken(&[13, 0]), 2, 5),
    ] {
        rig.update(0, [3, 2, tokens, 4], 6, position);
        assert_eq!(rig.since(before), (1, written * token), "{position:?}");
        before = rig.cache.stats();
    }
    // From 14 to 31 tokens: two rows have 2 tokens in all, of which one lies below the old length in
    // the first row both, in the third one; the rest up to 31 is zeros.
    rig.update(0, [3, 2, 2, 4], 6, CachePosition::PerRow(&rows));
    let written = (2 + 17) + 17 + (1 + 17);
    assert_eq!(rig.since(before), (1, written * token / 3));
    rig.check("after all of them");
    let live = 3 * rig.model.row_bytes(0) as u64;
    let read = rig.cache.stats().bytes_read_back;
    rig.check("once more");
    assert_eq!(rig.cache.stats().bytes_read_back, read + live);
}

#[test]
fn what_changes_of_the_batch_cost() {
    for is_wrapped in [false, true] {
        for (kind, mut rig) in rings() {
            filled(&mut rig, 4, is_wrapped);
            let allocated = rig.cache.stats().bytes_allocated;
            for (indices, changed) in [
                (&[0, 1, 2, 3][..], 0),
                (&[1, 0, 2, 3], 2),
                (&[1, 2, 3, 0], 4),
                (&[0, 0, 2, 2], 2),
                (&[3, 3, 3, 3], 3),
                (&[0, 1, 2], 0),
                (&[0, 2, 1, 1], 3),
                (&[0, 3], 1),
                (&[1], 1),
                (&[0, 0, 0, 0], 3),
            ] {
                let before = rig.cache.stats();
                rig.select(indices);
                let live: usize = (0..3).map(|layer| rig.model.row_bytes(layer)).sum();
                let dispatches = if changed == 0 { 0 } else { 3 };
                let context = format!("{kind}, wrapped: {is_wrapped}, {indices:?}");
                assert_eq!(rig.since(before), (dispatches, (changed * live) as u64), "{context}");
                assert_eq!(rig.cache.stats().bytes_allocated, allocated, "{context}");
                rig.check(&context);
            }
            let before = rig.cache.stats();
            rig.repeat_interleave(1);
            rig.crop(5);
            rig.truncate(4);
            assert_eq!(rig.since(before), (0, 0));
            let live: usize = (0..3).map(|layer| 4 * rig.model.row_bytes(layer)).sum();
            rig.repeat_interleave(3);
            // There is memory for 4 rows, so all 12 go into new buffers: live tokens only.
            assert_eq!(rig.since(before), (3, 3 * live as u64), "{kind}, wrapped: {is_wrapped}");
        }
    }
}

/// What a growing batch costs: in new buffers every row, where there is memory the rows that change, and of
/// both the live tokens only. In pages nothing at all.
#[test]
fn what_a_growing_batch_costs() {
    use BatchChange::{Repeat, Select};
    // From two rows: the change, the rows that it writes, and whether that takes new buffers.
    let changes = [
        (Select(&[0, 1, 1]), 3, true),
        (Select(&[2, 0]), 2, false),
        (Select(&[0, 1, 0]), 1, false),
        (Select(&[0, 1, 2]), 0, false),
        (Select(&[1]), 1, false),
        (Repeat(3), 2, false),
        (Repeat(1), 0, false),
        (Repeat(2), 6, true),
        (Select(&[5, 1, 1]), 2, false),
        (Repeat(2), 5, false),
        (Select(&[0, 1, 2, 3, 4, 5, 0]), 7, true),
        (Select(&[6, 5, 4, 3, 2, 1, 0, 6, 5]), 9, true),
        (Select(&[8, 8]), 2, false),
        (Repeat(4), 7, false),
        (Repeat(2), 16, true),
    ];
    for is_wrapped in [false, true] {
        for (kind, mut rig) in rigs() {
            filled(&mut rig, 2, is_wrapped);
            for (number, (change, written, is_new)) in changes.into_iter().enumerate() {
                let context = format!("{kind}, wrapped: {is_wrapped}, {number}: {change:?}");
                let shown = |rig: &Rig| {
                    let view = rig.cache.view(0).expect("it exists").expect("it was written");
                    (view.page_table().is_some(), [view.key().clone(), view.value().clone()])
                };
                let (before, (is_paged, buffers)) = (rig.cache.stats(), shown(&rig));
                match change {
                    Select(indices) => rig.select(indices),
                    Repeat(repeats) => rig.repeat_interleave(repeats),
                    _ => unreachable!("no other change is tried"),
                }
                let row: usize = (0..3).map(|layer| rig.model.row_bytes(layer)).sum();
                let dispatches = if written > 0 && !is_paged { 3 } else { 0 };
                let moved = if is_paged { 0 } else { written * row };
                assert_eq!(rig.since(before), (dispatches, moved as u64), "{context}");
                assert_eq!(shown(&rig).1 != buffers, is_new && !is_paged, "{context}: buffers");
                rig.check(&context);
            }
        }
    }
}

/// A list of moves in place has at most 8,192 rows; one row more, and every row goes into new buffers.
#[test]
fn what_many_rows_cost() {
    const MOST: u32 = 8192;
    for (kind, mut rig) in [("dynamic", Rig::dynamic(&gpu())), ("static", Rig::fixed(&gpu(), 2, 1))]
    {
        rig.update(0, [MOST as usize + 1, 1, 2, 1], 2, APPEND);
        for (cycle, is_new) in [(MOST, false), (MOST + 1, true)] {
            let map: Vec<u32> =
                (0..cycle).map(|row| (row + 1) % cycle).chain(cycle..=MOST).collect();
            let buffer = |rig: &Rig| rig.cache.view(0).unwrap().unwrap().key().clone();
            let (before, key) = (rig.cache.stats(), buffer(&rig));
            rig.select(&map);
            let context = format!("{kind}, a cycle of {cycle} rows");
            let moved = cycle as usize * rig.model.row_bytes(0);
            assert_eq!(rig.since(before).1, moved as u64, "{context}");
            assert_eq!(buffer(&rig) != key, is_new, "{context}");
            rig.check(&context);
        }
    }
}

#[test]
fn what_is_allocated() {
    for (kind, mut rig) in rings() {
        filled(&mut rig, 2, false);
        let sizes = |rig: &Rig| -> u64 {
            let views = (0..3).map(|layer| rig.cache.view(layer).unwrap().unwrap());
            views.map(|view| view.key().size() + view.value().size()).sum()
        };
        let first = rig.cache.stats();
        assert_eq!((first.buffers, first.bytes_allocated), (6, sizes(&rig)), "{kind}");
        assert_eq!(first.peak_bytes_allocated, first.bytes_allocated, "{kind}");
        rig.select(&[1, 0]);
        rig.crop(3);
        assert_eq!(rig.cache.stats().peak_bytes_allocated, first.peak_bytes_allocated, "{kind}");
        rig.repeat_interleave(4);
        let grown = rig.cache.stats();
        assert_eq!((grown.buffers, grown.bytes_allocated), (6, sizes(&rig)), "{kind}");
        assert!(grown.peak_bytes_allocated >= grown.bytes_allocated, "{kind}");
        assert!(
            grown.peak_bytes_allocated <= grown.bytes_allocated + first.bytes_allocated,
            "{kind}: never more than the old and the new buffers"
        );
        rig.select(&[0]);
        rig.reset();
        let last = rig.cache.stats();
        assert!(last.bytes_allocated <= grown.bytes_allocated, "{kind}");
        assert_eq!(last.peak_bytes_allocated, grown.peak_bytes_allocated, "{kind}");
    }
}
