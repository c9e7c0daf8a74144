//! burn's tensors as views of their memory: [`lend`].

use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::Cube;
use burn::backend::fusion::custom::{
    CustomOpIr, HandleContainer, OperationFn, OperationIr, StreamId, TensorIr,
};
use burn::backend::tensor::FloatTensor;
use burn::backend::wgpu::{AutoCompiler, CubeBackend, CubeTensor, WgpuResource};
use burn::tensor::{DType, Shape, Tensor};
use burn_cubecl::cubecl::wgpu::WgpuServer;
use burn_cubecl::fusion::CubeFusionHandle;
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

/// A burn tensor that a pass shall read, checked but not looked up yet.
pub(crate) struct Wanted {
    what: &'static str,
    order: Order,
    dtype: Stored,
    tensor: FloatTensor<Cube>,
}

impl Wanted {
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
        let tensor = tensor
            .try_into_primitive::<Cube>()
            .map_err(|reason| Error::Backend { what, reason: format!("{reason:?}") })?;
        Ok(Self { what, order, dtype, tensor })
    }

    /// (B, H, T, D).
    pub(crate) fn shape(&self) -> [usize; 4] {
        self.order.arrange(&self.tensor.shape, 1)
    }
}

/// Runs what is queued of tensors, of one at least, and looks up where they lie. With `output`, the extents of a
/// tensor in the order and of the element type of the first, makes it too: it is lent last, and its elements are not written.
///
/// Operations that fusion holds back are run, then cubecl's queue of the streams concerned is submitted. So whatever
/// is submitted to the wgpu queue afterwards finds the elements written. All of that is one operation of fusion and one
/// of cubecl, since each takes a round trip to another thread.
pub(crate) fn lend(
    wanted: Vec<Wanted>,
    output: Option<[usize; 4]>,
) -> Result<(Vec<Lent>, Option<FloatTensor<Cube>>)> {
    let first = &wanted[0];
    let (client, mut named) = (first.tensor.client.clone(), Vec::new());
    let made = output.map(|shape| {
        let dims = Shape::from(first.order.arrange_back(shape));
        TensorIr::uninit(client.create_empty_handle(), dims, first.tensor.dtype)
    });
    let made_as = ("the output", first.order, first.dtype);
    let mut inputs = Vec::new();
    for Wanted { what, order, dtype, tensor } in wanted {
        named.push((what, order, dtype));
        inputs.push(tensor.into_ir());
    }
    let id = "wgpu-kvcache: lend";
    let described = CustomOpIr::new(id, &inputs, made.as_slice());
    let found = Arc::new(Mutex::new(Vec::new()));
    let slot = Arc::clone(&found);
    let operation = OperationFn(move |handles: &mut HandleContainer<CubeFusionHandle>| {
        let get = |ir| handles.get_float_tensor::<CubeBackend>(ir);
        let mut tensors: Vec<CubeTensor> = inputs.iter().map(get).collect();
        if let Some(ir) = &made {
            let CubeTensor { client, device, .. } = tensors[0].clone();
            let (bytes, dims) = (ir.shape.num_elements() * ir.dtype.size(), ir.shape.clone());
            let handle = client.empty(bytes);
            let tensor = CubeTensor::new_contiguous(client, device, dims, handle, ir.dtype);
            handles.register_float_tensor::<CubeBackend>(&ir.id, tensor.clone());
            tensors.push(tensor);
        }
        *slot.lock().unwrap_or_else(PoisonError::into_inner) = tensors;
        Ok(())
    });
    let stream = StreamId::current();
    let outputs = client.register(stream, OperationIr::Custom(described), operation);
    if !outputs.is_empty() {
        named.push(made_as);
    }
    let memory =
        |reason: String| Error::Memory { what: "the query, K, V, a mask or the output", reason };
    client.try_sync(|| ()).map_err(|error| memory(format!("{error:?}")))?;
    let tensors = std::mem::take(&mut *found.lock().unwrap_or_else(PoisonError::into_inner));
    if tensors.len() < named.len() {
        return Err(memory("an operation that makes one of them has failed".into()));
    }
    let lent = tensors[0].client.clone().exclusive(|| {
        let both = tensors.into_iter().zip(named);
        both.map(|(tensor, (what, order, dtype))| Lent::of(what, tensor, dtype, order)).collect()
    });
    let lent: Result<Vec<Lent>> = lent.map_err(|error| memory(format!("{error:?}")))?;
    Ok((lent?, outputs.into_iter().next()))
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
    _binding: Box<dyn Any + Send>,
    resource: WgpuResource,
    dtype: Stored,
    shape: [usize; 4],
    strides: [usize; 4],
}

impl Lent {
    /// Looks a tensor up; one that a kernel cannot read where it lies is copied first.
    fn of(what: &'static str, tensor: CubeTensor, dtype: Stored, order: Order) -> Result<Self> {
        let tensor = if tensor.meta.is_tiled() { into_contiguous(tensor) } else { tensor };
        let lent = Self::at(what, tensor, dtype, order)?;
        if lent.is_readable() {
            return Ok(lent);
        }
        Self::at(what, into_contiguous(lent.tensor), dtype, order)
    }

    fn at(what: &'static str, tensor: CubeTensor, dtype: Stored, order: Order) -> Result<Self> {
        let binding = tensor
            .client
            .get_resource::<WgpuServer<AutoCompiler>>(tensor.handle.clone())
            .map_err(|reason| Error::Memory { what, reason: format!("{reason:?}") })?;
        let shape = order.arrange(tensor.meta.shape(), 1);
        let strides = order.arrange(tensor.meta.strides(), 0);
        let resource = binding.resource().clone();
        Ok(Self { tensor, _binding: Box::new(binding), resource, dtype, shape, strides })
    }

    /// Whether a kernel of the cache can read it where it lies.
    fn is_readable(&self) -> bool {
        let words = |elements: usize| (elements * self.dtype.size()).is_multiple_of(4);
        let is_used = |axis: usize| self.shape[axis] > 1;
        self.resource.offset.is_multiple_of(4)
            && (!is_used(3) || self.strides[3] == 1)
            && (0..3).all(|axis| !is_used(axis) || words(self.strides[axis]))
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
