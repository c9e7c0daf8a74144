//! Attention over burn's tensors, recorded and submitted: [`Attender`].

use burn::backend::Cube;
use burn::tensor::Tensor;
use wgpu_kvcache::wgpu::{self, ComputePass};
use wgpu_kvcache::{Attention, AttentionOptions, LayerTensors, TensorView};

use crate::device::SharedDevice;
use crate::error::Result;
use crate::tensor::{Lent, Order, Wanted, lend};

/// Attention on a device, and what it keeps from call to call.
#[derive(Debug)]
pub(crate) struct Attender {
    shared: SharedDevice,
    attention: Attention,
    /// A copy of the latest mask: burn may have put the mask and the output into one buffer, and no buffer can be
    /// bound for reading and for writing in one dispatch.
    mask: Option<wgpu::Buffer>,
}

/// What a call reads.
pub(crate) struct Request<'a> {
    pub(crate) query: Wanted,
    /// K and V, if they are new.
    pub(crate) new: Vec<Wanted>,
    /// D of V, of each head.
    pub(crate) value_dim: usize,
    pub(crate) mask: Option<Tensor<4>>,
    pub(crate) options: AttentionOptions<'a>,
}

/// What a pass reads and writes.
pub(crate) struct Views<'a> {
    pub(crate) query: TensorView<'a>,
    pub(crate) output: TensorView<'a>,
    /// K and V, if they are new.
    pub(crate) new: Vec<TensorView<'a>>,
}

impl<'a> Views<'a> {
    /// With K and V.
    pub(crate) fn layer(&self) -> LayerTensors<'a> {
        let (query, output) = (self.query, self.output);
        LayerTensors { query, key: self.new[0], value: self.new[1], output }
    }

    /// With K alone: V is the first elements of each head.
    pub(crate) fn latent(&self, value_dim: usize) -> LayerTensors<'a> {
        let (query, output, key) = (self.query, self.output, self.new[0]);
        LayerTensors { query, key, value: key.with_head_dim(value_dim), output }
    }
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
    pub(crate) fn attend<const D: usize>(
        &mut self,
        request: Request<'_>,
        record: impl for<'b> FnOnce(
            &mut ComputePass<'_>,
            &mut Attention,
            Views<'b>,
            AttentionOptions<'b>,
        ) -> wgpu_kvcache::Result<()>,
    ) -> Result<Tensor<D>> {
        let Request { query, new, value_dim, mask, options } = request;
        let [batch, heads, tokens, _] = query.shape();
        let count = new.len();
        let mut wanted = vec![query];
        wanted.extend(new);
        if let Some(mask) = mask {
            wanted.push(Wanted::new(&self.shared, "the mask", mask, Order::Bhtd)?);
        }
        let (lent, output) = lend(wanted, Some([batch, heads, tokens, value_dim]))?;
        let (Some(output), [query, others @ .., result]) = (output, &lent[..]) else {
            unreachable!("a query and an output are lent");
        };
        let (new, mask) = others.split_at(count);
        let copy = mask.first().map(|mask| self.copy_mask(mask)).transpose()?;
        let options = match (&copy, mask) {
            (Some(copy), [mask]) => options.with_mask(mask.view_of(copy)?),
            _ => options,
        };
        let new = new.iter().map(Lent::view).collect::<Result<_>>()?;
        let views = Views { query: query.view()?, output: result.view()?, new };
        let attention = &mut self.attention;
        let gpu = self.shared.gpu();
        gpu.submit_pass("burn attention", |pass| record(pass, attention, views, options))?;
        // The pass is submitted: the tensors need not be lent any longer.
        drop(lent);
        Ok(Tensor::from_primitive::<Cube>(output))
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
