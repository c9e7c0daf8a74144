//! What only pages promise: rows share them, a change of the batch moves nothing, and what is given back
//! is used again.

use wgpu_kvcache::{CacheOptions, CachePosition, DType, Error, Layout, PagedKVCache, Tensor};

use crate::gpu;
use crate::model::{Block, Model};
use crate::rig::{Rig, upload, with_read_back};

const APPEND: CachePosition<'_> = CachePosition::Append;

fn pages_used(rig: &Rig) -> u64 {
    rig.cache.stats().pages_used
}

/// An empty cache of at most `pages` pages of four tokens.
pub(crate) fn bounded(pages: usize) -> Rig {
    Rig::in_pages(&gpu(), 4, Some(pages), Model::dynamic())
}

/// The error of an update that needs more pages than there are.
fn refused(
    rig: &mut Rig,
    layer: usize,
    [key, value]: [&Tensor; 2],
    position: CachePosition<'_>,
) -> Error {
    gpu()
        .submit_pass("refused", |pass| {
            rig.cache.update(pass, &key.view(), &value.view(), layer, position).map(|_| ())
        })
        .expect_err("more pages than there are")
}

/// Eight beams over a long prompt, which change places at every step.
#[test]
fn beams_cost_what_they_differ_in() {
    let layers = 3;
    let mut one = Rig::paged(&gpu(), 16);
    let mut beams = Rig::paged(&gpu(), 16);
    let mut rings = Rig::dynamic(&gpu());
    for layer in 0..layers {
        one.update(layer, [1, 2, 528, 4], 4, APPEND);
        for rig in [&mut beams, &mut rings] {
            rig.update(layer, [1, 2, 512, 4], 4, APPEND);
        }
    }
    assert_eq!(pages_used(&one), 33);
    let parents: [&[u32]; 4] =
        [&[0; 8], &[0, 0, 1, 1, 5, 5, 2, 7], &[7, 6, 5, 4, 3, 2, 1, 0], &[3, 3, 3, 3, 3, 3, 3, 4]];
    for step in 0..16 {
        for rig in [&mut beams, &mut rings] {
            if step == 0 {
                rig.repeat_interleave(8);
            } else {
                rig.select(parents[step % 4]);
            }
            for layer in 0..layers {
                rig.update(layer, [8, 2, 1, 4], 4, APPEND);
            }
        }
        beams.check(&format!("step {step}"));
    }
    let peak = beams.cache.stats().peak_pages_used;
    assert!(4 * peak <= 5 * pages_used(&one), "{peak} pages for eight beams");
    // The same in rows of their own: as much for each beam.
    let bytes = |rig: &Rig| (0..layers).map(|layer| 8 * rig.model.row_bytes(layer)).sum::<usize>();
    assert!(rings.cache.stats().bytes_allocated >= bytes(&rings) as u64);
}

#[test]
fn a_change_of_the_batch_moves_nothing_and_a_write_only_shared_pages() {
    for layers in [1, 4] {
        let mut rig = Rig::paged(&gpu(), 4);
        for layer in 0..layers {
            rig.update(layer, [2, 3, 10, 4], 6, APPEND);
        }
        // A page of all heads, K and V.
        let (token, page) = (3 * (4 + 6) * 4, 4 * 3 * (4 + 6) * 4);
        for (map, copied) in [
            (&[1, 0][..], 0),
            (&[0, 0, 0, 1], 2),
            (&[3, 2, 1, 0], 0),
            (&[0, 1, 1, 1, 1], 3),
            (&[4], 0),
        ] {
            let before = rig.cache.stats();
            rig.select(map);
            assert_eq!(rig.since(before), (0, 0), "{map:?}");
            assert_eq!(rig.cache.stats().bytes_allocated, before.bytes_allocated, "{map:?}");
            rig.check(&format!("{map:?}"));
            // The last page is partly filled: all but one of the rows that share it get a copy, in one
            // dispatch a layer.
            let before = rig.cache.stats();
            for layer in 0..layers {
                rig.update(layer, [map.len(), 3, 1, 4], 6, APPEND);
            }
            rig.check(&format!("{map:?}, then a token"));
            rig.truncate(10);
            let dispatches = layers * (1 + usize::from(copied > 0));
            let moved = layers * (copied * page + map.len() * token);
            assert_eq!(rig.since(before), (dispatches as u64, moved as u64), "{map:?}");
        }
    }
}

/// Layers that do the same have one table, whatever was done before; a layer that differs has its own.
#[test]
fn layers_that_advance_together_share_one_table() {
    let mut rig = Rig::paged(&gpu(), 4);
    let tables = |rig: &Rig| -> Vec<_> {
        let views = (0..4).map(|layer| rig.cache.view(layer).unwrap().unwrap());
        views.map(|view| (view.page_table().cloned(), view.layout_words())).collect()
    };
    for step in 0..40 {
        for layer in 0..4 {
            rig.update(layer, [2, 1, 1 + step % 3, 2], 2, APPEND);
        }
        match step % 5 {
            0 => rig.select(&[1, 0]),
            1 => rig.truncate(20),
            2 => rig.crop(17),
            3 => rig.select(&[0, 0]),
            _ => {}
        }
        let tables = tables(&rig);
        assert!(tables.iter().all(|table| *table == tables[0]), "step {step}: {tables:?}");
    }
    rig.check("together");
    rig.update(2, [2, 1, 9, 2], 2, APPEND);
    let tables = tables(&rig);
    assert_ne!(tables[2].1, tables[0].1);
    assert_eq!(tables[1], tables[3]);
    for layer in 0..4 {
        rig.update(layer, [2, 1, 2, 2], 2, APPEND);
    }
    rig.check("one ahead");
}

#[test]
fn pages_given_back_are_used_again() {
    for size in [1, 4, 16] {
        let mut rig = Rig::paged(&gpu(), size);
        for step in 0..60 {
            for layer in 0..2 {
                rig.update(layer, [3, 2, 7, 4], 4, APPEND);
            }
            match step % 3 {
                0 => rig.crop(25),
                1 => rig.truncate(20),
                _ => rig.select(&[2, 2, 0]),
            }
        }
        rig.check(&format!("pages of {size}"));
        // 420 tokens a row went through a pool that doubled at most once past what was needed at a time.
        let stats = rig.cache.stats();
        let most = (2 * stats.peak_pages_used).max(64 / size as u64);
        assert!(stats.pages_used + stats.pages_free <= most, "pages of {size}: {stats:?}");
        assert!(stats.peak_pages_used <= 3 * (42 / size as u64 + 2), "pages of {size}: {stats:?}");
        rig.crop(0);
        assert_eq!((pages_used(&rig), rig.cache.stats().pages_shared), (0, 0));
        rig.update(0, [3, 2, 1, 4], 4, CachePosition::At(9));
        rig.check("after all were given back");
    }
}

/// A pool of so many pages: it is made at once, and an update that needs more is refused.
#[test]
fn a_bounded_pool() {
    let mut rig = bounded(7);
    rig.update(0, [2, 2, 6, 4], 6, APPEND);
    let stats = rig.cache.stats();
    let page = 4 * 2 * (4 + 6) * 4;
    assert_eq!((stats.pages_used, stats.pages_free, stats.bytes_allocated), (4, 3, 7 * page));
    rig.select(&[0, 0, 0, 1, 1]);
    let block = Block::noise([5, 2, 1, 4], 4, 1);
    let value = Block::noise([5, 2, 1, 6], 4, 2);
    let (k, v) = (upload(&gpu(), DType::F32, &block), upload(&gpu(), DType::F32, &value));
    let before = rig.cache.stats();
    for _ in 0..2 {
        // Rows 0 to 2 share two pages, and rows 3 and 4 two others: three rows need a page of their own.
        rig.truncate(6);
        // Each row needs a new page, and three of them copies of the last ones, where the gap is zeroed.
        let error = refused(&mut rig, 0, [&k, &v], CachePosition::At(8));
        let due = Error::OutOfPages { used: 4, shared: 4, wanted: 8, limit: 7, page_tokens: 4 };
        assert_eq!(error, due);
        for word in ["8 more pages of 4 tokens", "4 in use", "4 of them shared", "made for 7"] {
            assert!(error.to_string().contains(word), "'{word}' is not in '{error}'");
        }
        let error = refused(&mut rig, 0, [&k, &v], CachePosition::At(1 << 30));
        assert!(matches!(error, Error::OutOfPages { limit: 7, .. }), "{error:?}");
        let now = with_read_back(rig.cache.stats(), before.bytes_read_back);
        assert_eq!(now, before);
        rig.check("after what was refused");
    }
    rig.update(0, [5, 2, 1, 4], 6, APPEND);
    rig.check("full");
    let full = rig.cache.stats();
    assert_eq!((full.pages_used, full.pages_free, full.bytes_allocated), (7, 0, 7 * page));
    // The last page of each row has a slot left, and no row shares it.
    rig.update(0, [5, 2, 1, 4], 6, APPEND);
    rig.crop(4);
    assert_eq!(pages_used(&rig), 5);
    rig.select(&[0, 2]);
    rig.update(0, [2, 2, 8, 4], 6, APPEND);
    rig.check("given back and used again");
}

/// A first write that is refused leaves no trace of its layer: not even where the only other one is empty.
#[test]
fn a_first_write_that_is_refused() {
    let mut rig = bounded(8);
    rig.update(0, [2, 1, 1, 4], 6, APPEND);
    rig.truncate(0);
    let before = rig.cache.stats();
    assert_eq!((before.pages_used, before.pages_free), (0, 8));
    let tokens = upload(&gpu(), DType::F32, &Block::noise([2, 1, 33, 4], 4, 1));
    // Nine pages a row.
    let error = refused(&mut rig, 1, [&tokens, &tokens], APPEND);
    assert!(matches!(error, Error::OutOfPages { wanted: 18, .. }), "{error:?}");
    assert_eq!(rig.cache.stats(), before);
}

/// A page of its own for a row that writes into a shared one counts as well as a new page.
#[test]
fn a_bound_counts_copies() {
    let mut rig = bounded(3);
    rig.update(0, [1, 2, 6, 4], 6, APPEND);
    rig.select(&[0, 0, 0]);
    let key = upload(&gpu(), DType::F32, &Block::noise([3, 2, 1, 4], 4, 1));
    let value = upload(&gpu(), DType::F32, &Block::noise([3, 2, 1, 6], 4, 2));
    let rows = [vec![0], vec![5], vec![5]];
    // All write into the last page: two of them get their own. In the list row 0 writes into the first page
    // and leaves the last one as it is, so that all three writes need a page.
    for (position, wanted) in
        [(APPEND, 2), (CachePosition::At(5), 2), (CachePosition::PerRow(&rows), 3)]
    {
        let error = refused(&mut rig, 0, [&key, &value], position);
        let due = Error::OutOfPages { used: 2, shared: 2, wanted, limit: 3, page_tokens: 4 };
        assert_eq!(error, due, "{position:?}");
        rig.check("after what was refused");
    }
    rig.select(&[0, 1]);
    rig.update(0, [2, 2, 1, 4], 6, APPEND);
    rig.check("with a row less");
}

#[test]
fn a_page_is_a_power_of_two() {
    for page_tokens in [0, 3, 12, usize::MAX] {
        let options = CacheOptions::default().with_page_tokens(page_tokens);
        let error = PagedKVCache::with_options(&gpu(), options).expect_err("no power of two");
        assert_eq!(error, Error::PageSize { page_tokens });
        assert!(error.to_string().contains("power of two"), "{error}");
    }
    for page_tokens in [1, 2, 64, 1 << 20] {
        let mut rig = Rig::in_pages(&gpu(), page_tokens, None, Model::dynamic());
        rig.update(0, [1, 1, 3, 2], 2, APPEND);
        rig.check(&format!("pages of {page_tokens}"));
        let view = rig.cache.view(0).expect("it exists").expect("it was written");
        assert_eq!((view.layout(), view.capacity()), (Layout::Paged, page_tokens));
    }
}

/// A pool of fixed size is one whatever a reset has left: its buffers stay the same while the layer's shape does,
/// and it has its pages, no fewer and no more.
#[test]
fn a_bounded_pool_of_another_shape_after_a_reset() {
    for (first, second) in [(4, 8), (16, 4), (4, 4), (6, 2), (2, 64)] {
        let mut rig = bounded(8);
        for dim in [first, second, first] {
            let name = format!("{first}, then {second}: {dim}");
            let buffers = |rig: &Rig| {
                let view = rig.cache.view(0).expect("it exists").expect("it was written");
                [view.key().clone(), view.value().clone()]
            };
            rig.update(0, [1, 1, 1, dim], dim, APPEND);
            let made = buffers(&rig);
            let stats = rig.cache.stats();
            assert_eq!((stats.pages_used, stats.pages_free), (1, 7), "{name}");
            for token in 1..32 {
                rig.update(0, [1, 1, 1, dim], dim, APPEND);
                assert_eq!(buffers(&rig), made, "{name}: token {token}");
            }
            rig.check(&name);
            let stats = rig.cache.stats();
            assert_eq!((stats.pages_used, stats.pages_free), (8, 0), "{name}");
            let token = upload(&gpu(), DType::F32, &Block::noise([1, 1, 1, dim], 4, 1));
            let error = refused(&mut rig, 0, [&token, &token], APPEND);
            assert!(matches!(error, Error::OutOfPages { used: 8, wanted: 1, .. }), "{error:?}");
            rig.reset();
        }
    }
}

/// Calls that are recorded in one pass, which is submitted at the end: what an earlier one reads of a table must
/// stay as it is, whatever later ones change.
#[test]
fn changes_of_the_table_in_one_pass() {
    let gpu = gpu();
    for (size, seed) in [1, 2, 4].into_iter().flat_map(|size| (0..40).map(move |seed| (size, seed)))
    {
        let mut rig = Rig::paged(&gpu, size);
        let mut state = seed * 7 + 3;
        let mut next = |below: usize| {
            state = (state * 1_103_515_245 + 12_345) % (1 << 31);
            state / 65_536 % below
        };
        let mut kept = Vec::new();
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        {
            let mut pass = encoder.begin_compute_pass(&Default::default());
            for step in 0..24 {
                let rows = rig.model.batch(0).max(1);
                match next(6) {
                    0 if step > 0 && rows < 12 => {
                        rig.cache.batch_repeat_interleave(&mut pass, 2).expect("room");
                        rig.model.repeat_interleave(2).expect("rows");
                    }
                    1 if step > 0 => {
                        let row = |row: usize| u32::try_from(row).expect("few");
                        let map: Vec<u32> = (0..1 + next(6)).map(|_| row(next(rows))).collect();
                        rig.cache.reorder_cache(&mut pass, &map).expect("rows");
                        rig.model.select(&map).expect("rows");
                    }
                    2 => rig.truncate(next(12)),
                    3 => rig.crop(2 + next(10)),
                    _ => {}
                }
                let rows = rig.model.batch(0).max(1);
                for layer in 0..2 {
                    let (key, value) = rig.noise(DType::F32, [rows, 1, 2, 4], 4);
                    let (k, v) = (upload(&gpu, DType::F32, &key), upload(&gpu, DType::F32, &value));
                    let len = u32::try_from(rig.model.len(layer)).expect("short");
                    let list = [len / 2, len + 1];
                    let position =
                        if next(3) == 0 { CachePosition::PerToken(&list) } else { APPEND };
                    let cache = rig.cache.as_mut();
                    cache
                        .update(&mut pass, &k.view(), &v.view(), layer, position)
                        .map(|_| ())
                        .expect("room");
                    rig.model.update(layer, &key, &value, position).expect("room");
                    kept.push([k, v]);
                }
            }
        }
        gpu.queue().submit([encoder.finish()]);
        rig.check(&format!("pages of {size}, seed {seed}"));
    }
}
