//! A vector of 32-bit words of which copies share what they have in common. Pure host logic.

use std::sync::Arc;

/// Words of a leaf, and children of a branch.
const WIDTH: usize = 64;

/// A vector of words. A copy costs nothing, and a change of a copy what it changes: the path from the root to
/// the word, a few nodes, however long the vector is.
#[derive(Clone, Debug)]
pub(crate) struct Words {
    root: Arc<Node>,
    len: usize,
    /// Branches above each leaf.
    height: u32,
}

#[derive(Clone, Debug)]
enum Node {
    Leaf(Box<[u32; WIDTH]>),
    Branch(Vec<Arc<Node>>),
}

impl Default for Words {
    fn default() -> Self {
        Self { root: Arc::new(Node::Leaf(Box::new([0; WIDTH]))), len: 0, height: 0 }
    }
}

impl From<&[u32]> for Words {
    fn from(words: &[u32]) -> Self {
        let leaf = |words: &[u32]| {
            let mut leaf = Box::new([0; WIDTH]);
            leaf[..words.len()].copy_from_slice(words);
            Arc::new(Node::Leaf(leaf))
        };
        let mut nodes: Vec<Arc<Node>> = words.chunks(WIDTH).map(leaf).collect();
        let mut height = 0;
        while nodes.len() > 1 {
            let branch = |nodes: &[Arc<Node>]| Arc::new(Node::Branch(nodes.to_vec()));
            nodes = nodes.chunks(WIDTH).map(branch).collect();
            height += 1;
        }
        match nodes.pop() {
            Some(root) => Self { root, len: words.len(), height },
            None => Self::default(),
        }
    }
}

impl Words {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The word at `index`, which must be less than the length.
    pub(crate) fn get(&self, index: usize) -> u32 {
        debug_assert!(index < self.len);
        let mut node = &*self.root;
        let mut height = self.height;
        loop {
            match node {
                Node::Leaf(words) => return words[index % WIDTH],
                Node::Branch(children) => {
                    node = &children[child(index, height)];
                    height -= 1;
                }
            }
        }
    }

    /// Replaces the word at `index`, which must be less than the length.
    pub(crate) fn set(&mut self, index: usize, word: u32) {
        debug_assert!(index < self.len);
        insert(&mut self.root, self.height, index, word);
    }

    pub(crate) fn push(&mut self, word: u32) {
        if self.len == WIDTH.pow(self.height + 1) {
            self.root = Arc::new(Node::Branch(vec![Arc::clone(&self.root)]));
            self.height += 1;
        }
        insert(&mut self.root, self.height, self.len, word);
        self.len += 1;
    }

    pub(crate) fn pop(&mut self) -> Option<u32> {
        let last = self.len.checked_sub(1)?;
        let word = self.get(last);
        // Its node stays, for the next one.
        self.len = last;
        Some(word)
    }

    pub(crate) fn to_vec(&self) -> Vec<u32> {
        let mut words = Vec::with_capacity(self.len);
        gather(&self.root, self.len, &mut words);
        words
    }
}

/// Which child of a branch at `height` leads to `index`.
fn child(index: usize, height: u32) -> usize {
    index / WIDTH.pow(height) % WIDTH
}

/// Puts a word into its leaf. Nodes that another vector shares are copied first.
fn insert(node: &mut Arc<Node>, height: u32, index: usize, word: u32) {
    match Arc::make_mut(node) {
        Node::Leaf(words) => words[index % WIDTH] = word,
        Node::Branch(children) => {
            let at = child(index, height);
            if at == children.len() {
                let is_leaf = height == 1;
                let node = if is_leaf {
                    Node::Leaf(Box::new([0; WIDTH]))
                } else {
                    Node::Branch(Vec::new())
                };
                children.push(Arc::new(node));
            }
            insert(&mut children[at], height - 1, index, word);
        }
    }
}

/// Adds the words below a node, up to `len` in all.
fn gather(node: &Node, len: usize, words: &mut Vec<u32>) {
    match node {
        Node::Leaf(leaf) => words.extend(&leaf[..WIDTH.min(len - words.len())]),
        Node::Branch(children) => {
            for child in children {
                if words.len() < len {
                    gather(child, len, words);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(words: &Words, expected: &[u32]) {
        assert_eq!((words.len(), words.to_vec()), (expected.len(), expected.to_vec()));
        for (index, word) in expected.iter().enumerate() {
            assert_eq!(words.get(index), *word, "{index} of {}", expected.len());
        }
    }

    #[test]
    fn words_are_as_in_a_plain_vector_and_copies_are_their_own() {
        for len in [0, 1, 63, 64, 65, 4095, 4096, 4097, 300_000] {
            let plain: Vec<u32> = (0..len).map(|word| word * 7 + 1).collect();
            let made = Words::from(plain.as_slice());
            check(&made, &plain);
            let mut pushed = Words::default();
            plain.iter().for_each(|&word| pushed.push(word));
            check(&pushed, &plain);
            // Copies diverge, and the first stays as it is.
            let (mut copy, mut twin) = (made.clone(), plain.clone());
            for step in 0..200_u32 {
                match step % 5 {
                    0 | 1 => {
                        copy.push(step);
                        twin.push(step);
                    }
                    2 => assert_eq!(copy.pop(), twin.pop()),
                    _ if twin.is_empty() => {}
                    _ => {
                        let index = step as usize * 7919 % twin.len();
                        copy.set(index, step);
                        twin[index] = step;
                    }
                }
            }
            check(&copy, &twin);
            check(&made, &plain);
        }
    }

    /// Nodes that only one of two vectors has.
    fn own_nodes(a: &Arc<Node>, b: &Arc<Node>) -> usize {
        match (&**a, &**b) {
            _ if Arc::ptr_eq(a, b) => 0,
            (Node::Branch(a), Node::Branch(b)) => {
                1 + a.iter().zip(b).map(|(a, b)| own_nodes(a, b)).sum::<usize>()
            }
            _ => 1,
        }
    }

    #[test]
    fn a_change_of_a_copy_costs_a_path() {
        let long = Words::from(vec![3; 1 << 20].as_slice());
        let mut copy = long.clone();
        copy.set(77_777, 4);
        assert_eq!(own_nodes(&copy.root, &long.root), 4);
        copy.pop();
        copy.push(5);
        assert_eq!(own_nodes(&copy.root, &long.root), 4 + 3);
    }
}
