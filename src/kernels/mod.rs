//! The kernels, a file each, and what they share: variants, parameters, and a dispatch ready to record.

mod append;
mod gather;
mod repeat_interleave;

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

pub(crate) use append::AppendShape;
pub(crate) use gather::GatherShape;
pub(crate) use repeat_interleave::CopyShape;

use crate::arena::{Layouts, PARAMS_BYTES, Placed};
use crate::error::{Error, Result};
use crate::gpu::{DeviceHandle, Gpu};
use crate::ledger::{Leases, Ledger};
use crate::plan::RowMove;

/// Invocations of a workgroup: what every WebGPU device allows.
pub(crate) const WORKGROUP: u32 = 256;

/// Row moves of a dispatch at most. Mesa's llvmpipe ends the loops of an invocation without a word after
/// 65,535 rounds, all of them counted together; a thread runs its moves for K and for V, now and then for
/// a few columns.
pub(crate) const MOST_MOVES: usize = 8192;

/// What a thread moves at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Unit {
    /// 16 bytes: `vec4<u32>`.
    Vector,
    /// 4 bytes: `u32`, for rows that are no multiple of 16 bytes.
    Word,
}

impl Unit {
    pub(crate) const fn bytes(self) -> u64 {
        match self {
            Self::Vector => 16,
            Self::Word => 4,
        }
    }

    /// The widest unit that rows of these many bytes are a multiple of.
    pub(crate) fn for_rows(row_bytes: [u64; 2]) -> Self {
        if row_bytes.iter().all(|bytes| bytes % 16 == 0) { Self::Vector } else { Self::Word }
    }

    /// A byte count, in units. Sizes are checked against the device's limits before they get here.
    pub(crate) fn count(self, bytes: u64) -> Result<u32> {
        u32::try_from(bytes / self.bytes()).map_err(|_| Error::SizeOverflow { what: "layer" })
    }
}

/// How parameters reach a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ParamsPath {
    /// `var<immediate>`: recorded with the dispatch.
    Immediate,
    /// `var<uniform>` in the arena, at a dynamic offset: for devices without immediates.
    Uniform,
}

/// All kernels of a device.
#[derive(Debug)]
pub(crate) struct Kernels {
    pub(crate) layouts: Layouts,
    append: Kernel,
    gather: Kernel,
    repeat_interleave: Kernel,
}

impl Kernels {
    pub(crate) fn new(handle: &DeviceHandle) -> Self {
        let path = if handle.device.features().contains(wgpu::Features::IMMEDIATES)
            && handle.limits.max_immediate_size >= PARAMS_BYTES
        {
            ParamsPath::Immediate
        } else {
            ParamsPath::Uniform
        };
        let device = &handle.device;
        let layouts = Layouts {
            lists: bind_layout(device, "kvcache lists", &[storage(0, true)]),
            params: bind_layout(device, "kvcache parameters", &[uniform(0)]),
        };
        let kernel = |source: &Source| Kernel::new(device, &layouts, path, source);
        Self {
            append: kernel(&append::SOURCE),
            gather: kernel(&gather::SOURCE),
            repeat_interleave: kernel(&repeat_interleave::SOURCE),
            layouts,
        }
    }
}

/// A kernel as it stands in `shaders/`.
#[derive(Debug)]
pub(crate) struct Source {
    label: &'static str,
    wgsl: &'static str,
    /// Which bindings of group 0 are written; they are numbered in order.
    writes: &'static [bool],
}

/// A kernel with its variants, each compiled when it is first used.
#[derive(Debug)]
struct Kernel {
    label: &'static str,
    wgsl: &'static str,
    path: ParamsPath,
    bindings: wgpu::BindGroupLayout,
    pipeline_layout: wgpu::PipelineLayout,
    pipelines: Mutex<HashMap<(Unit, Tile), wgpu::ComputePipeline>>,
}

/// Extents of a workgroup, for kernels that leave them open.
pub(crate) type Tile = Option<[u32; 3]>;

impl Kernel {
    fn new(device: &wgpu::Device, layouts: &Layouts, path: ParamsPath, source: &Source) -> Self {
        let entries: Vec<_> =
            (0..).zip(source.writes).map(|(binding, &writes)| storage(binding, !writes)).collect();
        let bindings = bind_layout(device, source.label, &entries);
        let (params, immediate_size) = match path {
            ParamsPath::Immediate => (None, PARAMS_BYTES),
            ParamsPath::Uniform => (Some(&layouts.params), 0),
        };
        let groups = [Some(&bindings), Some(&layouts.lists), params];
        let used = if params.is_some() { 3 } else { 2 };
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(source.label),
            bind_group_layouts: &groups[..used],
            immediate_size,
        });
        Self {
            label: source.label,
            wgsl: source.wgsl,
            path,
            bindings,
            pipeline_layout,
            pipelines: Mutex::default(),
        }
    }

    fn pipeline(&self, gpu: &Gpu, unit: Unit, tile: Tile) -> wgpu::ComputePipeline {
        let mut pipelines = self.pipelines.lock().unwrap_or_else(PoisonError::into_inner);
        pipelines
            .entry((unit, tile))
            .or_insert_with(|| {
                let module = gpu.device().create_shader_module(wgpu::ShaderModuleDescriptor {
                    label: Some(self.label),
                    source: wgpu::ShaderSource::Wgsl(variant(self.wgsl, unit, self.path).into()),
                });
                let names = ["tile_units", "tile_tokens", "tile_rows"];
                let constants: Vec<(&str, f64)> =
                    names.into_iter().zip(tile.into_iter().flatten().map(f64::from)).collect();
                gpu.device().create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                    label: Some(self.label),
                    layout: Some(&self.pipeline_layout),
                    module: &module,
                    entry_point: Some("main"),
                    compilation_options: wgpu::PipelineCompilationOptions {
                        constants: &constants,
                        ..Default::default()
                    },
                    cache: None,
                })
            })
            .clone()
    }

    fn bind(&self, gpu: &Gpu, resources: &[wgpu::BufferBinding<'_>]) -> wgpu::BindGroup {
        let entries: Vec<_> = (0..)
            .zip(resources)
            .map(|(binding, resource)| wgpu::BindGroupEntry {
                binding,
                resource: wgpu::BindingResource::Buffer(resource.clone()),
            })
            .collect();
        gpu.device().create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some(self.label),
            layout: &self.bindings,
            entries: &entries,
        })
    }

    /// Makes a dispatch ready: everything that can fail happens here, so that recording cannot.
    fn prepare(
        &self,
        gpu: &Gpu,
        variant: (Unit, Tile),
        bindings: wgpu::BindGroup,
        list: Option<Placed>,
        params: &[u32],
        workgroups: [u64; 3],
    ) -> Result<Dispatch> {
        let limit = gpu.limits().max_compute_workgroups_per_dimension;
        let mut checked = [0_u32; 3];
        for (checked, needed) in checked.iter_mut().zip(workgroups) {
            *checked = u32::try_from(needed)
                .ok()
                .filter(|&needed| needed <= limit)
                .ok_or(Error::TooManyWorkgroups { what: self.label, needed, limit })?;
        }
        let params = match self.path {
            ParamsPath::Immediate => Params::Immediate(bytemuck::cast_slice(params).to_vec()),
            ParamsPath::Uniform => Params::Uniform(gpu.place(params)?),
        };
        let (lists, list_lease) = match list {
            Some(placed) => (placed.lists, Some(placed.lease)),
            None => (gpu.unused_list(), None),
        };
        Ok(Dispatch {
            pipeline: self.pipeline(gpu, variant.0, variant.1),
            bindings,
            lists,
            list_lease,
            params,
            workgroups: checked,
        })
    }
}

#[derive(Debug)]
enum Params {
    Immediate(Vec<u8>),
    Uniform(Placed),
}

/// A checked dispatch with all that it needs, ready to be recorded.
#[derive(Debug)]
#[must_use = "nothing happens until the dispatch is recorded"]
pub(crate) struct Dispatch {
    pipeline: wgpu::ComputePipeline,
    bindings: wgpu::BindGroup,
    lists: wgpu::BindGroup,
    list_lease: Option<crate::arena::Lease>,
    params: Params,
    workgroups: [u32; 3],
}

impl Dispatch {
    /// Records the dispatch. Cannot fail.
    pub(crate) fn record(self, pass: &mut wgpu::ComputePass<'_>, ledger: &Ledger) {
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &self.bindings, &[]);
        pass.set_bind_group(1, &self.lists, &[]);
        let params_lease = match self.params {
            Params::Immediate(bytes) => {
                pass.set_immediates(0, &bytes);
                None
            }
            Params::Uniform(placed) => {
                pass.set_bind_group(2, &placed.params, &[placed.offset]);
                Some(placed.lease)
            }
        };
        let [x, y, z] = self.workgroups;
        pass.dispatch_workgroups(x, y, z);
        let leases: Leases = [self.list_lease, params_lease];
        ledger.record(pass, leases);
    }
}

/// The WGSL of a kernel for one unit and one way of passing parameters.
pub(crate) fn variant(wgsl: &str, unit: Unit, path: ParamsPath) -> String {
    let mut wgsl = wgsl.to_owned();
    if unit == Unit::Word {
        wgsl = wgsl.replace("alias Unit = vec4<u32>;", "alias Unit = u32;");
    }
    if path == ParamsPath::Immediate {
        wgsl = wgsl.replace(
            "@group(2) @binding(0) var<uniform> params: Params;",
            "var<immediate> params: Params;",
        );
    }
    wgsl
}

fn storage(binding: u32, read_only: bool) -> wgpu::BindGroupLayoutEntry {
    wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer {
            ty: wgpu::BufferBindingType::Storage { read_only },
            has_dynamic_offset: false,
            min_binding_size: None,
        },
        count: None,
    }
}

fn uniform(binding: u32) -> wgpu::BindGroupLayoutEntry {
    wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer {
            ty: wgpu::BufferBindingType::Uniform,
            has_dynamic_offset: true,
            min_binding_size: wgpu::BufferSize::new(u64::from(PARAMS_BYTES)),
        },
        count: None,
    }
}

fn bind_layout(
    device: &wgpu::Device,
    label: &str,
    entries: &[wgpu::BindGroupLayoutEntry],
) -> wgpu::BindGroupLayout {
    device
        .create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(label), entries })
}

/// A count that a kernel is told, in 32 bits.
fn narrow(count: usize) -> Result<u32> {
    u32::try_from(count).map_err(|_| Error::SizeOverflow { what: "layer" })
}

/// Row moves as a kernel reads them: (to, source) pairs.
fn pairs(moves: &[RowMove]) -> Vec<u32> {
    moves.iter().flat_map(|step| [step.to, step.from]).collect()
}

/// The whole of a cache buffer, as a binding.
fn whole(buffer: &wgpu::Buffer) -> wgpu::BufferBinding<'_> {
    buffer.as_entire_buffer_binding()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCES: [&Source; 3] = [&append::SOURCE, &gather::SOURCE, &repeat_interleave::SOURCE];

    /// Every shader that a device can be given, within what WebGPU's baseline has; immediates are only
    /// used where the device has them.
    #[test]
    fn every_variant_is_valid_for_the_baseline() {
        use naga::valid::{Capabilities, ValidationFlags, Validator};
        for source in SOURCES {
            for unit in [Unit::Vector, Unit::Word] {
                for (path, capabilities) in [
                    (ParamsPath::Uniform, Capabilities::empty()),
                    (ParamsPath::Immediate, Capabilities::IMMEDIATES),
                ] {
                    let wgsl = variant(source.wgsl, unit, path);
                    let name = format!("{}, {unit:?}, {path:?}", source.label);
                    let module = naga::front::wgsl::parse_str(&wgsl)
                        .unwrap_or_else(|error| panic!("{name}: {}", error.emit_to_string(&wgsl)));
                    Validator::new(ValidationFlags::all(), capabilities)
                        .validate(&module)
                        .unwrap_or_else(|error| panic!("{name}: {error:?}"));
                    let storage = module
                        .global_variables
                        .iter()
                        .filter(|(_, it)| matches!(it.space, naga::AddressSpace::Storage { .. }))
                        .count();
                    assert!(storage <= 8, "{name}: {storage} storage buffers");
                }
            }
        }
    }

    #[test]
    fn every_variant_differs_where_it_should() {
        for source in SOURCES {
            let plain = variant(source.wgsl, Unit::Vector, ParamsPath::Uniform);
            assert_eq!(plain, source.wgsl, "the file is the first variant");
            let word = variant(source.wgsl, Unit::Word, ParamsPath::Uniform);
            assert!(word.contains("alias Unit = u32;"), "{}", source.label);
            let immediate = variant(source.wgsl, Unit::Vector, ParamsPath::Immediate);
            assert!(immediate.contains("var<immediate> params"), "{}", source.label);
        }
    }
}
