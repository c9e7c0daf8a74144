//! Prefixes of sequences that are noted, and sequences that begin with them.

use super::{Sequence, Sequences};
use crate::error::{Error, Result, SequenceError};
use crate::host::prefix::NotedPages;
use crate::sequence::SequenceId;

/// How many whole pages of these tokens a sequence can begin with in all groups: of each, the pages are noted that hold
/// what the next token looks back on.
pub(crate) fn reusable_pages<'a>(
    groups: impl Iterator<Item = &'a Sequences>,
    tokens: &[u32],
) -> usize {
    // Layers that look back on nothing need no page, and note none.
    let answers = groups.filter(|it| it.looks_back()).map(|it| it.can_begin_with(tokens));
    let both = |a: Vec<bool>, b: Vec<bool>| a.into_iter().zip(b).map(|(a, b)| a && b).collect();
    let all: Option<Vec<bool>> = answers.reduce(both);
    all.and_then(|all| all.iter().rposition(|&can| can)).unwrap_or(0)
}

impl Sequences {
    fn looks_back(&self) -> bool {
        self.window.is_none_or(|window| window.needed() > 0)
    }

    /// The first of `len` tokens that the next one looks back on.
    fn first_needed(&self, len: usize) -> usize {
        self.window.map_or(0, |window| len.saturating_sub(window.needed()))
    }

    /// Of each number of whole pages of these tokens, from none on, whether a sequence can begin with them.
    fn can_begin_with(&self, tokens: &[u32]) -> Vec<bool> {
        let size = self.page_tokens;
        let noted = self.prefixes.find(tokens, size);
        // Pages before the end that are noted whole.
        let mut whole = 0;
        let can = |count: usize| {
            if let Some(last) = count.checked_sub(1) {
                let is_whole = noted.get(last).is_some_and(|it| it.holds_from(0));
                whole = if is_whole { whole + 1 } else { 0 };
            }
            let first = self.first_needed(count * size);
            let needed = count - first / size;
            let begin = noted.get(first / size);
            whole >= needed
                || whole + 1 == needed && begin.is_some_and(|it| it.holds_from(first % size))
        };
        (0..=tokens.len() / size).map(can).collect()
    }

    /// Adds a sequence that begins with the first `count` pages of these tokens, of which it has what the next token
    /// looks back on.
    pub(crate) fn add_with_pages(&mut self, tokens: &[u32], count: usize) -> SequenceId {
        let (size, len) = (self.page_tokens, count * self.page_tokens);
        let gone = self.first_needed(len);
        let tokens = &tokens[..len];
        let pages: Vec<u32> = match gone < len {
            true => {
                let noted = self.prefixes.find(tokens, size);
                noted[gone / size..].iter().filter_map(|noted| noted.page).collect()
            }
            false => Vec::new(),
        };
        self.prefixes.touch(tokens, size);
        pages.iter().for_each(|&page| self.pool.share(page));
        let start = if pages.is_empty() { 0 } else { gone % size };
        let len = len - gone;
        self.put(Sequence { pages, start, len, dropped: gone, let_go: gone })
    }

    /// Notes the full pages of a sequence whose first tokens have these ids, as far as it still has them.
    pub(crate) fn remember_prefix(&mut self, id: SequenceId, tokens: &[u32]) -> Result<()> {
        let sequence = self.get(id)?;
        let (len, gone) = (sequence.whole_len(), sequence.let_go);
        let dropped = sequence.dropped - gone;
        if dropped > 0 || tokens.len() > len {
            let tokens = tokens.len();
            return Err(Error::Sequence(SequenceError::PrefixTokens { id, tokens, len, dropped }));
        }
        let size = self.page_tokens;
        // A sequence that began anew in the middle of a page has no page of whole runs.
        if self.looks_back() && sequence.start == gone % size {
            let noted = NotedPages { pages: &sequence.pages.clone(), gone };
            self.prefixes.insert(tokens, noted, size, &mut self.pool);
        }
        Ok(())
    }

    pub(crate) fn forget_prefixes(&mut self) {
        self.prefixes.clear(&mut self.pool);
    }
}
