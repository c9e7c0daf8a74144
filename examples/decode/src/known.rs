//! The models that `setup.sh` downloads, by name.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

/// A model that `setup.sh` downloads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// What `--model` calls it, here and in `run.sh` and `setup.sh`.
    pub name: &'static str,
    /// Its file's name.
    file: &'static str,
}

impl Known {
    /// `SmolLM2` 135M Instruct.
    pub const SMOLLM2: Self = Self { name: "smollm2", file: "SmolLM2-135M-Instruct.Q4_1.gguf" };
    /// Gemma 3 270M.
    pub const GEMMA3: Self = Self { name: "gemma3", file: "gemma-3-270m-q4_k_m.gguf" };
    /// All of them.
    pub const ALL: &[Self] = &[Self::SMOLLM2, Self::GEMMA3];

    /// Where `setup.sh` puts it.
    pub fn path(self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("model").join(self.file)
    }

    /// The file that a name or a path means.
    ///
    /// # Errors
    ///
    /// If it is a name of a model that is not there yet.
    pub fn resolve(model: &Path) -> Result<PathBuf> {
        let Some(known) = Self::ALL.iter().find(|known| Path::new(known.name) == model) else {
            return Ok(model.to_owned());
        };
        let (name, path) = (known.name, known.path());
        ensure!(
            path.is_file(),
            "the model {name} is not at {}; examples/decode/setup.sh --model {name} downloads it",
            path.display()
        );
        Ok(path)
    }
}
