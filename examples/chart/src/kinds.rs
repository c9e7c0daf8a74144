//! The kinds of cache in the chart.

use anyhow::Result;
use wgpu_kvcache::{
    CacheOptions, CachePosition, DType, DynamicKVCache, Gpu, KVCache, PagedKVCache, StaticKVCache,
    Tensor, TensorView, wgpu,
};

#[path = "../../../benches/support/concat.rs"]
mod concat;
use concat::ConcatCache;

/// A kind of cache in the chart.
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    /// Red, green, blue.
    pub(crate) colour: (u8, u8, u8),
    /// Makes an empty cache with room for so many tokens.
    pub(crate) make: fn(&Gpu, Shape, usize) -> Result<Box<dyn Subject>>,
}

/// All kinds, in the order of the legend. The colours can be told apart by colour-blind readers.
pub(crate) const KINDS: &[Kind] = &[
    Kind {
        name: "DynamicKVCache",
        colour: (0, 114, 178),
        make: |gpu, shape, room| {
            Ours::boxed(
                gpu,
                shape,
                Box::new(
                    DynamicKVCache::with_options(gpu, CacheOptions::default().with_capacity(room))
                        .expect("a capacity"),
                ),
            )
        },
    },
    Kind {
        name: "StaticKVCache",
        colour: (0, 158, 115),
        make: |gpu, shape, room| {
            Ours::boxed(
                gpu,
                shape,
                Box::new(
                    StaticKVCache::with_options(
                        gpu,
                        CacheOptions::default()
                            .with_max_cache_len(room)
                            .with_num_layers(shape.layers),
                    )
                    .expect("both options"),
                ),
            )
        },
    },
    Kind {
        name: "PagedKVCache",
        colour: (204, 121, 167),
        make: |gpu, shape, _| Ours::boxed(gpu, shape, Box::new(PagedKVCache::new(gpu))),
    },
    Kind {
        name: "concatenating cache",
        colour: (213, 94, 0),
        make: |gpu, Shape { layers, batch, heads, dim }, _| {
            Ok(Box::new(ConcatCache::new(gpu, layers, batch, heads, dim)))
        },
    },
];

#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) layers: usize,
    pub(crate) batch: usize,
    pub(crate) heads: usize,
    pub(crate) dim: usize,
}

/// A cache, as the measurements need it.
pub(crate) trait Subject {
    /// Makes every layer `tokens` tokens long.
    fn hold(&mut self, tokens: usize) -> Result<()>;
    /// One token into every layer.
    fn step(&mut self, pass: &mut wgpu::ComputePass<'_>, one: &[Tensor; 2]) -> Result<()>;
    fn reorder(&mut self, pass: &mut wgpu::ComputePass<'_>, rows: &[u32]) -> Result<()>;
    /// Bytes of K and V written so far.
    fn bytes_moved(&self) -> u64;
}

/// K and V of `tokens` tokens, [B, H, T, D].
pub(crate) fn inputs(
    gpu: &Gpu,
    Shape { batch, heads, dim, .. }: Shape,
    tokens: usize,
) -> Result<[Tensor; 2]> {
    let data = vec![0.5_f32; batch * heads * tokens * dim];
    let shape = [batch, heads, tokens, dim];
    Ok([gpu.upload(&data, &shape)?, gpu.upload(&data, &shape)?])
}

/// Any cache of this crate.
struct Ours {
    gpu: Gpu,
    shape: Shape,
    cache: Box<dyn KVCache>,
    /// A prompt that layers are filled from, piece by piece.
    prompt: [Tensor; 2],
}

impl Ours {
    const PROMPT: usize = 512;

    fn boxed(gpu: &Gpu, shape: Shape, cache: Box<dyn KVCache>) -> Result<Box<dyn Subject>> {
        let prompt = inputs(gpu, shape, Self::PROMPT)?;
        Ok(Box::new(Self { gpu: gpu.clone(), shape, cache, prompt }))
    }

    fn update(
        &mut self,
        pass: &mut wgpu::ComputePass<'_>,
        [key, value]: &[TensorView<'_>; 2],
    ) -> Result<()> {
        for layer in 0..self.shape.layers {
            self.cache.update(pass, key, value, layer, CachePosition::Append)?;
        }
        Ok(())
    }
}

impl Subject for Ours {
    fn hold(&mut self, tokens: usize) -> Result<()> {
        self.cache.truncate(tokens);
        let Shape { batch, heads, dim, .. } = self.shape;
        let gpu = self.gpu.clone();
        let [key, value] = [0, 1].map(|part| self.prompt[part].buffer().clone());
        let mut held = self.cache.get_seq_length(0)?;
        while held < tokens {
            let shape = [batch, heads, Self::PROMPT.min(tokens - held), dim];
            let views = [
                TensorView::new(&key, DType::F32, &shape)?,
                TensorView::new(&value, DType::F32, &shape)?,
            ];
            gpu.submit_pass("prompt", |pass| self.update(pass, &views))?;
            held += shape[2];
        }
        Ok(())
    }

    fn step(&mut self, pass: &mut wgpu::ComputePass<'_>, one: &[Tensor; 2]) -> Result<()> {
        self.update(pass, &[one[0].view(), one[1].view()])
    }

    fn reorder(&mut self, pass: &mut wgpu::ComputePass<'_>, rows: &[u32]) -> Result<()> {
        Ok(self.cache.reorder_cache(pass, rows)?)
    }

    fn bytes_moved(&self) -> u64 {
        self.cache.stats().bytes_moved
    }
}

impl Subject for ConcatCache {
    fn hold(&mut self, tokens: usize) -> Result<()> {
        self.fill(tokens);
        Ok(())
    }

    fn step(&mut self, pass: &mut wgpu::ComputePass<'_>, [key, value]: &[Tensor; 2]) -> Result<()> {
        ConcatCache::step(self, pass, key.buffer(), value.buffer());
        Ok(())
    }

    fn reorder(&mut self, pass: &mut wgpu::ComputePass<'_>, rows: &[u32]) -> Result<()> {
        ConcatCache::reorder(self, pass, rows);
        Ok(())
    }

    fn bytes_moved(&self) -> u64 {
        ConcatCache::bytes_moved(self)
    }
}
