//! Errors of counts, and parts of messages.

use super::Error;
use crate::format::Format;

impl Error {
    /// A count that does not fit its integer type.
    pub(crate) fn overflow(what: &'static str, asked: String, limit: u64) -> Self {
        Self::SizeOverflow { what, asked, limit }
    }

    /// A count that does not fit 32 bits.
    pub(crate) fn too_many(what: &'static str, asked: u64) -> Self {
        Self::overflow(what, asked.to_string(), u64::from(u32::MAX))
    }
}

/// What to do if a layer is too large, as far as smaller formats go.
pub(super) fn smaller_formats(format: Format) -> &'static str {
    match format {
        Format::F32 => ", store 16 or fewer bits (CacheOptions::with_formats)",
        Format::F16 | Format::BF16 => ", store 8 or 4 bits (CacheOptions::with_formats)",
        _ => "",
    }
}

/// A number of bytes as text; `u64::MAX` means that it is too large to count.
pub(super) fn byte_count(bytes: u64) -> String {
    match bytes {
        u64::MAX => "more than 2^64 bytes".to_owned(),
        _ => format!("{bytes} bytes"),
    }
}

/// The valid indices below `count`, as text.
pub(super) fn range(count: usize) -> String {
    match count {
        0 => "none".to_owned(),
        1 => "0 alone".to_owned(),
        _ => format!("0 to {}", count - 1),
    }
}

/// What to do without an adapter.
pub(super) fn adapter_remedy() -> &'static str {
    if cfg!(target_arch = "wasm32") {
        "Use a browser with WebGPU on a page that is served from localhost or by https, and turn hardware acceleration on"
    } else {
        "Without a GPU, install a software adapter: on Debian or Ubuntu `sudo apt-get install mesa-vulkan-drivers`"
    }
}
