//! The walls of the source: which folder may import which, and no circles.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// What the files of a folder may import beside their own. The files at the top, which hold the types that
/// every folder speaks of, may be imported by all but `host`, which knows of errors, element types and names alone.
const ALLOWED: [(&str, &[&str]); 5] = [
    ("cache", &["storage", "attention", "host", "gpu", "top"]),
    ("attention", &["host", "gpu", "top"]),
    ("storage", &["host", "gpu", "top"]),
    ("gpu", &["top"]),
    ("host", &["error", "dtype", "sequence"]),
];

/// A file's code without comments and tests.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).expect("a source file");
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    let lines = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    lines.map(|line| format!("{line}\n")).collect()
}

fn files(folder: &Path, all: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            files(&path, all);
        } else if path.file_name().is_some_and(|name| name != "tests.rs") {
            all.push(path);
        }
    }
}

/// The module of a file: `gpu::device` of `src/gpu/device.rs`, `gpu` of `src/gpu/mod.rs`.
fn module(src: &Path, path: &Path) -> String {
    let relative = path.strip_prefix(src).expect("a file of src").with_extension("");
    let mut parts: Vec<_> =
        relative.iter().map(|part| part.to_str().expect("plain names").to_owned()).collect();
    if parts.last().is_some_and(|last| last == "mod") {
        parts.pop();
    }
    parts.join("::")
}

/// The modules that the file of module `own` imports: by `crate::` paths, and neighbours in its folder by `super::` paths.
/// A module and its own children are one thing to a reader, so what a file imports of the module above it does not count.
fn imports(code: &str, own: &str, modules: &BTreeSet<String>) -> BTreeSet<String> {
    let parent = own.rsplit_once("::").map_or("", |(parent, _)| parent);
    let mut found = BTreeSet::new();
    for (start, above) in [("crate::", ""), ("super::", parent)] {
        for (at, _) in code.match_indices(start) {
            if code[..at].ends_with(|last: char| "$:_".contains(last) || last.is_alphanumeric()) {
                continue;
            }
            let is_path = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
            let path = code[at + start.len()..].chars().take_while(|&c| is_path(c));
            let path = [above, "::"].concat() + &path.collect::<String>();
            let paths = std::iter::successors(Some(path.trim_matches(':')), |path| {
                path.rsplit_once("::").map(|(outer, _)| outer)
            });
            let below = paths.take_while(|&path| path != above);
            found.extend(below.map(str::to_owned).find(|path| modules.contains(path)));
        }
    }
    found
}

fn graph() -> BTreeMap<String, BTreeSet<String>> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut all = Vec::new();
    files(&src, &mut all);
    let modules: BTreeSet<String> = all.iter().map(|path| module(&src, path)).collect();
    let edges = all.iter().filter(|path| !path.ends_with("lib.rs")).map(|path| {
        let own = module(&src, path);
        let mut imported = imports(&code(path), &own, &modules);
        imported.remove(&own);
        (own, imported)
    });
    edges.collect()
}

fn folder(module: &str) -> &str {
    let first = module.split("::").next().unwrap_or_default();
    if ALLOWED.iter().any(|(name, _)| *name == first) { first } else { "top" }
}

#[test]
fn imports_go_one_way() {
    let graph = graph();
    assert!(graph.len() > 30, "the sources were found");
    for (module, imported) in &graph {
        let Some((own, allowed)) = ALLOWED.iter().find(|(name, _)| *name == folder(module)) else {
            continue;
        };
        for other in imported {
            let fine = folder(other) == *own
                || allowed.contains(&folder(other)) && folder(other) != "top"
                || folder(other) == "top"
                    && (allowed.contains(&"top") || allowed.contains(&other.as_str()));
            assert!(fine, "{module} imports {other}");
        }
    }
}

#[test]
fn no_module_imports_itself_through_others() {
    let graph = graph();
    for start in graph.keys() {
        let mut seen = BTreeSet::new();
        let mut next: Vec<&String> = graph[start].iter().collect();
        while let Some(module) = next.pop() {
            assert_ne!(module, start, "{start} imports itself, by way of {seen:?}");
            if seen.insert(module) {
                next.extend(graph.get(module).into_iter().flatten());
            }
        }
    }
}

#[test]
fn the_host_side_does_not_know_wgpu() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/host");
    let mut all = Vec::new();
    files(&src, &mut all);
    for path in all {
        assert!(!code(&path).contains("wgpu"), "{}", path.display());
    }
}

#[test]
fn no_file_is_long() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut all = Vec::new();
    files(&src, &mut all);
    for path in all {
        let lines = code(&path).lines().filter(|line| !line.trim().is_empty()).count();
        assert!(lines <= 400, "{} has {lines} lines of code", path.display());
    }
}
