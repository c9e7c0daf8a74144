//! Engines with their own memory: what must stay alive, and until when.
//!
//! Many engines do not give each tensor a buffer of its own. They allocate ranges of a few large buffers, and use a range
//! again as soon as the tensor in it is dropped. Such an engine can hand its tensors to a cache as they are, under these
//! rules.
//!
//! # When memory is read and written
//!
//! A call (`update`, [`Attention::record`](crate::Attention::record) and so on) records work into a pass. It reads K, V and
//! q, and writes the output, when the GPU runs that pass: after the engine has submitted it. Between the call and then
//!
//! - the ranges of K, V, q, the output and masks must hold what the call was told, and nothing else;
//! - what the engine writes into them before must be submitted before the pass, or lie before it in the same encoder;
//! - what the engine puts into the same ranges afterwards must be submitted after it.
//!
//! A range that was freed and given to another tensor in between is read with that tensor's content, without an
//! error. wgpu keeps a buffer alive that is in use, but knows nothing of ranges.
//!
//! So hand in a [`HeldTensor`](crate::HeldTensor): [`TensorView::from_binding`](crate::TensorView::from_binding) for the range,
//! and `held_by` with the allocator's handle. Each call that takes a view of it keeps the handle until the GPU has run the
//! work, or the pass was dropped. That is noticed when the device is polled, as engines do when they read
//! results; until then the range stays in use. Of a [`BitMask`](crate::BitMask) the engine keeps the buffer as it is by itself.
//!
//! | what | must stay as it is until |
//! |---|---|
//! | K and V of an update | the pass has run; the cache holds a copy then |
//! | q and masks of attention | the pass has run |
//! | the output of attention | the engine has read it |
//! | slices: positions, indices, slopes, sinks, row starts | the call returns |
//! | memory that is given to a cache | the cache and its views are dropped, and the passes have run |
//! | buffers of a [`LayerView`](crate::LayerView) | nothing: the view holds them. What the slots contain changes with the next call that writes |
//!
//! # Order
//!
//! An engine that collects its own commands and submits them later submits them before it submits a pass that
//! reads their results. [`Gpu::encode`](crate::Gpu::encode) records into an engine's own encoder instead, behind what
//! is there already.
//!
//! # One buffer for several tensors
//!
//! q and the output of attention may lie in one buffer, in ranges or columns that do not overlap: it is bound once then. K and
//! V of an update may lie in one buffer anyhow. A view that was made from a binding never reaches past it: where shape and
//! strides would, the call answers [`Error::BufferTooShort`](crate::Error::BufferTooShort).
//!
//! # A cache in the engine's memory
//!
//! A [`StaticKVCache`](crate::StaticKVCache) keeps its tokens in ranges that the engine gives, if it is made
//! [`in_memory`](crate::StaticKVCache::in_memory): a [`LayerMemory`](crate::LayerMemory) for each layer. What a view of it shows is
//! the engine's own tensor then, [B, H, capacity, D]. Its `held_by` keeps the allocator's handle until nothing uses
//! the memory. New K and V, and the output of attention, must lie in other buffers than this memory: so give the
//! cache buffers that the allocator puts no other tensor into.
//!
//! # Bind groups that are kept
//!
//! A bind group keeps its buffers alive, a pool's large ones as well. There is one rule: a layer keeps those of its
//! updates and of attention over it from the second time on that the same buffers are passed, four of each kind at most, and lets
//! go of them when its memory changes (it grows, or the batch does), at `reset`, and when it is dropped.
//! [`Cache::release`](crate::Cache::release) lets go of those of all layers at once, and
//! [`Attention::release`](crate::Attention::release) of those of attention and of its scratch memory. What is recorded still
//! runs; what is needed again is made again.
