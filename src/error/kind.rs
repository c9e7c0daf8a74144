//! What an engine can do about an error.

use super::{BrowserError, Error, StoringError};

/// The message of wgpu, or of the driver, about a failure: the [`source`](std::error::Error::source) of an [`Error`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Reason(String);

impl From<String> for Reason {
    fn from(said: String) -> Self {
        Self(said)
    }
}

impl From<&str> for Reason {
    fn from(said: &str) -> Self {
        Self(said.to_owned())
    }
}

/// What an engine can do about an [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The call was wrong: a shape, type, stride, buffer, index, option or layer. Repeating it fails again.
    Input,
    /// There is not enough memory, or a bound is reached. Evict tokens or rows ([`crop`](crate::Cache::crop),
    /// [`truncate`](crate::Cache::truncate), fewer batch rows), then repeat the call.
    NoRoom,
    /// A pass was dropped, its submit failed, or it has not been submitted yet; in a browser also a pass over memory that
    /// was refused after the pass was recorded. What was recorded did not run: reset and fill the cache again.
    PassOrder,
    /// The device is lost, could not create something, or has lower limits than the kernels need. Repeating the call
    /// on this device does not help.
    Device,
}

impl Error {
    /// What an engine can do about this error.
    ///
    /// # Examples
    ///
    /// ```
    /// use wgpu_kvcache::{Error, ErrorKind};
    ///
    /// let full = Error::SequenceTooLong { len: 8, new_tokens: 1, bound: 8 };
    /// assert_eq!(full.kind(), ErrorKind::NoRoom);
    /// ```
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::WrongRank { .. }
            | Self::ZeroExtent { .. }
            | Self::KeyValueShape { .. }
            | Self::Storing(StoringError::ValueNotInKey { .. } | StoringError::BadSave { .. })
            | Self::Storing(
                StoringError::MemoryRange { .. } | StoringError::MemoryOverlaps { .. },
            )
            | Self::Storing(StoringError::MemorySides { .. } | StoringError::MemoryCount { .. })
            | Self::WrongDType { .. }
            | Self::SliceType { .. }
            | Self::BatchChanged { .. }
            | Self::LayerShape { .. }
            | Self::OddHeadDim { .. }
            | Self::InnerStride { .. }
            | Self::Misaligned { .. }
            | Self::BufferTooShort { .. }
            | Self::MissingUsage { .. }
            | Self::SourceTooLarge { .. }
            | Self::SourceIsCache { .. }
            | Self::SliceLength { .. }
            | Self::PositionCount { .. }
            | Self::PositionOutOfBounds { .. }
            | Self::IndexOutOfRange { .. }
            | Self::RowCount { .. }
            | Self::NoIndices
            | Self::ZeroRepeats
            | Self::LayerOutOfRange { .. }
            | Self::PageSize { .. }
            | Self::AttentionShape { .. }
            | Self::AttentionOption { .. }
            | Self::SharedMemory { .. }
            | Self::TooFewTokens { .. }
            | Self::AttentionTooLarge { .. }
            | Self::OutputIsRead { .. }
            | Self::OutputOverlapsQuery { .. }
            | Self::SizeOverflow { .. }
            | Self::TooManyWorkgroups { .. }
            | Self::OtherDevice { .. }
            | Self::MissingOption { .. }
            | Self::UnusedOption { .. }
            | Self::NotSupported { .. }
            | Self::Browser(BrowserError::Blocking { .. })
            | Self::Window(_)
            | Self::Sequence(_) => ErrorKind::Input,
            Self::LayerTooLarge { .. }
            | Self::OutOfPages { .. }
            | Self::Storing(StoringError::MemoryTooShort { .. })
            | Self::PoolTooLarge { .. }
            | Self::ListTooLarge { .. }
            | Self::OutOfMemory { .. }
            | Self::SequenceTooLong { .. }
            | Self::BufferTooLarge { .. } => ErrorKind::NoRoom,
            Self::EarlierPass
            | Self::NotSubmitted { .. }
            | Self::PassDropped { .. }
            | Self::Browser(BrowserError::MemoryRefused { .. }) => ErrorKind::PassOrder,
            Self::Device { .. }
            | Self::DeviceLost
            | Self::DeviceLimit { .. }
            | Self::NoAdapter { .. }
            | Self::NoDevice { .. }
            | Self::Readback { .. } => ErrorKind::Device,
        }
    }
}
