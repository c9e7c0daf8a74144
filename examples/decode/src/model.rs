//! A Llama model: its dimensions, and its weights on the GPU.

use anyhow::{Context, Result, bail, ensure};
use wgpu_kvcache::wgpu::util::{BufferInitDescriptor, DeviceExt};
use wgpu_kvcache::{Gpu, wgpu};

use super::gguf::{GgufFile, Stored};

/// Blocks that lie side by side in a [`Matrix`]: `LANES` in `matmul.wgsl`.
pub const LANES: u32 = 8;

/// The dimensions of a model.
#[derive(Clone, Debug)]
pub struct Config {
    /// Layers.
    pub layers: usize,
    /// Elements of the residual stream.
    pub width: usize,
    /// Query heads.
    pub heads: usize,
    /// K/V heads: a divisor of `heads`.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Elements inside the feed-forward part.
    pub feed_forward: usize,
    /// Tokens that the model knows.
    pub vocabulary: usize,
    /// Tokens that the model can look back on.
    pub context: usize,
    /// Base of the rotary frequencies.
    pub rope_base: f64,
    /// What RMS norm adds under its root.
    pub epsilon: f64,
}

impl Config {
    /// Reads the dimensions, and refuses what the kernels do not serve.
    ///
    /// # Errors
    ///
    /// Where the file is of another architecture, lacks a key, or has dimensions that are not
    /// served.
    pub fn from_gguf(file: &GgufFile) -> Result<Self> {
        let architecture = file.text("general.architecture")?;
        ensure!(
            architecture == "llama",
            "the model is of the architecture {architecture}; llama is served"
        );
        if let Some(scaling) = file.optional_text("llama.rope.scaling.type") {
            ensure!(
                scaling == "none",
                "the model scales its positions ({scaling}), which is not served"
            );
        }
        let width = file.count("llama.embedding_length")?;
        let heads = file.count("llama.attention.head_count")?;
        ensure!(heads > 0, "llama.attention.head_count is 0");
        let config = Self {
            layers: file.count("llama.block_count")?,
            width,
            heads,
            kv_heads: file.optional_count("llama.attention.head_count_kv")?.unwrap_or(heads),
            head_dim: file.optional_count("llama.attention.key_length")?.unwrap_or(width / heads),
            feed_forward: file.count("llama.feed_forward_length")?,
            vocabulary: file.texts("tokenizer.ggml.tokens")?.len(),
            context: file.count("llama.context_length")?,
            rope_base: file.number("llama.rope.freq_base").unwrap_or(10_000.0),
            epsilon: file.number("llama.attention.layer_norm_rms_epsilon")?,
        };
        let Self { layers, kv_heads, head_dim, feed_forward, vocabulary, .. } = config;
        ensure!(layers > 0, "the model has no layers");
        ensure!(
            kv_heads > 0 && heads.is_multiple_of(kv_heads),
            "{heads} query heads cannot share {kv_heads} K/V heads"
        );
        ensure!(
            head_dim > 0 && head_dim <= 256 && head_dim.is_multiple_of(4),
            "a head of {head_dim} elements is not served: at most 256, a multiple of 4"
        );
        ensure!(
            [width, feed_forward, vocabulary].iter().all(|&n| n > 0 && n.is_multiple_of(4)),
            "widths of {width} and {feed_forward} and {vocabulary} tokens: multiples of 4 above 0 are served"
        );
        ensure!(
            heads.checked_mul(head_dim).is_some(),
            "{heads} heads of {head_dim} elements are more than this machine can count; fetch the file again"
        );
        for (key, number, is_sane) in [
            ("llama.rope.freq_base", config.rope_base, config.rope_base > 0.0),
            ("llama.attention.layer_norm_rms_epsilon", config.epsilon, config.epsilon >= 0.0),
        ] {
            ensure!(
                is_sane && number.is_finite(),
                "{key} is {number}, which is not sane; fetch the file again"
            );
        }
        for key in ["llama.rope.dimension_count", "llama.attention.value_length"] {
            let found = file.optional_count(key)?.unwrap_or(head_dim);
            ensure!(
                found == head_dim,
                "{key} is {found}; only {head_dim}, a whole head, is served"
            );
        }
        Ok(config)
    }
}

/// A weight matrix on the GPU, `[outputs, inputs]`, in the order that `matmul.wgsl` wants.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// `[outputs / 4 / LANES, inputs / 4, LANES]` of blocks of four inputs by four outputs.
    pub weight: wgpu::Buffer,
    /// The two dimensions, as the kernel reads them.
    pub shape: wgpu::Buffer,
    /// Rows of the matrix: elements of its product.
    pub outputs: u32,
}

/// The weights of one layer.
#[derive(Clone, Debug)]
pub struct LayerWeights {
    /// Scale before attention: `[width]`.
    pub attention_norm: wgpu::Buffer,
    /// Query, key and value projections, one below the other.
    pub qkv: Matrix,
    /// From the heads back to the residual stream.
    pub attention_output: Matrix,
    /// Scale before the feed-forward part: `[width]`.
    pub feed_forward_norm: wgpu::Buffer,
    /// Gate and up projections, one below the other.
    pub gate_up: Matrix,
    /// From the feed-forward part back to the residual stream.
    pub down: Matrix,
}

/// A model on the GPU. Clones share the weights.
#[derive(Clone, Debug)]
pub struct Model {
    /// Its dimensions.
    pub config: Config,
    /// The embedding: a row for each token.
    pub embedding: Matrix,
    /// The layers, first to last.
    pub layers: Vec<LayerWeights>,
    /// Scale before the head: `[width]`.
    pub output_norm: wgpu::Buffer,
    /// The head: the embedding itself, where the model ties the two.
    pub head: Matrix,
    /// Divisors of the rotary frequencies, `[head_dim / 2]`, for models that have them.
    pub rope_divisors: Option<Vec<f32>>,
}

impl Model {
    /// Reads and uploads all weights. `progress` hears of stored bytes done, out of
    /// [`GgufFile::tensor_bytes`].
    ///
    /// # Errors
    ///
    /// Where the file does not hold a model that is served, or a matrix is too large for the
    /// device.
    pub fn load(gpu: &Gpu, file: &mut GgufFile, progress: &mut dyn FnMut(u64)) -> Result<Self> {
        let config = Config::from_gguf(file)?;
        let Config { width, head_dim, feed_forward, vocabulary, .. } = config;
        let queries = config.heads * head_dim;
        let keys = config.kv_heads * head_dim;
        let mut loader = Loader { gpu, file, progress, done: 0 };

        let embedding = loader.matrix(&["token_embd"], &[vocabulary], width)?;
        let head = if loader.file.has_tensor("output.weight") {
            loader.matrix(&["output"], &[vocabulary], width)?
        } else {
            embedding.clone()
        };
        let output_norm = loader.vector("output_norm", width)?;
        let rope_divisors = if loader.file.has_tensor("rope_freqs.weight") {
            Some(loader.rows(&["rope_freqs"], &[1], head_dim / 2)?)
        } else {
            None
        };
        // Grows with what the file has: the key may promise any number of layers.
        let mut layers = Vec::new();
        for layer in 0..config.layers {
            let name = |part: &str| format!("blk.{layer}.{part}");
            layers.push(LayerWeights {
                attention_norm: loader.vector(&name("attn_norm"), width)?,
                qkv: loader.matrix(
                    &[&name("attn_q"), &name("attn_k"), &name("attn_v")],
                    &[queries, keys, keys],
                    width,
                )?,
                attention_output: loader.matrix(&[&name("attn_output")], &[width], queries)?,
                feed_forward_norm: loader.vector(&name("ffn_norm"), width)?,
                gate_up: loader.matrix(
                    &[&name("ffn_gate"), &name("ffn_up")],
                    &[feed_forward, feed_forward],
                    width,
                )?,
                down: loader.matrix(&[&name("ffn_down")], &[width], feed_forward)?,
            });
        }
        file.check_all_taken()?;
        Ok(Self { config, embedding, layers, output_norm, head, rope_divisors })
    }
}

/// Takes tensors from a file, checks their shapes, and uploads them.
struct Loader<'a> {
    gpu: &'a Gpu,
    file: &'a mut GgufFile,
    progress: &'a mut dyn FnMut(u64),
    done: u64,
}

impl Loader<'_> {
    fn vector(&mut self, name: &str, length: usize) -> Result<wgpu::Buffer> {
        let values = self.rows(&[name], &[1], length)?;
        self.upload(name, &values, wgpu::BufferUsages::STORAGE)
    }

    /// Some matrices of the same input, one below the other, as one.
    fn matrix(&mut self, names: &[&str], outputs: &[usize], inputs: usize) -> Result<Matrix> {
        let rows = self.rows(names, outputs, inputs)?;
        let label = names.join(" + ");
        let blocks = by_blocks(&rows, outputs.iter().sum(), inputs);
        let outputs = u32::try_from(outputs.iter().sum::<usize>())?;
        let dimensions = [outputs / 4, u32::try_from(inputs / 4)?];
        Ok(Matrix {
            weight: self.upload(&label, &blocks, wgpu::BufferUsages::STORAGE)?,
            shape: self.upload(
                &format!("{label} shape"),
                &dimensions,
                wgpu::BufferUsages::UNIFORM,
            )?,
            outputs,
        })
    }

    /// The rows of some tensors, `[outputs, inputs]` each, one below the other.
    fn rows(&mut self, names: &[&str], outputs: &[usize], inputs: usize) -> Result<Vec<f32>> {
        let mut rows = Vec::new();
        for (name, &outputs) in names.iter().zip(outputs) {
            let (Stored { values, outputs: has_outputs, inputs: has_inputs }, bytes) =
                self.file.tensor(&format!("{name}.weight"))?;
            ensure!(
                (has_outputs, has_inputs) == (outputs, inputs) && values.len() == outputs * inputs,
                "tensor {name}.weight is {has_outputs} x {has_inputs}; the model's keys say {outputs} x {inputs}"
            );
            rows.extend(values);
            self.done += bytes;
            (self.progress)(self.done);
        }
        Ok(rows)
    }

    fn upload<T: bytemuck::NoUninit>(
        &self,
        label: &str,
        data: &[T],
        usage: wgpu::BufferUsages,
    ) -> Result<wgpu::Buffer> {
        let contents = bytemuck::cast_slice(data);
        let limits = self.gpu.device().limits();
        let limit = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
        let size = u64::try_from(contents.len()).context("a buffer's size")?;
        if size > limit {
            bail!(
                "{label} takes {size} bytes as f32, and the device binds at most {limit} at once; take a smaller model"
            );
        }
        Ok(self.gpu.device().create_buffer_init(&BufferInitDescriptor {
            label: Some(label),
            contents,
            usage,
        }))
    }
}

/// From `[outputs, inputs]` to `[outputs / 4 / LANES, inputs / 4, LANES]` of blocks, each four
/// inputs by four outputs. The last blocks are filled up with zeros.
fn by_blocks(rows: &[f32], outputs: usize, inputs: usize) -> Vec<f32> {
    let lanes = LANES as usize;
    let mut blocks = vec![0.0; outputs.next_multiple_of(4 * lanes) * inputs];
    for (output, row) in rows.chunks_exact(inputs).enumerate() {
        let group = output / (4 * lanes);
        let lane = output / 4 % lanes;
        for (input, weights) in row.chunks_exact(4).enumerate() {
            let block = 16 * ((group * (inputs / 4) + input) * lanes + lane);
            for (column, &weight) in weights.iter().enumerate() {
                blocks[block + 4 * column + output % 4] = weight;
            }
        }
    }
    blocks
}
