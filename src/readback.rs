//! From the GPU to the host: staging buffers and mapping. The only code that submits and waits.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::gpu::{Gpu, binding_limit};
use crate::layout::Layout;
use crate::ledger::Ledger;
use crate::plan;
use crate::view::{HostTensor, LayerView};

/// How long a blocking read-back waits for the device, all earlier submissions included.
const TIMEOUT: Duration = Duration::from_secs(120);
/// How long callbacks that are due may take to run on another thread.
const GRACE: Duration = Duration::from_millis(500);
/// Between two looks at what another thread does.
const PAUSE: Duration = Duration::from_micros(50);

/// A layer's live tokens on their way to the host.
#[derive(Debug)]
pub(crate) struct Readback {
    layer: usize,
    key: Staging,
    value: Staging,
    submission: wgpu::SubmissionIndex,
    /// Calls that the cache had recorded when the read-back began.
    recorded: u64,
}

/// One tensor's live bytes in a mappable buffer.
#[derive(Debug)]
struct Staging {
    /// `None` where no token is live.
    buffer: Option<wgpu::Buffer>,
    dtype: crate::DType,
    shape: [usize; 4],
    mapped: Arc<Mutex<Mapped>>,
}

#[derive(Debug, Default)]
struct Mapped {
    result: Option<Result<(), String>>,
    waker: Option<Waker>,
}

impl Readback {
    /// Copies the live tokens aside, and no others, submits, and asks for the mapping.
    pub(crate) fn start(
        gpu: &Gpu,
        layer: usize,
        view: &LayerView<'_>,
        recorded: u64,
    ) -> Result<Self> {
        let key = Staging::new(gpu, view, view.key_shape())?;
        let value = Staging::new(gpu, view, view.value_shape())?;
        let scope = gpu.device().push_error_scope(wgpu::ErrorFilter::Validation);
        let descriptor = wgpu::CommandEncoderDescriptor { label: Some("kvcache get") };
        let mut encoder = gpu.device().create_command_encoder(&descriptor);
        if view.layout() == Layout::Paged {
            copy_pages(gpu, &mut encoder, view, [&key, &value])?;
        } else {
            key.copy(&mut encoder, view, view.key());
            value.copy(&mut encoder, view, view.value());
        }
        let submission = gpu.queue().submit([encoder.finish()]);
        key.map();
        value.map();
        // On a device that is lost every one of these fails, some without a word.
        if let Some(error) = crate::gpu::answer_now(scope.pop()) {
            return Err(Error::Readback { layer, reason: error.to_string() });
        }
        Ok(Self { layer, key, value, submission, recorded })
    }

    /// Bytes that were read back.
    pub(crate) fn bytes(&self) -> u64 {
        [&self.key, &self.value]
            .iter()
            .flat_map(|staging| &staging.buffer)
            .map(wgpu::Buffer::size)
            .sum()
    }

    /// Blocks until the bytes are here.
    pub(crate) fn wait(&self, gpu: &Gpu) -> Result<()> {
        let deadline = Instant::now() + TIMEOUT;
        gpu.device()
            .poll(wgpu::PollType::Wait {
                submission_index: Some(self.submission.clone()),
                timeout: Some(TIMEOUT),
            })
            .map_err(|error| self.failed(&error.to_string()))?;
        // The work is done. Its callbacks have run, or are about to run on another thread that polled.
        loop {
            if let Some(outcome) = self.outcome() {
                return outcome;
            }
            if Instant::now() >= deadline {
                return Err(self.failed("the device finished the work but did not map the buffer"));
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Waits a moment for the callbacks of calls recorded before, which another thread may be about to
    /// run; then says whether one was overtaken.
    pub(crate) fn wait_for_calls(&self, ledger: &Ledger) -> Result<()> {
        let deadline = Instant::now() + GRACE;
        loop {
            match ledger.check_submitted(self.recorded) {
                Err(Error::NotSubmitted { .. }) if Instant::now() < deadline => {
                    std::thread::sleep(PAUSE);
                }
                answer => return answer,
            }
        }
    }

    /// Completes when the bytes are here. In a browser the callback alone wakes it; elsewhere it polls
    /// the device whenever it is polled, since nobody else may.
    pub(crate) async fn arrive(&self, gpu: &Gpu) -> Result<()> {
        poll_fn(|context| {
            for staging in [&self.key, &self.value] {
                staging.mapped().waker = Some(context.waker().clone());
            }
            if cfg!(not(target_arch = "wasm32")) {
                if let Err(error) = gpu.device().poll(wgpu::PollType::Poll) {
                    return Poll::Ready(Err(self.failed(&error.to_string())));
                }
                context.waker().wake_by_ref();
            }
            self.outcome().map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }

    /// K and V, once both are mapped.
    pub(crate) fn finish(&self) -> Result<(crate::HostTensor, crate::HostTensor)> {
        Ok((self.tensor(&self.key)?, self.tensor(&self.value)?))
    }

    fn tensor(&self, staging: &Staging) -> Result<HostTensor> {
        let words = match &staging.buffer {
            None => Vec::new(),
            Some(buffer) => {
                let range = buffer
                    .slice(..)
                    .get_mapped_range()
                    .map_err(|error| self.failed(&error.to_string()))?;
                bytemuck::pod_collect_to_vec(&range)
            }
        };
        Ok(HostTensor::new(staging.dtype, staging.shape, words))
    }

    /// `None` as long as a mapping is under way.
    fn outcome(&self) -> Option<Result<()>> {
        let key = self.key.mapped().result.clone()?;
        let value = self.value.mapped().result.clone()?;
        Some(key.and(value).map_err(|reason| self.failed(&reason)))
    }

    fn failed(&self, reason: &str) -> Error {
        Error::Readback { layer: self.layer, reason: reason.to_owned() }
    }
}

/// Copies the live tokens of a paged view, oldest first, through buffers of a few batch rows: what rows
/// share is there once in the pool, and comes out as often as it is read.
fn copy_pages(
    gpu: &Gpu,
    encoder: &mut wgpu::CommandEncoder,
    view: &LayerView<'_>,
    [key, value]: [&Staging; 2],
) -> Result<()> {
    let (Some(key), Some(value)) = (&key.buffer, &value.buffer) else { return Ok(()) };
    let batch = view.batch;
    // A row is never larger than the pool, which can be bound.
    let row_bytes = [key, value].map(|staging| staging.size() / batch as u64);
    let limit = binding_limit(gpu.limits()) / row_bytes[0].max(row_bytes[1]);
    let rows = usize::try_from(limit).unwrap_or(batch).clamp(1, batch);
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
    let straight = [
        gpu.handle().create_buffer("kvcache get", row_bytes[0] * rows as u64, usage)?,
        gpu.handle().create_buffer("kvcache get", row_bytes[1] * rows as u64, usage)?,
    ];
    for first in (0..batch).step_by(rows) {
        let some = first..batch.min(first + rows);
        let count = some.len() as u64;
        let [keys, values] = &straight;
        let collect = gpu.kernels().collect(gpu, view, some, [keys, values])?;
        let descriptor =
            wgpu::ComputePassDescriptor { label: Some("kvcache get"), timestamp_writes: None };
        collect.record(
            &mut encoder.begin_compute_pass(&descriptor),
            &Ledger::default(),
            Vec::new(),
        );
        for ((from, to), bytes) in straight.iter().zip([key, value]).zip(row_bytes) {
            encoder.copy_buffer_to_buffer(from, 0, to, first as u64 * bytes, count * bytes);
        }
    }
    Ok(())
}

impl Staging {
    fn new(gpu: &Gpu, view: &LayerView<'_>, shape: [usize; 4]) -> Result<Self> {
        let bytes = (shape.iter().product::<usize>() * view.dtype().size()) as u64;
        let usage = wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ;
        let buffer = (bytes > 0).then(|| gpu.handle().create_buffer("kvcache get", bytes, usage));
        let mut mapped = Mapped::default();
        if bytes == 0 {
            mapped.result = Some(Ok(()));
        }
        Ok(Self {
            buffer: buffer.transpose()?,
            dtype: view.dtype(),
            shape,
            mapped: Arc::new(Mutex::new(mapped)),
        })
    }

    /// Copies the live slots of every row and head, oldest token first.
    fn copy(&self, encoder: &mut wgpu::CommandEncoder, view: &LayerView<'_>, from: &wgpu::Buffer) {
        let Some(buffer) = &self.buffer else { return };
        let [batch, heads, len, dim] = self.shape;
        let token = dim * view.dtype().size();
        let mut to = 0;
        let mut copy = |slot: usize, slots: usize| {
            let bytes = (slots * token) as u64;
            if bytes > 0 {
                encoder.copy_buffer_to_buffer(from, (slot * token) as u64, buffer, to, bytes);
            }
            to += bytes;
        };
        if view.start() == 0 && len == view.capacity() {
            // Rows follow each other without a gap.
            copy(0, batch * heads * len);
            return;
        }
        let (first, second) = plan::live_slots(view.start(), len, view.capacity());
        for row in 0..batch * heads {
            let base = row * view.capacity();
            copy(base + first.start, first.len());
            copy(base + second.start, second.len());
        }
    }

    fn map(&self) {
        let Some(buffer) = &self.buffer else { return };
        let mapped = Arc::clone(&self.mapped);
        buffer.map_async(wgpu::MapMode::Read, .., move |result| {
            let mut mapped = mapped.lock().unwrap_or_else(PoisonError::into_inner);
            mapped.result = Some(result.map_err(|error| error.to_string()));
            if let Some(waker) = mapped.waker.take() {
                waker.wake();
            }
        });
    }

    fn mapped(&self) -> std::sync::MutexGuard<'_, Mapped> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
