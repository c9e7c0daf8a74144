//! What engines ask of a cache beside K and V: positions, roll-backs, options, kinds of errors.

use std::error::Error as _;

use wgpu_kvcache::{
    Attention, Cache, CacheOptions, CachePosition, DType, DynamicKVCache, EncoderDecoderCache,
    Error, ErrorKind, Format, HostTensor, KVCache, LayerView, PagedKVCache, Rings, Side,
    StaticKVCache,
};

use crate::model::Block;
use crate::rig::{Rig, upload};
use crate::wait::ReadLayer;
use crate::{gpu, kernels_run};

const APPEND: CachePosition<'_> = CachePosition::Append;

#[test]
fn the_next_position_counts_what_crops_have_dropped() {
    let gpu = gpu();
    for mut rig in [Rig::dynamic(&gpu), Rig::fixed(&gpu, 30, 2), Rig::paged(&gpu, 4)] {
        let position = |rig: &Rig, layer| rig.cache.get_next_position(layer);
        assert_eq!(position(&rig, 0), Ok(0));
        rig.update(0, [2, 1, 10, 4], 4, APPEND);
        rig.update(1, [2, 1, 7, 4], 4, APPEND);
        assert_eq!([position(&rig, 0), position(&rig, 1)], [Ok(10), Ok(7)]);
        rig.crop(6);
        assert_eq!([position(&rig, 0), position(&rig, 1)], [Ok(10), Ok(7)]);
        rig.update(0, [2, 1, 2, 4], 4, APPEND);
        rig.crop(3);
        assert_eq!([position(&rig, 0), position(&rig, 1)], [Ok(12), Ok(7)]);
        // What is rolled back is not counted.
        rig.truncate(1);
        assert_eq!([position(&rig, 0), position(&rig, 1)], [Ok(10), Ok(5)]);
        rig.select(&[1, 1, 0]);
        assert_eq!(position(&rig, 0), Ok(10));
        rig.reset();
        assert_eq!([position(&rig, 0), position(&rig, 1)], [Ok(0), Ok(0)]);
    }
    let fixed = Rig::fixed(&gpu, 30, 2);
    let past = Error::LayerOutOfRange { layer: 2, num_layers: 2 };
    assert_eq!(fixed.cache.get_next_position(2), Err(past));
}

#[test]
fn the_latest_tokens_are_dropped_from_every_layer() {
    let gpu = gpu();
    for mut rig in [Rig::dynamic(&gpu), Rig::fixed(&gpu, 30, 2), Rig::paged(&gpu, 4)] {
        rig.update(0, [2, 1, 10, 4], 4, APPEND);
        rig.update(1, [2, 1, 3, 4], 4, APPEND);
        for (dropped, left) in [(0, [10, 3]), (1, [9, 2]), (2, [7, 0]), (usize::MAX, [0, 0])] {
            rig.cache.drop_latest(dropped).expect("all kinds can");
            let lengths = [0, 1].map(|layer| rig.cache.get_seq_length(layer).expect("it exists"));
            assert_eq!(lengths, left, "{dropped} dropped");
        }
    }
    let mut pair = EncoderDecoderCache::dynamic(&gpu);
    let tokens = upload(&gpu, DType::F32, &Block::noise([1, 1, 5, 4], 4, 3));
    for side in [Side::SelfAttention, Side::CrossAttention] {
        gpu.submit_pass("a side", |pass| {
            pair.update(pass, &tokens.view(), &tokens.view(), 0, APPEND, side).map(|_| ())
        })
        .expect("it updates");
    }
    pair.drop_latest(2).expect("it can");
    assert_eq!(pair.get_seq_length(0, Side::SelfAttention), Ok(3));
    assert_eq!(pair.get_next_position(0, Side::SelfAttention), Ok(3));
    assert_eq!(pair.get_seq_length(0, Side::CrossAttention), Ok(5));
}

#[test]
fn options_that_a_kind_lacks_or_needs_are_refused() {
    let gpu = gpu();
    let given = CacheOptions::default();
    let unused = |option, kind| Some(Error::UnusedOption { option, kind });
    let missing = |option| Some(Error::MissingOption { option, kind: "StaticKVCache" });
    let dynamic = |options| DynamicKVCache::with_options(&gpu, options).err();
    assert_eq!(dynamic(given.with_num_layers(2).with_capacity(8)), None);
    assert_eq!(dynamic(given.with_max_cache_len(8)), unused("max_cache_len", "DynamicKVCache"));
    assert_eq!(dynamic(given.with_page_tokens(8)), unused("page_tokens", "DynamicKVCache"));
    let fixed = |options| StaticKVCache::with_options(&gpu, options).err();
    assert_eq!(fixed(given.with_num_layers(2)), missing("max_cache_len"));
    assert_eq!(fixed(given.with_max_cache_len(2)), missing("num_layers"));
    let both = given.with_max_cache_len(2).with_num_layers(2);
    assert_eq!(fixed(both.with_max_pages(1)), unused("max_pages", "StaticKVCache"));
    let paged = |options| PagedKVCache::with_options(&gpu, options).err();
    assert_eq!(paged(both.with_max_pages(1).with_page_tokens(4)), None);
    assert_eq!(paged(given.with_capacity(2)), unused("capacity", "PagedKVCache"));
    for error in [fixed(given), paged(given.with_capacity(2))].into_iter().flatten() {
        assert_eq!(error.kind(), ErrorKind::Input);
    }
    // A bound on the layers of a cache that grows holds.
    let mut cache =
        DynamicKVCache::with_options(&gpu, given.with_num_layers(1)).expect("a bound of layers");
    let token = upload(&gpu, DType::F32, &Block::noise([1, 1, 1, 4], 4, 3));
    let error = gpu.submit_pass("a layer too many", |pass| {
        cache.update(pass, &token.view(), &token.view(), 1, APPEND).err()
    });
    assert_eq!(error, Some(Error::LayerOutOfRange { layer: 1, num_layers: 1 }));
}

#[test]
#[cfg_attr(
    target_arch = "wasm32",
    ignore = "browsers report a destroyed buffer to the engine, later"
)]
fn an_error_says_what_can_be_done_and_what_wgpu_said() {
    let gpu = gpu();
    let mut rig = Rig::fixed(&gpu, 4, 1);
    rig.update(0, [1, 1, 3, 4], 4, APPEND);
    let tokens = upload(&gpu, DType::F32, &Block::noise([1, 1, 2, 4], 4, 3));
    let full = gpu.submit_pass("no room", |pass| {
        rig.cache.update(pass, &tokens.view(), &tokens.view(), 0, APPEND).err()
    });
    assert_eq!(full.map(|error| error.kind()), Some(ErrorKind::NoRoom));
    // As the kind says: evict, then repeat.
    rig.crop(2);
    rig.update(0, [1, 1, 2, 4], 4, APPEND);
    let destroyed = upload(&gpu, DType::F32, &Block::noise([1, 1, 1, 4], 4, 3));
    destroyed.buffer().destroy();
    let mut cache = DynamicKVCache::new(&gpu);
    let error = gpu
        .submit_pass("a destroyed buffer", |pass| {
            cache.update(pass, &destroyed.view(), &destroyed.view(), 0, APPEND).err()
        })
        .expect("it is refused");
    assert_eq!(error.kind(), ErrorKind::Device);
    let source = error.source().expect("wgpu has said why").to_string();
    assert!(source.contains("destroyed") && error.to_string().contains(&source), "{error}");
}

#[test]
fn views_of_two_layers_live_side_by_side_and_outlive_the_cache() {
    let gpu = gpu();
    let mut cache = PagedKVCache::new(&gpu);
    let token = upload(&gpu, DType::F32, &Block::noise([1, 1, 3, 4], 4, 3));
    let views: Vec<LayerView> = gpu.submit_pass("two layers", |pass| {
        let mut update = |layer| {
            cache.update(pass, &token.view(), &token.view(), layer, APPEND).expect("it updates")
        };
        [0, 1].map(&mut update).into()
    });
    drop(cache);
    for view in views {
        assert_eq!(view.key_shape(), [1, 1, 3, 4]);
        assert!(view.page_table().is_some());
    }
}

/// Attention reads the rings of someone's own buffers as it reads a cache's.
#[test]
fn a_view_of_rings_of_ones_own() {
    let gpu = gpu();
    // One row and head of four slots; the three live tokens begin at slot 2.
    let values = [3.0_f32, 30.0, 0.5, 0.5, 1.0, 10.0, 2.0, 20.0];
    let value = gpu.upload(&values, &[1, 1, 4, 2]).expect("it uploads");
    let key = gpu.upload(&[0.0_f32; 8], &[1, 1, 4, 2]).expect("it uploads");
    let rings = Rings {
        key: key.buffer().clone(),
        value: value.buffer().clone(),
        key_format: Format::F32,
        value_format: Format::F32,
        batch: 1,
        heads: 1,
        key_dim: 2,
        value_dim: 2,
        capacity: 4,
        start: 2,
        len: 3,
    };
    let view = LayerView::of_rings(rings.clone()).expect("a ring");
    assert_eq!((view.len(), view.start(), view.is_contiguous()), (3, 2, false));
    let output = gpu.upload(&[0.0_f32; 2], &[1, 1, 1, 2]).expect("it uploads");
    let query = gpu.upload(&[1.0_f32; 2], &[1, 1, 1, 2]).expect("it uploads");
    let mut attention = Attention::new(&gpu);
    gpu.submit_pass("attention", |pass| {
        attention.record(pass, &query.view(), &view, &output.view(), Default::default())
    })
    .expect("it records");
    let mut cache = DynamicKVCache::new(&gpu);
    gpu.submit_pass("copy", |pass| {
        cache.update(pass, &output.view(), &output.view(), 0, APPEND).map(|_| ())
    })
    .expect("it updates");
    let (mean, _) = cache.read(0).expect("submitted").expect("written");
    if kernels_run() {
        assert_eq!(mean.as_slice::<f32>(), Ok(&[2.0, 20.0][..]));
    }

    let refused = |rings| LayerView::of_rings(rings).expect_err("refused");
    let error = refused(Rings { start: 4, ..rings.clone() });
    assert_eq!(error, Error::PositionOutOfBounds { position: 4, bound: 4 });
    let error = refused(Rings { len: 5, ..rings.clone() });
    assert_eq!(error, Error::SequenceTooLong { len: 0, new_tokens: 5, bound: 4 });
    let error = refused(Rings { capacity: 5, ..rings.clone() });
    assert!(matches!(error, Error::BufferTooShort { what: "key", needed: 40, size: 32, .. }));
    let error = refused(Rings { heads: 0, ..rings.clone() });
    assert!(matches!(error, Error::ZeroExtent { .. }));
    let error = refused(Rings { value_format: Format::F16, value_dim: 3, ..rings });
    assert!(matches!(error, Error::OddHeadDim { what: "value", .. }), "{error}");
}

#[test]
fn host_tensors_are_checked() {
    let good = HostTensor::from_slice(&[1.0_f32, 2.0], &[1, 1, 1, 2]).expect("two elements");
    assert_eq!((good.shape(), good.to_f32()), ([1, 1, 1, 2], vec![1.0, 2.0]));
    let refused = |data: &[f32], shape: &[usize]| HostTensor::from_slice(data, shape).err();
    assert!(matches!(refused(&[1.0], &[1, 1, 1]), Some(Error::WrongRank { .. })));
    assert!(matches!(refused(&[], &[1, 0, 1, 1]), Some(Error::ZeroExtent { .. })));
    assert!(matches!(refused(&[1.0], &[1, 1, 1, 2]), Some(Error::SliceLength { .. })));
    let huge = [usize::MAX, 2, 1, 1];
    assert!(matches!(refused(&[1.0], &huge), Some(Error::SliceLength { .. })));
}

#[test]
fn types_have_bits() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        assert_eq!(dtype.bits(), 8 * dtype.size());
    }
}

/// What a cache that is implemented elsewhere does not have, it says so by name, and changes nothing.
#[test]
fn methods_that_a_cache_of_ones_own_lacks_are_refused_by_name() {
    struct Least;
    impl Cache for Least {
        fn reset(&mut self) {}
        fn crop(&mut self, _: usize) {}
        fn truncate(&mut self, _: usize) {}
        fn prepare_batch(&mut self, _: wgpu_kvcache::BatchChange<'_>) -> Result<(), Error> {
            Ok(())
        }
        fn batch_select_indices(
            &mut self,
            _: &mut wgpu_kvcache::wgpu::ComputePass<'_>,
            _: &[u32],
        ) -> Result<(), Error> {
            Ok(())
        }
        fn batch_repeat_interleave(
            &mut self,
            _: &mut wgpu_kvcache::wgpu::ComputePass<'_>,
            _: usize,
        ) -> Result<(), Error> {
            Ok(())
        }
        fn get_max_cache_shape(&self) -> Option<usize> {
            None
        }
        fn stats(&self) -> wgpu_kvcache::Stats {
            wgpu_kvcache::Stats::default()
        }
    }
    let gpu = gpu();
    let answers = [
        ("crop_rows()", Least.crop_rows(&[1])),
        ("truncate_rows()", Least.truncate_rows(&[1])),
        ("drop_latest()", Least.drop_latest(1)),
        ("reserve()", gpu.submit_pass("reserve", |pass| Least.reserve(pass, 1))),
    ];
    for (what, answer) in answers {
        let error = answer.expect_err("not there");
        assert_eq!(error, Error::NotSupported { what });
        assert!(error.kind() == ErrorKind::Input && error.to_string().contains(what), "{error}");
    }
}

/// A view of an engine's own rings is moved on without a new bind group; one of a cache is not.
#[test]
fn views_of_ones_own_rings_take_other_tokens() {
    let gpu = gpu();
    let tokens = upload(&gpu, DType::F32, &Block::noise([1, 1, 8, 4], 4, 3));
    let rings = Rings {
        key: tokens.buffer().clone(),
        value: tokens.buffer().clone(),
        key_format: Format::F32,
        value_format: Format::F32,
        batch: 1,
        heads: 1,
        key_dim: 4,
        value_dim: 4,
        capacity: 8,
        start: 0,
        len: 0,
    };
    let layer = LayerView::of_rings(rings).expect("it fits");
    let view = layer.with_tokens(6, 4).expect("four slots");
    assert_eq!((view.start(), view.len(), view.is_contiguous()), (6, 4, false));
    assert_eq!((layer.start(), layer.len()), (0, 0));
    let past = Error::PositionOutOfBounds { position: 8, bound: 8 };
    assert_eq!(layer.with_tokens(8, 1).map(|_| ()), Err(past));
    let long = Error::SequenceTooLong { len: 0, new_tokens: 9, bound: 8 };
    assert_eq!(layer.with_tokens(0, 9).map(|_| ()), Err(long));
    let mut rig = Rig::dynamic(&gpu);
    rig.update(0, [1, 1, 3, 4], 4, APPEND);
    let own = rig.cache.view(0).expect("it exists").expect("it was written");
    assert!(matches!(own.with_tokens(0, 2), Err(Error::NotSupported { .. })));
}
