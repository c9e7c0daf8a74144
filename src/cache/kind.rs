//! What makes a type a kind of cache: [`Layers`](crate::storage::layers::Layers) in a field `layers`, under the
//! policy that the kind chose. Everything that a cache is asked is answered by the layers.

/// Implements the traits of a cache for a kind.
macro_rules! implement_cache {
    ($kind:ty) => {
        impl crate::cache::Cache for $kind {
            fn reset(&mut self) {
                self.layers.reset();
            }

            fn release(&mut self) {
                self.layers.release();
            }

            fn crop(&mut self, max_length: usize) {
                self.layers.cut(&crate::host::rows::Cut::Crop(max_length));
            }

            fn truncate(&mut self, length: usize) {
                self.layers.cut(&crate::host::rows::Cut::Truncate(length));
            }

            fn crop_rows(&mut self, max_lengths: &[usize]) -> crate::error::Result<()> {
                let cut = crate::host::rows::Cut::CropRows(max_lengths.to_vec());
                self.layers.cut_rows(&cut)
            }

            fn truncate_rows(&mut self, lengths: &[usize]) -> crate::error::Result<()> {
                let cut = crate::host::rows::Cut::TruncateRows(lengths.to_vec());
                self.layers.cut_rows(&cut)
            }

            fn drop_latest(&mut self, tokens: usize) -> crate::error::Result<()> {
                self.layers.drop_latest(tokens)
            }

            fn keep_latest(
                &mut self,
                pass: &mut wgpu::ComputePass<'_>,
                tokens: usize,
                keep: &[u32],
            ) -> crate::error::Result<()> {
                self.layers.keep_latest(pass, tokens, keep)
            }

            fn prepare_batch(
                &mut self,
                change: crate::host::batch::BatchChange<'_>,
            ) -> crate::error::Result<()> {
                self.layers.prepare_batch(change)
            }

            fn batch_select_indices(
                &mut self,
                pass: &mut wgpu::ComputePass<'_>,
                indices: &[u32],
            ) -> crate::error::Result<()> {
                self.layers.change_batch(pass, crate::host::batch::BatchChange::Select(indices))
            }

            fn batch_repeat_interleave(
                &mut self,
                pass: &mut wgpu::ComputePass<'_>,
                repeats: usize,
            ) -> crate::error::Result<()> {
                self.layers.change_batch(pass, crate::host::batch::BatchChange::Repeat(repeats))
            }

            fn reserve(
                &mut self,
                pass: &mut wgpu::ComputePass<'_>,
                tokens: usize,
            ) -> crate::error::Result<()> {
                self.layers.reserve(pass, tokens)
            }

            fn get_max_cache_shape(&self) -> Option<usize> {
                self.layers.bound()
            }

            fn stats(&self) -> crate::stats::Stats {
                self.layers.stats()
            }
        }

        impl crate::cache::KVCache for $kind {
            fn update(
                &mut self,
                pass: &mut wgpu::ComputePass<'_>,
                key: &crate::tensor::TensorView<'_>,
                value: &crate::tensor::TensorView<'_>,
                layer_idx: usize,
                cache_position: crate::host::position::CachePosition<'_>,
            ) -> crate::error::Result<crate::view::LayerView> {
                self.layers.update(pass, key, value, layer_idx, cache_position)
            }

            fn view(
                &self,
                layer_idx: usize,
            ) -> crate::error::Result<Option<crate::view::LayerView>> {
                self.layers.view(layer_idx)
            }

            fn get(
                &self,
                layer_idx: usize,
            ) -> crate::error::Result<Option<(crate::tensor::HostTensor, crate::tensor::HostTensor)>>
            {
                Ok(self.layers.get(layer_idx)?.map(crate::stored::into_tensors))
            }

            fn get_async(&self, layer_idx: usize) -> crate::cache::GetFuture<'_> {
                let stored = self.layers.get_async(layer_idx);
                Box::pin(async { Ok(stored.await?.map(crate::stored::into_tensors)) })
            }

            fn get_stored(
                &self,
                layer_idx: usize,
            ) -> crate::error::Result<
                Option<(crate::stored::StoredTensor, crate::stored::StoredTensor)>,
            > {
                self.layers.get(layer_idx)
            }

            fn get_stored_async(
                &self,
                layer_idx: usize,
            ) -> crate::cache::GetFuture<'_, crate::stored::StoredTensor> {
                Box::pin(self.layers.get_async(layer_idx))
            }

            #[cfg(feature = "safetensors")]
            fn save(&self, layers: std::ops::Range<usize>) -> crate::error::Result<Vec<u8>> {
                crate::saved::to_bytes(&self.layers.save(layers)?)
            }

            #[cfg(feature = "safetensors")]
            fn save_async(&self, layers: std::ops::Range<usize>) -> crate::cache::SaveFuture<'_> {
                Box::pin(async { crate::saved::to_bytes(&self.layers.save_async(layers).await?) })
            }

            #[cfg(feature = "safetensors")]
            fn restore(
                &mut self,
                pass: &mut wgpu::ComputePass<'_>,
                bytes: &[u8],
            ) -> crate::error::Result<()> {
                self.layers.restore(pass, &crate::saved::parse(bytes)?)
            }

            fn get_seq_length(&self, layer_idx: usize) -> crate::error::Result<usize> {
                self.layers.seq_length(layer_idx)
            }

            fn get_next_position(&self, layer_idx: usize) -> crate::error::Result<usize> {
                self.layers.next_position(layer_idx)
            }
        }
    };
}

pub(crate) use implement_cache;
