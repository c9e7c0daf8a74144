//! Waits for what the GPU answers: a native call blocks, and in a browser the test is suspended meanwhile.

use std::future::Future;

use wgpu_kvcache::{
    EncoderDecoderCache, Error, HostTensor, KVCache, SequenceCache, SequenceId, Side, StoredTensor,
};

/// What a layer holds.
type Read<T = HostTensor> = Result<Option<(T, T)>, Error>;

/// Runs a future to its end.
#[cfg(not(target_arch = "wasm32"))]
pub(crate) fn wait<T>(future: impl Future<Output = T>) -> T {
    pollster::block_on(future)
}

/// Runs a future to its end. Between two polls the browser goes on with its own work.
#[cfg(target_arch = "wasm32")]
pub(crate) fn wait<T>(future: impl Future<Output = T>) -> T {
    use std::task::{Context, Poll, Waker};
    let mut future = std::pin::pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
        crate::browser::pause();
    }
}

/// Reading a layer back by the call that waits, where there is one: `get` or, in a browser, `get_async`.
pub(crate) trait ReadLayer {
    fn read(&self, layer: usize) -> Read;
    fn read_stored(&self, layer: usize) -> Read<StoredTensor>;
}

impl<C: KVCache + ?Sized> ReadLayer for C {
    fn read(&self, layer: usize) -> Read {
        if cfg!(target_arch = "wasm32") { wait(self.get_async(layer)) } else { self.get(layer) }
    }

    fn read_stored(&self, layer: usize) -> Read<StoredTensor> {
        match cfg!(target_arch = "wasm32") {
            true => wait(self.get_stored_async(layer)),
            false => self.get_stored(layer),
        }
    }
}

/// As [`ReadLayer`], of a side of a pair.
pub(crate) trait ReadSide {
    fn read(&self, layer: usize, side: Side) -> Read;
}

impl<S: KVCache, C: KVCache> ReadSide for EncoderDecoderCache<S, C> {
    fn read(&self, layer: usize, side: Side) -> Read {
        match cfg!(target_arch = "wasm32") {
            true => wait(self.get_async(layer, side)),
            false => self.get(layer, side),
        }
    }
}

/// As [`ReadLayer`], of a sequence.
pub(crate) trait ReadSequence {
    fn read(&self, sequence: SequenceId, layer: usize) -> Read;
}

impl ReadSequence for SequenceCache {
    fn read(&self, sequence: SequenceId, layer: usize) -> Read {
        match cfg!(target_arch = "wasm32") {
            true => wait(self.get_async(sequence, layer)),
            false => self.get(sequence, layer),
        }
    }
}
