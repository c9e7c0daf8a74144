//! Sequences by name: random histories of adds, forks, removes, steps, roll-backs and prefixes hold what a plain
//! model holds, a vector a sequence, and pages are used as a recount says.
//!
//! `KV_HISTORIES` sets how many histories are run.

use std::collections::{BTreeMap, BTreeSet};

use half::{bf16, f16};
use proptest::prelude::*;
use proptest::test_runner::Config;
use wgpu_kvcache::wgpu::ComputePass;
use wgpu_kvcache::{
    CacheOptions, DType, Error, Gpu, HostTensor, LayerShape, Result, SequenceCache, SequenceError,
    SequenceId, Step, Tensor, TensorView,
};

use crate::wait::ReadSequence;
use crate::{gpu, kernels_run};

/// The element that token `token` has at `at` in K or V of a layer: any bits.
fn bits(token: u32, layer: usize, is_value: bool, at: usize) -> u16 {
    let number = u64::from(token) * 8 + layer as u64 * 2 + u64::from(is_value);
    let mixed = (number << 16 | at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    u16::try_from(mixed >> 48).expect("16 bits")
}

/// Packed K or V of these tokens.
fn packed(gpu: &Gpu, shape: &LayerShape, layer: usize, is_value: bool, tokens: &[u32]) -> Tensor {
    let dim = if is_value { shape.value_dim } else { shape.key_dim };
    let row = shape.heads * dim;
    let all = tokens.iter().flat_map(|&token| (0..row).map(move |at| (token, at)));
    let all: Vec<u16> = all.map(|(token, at)| bits(token, layer, is_value, at)).collect();
    let shape4 = [1, tokens.len(), shape.heads, dim];
    match shape.dtype {
        DType::F32 => gpu.upload(&all.iter().map(|&it| f32::from(it)).collect::<Vec<_>>(), &shape4),
        DType::F16 => {
            gpu.upload(&all.iter().map(|&it| f16::from_bits(it)).collect::<Vec<_>>(), &shape4)
        }
        _ => gpu.upload(&all.iter().map(|&it| bf16::from_bits(it)).collect::<Vec<_>>(), &shape4),
    }
    .expect("a shape")
}

/// As bits, (1, H, T, D).
fn bits_of(tensor: &HostTensor) -> Vec<u16> {
    match tensor.dtype() {
        DType::F32 => {
            let all = tensor.as_slice::<f32>().expect("its type");
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "16 bits")]
            all.iter().map(|&it| it as u16).collect()
        }
        DType::F16 => {
            tensor.as_slice::<f16>().expect("its type").iter().map(|it| it.to_bits()).collect()
        }
        _ => tensor.as_slice::<bf16>().expect("its type").iter().map(|it| it.to_bits()).collect(),
    }
}

#[derive(Clone, Debug, Default)]
struct Model {
    tokens: Vec<u32>,
    dropped: usize,
    /// The pages are those of the cache's sequence of another name, up to so many: only counted.
    pages: Vec<u32>,
    start: usize,
}

/// A cache of sequences beside a plain model.
struct Rig {
    gpu: Gpu,
    cache: SequenceCache,
    layers: Vec<LayerShape>,
    model: BTreeMap<SequenceId, Model>,
    page: usize,
    written: u32,
    next_page: u32,
}

impl Rig {
    fn new(gpu: &Gpu, layers: &[LayerShape], page: usize, max_pages: Option<usize>) -> Self {
        let options = CacheOptions::default().with_page_tokens(page).with_max_pages(max_pages);
        Self {
            gpu: gpu.clone(),
            cache: SequenceCache::with_options(gpu, layers, options).expect("options"),
            layers: layers.to_vec(),
            model: BTreeMap::new(),
            page,
            written: 0,
            next_page: 0,
        }
    }

    /// A step, and K and V of all its tokens in all layers.
    fn step(&mut self, counts: &[(SequenceId, usize)]) -> Result<Step> {
        let total: usize = counts.iter().map(|(_, count)| count).sum();
        let tokens: Vec<u32> = (self.written..).take(total).collect();
        let gpu = self.gpu.clone();
        let inputs: Vec<[Tensor; 2]> = self
            .layers
            .iter()
            .enumerate()
            .map(|(layer, shape)| {
                [false, true].map(|is_value| packed(&gpu, shape, layer, is_value, &tokens))
            })
            .collect();
        let step = gpu.submit_pass("step", |pass: &mut ComputePass<'_>| {
            let step = self.cache.plan_step(pass, counts)?;
            for (layer, [key, value]) in inputs.iter().enumerate() {
                let LayerShape { dtype, heads, key_dim, value_dim, .. } = self.layers[layer];
                let key = TensorView::packed(key.buffer(), dtype, [total, heads, key_dim])?;
                let value = TensorView::packed(value.buffer(), dtype, [total, heads, value_dim])?;
                let view = self.cache.update(pass, &step, layer, &key, &value)?;
                let lengths: Vec<_> = (0..counts.len()).map(|row| view.row_len(row)).collect();
                let expected = step.lengths().iter().map(|&len| Some(len as usize));
                assert!(expected.eq(lengths));
            }
            Ok::<_, Error>(step)
        })?;
        self.written += u32::try_from(total).expect("few");
        let mut next = tokens.into_iter();
        let mut positions = Vec::new();
        for &(id, count) in counts {
            let model = self.model.get_mut(&id).expect("a sequence of the model");
            let first = model.dropped + model.tokens.len();
            positions.extend((first..first + count).map(|at| u32::try_from(at).expect("few")));
            // A page that others refer to is left to them if it is written into.
            let end = model.start + model.tokens.len();
            model.tokens.extend(next.by_ref().take(count));
            if !end.is_multiple_of(self.page) {
                self.next_page += 1;
                *model.pages.last_mut().expect("a page") = self.next_page;
            }
            let pages = (model.start + model.tokens.len()).div_ceil(self.page);
            while model.pages.len() < pages {
                self.next_page += 1;
                model.pages.push(self.next_page);
            }
        }
        assert_eq!(step.positions(), positions);
        assert_eq!(step.total_tokens(), total);
        Ok(step)
    }

    fn add(&mut self) -> SequenceId {
        let id = self.cache.add().expect("nothing was lost");
        assert!(self.model.insert(id, Model::default()).is_none(), "a name of its own");
        id
    }

    fn fork(&mut self, parent: SequenceId, tokens: usize) -> SequenceId {
        let id = self.cache.fork(parent, tokens).expect("a fork within the sequence");
        let mut model = self.model[&parent].clone();
        model.tokens.truncate(tokens);
        if tokens == 0 {
            model.start = 0;
        }
        let pages = if tokens == 0 { 0 } else { (model.start + tokens).div_ceil(self.page) };
        model.pages.truncate(pages);
        assert!(self.model.insert(id, model).is_none(), "a name of its own");
        id
    }

    fn truncate(&mut self, id: SequenceId, length: usize) {
        self.cache.truncate(id, length).expect("a sequence of the model");
        let model = self.model.get_mut(&id).expect("it is there");
        model.tokens.truncate(length);
        if model.tokens.is_empty() {
            model.start = 0;
        }
        let pages = (model.start + model.tokens.len()).div_ceil(self.page);
        model.pages.truncate(if model.tokens.is_empty() { 0 } else { pages });
    }

    fn crop(&mut self, id: SequenceId, length: usize) {
        self.cache.crop(id, length).expect("a sequence of the model");
        let model = self.model.get_mut(&id).expect("it is there");
        let gone = model.tokens.len().saturating_sub(length);
        model.tokens.drain(..gone);
        model.dropped += gone;
        let start = model.start + gone;
        if model.tokens.is_empty() {
            (model.pages, model.start) = (Vec::new(), 0);
        } else {
            model.pages.drain(..start / self.page);
            model.start = start % self.page;
        }
    }

    fn remove(&mut self, id: SequenceId) {
        self.cache.remove(id).expect("a sequence of the model");
        self.model.remove(&id);
        assert_eq!(self.cache.len(id), Err(Error::Sequence(SequenceError::UnknownSequence { id })));
    }

    /// Pages that sequences of the model refer to, and those that sequences of the cache do. Where a write leaves a page to one other alone, the cache
    /// copies nothing, and the model has renamed a page: the count is the same.
    fn check_pages(&self) {
        let all: BTreeSet<u32> = self.model.values().flat_map(|it| it.pages.clone()).collect();
        let used = self.cache.stats().pages_used;
        assert_eq!(used, all.len() as u64, "a recount of the pages");
        let pages = |&id: &SequenceId| self.cache.pages(id, 0).expect("a sequence").to_vec();
        let named: BTreeSet<u32> = self.model.keys().flat_map(pages).collect();
        assert_eq!(used, named.len() as u64, "a recount of the pages by name");
    }

    fn check(&self, context: &str) {
        for (&id, model) in &self.model {
            assert_eq!(self.cache.len(id), Ok(model.tokens.len()), "{context}");
            let next = model.dropped + model.tokens.len();
            assert_eq!(self.cache.next_position(id), Ok(next), "{context}");
            for (layer, shape) in self.layers.iter().enumerate() {
                let pages = self.cache.pages(id, layer).expect("a layer");
                assert_eq!(pages.len(), model.pages.len(), "{context}");
                let read = self.cache.read(id, layer).expect("it was submitted");
                let Some((key, value)) = read else {
                    assert!(model.tokens.is_empty(), "{context}");
                    continue;
                };
                let dims = [(key, shape.key_dim, false), (value, shape.value_dim, true)];
                for (tensor, dim, is_value) in dims {
                    assert_eq!(tensor.shape(), [1, shape.heads, model.tokens.len(), dim]);
                    let expected: Vec<u16> = (0..shape.heads)
                        .flat_map(|h| model.tokens.iter().map(move |&token| (h, token)))
                        .flat_map(|(h, token)| (0..dim).map(move |d| (token, h * dim + d)))
                        .map(|(token, at)| bits(token, layer, is_value, at))
                        .collect();
                    if kernels_run() {
                        assert_eq!(bits_of(&tensor), expected, "{context}, layer {layer}");
                    }
                }
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Call {
    Add,
    Fork(usize, usize),
    Remove(usize),
    Truncate(usize, usize),
    Crop(usize, usize),
    Step(Vec<(usize, usize)>),
    Cancel(usize, usize),
    Reset,
}

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let call = prop_oneof![
        30 => Just(Call::Add),
        30 => (0..8_usize, 0..40_usize).prop_map(|(i, n)| Call::Fork(i, n)),
        20 => (0..8_usize).prop_map(Call::Remove),
        20 => (0..8_usize, 0..40_usize).prop_map(|(i, n)| Call::Truncate(i, n)),
        20 => (0..8_usize, 0..40_usize).prop_map(|(i, n)| Call::Crop(i, n)),
        80 => prop::collection::vec((0..8_usize, 1..20_usize), 1..5).prop_map(Call::Step),
        10 => (0..8_usize, 1..20_usize).prop_map(|(i, n)| Call::Cancel(i, n)),
        1 => Just(Call::Reset),
    ];
    prop::collection::vec(call, 1..24)
}

fn run(rig: &mut Rig, call: &Call) {
    let ids: Vec<SequenceId> = rig.model.keys().copied().collect();
    let some = |i: &usize| (!ids.is_empty()).then(|| ids[i % ids.len()]);
    match call {
        Call::Add => {
            rig.add();
        }
        Call::Fork(i, n) => {
            let Some(parent) = some(i) else { return };
            rig.fork(parent, n % (rig.model[&parent].tokens.len() + 1));
        }
        Call::Remove(i) => some(i).into_iter().for_each(|id| rig.remove(id)),
        Call::Truncate(i, n) => some(i).into_iter().for_each(|id| rig.truncate(id, *n)),
        Call::Crop(i, n) => some(i).into_iter().for_each(|id| rig.crop(id, *n)),
        Call::Step(counts) => {
            let mut all: Vec<(SequenceId, usize)> = Vec::new();
            for (i, n) in counts {
                let Some(id) = some(i) else { return };
                if all.iter().all(|(other, _)| *other != id) {
                    all.push((id, *n));
                }
            }
            let before = rig.cache.stats();
            if let Err(error) = rig.step(&all) {
                assert!(matches!(error, Error::OutOfPages { .. }), "{error}");
                assert_eq!(rig.cache.stats(), before, "an error changes nothing");
            }
        }
        Call::Cancel(i, n) => {
            let Some(id) = some(i) else { return };
            let gpu = rig.gpu.clone();
            let planned = gpu.submit_pass("step", |pass| rig.cache.plan_step(pass, &[(id, *n)]));
            if planned.is_ok() {
                rig.cache.cancel_step().expect("nothing was lost");
                let model = &rig.model[&id];
                // The copy of a shared page stays.
                if !(model.start + model.tokens.len()).is_multiple_of(rig.page) {
                    rig.next_page += 1;
                    let pages = &mut rig.model.get_mut(&id).expect("it is there").pages;
                    *pages.last_mut().expect("a page") = rig.next_page;
                }
            }
        }
        Call::Reset => {
            rig.cache.reset();
            ids.iter().for_each(|&id| {
                assert_eq!(
                    rig.cache.len(id),
                    Err(Error::Sequence(SequenceError::UnknownSequence { id }))
                );
            });
            rig.model.clear();
        }
    }
}

/// Layers of different shape, of one type each.
fn layers() -> impl Strategy<Value = Vec<LayerShape>> {
    let dtype = prop_oneof![Just(DType::F32), Just(DType::F16), Just(DType::BF16)];
    let layer =
        (dtype, 1..4_usize, 1..5_usize, 1..5_usize).prop_map(|(dtype, heads, key, value)| {
            LayerShape { dtype, heads, key_dim: 2 * key, value_dim: 2 * value }
        });
    prop::collection::vec(layer, 1..4)
}

#[test]
fn sequences_hold_what_a_plain_model_holds_after_any_history() {
    let cases = crate::histories(2000);
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let page = prop_oneof![Just(1), Just(4), Just(16)];
    let max = prop_oneof![Just(None), (1..60_usize).prop_map(Some)];
    let gpu = gpu();
    proptest!(config, |(layers in layers(), page in page, max in max, calls in calls())| {
        let mut rig = Rig::new(&gpu, &layers, page, max);
        for call in &calls {
            run(&mut rig, call);
            rig.check_pages();
        }
        rig.check(&format!("{calls:?}"));
        for id in rig.cache.sequences().expect("nothing was lost") {
            rig.remove(id);
        }
        prop_assert_eq!(rig.cache.stats().pages_used, 0, "no page is lost");
    });
}

const LAYER: LayerShape = LayerShape { dtype: DType::F32, heads: 2, key_dim: 4, value_dim: 4 };

#[test]
fn a_fork_moves_nothing_and_is_its_own() {
    let mut rig = Rig::new(&gpu(), &[LAYER], 4, None);
    let parent = rig.add();
    rig.step(&[(parent, 10)]).expect("room");
    let before = rig.cache.stats();
    let [whole, part] = [10, 6].map(|tokens| rig.fork(parent, tokens));
    let after = rig.cache.stats();
    assert_eq!(after.bytes_moved, before.bytes_moved);
    assert_eq!((after.pages_used, after.pages_shared), (3, 3));
    let pages = |rig: &Rig, id| rig.cache.pages(id, 0).expect("a sequence").to_vec();
    assert_eq!(pages(&rig, whole), pages(&rig, parent));
    assert_eq!(pages(&rig, part), pages(&rig, parent)[..2]);
    let past = Error::LayerOutOfRange { layer: 1, num_layers: 1 };
    assert_eq!(rig.cache.pages(parent, 1), Err(past));
    rig.step(&[(part, 3), (parent, 1), (whole, 2)]).expect("room");
    rig.check("after all have written");
    let [old, whole_pages, part_pages] = [parent, whole, part].map(|id| pages(&rig, id));
    assert_eq!((&whole_pages[..2], part_pages[0]), (&old[..2], old[0]));
    assert!(whole_pages[2] != old[2] && part_pages[1] != old[1], "pages that were written into");
    rig.remove(parent);
    let gone = Error::Sequence(SequenceError::UnknownSequence { id: parent });
    assert_eq!(rig.cache.pages(parent, 0), Err(gone));
    rig.step(&[(whole, 9), (part, 1)]).expect("room");
    rig.check("without the parent");
}

#[test]
fn a_prefix_is_found_again_after_its_sequence_is_gone() {
    let mut rig = Rig::new(&gpu(), &[LAYER, LAYER], 4, None);
    let ids: Vec<u32> = (100..110).collect();
    let first = rig.add();
    rig.step(&[(first, 10)]).expect("room");
    rig.cache.remember_prefix(first, &ids).expect("its tokens");
    let tokens = rig.model[&first].tokens.clone();
    rig.remove(first);
    assert_eq!(rig.cache.cached_prefix(&ids), Ok(8));
    assert_eq!(rig.cache.cached_prefix(&ids[..7]), Ok(4));
    let mut other = ids.clone();
    other[5] = 7;
    let (second, cached) = rig.cache.add_with_prefix(&other).expect("nothing was lost");
    assert_eq!((cached, rig.cache.len(second)), (4, Ok(4)));
    let (tokens, pages) = (tokens[..4].to_vec(), vec![u32::MAX]);
    rig.model.insert(second, Model { tokens, pages, ..Model::default() });
    rig.step(&[(second, 7)]).expect("room");
    rig.check("a prefix and a tail of its own");
    // Two pages of the prefix, of which one is shared, and two of the tail.
    let stats = rig.cache.stats();
    assert_eq!((stats.pages_used, stats.pages_shared), (4, 1));
    rig.cache.forget_prefixes().expect("nothing was lost");
    assert_eq!(rig.cache.stats().pages_used, 3);
    rig.check("without the map");
}

#[test]
fn a_bounded_pool_evicts_prefixes_and_then_refuses() {
    let mut rig = Rig::new(&gpu(), &[LAYER], 4, Some(4));
    let ids: Vec<u32> = (0..8).collect();
    let first = rig.add();
    rig.step(&[(first, 8)]).expect("room");
    rig.cache.remember_prefix(first, &ids).expect("its tokens");
    rig.remove(first);
    let second = rig.add();
    rig.step(&[(second, 12)]).expect("a prefix makes room");
    assert_eq!(rig.cache.cached_prefix(&ids), Ok(4));
    let before = rig.cache.stats();
    let refused = rig.step(&[(second, 9)]).map(|_| ());
    let expected = Error::OutOfPages { used: 4, shared: 0, wanted: 3, limit: 4, page_tokens: 4 };
    assert_eq!(refused, Err(expected));
    assert_eq!((rig.cache.stats(), rig.cache.cached_prefix(&ids)), (before, Ok(4)));
    rig.check("after a refusal");
}

#[test]
fn pools_of_a_bounded_cache_are_made_once() {
    let options = CacheOptions::default().with_max_pages(64);
    let mut cache = SequenceCache::with_options(&gpu(), &[LAYER; 3], options).expect("options");
    assert_eq!(cache.stats().buffers, 0);
    let id = cache.add().expect("nothing was lost");
    let planned = gpu().submit_pass("step", |pass| cache.plan_step(pass, &[(id, 1)]));
    planned.expect("room");
    let stats = cache.stats();
    assert_eq!((stats.buffers, stats.pages_used, stats.pages_free), (6, 1, 63));
    assert_eq!(stats.bytes_allocated, 3 * 2 * 64 * 16 * 2 * 4 * 4);
}
