//! Weight matrices on the GPU, in textures.

use anyhow::{Context, Result};
use wgpu_kvcache::wgpu::util::{BufferInitDescriptor, DeviceExt};
use wgpu_kvcache::{Gpu, wgpu};

use crate::format::{Format, GROUP, Layout, TEXEL};

/// The most bytes of a texture that drivers create reliably.
const PART_BYTES: usize = 256 << 20;
/// log2 of the fewest texels in a row of a texture: rows of 4 KiB, of which the last one may be incomplete.
const LEAST_SHIFT: u32 = 8;
/// Bytes that a writer collects before it passes them to the queue.
const PENDING: usize = 1 << 20;

/// A weight matrix on the GPU, `[outputs, inputs]`, with the numbers as the file stores them. Its rows are divided into
/// parts, each in one format and in textures of its own.
#[derive(Clone, Debug)]
pub struct Matrix {
    pub(crate) parts: Vec<Part>,
}

impl Matrix {
    /// The number of parts: more than one if a device's textures are too small, or if stacked tensors have different
    /// formats.
    pub fn parts(&self) -> usize {
        self.parts.len()
    }
}

/// Some rows of a matrix.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) format: Format,
    /// Groups of rows.
    pub(crate) groups: u32,
    /// `Part` in `weights.wgsl`.
    pub(crate) shape: wgpu::Buffer,
    pub(crate) quants: wgpu::TextureView,
    pub(crate) scales: wgpu::TextureView,
}

/// The rows of a matrix that a part holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PartRange {
    /// The first row.
    pub(crate) first: u32,
    /// The number of rows.
    pub(crate) rows: u32,
    /// Rows of the whole matrix.
    pub(crate) total: u32,
}

/// How many groups of rows of `inputs` numbers the textures of a device hold.
pub(crate) fn most_groups(gpu: &Gpu, format: Format, inputs: usize) -> usize {
    let layout = format.layout(inputs);
    let side = gpu.device().limits().max_texture_dimension_2d as usize;
    let most = side.saturating_mul(side).min(PART_BYTES / TEXEL);
    most / layout.group_quants().max(layout.group_scales()).max(1)
}

/// Fills the textures of a part, group by group.
pub(crate) struct PartWriter<'a> {
    gpu: &'a Gpu,
    label: &'a str,
    format: Format,
    layout: Layout,
    range: PartRange,
    row_bytes: usize,
    quants: TexelWriter<'a>,
    scales: TexelWriter<'a>,
    /// One group, in the layout of the textures.
    group_quants: Vec<u8>,
    group_scales: Vec<u8>,
}

impl<'a> PartWriter<'a> {
    /// Creates the textures of a part of at most [`most_groups`] groups.
    ///
    /// # Errors
    ///
    /// If rows of `inputs` numbers are not whole blocks.
    pub(crate) fn new(
        gpu: &'a Gpu,
        label: &'a str,
        format: Format,
        inputs: usize,
        range: PartRange,
    ) -> Result<Self> {
        let layout = format.layout(inputs);
        let row_bytes = format.row_bytes(inputs).context("rows are not whole blocks")?;
        let groups = (range.rows as usize).div_ceil(GROUP);
        let [quants, scales] = [layout.group_quants(), layout.group_scales()];
        Ok(Self {
            quants: TexelWriter::new(gpu, label, groups * quants),
            scales: TexelWriter::new(gpu, label, groups * scales),
            group_quants: vec![0; TEXEL * quants],
            group_scales: vec![0; TEXEL * scales],
            gpu,
            label,
            format,
            layout,
            range,
            row_bytes,
        })
    }

    /// Writes the next 32 rows, as the file stores them; fewer at the end. Returns how many bytes were passed to the
    /// queue.
    pub(crate) fn write_group(&mut self, rows: &[u8]) -> usize {
        let Self { layout, row_bytes, group_quants, group_scales, .. } = self;
        if rows.len() < *row_bytes * GROUP {
            group_quants.fill(0);
            group_scales.fill(0);
        }
        layout.write_group(rows, *row_bytes, group_quants, group_scales);
        self.quants.write(group_quants) + self.scales.write(group_scales)
    }

    /// The part, and its bytes on the GPU.
    pub(crate) fn finish(self) -> (Part, u64) {
        let (quants, quants_shift, quants_bytes) = self.quants.finish();
        let (scales, scales_shift, scales_bytes) = self.scales.finish();
        let PartRange { first, rows, total } = self.range;
        let steps = u32::try_from(self.layout.steps).unwrap_or(u32::MAX);
        let shape = [first, rows, total, steps, quants_shift, scales_shift, 0, 0];
        let shape = self.gpu.device().create_buffer_init(&BufferInitDescriptor {
            label: Some(self.label),
            contents: bytemuck::cast_slice(&shape),
            usage: wgpu::BufferUsages::UNIFORM,
        });
        let groups = rows.div_ceil(u32::try_from(GROUP).unwrap_or(u32::MAX));
        (Part { format: self.format, groups, shape, quants, scales }, quants_bytes + scales_bytes)
    }
}

/// A texture that is filled in order, row by row.
struct TexelWriter<'a> {
    queue: &'a wgpu::Queue,
    texture: wgpu::Texture,
    /// Texels in a row, as a power of two.
    shift: u32,
    /// The next row.
    row: u32,
    pending: Vec<u8>,
}

impl<'a> TexelWriter<'a> {
    /// A texture of `texels` texels, each four 32-bit words. The caller has checked that they fit.
    fn new(gpu: &'a Gpu, label: &str, texels: usize) -> Self {
        let side = gpu.device().limits().max_texture_dimension_2d;
        let mut shift = LEAST_SHIFT.min(side.ilog2());
        while texels.div_ceil(1 << shift) > side as usize {
            shift += 1;
        }
        let height = u32::try_from(texels.div_ceil(1 << shift)).unwrap_or(u32::MAX);
        let texture = gpu.device().create_texture(&wgpu::TextureDescriptor {
            label: Some(label),
            size: wgpu::Extent3d {
                // A format without scales has a texture of one texel that nothing reads.
                width: if texels == 0 { 1 } else { 1 << shift },
                height: height.max(1),
                depth_or_array_layers: 1,
            },
            mip_level_count: 1,
            sample_count: 1,
            dimension: wgpu::TextureDimension::D2,
            format: wgpu::TextureFormat::Rgba32Uint,
            usage: wgpu::TextureUsages::TEXTURE_BINDING | wgpu::TextureUsages::COPY_DST,
            view_formats: &[],
        });
        Self { queue: gpu.queue(), texture, shift, row: 0, pending: Vec::new() }
    }

    /// Appends texels, and returns how many bytes were passed to the queue.
    fn write(&mut self, bytes: &[u8]) -> usize {
        self.pending.extend_from_slice(bytes);
        if self.pending.len() < PENDING { 0 } else { self.flush() }
    }

    /// Passes the complete rows that are pending to the queue.
    fn flush(&mut self) -> usize {
        let row_bytes = TEXEL << self.shift;
        let rows = self.pending.len() / row_bytes;
        if rows == 0 {
            return 0;
        }
        let bytes = rows * row_bytes;
        let height = u32::try_from(rows).unwrap_or(u32::MAX);
        self.queue.write_texture(
            wgpu::TexelCopyTextureInfo {
                texture: &self.texture,
                mip_level: 0,
                origin: wgpu::Origin3d { x: 0, y: self.row, z: 0 },
                aspect: wgpu::TextureAspect::All,
            },
            &self.pending[..bytes],
            wgpu::TexelCopyBufferLayout {
                offset: 0,
                bytes_per_row: u32::try_from(row_bytes).ok(),
                rows_per_image: None,
            },
            wgpu::Extent3d { width: 1 << self.shift, height, depth_or_array_layers: 1 },
        );
        self.pending.drain(..bytes);
        self.row += height;
        bytes
    }

    /// Completes the last row with zeros, and returns the texture, its shift and its bytes.
    fn finish(mut self) -> (wgpu::TextureView, u32, u64) {
        let row_bytes = TEXEL << self.shift;
        self.pending.resize(self.pending.len().next_multiple_of(row_bytes), 0);
        self.flush();
        let bytes = self.texture.width() * self.texture.height();
        let view = self.texture.create_view(&wgpu::TextureViewDescriptor::default());
        (view, self.shift, u64::from(bytes) * TEXEL as u64)
    }
}
