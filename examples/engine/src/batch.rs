//! Continuous batching: sequences of a [`SequenceCache`] that are decoded together.
//!
//! In each step a sequence that decodes gets one token, and one that prefills gets a piece of its prompt, so that a
//! long prompt does not hold up the others. Sequences join and leave between steps.

use anyhow::{Result, ensure};
use wgpu_kvcache::{SequenceCache, SequenceId};

use crate::engine::{Engine, Piece};

/// Sequences that are decoded together, each under a number of the caller.
#[derive(Debug, Default)]
pub struct Batch {
    members: Vec<Member>,
}

#[derive(Debug)]
struct Member {
    number: usize,
    id: SequenceId,
    /// What comes next and is not in the cache yet: the rest of a prompt, or the token that was chosen last.
    next: Vec<u32>,
    /// Whether `next` is of a prompt.
    prefills: bool,
}

/// What a step did.
#[derive(Clone, Debug, Default)]
pub struct BatchStep {
    /// Tokens that it ran.
    pub tokens: usize,
    /// Tokens that it chose, with the numbers of their sequences.
    pub chosen: Vec<(usize, u32)>,
}

impl Batch {
    /// Adds a sequence of the cache, whose next tokens are those of `prompt`.
    ///
    /// # Errors
    ///
    /// If the prompt has no token: none would be chosen after it.
    pub fn join(&mut self, number: usize, id: SequenceId, prompt: Vec<u32>) -> Result<()> {
        ensure!(!prompt.is_empty(), "a prompt has no token of its own");
        self.members.push(Member { number, id, next: prompt, prefills: true });
        Ok(())
    }

    /// Takes a sequence out. Returns its tokens that are not in the cache yet.
    pub fn leave(&mut self, number: usize) -> Option<Vec<u32>> {
        let at = self.members.iter().position(|member| member.number == number)?;
        Some(self.members.remove(at).next)
    }

    /// The number of sequences.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Sequences whose prompt is in the cache.
    pub fn decoding(&self) -> usize {
        self.members.iter().filter(|member| !member.prefills).count()
    }

    /// Runs one step, and returns what it chose: the best token of each sequence whose prompt ends, or has ended, other
    /// than `banned`. That token is run in the next step.
    ///
    /// # Errors
    ///
    /// If the step fails. The sequences stay as they are; the cache may be of no more use.
    pub async fn step(
        &mut self,
        engine: &mut Engine,
        cache: &mut SequenceCache,
        banned: Option<u32>,
    ) -> Result<BatchStep> {
        let pieces = self.plan(engine.step_tokens());
        let chosen = engine.next_of_sequences(cache, &pieces, banned).await?;
        let ran: Vec<_> = pieces.iter().map(|piece| (piece.id, piece.tokens.len())).collect();

        let mut step = BatchStep::default();
        for ((id, count), token) in ran.into_iter().zip(chosen) {
            step.tokens += count;
            let Some(member) = self.members.iter_mut().find(|member| member.id == id) else {
                continue;
            };
            member.next.drain(..count);
            if let Some(token) = token {
                member.next.push(token);
                member.prefills = false;
                step.chosen.push((member.number, token));
            }
        }
        Ok(step)
    }

    /// One token of each sequence that decodes, and pieces of prompts in what is left of `room`, for those that joined
    /// first.
    fn plan(&self, room: usize) -> Vec<Piece<'_>> {
        let mut left = room.saturating_sub(self.decoding());
        let pieces = self.members.iter().map(|member| {
            let Member { id, ref next, prefills, .. } = *member;
            let count = if prefills { next.len().min(left) } else { next.len() };
            if prefills {
                left -= count;
            }
            Piece { id, tokens: &next[..count], is_last: count == next.len() }
        });
        // A prompt for which nothing is left waits for the next step.
        pieces.filter(|piece| !piece.tokens.is_empty()).collect()
    }
}
