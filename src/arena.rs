//! Small data that dispatches read: parameters and lists, in buffers that are written once and reused.
//!
//! `queue.write_buffer` takes effect before *all* commands of the next submit, so bytes that a recorded
//! dispatch reads must not be rewritten before that dispatch has run, and only the engine knows when it
//! submits. So a chunk is filled once, front to back. Every recorded call holds a [`Lease`] on its chunk
//! until the GPU is done with it (or the pass is dropped), and only a chunk without a lease is filled
//! anew. Data that a chunk already holds is found again instead of being written twice: all layers of a
//! step share one copy. A steady decode loop alternates between two chunks that exist from the start.

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::Result;
use crate::gpu::DeviceHandle;

/// Bytes of an ordinary chunk.
const CHUNK_BYTES: u32 = 64 << 10;
/// Offset alignment of a piece, in bytes: the most that WebGPU lets a device ask for.
const ALIGNMENT: u32 = 256;
/// Bytes that the uniform binding of parameters spans, at any offset.
pub(crate) const PARAMS_BYTES: u32 = 128;

/// Keeps a chunk's content in place for as long as it lives.
pub(crate) type Lease = Arc<()>;

/// Where a piece of data has been put.
#[derive(Clone, Debug)]
pub(crate) struct Placed {
    /// The chunk.
    pub(crate) buffer: wgpu::Buffer,
    /// Binds the whole chunk as a read-only list.
    pub(crate) lists: wgpu::BindGroup,
    /// Binds [`PARAMS_BYTES`] of the chunk as a uniform, at a dynamic offset.
    pub(crate) params: wgpu::BindGroup,
    /// Byte offset of the piece in the chunk.
    pub(crate) offset: u32,
    pub(crate) lease: Lease,
}

#[derive(Debug)]
pub(crate) struct Layouts {
    pub(crate) lists: wgpu::BindGroupLayout,
    pub(crate) params: wgpu::BindGroupLayout,
}

#[derive(Debug)]
struct Chunk {
    buffer: wgpu::Buffer,
    lists: wgpu::BindGroup,
    params: wgpu::BindGroup,
    bytes: u32,
    /// First free byte.
    cursor: u32,
    lease: Lease,
    /// Offsets of what the chunk holds.
    contents: HashMap<Box<[u32]>, u32>,
}

impl Chunk {
    fn new(handle: &DeviceHandle, layouts: &Layouts, bytes: u32) -> Result<Self> {
        let usage = wgpu::BufferUsages::STORAGE
            | wgpu::BufferUsages::UNIFORM
            | wgpu::BufferUsages::COPY_DST;
        let buffer = handle.create_buffer("kvcache parameters", u64::from(bytes), usage)?;
        // wgpu clears what was never written when a submission first binds it. If another thread writes into the
        // chunk while that submission is under way, the clearing may come after the write, and a list is zeros.
        handle.queue.write_buffer(&buffer, 0, &vec![0; bytes as usize]);
        let lists = handle.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some("kvcache lists"),
            layout: &layouts.lists,
            entries: &[wgpu::BindGroupEntry { binding: 0, resource: buffer.as_entire_binding() }],
        });
        let params = handle.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some("kvcache parameters"),
            layout: &layouts.params,
            entries: &[wgpu::BindGroupEntry {
                binding: 0,
                resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                    buffer: &buffer,
                    offset: 0,
                    size: wgpu::BufferSize::new(u64::from(PARAMS_BYTES)),
                }),
            }],
        });
        Ok(Self {
            buffer,
            lists,
            params,
            bytes,
            cursor: 0,
            lease: Lease::default(),
            contents: HashMap::new(),
        })
    }

    fn is_leased(&self) -> bool {
        Arc::strong_count(&self.lease) > 1
    }

    fn has_room(&self, bytes: u32) -> bool {
        self.bytes - self.cursor >= bytes
    }

    fn placed(&self, offset: u32) -> Placed {
        Placed {
            buffer: self.buffer.clone(),
            lists: self.lists.clone(),
            params: self.params.clone(),
            offset,
            lease: Arc::clone(&self.lease),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Arena {
    chunks: Vec<Chunk>,
    /// The chunk that is being filled.
    current: usize,
}

impl Arena {
    pub(crate) fn new(handle: &DeviceHandle, layouts: &Layouts) -> Result<Self> {
        let chunk = || Chunk::new(handle, layouts, CHUNK_BYTES);
        Ok(Self { chunks: vec![chunk()?, chunk()?], current: 0 })
    }

    /// A list that nothing reads, to bind where a kernel wants none.
    pub(crate) fn unused_list(&self) -> wgpu::BindGroup {
        self.chunks[0].lists.clone()
    }

    /// Puts `words` where a dispatch can read them.
    pub(crate) fn place(
        &mut self,
        handle: &DeviceHandle,
        layouts: &Layouts,
        words: &[u32],
    ) -> Result<Placed> {
        // Only the current chunk is asked, so that the others run out of leases.
        let chunk = &self.chunks[self.current];
        if let Some(&offset) = chunk.contents.get(words) {
            return Ok(chunk.placed(offset));
        }
        let bytes = space(words.len())?;
        let limits = &handle.limits;
        let limit = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
        if u64::from(bytes) > limit {
            return Err(crate::Error::ListTooLarge { bytes: u64::from(bytes), limit });
        }
        if !self.chunks[self.current].has_room(bytes) {
            self.current = self.empty_chunk(handle, layouts, bytes)?;
        }
        let chunk = &mut self.chunks[self.current];
        let offset = chunk.cursor;
        handle.queue.write_buffer(&chunk.buffer, u64::from(offset), bytemuck::cast_slice(words));
        chunk.cursor += bytes;
        chunk.contents.insert(words.into(), offset);
        Ok(chunk.placed(offset))
    }

    /// A chunk with `bytes` free: one that no recorded work reads any more, or a new one.
    fn empty_chunk(
        &mut self,
        handle: &DeviceHandle,
        layouts: &Layouts,
        bytes: u32,
    ) -> Result<usize> {
        let idle = |chunk: &Chunk| !chunk.is_leased() && chunk.bytes >= bytes;
        if let Some(index) = self.chunks.iter().position(idle) {
            let chunk = &mut self.chunks[index];
            chunk.cursor = 0;
            chunk.contents.clear();
            return Ok(index);
        }
        let size = bytes.max(CHUNK_BYTES);
        let chunk = Chunk::new(handle, layouts, size)?;
        // One long list should not keep its memory for good.
        self.chunks.retain(|chunk| chunk.bytes <= CHUNK_BYTES || chunk.is_leased());
        self.chunks.push(chunk);
        Ok(self.chunks.len() - 1)
    }
}

/// Bytes that a piece of `words` words takes of a chunk.
fn space(words: usize) -> Result<u32> {
    let too_large = crate::Error::SizeOverflow { what: "list of positions" };
    let bytes = u32::try_from(words).ok().and_then(|words| words.checked_mul(4));
    bytes
        // The binding of parameters spans this much wherever it starts.
        .map(|bytes| bytes.max(PARAMS_BYTES))
        .and_then(|bytes| bytes.checked_next_multiple_of(ALIGNMENT))
        .ok_or(too_large)
}
