//! Files in the format safetensors: the same content gives the same bytes.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, Metadata, TensorInfo, TensorView};
use serde::Serialize;

use super::bad;
use crate::error::Result;

/// The metadata of a file.
pub(super) type About = BTreeMap<String, String>;

/// A tensor of a file.
pub(super) struct NamedTensor<'a> {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: Cow<'a, [u8]>,
}

impl<'a> NamedTensor<'a> {
    /// A tensor of another file under a name of its own.
    pub(super) fn of(name: String, tensor: &TensorView<'a>) -> Self {
        let (dtype, shape) = (tensor.dtype(), tensor.shape().to_vec());
        Self { name, dtype, shape, bytes: tensor.data().into() }
    }
}

/// A file's header. The writer of the crate safetensors keeps metadata in a hash map, so that their order differs from
/// file to file.
#[derive(Serialize)]
struct Header<'a> {
    #[serde(rename = "__metadata__")]
    about: &'a About,
    #[serde(flatten)]
    tensors: Metadata,
}

/// Bytes that the length of the header takes, and that the header's end is aligned to.
const WORD: usize = 8;

/// A file of these tensors.
pub(super) fn write(about: &About, mut tensors: Vec<NamedTensor<'_>>) -> Result<Vec<u8>> {
    // Wide elements come first, so that those of every tensor are aligned.
    tensors.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
    let mut end = 0;
    let infos = tensors.iter().map(|NamedTensor { name, dtype, shape, bytes }| {
        let begin = end;
        end += bytes.len();
        let info = TensorInfo { dtype: *dtype, shape: shape.clone(), data_offsets: (begin, end) };
        (name.clone(), info)
    });
    let infos = infos.collect();
    let infos = Metadata::new(None, infos).map_err(|error| bad(&error.to_string()))?;
    let header = serde_json::to_vec(&Header { about, tensors: infos });
    let mut header = header.map_err(|error| bad(&error.to_string()))?;
    header.resize(header.len().next_multiple_of(WORD), b' ');
    let mut file = Vec::with_capacity(WORD + header.len() + end);
    file.extend((header.len() as u64).to_le_bytes());
    file.extend(header);
    tensors.iter().for_each(|tensor| file.extend(&*tensor.bytes));
    Ok(file)
}

/// The metadata and the tensors of a file.
pub(super) fn open(bytes: &[u8]) -> Result<(HashMap<String, String>, SafeTensors<'_>)> {
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|error| bad(&error.to_string()))?;
    let file = SafeTensors::deserialize(bytes).map_err(|error| bad(&error.to_string()))?;
    Ok((header.metadata().clone().unwrap_or_default(), file))
}
