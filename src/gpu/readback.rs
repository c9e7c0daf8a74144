//! Read-back from the GPU to the host: staging buffers and mapping. The only calls of caches that submit and wait.

use std::future::poll_fn;
use std::ops::Range;
use std::sync::Arc;
use std::task::{Context, Poll};
#[cfg(not(target_arch = "wasm32"))]
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::format::Format;
use crate::gpu::Gpu;
use crate::gpu::arrivals::Arrivals;
#[cfg(not(target_arch = "wasm32"))]
use crate::gpu::arrivals::PAUSES;
use crate::gpu::call::Call;
use crate::gpu::device::{answer_now, binding_limit};
use crate::gpu::ledger::{Ledger, Snapshot, Verdict};
use crate::gpu::range::BufferRange;
use crate::stored::StoredTensor;
use crate::view::LayerView;

/// How long a blocking read-back waits for the device, all earlier submissions included.
#[cfg(not(target_arch = "wasm32"))]
const TIMEOUT: Duration = Duration::from_secs(120);
/// How long another thread may take to run callbacks of completed work.
#[cfg(not(target_arch = "wasm32"))]
const CALLBACK_TIMEOUT: Duration = Duration::from_millis(500);

/// A layer's live tokens on their way to the host.
#[derive(Debug)]
pub(crate) struct Readback {
    layer: usize,
    /// K, and V unless it is the first elements of K.
    tensors: Vec<Staging>,
    /// Elements a head of V.
    value_dim: usize,
    /// The buffer that the witness was copied to, and its byte offset in it.
    witness: Option<(wgpu::Buffer, u64)>,
    arrivals: Arc<Arrivals>,
    #[cfg(not(target_arch = "wasm32"))]
    submission: wgpu::SubmissionIndex,
    /// The counts of calls at the start of the read-back.
    before: Snapshot,
}

/// One tensor's live bytes in mappable buffers: one buffer, or several if the bytes exceed `max_buffer_size`.
#[derive(Debug)]
struct Staging {
    format: Format,
    shape: [usize; 4],
    /// The buffers, and how many batch rows each one has: the elements of all of them, then the scales.
    pieces: Vec<(wgpu::Buffer, usize)>,
}

impl Readback {
    /// Copies the live tokens, and no others, to staging buffers, submits, and requests the mapping. `ring_slots` are
    /// the slots of the live tokens, oldest first; a paged view does not use them.
    pub(crate) fn start(
        gpu: &Gpu,
        layer: usize,
        view: &LayerView,
        ring_slots: [Range<usize>; 2],
        ledger: &Ledger,
    ) -> Result<Self> {
        let before = ledger.snapshot();
        let rows = rows_per_piece(gpu, view);
        let staging = |format, shape| Staging { format, shape, pieces: Vec::new() };
        let mut tensors = vec![staging(view.key_format(), view.key_shape())];
        if !view.is_value_in_key() {
            tensors.push(staging(view.value_format(), view.value_shape()));
        }
        tensors.iter().try_for_each(Staging::check_host)?;
        let mut witness = None;
        for (i, tensor) in tensors.iter_mut().enumerate() {
            let counted = ledger.witness().is_some() && i == 0;
            tensor.make_pieces(gpu, rows, counted.then_some(&mut witness))?;
        }
        let scope = gpu.device().push_error_scope(wgpu::ErrorFilter::Validation);
        let descriptor = wgpu::CommandEncoderDescriptor { label: Some("kvcache get") };
        let mut encoder = gpu.device().create_command_encoder(&descriptor);
        let is_quantized = tensors.iter().any(|tensor| tensor.format.is_quantized());
        // Buffers of an engine need not be for copies.
        let is_copied =
            |buffer: &wgpu::Buffer| buffer.usage().contains(wgpu::BufferUsages::COPY_SRC);
        let is_copied = is_copied(view.key()) && is_copied(view.value());
        if view.layout().has_table() || is_quantized || !is_copied {
            collect_rows(gpu, &mut encoder, view, &tensors, rows)?;
        } else {
            for (tensor, from) in tensors.iter().zip([&view.key, &view.value]) {
                tensor.copy(&mut encoder, view, &ring_slots, from);
            }
        }
        if let (Some(from), Some((to, at))) = (ledger.witness(), &witness) {
            let (page, offset) = from.binding();
            let page = gpu.uploads().witness_page(page);
            encoder.copy_buffer_to_buffer(&page, offset.into(), to, *at, 4);
        }
        let _submission = gpu.queue().submit([encoder.finish()]);
        let mut buffers: Vec<&wgpu::Buffer> =
            tensors.iter().flat_map(|tensor| &tensor.pieces).map(|(buffer, _)| buffer).collect();
        if let Some((buffer, _)) = witness.as_ref().filter(|(it, _)| !buffers.contains(&it)) {
            buffers.push(buffer);
        }
        let arrivals = Arrivals::of(&buffers);
        // In a browser a buffer may be mapped before the callbacks of earlier work have run. Callbacks run in order.
        #[cfg(target_arch = "wasm32")]
        arrivals.await_callbacks(gpu.queue());
        // On a lost device all of these calls fail, some of them silently.
        if let Some(error) = answer_now(scope.pop()) {
            return Err(Error::Readback { layer, reason: error.to_string().into() });
        }
        Ok(Self {
            layer,
            tensors,
            value_dim: view.value_dim,
            witness,
            arrivals,
            #[cfg(not(target_arch = "wasm32"))]
            submission: _submission,
            before,
        })
    }

    /// Bytes that were read back.
    pub(crate) fn bytes(&self) -> u64 {
        self.tensors.iter().map(Staging::bytes).sum()
    }

    /// Blocks until the bytes have arrived.
    #[cfg(not(target_arch = "wasm32"))]
    pub(super) fn wait(&self, gpu: &Gpu) -> Result<()> {
        let deadline = Instant::now() + TIMEOUT;
        gpu.device()
            .poll(wgpu::PollType::Wait {
                submission_index: Some(self.submission.clone()),
                timeout: Some(TIMEOUT),
            })
            .map_err(|error| self.failed(&error.to_string()))?;
        // The work has completed. Its callbacks have run, or will run soon on another thread that polled.
        loop {
            if let Some(outcome) = self.outcome() {
                return outcome;
            }
            if Instant::now() >= deadline {
                return Err(self.failed("the device finished the work but did not map the buffer"));
            }
            std::thread::sleep(PAUSES[0]);
        }
    }

    /// Waits briefly for the callbacks of earlier calls, which another thread may be about to run. Returns whether
    /// the bytes are those that were recorded; if not, the caller must read them again.
    #[cfg(not(target_arch = "wasm32"))]
    pub(super) fn wait_for_calls(&self, ledger: &Ledger) -> Result<bool> {
        let deadline = Instant::now() + CALLBACK_TIMEOUT;
        loop {
            match ledger.verdict(self.before, self.ran()?)? {
                Verdict::Whole => return Ok(true),
                Verdict::Overtaken => return Ok(false),
                Verdict::Waiting(calls) if Instant::now() >= deadline => {
                    return Err(Error::NotSubmitted { calls });
                }
                Verdict::Waiting(_) => std::thread::sleep(PAUSES[0]),
            }
        }
    }

    /// Completes when the bytes have arrived.
    pub(super) async fn arrive(&self, gpu: &Gpu) -> Result<()> {
        poll_fn(|context| {
            if let Err(error) = self.poll_and_schedule(gpu, context) {
                return Poll::Ready(Err(error));
            }
            self.outcome().map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }

    /// As `wait_for_calls`, without blocking.
    pub(super) async fn settle(&self, gpu: &Gpu, ledger: &Ledger) -> Result<bool> {
        let ran = self.ran()?;
        #[cfg(not(target_arch = "wasm32"))]
        let deadline = Instant::now() + CALLBACK_TIMEOUT;
        poll_fn(|context| {
            let waiting = match ledger.verdict(self.before, ran) {
                Err(error) => return Poll::Ready(Err(error)),
                Ok(Verdict::Whole) => return Poll::Ready(Ok(true)),
                Ok(Verdict::Overtaken) => return Poll::Ready(Ok(false)),
                Ok(Verdict::Waiting(calls)) => Error::NotSubmitted { calls },
            };
            #[cfg(not(target_arch = "wasm32"))]
            if Instant::now() < deadline {
                return match self.poll_and_schedule(gpu, context) {
                    Ok(()) => Poll::Pending,
                    Err(error) => Poll::Ready(Err(error)),
                };
            }
            let _ = (gpu, &context);
            Poll::Ready(Err(waiting))
        })
        .await
    }

    /// Polls the device without waiting, and schedules the next poll of the task.
    ///
    /// The mapping's callback wakes the task. On native backends callbacks run only while the device is polled. This
    /// polls it. Because nothing else may poll the device, a thread wakes the task from time to time, until the bytes
    /// have arrived or the future is dropped.
    fn poll_and_schedule(&self, gpu: &Gpu, context: &Context<'_>) -> Result<()> {
        self.arrivals.lock().waker = Some(context.waker().clone());
        #[cfg(not(target_arch = "wasm32"))]
        {
            gpu.device()
                .poll(wgpu::PollType::Poll)
                .map_err(|error| self.failed(&error.to_string()))?;
            self.arrivals.start_timer();
        }
        #[cfg(target_arch = "wasm32")]
        let _ = gpu;
        Ok(())
    }

    /// K and V, once all buffers are mapped.
    pub(crate) fn finish(&self) -> Result<(StoredTensor, StoredTensor)> {
        let key = self.tensor(&self.tensors[0])?;
        let value = match self.tensors.get(1) {
            Some(value) => self.tensor(value)?,
            None => key.prefix(self.value_dim),
        };
        Ok((key, value))
    }

    fn tensor(&self, staging: &Staging) -> Result<StoredTensor> {
        let mut planes: [Vec<u32>; 2] = Default::default();
        let row = staging.row_bytes();
        for (buffer, rows) in &staging.pieces {
            let [elements, scales] = row.map(|bytes| bytes * *rows as u64);
            for (words, range) in planes.iter_mut().zip([0..elements, elements..elements + scales])
            {
                if range.is_empty() {
                    continue;
                }
                let range = buffer
                    .get_mapped_range(range)
                    .map_err(|error| self.failed(&error.to_string()))?;
                match words.is_empty() {
                    true => *words = bytemuck::pod_collect_to_vec(&range),
                    false => words.extend(bytemuck::pod_collect_to_vec::<u8, u32>(&range)),
                }
            }
        }
        Ok(StoredTensor::new(staging.format, staging.shape, planes))
    }

    /// The number of calls that the witness had counted.
    fn ran(&self) -> Result<Option<u32>> {
        let Some((buffer, at)) = &self.witness else { return Ok(None) };
        // A mapped range must begin at a multiple of 8 bytes.
        let range = buffer
            .get_mapped_range(at / 8 * 8..at + 4)
            .map_err(|error| self.failed(&error.to_string()))?;
        Ok(bytemuck::pod_collect_to_vec::<u8, u32>(&range).last().copied())
    }

    /// `None` while a mapping is pending.
    fn outcome(&self) -> Option<Result<()>> {
        let awaited = self.arrivals.lock();
        (awaited.pending == 0).then(|| match &awaited.failure {
            Some(reason) => Err(self.failed(reason)),
            None => Ok(()),
        })
    }

    fn failed(&self, reason: &str) -> Error {
        Error::Readback { layer: self.layer, reason: reason.into() }
    }
}

impl Drop for Readback {
    /// Frees the staging buffers at once, which a browser's garbage collection does late.
    fn drop(&mut self) {
        let pieces =
            self.tensors.iter().flat_map(|tensor| &tensor.pieces).map(|(buffer, _)| buffer);
        let witness = self.witness.iter().map(|(buffer, _)| buffer);
        pieces.chain(witness).for_each(wgpu::Buffer::destroy);
    }
}

/// How many batch rows of K, and of V, fit one buffer. Shared pages are stored once but read back for each row that
/// shares them, so all rows together may exceed a buffer. A single row never exceeds the pool.
fn rows_per_piece(gpu: &Gpu, view: &LayerView) -> usize {
    let [key, value] = view.token_bytes().of_sides();
    let row = (view.heads * view.len) as u64 * key.max(value);
    let rows = gpu.limits().max_buffer_size / row.max(1);
    usize::try_from(rows).unwrap_or(view.batch).clamp(1, view.batch)
}

/// Copies the live tokens of a view of which a plain copy would not do, oldest first, through buffers of a few batch rows.
fn collect_rows(
    gpu: &Gpu,
    encoder: &mut wgpu::CommandEncoder,
    view: &LayerView,
    tensors: &[Staging],
    rows_per_piece: usize,
) -> Result<()> {
    if view.is_empty() {
        return Ok(());
    }
    let batch = view.batch;
    let row_bytes = view.token_bytes().of_sides().map(|row| row * (view.heads * view.len) as u64);
    let limit = binding_limit(gpu.limits()) / row_bytes[0].max(row_bytes[1]);
    let rows = usize::try_from(limit).unwrap_or(batch).clamp(1, rows_per_piece);
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
    // V that is not stored has a buffer as well, since the kernel binds one.
    let make = |bytes: u64| {
        gpu.handle().create_buffer("kvcache get", (bytes * rows as u64).max(16), usage)
    };
    let gathered = [make(row_bytes[0])?, make(row_bytes[1])?];
    for (piece, start) in (0..batch).step_by(rows_per_piece).enumerate() {
        let end = batch.min(start + rows_per_piece);
        for first in (start..end).step_by(rows) {
            let some = first..end.min(first + rows);
            let (count, all) = (some.len() as u64, (end - start) as u64);
            let targets = gathered.each_ref().map(wgpu::Buffer::as_entire_buffer_binding);
            let collect = gpu.kernels().collect(view, some, targets)?;
            let descriptor =
                wgpu::ComputePassDescriptor { label: Some("kvcache get"), timestamp_writes: None };
            let mut pass = encoder.begin_compute_pass(&descriptor);
            let mut call = Call::default();
            collect.into_iter().for_each(|dispatch| call.add(dispatch));
            call.record(&mut pass, &Ledger::default())?;
            drop(pass);
            for (from, to) in gathered.iter().zip(tensors) {
                let [elements, scales] = to.row_bytes();
                let (at, to) = ((first - start) as u64, &to.pieces[piece].0);
                encoder.copy_buffer_to_buffer(from, 0, to, at * elements, count * elements);
                if scales > 0 {
                    let (begin, at) = (count * elements, all * elements + at * scales);
                    encoder.copy_buffer_to_buffer(from, begin, to, at, count * scales);
                }
            }
        }
    }
    Ok(())
}

impl Staging {
    /// Refuses a tensor that this host cannot hold: one of 32 bits, as a browser is, holds at most 2 GiB. Rows that
    /// share pages are read back once each.
    fn check_host(&self) -> Result<()> {
        let size = self.format.read_dtype().size();
        let bytes =
            self.shape.iter().fold(size as u64, |all, &extent| all.saturating_mul(extent as u64));
        let limit = isize::MAX as u64;
        if bytes > limit {
            let asked = format!("{bytes} bytes for {:?}", self.shape);
            return Err(Error::overflow("size of a tensor on this host", asked, limit));
        }
        Ok(())
    }

    fn bytes(&self) -> u64 {
        self.shape[0] as u64 * self.row_bytes().iter().sum::<u64>()
    }

    /// Bytes of a batch row: its elements, and its scales.
    fn row_bytes(&self) -> [u64; 2] {
        let [_, heads, len, dim] = self.shape;
        self.format.plane_bytes(dim).map(|token| token * (heads * len) as u64)
    }

    /// Creates buffers of `rows` batch rows each and, if asked for, space for the witness at the end of the last one.
    fn make_pieces(
        &mut self,
        gpu: &Gpu,
        rows: usize,
        witness: Option<&mut Option<(wgpu::Buffer, u64)>>,
    ) -> Result<()> {
        let usage = wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ;
        let make = |bytes| gpu.handle().create_buffer("kvcache get", bytes, usage);
        let (batch, row) = (self.shape[0], self.row_bytes().iter().sum::<u64>());
        let limit = gpu.limits().max_buffer_size;
        let mut at = None;
        for first in (0..batch).step_by(rows).filter(|_| row > 0) {
            let end = batch.min(first + rows);
            let bytes = (end - first) as u64 * row;
            let has_witness = witness.is_some() && end == batch && bytes + 4 <= limit;
            let buffer = make(bytes + if has_witness { 4 } else { 0 })?;
            if has_witness {
                at = Some((buffer.clone(), bytes));
            }
            self.pieces.push((buffer, end - first));
        }
        if let Some(witness) = witness {
            *witness = Some(match at {
                Some(at) => at,
                None => (make(4)?, 0),
            });
        }
        Ok(())
    }

    /// Copies the live slots of every row and head, oldest token first.
    fn copy(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        view: &LayerView,
        ring_slots: &[Range<usize>; 2],
        from: &BufferRange,
    ) {
        // A ring has all rows in one piece, because the ring itself is one buffer.
        let Some((buffer, _)) = self.pieces.first() else { return };
        let [batch, heads, len, dim] = self.shape;
        let token = self.format.token_bytes(dim);
        let mut to = 0;
        let mut copy = |slot: usize, slots: usize| {
            let bytes = slots as u64 * token;
            if bytes > 0 {
                let at = from.offset + slot as u64 * token;
                encoder.copy_buffer_to_buffer(&from.buffer, at, buffer, to, bytes);
            }
            to += bytes;
        };
        if view.start() == 0 && len == view.capacity() {
            // Rows follow each other without a gap.
            copy(0, batch * heads * len);
            return;
        }
        for row in 0..batch * heads {
            let base = row * view.capacity();
            ring_slots.iter().for_each(|slots| copy(base + slots.start, slots.len()));
        }
    }
}
