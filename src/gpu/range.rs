//! Ranges of buffers that hold K or V: [`BufferRange`].

/// A range of a buffer, which kernels bind: all of a buffer of the cache's own, or a piece of one that an engine gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BufferRange {
    pub(crate) buffer: wgpu::Buffer,
    /// First byte.
    pub(crate) offset: u64,
    /// Bytes.
    pub(crate) size: u64,
}

impl BufferRange {
    /// All of a buffer.
    pub(crate) fn whole(buffer: wgpu::Buffer) -> Self {
        let size = buffer.size();
        Self { buffer, offset: 0, size }
    }

    /// What is bound of a buffer.
    pub(crate) fn of(binding: &wgpu::BufferBinding<'_>) -> Self {
        let &wgpu::BufferBinding { buffer, offset, size } = binding;
        let rest = buffer.size().saturating_sub(offset);
        Self { buffer: buffer.clone(), offset, size: size.map_or(rest, wgpu::BufferSize::get) }
    }

    pub(crate) fn binding(&self) -> wgpu::BufferBinding<'_> {
        let Self { buffer, offset, size } = self;
        wgpu::BufferBinding { buffer, offset: *offset, size: wgpu::BufferSize::new(*size) }
    }

    /// Whether both have a byte in common.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        self.buffer == other.buffer
            && self.offset < other.offset.saturating_add(other.size)
            && other.offset < self.offset.saturating_add(self.size)
    }
}
