//! Which pages hold the K and V of which tokens: a map from page-sized runs of token ids to pages. Pure host
//! logic.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use crate::host::pool::PagePool;

/// Prefixes of sequences, a node a full page. A node's run of tokens counts only behind its parent's, since K and
/// V depend on all tokens before. Each node holds a reference to its page, so a prefix outlives its sequence until
/// the page is needed (as in vLLM, Kwon et al., 2023, and in `SGLang`'s radix tree, Zheng et al., 2024). A node has no
/// page if layers with a window had let it go before it was noted.
#[derive(Debug, Default)]
pub(crate) struct PrefixMap {
    first: Children,
    nodes: HashMap<u32, Node>,
    /// The number of the next node.
    next: u32,
    /// Counts uses.
    clock: u64,
}

type Children = HashMap<Box<[u32]>, u32>;

#[derive(Debug)]
struct Node {
    parent: Option<u32>,
    tokens: Box<[u32]>,
    noted: Noted,
    children: Children,
    /// When it was used last.
    used: u64,
}

/// The page of a run of tokens, if it was there to be noted.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Noted {
    pub(crate) page: Option<u32>,
    /// Tokens of the run before those that the page is known to hold.
    gone: usize,
}

impl Noted {
    /// Whether there is a page that holds the tokens of the run from `first` on.
    pub(crate) fn holds_from(self, first: usize) -> bool {
        self.page.is_some() && self.gone <= first
    }
}

/// The pages of a sequence that are to be noted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NotedPages<'a> {
    /// From that of the oldest live token on.
    pub(crate) pages: &'a [u32],
    /// Tokens before that one.
    pub(crate) gone: usize,
}

impl NotedPages<'_> {
    fn of_run(self, index: usize, page_tokens: usize) -> Noted {
        let first = self.gone / page_tokens;
        let page = index.checked_sub(first).and_then(|at| self.pages.get(at)).copied();
        Noted { page, gone: if index == first { self.gone % page_tokens } else { 0 } }
    }
}

impl PrefixMap {
    fn children(&self, parent: Option<u32>) -> &Children {
        parent.map_or(&self.first, |parent| &self.nodes[&parent].children)
    }

    fn children_mut(&mut self, parent: Option<u32>) -> &mut Children {
        match parent {
            None => &mut self.first,
            Some(parent) => {
                &mut self.nodes.get_mut(&parent).expect("a parent outlives its children").children
            }
        }
    }

    /// The pages of the longest known prefix of `tokens`, whole pages only.
    pub(crate) fn find(&self, tokens: &[u32], page_tokens: usize) -> Vec<Noted> {
        self.path(tokens, page_tokens).into_iter().map(|node| self.nodes[&node].noted).collect()
    }

    fn path(&self, tokens: &[u32], page_tokens: usize) -> Vec<u32> {
        let mut path = Vec::new();
        for run in tokens.chunks_exact(page_tokens) {
            let Some(&node) = self.children(path.last().copied()).get(run) else { break };
            path.push(node);
        }
        path
    }

    /// Notes a use of the longest known prefix.
    pub(crate) fn touch(&mut self, tokens: &[u32], page_tokens: usize) {
        self.clock += 1;
        for node in self.path(tokens, page_tokens) {
            self.nodes.get_mut(&node).expect("a node of the path").used = self.clock;
        }
    }

    /// Adds the full pages of a sequence that begins with `tokens`. Runs that are known keep the page that they have,
    /// unless the new one holds more of their tokens.
    pub(crate) fn insert(
        &mut self,
        tokens: &[u32],
        pages: NotedPages<'_>,
        page_tokens: usize,
        pool: &mut PagePool,
    ) {
        self.clock += 1;
        let runs = tokens.chunks_exact(page_tokens);
        // Behind all pages that are gone there is one at least, or nothing is noted.
        if runs.len() <= pages.gone / page_tokens {
            return;
        }
        let mut parent = None;
        for (index, run) in runs.enumerate() {
            let new = pages.of_run(index, page_tokens);
            let known = self.children(parent).get(run).copied();
            let number = known.unwrap_or_else(|| self.add(parent, run));
            let node = self.nodes.get_mut(&number).expect("a child that is named");
            node.used = self.clock;
            if let Some(page) = new.page.filter(|_| !node.noted.holds_from(new.gone)) {
                pool.share(page);
                let old = std::mem::replace(&mut node.noted, new);
                old.page.into_iter().for_each(|page| pool.release(page));
            }
            parent = Some(number);
        }
    }

    /// Adds a node without a page.
    fn add(&mut self, parent: Option<u32>, run: &[u32]) -> u32 {
        let number = self.next;
        self.next += 1;
        self.children_mut(parent).insert(run.into(), number);
        let (tokens, children, noted) = (run.into(), Children::new(), Noted::default());
        self.nodes.insert(number, Node { parent, tokens, noted, children, used: self.clock });
        number
    }

    /// Nodes with up to `wanted` pages that no sequence refers to, least recently used first, children before their
    /// parents; and how many pages these are. Without them the map is as it was for all others.
    pub(crate) fn evictable(&self, wanted: usize, pool: &PagePool) -> (Vec<u32>, usize) {
        let is_unused = |node: &Node| node.noted.page.is_none_or(|page| pool.count(page) == 1);
        let mut left: HashMap<u32, usize> = HashMap::new();
        let leaves = self.nodes.iter().filter(|(_, node)| node.children.is_empty());
        let leaves = leaves.filter(|(_, node)| is_unused(node));
        let mut heap: BinaryHeap<_> =
            leaves.map(|(&number, node)| Reverse((node.used, number))).collect();
        let (mut evicted, mut freed) = (Vec::new(), 0);
        while freed < wanted {
            let Some(Reverse((_, number))) = heap.pop() else { break };
            evicted.push(number);
            freed += usize::from(self.page(number).is_some());
            let Some(parent) = self.nodes[&number].parent else { continue };
            let node = &self.nodes[&parent];
            let left = left.entry(parent).or_insert(node.children.len());
            *left -= 1;
            if *left == 0 && is_unused(node) {
                heap.push(Reverse((node.used, parent)));
            }
        }
        (evicted, freed)
    }

    /// The page of a node, if it has one.
    pub(crate) fn page(&self, node: u32) -> Option<u32> {
        self.nodes[&node].noted.page
    }

    /// Forgets nodes, children before their parents. Their references are the caller's from then on.
    pub(crate) fn remove(&mut self, nodes: &[u32]) {
        for number in nodes {
            let Some(node) = self.nodes.remove(number) else { continue };
            self.children_mut(node.parent).remove(&node.tokens);
        }
    }

    /// Forgets everything, and drops the references.
    pub(crate) fn clear(&mut self, pool: &mut PagePool) {
        let mut pages: Vec<u32> = self.pages().collect();
        // In order, so that a run of calls always uses the same pages.
        pages.sort_unstable();
        pages.into_iter().rev().for_each(|page| pool.release(page));
        *self = Self::default();
    }

    /// The pages that are referred to.
    pub(crate) fn pages(&self) -> impl Iterator<Item = u32> {
        self.nodes.values().filter_map(|node| node.noted.page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages in the pool that only the map refers to, for a prefix of these tokens.
    fn insert(map: &mut PrefixMap, pool: &mut PagePool, tokens: &[u32]) -> Vec<u32> {
        let pages: Vec<u32> = tokens.chunks(2).map(|_| pool.take()).collect();
        map.insert(tokens, NotedPages { pages: &pages, gone: 0 }, 2, pool);
        pages.iter().for_each(|&page| pool.release(page));
        pages
    }

    fn find(map: &PrefixMap, tokens: &[u32]) -> Vec<u32> {
        map.find(tokens, 2).iter().filter_map(|noted| noted.page).collect()
    }

    #[test]
    fn the_longest_prefix_is_found_by_whole_pages() {
        let (mut map, mut pool) = (PrefixMap::default(), PagePool::default());
        let first = insert(&mut map, &mut pool, &[1, 2, 3, 4, 5]);
        assert_eq!(find(&map, &[1, 2, 3, 4, 5, 6]), first[..2]);
        assert_eq!(find(&map, &[1, 2, 3]), first[..1]);
        assert!(find(&map, &[1, 3, 3, 4]).is_empty());
        // The same run behind another prefix is another page.
        let second = insert(&mut map, &mut pool, &[9, 9, 3, 4]);
        assert_eq!(find(&map, &[9, 9, 3, 4]), second);
        // A known prefix keeps its pages.
        let third = insert(&mut map, &mut pool, &[1, 2, 7, 8]);
        assert_eq!(find(&map, &[1, 2, 7, 8]), [first[0], third[1]]);
        assert!(pool.is_sound(map.pages()));
        assert_eq!(pool.used(), 5);
    }

    #[test]
    fn what_no_sequence_uses_goes_least_recently_used_first() {
        let (mut map, mut pool) = (PrefixMap::default(), PagePool::default());
        let old = insert(&mut map, &mut pool, &[1, 2, 3, 4]);
        let new = insert(&mut map, &mut pool, &[5, 6, 7, 8]);
        let branch = insert(&mut map, &mut pool, &[5, 6, 9, 9]);
        map.touch(&[1, 2], 2);
        let pages = |(nodes, freed): (Vec<u32>, usize)| -> Vec<u32> {
            let pages: Vec<u32> = nodes.iter().filter_map(|&it| map.page(it)).collect();
            assert_eq!(pages.len(), freed);
            pages
        };
        // Children go before their parents, though these were used before.
        assert_eq!(pages(map.evictable(9, &pool)), [old[1], new[1], branch[1], new[0], old[0]]);
        // A page that a sequence refers to stays, and so do its parents.
        pool.share(branch[1]);
        assert_eq!(pages(map.evictable(9, &pool)), [old[1], new[1], old[0]]);
        assert_eq!(pages(map.evictable(1, &pool)), [old[1]]);
        let (gone, _) = map.evictable(2, &pool);
        gone.iter().filter_map(|&node| map.page(node)).for_each(|page| pool.release(page));
        map.remove(&gone);
        assert_eq!(find(&map, &[1, 2, 3, 4]), old[..1]);
        assert_eq!(find(&map, &[5, 6, 7, 8]), new[..1]);
        assert!(pool.is_sound(map.pages().chain([branch[1]])));
        map.clear(&mut pool);
        assert!(pool.is_sound([branch[1]].into_iter()));
    }

    #[test]
    fn runs_whose_pages_are_gone_are_noted_without_them() {
        let (mut map, mut pool) = (PrefixMap::default(), PagePool::default());
        let pages: Vec<u32> = (0..3).map(|_| pool.take()).collect();
        let tokens = [1, 2, 3, 4, 5, 6, 7];
        // Three tokens are gone, the third of them from the first page that is left; the last page is not full.
        map.insert(&tokens, NotedPages { pages: &pages, gone: 3 }, 2, &mut pool);
        let noted = map.find(&tokens, 2);
        let held: Vec<_> = noted.iter().map(|it| it.page).collect();
        assert_eq!(held, [None, Some(pages[0]), Some(pages[1])]);
        assert_eq!([0, 1].map(|first| noted[1].holds_from(first)), [false, true]);
        assert!(noted[2].holds_from(0) && !noted[0].holds_from(1));
        // Of a prefix that is gone altogether nothing is noted.
        map.insert(&[9, 9, 9], NotedPages { pages: &pages, gone: 3 }, 2, &mut pool);
        assert!(map.find(&[9, 9], 2).is_empty());
        // Pages that hold more take the place of those that hold less, and of none.
        let more: Vec<u32> = (0..2).map(|_| pool.take()).collect();
        map.insert(&tokens[..4], NotedPages { pages: &more, gone: 0 }, 2, &mut pool);
        assert_eq!(find(&map, &tokens), [more[0], more[1], pages[1]]);
        map.insert(&tokens, NotedPages { pages: &pages, gone: 3 }, 2, &mut pool);
        assert_eq!(find(&map, &tokens), [more[0], more[1], pages[1]]);
        pages.iter().chain(&more).for_each(|&page| pool.release(page));
        assert!(pool.is_sound(map.pages()));
        // Nodes without a page go with their children, and count for nothing.
        let mut map = PrefixMap::default();
        let page = pool.take();
        map.insert(&[1, 2, 3, 4], NotedPages { pages: &[page], gone: 2 }, 2, &mut pool);
        pool.release(page);
        let (gone, freed) = map.evictable(5, &pool);
        assert_eq!((gone.len(), freed), (2, 1));
        map.remove(&gone);
        assert!(map.nodes.is_empty() && map.first.is_empty());
    }
}
