//! Sequences by name: which pages hold their tokens, and what a step changes. Pure host logic.

pub(crate) mod prefixes;
mod sequence;

use std::collections::HashSet;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result, SequenceError};
use crate::host::pool::PagePool;
use crate::host::prefix::PrefixMap;
use crate::host::window::{Window, gone_after_crop};
use crate::host::work::StepRow;
use crate::sequence::SequenceId;
use sequence::{Sequence, pages_of};

/// All sequences of a cache.
#[derive(Debug)]
pub(crate) struct Sequences {
    cache: u64,
    /// What its layers keep of each sequence, if not all; and the first of them, for errors.
    window: Option<Window>,
    layer: usize,
    /// Tokens of a page: a power of two.
    page_tokens: usize,
    slots: Vec<Slot>,
    /// Slots without a sequence. The last one is used first.
    free: Vec<u32>,
    pool: PagePool,
    prefixes: PrefixMap,
}

#[derive(Debug)]
struct Slot {
    /// How many sequences the slot had before.
    generation: u32,
    sequence: Option<Sequence>,
}

/// What limits a step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepLimits {
    /// Pages that there may be, where that is fixed.
    pub(crate) pages: Option<usize>,
    /// Tokens of a sequence at most, where that is fixed.
    pub(crate) tokens: Option<usize>,
    /// The layer with the largest pages, and how many of these the device can bind at once.
    pub(crate) layer: usize,
    pub(crate) fits: usize,
    /// Bytes that the device can bind at once.
    pub(crate) bytes: u64,
}

/// A step that is ready: nothing is changed until it is committed.
#[derive(Debug)]
pub(crate) struct StagedStep {
    /// The sequences with their new tokens, in the order of the packed tokens.
    pub(crate) rows: Vec<StagedRow>,
    pub(crate) total: usize,
    /// Pages to copy first, (from, to) each, one source after the other.
    pub(crate) copies: Vec<(u32, u32)>,
    pool: PagePool,
    evicted: Vec<u32>,
}

/// A sequence after a step.
#[derive(Debug)]
pub(crate) struct StagedRow {
    pub(crate) id: SequenceId,
    /// Its packed tokens.
    pub(crate) tokens: Range<usize>,
    /// Live tokens before the new ones: those before the step, less what was let go for the window.
    pub(crate) old_len: usize,
    /// Its length before the step.
    pub(crate) before: usize,
    /// The absolute position of its first new token.
    pub(crate) position: usize,
    sequence: Sequence,
}

impl StagedRow {
    pub(crate) fn pages(&self) -> &[u32] {
        &self.sequence.pages
    }

    pub(crate) fn start(&self) -> usize {
        self.sequence.start
    }

    /// Live tokens after the step.
    pub(crate) fn len(&self) -> usize {
        self.sequence.len
    }

    /// As attention reads it.
    pub(crate) fn work(&self) -> StepRow {
        StepRow { first: self.tokens.start, tokens: self.tokens.len(), len: self.sequence.len }
    }
}

impl StagedStep {
    /// Pages that the pool must have memory for.
    pub(crate) fn pool_pages(&self) -> usize {
        self.pool.len()
    }

    /// Pages in use after the step.
    pub(crate) fn used(&self) -> usize {
        self.pool.used()
    }
}

/// The live tokens of a sequence, and their pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LiveTokens<'a> {
    pub(crate) pages: &'a [u32],
    pub(crate) start: usize,
    pub(crate) len: usize,
}

impl Sequences {
    /// Tokens before the live ones of a sequence that are gone, and those of them that a window has let go.
    #[cfg(feature = "safetensors")]
    pub(crate) fn gone(&self, id: SequenceId) -> Result<[usize; 2]> {
        self.get(id).map(|sequence| [sequence.dropped, sequence.let_go])
    }

    /// Sets the same of a sequence that has no token yet.
    #[cfg(feature = "safetensors")]
    pub(crate) fn set_gone(&mut self, id: SequenceId, gone: [usize; 2]) -> Result<()> {
        let page_tokens = self.page_tokens;
        let sequence = self.get_mut(id)?;
        [sequence.dropped, sequence.let_go] = gone;
        // Its tokens have the slots that they would have behind those that were let go.
        sequence.start = sequence.let_go % page_tokens;
        Ok(())
    }

    /// What the layers keep of each sequence, if not all.
    pub(crate) fn window(&self) -> Option<Window> {
        self.window
    }

    /// Of a cache of its own, whose layers keep all tokens.
    pub(crate) fn new(page_tokens: usize) -> Self {
        static CACHES: AtomicU64 = AtomicU64::new(0);
        Self::of_group(CACHES.fetch_add(1, Ordering::Relaxed), page_tokens, None, 0)
    }

    /// The same sequences in other layers of a cache: they get the same names if the same calls are made.
    pub(crate) fn of_group(
        cache: u64,
        page_tokens: usize,
        window: Option<Window>,
        layer: usize,
    ) -> Self {
        debug_assert!(page_tokens.is_power_of_two());
        Self {
            cache,
            window,
            layer,
            page_tokens,
            slots: Vec::new(),
            free: Vec::new(),
            pool: PagePool::default(),
            prefixes: PrefixMap::default(),
        }
    }

    /// The number of the cache, unique in the process.
    pub(crate) fn cache(&self) -> u64 {
        self.cache
    }

    pub(crate) fn pool(&self) -> &PagePool {
        &self.pool
    }

    /// All sequences, in no order that means anything.
    pub(crate) fn ids(&self) -> impl Iterator<Item = SequenceId> {
        let slots = (0_u32..).zip(&self.slots);
        slots.filter(|(_, slot)| slot.sequence.is_some()).map(|(index, slot)| SequenceId {
            cache: self.cache,
            index,
            generation: slot.generation,
        })
    }

    fn get(&self, id: SequenceId) -> Result<&Sequence> {
        let slot = self.slots.get(id.index as usize);
        let slot = slot.filter(|slot| id.cache == self.cache && slot.generation == id.generation);
        slot.and_then(|slot| slot.sequence.as_ref())
            .ok_or(Error::Sequence(SequenceError::UnknownSequence { id }))
    }

    fn get_mut(&mut self, id: SequenceId) -> Result<&mut Sequence> {
        self.get(id)?;
        let slot = &mut self.slots[id.index as usize];
        slot.sequence.as_mut().ok_or(Error::Sequence(SequenceError::UnknownSequence { id }))
    }

    /// Live tokens, and those that would be live without a window.
    pub(crate) fn len(&self, id: SequenceId) -> Result<usize> {
        self.get(id).map(Sequence::whole_len)
    }

    /// Refuses a roll-back of a sequence to `len` tokens after which the next one would look back on what was let go.
    pub(crate) fn check_roll_back(&self, id: SequenceId, len: usize) -> Result<()> {
        let sequence = self.get(id)?;
        let Some(window) = self.window else { return Ok(()) };
        window.check_roll_back(self.layer, [sequence.let_go, sequence.len], len)
    }

    /// Tokens ever appended, those that were rolled back aside.
    pub(crate) fn next_position(&self, id: SequenceId) -> Result<usize> {
        self.get(id).map(|sequence| sequence.dropped + sequence.len)
    }

    pub(crate) fn live(&self, id: SequenceId) -> Result<LiveTokens<'_>> {
        let Sequence { pages, start, len, .. } = self.get(id)?;
        Ok(LiveTokens { pages, start: *start, len: *len })
    }

    /// Adds a sequence without a token.
    pub(crate) fn add(&mut self) -> SequenceId {
        self.put(Sequence::default())
    }

    fn put(&mut self, sequence: Sequence) -> SequenceId {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { generation: 0, sequence: None });
            u32::try_from(self.slots.len() - 1).expect("fewer sequences than 32 bits count")
        });
        let slot = &mut self.slots[index as usize];
        slot.sequence = Some(sequence);
        SequenceId { cache: self.cache, index, generation: slot.generation }
    }

    /// Adds a sequence with the first `len` live tokens of another, in the same pages.
    pub(crate) fn fork(&mut self, id: SequenceId, len: usize) -> Result<SequenceId> {
        let parent = self.get(id)?;
        if len > parent.whole_len() {
            let (asked, len) = (len, parent.whole_len());
            return Err(Error::Sequence(SequenceError::ForkPastEnd { id, asked, len }));
        }
        self.check_roll_back(id, len)?;
        let len = len.saturating_sub(parent.let_go);
        let pages = pages_of(parent.start, len, self.page_tokens);
        let start = if len == 0 { 0 } else { parent.start };
        let child = Sequence { pages: parent.pages[..pages].to_vec(), start, len, ..*parent };
        child.pages.iter().for_each(|&page| self.pool.share(page));
        Ok(self.put(child))
    }

    /// Removes a sequence; its pages go back.
    pub(crate) fn remove(&mut self, id: SequenceId) -> Result<()> {
        self.get(id)?;
        let slot = &mut self.slots[id.index as usize];
        let sequence = slot.sequence.take().unwrap_or_default();
        // A slot whose generations are used up is left alone.
        if let Some(next) = slot.generation.checked_add(1) {
            slot.generation = next;
            self.free.push(id.index);
        }
        sequence.pages.into_iter().rev().for_each(|page| self.pool.release(page));
        Ok(())
    }

    /// Removes all sequences and forgets all prefixes.
    pub(crate) fn clear(&mut self) {
        let ids: Vec<SequenceId> = self.ids().collect();
        for id in ids {
            self.remove(id).expect("a sequence that is there");
        }
        self.prefixes = PrefixMap::default();
        self.pool = PagePool::default();
    }

    /// Keeps the first `len` tokens; whole pages behind them go back.
    pub(crate) fn truncate(&mut self, id: SequenceId, len: usize) -> Result<()> {
        self.check_roll_back(id, len)?;
        let page_tokens = self.page_tokens;
        let sequence = self.get_mut(id)?;
        let kept = sequence.len.min(len.saturating_sub(sequence.let_go));
        let gone = sequence.drop_last(sequence.len - kept, page_tokens);
        gone.into_iter().rev().for_each(|page| self.pool.release(page));
        Ok(())
    }

    /// Keeps the latest `len` live tokens; whole pages before them go back.
    pub(crate) fn crop(&mut self, id: SequenceId, len: usize) -> Result<()> {
        let page_tokens = self.page_tokens;
        let sequence = self.get_mut(id)?;
        let kept = sequence.len.min(len);
        sequence.let_go = gone_after_crop([sequence.let_go, sequence.len], len);
        let gone = sequence.drop_first(sequence.len - kept, page_tokens);
        gone.into_iter().rev().for_each(|page| self.pool.release(page));
        Ok(())
    }

    /// Makes a step ready: so many new tokens for each of these sequences, in this order. Changes nothing. If the
    /// pool is bounded and full, prefixes that no sequence uses make room, least recently used first.
    pub(crate) fn plan(
        &self,
        counts: &[(SequenceId, usize)],
        limits: StepLimits,
    ) -> Result<StagedStep> {
        self.plan_after(0, counts, limits)
    }

    /// The same, after the latest `back` tokens of each of them were taken back, which must be live and whose loss
    /// was checked. Nothing is let go for the window then: the tokens that come are not new.
    pub(crate) fn plan_after(
        &self,
        back: usize,
        counts: &[(SequenceId, usize)],
        limits: StepLimits,
    ) -> Result<StagedStep> {
        if counts.is_empty() {
            return Err(Error::Sequence(SequenceError::EmptyStep));
        }
        let (mut seen, mut total, mut wanted) = (HashSet::new(), 0_usize, 0_usize);
        let mut shared_tails: Vec<u32> = Vec::new();
        let mut sequences = Vec::with_capacity(counts.len());
        // Pages that sequences let go for the window are free for this step.
        let mut pool = self.pool.clone();
        for &(id, count) in counts {
            let mut sequence = self.get(id)?.clone();
            if !seen.insert(id) {
                return Err(Error::Sequence(SequenceError::SequenceTwice { id }));
            }
            if count == 0 {
                return Err(Error::Sequence(SequenceError::NoNewTokens { id }));
            }
            let before = sequence.whole_len();
            for page in sequence.drop_last(back, self.page_tokens).into_iter().rev() {
                pool.release(page);
            }
            if let Some(window) = self.window.filter(|_| back == 0) {
                let gone = sequence.len - sequence.len.min(window.needed());
                sequence.let_go += gone;
                let pages = sequence.drop_first(gone, self.page_tokens);
                pages.into_iter().rev().for_each(|page| pool.release(page));
            }
            let bound = limits.tokens.unwrap_or(MOST_TOKENS).min(MOST_TOKENS);
            let len = sequence.len.checked_add(count).filter(|&len| len <= bound);
            let Some(len) = len else {
                let len = sequence.len;
                return Err(Error::SequenceTooLong { len, new_tokens: count, bound });
            };
            total = total.saturating_add(count);
            let pages = pages_of(sequence.start, len, self.page_tokens);
            wanted = wanted.saturating_add(pages - sequence.pages.len());
            let is_part = !(sequence.start + sequence.len).is_multiple_of(self.page_tokens);
            shared_tails.extend(sequence.pages.last().filter(|_| is_part));
            sequences.push((id, count, before, sequence));
        }
        shared_tails.retain(|&page| pool.count(page) > 1);
        if total > MOST_TOKENS {
            let asked = format!("{total} tokens");
            return Err(Error::overflow("new tokens of a step", asked, MOST_TOKENS as u64));
        }
        // All that write into a page get a copy, but the last that refers to it.
        shared_tails.sort_unstable();
        let writers = shared_tails.chunk_by(|a, b| a == b);
        let copies = writers.map(|it| it.len().min(pool.count(it[0]) - 1)).sum::<usize>();
        let evicted = self.make_room(&pool, wanted.saturating_add(copies), limits)?;
        let freed = || evicted.iter().filter_map(|&node| self.prefixes.page(node));
        let used = pool.used() - freed().count();
        self.check_device([used, wanted, copies], [counts.len(), total], limits)?;

        freed().for_each(|page| pool.release(page));
        let (mut rows, mut copies) = (Vec::with_capacity(counts.len()), Vec::new());
        let mut first = 0;
        for (id, count, before, mut sequence) in sequences {
            let (old_len, position) = (sequence.len, sequence.dropped + sequence.len);
            let is_part = !(sequence.start + sequence.len).is_multiple_of(self.page_tokens);
            let tail = sequence.pages.last_mut().filter(|_| is_part);
            if let Some(tail) = tail.filter(|tail| pool.count(**tail) > 1) {
                pool.release(*tail);
                let own = pool.take();
                copies.push((*tail, own));
                *tail = own;
            }
            sequence.len += count;
            let pages = pages_of(sequence.start, sequence.len, self.page_tokens);
            sequence.pages.resize_with(pages, || pool.take());
            let tokens = first..first + count;
            rows.push(StagedRow { id, tokens, old_len, before, position, sequence });
            first += count;
        }
        copies.sort_unstable();
        Ok(StagedStep { rows, total, copies, pool, evicted })
    }

    /// Refuses a pool or lists that the device cannot bind, before anything is made of that size.
    fn check_device(
        &self,
        [used, new, copies]: [usize; 3],
        [sequences, tokens]: [usize; 2],
        limits: StepLimits,
    ) -> Result<()> {
        let StepLimits { layer, fits, bytes: limit, .. } = limits;
        let page_tokens = self.page_tokens;
        let needed = used.saturating_add(new).saturating_add(copies);
        if needed > fits {
            return Err(Error::PoolTooLarge { layer, used, new, copies, fits, limit, page_tokens });
        }
        // As StepBlock lays them out: records, pages, and four words a token, each array aligned.
        let words = [8 * sequences, needed, 4 * tokens, 6 * 64];
        let bytes = 4 * words.iter().map(|&words| words as u64).sum::<u64>();
        if bytes <= limit {
            return Ok(());
        }
        Err(Error::ListTooLarge {
            what: "the lists of a step: its tokens, and the pages of its sequences",
            bytes,
            limit,
            remedy: "plan fewer sequences or tokens in a step, or use larger pages",
        })
    }

    /// Nodes of prefixes that must go so that there are `wanted` more pages.
    fn make_room(&self, pool: &PagePool, wanted: usize, limits: StepLimits) -> Result<Vec<u32>> {
        let Some(limit) = limits.pages else { return Ok(Vec::new()) };
        let missing = pool.used().saturating_add(wanted).saturating_sub(limit);
        let (evicted, freed) = self.prefixes.evictable(missing, pool);
        if freed < missing {
            return Err(Error::OutOfPages {
                used: pool.used(),
                shared: pool.shared(),
                wanted,
                limit,
                page_tokens: self.page_tokens,
            });
        }
        Ok(evicted)
    }

    /// Makes a staged step happen, which must be of the state that is there now. Cannot fail.
    pub(crate) fn commit(&mut self, step: StagedStep) {
        for StagedRow { id, sequence, .. } in step.rows {
            self.slots[id.index as usize].sequence = Some(sequence);
        }
        self.pool = step.pool;
        self.prefixes.remove(&step.evicted);
    }

    /// Whether the pages in use are those that sequences and prefixes refer to, as often as is counted: a
    /// recount.
    pub(crate) fn is_sound(&self) -> bool {
        let sequences = self.slots.iter().filter_map(|slot| slot.sequence.as_ref());
        let fits = |sequence: &Sequence| {
            let Sequence { pages, start, len, .. } = sequence;
            pages.len() == pages_of(*start, *len, self.page_tokens) && *start < self.page_tokens
        };
        let pages = sequences.clone().flat_map(|sequence| sequence.pages.iter().copied());
        sequences.clone().all(fits) && self.pool.is_sound(pages.chain(self.prefixes.pages()))
    }
}

/// Tokens of a sequence and of a step at most: positions and slots are 32-bit words, slots up to a page more.
const MOST_TOKENS: usize = (u32::MAX / 2) as usize;

#[cfg(test)]
mod tests;
