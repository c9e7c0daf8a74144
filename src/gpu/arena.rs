//! Small data that dispatches read: parameters and lists, in buffers that are written once and reused.
//!
//! `queue.write_buffer` takes effect before *all* commands of the next submit, so bytes that a recorded
//! dispatch reads must not be rewritten before that dispatch has run, and only the engine knows when it
//! submits. So a chunk is filled once, front to back. Every recorded call holds a [`RegionGuard`] on its chunk
//! until the GPU is done with it, and only a chunk without a guard is filled anew. Data that a chunk already
//! holds is found again instead of being written twice: all layers of a step share one copy. A steady decode
//! loop alternates between two chunks that exist from the start. Long pieces, such as large page tables, have
//! chunks of their own, which are kept as long as they come again.
//!
//! An engine's own passes read page tables, too, and hold no guard. As long as a cache goes on, the call that
//! replaces a table holds it: passes are submitted in order, so what was recorded before that call has run when
//! it has. After a reset, or without the cache, no such call comes, and a dropped pass proves nothing. Then the
//! guard is *abandoned*: its chunk is never filled anew, and its memory goes when the engine lets go of it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::gpu::device::{DeviceHandle, binding_limit};
use crate::gpu::own_buffers::OwnBuffer;
use crate::gpu::witness::{Witness, Witnesses};

/// Bytes of an ordinary chunk.
pub(crate) const CHUNK_BYTES: u32 = 64 << 10;
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
pub(crate) const PARAMS_BYTES: u32 = 256;

/// Keeps a chunk's content in place for as long as it lives. Holds nothing of wgpu's: it goes into callbacks,
/// which must be `Send`, and in a browser nothing of wgpu's is.
pub(crate) type RegionGuard = Arc<Content>;

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
pub(crate) struct Allocation {
    /// The chunk.
    pub(crate) buffer: wgpu::Buffer,
    /// Byte offset of the piece in the chunk.
    pub(crate) offset: u32,
    pub(crate) bound: Arc<Bound>,
    pub(crate) guard: RegionGuard,
}

#[derive(Debug)]
pub(crate) struct Layouts {
    pub(crate) lists: wgpu::BindGroupLayout,
    /// Lists, and the witness of the cache that a dispatch works for.
    pub(crate) witnessed: wgpu::BindGroupLayout,
    pub(crate) params: wgpu::BindGroupLayout,
}

impl Layouts {
    pub(crate) fn new(handle: &DeviceHandle) -> Result<Self> {
        let make = |device: &wgpu::Device| Self {
            lists: bind_layout(device, "kvcache lists", &[storage(0, true)]),
            witnessed: bind_layout(
                device,
                "kvcache lists and witness",
                &[storage(0, true), witness(1)],
            ),
            params: bind_layout(device, "kvcache parameters", &[uniform(0)]),
        };
        handle.checked("kvcache layouts", 0, make)
    }
}

#[derive(Debug)]
struct Chunk {
    buffer: wgpu::Buffer,
    bytes: u32,
    /// First free byte.
    cursor: u32,
    bound: Arc<Bound>,
    guard: RegionGuard,
    /// Whether it was made for long pieces.
    is_long: bool,
    /// When it was taken into use, counted in chunks: the latest of its sort is filled.
    used: u64,
    /// Offsets of what the chunk holds.
    contents: HashMap<Box<[u32]>, u32>,
    _own: OwnBuffer,
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
        let own = handle.own_buffers.add(&buffer);
        let bound = Arc::new(Bound::new(handle, layouts, &buffer, pages)?);
        let (guard, contents) = (RegionGuard::default(), HashMap::new());
        let (cursor, is_long, used) = (0, false, 0);
        Ok(Self { buffer, bytes, cursor, bound, guard, is_long, used, contents, _own: own })
    }

    fn is_guarded(&self) -> bool {
        Arc::strong_count(&self.guard) > 1
    }

    /// Fills the next `bytes`, which are free, with `words`.
    fn put(&mut self, handle: &DeviceHandle, bytes: u32, words: &[u32]) -> Result<Allocation> {
        let offset = self.cursor;
        handle.write(&self.buffer, u64::from(offset), bytemuck::cast_slice(words))?;
        self.cursor += bytes;
        self.contents.insert(words.into(), offset);
        Ok(self.allocation(offset))
    }

    fn has_room(&self, bytes: u32) -> bool {
        self.bytes - self.cursor >= bytes
    }

    fn allocation(&self, offset: u32) -> Allocation {
        Allocation {
            buffer: self.buffer.clone(),
            offset,
            bound: Arc::clone(&self.bound),
            guard: Arc::clone(&self.guard),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Arena {
    /// Ordinary ones, and larger ones for long pieces.
    chunks: Vec<Chunk>,
    /// Chunks taken into use.
    clock: u64,
    /// Abandoned chunks that are still guarded.
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
        Ok(Self { chunks, clock: 0, retired: Vec::new(), unused, witnesses })
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
        self.retired.retain(Chunk::is_guarded);
        for chunk in &mut self.chunks {
            if chunk.guard.is_abandoned() && !chunk.is_long {
                let fresh = Chunk::new(handle, layouts, CHUNK_BYTES, self.witnesses.pages())?;
                let fresh = Chunk { used: chunk.used, ..fresh };
                self.retired.push(std::mem::replace(chunk, fresh));
            }
        }
        Ok(())
    }

    /// Puts `words` where a dispatch can read them.
    pub(crate) fn upload(
        &mut self,
        handle: &DeviceHandle,
        layouts: &Layouts,
        words: &[u32],
    ) -> Result<Allocation> {
        let bytes = space(words.len())?;
        // Only the chunk that is being filled is asked, so that the others run out of guards.
        let filled = self.filled(bytes > CHUNK_BYTES).map(|index| &self.chunks[index]);
        if let Some((chunk, &offset)) =
            filled.and_then(|chunk| Some((chunk, chunk.contents.get(words)?)))
        {
            return Ok(chunk.allocation(offset));
        }
        let index = self.room(handle, layouts, bytes, bytes > CHUNK_BYTES)?;
        self.chunks[index].put(handle, bytes, words)
    }

    /// Reserves a piece that its owner writes bit by bit, each word once, where there is room for a list of
    /// `spare` words as well.
    pub(crate) fn reserve(
        &mut self,
        handle: &DeviceHandle,
        layouts: &Layouts,
        words: usize,
        spare: usize,
    ) -> Result<Allocation> {
        let (bytes, spare) = (space(words)?, space(spare)?);
        let both = bytes.checked_add(spare).ok_or_else(|| too_long(words))?;
        let is_long = bytes > SMALL_BYTES || both > CHUNK_BYTES;
        let index = self.room(handle, layouts, both, is_long)?;
        let chunk = &mut self.chunks[index];
        let offset = chunk.cursor;
        chunk.cursor += bytes;
        Ok(chunk.allocation(offset))
    }

    /// Puts `words` into the chunk of a reserved piece; `None` where that is full, or keeps an ordinary chunk
    /// from being filled anew: then it is time for the piece to move.
    pub(crate) fn upload_beside(
        &mut self,
        handle: &DeviceHandle,
        piece: &Allocation,
        words: &[u32],
    ) -> Result<Option<Allocation>> {
        if !self.is_in_place(piece) {
            return Ok(None);
        }
        let bytes = space(words.len())?;
        let is_its = |chunk: &&mut Chunk| Arc::ptr_eq(&chunk.guard, &piece.guard);
        let Some(chunk) = self.chunks.iter_mut().find(is_its) else { return Ok(None) };
        if let Some(&offset) = chunk.contents.get(words) {
            return Ok(Some(chunk.allocation(offset)));
        }
        chunk.has_room(bytes).then(|| chunk.put(handle, bytes, words)).transpose()
    }

    /// Whether a reserved piece may stay where it is: in a chunk for long ones, or in the ordinary one that is
    /// being filled.
    pub(crate) fn is_in_place(&self, piece: &Allocation) -> bool {
        let index = self.chunks.iter().position(|chunk| Arc::ptr_eq(&chunk.guard, &piece.guard));
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
        let limit = binding_limit(&handle.limits);
        if u64::from(bytes) > limit {
            return Err(Error::ListTooLarge {
                what: "a list that a kernel reads",
                bytes: bytes.into(),
                limit,
                remedy: "use fewer rows or tokens at once",
            });
        }
        let idle = |chunk: &Chunk| {
            let is_free = !chunk.is_guarded() && !chunk.guard.is_abandoned();
            chunk.is_long == is_long && is_free && chunk.bytes >= bytes
        };
        let index = match self.chunks.iter().position(idle) {
            Some(index) => index,
            None => {
                let most = u32::try_from(limit).unwrap_or(u32::MAX) / ALIGNMENT * ALIGNMENT;
                let several = bytes.saturating_mul(LONG_PIECES).min(most).max(bytes);
                let size = if is_long { several.max(CHUNK_BYTES) } else { CHUNK_BYTES };
                let chunk = Chunk::new(handle, layouts, size, self.witnesses.pages())?;
                self.chunks.push(Chunk { is_long, ..chunk });
                self.chunks.len() - 1
            }
        };
        self.clock += 1;
        let clock = self.clock;
        let chunk = &mut self.chunks[index];
        (chunk.used, chunk.cursor) = (clock, 0);
        chunk.contents.clear();
        // Long pieces should not keep their memory for good, and what was abandoned is not filled anew. A chunk
        // that is guarded may have to be bound with further witnesses.
        let guard = Arc::clone(&chunk.guard);
        self.retired.retain(Chunk::is_guarded);
        self.chunks.retain(|chunk| {
            let is_kept = !chunk.is_long || chunk.used + KEPT > clock;
            chunk.is_guarded() || (is_kept && !chunk.guard.is_abandoned())
        });
        let index = self.chunks.iter().position(|chunk| Arc::ptr_eq(&chunk.guard, &guard));
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

pub(super) fn storage(binding: u32, read_only: bool) -> wgpu::BindGroupLayoutEntry {
    wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer {
            ty: wgpu::BufferBindingType::Storage { read_only },
            has_dynamic_offset: false,
            min_binding_size: None,
        },
        count: None,
    }
}

/// One word, at a dynamic offset.
fn witness(binding: u32) -> wgpu::BindGroupLayoutEntry {
    wgpu::BindGroupLayoutEntry {
        ty: wgpu::BindingType::Buffer {
            ty: wgpu::BufferBindingType::Storage { read_only: false },
            has_dynamic_offset: true,
            min_binding_size: wgpu::BufferSize::new(4),
        },
        ..storage(binding, false)
    }
}

fn uniform(binding: u32) -> wgpu::BindGroupLayoutEntry {
    wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer {
            ty: wgpu::BufferBindingType::Uniform,
            has_dynamic_offset: true,
            min_binding_size: wgpu::BufferSize::new(u64::from(PARAMS_BYTES)),
        },
        count: None,
    }
}

pub(super) fn bind_layout(
    device: &wgpu::Device,
    label: &str,
    entries: &[wgpu::BindGroupLayoutEntry],
) -> wgpu::BindGroupLayout {
    device
        .create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: Some(label), entries })
}
