//! A cache and its model side by side: what is done to one is done to the other, and `check` compares.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;

use half::{bf16, f16};
use wgpu_kvcache::wgpu::{
    Buffer, BufferDescriptor, BufferUsages, Features, Limits, MapMode, PollType,
};
use wgpu_kvcache::{
    CacheOptions, CachePosition, DType, DynamicKVCache, Error, Format, Formats, Gpu, HostTensor,
    KVCache, PagedKVCache, StaticKVCache, Stats, StoredTensor, Tensor,
};

use crate::model::{Block, Model};
use crate::plain_formats::{stored, with_one_nan};
use crate::wait::{ReadLayer, wait};
use crate::{kernels_run, open};

/// A device of WebGPU's default limits and no optional feature, after `change` to the limits.
pub(crate) fn plain_gpu(change: impl FnOnce(&mut Limits)) -> Gpu {
    let mut limits = Limits::default();
    change(&mut limits);
    open(Features::empty(), Some(limits))
}

/// A buffer of zeros.
pub(crate) fn buffer(gpu: &Gpu, size: u64, usage: BufferUsages) -> Buffer {
    let label = Some("test");
    gpu.device().create_buffer(&BufferDescriptor { label, size, usage, mapped_at_creation: false })
}

/// All bytes of a buffer that may be copied from.
pub(crate) fn read_buffer(gpu: &Gpu, source: &Buffer) -> Vec<u8> {
    let staging = buffer(gpu, source.size(), BufferUsages::COPY_DST | BufferUsages::MAP_READ);
    let mut encoder = gpu.device().create_command_encoder(&Default::default());
    encoder.copy_buffer_to_buffer(source, 0, &staging, 0, source.size());
    gpu.queue().submit([encoder.finish()]);
    let is_mapped = Arc::new(AtomicBool::new(false));
    let mapped = Arc::clone(&is_mapped);
    staging.map_async(MapMode::Read, .., move |result| {
        result.expect("mapped");
        mapped.store(true, Ordering::Release);
    });
    gpu.device().poll(PollType::wait_indefinitely()).expect("the device answers");
    // In a browser no call waits, but the test does. Elsewhere another thread that polls may be about to run the callback,
    // which wakes nobody.
    wait(poll_fn(|context| {
        if is_mapped.load(Ordering::Acquire) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }));
    staging.slice(..).get_mapped_range().expect("mapped").to_vec()
}

/// Puts a block into a buffer of its own.
pub(crate) fn upload(gpu: &Gpu, dtype: DType, block: &Block) -> Tensor {
    use bytemuck::pod_collect_to_vec as cast;
    assert_eq!(dtype.size(), block.element);
    let tensor = match dtype {
        DType::F32 => gpu.upload(&cast::<u8, f32>(&block.bytes), &block.shape),
        DType::F16 => gpu.upload(&cast::<u8, f16>(&block.bytes), &block.shape),
        DType::BF16 => gpu.upload(&cast::<u8, bf16>(&block.bytes), &block.shape),
        other => unreachable!("no block is of {other}"),
    };
    tensor.unwrap_or_else(|error| panic!("{error}"))
}

/// Whether bytes that were read back are the right ones: as many, and bit for bit the same.
///
/// Every comparison of contents goes through here, since this is the one that `KV_DEVICE=noop` leaves out:
/// there no kernel has written anything.
pub(crate) fn same_bits(got: &[u8], expected: &[u8]) -> bool {
    got.len() == expected.len() && (!kernels_run() || got == expected)
}

/// Compares what a cache gave back with what the model holds, bit for bit.
pub(crate) fn compare(
    got: Option<(HostTensor, HostTensor)>,
    expected: Option<(Block, Block)>,
    context: &str,
) {
    compare_blocks(got.map(|(key, value)| (Block::of(&key), Block::of(&value))), expected, context);
}

/// As [`compare`].
pub(crate) fn compare_blocks(
    got: Option<(Block, Block)>,
    expected: Option<(Block, Block)>,
    context: &str,
) {
    assert_eq!(got.is_some(), expected.is_some(), "{context}: whether the layer holds something");
    let (Some(got), Some(expected)) = (got, expected) else { return };
    for (what, got, expected) in [("K", got.0, expected.0), ("V", got.1, expected.1)] {
        assert_eq!(got.shape, expected.shape, "{context}: shape of {what}");
        assert_eq!(got.element, expected.element, "{context}: element size of {what}");
        assert_eq!(got.bytes.len(), expected.bytes.len(), "{context}: bytes of {what}");
        if same_bits(&got.bytes, &expected.bytes) {
            continue;
        }
        let [_, heads, tokens, dim] = expected.shape;
        let pairs = got.bytes.chunks(expected.element).zip(expected.bytes.chunks(expected.element));
        let wrong: Vec<usize> =
            pairs.enumerate().filter(|(_, (got, right))| got != right).map(|(at, _)| at).collect();
        let at = wrong[0];
        panic!(
            "{context}: {what} {:?} has {} wrong elements, the first at row {}, head {}, token {}, \
             element {}: {:02x?} for {:02x?}",
            expected.shape,
            wrong.len(),
            at / dim / tokens / heads,
            at / dim / tokens % heads,
            at / dim % tokens,
            at % dim,
            &got.bytes[at * expected.element..][..expected.element],
            &expected.bytes[at * expected.element..][..expected.element],
        );
    }
}

/// Reads a layer back, and asks that exactly the bytes which came back were counted as read, and that nothing
/// else was counted.
///
/// `compare` asks that what came back is the live tokens, so both together say that a read-back takes the live
/// bytes and no others. Histories and traces read through here alone. The count holds on `KV_DEVICE=noop` too.
pub(crate) fn read_back(
    stats: impl Fn() -> Stats,
    get: impl FnOnce() -> Result<Option<(HostTensor, HostTensor)>, Error>,
    context: &str,
) -> Result<Option<(HostTensor, HostTensor)>, Error> {
    let before = stats();
    let got = get();
    let bytes = match &got {
        Ok(Some((key, value))) => key.bytes().len() + value.bytes().len(),
        Ok(None) | Err(_) => 0,
    };
    let bytes_read_back = before.bytes_read_back + bytes as u64;
    assert_eq!(
        stats(),
        with_read_back(before, bytes_read_back),
        "{context}: {bytes} bytes were read"
    );
    got
}

/// As [`read_back`], of what is stored, of which V is not read if it lies in K.
pub(crate) fn read_stored(
    stats: impl Fn() -> Stats,
    get: impl FnOnce() -> Result<Option<(StoredTensor, StoredTensor)>, Error>,
    is_value_in_key: bool,
    context: &str,
) -> Result<Option<(StoredTensor, StoredTensor)>, Error> {
    let before = stats();
    let got = get();
    let bytes = |tensor: &StoredTensor| tensor.elements().len() + 2 * tensor.scales().len();
    let bytes = match &got {
        Ok(Some((key, value))) => bytes(key) + if is_value_in_key { 0 } else { bytes(value) },
        Ok(None) | Err(_) => 0,
    };
    let bytes_read_back = before.bytes_read_back + bytes as u64;
    let right = with_read_back(before, bytes_read_back);
    assert_eq!(stats(), right, "{context}: {bytes} bytes were read");
    got
}

/// The same, with so many bytes read back.
pub(crate) fn with_read_back(mut stats: Stats, bytes: u64) -> Stats {
    stats.bytes_read_back = bytes;
    stats
}

/// What cutting tokens off, or a reset, leaves as it is.
pub(crate) fn but_pages(stats: Stats) -> Stats {
    let mut stats = stats;
    (stats.pages_used, stats.pages_shared, stats.pages_free) = (0, 0, 0);
    stats
}

/// A cache and its model.
pub(crate) struct Rig {
    pub(crate) gpu: Gpu,
    pub(crate) cache: Box<dyn KVCache>,
    pub(crate) model: Model,
    /// How the cache was told to store what comes in.
    pub(crate) storing: Storing,
    seed: u64,
}

/// How a cache was told to store what comes in.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Storing {
    pub(crate) formats: Formats,
    pub(crate) is_value_in_key: bool,
}

impl Storing {
    /// For K and V of `dtype`.
    pub(crate) fn of(self, dtype: DType) -> [Format; 2] {
        let [key, value] =
            [self.formats.key, self.formats.value].map(|format| format.unwrap_or(dtype.into()));
        [key, if self.is_value_in_key { key } else { value }]
    }

    /// Bytes of a token of one head, of the larger of K and V, each of an element size and `head_dim` as they come in.
    pub(crate) fn token_bytes(self, sides: [(usize, usize); 2]) -> u64 {
        let formats = [self.formats.key, self.formats.value];
        let bytes = formats.iter().zip(sides).map(|(format, (element, dim))| {
            format.map_or((element * dim) as u64, |format| format.token_bytes(dim))
        });
        bytes.take(if self.is_value_in_key { 1 } else { 2 }).max().unwrap_or(0)
    }

    /// The options of a cache that stores so.
    pub(crate) fn options(self) -> CacheOptions<'static> {
        let options = CacheOptions::default().with_formats(self.formats);
        if self.is_value_in_key { options.with_value_in_key() } else { options }
    }

    /// Whether bits are changed on the way.
    fn converts(self) -> bool {
        self.formats != Formats::default()
    }

    /// What K and V of `dtype` read back as.
    pub(crate) fn stored(self, dtype: DType, [key, value]: [&Block; 2]) -> [Block; 2] {
        let [k, v] = self.of(dtype);
        let key_stored = stored(k, dtype, key);
        if !self.is_value_in_key {
            return [key_stored, stored(v, dtype, value)];
        }
        // The first elements of K as it is stored, since a block of K is larger than what V takes of it.
        let value = key_stored.first_elements(value.shape[3]);
        [key_stored, value]
    }
}

impl Rig {
    pub(crate) fn new(gpu: &Gpu, cache: Box<dyn KVCache>, model: Model) -> Self {
        Self { gpu: gpu.clone(), cache, model, storing: Storing::default(), seed: 0 }
    }

    pub(crate) fn storing(
        gpu: &Gpu,
        cache: Box<dyn KVCache>,
        model: Model,
        storing: Storing,
    ) -> Self {
        Self { storing, ..Self::new(gpu, cache, model) }
    }

    pub(crate) fn dynamic(gpu: &Gpu) -> Self {
        Self::dynamic_storing(gpu, Storing::default())
    }

    pub(crate) fn dynamic_storing(gpu: &Gpu, storing: Storing) -> Self {
        let cache = DynamicKVCache::with_options(gpu, storing.options()).expect("its options");
        Self::storing(gpu, Box::new(cache), Model::dynamic(), storing)
    }

    pub(crate) fn fixed(gpu: &Gpu, bound: usize, layers: usize) -> Self {
        Self::fixed_storing(gpu, bound, layers, Storing::default())
    }

    pub(crate) fn fixed_storing(gpu: &Gpu, bound: usize, layers: usize, storing: Storing) -> Self {
        let options = storing.options().with_max_cache_len(bound).with_num_layers(layers);
        let cache = StaticKVCache::with_options(gpu, options).expect("both options");
        Self::storing(gpu, Box::new(cache), Model::fixed(bound, layers), storing)
    }

    /// Pages of `size` tokens, in a pool that grows.
    pub(crate) fn paged(gpu: &Gpu, size: usize) -> Self {
        Self::in_pages(gpu, size, None, Model::dynamic())
    }

    /// Pages of `size` tokens, for `layers` layers of at most `bound` tokens.
    pub(crate) fn paged_fixed(gpu: &Gpu, size: usize, bound: usize, layers: usize) -> Self {
        Self::in_pages(gpu, size, None, Model::fixed(bound, layers))
    }

    /// Pages of `size` tokens, at most `max_pages` of them, for what `model` is bounded to.
    pub(crate) fn in_pages(gpu: &Gpu, size: usize, max_pages: Option<usize>, model: Model) -> Self {
        Self::in_pages_storing(gpu, size, max_pages, model, Storing::default())
    }

    pub(crate) fn in_pages_storing(
        gpu: &Gpu,
        size: usize,
        max_pages: Option<usize>,
        model: Model,
        storing: Storing,
    ) -> Self {
        let (max_cache_len, num_layers) = model.bounds.unzip();
        let options = storing.options().with_page_tokens(size).with_max_pages(max_pages);
        let options = options.with_max_cache_len(max_cache_len).with_num_layers(num_layers);
        let cache = PagedKVCache::with_options(gpu, options);
        let cache = cache.unwrap_or_else(|error| panic!("{error}"));
        let model = model.in_pages(size).of_at_most(max_pages);
        Self::storing(gpu, Box::new(cache), model, storing)
    }

    /// New K of `shape`, and V of the same but `value_dim`: noise, other noise at every call.
    pub(crate) fn noise(
        &mut self,
        dtype: DType,
        shape: [usize; 4],
        value_dim: usize,
    ) -> (Block, Block) {
        let [b, h, t, _] = shape;
        self.seed += 2;
        let noise = |shape, seed| match self.storing.converts() {
            // Of noise every block would have a NaN.
            true => Block::numbers(shape, dtype, seed),
            false => Block::noise(shape, dtype.size(), seed),
        };
        let key = noise(shape, self.seed);
        let value = match self.storing.is_value_in_key {
            true => key.first_elements(value_dim),
            false => noise([b, h, t, value_dim], self.seed + 1),
        };
        (key, value)
    }

    /// One update of noise, in a pass of its own.
    pub(crate) fn update_as(
        &mut self,
        dtype: DType,
        layer: usize,
        shape: [usize; 4],
        value_dim: usize,
        position: CachePosition<'_>,
    ) {
        let (key, value) = self.noise(dtype, shape, value_dim);
        let (k, v) = (upload(&self.gpu, dtype, &key), upload(&self.gpu, dtype, &value));
        let len = self
            .gpu
            .submit_pass("update", |pass| {
                let value = match self.storing.is_value_in_key {
                    true => k.view().with_head_dim(value_dim),
                    false => v.view(),
                };
                let view = self.cache.update(pass, &k.view(), &value, layer, position)?;
                let [b, h, len, d] = view.key_shape();
                assert_eq!([b, h, d], [shape[0], shape[1], shape[3]]);
                assert_eq!(view.value_shape(), [b, h, len, value_dim]);
                let formats = [view.key_format(), view.value_format()];
                assert_eq!((view.len(), formats), (len, self.storing.of(dtype)));
                assert!(view.start() < view.capacity());
                assert!(view.len() <= view.capacity() || view.page_table().is_some());
                Ok::<usize, Error>(len)
            })
            .unwrap_or_else(|error| panic!("layer {layer}, {shape:?}, {position:?}: {error}"));
        let [key, value] = self.storing.stored(dtype, [&key, &value]);
        self.model.update(layer, &key, &value, position).expect("the model takes it too");
        assert_eq!(len, self.model.len(layer), "layer {layer}, {shape:?}, {position:?}");
    }

    /// One update of f32 noise, in a pass of its own.
    pub(crate) fn update(
        &mut self,
        layer: usize,
        shape: [usize; 4],
        value_dim: usize,
        position: CachePosition<'_>,
    ) {
        self.update_as(DType::F32, layer, shape, value_dim, position);
    }

    pub(crate) fn crop(&mut self, max_length: usize) {
        self.cache.crop(max_length);
        self.model.crop(max_length);
    }

    pub(crate) fn truncate(&mut self, length: usize) {
        self.cache.truncate(length);
        self.model.truncate(length);
    }

    pub(crate) fn crop_rows(&mut self, lengths: &[usize]) {
        self.cache.crop_rows(lengths).unwrap_or_else(|error| panic!("{lengths:?}: {error}"));
        self.model.cut_rows(lengths, true).expect("the model takes it too");
    }

    pub(crate) fn truncate_rows(&mut self, lengths: &[usize]) {
        self.cache.truncate_rows(lengths).unwrap_or_else(|error| panic!("{lengths:?}: {error}"));
        self.model.cut_rows(lengths, false).expect("the model takes it too");
    }

    pub(crate) fn reset(&mut self) {
        self.cache.reset();
        self.model.reset();
    }

    pub(crate) fn select(&mut self, indices: &[u32]) {
        self.gpu
            .submit_pass("select", |pass| self.cache.batch_select_indices(pass, indices))
            .unwrap_or_else(|error| panic!("{indices:?}: {error}"));
        self.model.select(indices).expect("the model takes it too");
    }

    /// Batch operations on a cache of which no layer holds anything record nothing.
    pub(crate) fn select_nothing(&mut self, context: &str) {
        self.gpu
            .submit_pass("no rows", |pass| {
                self.cache.batch_select_indices(pass, &[5, 0])?;
                self.cache.batch_repeat_interleave(pass, 3)
            })
            .unwrap_or_else(|error| panic!("{context}: {error}"));
    }

    pub(crate) fn repeat_interleave(&mut self, repeats: usize) {
        self.gpu
            .submit_pass("repeat", |pass| self.cache.batch_repeat_interleave(pass, repeats))
            .unwrap_or_else(|error| panic!("{repeats}: {error}"));
        self.model.repeat_interleave(repeats).expect("the model takes it too");
    }

    /// What the cache has done since `before`: dispatches and bytes moved.
    pub(crate) fn since(&self, before: Stats) -> (u64, u64) {
        let now = self.cache.stats();
        (now.dispatches - before.dispatches, now.bytes_moved - before.bytes_moved)
    }

    /// Every layer holds what the model holds, and says the same of itself.
    pub(crate) fn check(&self, context: &str) {
        if let Some((used, shared)) = self.model.pages() {
            let stats = self.cache.stats();
            let counts = (stats.pages_used, stats.pages_shared);
            assert_eq!(counts, (used as u64, shared as u64), "{context}: pages used and shared");
            assert!(stats.peak_pages_used >= stats.pages_used, "{context}: peak of pages");
        }
        for layer in self.model.layers() {
            let context = format!("{context}, layer {layer}");
            let expected = self.model.get(layer);
            let length = self.cache.get_seq_length(layer).expect("the layer exists");
            assert_eq!(length, self.model.len(layer), "{context}: length");
            let view = self.cache.view(layer).expect("the layer exists").expect("it was written");
            if let Some((key, value)) = &expected {
                assert_eq!(view.key_shape(), key.shape, "{context}: view of K");
                assert_eq!(view.value_shape(), value.shape, "{context}: view of V");
            }
            let wraps = view.start() + view.len() > view.capacity();
            assert_eq!(view.layout().is_paged(), self.model.pages().is_some(), "{context}");
            assert_eq!(view.page_table().is_some(), view.layout().has_table(), "{context}");
            let lens: Vec<usize> = (0..).map_while(|row| view.row_len(row)).collect();
            assert_eq!(lens, self.model.row_lens(layer), "{context}: lengths of rows");
            assert_eq!(view.is_ragged(), view.layout().is_ragged(), "{context}");
            assert!(view.is_ragged() || lens.iter().all(|&len| len == length), "{context}");
            assert_eq!(
                view.is_contiguous(),
                !wraps && view.page_table().is_none(),
                "{context}: contiguity"
            );
            let formats = [view.key_format(), view.value_format()];
            let got = read_stored(
                || self.cache.stats(),
                || self.cache.read_stored(layer),
                view.is_value_in_key(),
                &context,
            );
            let got = got.unwrap_or_else(|error| panic!("{context}: {error}"));
            let mut got =
                got.map(|(key, value)| [key, value].map(|it| Block::of(&it.into_tensor())));
            let mut expected = expected.map(|(key, value)| [key, value]);
            if self.storing.converts() {
                let mut one_nan = |[key, value]: [Block; 2]| {
                    [with_one_nan(formats[0], key), with_one_nan(formats[1], value)]
                };
                (got, expected) = (got.map(&mut one_nan), expected.map(&mut one_nan));
            }
            compare_blocks(got.map(Into::into), expected.map(Into::into), &context);
        }
    }
}
