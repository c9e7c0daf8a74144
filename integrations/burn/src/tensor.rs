//! burn's tensors as views of their memory: [`Lent`].

use std::any::Any;

use burn::backend::Cube;
use burn::backend::wgpu::{AutoCompiler, CubeBackend, CubeTensor, WgpuResource};
use burn::tensor::{DType, Tensor};
use burn_cubecl::cubecl::wgpu::WgpuServer;
use burn_cubecl::kernel::into_contiguous;
use wgpu_kvcache::{AxisOrder, DType as Stored, TensorView, wgpu};

use crate::device::SharedDevice;
use crate::error::{Error, Result};

/// The order of the axes of a tensor, as the model makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// (B, H, T, D).
    Bhtd,
    /// (B, T, H, D).
    Bthd,
    /// (T, H, D): packed tokens.
    Thd,
}

impl Order {
    /// Four extents or strides for (B, H, T, D); `one` stands for an axis that is not there.
    fn arrange(self, axes: &[usize], one: usize) -> [usize; 4] {
        match (self, axes) {
            (Self::Bhtd, &[b, h, t, d]) | (Self::Bthd, &[b, t, h, d]) => [b, h, t, d],
            (_, &[t, h, d]) => [one, h, t, d],
            _ => unreachable!("the rank is that of the order"),
        }
    }
}

impl Order {
    /// The extents of a tensor in this order.
    pub(crate) fn arrange_back(self, [b, h, t, d]: [usize; 4]) -> Vec<usize> {
        match self {
            Self::Bhtd => vec![b, h, t, d],
            Self::Bthd => vec![b, t, h, d],
            Self::Thd => vec![t, h, d],
        }
    }
}

/// The memory of a burn tensor, for one pass.
///
/// burn reuses the memory of a tensor that nothing refers to. While this lives, the range is neither freed nor handed
/// out nor moved, and no operation of burn writes to it in place. It must live until the pass that reads it is
/// submitted. What burn submits afterwards comes later on the same queue, and may have the memory.
pub(crate) struct Lent {
    /// Keeps burn from writing in place.
    tensor: CubeTensor,
    /// Keeps cubecl from handing the range out.
    _binding: Box<dyn Any>,
    resource: WgpuResource,
    dtype: Stored,
    shape: [usize; 4],
    strides: [usize; 4],
}

impl Lent {
    /// Runs what is queued of `tensor` and looks up where it lies.
    ///
    /// Operations that fusion holds back are run, then cubecl's queue of the streams concerned is submitted. So
    /// whatever is submitted to the wgpu queue afterwards finds the elements written.
    pub(crate) fn new<const D: usize>(
        shared: &SharedDevice,
        what: &'static str,
        tensor: Tensor<D>,
        order: Order,
    ) -> Result<Self> {
        let device = tensor.device();
        if device != *shared.device() {
            let (got, expected) = (format!("{device:?}"), format!("{:?}", shared.device()));
            return Err(Error::OtherDevice { what, got, expected });
        }
        let dtype = match tensor.dtype() {
            DType::F32 | DType::Flex32 => Stored::F32,
            DType::F16 => Stored::F16,
            DType::BF16 => Stored::BF16,
            other => return Err(Error::DType { what, got: format!("{other:?}") }),
        };
        let fused = tensor
            .try_into_primitive::<Cube>()
            .map_err(|reason| Error::Backend { what, reason: format!("{reason:?}") })?;
        let client = fused.client.clone();
        let tensor = client.resolve_tensor_float::<CubeBackend>(fused);
        let lent = Self::of(what, tensor, dtype, order)?;
        if lent.is_readable() {
            return Ok(lent);
        }
        Self::of(what, into_contiguous(lent.tensor), dtype, order)
    }

    fn of(what: &'static str, tensor: CubeTensor, dtype: Stored, order: Order) -> Result<Self> {
        let tensor = if tensor.meta.is_tiled() { into_contiguous(tensor) } else { tensor };
        let binding = tensor
            .client
            .get_resource::<WgpuServer<AutoCompiler>>(tensor.handle.clone())
            .map_err(|reason| Error::Memory { what, reason: format!("{reason:?}") })?;
        let shape = order.arrange(tensor.meta.shape(), 1);
        let strides = order.arrange(tensor.meta.strides(), 0);
        Ok(Self {
            tensor,
            resource: binding.resource().clone(),
            _binding: Box::new(binding),
            dtype,
            shape,
            strides,
        })
    }

    /// Whether a kernel of the cache can read it where it lies.
    fn is_readable(&self) -> bool {
        let words = |elements: usize| (elements * self.dtype.size()).is_multiple_of(4);
        let is_used = |axis: usize| self.shape[axis] > 1;
        self.resource.offset.is_multiple_of(4)
            && (!is_used(3) || self.strides[3] == 1)
            && (0..3).all(|axis| !is_used(axis) || words(self.strides[axis]))
    }

    /// (B, H, T, D).
    pub(crate) fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Type of an element, as burn names it.
    pub(crate) fn burn_dtype(&self) -> DType {
        self.tensor.dtype
    }

    /// Where the elements lie.
    pub(crate) fn resource(&self) -> &WgpuResource {
        &self.resource
    }

    /// The view that a pass reads or writes. It ends with the tensor's own range.
    pub(crate) fn view(&self) -> Result<TensorView<'_>> {
        let WgpuResource { buffer, offset, size, .. } = &self.resource;
        let size = wgpu::BufferSize::new(*size);
        let binding = wgpu::BufferBinding { buffer, offset: *offset, size };
        let view = TensorView::from_binding(binding, self.dtype, AxisOrder::Bhtd, &self.shape)?;
        Ok(view.with_strides(self.strides))
    }

    /// The view of a copy of its bytes, at the start of `buffer`.
    pub(crate) fn view_of<'a>(&self, buffer: &'a wgpu::Buffer) -> Result<TensorView<'a>> {
        Ok(TensorView::new(buffer, self.dtype, &self.shape)?.with_strides(self.strides))
    }
}
