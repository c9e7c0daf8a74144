//! Bytes that the page holds, read as a file. They stay where the page has them: the memory of a program in a browser
//! grows and never shrinks.

use std::io::{Error, ErrorKind, Read, Result, Seek, SeekFrom};

use js_sys::Uint8Array;

/// A position in an array of the page.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    bytes: Uint8Array,
    at: u32,
}

impl Source {
    pub(crate) fn new(bytes: Uint8Array) -> Self {
        Self { bytes, at: 0 }
    }
}

impl Read for Source {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let left = self.bytes.length().saturating_sub(self.at);
        let count = left.min(u32::try_from(buffer.len()).unwrap_or(u32::MAX));
        let end = self.at + count;
        self.bytes.subarray(self.at, end).copy_to(&mut buffer[..count as usize]);
        self.at = end;
        Ok(count as usize)
    }
}

impl Seek for Source {
    fn seek(&mut self, to: SeekFrom) -> Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => i64::try_from(at).ok(),
            SeekFrom::End(by) => i64::from(self.bytes.length()).checked_add(by),
            SeekFrom::Current(by) => i64::from(self.at).checked_add(by),
        };
        let at = at.and_then(|at| u32::try_from(at).ok());
        self.at = at.ok_or_else(|| Error::from(ErrorKind::InvalidInput))?;
        Ok(self.at.into())
    }
}
