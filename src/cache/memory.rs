//! What a cache will take, before anything is allocated: [`CachePlan`].

use crate::cache::options::{CacheOptions, windows_of};
use crate::error::{Error, Result};
use crate::gpu::device::binding_limit;
use crate::host::capacity::{Growth, pages_of_window, pool_pages, pool_pages_of};
use crate::host::window::Window;
use crate::layer_shape::LayerShape;
use crate::storage::sequences::shape_of;
use crate::storage::store::Shape;

/// A kind of cache, to plan for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CacheKind {
    /// [`DynamicKVCache`](crate::DynamicKVCache).
    Dynamic,
    /// [`StaticKVCache`](crate::StaticKVCache).
    Static,
    /// [`PagedKVCache`](crate::PagedKVCache), whose rows share no page.
    Paged,
    /// [`SequenceCache`](crate::SequenceCache), whose sequences share no page and advance together.
    Sequences,
}

/// How many tokens come into a cache, and in which pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheLoad {
    /// Batch rows, or sequences.
    pub batch: usize,
    /// Tokens of each row, appended in all.
    pub tokens: usize,
    /// Tokens of an update at most: a row's tokens come in pieces of so many, the last one shorter.
    pub chunk: usize,
}

/// How many bytes, buffers and bindings a model's cache takes, and whether they fit a device: known before
/// anything is allocated, by the rules that the cache itself follows.
///
/// # Examples
///
/// The layers of Gemma 3 270M, of which every sixth keeps all tokens and the others look back on 512:
///
/// ```
/// use wgpu_kvcache::{
///     wgpu, CacheKind, CacheLoad, CacheOptions, CachePlan, DType, LayerShape,
/// };
///
/// # fn main() -> Result<(), wgpu_kvcache::Error> {
/// let layers = [LayerShape { dtype: DType::F32, heads: 1, key_dim: 256, value_dim: 256 }; 18];
/// let windows: Vec<_> = (0..18).map(|layer| (layer % 6 != 5).then_some(512)).collect();
/// let load = CacheLoad { batch: 1, tokens: 8192, chunk: 512 };
/// let limits = wgpu::Limits::default(); // device.limits() in an engine
/// let options = CacheOptions::default();
/// let whole = CachePlan::new(CacheKind::Dynamic, &layers, options, load, &limits)?;
/// let options = options.with_windows(&windows);
/// let plan = CachePlan::new(CacheKind::Dynamic, &layers, options, load, &limits)?;
/// assert!(plan.fits().is_ok() && 3 * plan.bytes_allocated() < whole.bytes_allocated());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachePlan {
    bindings: u32,
    bytes_allocated: u64,
    peak_bytes_allocated: u64,
    buffers: u64,
    largest_buffer: u64,
    bytes_of_layers: Vec<[u64; 2]>,
    pages_used: u64,
    longest: Option<usize>,
    misfit: Option<Error>,
}

impl CachePlan {
    /// Plans a cache of these layers, made with `options`, for a device of these limits.
    ///
    /// # Errors
    ///
    /// Those of making the cache: [`Error::UnusedOption`], [`Error::MissingOption`], [`Error::PageSize`],
    /// [`Error::ZeroExtent`], [`Error::OddHeadDim`], [`Error::Window`]; also [`Error::ZeroExtent`] for a load of
    /// nothing, and [`Error::SizeOverflow`] for a load whose bytes cannot be counted. That it does not fit is no error:
    /// see [`fits`](Self::fits).
    pub fn new(
        kind: CacheKind,
        layers: &[LayerShape],
        options: CacheOptions<'_>,
        load: CacheLoad,
        limits: &wgpu::Limits,
    ) -> Result<Self> {
        let CacheLoad { batch, tokens, chunk } = load;
        if [batch, tokens, chunk].contains(&0) || layers.is_empty() {
            return Err(Error::ZeroExtent { shape: vec![layers.len(), batch, tokens, chunk] });
        }
        let rule = Rule::new(kind, options)?;
        let windows = windows_of(options, kind == CacheKind::Static)?;
        let limit = binding_limit(limits);
        let mut simulated = Vec::with_capacity(layers.len());
        for (at, layer) in layers.iter().enumerate() {
            let shape = Shape { batch, ..shape_of(layer, options.storing())? };
            let window = windows.get(at).copied().flatten();
            simulated.push(Simulated::new(at, shape, window, rule, limit));
        }
        if kind == CacheKind::Sequences {
            let pages: Vec<_> = simulated.iter().map(|it| (it.window, it.pages())).collect();
            for layer in &mut simulated {
                let group = pages.iter().filter(|(window, _)| *window == layer.window);
                layer.most_pages = group.map(|(_, pages)| *pages).min().unwrap_or_default();
            }
        }
        let sides = if options.storing().is_value_in_key { 1 } else { 2 };
        let mut plan = Self {
            bindings: match kind {
                CacheKind::Dynamic | CacheKind::Static => sides,
                CacheKind::Paged | CacheKind::Sequences => sides + 1,
            },
            bytes_allocated: 0,
            peak_bytes_allocated: 0,
            buffers: simulated.iter().map(|layer| layer.shape.buffers()).sum(),
            largest_buffer: 0,
            bytes_of_layers: Vec::with_capacity(layers.len()),
            pages_used: 0,
            longest: None,
            misfit: None,
        };
        // Layers whose old memory is replaced together: one by one, or those of a window.
        let mut groups: Vec<(Option<Window>, Memory)> = Vec::new();
        let mut left = tokens;
        while left > 0 {
            let count = left.min(chunk);
            left -= count;
            for (_, memory) in &mut groups {
                memory.begin();
            }
            for layer in &mut simulated {
                let Some(new) = layer.update(count, &mut plan.misfit)? else { continue };
                let bytes = new[0].saturating_add(new[1]);
                if kind == CacheKind::Sequences {
                    let at = groups.iter().position(|(window, _)| *window == layer.window);
                    let at = at.unwrap_or_else(|| {
                        groups.push((layer.window, Memory::default()));
                        groups.len() - 1
                    });
                    groups[at].1.replace(bytes);
                } else {
                    // Old and new memory are there together.
                    let peak = plan.bytes_allocated.saturating_add(bytes);
                    plan.peak_bytes_allocated = plan.peak_bytes_allocated.max(peak);
                    plan.bytes_allocated += bytes - layer.hold(bytes);
                }
            }
        }
        for (_, memory) in &groups {
            plan.bytes_allocated += memory.held();
            plan.peak_bytes_allocated += memory.peak;
        }
        for layer in &simulated {
            let bytes = layer.bytes().unwrap_or([u64::MAX; 2]);
            plan.largest_buffer = plan.largest_buffer.max(bytes[0]).max(bytes[1]);
            plan.bytes_of_layers.push(bytes);
            plan.pages_used = plan.pages_used.max(layer.used as u64);
        }
        plan.longest = simulated.iter().filter_map(|layer| layer.longest(chunk)).min();
        Ok(plan)
    }

    /// Bytes of K and V in the end: [`Stats::bytes_allocated`](crate::Stats::bytes_allocated).
    pub fn bytes_allocated(&self) -> u64 {
        self.bytes_allocated
    }

    /// Bytes of K and V at most, while a layer's old memory is copied into new:
    /// [`Stats::peak_bytes_allocated`](crate::Stats::peak_bytes_allocated).
    pub fn peak_bytes_allocated(&self) -> u64 {
        self.peak_bytes_allocated
    }

    /// Buffers of K and V: [`Stats::buffers`](crate::Stats::buffers).
    pub fn buffers(&self) -> u64 {
        self.buffers
    }

    /// Bytes of the largest buffer, which is bound whole.
    pub fn largest_buffer(&self) -> u64 {
        self.largest_buffer
    }

    /// Bytes of K and of V of each layer, in the end; V's are zero if K alone is stored. Of a
    /// [`CacheKind::Static`] what an engine [gives](crate::LayerMemory) to have room for the batch.
    pub fn bytes_of_layers(&self) -> &[[u64; 2]] {
        &self.bytes_of_layers
    }

    /// Storage buffers that a shader binds to read a layer: K, V if it is stored, and the page table if there is one.
    pub fn bindings(&self) -> u32 {
        self.bindings
    }

    /// Pages in use in the layer that uses most, in the end: [`Stats::pages_used`](crate::Stats::pages_used).
    pub fn pages_used(&self) -> u64 {
        self.pages_used
    }

    /// The most tokens of each row for which the plan fits, in pieces as they were given; `None` if nothing but the
    /// 32 bits of positions bounds them, since every layer has a window.
    pub fn longest(&self) -> Option<usize> {
        self.longest
    }

    /// Whether everything fits what the device binds and what the options bound.
    ///
    /// # Errors
    ///
    /// What the first update would answer that does not fit: [`Error::LayerTooLarge`], [`Error::SequenceTooLong`],
    /// [`Error::OutOfPages`], [`Error::Window`].
    pub fn fits(&self) -> Result<()> {
        self.misfit.clone().map_or(Ok(()), Err)
    }
}

/// How a kind finds memory.
#[derive(Clone, Copy, Debug)]
enum Rule {
    Ring { growth: Growth, bound: Option<usize> },
    Pages { page_tokens: usize, most: Option<usize>, bound: Option<usize> },
}

impl Rule {
    fn new(kind: CacheKind, options: CacheOptions<'_>) -> Result<Self> {
        let pages = |options: CacheOptions<'_>| {
            Ok(Self::Pages {
                page_tokens: options.page_tokens()?,
                most: options.max_pages(),
                bound: options.max_cache_len(),
            })
        };
        let paged = ["max_cache_len", "page_tokens", "max_pages", "windows"];
        match kind {
            CacheKind::Dynamic => {
                let options = options.check("DynamicKVCache", &["capacity", "windows"])?;
                let tokens = options.capacity().unwrap_or(0);
                let growth = Growth::Dynamic { tokens, most: usize::MAX };
                Ok(Self::Ring { growth, bound: None })
            }
            CacheKind::Static => {
                let kind = "StaticKVCache";
                let options = options.check(kind, &["max_cache_len", "windows", "max_chunk"])?;
                let option = "max_cache_len";
                let missing = Error::MissingOption { option, kind };
                let tokens = options.max_cache_len().ok_or(missing)?;
                Ok(Self::Ring { growth: Growth::Static { tokens }, bound: Some(tokens) })
            }
            CacheKind::Paged => pages(options.check("PagedKVCache", &paged)?),
            CacheKind::Sequences => pages(options.check("SequenceCache", &paged)?),
        }
    }
}

/// A layer as it will be.
#[derive(Clone, Debug)]
struct Simulated {
    layer: usize,
    shape: Shape,
    window: Option<Window>,
    rule: Rule,
    /// Bytes that the device binds as one buffer.
    limit: u64,
    /// Live tokens, and slots of the first page before them.
    live: usize,
    start: usize,
    /// Tokens of a row, or pages, that there is memory for; pages in use, and the highest that were.
    capacity: usize,
    used: usize,
    highest: usize,
    held: u64,
    /// Pages that the layer with the largest ones can bind, of those that share a table.
    most_pages: usize,
}

/// Memory of layers that is replaced all at once.
#[derive(Clone, Copy, Debug, Default)]
struct Memory {
    old: u64,
    new: u64,
    peak: u64,
}

impl Memory {
    fn held(self) -> u64 {
        if self.new > 0 { self.new } else { self.old }
    }

    /// A step begins, with what is there.
    fn begin(&mut self) {
        (self.old, self.new) = (self.held(), 0);
    }

    /// A layer takes new memory in this step.
    fn replace(&mut self, bytes: u64) {
        self.new = self.new.saturating_add(bytes);
        self.peak = self.peak.max(self.old.saturating_add(self.new));
    }
}

impl Simulated {
    fn new(layer: usize, shape: Shape, window: Option<Window>, rule: Rule, limit: u64) -> Self {
        let (live, start, capacity, used, highest) = (0, 0, 0, 0, 0);
        Self {
            layer,
            shape,
            window,
            rule,
            limit,
            live,
            start,
            capacity,
            used,
            highest,
            held: 0,
            most_pages: usize::MAX,
        }
    }

    /// An append of `count` tokens. Returns the bytes of new memory, if it takes new memory, and notes what does not
    /// fit, as if it did.
    fn update(&mut self, count: usize, misfit: &mut Option<Error>) -> Result<Option<[u64; 2]>> {
        let mut note = |error: Error| {
            misfit.get_or_insert(error);
        };
        if let Some(Err(error)) = self.window.map(|it| it.check_chunk(self.layer, count)) {
            note(error);
        }
        let kept = self.window.map_or(self.live, |window| self.live.min(window.needed()));
        // A row that has let go of all its tokens begins anew.
        self.start = if kept == 0 { 0 } else { self.start + self.live - kept };
        let len = self.live;
        self.live = kept.saturating_add(count);
        match self.rule {
            Rule::Ring { growth, bound } => {
                let growth = growth.of_window(self.window, count);
                if let Some(bound) = bound.filter(|&it| self.window.is_none() && self.live > it) {
                    note(Error::SequenceTooLong { len, new_tokens: count, bound });
                }
                if self.live <= self.capacity {
                    return Ok(None);
                }
                let fits = self.shape.tokens_in(self.shape.batch, [self.limit; 2]);
                let (needed, grown) = growth.capacity(self.capacity, self.live, fits);
                let is_full = self.capacity > 0 && matches!(growth, Growth::Static { .. });
                if is_full {
                    return Ok(None);
                }
                if grown.is_none() {
                    let bytes = self.shape.bytes(self.shape.batch, needed);
                    note(self.shape.too_large(self.limit, self.layer, bytes, needed, fits));
                }
                self.capacity = grown.unwrap_or(needed);
                self.shape.bytes(self.shape.batch, self.capacity).map(Some)
            }
            Rule::Pages { page_tokens, most, bound } => {
                let batch = self.shape.batch;
                self.start %= page_tokens;
                let row = self.start.saturating_add(self.live).div_ceil(page_tokens);
                let before = self.used;
                self.used = row.saturating_mul(batch);
                let needed = self.used.max(self.highest);
                self.highest = needed;
                if let Some(bound) = bound.filter(|&bound| self.live > bound) {
                    note(Error::SequenceTooLong { len, new_tokens: count, bound });
                }
                if let Some(limit) = most.filter(|&most| self.used > most) {
                    let wanted = self.used.saturating_sub(before);
                    note(Error::OutOfPages { used: before, shared: 0, wanted, limit, page_tokens });
                }
                if needed <= self.capacity {
                    return Ok(None);
                }
                let fits = self.pages();
                if needed > fits {
                    let bytes = self.shape.bytes(needed, page_tokens);
                    let tokens = fits / batch * page_tokens;
                    note(self.shape.too_large(self.limit, self.layer, bytes, self.live, tokens));
                }
                let fits = fits.max(needed);
                // A pool of sequences grows as if there may be more of them.
                self.capacity = if self.is_shared() {
                    pool_pages_of(self.window, most, page_tokens, [self.capacity, needed, fits])
                } else {
                    let of_window = pages_of_window(self.window, page_tokens, batch, count);
                    let fits = fits.min(of_window.max(needed));
                    pool_pages(most, page_tokens, [self.capacity, needed, fits])
                };
                self.shape.bytes(self.capacity, page_tokens).map(Some)
            }
        }
    }

    /// Whether it shares a table with other layers.
    fn is_shared(&self) -> bool {
        self.most_pages < usize::MAX
    }

    /// Pages that the device can bind.
    fn pages(&self) -> usize {
        let Rule::Pages { page_tokens, .. } = self.rule else { return usize::MAX };
        self.most_pages.min(self.shape.tokens_in(1, [self.limit; 2]) / page_tokens)
    }

    /// Takes new memory in place of what there was. Returns the bytes of that.
    fn hold(&mut self, bytes: u64) -> u64 {
        std::mem::replace(&mut self.held, bytes)
    }

    /// Bytes of K and of V.
    fn bytes(&self) -> Result<[u64; 2]> {
        match self.rule {
            Rule::Ring { .. } => self.shape.bytes(self.shape.batch, self.capacity),
            Rule::Pages { page_tokens, .. } => self.shape.bytes(self.capacity, page_tokens),
        }
    }

    /// The most tokens of a row that fit; `None` where there is no bound.
    fn longest(&self, chunk: usize) -> Option<usize> {
        let batch = self.shape.batch;
        // What fits at once, in tokens of a row; then whether a window ever needs as many.
        let (fits, of_window, bound) = match self.rule {
            Rule::Ring { bound, .. } => {
                let fits = self.shape.tokens_in(batch, [self.limit; 2]);
                // A ring of fixed length is made whole, or not at all.
                let made = bound.map(|bound| match self.window {
                    Some(window) => window.bound(bound),
                    None => bound,
                });
                let fits = if made.is_some_and(|made| made > fits) { 0 } else { fits };
                (fits, self.window.map(|window| window.most(chunk)), bound)
            }
            Rule::Pages { page_tokens, most, bound } => {
                let pages = self.pages();
                let row = pages.min(most.unwrap_or(usize::MAX)) / batch;
                let of_window = pages_of_window(self.window, page_tokens, 1, chunk);
                let of_window = self.window.map(|_| of_window.saturating_mul(page_tokens));
                (row.saturating_mul(page_tokens), of_window, bound)
            }
        };
        let chunk_fits = self.window.is_none_or(|it| it.check_chunk(0, chunk).is_ok());
        match of_window {
            Some(_) if !chunk_fits => self.window.and_then(|window| window.max_chunk),
            Some(most) if most <= fits => None,
            Some(_) => Some(fits),
            None => Some(bound.map_or(fits, |bound| bound.min(fits))),
        }
    }
}
