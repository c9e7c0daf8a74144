//! The kernels, one per file, and what they share: variants, parameters, and dispatches that are ready to record.

mod ahead;
mod append;
mod append_converted;
mod attention;
mod collect;
mod form;
mod gather;
mod limits;
mod params;
mod repeat_interleave;
mod rules;
mod spread;
mod variant;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use ahead::CompileScope;
pub(crate) use append::{AppendShape, Positions};
pub(crate) use attention::{AttentionShape, Items};
pub(crate) use gather::GatherShape;
pub(crate) use limits::check_limits;
pub(crate) use repeat_interleave::CopyShape;
pub(crate) use rules::{Has, Rules};
pub(crate) use spread::{MOST_DIM, ROWS, Tiles, most_tokens};
pub(crate) use variant::Unit;
use variant::{Elements, ParamsPath, Variant};

use crate::error::{Error, Result};
use crate::format::Format;
use crate::gpu::arena::{Allocation, Bound, RegionGuard, bind_layout, storage};
use crate::gpu::uploads::Uploads;
use crate::gpu::witness::Witness;
use crate::layout::Layout;

/// Invocations per workgroup: the most that every WebGPU device allows.
pub(crate) const WORKGROUP: u32 = 256;

/// The most row moves of a dispatch. Mesa's llvmpipe silently ends the loops of an invocation after 65,535 iterations
/// in total, and a move takes up to two iterations.
pub(crate) const MOST_MOVES: usize = 8192;

/// All kernels of a device.
#[derive(Debug)]
pub(crate) struct Kernels {
    uploads: Arc<Uploads>,
    /// The engine's pipeline cache, shared by all kernels.
    cache: Arc<Mutex<Option<wgpu::PipelineCache>>>,
    append: Kernel,
    /// Into formats that differ from what comes in.
    append_converted: Kernel,
    attention: Kernel,
    /// With masks, biases, sinks or row starts.
    attention_extras: Kernel,
    /// For many query rows, on a GPU.
    attention_tiles: Kernel,
    attention_tiles_extras: Kernel,
    attention_combine: Kernel,
    gather: Kernel,
    collect: Kernel,
    repeat_interleave: Kernel,
}

impl Kernels {
    /// Compiles nothing yet: a kernel is compiled when it is first used.
    pub(crate) fn new(uploads: Arc<Uploads>) -> Result<Self> {
        let device = Arc::clone(uploads.device());
        device.checked("kvcache kernels", 0, |_| Self::new_unchecked(uploads))
    }

    fn new_unchecked(uploads: Arc<Uploads>) -> Self {
        let cache = Arc::default();
        let kernel = |source: &'static Source| Kernel::new(&uploads, source, &cache);
        Self {
            append: kernel(&append::SOURCE),
            append_converted: kernel(&append_converted::CONVERTED),
            attention: kernel(&attention::SOURCE),
            attention_extras: kernel(&attention::EXTRAS),
            attention_tiles: kernel(&attention::TILES),
            attention_tiles_extras: kernel(&attention::TILES_EXTRAS),
            attention_combine: kernel(&attention::COMBINE),
            gather: kernel(&gather::SOURCE),
            collect: kernel(&collect::SOURCE),
            repeat_interleave: kernel(&repeat_interleave::SOURCE),
            cache,
            uploads,
        }
    }

    /// Pipelines that are compiled.
    #[cfg(test)]
    pub(crate) fn compiled(&self) -> usize {
        let kernels = [
            &self.append,
            &self.append_converted,
            &self.attention,
            &self.attention_extras,
            &self.attention_tiles,
            &self.attention_tiles_extras,
            &self.attention_combine,
            &self.gather,
            &self.collect,
            &self.repeat_interleave,
        ];
        kernels.iter().map(|kernel| kernel.pipelines().len()).sum()
    }

    pub(crate) fn set_pipeline_cache(&self, cache: wgpu::PipelineCache) {
        *self.cache.lock().unwrap_or_else(PoisonError::into_inner) = Some(cache);
    }
}

/// The source of a kernel.
#[derive(Debug)]
pub(crate) struct Source {
    label: &'static str,
    wgsl: &'static str,
    /// Texts that several kernels share, appended to `wgsl`.
    joined: &'static [&'static str],
    /// Texts that are appended for K and for V, with `key` and `value` in the place of `side`: for vectors, for words.
    sides: Option<[[&'static str; 2]; 2]>,
    /// For each binding of group 0, in order, whether the kernel writes it.
    writes: &'static [bool],
    /// Bytes of its parameters.
    params_bytes: u32,
    /// The names of its pipeline constants.
    constants: &'static [&'static str],
    /// The layouts that it is joined with; empty if it is joined with none. For the tests.
    #[cfg_attr(not(test), expect(dead_code, reason = "only tests list all variants"))]
    layouts: &'static [Layout],
    /// The formats of K and V that it reads elements of; empty if it moves bits. For the tests.
    #[cfg_attr(not(test), expect(dead_code, reason = "only tests list all variants"))]
    formats: &'static [[Format; 2]],
}

impl Source {
    /// Whether the kernel writes K or V of a cache, and therefore counts in the cache's witness.
    fn is_witnessed(&self) -> bool {
        let texts = [&[self.wgsl], self.joined].concat();
        texts.iter().any(|text| text.contains(" witness: atomic<u32>;"))
    }
}

/// Every kernel.
#[cfg(test)]
const SOURCES: [&Source; 10] = [
    &append::SOURCE,
    &append_converted::CONVERTED,
    &attention::SOURCE,
    &attention::EXTRAS,
    &attention::TILES,
    &attention::TILES_EXTRAS,
    &attention::COMBINE,
    &gather::SOURCE,
    &repeat_interleave::SOURCE,
    &collect::SOURCE,
];

/// A kernel with its compiled variants. Each is compiled when it is first used.
#[derive(Debug)]
struct Kernel {
    uploads: Arc<Uploads>,
    source: &'static Source,
    /// Whether it counts in a cache's witness.
    is_witnessed: bool,
    path: ParamsPath,
    bindings: wgpu::BindGroupLayout,
    pipeline_layout: wgpu::PipelineLayout,
    pipelines: Mutex<HashMap<Variant, wgpu::ComputePipeline>>,
    /// The engine's, if it has given one.
    cache: Arc<Mutex<Option<wgpu::PipelineCache>>>,
}

impl Kernel {
    fn new(
        uploads: &Arc<Uploads>,
        source: &'static Source,
        cache: &Arc<Mutex<Option<wgpu::PipelineCache>>>,
    ) -> Self {
        let (handle, layouts) = (uploads.device(), uploads.layouts());
        let device = &handle.device;
        let has_immediates = device.features().contains(wgpu::Features::IMMEDIATES);
        let path = if has_immediates && source.params_bytes <= handle.limits.max_immediate_size {
            ParamsPath::Immediate
        } else {
            ParamsPath::Uniform
        };
        let entries: Vec<_> =
            (0..).zip(source.writes).map(|(binding, &writes)| storage(binding, !writes)).collect();
        let bindings = bind_layout(device, source.label, &entries);
        let (params, immediate_size) = match path {
            ParamsPath::Immediate => (None, source.params_bytes),
            ParamsPath::Uniform => (Some(&layouts.params), 0),
        };
        let is_witnessed = source.is_witnessed();
        let lists = if is_witnessed { &layouts.witnessed } else { &layouts.lists };
        let groups = [Some(&bindings), Some(lists), params];
        let used = if params.is_some() { 3 } else { 2 };
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(source.label),
            bind_group_layouts: &groups[..used],
            immediate_size,
        });
        let pipelines = Mutex::default();
        let (uploads, cache) = (Arc::clone(uploads), Arc::clone(cache));
        Self { uploads, source, is_witnessed, path, bindings, pipeline_layout, pipelines, cache }
    }

    fn pipelines(&self) -> MutexGuard<'_, HashMap<Variant, wgpu::ComputePipeline>> {
        self.pipelines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_compiled(&self, variant: &Variant) -> bool {
        self.pipelines().contains_key(variant)
    }

    /// The pipeline of a variant, which is compiled if it is not yet. A variant that fails to compile is not kept.
    fn pipeline(&self, variant: Variant) -> Result<wgpu::ComputePipeline> {
        if let Some(compiled) = self.pipelines().get(&variant) {
            return Ok(compiled.clone());
        }
        // Compiled without the lock, so that threads compile in parallel. If two compile the same variant, the first
        // one is kept.
        let make = |device: &wgpu::Device| self.compile(device, variant);
        let compiled = self.uploads.device().checked(self.source.label, 0, make)?;
        Ok(self.pipelines().entry(variant).or_insert(compiled).clone())
    }

    fn compile(&self, device: &wgpu::Device, variant: Variant) -> wgpu::ComputePipeline {
        let label = Some(self.source.label);
        let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label,
            source: wgpu::ShaderSource::Wgsl(variant.text(self.source, self.path).into()),
        });
        let values = variant.constants.map(f64::from);
        let constants: Vec<(&str, f64)> =
            self.source.constants.iter().copied().zip(values).collect();
        let cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner).clone();
        device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label,
            layout: Some(&self.pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &constants,
                // Kernels write workgroup memory before they read it. On some backends a single invocation of
                // each workgroup would write the zeros.
                zero_initialize_workgroup_memory: false,
            },
            cache: cache.as_ref(),
        })
    }

    fn bind(&self, resources: &[wgpu::BufferBinding<'_>]) -> Result<wgpu::BindGroup> {
        self.uploads.device().bind(self.source.label, &self.bindings, resources)
    }

    /// Prepares a dispatch whose workgroups are numbered by one index.
    fn prepare(
        &self,
        variant: Variant,
        bindings: wgpu::BindGroup,
        list: Option<Allocation>,
        params: &impl bytemuck::Pod,
        workgroups: u64,
    ) -> Result<Dispatch> {
        let limit = self.uploads.device().limits.max_compute_workgroups_per_dimension;
        let Some(sides) = grid(workgroups, limit) else {
            let (what, needed) = (self.source.label, workgroups);
            return Err(Error::TooManyWorkgroups { what, needed, limit });
        };
        self.prepare_sides(variant, bindings, list, params, sides.map(u64::from))
    }

    /// Prepares a dispatch. Everything that can fail happens here, so that recording cannot fail.
    fn prepare_sides(
        &self,
        variant: Variant,
        bindings: wgpu::BindGroup,
        list: Option<Allocation>,
        params: &impl bytemuck::Pod,
        sides: [u64; 3],
    ) -> Result<Dispatch> {
        let limit = self.uploads.device().limits.max_compute_workgroups_per_dimension;
        let mut workgroups = [0_u32; 3];
        for (checked, needed) in workgroups.iter_mut().zip(sides) {
            *checked = u32::try_from(needed)
                .ok()
                .filter(|&needed| needed <= limit)
                .ok_or(Error::TooManyWorkgroups { what: self.source.label, needed, limit })?;
        }
        let params = match self.path {
            ParamsPath::Immediate => Parameters::Immediate(bytemuck::bytes_of(params).to_vec()),
            ParamsPath::Uniform => {
                let words = bytemuck::cast_slice(bytemuck::bytes_of(params));
                Parameters::Uniform(self.uploads.upload(words)?)
            }
        };
        let (lists, reads) = match list {
            Some(allocation) => (allocation.bound, vec![allocation.guard]),
            None => (Arc::clone(self.uploads.unused_list()), Vec::new()),
        };
        Ok(Dispatch {
            pipeline: self.pipeline(variant)?,
            bindings,
            lists,
            reads,
            is_witnessed: self.is_witnessed,
            params,
            workgroups,
        })
    }
}

#[derive(Debug)]
enum Parameters {
    Immediate(Vec<u8>),
    Uniform(Allocation),
}

/// A checked dispatch with all its resources, ready to be recorded.
#[derive(Debug)]
#[must_use = "nothing happens until the dispatch is recorded"]
pub(crate) struct Dispatch {
    pipeline: wgpu::ComputePipeline,
    bindings: wgpu::BindGroup,
    lists: Arc<Bound>,
    /// The data that it reads.
    reads: Vec<RegionGuard>,
    is_witnessed: bool,
    params: Parameters,
    workgroups: [u32; 3],
}

impl Dispatch {
    /// Records the dispatch, which counts in `witness`, and adds to `guards` the data that it reads. Cannot fail.
    pub(crate) fn record(
        self,
        pass: &mut wgpu::ComputePass<'_>,
        witness: Option<&Witness>,
        guards: &mut Vec<RegionGuard>,
    ) {
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &self.bindings, &[]);
        if self.is_witnessed {
            // The first word of the first page belongs to no cache.
            let (page, offset) = witness.map_or((0, 0), Witness::binding);
            pass.set_bind_group(1, &self.lists.witnessed(page), &[offset]);
        } else {
            pass.set_bind_group(1, &self.lists.lists, &[]);
        }
        guards.extend(self.reads);
        match self.params {
            Parameters::Immediate(bytes) => {
                pass.set_immediates(0, &bytes);
            }
            Parameters::Uniform(allocation) => {
                pass.set_bind_group(2, &allocation.bound.params, &[allocation.offset]);
                guards.push(allocation.guard);
            }
        }
        let [x, y, z] = self.workgroups;
        pass.dispatch_workgroups(x, y, z);
    }
}

/// Distributes workgroups, which a kernel numbers in 32 bits, over three dimensions. The grid may have a few more
/// workgroups than asked for. `None` if there are too many.
fn grid(workgroups: u64, limit: u32) -> Option<[u32; 3]> {
    let total = u32::try_from(workgroups).ok()?.max(1);
    let rest = total.div_ceil(limit);
    let z = rest.div_ceil(limit);
    // The shortest sides that suffice, so that the grid has few more workgroups than the total.
    let y = rest.div_ceil(z);
    let x = u64::from(total).div_ceil(u64::from(y) * u64::from(z));
    let x = u32::try_from(x).ok()?;
    // The number of the last workgroup must not overflow 32 bits.
    let numbered = u64::from(x) * u64::from(y) * u64::from(z) <= u64::from(u32::MAX);
    (z <= limit && numbered).then_some([x, y, z])
}

/// A count in 32 bits, as kernels take it.
fn narrow(count: usize) -> Result<u32> {
    u32::try_from(count).map_err(|_| Error::too_many("count that a kernel takes", count as u64))
}

#[cfg(test)]
mod tests {
    use super::grid;

    #[test]
    fn a_grid_holds_what_is_asked_for_within_its_limit() {
        for limit in [1, 2, 3, 7, 65_535] {
            for total in (0..=70).chain([65_535, 65_536, 65_537, 1 << 20, (1 << 31) + 1]) {
                match grid(total, limit) {
                    Some(sides) => {
                        let held: u64 = sides.iter().map(|&side| u64::from(side)).product();
                        assert!(held >= total && sides.iter().all(|&n| (1..=limit).contains(&n)));
                        assert!(held <= u64::from(u32::MAX));
                    }
                    None => assert!(total > u64::from(limit).pow(3)),
                }
            }
        }
        assert_eq!(grid(1 << 32, 65_535), None);
    }
}
