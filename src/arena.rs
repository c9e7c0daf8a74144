//! Small data that dispatches read: parameters and lists, in buffers that are written once and reused.
//!
//! `queue.write_buffer` takes effect before *all* commands of the next submit, so bytes that a recorded
//! dispatch reads must not be rewritten before that dispatch has run, and only the engine knows when it
//! submits. So a chunk is filled once, front to back. Every recorded call holds a [`Lease`] on its chunk
//! until the GPU is done with it (or the pass is dropped), and only a chunk without a lease is filled
//! anew. Data that a chunk already holds is found again instead of being written twice: all layers of a
//! step share one copy. A steady decode loop alternates between two chunks that exist from the start. Long
//! pieces, such as large page tables, have chunks of their own, which are kept as long as they come again.

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::gpu::DeviceHandle;

/// Bytes of an ordinary chunk.
const CHUNK_BYTES: u32 = 64 << 10;
/// Bytes of a reserved piece that still goes into an ordinary chunk. A larger one would keep it from being
/// filled anew for as long as the piece is in use.
const SMALL_BYTES: u32 = CHUNK_BYTES / 16;
/// Pieces of its size that a chunk made for a long one holds: those that work in flight reads.
const LONG_PIECES: u32 = 4;
/// Chunks that are taken into use before one for long pieces, unused since, is let go.
const KEPT: u64 = 64;
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
    /// Whether it was made for long pieces.
    is_long: bool,
    /// When it was taken into use, counted in chunks: the latest of its sort is filled.
    used: u64,
    /// Offsets of what the chunk holds.
    contents: HashMap<Box<[u32]>, u32>,
}

impl Chunk {
    fn new(handle: &DeviceHandle, layouts: &Layouts, bytes: u32) -> Result<Self> {
        let usage = wgpu::BufferUsages::STORAGE
            | wgpu::BufferUsages::UNIFORM
            | wgpu::BufferUsages::COPY_DST;
        let buffer = handle.create_buffer("kvcache parameters", u64::from(bytes), usage)?;
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
            is_long: false,
            used: 0,
            contents: HashMap::new(),
        })
    }

    fn is_leased(&self) -> bool {
        Arc::strong_count(&self.lease) > 1
    }

    /// Fills the next `bytes`, which are free, with `words`.
    fn put(&mut self, handle: &DeviceHandle, bytes: u32, words: &[u32]) -> Placed {
        let offset = self.cursor;
        handle.queue.write_buffer(&self.buffer, u64::from(offset), bytemuck::cast_slice(words));
        self.cursor += bytes;
        self.contents.insert(words.into(), offset);
        self.placed(offset)
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
    /// Ordinary ones, and larger ones for long pieces.
    chunks: Vec<Chunk>,
    /// Chunks taken into use.
    clock: u64,
}

impl Arena {
    pub(crate) fn new(handle: &DeviceHandle, layouts: &Layouts) -> Result<Self> {
        let chunk = || Chunk::new(handle, layouts, CHUNK_BYTES);
        Ok(Self { chunks: vec![chunk()?, chunk()?], clock: 0 })
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
        let bytes = space(words.len())?;
        // Only the chunk that is being filled is asked, so that the others run out of leases.
        let filled = self.filled(bytes > CHUNK_BYTES).map(|index| &self.chunks[index]);
        if let Some((chunk, &offset)) =
            filled.and_then(|chunk| Some((chunk, chunk.contents.get(words)?)))
        {
            return Ok(chunk.placed(offset));
        }
        let index = self.room(handle, layouts, bytes, bytes > CHUNK_BYTES)?;
        Ok(self.chunks[index].put(handle, bytes, words))
    }

    /// Reserves a piece that its owner writes bit by bit, each word once, where there is room for a list of
    /// `spare` words as well.
    pub(crate) fn reserve(
        &mut self,
        handle: &DeviceHandle,
        layouts: &Layouts,
        words: usize,
        spare: usize,
    ) -> Result<Placed> {
        let (bytes, spare) = (space(words)?, space(spare)?);
        let both = bytes.checked_add(spare).ok_or_else(|| too_long(words))?;
        let is_long = bytes > SMALL_BYTES || both > CHUNK_BYTES;
        let index = self.room(handle, layouts, both, is_long)?;
        let chunk = &mut self.chunks[index];
        let offset = chunk.cursor;
        chunk.cursor += bytes;
        Ok(chunk.placed(offset))
    }

    /// Puts `words` into the chunk of a reserved piece; `None` where that is full, or keeps an ordinary chunk
    /// from being filled anew: then it is time for the piece to move.
    pub(crate) fn place_beside(
        &mut self,
        handle: &DeviceHandle,
        piece: &Placed,
        words: &[u32],
    ) -> Result<Option<Placed>> {
        if !self.is_in_place(piece) {
            return Ok(None);
        }
        let bytes = space(words.len())?;
        let is_its = |chunk: &&mut Chunk| Arc::ptr_eq(&chunk.lease, &piece.lease);
        let Some(chunk) = self.chunks.iter_mut().find(is_its) else { return Ok(None) };
        if let Some(&offset) = chunk.contents.get(words) {
            return Ok(Some(chunk.placed(offset)));
        }
        Ok(chunk.has_room(bytes).then(|| chunk.put(handle, bytes, words)))
    }

    /// Whether a reserved piece may stay where it is: in a chunk for long ones, or in the ordinary one that is
    /// being filled.
    pub(crate) fn is_in_place(&self, piece: &Placed) -> bool {
        let index = self.chunks.iter().position(|chunk| Arc::ptr_eq(&chunk.lease, &piece.lease));
        index.is_some_and(|at| self.chunks[at].is_long || self.filled(false) == Some(at))
    }

    /// The chunk of a sort that is being filled.
    fn filled(&self, is_long: bool) -> Option<usize> {
        let chunks = self.chunks.iter().enumerate();
        let sort = chunks.filter(|(_, chunk)| chunk.is_long == is_long);
        sort.max_by_key(|(_, chunk)| chunk.used).map(|(index, _)| index)
    }

    /// A chunk with `bytes` free: the one that is being filled, one that no recorded work reads any more, or a
    /// new one.
    fn room(
        &mut self,
        handle: &DeviceHandle,
        layouts: &Layouts,
        bytes: u32,
        is_long: bool,
    ) -> Result<usize> {
        if let Some(index) = self.filled(is_long).filter(|&at| self.chunks[at].has_room(bytes)) {
            return Ok(index);
        }
        let limits = &handle.limits;
        let limit = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
        if u64::from(bytes) > limit {
            return Err(Error::ListTooLarge {
                what: "a list that a kernel reads",
                bytes: bytes.into(),
                limit,
                remedy: "use fewer rows or tokens at once",
            });
        }
        let idle =
            |chunk: &Chunk| chunk.is_long == is_long && !chunk.is_leased() && chunk.bytes >= bytes;
        let index = match self.chunks.iter().position(idle) {
            Some(index) => index,
            None => {
                let most = u32::try_from(limit).unwrap_or(u32::MAX) / ALIGNMENT * ALIGNMENT;
                let several = bytes.saturating_mul(LONG_PIECES).min(most).max(bytes);
                let size = if is_long { several.max(CHUNK_BYTES) } else { CHUNK_BYTES };
                self.chunks.push(Chunk { is_long, ..Chunk::new(handle, layouts, size)? });
                self.chunks.len() - 1
            }
        };
        self.clock += 1;
        let chunk = &mut self.chunks[index];
        (chunk.used, chunk.cursor) = (self.clock, 0);
        chunk.contents.clear();
        // Long pieces should not keep their memory for good.
        let lease = Arc::clone(&chunk.lease);
        let clock = self.clock;
        self.chunks
            .retain(|chunk| !chunk.is_long || chunk.is_leased() || chunk.used + KEPT > clock);
        let index = self.chunks.iter().position(|chunk| Arc::ptr_eq(&chunk.lease, &lease));
        Ok(index.expect("the chunk was taken into use just now"))
    }
}

/// Bytes that a piece of `words` words takes of a chunk.
fn space(words: usize) -> Result<u32> {
    let bytes = u32::try_from(words).ok().and_then(|words| words.checked_mul(4));
    bytes
        // The binding of parameters spans this much wherever it starts.
        .map(|bytes| bytes.max(PARAMS_BYTES))
        .and_then(|bytes| bytes.checked_next_multiple_of(ALIGNMENT))
        .ok_or_else(|| too_long(words))
}

fn too_long(words: usize) -> Error {
    Error::overflow("list that a kernel reads", format!("{words} words"), u64::from(u32::MAX / 4))
}
