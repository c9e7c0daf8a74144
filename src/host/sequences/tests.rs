use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::test_runner::Config;

use super::prefixes::reusable_pages;
use super::*;

const FREE: StepLimits =
    StepLimits { pages: None, tokens: None, layer: 0, fits: 1000, bytes: 1 << 20 };

/// A sequence of a plain model: its live tokens, and how many were dropped before them.
#[derive(Clone, Debug, Default)]
struct Model {
    tokens: Vec<u32>,
    dropped: usize,
}

/// Sequences beside the model, with what pages hold.
struct Rig {
    sequences: Sequences,
    model: BTreeMap<SequenceId, Model>,
    /// What was written into each slot of each page.
    slots: BTreeMap<(u32, usize), u32>,
    limit: Option<usize>,
    written: u32,
}

impl Rig {
    fn new(page_tokens: usize, limit: Option<usize>) -> Self {
        Self {
            sequences: Sequences::new(page_tokens),
            model: BTreeMap::new(),
            slots: BTreeMap::new(),
            limit,
            written: 0,
        }
    }

    /// One step of these sequences, as the GPU does it: copies first, then all new tokens.
    fn step(&mut self, counts: &[(SequenceId, usize)]) -> Result<()> {
        let limits = StepLimits { pages: self.limit, ..FREE };
        let staged = self.sequences.plan(counts, limits)?;
        let size = self.sequences.page_tokens;
        let old = self.slots.clone();
        for &(from, to) in &staged.copies {
            for slot in 0..size {
                let held = old.get(&(from, slot)).copied().unwrap_or(u32::MAX);
                self.slots.insert((to, slot), held);
            }
        }
        for (row, &(id, count)) in staged.rows.iter().zip(counts) {
            let model = self.model.get_mut(&id).expect("a sequence of the model");
            assert_eq!((row.old_len, row.tokens.len()), (model.tokens.len(), count));
            assert_eq!(row.position, model.dropped + model.tokens.len());
            for at in 0..count {
                let slot = row.start() + row.old_len + at;
                self.slots.insert((row.pages()[slot / size], slot % size), self.written);
                model.tokens.push(self.written);
                self.written += 1;
            }
        }
        self.sequences.commit(staged);
        Ok(())
    }

    fn check(&self) {
        assert!(self.sequences.is_sound());
        assert!(self.limit.is_none_or(|limit| self.sequences.pool().used() <= limit));
        assert_eq!(self.sequences.ids().count(), self.model.len());
        let size = self.sequences.page_tokens;
        for (&id, model) in &self.model {
            let live = self.sequences.live(id).expect("a sequence of the model");
            let held: Vec<u32> = (live.start..live.start + live.len)
                .map(|slot| self.slots[&(live.pages[slot / size], slot % size)])
                .collect();
            assert_eq!(held, model.tokens, "{id}");
            let next = self.sequences.next_position(id).expect("a sequence of the model");
            assert_eq!(next, model.dropped + model.tokens.len());
        }
    }
}

#[derive(Clone, Debug)]
enum Call {
    Add,
    Fork(usize, usize),
    Remove(usize),
    Truncate(usize, usize),
    Crop(usize, usize),
    Step(Vec<(usize, usize)>),
    Remember(usize),
    AddWithPrefix(usize, usize),
    Forget,
}

fn calls() -> impl Strategy<Value = Vec<Call>> {
    let call = prop_oneof![
        3 => Just(Call::Add),
        3 => (0..8_usize, 0..40_usize).prop_map(|(i, n)| Call::Fork(i, n)),
        2 => (0..8_usize).prop_map(Call::Remove),
        2 => (0..8_usize, 0..40_usize).prop_map(|(i, n)| Call::Truncate(i, n)),
        2 => (0..8_usize, 0..40_usize).prop_map(|(i, n)| Call::Crop(i, n)),
        8 => prop::collection::vec((0..8_usize, 1..20_usize), 1..5).prop_map(Call::Step),
        2 => (0..8_usize).prop_map(Call::Remember),
        2 => (0..8_usize, 0..40_usize).prop_map(|(i, n)| Call::AddWithPrefix(i, n)),
        1 => Just(Call::Forget),
    ];
    prop::collection::vec(call, 1..60)
}

fn run(rig: &mut Rig, call: &Call) {
    let ids: Vec<SequenceId> = rig.model.keys().copied().collect();
    let some = |i: &usize| (!ids.is_empty()).then(|| ids[i % ids.len()]);
    match call {
        Call::Add => {
            let id = rig.sequences.add();
            assert!(rig.model.insert(id, Model::default()).is_none(), "a name of its own");
        }
        Call::Fork(i, n) => {
            let Some(parent) = some(i) else { return };
            let model = rig.model[&parent].clone();
            let n = n % (model.tokens.len() + 1);
            let id = rig.sequences.fork(parent, n).expect("a fork within the sequence");
            let tokens = model.tokens[..n].to_vec();
            assert!(rig.model.insert(id, Model { tokens, ..model }).is_none());
        }
        Call::Remove(i) => {
            let Some(id) = some(i) else { return };
            rig.sequences.remove(id).expect("a sequence of the model");
            rig.model.remove(&id);
            assert_eq!(
                rig.sequences.len(id),
                Err(Error::Sequence(SequenceError::UnknownSequence { id }))
            );
        }
        Call::Truncate(i, n) => {
            let Some(id) = some(i) else { return };
            rig.sequences.truncate(id, *n).expect("a sequence of the model");
            rig.model.get_mut(&id).expect("it is there").tokens.truncate(*n);
        }
        Call::Crop(i, n) => {
            let Some(id) = some(i) else { return };
            rig.sequences.crop(id, *n).expect("a sequence of the model");
            let model = rig.model.get_mut(&id).expect("it is there");
            let gone = model.tokens.len().saturating_sub(*n);
            model.tokens.drain(..gone);
            model.dropped += gone;
        }
        Call::Step(counts) => {
            let mut all: Vec<(SequenceId, usize)> = Vec::new();
            for (i, n) in counts {
                let Some(id) = some(i) else { return };
                if all.iter().all(|(other, _)| *other != id) {
                    all.push((id, *n));
                }
            }
            let used = rig.sequences.pool().used();
            if let Err(error) = rig.step(&all) {
                assert!(matches!(error, Error::OutOfPages { .. }), "{error}");
                assert_eq!(rig.sequences.pool().used(), used, "an error changes nothing");
            }
        }
        Call::Remember(i) => {
            let Some(id) = some(i) else { return };
            let Model { tokens, dropped } = rig.model[&id].clone();
            let result = rig.sequences.remember_prefix(id, &tokens);
            assert_eq!(result.is_ok(), dropped == 0);
        }
        Call::AddWithPrefix(i, n) => {
            let Some(other) = some(i) else { return };
            let Model { tokens, dropped } = rig.model[&other].clone();
            if dropped > 0 {
                return;
            }
            // Tokens of the model are ids: each was written once, and forks share theirs.
            let mut asked = tokens[..n % (tokens.len() + 1)].to_vec();
            asked.push(u32::MAX);
            let pages = reusable_pages([&rig.sequences].into_iter(), &asked);
            let id = rig.sequences.add_with_pages(&asked, pages);
            let len = rig.sequences.len(id).expect("it was added");
            assert_eq!(len, pages * rig.sequences.page_tokens);
            let tokens = asked[..len].to_vec();
            assert!(rig.model.insert(id, Model { tokens, dropped: 0 }).is_none());
        }
        Call::Forget => rig.sequences.forget_prefixes(),
    }
}

#[test]
fn sequences_hold_what_a_plain_model_holds_after_any_history() {
    let cases = std::env::var("KV_HISTORIES").ok().and_then(|n| n.parse().ok()).unwrap_or(2000);
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let page = prop_oneof![Just(1), Just(4), Just(16)];
    let limit = prop_oneof![Just(None), (1..60_usize).prop_map(Some)];
    proptest!(config, |(page in page, limit in limit, calls in calls())| {
        let mut rig = Rig::new(page, limit);
        for call in &calls {
            run(&mut rig, call);
            rig.check();
        }
        let ids: Vec<SequenceId> = rig.model.keys().copied().collect();
        for id in ids {
            rig.sequences.remove(id).expect("a sequence of the model");
        }
        rig.sequences.forget_prefixes();
        prop_assert_eq!(rig.sequences.pool().used(), 0, "no page is lost");
    });
}

#[test]
fn a_fork_shares_pages_and_only_its_partly_filled_last_one_is_copied() {
    let mut rig = Rig::new(4, None);
    let parent = rig.sequences.add();
    rig.model.insert(parent, Model::default());
    rig.step(&[(parent, 10)]).expect("room");
    let child = rig.sequences.fork(parent, 10).expect("a fork");
    rig.model.insert(child, rig.model[&parent].clone());
    assert_eq!((rig.sequences.pool().used(), rig.sequences.pool().shared()), (3, 3));
    let staged = rig.sequences.plan(&[(child, 1), (parent, 1)], FREE).expect("room");
    assert_eq!(staged.copies.len(), 1, "the last that refers to a page writes into it");
    assert_eq!(staged.pool_pages(), 4);
    rig.step(&[(child, 1), (parent, 1)]).expect("room");
    rig.check();
    assert_eq!((rig.sequences.pool().used(), rig.sequences.pool().shared()), (4, 2));
}

#[test]
fn a_name_is_never_another_sequence() {
    let mut sequences = Sequences::new(4);
    let first = sequences.add();
    sequences.remove(first).expect("it is there");
    let second = sequences.add();
    assert_ne!(first, second);
    assert_eq!(
        sequences.len(first),
        Err(Error::Sequence(SequenceError::UnknownSequence { id: first }))
    );
    assert_eq!(
        sequences.remove(first),
        Err(Error::Sequence(SequenceError::UnknownSequence { id: first }))
    );
    let mut other = Sequences::new(4);
    let theirs = other.add();
    assert_eq!(
        sequences.len(theirs),
        Err(Error::Sequence(SequenceError::UnknownSequence { id: theirs }))
    );
    sequences.clear();
    assert_eq!(
        sequences.len(second),
        Err(Error::Sequence(SequenceError::UnknownSequence { id: second }))
    );
}

fn cached_prefix(sequences: &Sequences, tokens: &[u32]) -> usize {
    reusable_pages([sequences].into_iter(), tokens) * sequences.page_tokens
}

#[test]
fn a_full_pool_gives_up_prefixes_first_and_then_says_what_is_used() {
    let limits = StepLimits { pages: Some(4), ..FREE };
    let mut sequences = Sequences::new(2);
    let a = sequences.add();
    let step = sequences.plan(&[(a, 4)], limits).expect("room");
    sequences.commit(step);
    sequences.remember_prefix(a, &[1, 2, 3, 4]).expect("its tokens");
    sequences.remove(a).expect("it is there");
    assert_eq!((sequences.pool().used(), cached_prefix(&sequences, &[1, 2, 3, 4])), (2, 4));
    let b = sequences.add();
    let step = sequences.plan(&[(b, 6)], limits).expect("a prefix makes room");
    assert_eq!(cached_prefix(&sequences, &[1, 2, 3, 4]), 4, "planning changes nothing");
    sequences.commit(step);
    assert_eq!(cached_prefix(&sequences, &[1, 2, 3, 4]), 2);
    let expected = Error::OutOfPages { used: 4, shared: 0, wanted: 2, limit: 4, page_tokens: 2 };
    assert_eq!(sequences.plan(&[(b, 4)], limits).map(|_| ()), Err(expected));
    assert!(sequences.is_sound());
}

#[test]
fn what_the_device_cannot_bind_is_refused_from_counts() {
    let mut sequences = Sequences::new(2);
    let a = sequences.add();
    let small = StepLimits { layer: 3, fits: 4, bytes: 4096, ..FREE };
    let expected = Error::PoolTooLarge {
        layer: 3,
        used: 0,
        new: 5,
        copies: 0,
        fits: 4,
        limit: 4096,
        page_tokens: 2,
    };
    assert_eq!(sequences.plan(&[(a, 9)], small).map(|_| ()), Err(expected));
    // Pages that are many, and tokens that are many.
    let short = StepLimits { bytes: 4096, ..FREE };
    assert!(sequences.plan(&[(a, 100)], short).is_ok());
    for count in [300, MOST_TOKENS] {
        let got = sequences.plan(&[(a, count)], StepLimits { fits: usize::MAX, ..short });
        assert!(matches!(got, Err(Error::ListTooLarge { .. })), "{count}");
    }
}
