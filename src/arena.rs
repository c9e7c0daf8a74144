//! Small data that dispatches read: parameters and lists, in buffers that are written once and reused.
//!
//! `queue.write_buffer` takes effect before *all* commands of the next submit, so bytes that a recorded
//! dispatch reads must not be rewritten before that dispatch has run, and only the engine knows when it
//! submits. So a chunk is filled once, front to back. Every recorded call holds a [`Lease`] on its chunk
//! until the GPU is done with it, and only a chunk without a lease is filled anew. Data that a chunk already
//! holds is found again instead of being written twice: all layers of a step share one copy. A steady decode
//! loop alternates between two chunks that exist from the start.
//!
//! An engine's own passes read page tables, too, and hold no lease. As long as a cache goes on, the call that
//! replaces a table holds it: passes are submitted in order, so what was recorded before that call has run when
//! it has. After a reset, or without the cache, no such call comes, and a dropped pass proves nothing. Then the
//! lease is *abandoned*: its chunk is never filled anew, and its memory goes when the engine lets go of it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::device::DeviceHandle;
use crate::error::Result;
use crate::witness::{Witness, Witnesses};

/// Bytes of an ordinary chunk.
pub(crate) const CHUNK_BYTES: u32 = 64 << 10;
/// Offset alignment of a piece, in bytes: the most that WebGPU lets a device ask for.
const ALIGNMENT: u32 = 256;
/// Bytes that the uniform binding of parameters spans, at any offset.
pub(crate) const PARAMS_BYTES: u32 = 128;

/// Keeps a chunk's content in place for as long as it lives. Holds nothing of wgpu's: it goes into callbacks,
/// which must be `Send`, and in a browser nothing of wgpu's is.
pub(crate) type Lease = Arc<Content>;

/// The content of a chunk.
#[derive(Debug, Default)]
pub(crate) struct Content {
    is_abandoned: AtomicBool,
}

impl Content {
    /// Keeps the chunk's content in place for good: passes may read it of which nobody knows when they run.
    pub(crate) fn abandon(&self) {
        self.is_abandoned.store(true, Ordering::Release);
    }

    fn is_abandoned(&self) -> bool {
        self.is_abandoned.load(Ordering::Acquire)
    }
}

/// A chunk's bind groups.
#[derive(Debug)]
pub(crate) struct Bound {
    /// Binds the whole chunk as a read-only list.
    pub(crate) lists: wgpu::BindGroup,
    /// The same with a page of witnesses, at a dynamic offset: one for each page.
    witnessed: Mutex<Vec<wgpu::BindGroup>>,
    /// Binds [`PARAMS_BYTES`] of the chunk as a uniform, at a dynamic offset.
    pub(crate) params: wgpu::BindGroup,
}

impl Bound {
    fn new(
        handle: &DeviceHandle,
        layouts: &Layouts,
        buffer: &wgpu::Buffer,
        pages: &[wgpu::Buffer],
    ) -> Result<Self> {
        let whole = buffer.as_entire_buffer_binding();
        let params = wgpu::BufferBinding {
            buffer,
            offset: 0,
            size: wgpu::BufferSize::new(u64::from(PARAMS_BYTES)),
        };
        let witnessed: Result<Vec<_>> =
            pages.iter().map(|page| bind_witness(handle, layouts, buffer, page)).collect();
        Ok(Self {
            lists: handle.bind("kvcache lists", &layouts.lists, &[whole])?,
            witnessed: Mutex::new(witnessed?),
            params: handle.bind("kvcache parameters", &layouts.params, &[params])?,
        })
    }

    /// The lists with a page of witnesses.
    pub(crate) fn witnessed(&self, page: usize) -> wgpu::BindGroup {
        self.witnessed.lock().unwrap_or_else(PoisonError::into_inner)[page].clone()
    }

    fn add_page(&self, witnessed: wgpu::BindGroup) {
        self.witnessed.lock().unwrap_or_else(PoisonError::into_inner).push(witnessed);
    }
}

/// Binds lists and a word of a page of witnesses.
fn bind_witness(
    handle: &DeviceHandle,
    layouts: &Layouts,
    lists: &wgpu::Buffer,
    page: &wgpu::Buffer,
) -> Result<wgpu::BindGroup> {
    let word = wgpu::BufferBinding { buffer: page, offset: 0, size: wgpu::BufferSize::new(4) };
    let resources = [lists.as_entire_buffer_binding(), word];
    handle.bind("kvcache lists and witness", &layouts.witnessed, &resources)
}

/// Where a piece of data has been put.
#[derive(Clone, Debug)]
pub(crate) struct Placed {
    /// The chunk.
    pub(crate) buffer: wgpu::Buffer,
    /// Byte offset of the piece in the chunk.
    pub(crate) offset: u32,
    pub(crate) bound: Arc<Bound>,
    pub(crate) lease: Lease,
}

#[derive(Debug)]
pub(crate) struct Layouts {
    pub(crate) lists: wgpu::BindGroupLayout,
    /// Lists, and the witness of the cache that a dispatch works for.
    pub(crate) witnessed: wgpu::BindGroupLayout,
    pub(crate) params: wgpu::BindGroupLayout,
}

#[derive(Debug)]
struct Chunk {
    buffer: wgpu::Buffer,
    bytes: u32,
    /// First free byte.
    cursor: u32,
    bound: Arc<Bound>,
    lease: Lease,
    /// Offsets of what the chunk holds.
    contents: HashMap<Box<[u32]>, u32>,
}

impl Chunk {
    fn new(
        handle: &DeviceHandle,
        layouts: &Layouts,
        bytes: u32,
        pages: &[wgpu::Buffer],
    ) -> Result<Self> {
        let usage = wgpu::BufferUsages::STORAGE
            | wgpu::BufferUsages::UNIFORM
            | wgpu::BufferUsages::COPY_DST;
        let buffer = handle.create_shared_buffer("kvcache parameters", bytes, usage)?;
        let bound = Arc::new(Bound::new(handle, layouts, &buffer, pages)?);
        let (lease, contents) = (Lease::default(), HashMap::new());
        Ok(Self { buffer, bytes, cursor: 0, bound, lease, contents })
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
            offset,
            bound: Arc::clone(&self.bound),
            lease: Arc::clone(&self.lease),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Arena {
    chunks: Vec<Chunk>,
    /// The chunk that is being filled.
    current: usize,
    /// Abandoned chunks that are still leased.
    retired: Vec<Chunk>,
    /// A chunk that nothing is put into.
    unused: Chunk,
    witnesses: Witnesses,
}

impl Arena {
    pub(crate) fn new(handle: &DeviceHandle, layouts: &Layouts) -> Result<Self> {
        let witnesses = Witnesses::new(handle)?;
        let chunk = |bytes| Chunk::new(handle, layouts, bytes, witnesses.pages());
        let chunks = vec![chunk(CHUNK_BYTES)?, chunk(CHUNK_BYTES)?];
        let unused = chunk(PARAMS_BYTES)?;
        Ok(Self { chunks, current: 0, retired: Vec::new(), unused, witnesses })
    }

    /// A list that nothing reads, to bind where a kernel wants none.
    pub(crate) fn unused_list(&self) -> &Arc<Bound> {
        &self.unused.bound
    }

    pub(crate) fn witness_page(&self, page: usize) -> wgpu::Buffer {
        self.witnesses.pages()[page].clone()
    }

    /// A witness for a cache.
    pub(crate) fn witness(&mut self, handle: &DeviceHandle, layouts: &Layouts) -> Result<Witness> {
        loop {
            if let Some(witness) = self.witnesses.take(handle)? {
                return Ok(witness);
            }
            self.add_witnesses(handle, layouts)?;
        }
    }

    /// Another page of witnesses, bound with every chunk there is.
    fn add_witnesses(&mut self, handle: &DeviceHandle, layouts: &Layouts) -> Result<()> {
        let page = self.witnesses.new_page(handle)?;
        let chunks = || self.chunks.iter().chain(&self.retired).chain([&self.unused]);
        let bound: Result<Vec<_>> =
            chunks().map(|chunk| bind_witness(handle, layouts, &chunk.buffer, &page)).collect();
        for (chunk, bound) in chunks().zip(bound?) {
            chunk.bound.add_page(bound);
        }
        self.witnesses.add(handle, page);
        Ok(())
    }

    /// Puts fresh chunks in the place of abandoned ones, so that no step has to make one later.
    pub(crate) fn replace_abandoned(
        &mut self,
        handle: &DeviceHandle,
        layouts: &Layouts,
    ) -> Result<()> {
        self.retired.retain(Chunk::is_leased);
        for chunk in &mut self.chunks {
            if chunk.lease.is_abandoned() && chunk.bytes == CHUNK_BYTES {
                let fresh = Chunk::new(handle, layouts, CHUNK_BYTES, self.witnesses.pages())?;
                self.retired.push(std::mem::replace(chunk, fresh));
            }
        }
        Ok(())
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
        handle.write(&chunk.buffer, u64::from(offset), bytemuck::cast_slice(words))?;
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
        let idle = |chunk: &Chunk| {
            !chunk.is_leased() && !chunk.lease.is_abandoned() && chunk.bytes >= bytes
        };
        if let Some(index) = self.chunks.iter().position(idle) {
            let chunk = &mut self.chunks[index];
            chunk.cursor = 0;
            chunk.contents.clear();
            return Ok(index);
        }
        let size = bytes.max(CHUNK_BYTES);
        let chunk = Chunk::new(handle, layouts, size, self.witnesses.pages())?;
        // One long list should not keep its memory for good, and what was abandoned is not filled anew. A
        // chunk that is leased may have to be bound with further witnesses.
        self.retired.retain(Chunk::is_leased);
        self.chunks.retain(|chunk| {
            chunk.is_leased() || (chunk.bytes <= CHUNK_BYTES && !chunk.lease.is_abandoned())
        });
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
