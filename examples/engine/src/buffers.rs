//! The engine's working memory.

use anyhow::{Result, ensure};
use wgpu_kvcache::wgpu::util::{BufferInitDescriptor, DeviceExt};
use wgpu_kvcache::{DType, Gpu, TensorView, wgpu};

use crate::config::Config;
use crate::engine::Options;
use crate::model::Model;

/// The most tokens of a prompt in one step; longer prompts take several steps. It bounds the size of the buffers.
const PROMPT_ROWS: usize = 256;

/// Rows that the matrix product computes at a time. Its outputs have space for a multiple of this.
const TILE: usize = 8;

/// The most panels of a step. A matrix product reads whole steps.
const PANELS: usize = 8;

/// Bytes from one set of parameters to the next in a uniform buffer: the alignment that every device accepts.
pub(crate) const SLOT: usize = 256;

/// Working memory, reused by every layer and step. `rows` are the new tokens of a step: those of all batch rows,
/// `[batch, tokens]`, or the packed tokens of all sequences.
pub(crate) struct Buffers {
    /// The most rows of a step.
    pub(crate) max_rows: usize,
    /// Two slots of parameters: for the layers, whose rows are all new tokens, and for the head,
    /// whose rows are last tokens.
    pub(crate) stage: wgpu::Buffer,
    /// Token ids: `[rows]`.
    pub(crate) tokens: wgpu::Buffer,
    /// The position of each token: `[rows]`.
    pub(crate) positions: wgpu::Buffer,
    /// The row of each last token whose logits are wanted: `[batch]`.
    pub(crate) ends: wgpu::Buffer,
    /// Cosines and sines of each position in global layers: `[max_tokens, head_dim / 2, 2]`.
    pub(crate) turns: wgpu::Buffer,
    /// The same in local layers, if the model has any.
    pub(crate) local_turns: Option<wgpu::Buffer>,
    /// The residual stream: `[rows, width]`.
    pub(crate) hidden: wgpu::Buffer,
    /// Its RMS norm. A matrix product reads its input from a texture.
    pub(crate) normed: wgpu::TextureView,
    /// The fused projection: `[rows, heads + 2 * kv_heads, head_dim]`.
    pub(crate) projected: wgpu::Buffer,
    /// Queries after the rotary embedding: `[rows, heads, head_dim]`.
    pub(crate) query: wgpu::Buffer,
    /// New keys: `[rows, kv_heads, head_dim]`. The cache converts them to its format as it writes them.
    pub(crate) key: wgpu::Buffer,
    /// New values, as the keys.
    pub(crate) value: wgpu::Buffer,
    /// The output of attention: `[rows, heads, head_dim]`.
    pub(crate) mixed: wgpu::Buffer,
    /// The same, for the matrix product.
    pub(crate) mixed_texels: wgpu::TextureView,
    /// The result of attention or of the feed-forward part before its norm, if it has one: `[rows, width]`.
    pub(crate) branch: wgpu::Buffer,
    /// Gate and up projections: `[rows, 2, feed_forward]`.
    pub(crate) gate_up: wgpu::Buffer,
    /// Their activation: `[rows, feed_forward]`.
    pub(crate) activated: wgpu::TextureView,
    /// The norm of each last token: `[batch, width]`.
    pub(crate) last: wgpu::TextureView,
    /// `[batch, vocabulary]`.
    pub(crate) logits: wgpu::Buffer,
    /// The best token after each last token: `[batch]`.
    pub(crate) chosen: wgpu::Buffer,
    /// A mappable buffer for results, as large as the logits.
    pub(crate) readback: wgpu::Buffer,
}

impl Buffers {
    /// Creates the buffers for a model.
    ///
    /// # Errors
    ///
    /// If a buffer would be larger than the device binds at once.
    pub(crate) fn new(gpu: &Gpu, model: &Model, options: Options) -> Result<Self> {
        let Config { width, heads, kv_heads, head_dim, feed_forward, vocabulary, .. } =
            model.config;
        let storage = wgpu::BufferUsages::STORAGE;
        let all = options.max_tokens.saturating_mul(options.max_batch);
        let max_rows = all.min(PROMPT_ROWS).max(options.max_batch);
        let rows = max_rows.next_multiple_of(TILE);
        let batch = options.max_batch.next_multiple_of(TILE);
        let floats =
            |label, rows: usize, elements: usize| buffer(gpu, label, 4 * rows * elements, storage);
        let texels = |label, rows: usize, elements| texture(gpu, label, rows, elements);
        let written = wgpu::BufferUsages::COPY_DST;
        let read = storage | wgpu::BufferUsages::COPY_SRC;
        let turns = |base, divisors: Option<&[f32]>| -> Result<wgpu::Buffer> {
            let turns = turns(head_dim, base, divisors.unwrap_or_default(), options.max_tokens)?;
            Ok(gpu.device().create_buffer_init(&BufferInitDescriptor {
                label: Some("rope turns"),
                contents: bytemuck::cast_slice(&turns),
                usage: storage,
            }))
        };
        Ok(Self {
            max_rows,
            stage: buffer(gpu, "stage", 2 * SLOT, wgpu::BufferUsages::UNIFORM | written)?,
            tokens: buffer(gpu, "tokens", 4 * rows, storage | written)?,
            positions: buffer(gpu, "positions", 4 * rows, storage | written)?,
            ends: buffer(gpu, "last tokens", 4 * batch, storage | written)?,
            turns: turns(model.config.rope_base, model.rope_divisors.as_deref())?,
            local_turns: model
                .config
                .local
                .map(|local| turns(local.rope_base, None))
                .transpose()?,
            hidden: floats("hidden", rows, width)?,
            normed: texels("normed", rows, width)?,
            projected: floats("projected", rows, (heads + 2 * kv_heads) * head_dim)?,
            query: floats("query", rows, heads * head_dim)?,
            key: floats("new keys", rows, kv_heads * head_dim)?,
            value: floats("new values", rows, kv_heads * head_dim)?,
            mixed: floats("mixed", rows, heads * head_dim)?,
            mixed_texels: texels("mixed", rows, heads * head_dim)?,
            branch: floats("branch", rows, width)?,
            gate_up: floats("gate and up", rows, 2 * feed_forward)?,
            activated: texels("activated", rows, feed_forward)?,
            last: texels("normed, last tokens", batch, width)?,
            logits: buffer(gpu, "logits", 4 * batch * vocabulary, read)?,
            chosen: buffer(gpu, "chosen tokens", 4 * batch, read)?,
            readback: buffer(
                gpu,
                "readback",
                4 * batch * vocabulary,
                wgpu::BufferUsages::MAP_READ | written,
            )?,
        })
    }

    /// The new keys and values of a step, as inputs of the cache. They stay in the projection's order,
    /// `[batch, tokens, heads, elements]`, which is what `bthd` declares; nothing is transposed.
    ///
    /// # Errors
    ///
    /// If an extent is zero.
    pub(crate) fn new_keys_and_values(
        &self,
        config: &Config,
        batch: usize,
        count: usize,
    ) -> Result<(TensorView<'_>, TensorView<'_>)> {
        let shape = [batch, count, config.kv_heads, config.head_dim];
        Ok((
            TensorView::bthd(&self.key, DType::F32, &shape)?,
            TensorView::bthd(&self.value, DType::F32, &shape)?,
        ))
    }

    /// The queries and the output of attention of a step. Both are in the projections' order, so `bthd` declares them,
    /// too.
    ///
    /// # Errors
    ///
    /// If an extent is zero.
    pub(crate) fn query_and_mixed(
        &self,
        config: &Config,
        batch: usize,
        count: usize,
    ) -> Result<(TensorView<'_>, TensorView<'_>)> {
        let shape = [batch, count, config.heads, config.head_dim];
        Ok((
            TensorView::bthd(&self.query, DType::F32, &shape)?,
            TensorView::bthd(&self.mixed, DType::F32, &shape)?,
        ))
    }
}

/// A texture of `rows` rows of at least `elements` numbers, four per texel. Its width is a multiple of the panels of a
/// step, so that a matrix product reads zeros past the last element.
fn texture(gpu: &Gpu, label: &str, rows: usize, elements: usize) -> Result<wgpu::TextureView> {
    let limit = gpu.device().limits().max_texture_dimension_2d;
    let [width, height] = [elements.next_multiple_of(PANELS * 32) / 4, rows].map(u32::try_from);
    let (width, height) = (width?, height?);
    ensure!(
        width <= limit && height <= limit,
        "the texture of {label} would be {width} x {height}, but the device allows at most {limit} in each dimension; use fewer tokens or batch rows"
    );
    let texture = gpu.device().create_texture(&wgpu::TextureDescriptor {
        label: Some(label),
        size: wgpu::Extent3d { width, height, depth_or_array_layers: 1 },
        mip_level_count: 1,
        sample_count: 1,
        dimension: wgpu::TextureDimension::D2,
        format: wgpu::TextureFormat::Rgba32Float,
        usage: wgpu::TextureUsages::TEXTURE_BINDING | wgpu::TextureUsages::STORAGE_BINDING,
        view_formats: &[],
    });
    Ok(texture.create_view(&wgpu::TextureViewDescriptor::default()))
}

fn buffer(gpu: &Gpu, label: &str, bytes: usize, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer> {
    let size = u64::try_from(bytes)?;
    let limits = gpu.device().limits();
    let limit = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
    ensure!(
        size <= limit,
        "the buffer of {label} would take {size} bytes, but the device binds at most {limit} at once; use fewer tokens or batch rows"
    );
    Ok(gpu.device().create_buffer(&wgpu::BufferDescriptor {
        label: Some(label),
        size,
        usage,
        mapped_at_creation: false,
    }))
}

/// The cosine and sine of the rotary angle of each pair of elements at each position: `[positions, head_dim / 2, 2]`.
/// A shader's own powers and sines are too inaccurate at high positions, so they are computed here, in `f64`.
fn turns(head_dim: usize, base: f64, divisors: &[f32], positions: usize) -> Result<Vec<f32>> {
    let pairs = u32::try_from(head_dim / 2)?;
    let mut frequencies: Vec<f64> =
        (0..pairs).map(|pair| base.powf(-f64::from(pair) / f64::from(pairs))).collect();
    for (frequency, &divisor) in frequencies.iter_mut().zip(divisors) {
        *frequency /= f64::from(divisor);
    }
    #[expect(
        clippy::cast_possible_truncation,
        reason = "a cosine or sine, rounded to what the shader takes"
    )]
    let turns = (0..u32::try_from(positions)?)
        .flat_map(|position| {
            frequencies.iter().map(move |frequency| f64::from(position) * frequency)
        })
        .flat_map(|angle| [angle.cos() as f32, angle.sin() as f32])
        .collect();
    Ok(turns)
}
