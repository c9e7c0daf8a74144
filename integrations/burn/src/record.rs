//! Attention over burn's tensors, recorded and submitted: [`Attender`].

use burn::tensor::Tensor;
use wgpu_kvcache::wgpu::{self, ComputePass};
use wgpu_kvcache::{Attention, AttentionOptions, TensorView};

use crate::device::SharedDevice;
use crate::error::Result;
use crate::tensor::{Lent, Order};

/// Attention on a device, and what it keeps from call to call.
#[derive(Debug)]
pub(crate) struct Attender {
    shared: SharedDevice,
    attention: Attention,
    /// A copy of the latest mask: burn may have put the mask and the output into one buffer, and no buffer can be
    /// bound for reading and for writing in one dispatch.
    mask: Option<wgpu::Buffer>,
}

/// What a call reads, in a form that the pass can take.
pub(crate) struct Request<'a> {
    pub(crate) query: Lent,
    /// D of V, of each head.
    pub(crate) value_dim: usize,
    pub(crate) mask: Option<Tensor<4>>,
    pub(crate) order: Order,
    pub(crate) options: AttentionOptions<'a>,
}

impl Attender {
    pub(crate) fn new(shared: &SharedDevice) -> Self {
        let attention = Attention::new(shared.gpu());
        Self { shared: shared.clone(), attention, mask: None }
    }

    pub(crate) fn shared(&self) -> &SharedDevice {
        &self.shared
    }

    /// Lets go of what is kept: bind groups, and with them the pages of burn's memory, and the copy of a mask.
    pub(crate) fn release(&mut self) {
        self.attention.release();
        self.mask = None;
    }

    /// Submits a pass in which `record` records attention of the query into the output; returns the output.
    ///
    /// All tensors are looked up before, the output last: so whatever burn had queued is submitted first, and what
    /// burn submits later comes later.
    pub(crate) fn attend<const D: usize>(
        &mut self,
        request: Request<'_>,
        record: impl for<'b> FnOnce(
            &mut ComputePass<'_>,
            &mut Attention,
            [TensorView<'b>; 2],
            AttentionOptions<'b>,
        ) -> wgpu_kvcache::Result<()>,
    ) -> Result<Tensor<D>> {
        let Request { query, value_dim, mask, order, options } = request;
        let [batch, heads, tokens, _] = query.shape();
        let dims = order.arrange_back([batch, heads, tokens, value_dim]);
        let mask = mask.map(|mask| Lent::new(&self.shared, "the mask", mask, Order::Bhtd));
        let mask = mask.transpose()?;
        let tensor = Tensor::<D>::empty(dims, (self.shared.device(), query.burn_dtype()));
        let output = Lent::new(&self.shared, "the output", tensor.clone(), order)?;

        let copy = mask.as_ref().map(|mask| self.copy_mask(mask)).transpose()?;
        let options = match (&copy, &mask) {
            (Some(copy), Some(mask)) => options.with_mask(mask.view_of(copy)?),
            _ => options,
        };
        let views = [query.view()?, output.view()?];
        let attention = &mut self.attention;
        let gpu = self.shared.gpu();
        gpu.submit_pass("burn attention", |pass| record(pass, attention, views, options))?;
        // The tensors were lent until here: the pass is submitted.
        Ok(tensor)
    }

    /// Copies the bytes of a mask into a buffer of this crate.
    fn copy_mask(&mut self, mask: &Lent) -> Result<wgpu::Buffer> {
        let gpu = self.shared.gpu();
        let bytes = mask.resource().size.next_multiple_of(4);
        let buffer = match self.mask.take() {
            Some(buffer) if buffer.size() >= bytes => buffer,
            _ => gpu.device().create_buffer(&wgpu::BufferDescriptor {
                label: Some("mask of burn"),
                size: bytes.next_power_of_two(),
                usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            }),
        };
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        let from = mask.resource();
        encoder.copy_buffer_to_buffer(&from.buffer, from.offset, &buffer, 0, bytes);
        gpu.queue().submit([encoder.finish()]);
        self.mask = Some(buffer.clone());
        Ok(buffer)
    }
}
