//! What cannot be done in a browser, or what it says late: [`BrowserError`].

use super::Reason;

/// What is different in a browser, where no call can wait: the cause of an [`Error::Browser`](crate::Error::Browser).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BrowserError {
    /// A call that waits.
    #[error("{call} cannot wait in a browser, where nothing else runs meanwhile; await {instead}")]
    Blocking {
        /// The call.
        call: &'static str,
        /// The call that does the same without blocking.
        instead: &'static str,
    },

    /// Memory of a layer that the browser refused after the call that asked for it had returned. Whatever is recorded
    /// over that memory never runs.
    #[error(
        "the browser could not allocate {bytes} bytes for '{label}' ({reason}), and said so after the call had returned; the tokens of that layer are lost. Free other memory, reset() the cache, and fill it again with fewer tokens or rows, or in smaller formats (CacheOptions::with_formats)"
    )]
    MemoryRefused {
        /// Label of the buffer.
        label: String,
        /// Bytes that were requested.
        bytes: u64,
        /// The browser's message.
        #[source]
        reason: Reason,
    },
}

impl BrowserError {
    /// The refusal of a call that waits, in a browser.
    #[cfg(target_arch = "wasm32")]
    pub(crate) fn blocking(call: &'static str, instead: &'static str) -> crate::Error {
        Self::Blocking { call, instead }.into()
    }
}
