//! The errors. Each states the request, the limit and a remedy. The call that returned it has changed nothing, on the
//! host or the GPU.

mod browser;
mod kind;
mod make;
mod sequence;
mod storing;
mod window;

pub use browser::BrowserError;
pub use kind::{ErrorKind, Reason};
use make::{adapter_remedy, byte_count, range, smaller_formats};
pub use sequence::SequenceError;
pub use storing::StoringError;
pub use window::WindowError;

use crate::{dtype::DType, format::Format};

/// The result of a call on a cache.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A refused or failed call. Shapes are (B, H, T, D): batch rows, K/V heads, tokens, elements per head.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor is not four-dimensional.
    #[error(
        "a K or V tensor has 4 dimensions (batch, heads, tokens, head_dim), but the shape given is {shape:?}; add axes of extent 1 for missing ones"
    )]
    WrongRank {
        /// The shape that was given.
        shape: Vec<usize>,
    },

    /// A tensor has an extent of zero.
    #[error(
        "the shape {shape:?} has an extent of zero; every extent must be at least 1, so skip the call when there is nothing to write"
    )]
    ZeroExtent {
        /// The shape that was given.
        shape: Vec<usize>,
    },

    /// K and V disagree in batch rows, heads or tokens.
    #[error(
        "key {key:?} and value {value:?} must agree in batch, heads and tokens (B, H, T); only head_dim may differ"
    )]
    KeyValueShape {
        /// Shape of K, (B, H, T, D).
        key: [usize; 4],
        /// Shape of V, (B, H, T, D).
        value: [usize; 4],
    },

    /// K and V have different element types, or a type that differs from the layer's.
    #[error(
        "{what} is {got}, but {expected} is expected of it; convert it first, or that with which it must agree"
    )]
    WrongDType {
        /// Which tensor, or which conversion.
        what: &'static str,
        /// The type that fits.
        expected: DType,
        /// The type that was given.
        got: DType,
    },

    /// The slice's type differs from the type of a tensor that was read back.
    #[error(
        "the tensor holds {held}, but a slice of {asked} was asked for; ask for {held}, or let to_f32() convert"
    )]
    SliceType {
        /// The type of the tensor's elements.
        held: DType,
        /// The type of the slice.
        asked: DType,
    },

    /// A layer is written for the first time, after a change of the batch, with another number of rows.
    #[error(
        "layer {layer} is written for the first time, with {got} rows, after the batch was changed; layer {other} has {batch} rows since then. A change of the batch leaves unwritten layers as they are: pass tensors of {batch} rows, in the order of the other layers' rows, or reset() the cache to begin with another batch"
    )]
    BatchChanged {
        /// The layer.
        layer: usize,
        /// Batch rows of the new tokens.
        got: usize,
        /// A layer that the change concerned.
        other: usize,
        /// Batch rows of that layer.
        batch: usize,
    },

    /// New tokens do not fit the layer's shape.
    #[error(
        "layer {layer} holds batch {batch}, heads {heads}, head_dim {key_dim} (K) and {value_dim} (V), but the new key is {key:?} and the new value {value:?}; only T may differ; check the order of the axes, (B, H, T, D), or reset() the cache for another shape"
    )]
    LayerShape {
        /// The layer.
        layer: usize,
        /// Batch rows that the layer holds.
        batch: usize,
        /// K/V heads that the layer holds.
        heads: usize,
        /// Elements per head of K.
        key_dim: usize,
        /// Elements per head of V.
        value_dim: usize,
        /// Shape of the new K, (B, H, T, D).
        key: [usize; 4],
        /// Shape of the new V, (B, H, T, D).
        value: [usize; 4],
    },

    /// A 16-bit tensor with an odd `head_dim`.
    #[error(
        "{what} has head_dim {head_dim} in {dtype}: 16-bit types need an even head_dim, because the kernels move 32-bit words; pad it by one element or use f32"
    )]
    OddHeadDim {
        /// Which tensor.
        what: &'static str,
        /// Its element type.
        dtype: DType,
        /// Its `head_dim`, in elements.
        head_dim: usize,
    },

    /// The elements of a head are not contiguous.
    #[error(
        "{what} has a stride of {stride} elements along head_dim; it must be 1 (the elements of a head are contiguous); the other three strides are free"
    )]
    InnerStride {
        /// Which tensor.
        what: &'static str,
        /// The stride along D, in elements.
        stride: usize,
    },

    /// An offset or a stride is not a multiple of 32 bits.
    #[error(
        "{what} has {quantity} of {bytes} bytes, which is not a multiple of 4; the kernels move 32-bit words, so align it to 4 bytes"
    )]
    Misaligned {
        /// Which tensor.
        what: &'static str,
        /// The offset, or which stride.
        quantity: &'static str,
        /// Its size, in bytes.
        bytes: u64,
    },

    /// A buffer ends before its view does.
    #[error(
        "{what} needs {needed} bytes of its buffer or binding (offset {offset}, shape {shape:?}, strides {strides:?} elements), which has {size}; check offset, shape and strides, or make the buffer larger"
    )]
    BufferTooShort {
        /// Which tensor.
        what: &'static str,
        /// Bytes from the start of the buffer, or of the binding, to the view's end.
        needed: u64,
        /// Bytes that the buffer or the binding has.
        size: u64,
        /// Byte offset of the view, from the same start.
        offset: u64,
        /// Shape, (B, H, T, D).
        shape: [usize; 4],
        /// Strides in elements, (B, H, T, D).
        strides: [usize; 4],
    },

    /// A buffer without the usage `STORAGE`.
    #[error("the buffer of {what} lacks the usage STORAGE; create it with BufferUsages::STORAGE")]
    MissingUsage {
        /// Which tensor.
        what: &'static str,
    },

    /// A view that spans more bytes than the device binds at once.
    #[error(
        "{what} spans {bytes} bytes of its buffer, more than the {limit} that this device binds at once; update in pieces of fewer tokens, or request a device with a higher max_storage_buffer_binding_size"
    )]
    SourceTooLarge {
        /// Which tensor.
        what: &'static str,
        /// Bytes from the view's first to its last, extended to the binding alignment.
        bytes: u64,
        /// The device's limit.
        limit: u64,
    },

    /// The new tokens are in a buffer of the layer that they are written to.
    #[error(
        "{what} is in a buffer of layer {layer} itself, which one dispatch cannot both read and write; copy it to another buffer first"
    )]
    SourceIsCache {
        /// Which tensor.
        what: &'static str,
        /// The layer.
        layer: usize,
    },

    /// A host slice has another number of elements than its shape.
    #[error(
        "the shape {shape:?} has {expected} elements, but the slice has {got}; pass exactly that many"
    )]
    SliceLength {
        /// The shape that was given.
        shape: Vec<usize>,
        /// Elements of the shape.
        expected: usize,
        /// Elements in the slice.
        got: usize,
    },

    /// The number of positions does not match the new tokens or the batch.
    #[error("cache_position as {form} needs {expected}, got {got}")]
    PositionCount {
        /// The form of the positions.
        form: &'static str,
        /// The count that is needed.
        expected: String,
        /// The count that was given.
        got: String,
    },

    /// A position past the end of a cache of bounded length.
    #[error("position {position} is past the end of a cache made for {bound} tokens ({range}); use lower positions (they count from the oldest live token, so crop() lowers them), or make the cache longer", range = range(*bound))]
    PositionOutOfBounds {
        /// The highest position named.
        position: usize,
        /// The most tokens of a row.
        bound: usize,
    },

    /// An append past the end of a cache of bounded length.
    #[error(
        "{new_tokens} new tokens after {len} live ones exceed a cache made for {bound} tokens; {}make the cache longer",
        if new_tokens > bound { "write fewer tokens, or " } else { "crop() to make room, or " }
    )]
    SequenceTooLong {
        /// Live tokens.
        len: usize,
        /// Tokens to append.
        new_tokens: usize,
        /// The most tokens of a row.
        bound: usize,
    },

    /// A batch index that is not a row of the batch.
    #[error("index {index} (at place {place}) is past the batch of layer {layer}, which has rows {range}; beam indices count batch rows, not beams of one sample", range = range(*batch))]
    IndexOutOfRange {
        /// The index.
        index: u32,
        /// Its index in the list.
        place: usize,
        /// The layer whose batch is too small.
        layer: usize,
        /// Batch rows of that layer.
        batch: usize,
    },

    /// A list of lengths that has not one for each batch row of a layer.
    #[error(
        "{got} lengths were given, but layer {layer} has {batch} rows; give one length for each row, usize::MAX for a row that stays as it is"
    )]
    RowCount {
        /// Lengths in the list.
        got: usize,
        /// The layer that has another number of rows.
        layer: usize,
        /// Batch rows of that layer.
        batch: usize,
    },

    /// An empty list of batch indices.
    #[error("no batch indices were given; give at least one row, or call reset() to drop them all")]
    NoIndices,

    /// A repeat count of zero.
    #[error("repeats is 0; use at least 1 (which changes nothing), or reset() to drop all rows")]
    ZeroRepeats,

    /// A layer index that is not below the cache's number of layers.
    #[error("layer {layer} is past the {num_layers} layers ({range}) that the cache was made for; make it for more", range = range(*num_layers))]
    LayerOutOfRange {
        /// The layer that was given.
        layer: usize,
        /// Layers of the cache.
        num_layers: usize,
    },

    /// A layer would need a larger buffer than the device creates or binds.
    #[error(
        "layer {layer} needs {bytes} for {tokens} tokens of {batch} rows, {heads} heads and head_dim {head_dim} in {format}, more than the {limit} bytes that this device binds as one buffer; {fits} tokens would fit. Use fewer tokens (of the sequence, or as the capacity or length that the cache is made with) or batch rows{or_format}, or request a device with higher max_storage_buffer_binding_size and max_buffer_size",
        bytes = byte_count(*needed),
        or_format = smaller_formats(*format)
    )]
    LayerTooLarge {
        /// The layer.
        layer: usize,
        /// Bytes of the larger of its two buffers.
        needed: u64,
        /// The device's limit, in bytes.
        limit: u64,
        /// Tokens that were requested.
        tokens: usize,
        /// Tokens per row that would fit.
        fits: usize,
        /// Batch rows.
        batch: usize,
        /// K/V heads.
        heads: usize,
        /// Elements per head, of the wider of K and V.
        head_dim: usize,
        /// How the larger of its two buffers stores them.
        format: Format,
    },

    /// A pool that can hold a write's new pages cannot hold the copies of shared pages that the write needs as well.
    #[error(
        "layer {layer} needs {new} new pages of {page_tokens} tokens and {copies} copies of shared pages that the call writes into, with {used} in use, but at most {fits} pages fit into the {limit} bytes that this device binds as one buffer; append instead of writing into shared pages, truncate(), crop() or select fewer rows, or request a device with higher max_storage_buffer_binding_size and max_buffer_size"
    )]
    PoolTooLarge {
        /// The layer.
        layer: usize,
        /// Pages in use.
        used: usize,
        /// New pages that the call needs.
        new: usize,
        /// Copies of shared pages that it needs.
        copies: usize,
        /// The most pages that fit.
        fits: usize,
        /// The device's limit, in bytes.
        limit: u64,
        /// Tokens per page.
        page_tokens: usize,
    },

    /// A bounded pool has too few free pages.
    #[error(
        "the call needs {wanted} more pages of {page_tokens} tokens, with {used} in use ({shared} of them shared by several rows or sequences), but the cache was made for {limit}; {}make the cache larger",
        if *used == 0 { "write fewer tokens at once, or " } else { "truncate(), crop(), select fewer rows or remove sequences to give pages back, or " }
    )]
    OutOfPages {
        /// Pages in use.
        used: usize,
        /// Pages in use that several rows share.
        shared: usize,
        /// Further pages that the call needs: new ones, and copies of shared ones that it writes into. Copies are not
        /// counted if a single row of that length would exceed the pool.
        wanted: usize,
        /// Pages that the cache was made for.
        limit: usize,
        /// Tokens per page.
        page_tokens: usize,
    },

    /// A refusal of a cache of sequences.
    #[error(transparent)]
    Sequence(#[from] SequenceError),

    /// A layer's window does not allow it.
    #[error(transparent)]
    Window(#[from] WindowError),

    /// What cannot be stored as the cache was made to, or a saved cache that cannot be restored.
    #[error(transparent)]
    Storing(#[from] StoringError),

    /// A call that cannot wait in a browser, or memory that a browser refused late.
    #[error(transparent)]
    Browser(#[from] BrowserError),

    /// A page size that is not a power of two, or is too large.
    #[error(
        "pages of {page_tokens} tokens were requested; it must be a power of two of at most 2147483648, such as 16"
    )]
    PageSize {
        /// Tokens per page.
        page_tokens: usize,
    },

    /// A list for a kernel that is longer than the device binds at once.
    #[error(
        "{what} takes {bytes} bytes, more than the {limit} that this device binds at once; {remedy}"
    )]
    ListTooLarge {
        /// Which list.
        what: &'static str,
        /// Bytes of the list, and of the data that must be in the same buffer.
        bytes: u64,
        /// The device's limit.
        limit: u64,
        /// The remedy.
        remedy: &'static str,
    },

    /// The shape of the query does not fit the view or the output of attention.
    #[error("{reason}: query {query:?}, {what} {other:?} (B, H, T, D); {remedy}")]
    AttentionShape {
        /// Why it does not fit.
        reason: &'static str,
        /// The remedy.
        remedy: &'static str,
        /// Shape of the query, (B, Hq, Tq, D).
        query: [usize; 4],
        /// The tensor that the query does not fit: the output, or the live K.
        what: &'static str,
        /// Its shape, (B, H, T, D).
        other: [usize; 4],
    },

    /// Fewer tokens than the latest ones of which some are to be kept.
    #[error(
        "the latest {asked} tokens were named, but layer {layer} has {live} live ones in each row; name at most {live}"
    )]
    TooFewTokens {
        /// The layer.
        layer: usize,
        /// Its live tokens.
        live: usize,
        /// Tokens that were named.
        asked: usize,
    },

    /// Memory of several batch rows for the cross side of a cache whose rows share one.
    #[error(
        "the memory has {batch} batch rows, and this cache shares one among all rows of the decoder; hand in one row, or make the cache without with_shared_memory()"
    )]
    SharedMemory {
        /// Batch rows that were handed in.
        batch: usize,
    },

    /// A number among the options of attention that no scores can be made with.
    #[error("the {option} of attention is {value}: {rule}")]
    AttentionOption {
        /// Which option.
        option: &'static str,
        /// What was given, as text.
        value: String,
        /// What it must be.
        rule: &'static str,
    },

    /// The partial results of attention do not fit into one buffer.
    #[error(
        "attention over {tokens} tokens, in {splits} splits, needs {bytes} bytes for partial results, more than the {limit} that this device binds as one buffer; pass fewer queries, heads or batch rows at once"
    )]
    AttentionTooLarge {
        /// Live tokens.
        tokens: usize,
        /// Splits of the tokens, each with partial results of all queries.
        splits: usize,
        /// Bytes of all partial results.
        bytes: u64,
        /// The device's limit, in bytes.
        limit: u64,
    },

    /// The output of attention is in a buffer that holds a cache's content.
    #[error(
        "the output of attention is in the buffer of {what}, so it would overwrite a cache's content; give the output a buffer of its own, or a range of the query's"
    )]
    OutputIsRead {
        /// Which buffer: K, V or the page table of the view, or that of another layer or cache.
        what: &'static str,
    },

    /// The output of attention overlaps the query.
    #[error(
        "the output of attention (bytes {output:?} of its buffer) and the query (bytes {query:?} of the same) overlap, or their elements interleave, but not as different columns of the same rows; give the output a range of its own, or another buffer"
    )]
    OutputOverlapsQuery {
        /// From the first byte of the query to one past its last.
        query: std::ops::Range<u64>,
        /// From the first byte of the output to one past its last.
        output: std::ops::Range<u64>,
    },

    /// A count does not fit its integer type.
    #[error(
        "the {what} would be {asked}, more than the highest possible count of {limit}; use fewer tokens, heads or batch rows, and lower positions"
    )]
    SizeOverflow {
        /// The count.
        what: &'static str,
        /// The count that was requested.
        asked: String,
        /// The highest count.
        limit: u64,
    },

    /// A dispatch would need more workgroups than the device allows.
    #[error(
        "{what} needs {needed} workgroups, more than this device allows in a dispatch ({limit} in each dimension); use fewer batch rows, heads or tokens at once"
    )]
    TooManyWorkgroups {
        /// Which kernel.
        what: &'static str,
        /// Workgroups needed.
        needed: u64,
        /// The device's limit, in one dimension.
        limit: u32,
    },

    /// The device has no memory left.
    #[error(
        "the device is out of memory: {bytes} bytes for '{label}' could not be allocated; the cache is unchanged. Free other buffers, or shorten the sequence or the batch"
    )]
    OutOfMemory {
        /// Bytes that were requested.
        bytes: u64,
        /// Label of the buffer.
        label: String,
    },

    /// A buffer that is larger than the device creates.
    #[error(
        "'{label}' needs a buffer of {bytes} bytes, more than the {limit} that this device allows; use fewer tokens, heads or batch rows at once, or request a device with a higher max_buffer_size"
    )]
    BufferTooLarge {
        /// Label of the buffer.
        label: String,
        /// Bytes that were requested.
        bytes: u64,
        /// The device's limit, in bytes.
        limit: u64,
    },

    /// The device failed to create something, for example because it is lost.
    #[error(
        "the device could not create or run '{label}': {reason}; if it is lost, make a new device and a new cache"
    )]
    Device {
        /// The object that was to be created.
        label: String,
        /// The device's message.
        #[source]
        reason: Reason,
    },

    /// A read-back failed.
    #[error(
        "reading layer {layer} back failed: {reason}; if the device is lost, make a new device and a new cache"
    )]
    Readback {
        /// The layer.
        layer: usize,
        /// The device's message.
        #[source]
        reason: Reason,
    },

    /// `get` was called while recorded work had not been submitted.
    #[error(
        "{calls} calls on this cache are recorded in a pass that has not been submitted, so their results cannot be read back yet; finish the encoder and queue.submit() it before get(). If it was submitted, it was a pass of a device other than the cache's"
    )]
    NotSubmitted {
        /// Recorded calls that have not been submitted.
        calls: u64,
    },

    /// A pass with work of this cache was dropped instead of submitted, or its submit failed.
    #[error(
        "a pass with {calls} recorded calls on this cache never ran: it was dropped without being submitted, or the submit failed (the device's error handler received the reason). The GPU's content no longer matches the cache; reset() the cache and fill it again"
    )]
    PassDropped {
        /// Recorded calls that never ran.
        calls: u64,
    },

    /// A call into a pass after the cache has recorded into a later one.
    #[error(
        "this cache has recorded into a later pass since it recorded into this one, and passes run one after the other; record into one pass at a time, and go on with the later pass or a new one"
    )]
    EarlierPass,

    /// The device is lost: destroyed, or given up by the system.
    #[error("the device is lost, and so is all of its memory; make a new device and a new cache")]
    DeviceLost,

    /// A device with a limit that is lower than the kernels need.
    #[error(
        "the device was made with {limit} {value}, but the kernels need {needed}; request it with wgpu::Limits::default() or more"
    )]
    DeviceLimit {
        /// Which limit, as a field of `wgpu::Limits`.
        limit: &'static str,
        /// The device's value.
        value: u64,
        /// The least that is needed.
        needed: u64,
    },

    /// A tensor, a view, a pass or a queue of another device.
    #[error(
        "{what} belongs to another device; caches, attention and their inputs must be of one device, which clones of a Gpu share"
    )]
    OtherDevice {
        /// Which object.
        what: &'static str,
    },

    /// An option that this kind of cache needs is missing.
    #[error(
        "a {kind} cannot be made without the option {option}; set it with CacheOptions::with_{option}()"
    )]
    MissingOption {
        /// The option.
        option: &'static str,
        /// The kind of cache.
        kind: &'static str,
    },

    /// An option that this kind of cache does not take.
    #[error(
        "a {kind} does not take the option {option}; leave it out, or make a cache of a kind that takes it"
    )]
    UnusedOption {
        /// The option.
        option: &'static str,
        /// The kind of cache.
        kind: &'static str,
    },

    /// A kind of cache that does not implement a call.
    #[error("this kind of cache does not implement {what}; its authors can add it")]
    NotSupported {
        /// Which call.
        what: &'static str,
    },

    /// No adapter was found.
    #[error("no wgpu adapter was found ({reason}). {}", adapter_remedy())]
    NoAdapter {
        /// wgpu's message.
        #[source]
        reason: Reason,
    },

    /// The adapter did not return a device.
    #[error(
        "the adapter '{adapter}' did not return a device: {reason}; request lower limits or fewer features, or another adapter"
    )]
    NoDevice {
        /// Name of the adapter.
        adapter: String,
        /// wgpu's message.
        #[source]
        reason: Reason,
    },
}
