//! Counters of a cache: [`Stats`].

/// Counts of a cache's work and memory. They are exact.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Dispatches recorded.
    pub dispatches: u64,
    /// Bytes of K and V that the recorded dispatches write.
    pub bytes_moved: u64,
    /// Buffers of K and V allocated now.
    pub buffers: u64,
    /// Bytes of K and V allocated now.
    pub bytes_allocated: u64,
    /// The highest value of `bytes_allocated` so far.
    pub peak_bytes_allocated: u64,
    /// Bytes read back to the host.
    pub bytes_read_back: u64,
    /// Pages that rows of a layer refer to, in the layer with the most of them; 0 for kinds without pages. Layers that
    /// advance together share one page table, so this number does not grow with the number of layers.
    pub pages_used: u64,
    /// Pages of `pages_used` that several rows share.
    pub pages_shared: u64,
    /// Pages of that layer's pool that no row refers to.
    pub pages_free: u64,
    /// The highest value of `pages_used` so far.
    pub peak_pages_used: u64,
}

impl std::ops::Add for Stats {
    type Output = Self;

    /// The statistics of two caches together; peaks are the sums of both peaks.
    fn add(self, other: Self) -> Self {
        Self {
            dispatches: self.dispatches + other.dispatches,
            bytes_moved: self.bytes_moved + other.bytes_moved,
            buffers: self.buffers + other.buffers,
            bytes_allocated: self.bytes_allocated + other.bytes_allocated,
            peak_bytes_allocated: self.peak_bytes_allocated + other.peak_bytes_allocated,
            bytes_read_back: self.bytes_read_back + other.bytes_read_back,
            pages_used: self.pages_used + other.pages_used,
            pages_shared: self.pages_shared + other.pages_shared,
            pages_free: self.pages_free + other.pages_free,
            peak_pages_used: self.peak_pages_used + other.peak_pages_used,
        }
    }
}
