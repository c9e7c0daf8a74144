//! Rows of different length: what cuts by row, writes, changes of the batch and growth make of them.

use wgpu_kvcache::wgpu::PollType;
use wgpu_kvcache::{
    Cache, CachePosition, DType, EncoderDecoderCache, Error, Gpu, Layout, Side, Tensor, TensorView,
};

use crate::gpu;
use crate::layouts::Reader;
use crate::model::Block;
use crate::rig::{Rig, same_bits, upload};

const APPEND: CachePosition<'_> = CachePosition::Append;

fn rigs(gpu: &Gpu) -> Vec<Rig> {
    let pages = [1, 4, 16].map(|size| Rig::paged(gpu, size));
    [Rig::dynamic(gpu), Rig::fixed(gpu, 200, 2)].into_iter().chain(pages).collect()
}

/// A token of each row, behind its last one.
fn next(rig: &Rig) -> Vec<Vec<u32>> {
    let lens = rig.model.row_lens(0);
    lens.iter().map(|&len| vec![u32::try_from(len).expect("short")]).collect()
}

#[test]
fn cuts_by_row_and_what_follows() {
    for (number, mut rig) in rigs(&gpu()).into_iter().enumerate() {
        let check = |rig: &Rig, what: &str| rig.check(&format!("rig {number}, {what}"));
        let shape = |tokens: usize| [3, 2, tokens, 6];
        rig.update(0, shape(20), 4, APPEND);
        rig.truncate_rows(&[20, 7, 12]);
        check(&rig, "truncated");
        for _ in 0..3 {
            let rows = next(&rig);
            rig.update(0, shape(1), 4, CachePosition::PerRow(&rows));
            check(&rig, "a token behind each row");
        }
        // Over garbage: the row holds zeros where nothing is named.
        rig.update(0, shape(1), 4, CachePosition::PerRow(&[vec![3], vec![14], vec![0]]));
        check(&rig, "a gap over what was cut off");
        rig.crop_rows(&[9, 30, 4]);
        check(&rig, "cropped");
        rig.update(0, shape(2), 4, CachePosition::PerRow(&[vec![9, 10], vec![2, 1], vec![4, 6]]));
        check(&rig, "rows that start apart");
        rig.select(&[2, 0, 2, 1]);
        check(&rig, "more rows");
        rig.select(&[1, 3, 0, 0]);
        check(&rig, "rows that start apart change places");
        rig.repeat_interleave(2);
        check(&rig, "repeated");
        rig.select(&[7, 5, 2]);
        check(&rig, "fewer rows");
        rig.crop(8);
        check(&rig, "all cropped");
        rig.truncate(6);
        check(&rig, "all truncated");
        rig.update(0, shape(3), 4, APPEND);
        check(&rig, "appended");
        assert!((0..3).all(|row| rig.model.row_lens(0)[row] == rig.model.len(0)));
        rig.truncate_rows(&[2, 1, 0]);
        rig.update(0, shape(1), 4, CachePosition::At(7));
        check(&rig, "a position behind all");
        rig.truncate_rows(&[2, 1, 0]);
        rig.update(0, shape(2), 4, CachePosition::PerToken(&[4, 1]));
        check(&rig, "positions in disorder");
        rig.truncate_rows(&[5, 2, 3]);
        rig.update(0, shape(110), 4, APPEND);
        check(&rig, "grown");
        rig.crop_rows(&[30, 60, 90]);
        let room = rig.cache.view(0).unwrap().expect("it was written").capacity();
        if rig.model.bounds.is_none() && rig.model.pages().is_none() {
            rig.update(0, shape(room), 4, APPEND);
            check(&rig, "grown from rows that start apart");
            assert_eq!(
                rig.cache.view(0).unwrap().map(|view| view.layout()),
                Some(Layout::Contiguous)
            );
        }
        rig.crop_rows(&[0, 0, 0]);
        check(&rig, "nothing left");
        rig.update(0, shape(2), 4, APPEND);
        check(&rig, "written anew");
    }
}

/// The longest row goes, and the layer keeps its length: what `get` returns does not change.
#[test]
fn a_layer_keeps_its_length_if_the_longest_row_is_selected_away() {
    for mut rig in rigs(&gpu()) {
        rig.update(0, [2, 1, 4, 4], 4, APPEND);
        rig.update(0, [2, 1, 1, 4], 4, CachePosition::PerRow(&[vec![0], vec![9]]));
        rig.select(&[0, 0, 0]);
        rig.check("short rows");
        assert_eq!((rig.cache.get_seq_length(0), rig.model.row_lens(0)), (Ok(10), &[4; 3][..]));
        rig.update(0, [3, 1, 1, 4], 4, APPEND);
        rig.check("as long as the layer");
        rig.crop_rows(&[usize::MAX; 3]);
        rig.select(&[2]);
        rig.check("a single row");
    }
}

#[test]
fn a_layer_ends_with_its_longest_row_after_a_cut_by_row() {
    for mut rig in rigs(&gpu()) {
        rig.update(
            0,
            [2, 1, 4, 4],
            4,
            CachePosition::PerRow(&[vec![0, 1, 2, 3], vec![0, 1, 2, 9]]),
        );
        assert_eq!(rig.cache.get_next_position(0), Ok(10));
        rig.crop_rows(&[4, 6]);
        rig.check("cropped");
        assert_eq!((rig.cache.get_seq_length(0), rig.cache.get_next_position(0)), (Ok(6), Ok(10)));
        rig.truncate_rows(&[3, 5]);
        assert_eq!((rig.cache.get_seq_length(0), rig.cache.get_next_position(0)), (Ok(5), Ok(9)));
        rig.select(&[0]);
        rig.truncate_rows(&[3]);
        rig.check("the row alone");
        let view = rig.cache.view(0).unwrap().expect("it was written");
        assert_eq!((view.len(), view.is_ragged()), (3, false));
    }
}

#[test]
fn a_list_of_another_length_is_refused_and_changes_nothing() {
    for mut rig in rigs(&gpu()) {
        assert_eq!(rig.cache.truncate_rows(&[1, 2, 3]), Ok(()), "no layer has rows yet");
        rig.update(0, [2, 1, 6, 4], 4, APPEND);
        rig.update(1, [3, 1, 6, 4], 4, APPEND);
        let before = rig.cache.stats();
        for lengths in [&[1, 1][..], &[1, 1, 1], &[]] {
            let layer = usize::from(lengths.len() == 2);
            let due = Error::RowCount { got: lengths.len(), layer, batch: 2 + layer };
            assert_eq!(rig.cache.truncate_rows(lengths), Err(due.clone()));
            assert_eq!(rig.cache.crop_rows(lengths), Err(due.clone()));
            let text = due.to_string();
            assert!(text.contains(&format!("{} lengths", lengths.len())), "{text}");
            rig.check("refused");
        }
        assert_eq!(crate::rig::with_read_back(rig.cache.stats(), 0), before);
    }
}

/// Cuts are made whatever is lost with a pass, and say so.
#[test]
fn a_cut_by_row_after_a_dropped_pass_is_refused() {
    let gpu = gpu();
    for mut rig in rigs(&gpu) {
        rig.update(0, [2, 1, 6, 4], 4, APPEND);
        let new = upload(&gpu, DType::F32, &Block::noise([2, 1, 1, 4], 4, 5));
        let mut lost = gpu.device().create_command_encoder(&Default::default());
        let mut pass = lost.begin_compute_pass(&Default::default());
        rig.cache.update(&mut pass, &new.view(), &new.view(), 0, APPEND).expect("a valid update");
        drop(pass);
        drop(lost);
        assert!(matches!(rig.cache.truncate_rows(&[1, 2]), Err(Error::PassDropped { .. })));
    }
}

#[test]
fn a_pair_of_caches_cuts_the_rows_of_the_decoder() {
    let gpu = gpu();
    let mut pair = EncoderDecoderCache::dynamic(&gpu);
    let new = upload(&gpu, DType::F32, &Block::noise([2, 1, 6, 4], 4, 5));
    gpu.submit_pass("both sides", |pass| {
        for side in [Side::SelfAttention, Side::CrossAttention] {
            pair.update(pass, &new.view(), &new.view(), 0, APPEND, side).map(|_| ())?;
        }
        Ok::<(), Error>(())
    })
    .expect("valid updates");
    pair.truncate_rows(&[5, 2]).expect("two rows");
    pair.crop_rows(&[4, 4]).expect("two rows");
    let lens = |side: Side| {
        let view = pair.view(0, side).unwrap().expect("it was written");
        [0, 1].map(|row| view.row_len(row).expect("two rows"))
    };
    assert_eq!((lens(Side::SelfAttention), lens(Side::CrossAttention)), ([4, 2], [6, 6]));
}

/// A view that is read after its rows were cut and written again, in a pass that was recorded before.
#[test]
fn records_of_rows_stay_while_a_pass_that_reads_them_is_due() {
    let gpu = gpu();
    for (number, mut rig) in rigs(&gpu).into_iter().enumerate() {
        for end in 0..3 {
            rig.reset();
            rig.update(0, [3, 1, 9, 4], 4, APPEND);
            rig.truncate_rows(&[9, 4, 6]);
            gpu.device().poll(PollType::wait_indefinitely()).expect("a live device");
            let (key, value) = rig.model.get(0).expect("it was written");
            let reader = Reader::new(&gpu, &rig.cache.view(0).unwrap().expect("it was written"));
            let mut first = gpu.device().create_command_encoder(&Default::default());
            reader.record(&mut first.begin_compute_pass(&Default::default()));
            // More lists than the buffers of small data hold, in passes that are due as well.
            let mut second = gpu.device().create_command_encoder(&Default::default());
            let mut pass = second.begin_compute_pass(&Default::default());
            let token = upload(&gpu, DType::F32, &Block::noise([3, 1, 1, 4], 4, 5));
            match end {
                0 => rig.cache.truncate_rows(&[8, 4, 6]).expect("three rows"),
                1 => rig.cache.crop(7),
                _ => rig.cache.reset(),
            }
            for step in 0..500_u32 {
                let rows = [vec![20 + step % 100], vec![10 + step % 50], vec![step % 20 + 30]];
                rig.cache
                    .update(
                        &mut pass,
                        &token.view(),
                        &token.view(),
                        0,
                        CachePosition::PerRow(&rows),
                    )
                    .unwrap_or_else(|error| panic!("rig {number}: {error}"));
            }
            drop(pass);
            gpu.queue().submit([first.finish(), second.finish()]);
            let [keys, values] = reader.read();
            assert!(same_bits(&keys, &key.bytes), "K, rig {number}, end {end}");
            assert!(same_bits(&values, &value.bytes), "V, rig {number}, end {end}");
        }
    }
}

/// New tokens in forms that the kernel has variants for, over rows that start apart.
#[test]
fn rows_that_start_apart_take_tokens_in_any_order_of_memory() {
    let gpu = gpu();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for mut rig in rigs(&gpu) {
            rig.update_as(dtype, 0, [3, 2, 20, 8], 6, APPEND);
            rig.crop_rows(&[20, 5, 11]);
            let (key, value) = rig.noise(dtype, [3, 1, 7, 8], 6);
            // One head of K and V, read as two: (B, T, H, D) with a stride of zero.
            let (k, v) = (upload(&gpu, dtype, &key), upload(&gpu, dtype, &value));
            fn twice(tensor: &Tensor, dim: usize) -> TensorView<'_> {
                TensorView::new(tensor.buffer(), tensor.view().dtype(), &[3, 2, 7, dim])
                    .map(|view| view.with_strides([7 * dim, 0, dim, 1]))
                    .expect("a shape")
            }
            gpu.submit_pass("update", |pass| {
                rig.cache.update(pass, &twice(&k, 8), &twice(&v, 6), 0, APPEND).map(|_| ())
            })
            .expect("a valid update");
            let doubled = |block: &Block| {
                let [batch, _, tokens, dim] = block.shape;
                let row = tokens * dim * block.element;
                let rows = block.bytes.chunks(row).flat_map(|row| [row, row].concat());
                Block { shape: [batch, 2, tokens, dim], bytes: rows.collect(), ..*block }
            };
            rig.model.update(0, &doubled(&key), &doubled(&value), APPEND).expect("it fits");
            rig.check("heads with a stride of zero");
        }
    }
}
