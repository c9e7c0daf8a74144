//! The engine's calls, blocking until they complete.

use std::fs::File;
use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use pollster::block_on;
use wgpu_kvcache::{Gpu, KVCache, Layout};

use engine::{GgufFile, Model, Options, Rows};

/// Opens a model file and reads its keys and its list of tensors, but not their data.
///
/// # Errors
///
/// If the file cannot be read, is not a GGUF file, or ends before its last tensor does.
pub fn open(path: &Path) -> Result<GgufFile> {
    let name = path.display().to_string();
    let file = File::open(path).with_context(|| format!("cannot open {name}"))?;
    let found = file.metadata().with_context(|| format!("cannot read {name}"))?;
    ensure!(found.is_file(), "{name} is not a file; --model takes a GGUF file");
    GgufFile::read(&name, Arc::new(file))
}

/// Reads and uploads all weights: see [`Model::load`].
///
/// # Errors
///
/// As there.
pub fn load(gpu: &Gpu, file: &mut GgufFile, progress: &mut dyn FnMut(u64)) -> Result<Model> {
    let mut report = |bytes| {
        progress(bytes);
        Ok(())
    };
    block_on(Model::load(gpu, file, &mut report))
}

/// An [`engine::Engine`] whose calls block.
#[expect(missing_debug_implementations, reason = "it is not for printing")]
pub struct Engine(engine::Engine);

impl Engine {
    /// See [`engine::Engine::new`].
    ///
    /// # Errors
    ///
    /// As there; so every call here.
    pub fn new(gpu: &Gpu, model: &Model, options: Options) -> Result<Self> {
        engine::Engine::new(gpu, model, options).map(Self)
    }

    /// See [`engine::Engine::warm_up`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn warm_up(&mut self, layout: Layout) -> Result<()> {
        block_on(self.0.warm_up(layout, &mut |_, _| Ok(())))
    }

    /// See [`engine::Engine::next_tokens`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn next_tokens(
        &mut self,
        cache: &mut dyn KVCache,
        tokens: &[u32],
        batch: usize,
        banned: Option<u32>,
    ) -> Result<Vec<u32>> {
        block_on(self.0.next_tokens(cache, tokens, batch, banned))
    }

    /// See [`engine::Engine::logits`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn logits(
        &mut self,
        cache: &mut dyn KVCache,
        tokens: &[u32],
        batch: usize,
        rows: Rows<'_>,
    ) -> Result<Vec<f32>> {
        block_on(self.0.logits(cache, tokens, batch, rows))
    }
}

impl Deref for Engine {
    type Target = engine::Engine;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for Engine {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}
