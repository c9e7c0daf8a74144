//! Pages with their reference counts. Pure host logic.

use crate::host::words::Words;

/// The pages of a pool, by number, and how many references each has: a value, whose copies share what they have
/// in common. A page without a reference is free, and is used again before a new number.
#[derive(Clone, Debug, Default)]
pub(crate) struct PagePool {
    /// References to each page that was ever in use.
    counts: Words,
    /// Free pages. The last one is used first.
    free: Words,
    /// Pages with several references.
    shared: usize,
}

impl PagePool {
    /// Pages that the pool must have memory for.
    pub(crate) fn len(&self) -> usize {
        self.counts.len()
    }

    /// Pages with a reference.
    pub(crate) fn used(&self) -> usize {
        self.counts.len() - self.free.len()
    }

    /// Pages with several references.
    pub(crate) fn shared(&self) -> usize {
        self.shared
    }

    /// References to a page.
    pub(crate) fn count(&self, page: u32) -> usize {
        self.counts.get(page as usize) as usize
    }

    /// Pages up to the last one that is in use.
    pub(crate) fn used_prefix(&self) -> usize {
        let counts = self.counts.to_vec();
        counts.iter().rposition(|&count| count > 0).map_or(0, |last| last + 1)
    }

    /// A free page, with one reference.
    pub(crate) fn take(&mut self) -> u32 {
        if let Some(page) = self.free.pop() {
            self.counts.set(page as usize, 1);
            return page;
        }
        self.counts.push(1);
        u32::try_from(self.counts.len() - 1).expect("fewer pages than a buffer has bytes")
    }

    /// Adds a reference to a page in use.
    pub(crate) fn share(&mut self, page: u32) {
        let count = self.counts.get(page as usize);
        self.shared += usize::from(count == 1);
        self.counts.set(page as usize, count + 1);
    }

    /// Drops a reference. A page without one is free.
    pub(crate) fn release(&mut self, page: u32) {
        let count = self.counts.get(page as usize);
        self.counts.set(page as usize, count - 1);
        self.shared -= usize::from(count == 2);
        if count == 1 {
            self.free.push(page);
        }
    }

    /// Whether these references, each as often as it is there, are those that are counted: a recount.
    pub(crate) fn is_sound(&self, references: impl Iterator<Item = u32>) -> bool {
        let mut counts = vec![0; self.counts.len()];
        references.for_each(|page| counts[page as usize] += 1);
        let mut free = self.free.to_vec();
        free.sort_unstable();
        let unused = (0..).zip(&counts).filter(|(_, count)| **count == 0).map(|(page, _)| page);
        counts == self.counts.to_vec()
            && self.shared == counts.iter().filter(|&&count| count > 1).count()
            && unused.eq(free.iter().copied())
    }
}
