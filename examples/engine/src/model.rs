//! A model: its weights on the GPU.

use anyhow::{Context, Result, ensure};
use wgpu_kvcache::wgpu::util::{BufferInitDescriptor, DeviceExt};
use wgpu_kvcache::{Gpu, wgpu};

use crate::answer::finished;
use crate::config::Config;
use crate::format::{Format, GROUP};
use crate::gguf::{GgufFile, Stored};
use crate::weights::{Matrix, Part, PartRange, PartWriter, most_groups};

/// Bytes in flight before the loader waits for the queue, which keeps a copy of each until then.
const IN_FLIGHT: usize = 8 << 20;

/// The weights of one layer.
#[derive(Clone, Debug)]
pub struct LayerWeights {
    /// Scale before attention: `[width]`.
    pub attention_norm: wgpu::Buffer,
    /// Query, key and value projections, stacked.
    pub qkv: Matrix,
    /// Scales of each query and each key head, `[2, head_dim]`, for models that normalise them.
    pub head_norms: Option<wgpu::Buffer>,
    /// The projection from the heads to the residual stream.
    pub attention_output: Matrix,
    /// Scale of its result, `[width]`, for models that normalise it.
    pub post_attention_norm: Option<wgpu::Buffer>,
    /// Scale before the feed-forward part: `[width]`.
    pub feed_forward_norm: wgpu::Buffer,
    /// Gate and up projections, stacked.
    pub gate_up: Matrix,
    /// The projection from the feed-forward part to the residual stream.
    pub down: Matrix,
    /// Scale of its result, `[width]`, for models that normalise it.
    pub post_feed_forward_norm: Option<wgpu::Buffer>,
}

/// A model on the GPU. Clones share the weights.
#[derive(Clone, Debug)]
pub struct Model {
    /// Its dimensions, and the choices of its architecture.
    pub config: Config,
    /// The embedding: a row for each token.
    pub embedding: Matrix,
    /// The layers, first to last.
    pub layers: Vec<LayerWeights>,
    /// Scale before the head: `[width]`.
    pub output_norm: wgpu::Buffer,
    /// The head; the embedding itself if the model ties the two.
    pub head: Matrix,
    /// Divisors of the rotary frequencies of global layers, `[head_dim / 2]`, for models that have them.
    pub rope_divisors: Option<Vec<f32>>,
    /// Bytes that the weights take on the GPU.
    pub bytes: u64,
}

impl Model {
    /// Reads and uploads all weights. `progress` receives the number of stored bytes that are done, of
    /// [`GgufFile::tensor_bytes`]; its error ends the load.
    ///
    /// # Errors
    ///
    /// If the file's model is not supported, a matrix is too large for the device, or `progress` fails.
    pub async fn load(
        gpu: &Gpu,
        file: &mut GgufFile,
        progress: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<Self> {
        let config = Config::from_gguf(file)?;
        let Config { width, head_dim, feed_forward, vocabulary, .. } = config;
        let queries = config.heads * head_dim;
        let keys = config.kv_heads * head_dim;
        let mut loader = Loader { gpu, file, progress, done: 0, in_flight: 0, bytes: 0 };

        let embedding = loader.matrix(&["token_embd"], &[vocabulary], width).await?;
        let head = if loader.file.has_tensor("output.weight") {
            loader.matrix(&["output"], &[vocabulary], width).await?
        } else {
            embedding.clone()
        };
        let output_norm = loader.vector("output_norm", width)?;
        let rope_divisors = if loader.file.has_tensor("rope_freqs.weight") {
            Some(loader.numbers("rope_freqs", head_dim / 2)?)
        } else {
            None
        };
        let post_norm = |loader: &mut Loader<'_>, name: &str| {
            config.has_post_norms.then(|| loader.vector(name, width)).transpose()
        };
        // Grows with the layers found in the file: the key may state any number.
        let mut layers = Vec::new();
        for layer in 0..config.layers {
            let name = |part: &str| format!("blk.{layer}.{part}");
            layers.push(LayerWeights {
                attention_norm: loader.vector(&name("attn_norm"), width)?,
                qkv: loader
                    .matrix(
                        &[&name("attn_q"), &name("attn_k"), &name("attn_v")],
                        &[queries, keys, keys],
                        width,
                    )
                    .await?,
                head_norms: if config.has_head_norms {
                    Some(loader.vectors(&[&name("attn_q_norm"), &name("attn_k_norm")], head_dim)?)
                } else {
                    None
                },
                attention_output: loader.matrix(&[&name("attn_output")], &[width], queries).await?,
                post_attention_norm: post_norm(&mut loader, &name("post_attention_norm"))?,
                feed_forward_norm: loader.vector(&name("ffn_norm"), width)?,
                gate_up: loader
                    .matrix(
                        &[&name("ffn_gate"), &name("ffn_up")],
                        &[feed_forward, feed_forward],
                        width,
                    )
                    .await?,
                down: loader.matrix(&[&name("ffn_down")], &[width], feed_forward).await?,
                post_feed_forward_norm: post_norm(&mut loader, &name("post_ffw_norm"))?,
            });
        }
        let bytes = loader.bytes;
        file.check_all_taken()?;
        Ok(Self { config, embedding, layers, output_norm, head, rope_divisors, bytes })
    }
}

impl Model {
    /// The matrices whose products are added to the residual stream as they are, or the other matrices.
    pub(crate) fn product_matrices(&self, are_added: bool) -> Vec<&Matrix> {
        let layers = || self.layers.iter();
        let outputs = layers().flat_map(|layer| [&layer.attention_output, &layer.down]);
        let outputs = outputs.filter(|_| are_added != self.config.has_post_norms);
        if are_added {
            outputs.collect()
        } else {
            let inputs = layers().flat_map(|layer| [&layer.qkv, &layer.gate_up]);
            inputs.chain([&self.head]).chain(outputs).collect()
        }
    }
}

/// Reads tensors from a file, checks their shapes, and uploads them.
struct Loader<'a> {
    gpu: &'a Gpu,
    file: &'a mut GgufFile,
    progress: &'a mut dyn FnMut(u64) -> Result<()>,
    /// Stored bytes read so far.
    done: u64,
    /// Bytes passed to the queue since the last wait.
    in_flight: usize,
    /// Bytes on the GPU.
    bytes: u64,
}

/// Consecutive rows of one tensor.
#[derive(Clone, Copy)]
struct Rows {
    tensor: Stored,
    first: usize,
    count: usize,
}

impl Loader<'_> {
    fn vector(&mut self, name: &str, length: usize) -> Result<wgpu::Buffer> {
        self.vectors(&[name], length)
    }

    /// Several vectors of the same length, one after the other.
    fn vectors(&mut self, names: &[&str], length: usize) -> Result<wgpu::Buffer> {
        let mut values = Vec::new();
        for name in names {
            values.extend(self.numbers(name, length)?);
        }
        let contents = bytemuck::cast_slice(&values);
        self.bytes += contents.len() as u64;
        Ok(self.gpu.device().create_buffer_init(&BufferInitDescriptor {
            label: Some(&names.join(" + ")),
            contents,
            usage: wgpu::BufferUsages::STORAGE,
        }))
    }

    fn numbers(&mut self, name: &str, length: usize) -> Result<Vec<f32>> {
        let tensor = self.tensor(name, 1, length)?;
        let values = self.file.read_vector(&tensor).with_context(|| format!("tensor {name}"))?;
        self.report(tensor.bytes)?;
        Ok(values)
    }

    fn tensor(&mut self, name: &str, outputs: usize, inputs: usize) -> Result<Stored> {
        let tensor = self.file.tensor(&format!("{name}.weight"))?;
        ensure!(
            (tensor.outputs, tensor.inputs) == (outputs, inputs),
            "tensor {name}.weight is {} x {}; the model's keys say {outputs} x {inputs}",
            tensor.outputs,
            tensor.inputs
        );
        Ok(tensor)
    }

    fn report(&mut self, bytes: u64) -> Result<()> {
        self.done += bytes;
        (self.progress)(self.done)
    }

    /// Several matrices with the same input, stacked into one.
    async fn matrix(&mut self, names: &[&str], outputs: &[usize], inputs: usize) -> Result<Matrix> {
        let label = names.join(" + ");
        // Neighbours in the same format become one part.
        let mut runs: Vec<(Format, Vec<Rows>)> = Vec::new();
        for (name, &outputs) in names.iter().zip(outputs) {
            let tensor = self.tensor(name, outputs, inputs)?;
            let format = tensor.format().with_context(|| format!("tensor {name}.weight"))?;
            let row_bytes = format.row_bytes(inputs);
            ensure!(
                row_bytes == Some(tensor.row_bytes()),
                "tensor {name}.weight has rows of {inputs} numbers, which are not whole blocks of {format:?}"
            );
            let rows = Rows { tensor, first: 0, count: outputs };
            match runs.last_mut() {
                Some((last, run)) if *last == format => run.push(rows),
                _ => runs.push((format, vec![rows])),
            }
        }
        let total = u32::try_from(outputs.iter().sum::<usize>())?;
        let mut parts = Vec::new();
        let mut first = 0;
        for (format, run) in runs {
            let most = most_groups(self.gpu, format, inputs);
            ensure!(
                most > 0,
                "{label} has rows of {inputs} numbers, too long for a texture of this device"
            );
            let mut rest = run;
            while !rest.is_empty() {
                let rows = take_rows(&mut rest, most * GROUP);
                let count = u32::try_from(rows.iter().map(|rows| rows.count).sum::<usize>())?;
                let range = PartRange { first, rows: count, total };
                parts.push(self.part(&label, format, inputs, &rows, range).await?);
                first += count;
            }
        }
        Ok(Matrix { parts })
    }

    /// Uploads some rows as one part of a matrix.
    async fn part(
        &mut self,
        label: &str,
        format: Format,
        inputs: usize,
        rows: &[Rows],
        range: PartRange,
    ) -> Result<Part> {
        let mut writer = PartWriter::new(self.gpu, label, format, inputs, range)?;
        let (mut stored, mut rest) = (Vec::new(), rows.to_vec());
        while !rest.is_empty() {
            stored.clear();
            for Rows { tensor, first, count } in take_rows(&mut rest, GROUP) {
                self.file.read_rows(&tensor, first, count, &mut stored)?;
            }
            self.in_flight += writer.write_group(&stored);
            self.report(stored.len() as u64)?;
            if self.in_flight > IN_FLIGHT {
                self.gpu.queue().submit([]);
                finished(self.gpu).await?;
                self.in_flight = 0;
            }
        }
        let (part, bytes) = writer.finish();
        self.bytes += bytes;
        Ok(part)
    }
}

/// Removes at most `most` rows from the front of a list.
fn take_rows(rest: &mut Vec<Rows>, most: usize) -> Vec<Rows> {
    let (mut taken, mut left) = (Vec::new(), most);
    while left > 0 && !rest.is_empty() {
        let count = rest[0].count.min(left);
        taken.push(Rows { count, ..rest[0] });
        left -= count;
        rest[0].first += count;
        rest[0].count -= count;
        if rest[0].count == 0 {
            rest.remove(0);
        }
    }
    taken
}
