//! A GGUF file: its keys, and its tensors as stored.

use std::collections::HashSet;
use std::io::{BufReader, ErrorKind, Read, Seek, SeekFrom};

use anyhow::{Context, Result, anyhow, bail, ensure};
use gguf_rs_lib::format::{Metadata, MetadataValue};
use gguf_rs_lib::prelude::{GGUFError, GGUFFileReader, GGUFTensorType};
use gguf_rs_lib::reader::GGUFReaderConfig;

use crate::format::{self, Format};

/// The most bytes of memory per byte of the file's keys. Lists of one-byte numbers take most.
const DECODED: u64 = 64;

/// The location of a matrix in the file: `[outputs, inputs]`, row by row. A vector has one output.
#[derive(Clone, Copy, Debug)]
pub struct Stored {
    kind: GGUFTensorType,
    /// Offset of the first byte in the file.
    start: u64,
    /// Bytes of the whole matrix.
    pub bytes: u64,
    /// Rows: GGUF's second dimension.
    pub outputs: usize,
    /// Elements per row: GGUF's first dimension.
    pub inputs: usize,
}

impl Stored {
    /// The format of its numbers.
    ///
    /// # Errors
    ///
    /// If it is not supported.
    pub fn format(&self) -> Result<Format> {
        Format::of(self.kind)
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        // `open` has checked that the whole matrix is inside the file, so a row's size fits.
        usize::try_from(self.bytes / (self.outputs as u64).max(1)).unwrap_or(usize::MAX)
    }
}

/// The bytes of a file.
trait Source: Read + Seek {}

impl<T: Read + Seek> Source for T {}

/// An open GGUF file. All of its tensors are checked to be inside the file.
#[expect(missing_debug_implementations, reason = "it is not for printing")]
pub struct GgufFile {
    /// What messages call it.
    name: String,
    reader: GGUFFileReader<BufReader<Box<dyn Source>>>,
    /// The same source, to read tensors in pieces.
    data: Box<dyn Source>,
    /// Tensors that the engine has used, to find those that it does not know.
    taken: HashSet<String>,
}

impl GgufFile {
    /// Reads a file's keys and its list of tensors, but not their data. Messages call it `name`; `source` are its
    /// bytes. Clones of a source may share its position.
    ///
    /// # Errors
    ///
    /// If the source cannot be read, is not a GGUF file, or ends before its last tensor does.
    pub fn read<S: Read + Seek + Clone + 'static>(name: &str, source: S) -> Result<Self> {
        let mut data: Box<dyn Source> = Box::new(source.clone());
        let size = data.seek(SeekFrom::End(0)).and_then(|size| data.rewind().map(|()| size));
        let size = size.with_context(|| format!("cannot read {name}"))?;

        // The reader's own check of the ranges does not report how much is missing, so ours comes first.
        let mut config = GGUFReaderConfig { validate_integrity: false, ..Default::default() };
        // The header may state any number of keys, and the reader allocates memory for them before it reads them. So
        // the memory is bounded in proportion to the file.
        config.max_decoded_metadata_size = usize::try_from(size.saturating_mul(DECODED))
            .unwrap_or(usize::MAX)
            .min(config.max_decoded_metadata_size);
        let file: Box<dyn Source> = Box::new(source);
        let mut reader = GGUFFileReader::with_config(BufReader::new(file), config)
            .map_err(|error| explain(error, name, size))?;
        let mut needed = 0;
        for tensor in reader.tensor_infos() {
            let bytes =
                tensor.checked_expected_data_size().map_err(|error| explain(error, name, size))?;
            let end = reader
                .tensor_data_offset()
                .checked_add(tensor.data_offset())
                .and_then(|start| start.checked_add(bytes))
                .ok_or_else(|| {
                    anyhow!("{name}: the offset of tensor {} is not sane", tensor.name())
                })?;
            needed = needed.max(end);
        }
        ensure!(
            needed <= size,
            "{name} is cut short: its tensors need {needed} bytes, and the file has {size}; fetch it again"
        );
        reader.validate_integrity().map_err(|error| explain(error, name, size))?;
        Ok(Self { name: name.to_owned(), reader, data, taken: HashSet::new() })
    }

    /// The key's text.
    ///
    /// # Errors
    ///
    /// If the file lacks the key, or its value has another type.
    pub fn text(&self, key: &str) -> Result<&str> {
        self.keys().get_string(key).ok_or_else(|| self.missing(key, "a text"))
    }

    /// The key's text, if the file has it.
    pub fn optional_text(&self, key: &str) -> Option<&str> {
        self.keys().get_string(key)
    }

    /// The key's whole number.
    ///
    /// # Errors
    ///
    /// As for [`Self::text`].
    pub fn count(&self, key: &str) -> Result<usize> {
        self.optional_count(key)?.ok_or_else(|| self.missing(key, "a whole number"))
    }

    /// The key's whole number, if the file has it.
    ///
    /// # Errors
    ///
    /// If the number is too large for this machine.
    pub fn optional_count(&self, key: &str) -> Result<Option<usize>> {
        let number = self.keys().get_u64(key).map(usize::try_from).transpose();
        number.with_context(|| format!("{}: {key} is too large", self.name))
    }

    /// The key's number.
    ///
    /// # Errors
    ///
    /// As for [`Self::text`].
    pub fn number(&self, key: &str) -> Result<f64> {
        self.keys().get_f64(key).ok_or_else(|| self.missing(key, "a number"))
    }

    /// The key's truth value, if the file has it.
    pub fn flag(&self, key: &str) -> Option<bool> {
        self.keys().get_bool(key)
    }

    /// The key's list of texts.
    ///
    /// # Errors
    ///
    /// As for [`Self::text`].
    pub fn texts(&self, key: &str) -> Result<Vec<&str>> {
        self.list(key, "a list of texts", MetadataValue::as_str)
    }

    /// The key's list of whole numbers.
    ///
    /// # Errors
    ///
    /// As for [`Self::text`].
    pub fn integers(&self, key: &str) -> Result<Vec<i64>> {
        self.list(key, "a list of whole numbers", MetadataValue::as_i64)
    }

    /// The key's list of numbers.
    ///
    /// # Errors
    ///
    /// As for [`Self::text`].
    pub fn numbers(&self, key: &str) -> Result<Vec<f64>> {
        self.list(key, "a list of numbers", MetadataValue::as_f64)
    }

    /// Whether the file has a tensor of that name.
    pub fn has_tensor(&self, name: &str) -> bool {
        self.reader.get_tensor_info(name).is_some()
    }

    /// Bytes of all tensors, as stored.
    pub fn tensor_bytes(&self) -> u64 {
        self.reader.tensor_infos().iter().map(|tensor| tensor.expected_data_size()).sum()
    }

    /// Finds a tensor of one or two dimensions.
    ///
    /// # Errors
    ///
    /// If the file lacks the tensor, or its shape is not supported.
    pub fn tensor(&mut self, name: &str) -> Result<Stored> {
        let file = &self.name;
        let info = self.reader.get_tensor_info(name).ok_or_else(|| {
            anyhow!("{file} has no tensor {name}, which a model of its architecture needs")
        })?;
        let (inputs, outputs) = match *info.shape().dims() {
            [inputs] => (inputs, 1),
            [inputs, outputs] => (inputs, outputs),
            ref other => {
                bail!("{file}: tensor {name} has {} dimensions; 1 or 2 are supported", other.len())
            }
        };
        let stored = Stored {
            kind: info.tensor_type(),
            start: self.reader.tensor_data_offset() + info.data_offset(),
            bytes: info.expected_data_size(),
            outputs: usize::try_from(outputs)?,
            inputs: usize::try_from(inputs)?,
        };
        self.taken.insert(name.to_owned());
        Ok(stored)
    }

    /// Reads rows `first..first + rows` of a tensor as stored, and appends them to `bytes`.
    ///
    /// # Errors
    ///
    /// If the file cannot be read.
    pub fn read_rows(
        &mut self,
        tensor: &Stored,
        first: usize,
        rows: usize,
        bytes: &mut Vec<u8>,
    ) -> Result<()> {
        let name = &self.name;
        let size = tensor.row_bytes() * rows;
        let start = tensor.start + (tensor.row_bytes() * first) as u64;
        self.data
            .seek(SeekFrom::Start(start))
            .and_then(|_| (&mut self.data).take(size as u64).read_to_end(bytes))
            .and_then(
                |read| if read == size { Ok(()) } else { Err(ErrorKind::UnexpectedEof.into()) },
            )
            .with_context(|| format!("cannot read {size} bytes of {name} at {start}"))
    }

    /// Reads a whole tensor of F32, F16 or BF16 as `f32`: norms and other vectors.
    ///
    /// # Errors
    ///
    /// If it is stored in another format, or the file cannot be read.
    pub fn read_vector(&mut self, tensor: &Stored) -> Result<Vec<f32>> {
        let mut bytes = Vec::new();
        self.read_rows(tensor, 0, tensor.outputs, &mut bytes)?;
        format::plain_numbers(tensor.kind, &bytes)
    }

    /// Fails if a tensor was never used: the engine would ignore a part of the model.
    ///
    /// # Errors
    ///
    /// See above.
    pub fn check_all_taken(&self) -> Result<()> {
        match self.reader.tensor_names().into_iter().find(|name| !self.taken.contains(*name)) {
            None => Ok(()),
            Some(name) => bail!(
                "{} has a tensor {name} that this engine does not know, so its answers would be wrong",
                self.name
            ),
        }
    }

    fn keys(&self) -> &Metadata {
        self.reader.metadata()
    }

    fn list<'a, T>(
        &'a self,
        key: &str,
        what: &str,
        read: impl Fn(&'a MetadataValue) -> Option<T>,
    ) -> Result<Vec<T>> {
        match self.keys().get(key) {
            Some(MetadataValue::Array(array)) => array.iter().map(read).collect::<Option<Vec<T>>>(),
            _ => None,
        }
        .ok_or_else(|| self.missing(key, what))
    }

    fn missing(&self, key: &str, what: &str) -> anyhow::Error {
        anyhow!("{}: the key {key} is missing or is not {what}", self.name)
    }
}

/// Translates a reader's error for the user who chose the file.
fn explain(error: GGUFError, name: &str, size: u64) -> anyhow::Error {
    match error {
        GGUFError::InvalidMagic { .. } => {
            anyhow!("{name} is not a GGUF file: it does not begin with the letters GGUF")
        }
        GGUFError::UnexpectedEof => cut_short(name, size),
        GGUFError::Io(error) if error.kind() == ErrorKind::UnexpectedEof => cut_short(name, size),
        other => {
            anyhow!(other).context(format!("cannot read {name} as a GGUF file; fetch it again"))
        }
    }
}

fn cut_short(name: &str, size: u64) -> anyhow::Error {
    anyhow!(
        "{name} is not a complete GGUF file: it is cut short inside its header, after {size} bytes; fetch it again"
    )
}
