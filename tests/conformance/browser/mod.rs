//! The tests in a browser: `tests/browser/page.mjs` lists them, and runs each by its number.

mod faults;

use std::cell::RefCell;
use std::rc::Rc;

use test::{TestDescAndFn, TestFn};
use wasm_bindgen::prelude::*;

/// A test's name, and what it runs.
type Test = (String, fn() -> Result<(), String>);

thread_local! {
    static TESTS: RefCell<Vec<Test>> = const { RefCell::new(Vec::new()) };
    static FILES: RefCell<Vec<(String, Rc<str>)>> = const { RefCell::new(Vec::new()) };
}

#[wasm_bindgen(module = "/page.mjs")]
extern "C" {
    /// Suspends the test for one turn of the browser's event loop. The page replaces this import by one that
    /// suspends WebAssembly, so no JavaScript may be on the stack between the test and this call.
    pub(crate) fn pause();

    /// As [`pause`], for so long that the browser has answered what it was asked.
    fn rest();

    /// What `KV_HISTORIES` says to the native tests.
    fn number_of_histories() -> Option<u32>;

    fn failed(message: &str);

    /// Bytes of all buffers that were created and not destroyed.
    fn live_bytes() -> f64;

    /// Has the browser refuse buffers with this text in their label; none for an empty text.
    fn refuse_buffers(label: &str);
}

/// Collects the tests. The compiler calls this in the place of its own test runner.
pub(crate) fn collect(tests: &[&TestDescAndFn]) {
    std::panic::set_hook(Box::new(|info| failed(&info.to_string())));
    let tests = tests.iter().filter(|test| !test.desc.ignore);
    let tests = tests.filter_map(|test| match test.testfn {
        TestFn::StaticTestFn(run) => Some((test.desc.name.to_string(), run)),
        _ => None,
    });
    TESTS.with_borrow_mut(|all| all.extend(tests));
}

/// The tests' names, a line each.
#[wasm_bindgen]
pub fn names() -> String {
    TESTS.with_borrow(|all| {
        let names: Vec<&str> = all.iter().map(|(name, _)| name.as_str()).collect();
        names.join("\n")
    })
}

/// Runs a test. A test that fails traps, after its message went to `failed`.
#[wasm_bindgen]
pub fn run(number: u32) {
    let run = TESTS.with_borrow(|all| all[number as usize].1);
    if let Err(message) = run() {
        panic!("{message}");
    }
}

/// Adds a file that a test may read.
#[wasm_bindgen]
pub fn add_file(name: String, text: String) {
    FILES.with_borrow_mut(|files| files.push((name, text.into())));
}

/// The files of the page, by name.
pub(crate) fn files() -> Vec<(String, Rc<str>)> {
    FILES.with_borrow(Clone::clone)
}

pub(crate) fn histories() -> Option<u32> {
    number_of_histories()
}
